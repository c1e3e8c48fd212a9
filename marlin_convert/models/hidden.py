"""The hidden states of a text between two decoder blocks, kept where there is room for them."""

import math
import os
from collections.abc import Callable, Iterator
from mmap import mmap
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from marlin_convert.checkpoint.linears import is_finite
from marlin_convert.models.blocks import Arguments, BlockModel
from marlin_convert.models.memory import free_memory

# Tokens of one micro-batch: enough to fill the device, few enough for a forward's temporaries to stay small.
TOKENS = {"cpu": 2048, "cuda": 16384}


class HiddenStates:
    """What enters the next block, for every micro-batch of a text.

    They stay on the device while they take less than a quarter of its free memory, else in host memory, and
    past a quarter of that in a file of `directory`. What else the blocks are handed (masks, rotary
    embeddings) is kept once where it is the same for every micro-batch, and else for each: per-layer inputs,
    and what blocks write for later ones to read.
    """

    def __init__(self, model: BlockModel, ids: Tensor, directory: Path | None = None):
        """Embed ids (samples, length), one micro-batch of whole samples after another."""
        self.model = model
        samples, length = ids.shape
        self.batches = ids.split(max(1, TOKENS[model.device.type] // length))
        self._calls: list[list[Arguments]] = []
        self._same: dict[tuple[Any, ...], Tensor] = {}
        # what the last block gave to hand on beside the hidden states, and what the next one gives
        self._handed: dict[int, dict[int | str, Tensor]] = {}
        self._given: dict[int, dict[int | str, Tensor]] = {}
        for i, batch in enumerate(self.batches):
            hidden, calls = model.embed(batch)
            if i == 0:
                axis = model.structure.batch_axis
                shape = [*hidden.shape[:axis], samples, *hidden.shape[axis + 1 :]]
                self._states = self._room(torch.Size(shape), model.dtype, directory)
            self._calls.append(self._shared(calls, len(batch)))
            self._states[i].copy_(hidden)

    def _shared(self, calls: list[Arguments], samples: int) -> list[Arguments]:
        """The arguments of a micro-batch, of which those that an earlier one had too are not kept again."""
        seen: dict[int, Any] = {}

        def shared(x: Any, *place: Any) -> Any:
            if id(x) not in seen:
                seen[id(x)] = self._first(x, (*place, samples)) if isinstance(x, Tensor) else x
                if type(x) in (tuple, list):
                    seen[id(x)] = type(x)(shared(one, *place, i) for i, one in enumerate(x))
            return seen[id(x)]

        return [
            Arguments(
                shared(call.args, number),
                {name: shared(x, number, name) for name, x in call.kwargs.items()},
            )
            for number, call in enumerate(calls)
        ]

    def _first(self, x: Tensor, place: tuple[Any, ...]) -> Tensor:
        """The tensor that was at this place of an earlier micro-batch's calls, if it has the same values."""
        first = self._same.setdefault(place, x)
        same = first.shape == x.shape and first.dtype == x.dtype and torch.equal(first, x)
        return first if same else x.to(self._states[0].device)

    def _on_device(self, x: Any) -> Any:
        """An argument as it was handed; dictionaries are the very same, since blocks write into them."""
        if isinstance(x, Tensor):
            return x.to(self.model.device, non_blocking=True)
        return type(x)(self._on_device(one) for one in x) if type(x) in (tuple, list) else x

    def _room(self, shape: torch.Size, dtype: torch.dtype, directory: Path | None) -> list[Tensor]:
        """Memory for hidden states of this shape, by micro-batch."""
        size = shape.numel()
        device = self.model.device
        nbytes = size * dtype.itemsize
        if device.type == "cuda" and 4 * nbytes < free_memory(device):
            states = torch.empty(size, dtype=dtype, device=device)
        elif directory is None or 4 * nbytes < free_memory(torch.device("cpu")):
            states = torch.empty(size, dtype=dtype, pin_memory=device.type == "cuda")
        else:
            path = directory / "hidden_states.bin"
            with path.open("w+b") as file:
                path.unlink()  # the space is given back with the mapping, even after a kill
                file.truncate(nbytes)
                if hasattr(os, "posix_fallocate"):  # on a full disk an error here, not a dead process later
                    os.posix_fallocate(file.fileno(), 0, nbytes)
                states = torch.frombuffer(mmap(file.fileno(), nbytes), dtype=dtype)
        axis = self.model.structure.batch_axis
        shapes = [(*shape[:axis], len(batch), *shape[axis + 1 :]) for batch in self.batches]
        pieces = states.split([torch.Size(one).numel() for one in shapes])
        return [piece.view(one) for piece, one in zip(pieces, shapes, strict=True)]

    def __len__(self) -> int:
        return len(self.batches)

    def forward(self, i: int, block: nn.Module, number: int) -> Tensor:
        """The output of decoder block `number` for micro-batch i, of the shape of `state`."""
        call = self._calls[i][number]
        args = [self._on_device(x) for x in call.args]
        kwargs = {name: self._on_device(x) for name, x in call.kwargs.items()}
        for name, value in self._handed.get(i, {}).items() if number else ():
            if isinstance(name, int):
                args[name - 1] = self._on_device(value)
            else:
                kwargs[name] = self._on_device(value)
        output = block(self.state(i), *args, **kwargs)
        if self.model.structure.handed:
            self._given[i] = {
                name: output[place].to(self._states[i].device)
                for name, place in self.model.structure.handed.items()
                if output[place] is not None
            }
        return output if isinstance(output, Tensor) else output[0]

    def state(self, i: int) -> Tensor:
        """Micro-batch i on the device, (batch, length, hidden) in most models; a block may write into it."""
        state = self._states[i].to(self.model.device, self.model.compute_dtype, non_blocking=True)
        return state.clone() if state is self._states[i] else state

    def samples(self, i: int) -> Iterator[Tensor]:
        """The state of every sample of micro-batch i, of a batch of one."""
        return iter(self.state(i).split(1, self.model.structure.batch_axis))

    def put(self, i: int, output: Tensor) -> None:
        """Let micro-batch i go on to the next block as `output`."""
        self._states[i].copy_(output)
        self._handed[i] = self._given.pop(i, {})

    def finite(self) -> bool:
        """Whether no micro-batch holds NaN or infinity."""
        return all(is_finite(state) for state in self._states)

    def divergence(
        self, original: "HiddenStates", mean: Callable[[Tensor], float] = lambda x: x.mean().item()
    ) -> float:
        """How far the states h are from those of the original model, h0.

        The root of the mean over tokens of ||h - h0||^2 / ||h0||^2; `mean` takes it of (tokens,).
        """
        shares = []
        for i in range(len(self)):
            before = original.state(i)  # from wherever it is kept, so once
            size = before.float().square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
            shares.append(((self.state(i) - before).float().square().sum(-1) / size).flatten())
        return math.sqrt(mean(torch.cat(shares)))

    def advance(self, block: nn.Module, number: int) -> None:
        """Take every micro-batch through a block."""
        with torch.no_grad():
            for i in range(len(self)):
                self.put(i, self.forward(i, block, number))
