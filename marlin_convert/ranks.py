"""The processes that torchrun starts for one command: which of them this is, what they tell each other.

torch.distributed carries all of it, with gloo between CPUs and NCCL between GPUs; no other module knows it. A
rank is one of these processes, the first is rank 0. All ranks make the same calls in the same order.
"""

import os
import pickle
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from marlin_convert import pulse
from marlin_convert.errors import ConvertError

T = TypeVar("T")
R = TypeVar("R")

# How long a rank waits for the others: longer than any block takes. A rank that ends is noticed at once, one
# that is stopped, or whose machine is lost, by its pulse.
PATIENCE = timedelta(days=2)

# Seconds in which the others say why they end, before one that says nothing counts as lost.
LAST_WORDS = 5.0
# Seconds that a rank leaves those before it to say the same.
PRECEDENCE = 2.0

# Bytes of what a rank says that go without asking how long it is.
SHORT = 4096

# Tensors that are sent as one begin at multiples of so many bytes.
ALIGNED = 16


class RankLost(BaseException):
    """Another rank has ended; which one, and why, comes out when all end.

    No Exception, which those that judge a checkpoint would take for a fault of it.
    """


@dataclass(frozen=True)
class Share:
    """One of `of` pieces, as equal as can be, of whatever is counted."""

    index: int = 0
    of: int = 1

    def range(self, count: int) -> range:
        """Which of so many are in this piece."""
        return range(self.index * count // self.of, (self.index + 1) * count // self.of)

    def slice(self, count: int) -> slice:
        """The same, to index with."""
        return slice(self.range(count).start, self.range(count).stop)


class Ranks:
    """This process among the `count` that share one command; alone, it has nobody to wait for."""

    def __init__(self, rank: int = 0, count: int = 1, store: Any = None, of_machine: Share | None = None):
        self.rank = rank
        self.count = count
        self._store = store
        self._pulse = None if store is None else pulse.Pulse(store.clone(), rank, count)
        self._of_machine = of_machine or Share(rank, count)

    @classmethod
    def join(cls) -> "Ranks":
        """Meet the others that torchrun has started; on a GPU the current device is taken."""
        from torch import distributed

        store, rank, count = next(distributed.rendezvous("env://"))
        nccl = torch.cuda.is_available() and distributed.is_nccl_available()
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if nccl else "gloo",
            store=distributed.PrefixStore("group", store), rank=rank, world_size=count, timeout=PATIENCE,
        )  # fmt: skip
        own_store = distributed.PrefixStore("marlin_convert", store)
        of_machine = Share(int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"]))
        return cls(rank, count, own_store, of_machine)

    @property
    def alone(self) -> bool:
        """Whether there is one rank only."""
        return self.count == 1

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes and speaks."""
        return self.rank == 0

    @property
    def first_here(self) -> bool:
        """Whether this is the first rank of its machine, which does what all there need once."""
        return self._of_machine.index == 0

    @property
    def count_here(self) -> int:
        """How many ranks its machine has."""
        return self._of_machine.of

    @property
    def share(self) -> Share:
        """What of anything that is split is this rank's."""
        return Share(self.rank, self.count)

    @property
    def shares(self) -> list[Share]:
        """The shares of all ranks, in their order."""
        return [Share(rank, self.count) for rank in range(self.count)]

    def told(self, said: Any = None) -> Any:
        """What the first rank says, at every rank; torch's own way would not heed signals while it waits."""
        from torch import distributed

        if self.alone:
            return said
        word = _word(said)
        size = torch.tensor(len(word))
        self._wait(distributed.broadcast(size, 0, async_op=True))
        word = word if self.first else torch.empty(int(size), dtype=torch.uint8)
        self._wait(distributed.broadcast(word, 0, async_op=True))
        return _said(word)

    def all_say(self, said: Any) -> list[Any]:
        """What every rank says, in their order."""
        from torch import distributed

        if self.alone:
            return [said]
        word = _word(said)
        word = torch.cat([torch.tensor([len(word)]).view(torch.uint8), word])
        words, size = [word], SHORT
        while size:  # once, unless one of them is long
            words = [torch.empty(size, dtype=torch.uint8) for _ in range(self.count)]
            padded = torch.nn.functional.pad(word, (0, size - len(word)))
            self._wait(distributed.all_gather(words, padded, async_op=True))
            longest = max(int(one[:8].view(torch.int64)) for one in words) + 8
            size = longest if longest > size else 0
        return [_said(one[8:]) for one in words]

    def each(self, items: Sequence[T], work: Callable[[T], R]) -> Iterator[R]:
        """What `work` gives for every item, in their order, at every rank: of the items each does its share.

        A ConvertError for an item comes after what is before it; any other error is this rank's own.
        """
        if self.alone:
            yield from map(work, items)
            return
        given: list[R] = []
        wrong = None
        try:
            for item in items[self.share.slice(len(items))]:
                given.append(work(item))
        except ConvertError as error:
            wrong = str(error), error.hint
        for rank, (found, stopped_by) in enumerate(self.all_say((given, wrong))):
            yield from found
            if stopped_by is not None:
                said, hint = stopped_by
                raise ConvertError(f"rank {rank}: {said}" if rank else said, hint)

    def mean(self, values: Tensor) -> float:
        """The mean of all values (n,) that the ranks have."""
        if self.alone:
            return values.mean().item()
        said = self.all_say((values.double().sum().item(), len(values)))
        return sum(total for total, _ in said) / sum(count for _, count in said)

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Sum tensors up over all ranks, in place at all of them; they have the same shapes everywhere.

        Terms are added in an order that the number of ranks tells.
        """
        from torch import distributed

        if not self.alone:
            self._wait_for([distributed.all_reduce(one, async_op=True) for one in tensors])

    def begin_sum(self, tensor: Tensor, owner: int) -> Callable[[], None]:
        """Begin to sum a tensor up over all ranks, in place at its owner; what is returned waits for it.

        It has the same shape everywhere; at the other ranks its contents are undefined after.
        """
        from torch import distributed

        return partial(self._wait_for, [distributed.reduce(tensor, owner, async_op=True)])

    def gathered(self, own: Tensor) -> tuple[Tensor, list[int]]:
        """The tensors (rows, ...) of all ranks as one, in their order, and how many rows each has."""
        from torch import distributed

        rows = self.all_say(len(own))
        whole = own.new_empty(sum(rows), *own.shape[1:])
        pieces = whole.split(rows)
        pieces[self.rank].copy_(own)
        # as bytes, which all that carry them know
        sent = [(piece.view(-1).view(torch.uint8), rank) for rank, piece in enumerate(pieces) if len(piece)]
        self._wait_for([distributed.broadcast(piece, rank, async_op=True) for piece, rank in sent])
        return whole, rows

    def _wait_for(self, works: Sequence[Any]) -> None:
        # all were begun before the first is waited for
        for work in works:
            self._wait(work)

    def given(self, tensor: Tensor | None, device: torch.device) -> Tensor:
        """The first rank's tensor, at every rank, on its device."""
        if self.alone:
            assert tensor is not None
            return tensor.to(device)
        ((_, (found,)),) = self._broadcast(
            None, [] if tensor is None else [tensor.to(device)], device, senders=[0]
        )
        return found

    def exchange(
        self, said: Any, tensors: Sequence[Tensor], device: torch.device
    ) -> Sequence[tuple[Any, Iterable[Tensor]]]:
        """What every rank says, with its tensors, in the order of ranks; on this rank's device.

        All of one rank are in one piece of memory.
        """
        return self._broadcast(said, tensors, device, senders=range(self.count))

    def _broadcast(
        self, said: Any, tensors: Sequence[Tensor], device: torch.device, senders: Sequence[int]
    ) -> Sequence[tuple[Any, Iterable[Tensor]]]:
        from torch import distributed

        everyone = self.all_say((said, [(tensor.shape, tensor.dtype) for tensor in tensors]))
        found = []
        for sender in senders:
            words, kinds = everyone[sender]
            parcel = _Parcel(kinds, device)
            if sender == self.rank:
                parcel.put(tensors)
            self._wait(distributed.broadcast(parcel.data, sender, async_op=True))
            found.append((words, parcel))
        return found

    def _wait(self, work: Any) -> None:
        """Wait as Python does, which heeds signals: NCCL never hears that another process is gone.

        It is looked at less and less often: the processor may be needed for what is waited for.
        """
        began = time.monotonic()
        try:
            while not work.is_completed():
                if self._pulse is not None and (self._pulse.silent or self._pulse.unanswered):
                    raise _lost("another rank is not heard of any more.")
                time.sleep(min(0.00005 + (time.monotonic() - began) / 20, 0.005))
            work.wait()
        except RuntimeError as error:
            raise _lost("another rank has ended.") from error

    def part(self) -> None:
        """Leave the others, when the work is done."""
        from torch import distributed

        assert self._pulse is not None
        self.all_say(None)
        self._pulse.end()
        distributed.destroy_process_group()

    def last_words(self, why: str | None) -> str | None:
        """What this rank is to say as it ends before its time; None where another one does.

        `why` is its own reason, None if it ends because it was told to or another was lost. The first with a
        reason speaks; of ranks that end without a word, as the killed do, the others tell.
        """
        assert self._pulse is not None
        if self._pulse.unanswered:
            return why or "the machine of rank 0 is not heard of any more."
        silent = self._pulse.silent
        ended = {self.rank: why}
        began = time.monotonic()
        try:
            self._store.set(f"ended {self.rank}", why or "")
            while True:
                for rank in set(range(self.count)) - ended.keys():
                    if self._store.check([f"ended {rank}"]):
                        ended[rank] = self._store.get(f"ended {rank}").decode() or None
                speaker = min((rank for rank, reason in ended.items() if reason), default=self.rank)
                if speaker != self.rank and not (why and self.rank < speaker):
                    return None
                passed = time.monotonic() - began
                if len(ended) == self.count or passed > (PRECEDENCE if why else LAST_WORDS):
                    break
                time.sleep(0.02)
        except RuntimeError:  # the store is where the first rank was
            return why or "the machine of rank 0 has gone."
        lost = sorted(set(range(self.count)) - ended.keys())
        if why or not lost or self.rank != min(ended):
            return why
        who = f"rank {lost[0]} has" if len(lost) == 1 else f"ranks {', '.join(map(str, lost))} have"
        if set(lost) <= set(silent):
            seconds = f"{pulse.SILENCE:.0f} seconds"
            return f"{who} not been heard of for {seconds}: stopped, or its machine is lost."
        return f"{who} ended without a word: killed, or out of memory."


class _Parcel(Iterable[Tensor]):
    """Tensors of these shapes and types that go as one, of bytes."""

    def __init__(self, kinds: Sequence[tuple[torch.Size, torch.dtype]], device: torch.device):
        self._kinds = kinds
        size = sum(_aligned(shape.numel() * dtype.itemsize) for shape, dtype in kinds)
        self.data = torch.empty(size, dtype=torch.uint8, device=device)

    def __iter__(self) -> Iterator[Tensor]:
        start = 0
        for shape, dtype in self._kinds:
            end = start + shape.numel() * dtype.itemsize
            yield self.data[start:end].view(dtype).view(shape)
            start = _aligned(end)

    def put(self, tensors: Sequence[Tensor]) -> None:
        """Fill it."""
        for place, tensor in zip(self, tensors, strict=True):
            place.copy_(tensor)


def _lost(why: str) -> RankLost:
    """What this rank ends with too; torchrun tells it to, which is not to cut its cleaning up short."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return RankLost(why)


def _aligned(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED


def _word(said: Any) -> Tensor:
    """Anything as bytes."""
    return torch.frombuffer(bytearray(pickle.dumps(said)), dtype=torch.uint8)


def _said(word: Tensor) -> Any:
    """What `_word` has made bytes of, with others behind them or not."""
    return pickle.loads(word.numpy().tobytes())


ALONE = Ranks()
