"""The quantized model while it is tuned, beside the original that it learns from: one set of modules.

The original's blocks stay as they are. The student's are the same modules, called with other tensors in the
places of packed weights and norms.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from marlin_convert.checkpoint.linears import Weights
from marlin_convert.errors import SourceError
from marlin_convert.models.blocks import Arguments, BlockModel
from marlin_convert.ranks import Ranks
from marlin_convert.solvers.straight_through import Adam, TunedMatrix, TunedVector, divergence


class Student:
    """A model all of whose blocks are on one device, and what is tuned of it, by full names.

    A GPU multiplies in bfloat16 and keeps norms and sums in float32, as training does; a CPU computes in
    float32. `matrices` (by module) are given by `add`; `norms` are found: the vectors called `weight` of
    modules that are no linears, inside of the blocks and outside, but those that text never reads. Biases and
    the other vectors that models have are not tuned. Of several ranks each has the same student, and takes
    its share of the samples.
    """

    def __init__(
        self,
        weights: Weights,
        device: torch.device,
        *,
        rate: float,
        trust_remote_code: bool,
        ranks: Ranks,
    ):
        """Load the original; `rate` is the learning rate of norms, in shares of their values."""
        self.device = device
        self._ranks = ranks
        self.adam = Adam(ranks.sum)
        self.model = BlockModel(
            weights, device, dtype=torch.float32, fast=False, trust_remote_code=trust_remote_code
        )
        self.model.load_outside(head=True)
        self._dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        head = self.model.model.get_output_embeddings()
        tied = head is not None and head.weight is self.model.model.get_input_embeddings().weight
        for module in self.model.model.modules():
            if isinstance(module, nn.Linear) and not (module is head and tied):
                self._narrow(module)
        for number in range(len(self.model)):
            for module in self.model.load(number).modules():
                if isinstance(module, nn.Linear):
                    self._narrow(module)
        self.matrices: dict[str, TunedMatrix] = {}
        self.norms = {
            name: TunedVector(parameter, adam=self.adam, rate=rate)
            for name, parameter in self.model.model.named_parameters()
            if name.rpartition(".")[2] == "weight" and parameter.dim() == 1
            if name not in self.model.structure.idle
            if not isinstance(self.model.model.get_submodule(name.rpartition(".")[0]), nn.Linear)
        }
        self._inside: dict[int, list[str]] = {}
        for name in self.norms:
            self._place(name)

    def _narrow(self, linear: nn.Linear) -> None:
        if not linear.weight.is_meta:
            linear.weight = nn.Parameter(linear.weight.to(self._dtype), requires_grad=False)

    def add(self, name: str, matrix: TunedMatrix) -> None:
        """Let a matrix take the place of a linear's weight."""
        self.matrices[name] = matrix
        self._place(name)

    def _place(self, name: str) -> None:
        number = self.model.structure.block_of(name)
        self._inside.setdefault(-1 if number is None else number, []).append(name)

    def _tensors(self, number: int) -> dict[str, Tensor]:
        """What takes the places of a block's own tensors, by their names in it; of no block for -1."""
        prefix = f"{self.model.name(number)}." if number >= 0 else ""
        found = {}
        for name in self._inside.get(number, ()):
            if name in self.matrices:
                found[f"{name.removeprefix(prefix)}.weight"] = self.matrices[name].weight(self._dtype)
            else:
                found[name.removeprefix(prefix)] = self.norms[name].value()
        return found

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast("cuda", dtype=self._dtype) if self.device.type == "cuda" else nullcontext()

    def _block(self, number: int, hidden: Tensor, call: Arguments, *, tuned: bool) -> Tensor:
        """What a block of the original gives, or the student's."""
        other = self._tensors(number) if tuned else {}
        output = functional_call(self.model.blocks[number], other, (hidden, *call.args), call.kwargs)
        return output if isinstance(output, Tensor) else output[0]

    @torch.no_grad()
    def _last_hidden(self, ids: Tensor, *, tuned: bool) -> Tensor:
        hidden, calls = self.model.embed(ids)
        for number, call in enumerate(calls):
            hidden = self._block(number, hidden, call, tuned=tuned)
        return hidden

    def _pairs(self, ids: Tensor, ours: Tensor, theirs: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Logits (positions, vocabulary) of the student and of the original, a sample at a time."""
        axis = self.model.structure.batch_axis
        for sample, q, p in zip(ids.split(1), ours.split(1, axis), theirs.split(1, axis), strict=True):
            with torch.no_grad():
                target = self.model.logits(sample, p)[0]
            yield self.model.logits(sample, q, self._tensors(-1))[0], target

    def learn(self, ids: Tensor, step: int, rate: float) -> None:
        """Take a step towards the original's answers to ids (samples, length).

        Of the blocks only their inputs are kept for backward, each is computed again; and of logits those of
        one sample. There is a sample at least for every rank.
        """
        self.adam.begin(step, rate)
        tokens, ids = ids.numel(), ids[self._ranks.share.slice(len(ids))]
        with self._autocast():
            theirs = self._last_hidden(ids, tuned=False)
            hidden, calls = self.model.embed(ids)
            for number, call in enumerate(calls):
                hidden = checkpoint(
                    self._block, number, hidden, call, tuned=True,
                    use_reentrant=False, preserve_rng_state=False,
                )  # fmt: skip
            last = hidden.detach().requires_grad_()
            for ours, target in self._pairs(ids, last, theirs):
                (divergence(ours, target) / tokens).backward()
        # of several ranks in this thread, on a GPU too, where it has one of its own: what sums gradients up
        # heeds signals, and says who was lost
        with torch.autograd.set_multithreading_enabled(self._ranks.alone):
            hidden.backward(last.grad)
        for norm in self.norms.values():
            norm.step()

    @torch.no_grad()
    def divergence(self, ids: Tensor, batch: int) -> float:
        """KL(original || student) in nats a token over ids (samples, length), `batch` samples at a time."""
        total, own = 0.0, ids[self._ranks.share.slice(len(ids))]
        with self._autocast():
            for some in own.split(batch) if len(own) else ():
                hidden = [self._last_hidden(some, tuned=tuned) for tuned in (True, False)]
                total += sum(divergence(*pair).item() for pair in self._pairs(some, *hidden))
        return sum(self._ranks.all_say(total)) / ids.numel()

    def settle(self, dtypes: Mapping[str, torch.dtype]) -> None:
        """Round scales and norms to what is written, norms to the type of their name."""
        for matrix in self.matrices.values():
            matrix.settle()
        for name, norm in self.norms.items():
            norm.settle(dtypes[name])

    def state(self) -> dict[str, Tensor]:
        """Every tensor that moves, by a name of its own."""
        return {
            f"{name}:{key}": tensor.detach()
            for name, state in (
                *((name, matrix.state) for name, matrix in self.matrices.items()),
                *((name, norm.state) for name, norm in self.norms.items()),
            )
            for key, tensor in state.items()
        }


@contextmanager
def repeatable() -> Iterator[None]:
    """Gradients that are the same every time on one device: deterministic kernels, of attention too.

    SourceError where an operation of the model has none.
    """
    before = torch.are_deterministic_algorithms_enabled()
    only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
    fill, torch.utils.deterministic.fill_uninitialized_memory = (  # type: ignore[attr-defined]
        torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        False,
    )
    # what cuBLAS wants to be told before it computes the same every time
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
            yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        operation = str(error).partition(" ")[0]
        raise SourceError(
            f"{operation}, which the model is computed with, has no deterministic kernel on this device.",
            "it cannot be tuned to the same result twice: use --effort default.",
        ) from error
    finally:
        torch.use_deterministic_algorithms(before, warn_only=only_warns)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
