"""The story of `--effort high`: solve, then tune codes, scales and norms against the original's answers.

First every block is solved (solve.py), and what is found is kept in the run's directory. Then the whole model
learns from the original: the divergence of their answers over the whole vocabulary, on the text calibrated on
and more. What comes of it is packed like any other codes; if it answers no nearer than the solver's on text
held out, the solver's are. Of several ranks each has the whole model, and takes its share of the samples of
every step; the first keeps what is found, and packs it.
"""

import logging
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from math import cos, inf, isfinite, pi
from pathlib import Path

import torch
from torch import Tensor

from marlin_convert.calibration import TuningText
from marlin_convert.checkpoint.kept import keep, keep_all, kept
from marlin_convert.checkpoint.linears import Weights
from marlin_convert.checkpoint.unfinished import SOLVED, TUNING
from marlin_convert.codes import Packed, Tuned, pack
from marlin_convert.matrix import Fate
from marlin_convert.plan import Plan
from marlin_convert.quantized import QuantizedLinear
from marlin_convert.ranks import Ranks
from marlin_convert.solve import Solve
from marlin_convert.solvers.straight_through import TunedMatrix, unsigned
from marlin_convert.student import Student, repeatable

log = logging.getLogger("marlin_convert")

# Tokens to tune on and to hold out, as far as there are so many, and of one step.
TOKENS, HELD_OUT, STEP = 1280 * 1024, 32 * 1024, 8 * 1024
# The share of the steps in which the rate rises; then it falls to zero as a cosine does.
WARM_UP = 0.05
# How often held-out text is looked at on the way: after every such share of the steps.
PARTS = 4
# Divergence on it that has grown so far over the solver's will not come back.
HOPELESS = 2.0
# Seconds after which what is tuned is kept for a run to go on with: on disk it takes what it does in memory.
KEEP_AFTER = 600.0


@dataclass(frozen=True)
class Rates:
    """How far to go: of latents in codes, of scales and norms in shares of them; by measurement."""

    epochs: int
    codes: float
    shares: float


# More text is better than more of the same; 2:4 leaves more to make up for (benchmarks/RESULTS.md).
DENSE, SPARSE = Rates(1, 5e-3, 1e-3), Rates(2, 2e-2, 2e-3)


class Tune:
    """Codes that are solved and then tuned, all of them before the first is given."""

    divergence: float | None = None  # of the solver's hidden states: noted as they are solved

    def __init__(
        self,
        plan: Plan,
        weights: Weights,
        text: TuningText,
        device: torch.device,
        *,
        directory: Path,
        trust_remote_code: bool,
        ranks: Ranks,
    ):
        """`directory` is where the run keeps what it has found; the first rank has it."""
        self._plan, self._weights, self._text, self._device = plan, weights, text, device
        self._ranks = ranks
        self._solved, self._tuning = directory / SOLVED, directory / TUNING
        self._trust_remote_code = trust_remote_code
        self._rates = SPARSE if plan.sparsity else DENSE
        self._student: Student | None = None
        self.replayed = 0
        self.tuned: Tuned | None = None

    # ---- solving

    def solve(
        self,
        solve: Solve,
        blocks: Iterable[int],
        done: int,
        note: Callable[[int, float | None], None],
    ) -> None:
        """Solve the `blocks` that are left after `done`; `note` what is kept, and how far it is off."""
        solve.skip(done, self._weight if self._ranks.first else None)
        for number in blocks:
            if not self._ranks.first:
                for _ in solve.solved(number):
                    pass
                continue
            tensors: dict[str, Tensor] = {}
            rows = []
            for one in chain.from_iterable(solve.solved(number)):
                assert isinstance(one.found, QuantizedLinear) and one.latents is not None
                tensors[f"{one.fate.name}.latents"] = one.latents
                tensors[f"{one.fate.name}.scales"] = one.found.scales
                if one.found.kept is not None:
                    tensors[f"{one.fate.name}.kept"] = one.found.kept
                rows.append(one.row)
            keep(self._file(number), tensors, rows)
            note(number + 1, solve.divergence)
        self.replayed = solve.replayed

    def _file(self, number: int) -> Path:
        return self._solved / f"{number}.safetensors"

    def _layer(self, fate: Fate, tensors: dict[str, Tensor]) -> QuantizedLinear:
        """What the solver has found for a matrix."""
        layout = fate.layout
        return QuantizedLinear(
            unsigned(tensors[f"{fate.name}.latents"], layout.bits),
            tensors[f"{fate.name}.scales"],
            fate.k if layout.group_size == -1 else layout.group_size,
            layout.bits,
            kept=tensors.get(f"{fate.name}.kept"),
        )

    def _weight(self, fate: Fate) -> Tensor:
        number = self._plan.structure.block_of(fate.name)
        assert number is not None
        return self._layer(fate, kept(self._file(number))[0]).dequantize(self._plan.dtype)

    # ---- tuning

    def tune(self) -> None:
        """Take the steps, from where an earlier run has kept them; then judge by the held-out text."""
        started = time.monotonic()
        ids, held_out = self._text.ids, self._text.held_out
        batch = step_samples(ids.shape[1])
        order = self._order(min(batch, len(ids)))
        with repeatable():
            student = self._load()
            before, begin = self._resume(student)
            if begin == 0:
                before = student.divergence(held_out, batch)
            log.info("tuning: %d steps, held-out divergence %.5f", len(order), before)
            saved, after = time.monotonic(), before
            for step in range(begin, len(order)):
                student.learn(ids[order[step]], step, _rate(step, len(order)))
                if (step + 1) % -(-len(order) // PARTS) == 0 and step + 1 < len(order):
                    after = student.divergence(held_out, batch)
                    _say(step + 1, len(order), after, time.monotonic() - started, begin)
                    if not after <= HOPELESS * before:
                        break
                old = time.monotonic() - saved > KEEP_AFTER
                if self._ranks.first and old and step + 1 < len(order):
                    self._keep(student, before, step + 1)
                    saved = time.monotonic()
            else:
                student.settle(self._plan.dtypes)
                after = student.divergence(held_out, batch)
                _say(len(order), len(order), after, time.monotonic() - started, begin)
        better, norms = after < before, {}
        if better:
            self._student = student
            norms = {
                name: norm.values.to(self._plan.dtypes[name]).cpu() for name, norm in student.norms.items()
            }
        else:
            log.warning(
                "tuning is of no use here: held-out divergence %.5f, with the solver's codes %.5f; these are "
                "written",
                after,
                before,
            )
        record = {
            "steps": step + 1,
            "held_out_divergence": {"solved": _digits(before), "tuned": _digits(after)},
            "kept": better,
            "tensors": sorted(norms),
        }
        self.tuned = Tuned(norms, record, time.monotonic() - started)

    def _order(self, batch: int) -> list[Tensor]:
        """The windows of every step: all of them in every epoch, but for a rest smaller than a batch."""
        generator = torch.Generator().manual_seed(self._plan.recipe.seed)
        count = len(self._text.ids)
        found: list[Tensor] = []
        for _ in range(self._rates.epochs):
            drawn = torch.randperm(count, generator=generator)[: count // batch * batch]
            found += drawn.split(batch)
        return found

    def _load(self) -> Student:
        """The original on the device, and the student as the solver has left it."""
        rates = self._rates
        student = Student(
            self._weights, self._device, rate=rates.shares, ranks=self._ranks,
            trust_remote_code=self._trust_remote_code,
        )  # fmt: skip
        for number in range(self._plan.blocks):
            tensors = self._of_all(kept(self._file(number))[0] if self._ranks.first else {})
            for fate in self._plan.worked_on_in(number):
                mask = tensors.get(f"{fate.name}.kept")
                matrix = TunedMatrix(
                    tensors[f"{fate.name}.latents"],
                    tensors[f"{fate.name}.scales"],
                    bits=fate.layout.bits,
                    kept=None if mask is None else mask.T.contiguous(),
                    adam=student.adam,
                    rates=(rates.codes, rates.shares),
                )
                student.add(fate.name, matrix)
        return student

    def _of_all(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of the first rank, at every rank, on its device."""
        return {
            name: self._ranks.given(tensors.get(name), self._device)
            for name in self._ranks.told(list(tensors))
        }

    def _keep(self, student: Student, before: float, step: int) -> None:
        """Keep all that moves, where the disk has room for it."""
        needed = sum(tensor.nbytes for tensor in student.state().values())
        free = shutil.disk_usage(self._solved).free
        if needed > free:
            log.warning(
                "step %d of the tuning is not kept: it takes %s bytes, %s are free; a run that is stopped "
                "begins to tune again",
                step, f"{needed:,}", f"{free:,}",
            )  # fmt: skip
            return
        keep_all(self._tuning, self._files(student).items(), {"step": step, "before": before})

    def _files(self, student: Student) -> dict[str, dict[str, Tensor]]:
        """All that moves, by the names of the files that keep it: one a block, one for what is in none."""
        files: dict[str, dict[str, Tensor]] = {}
        for name, tensor in student.state().items():
            number = self._plan.structure.block_of(name.partition(":")[0])
            files.setdefault(f"{number}.safetensors", {})[name] = tensor
        return files

    def _resume(self, student: Student) -> tuple[float, int]:
        """Go back to where an earlier run was: the divergence it began with, and the step to go on with."""
        said = {"before": inf, "step": 0}
        files = self._files(student) if self._ranks.told(self._tuning.is_dir()) else {}
        for file, state in files.items():
            tensors, said = kept(self._tuning / file) if self._ranks.first else ({}, said)
            for name, tensor in self._of_all(tensors).items():
                state[name].copy_(tensor)
        said = self._ranks.told(said)
        if said["step"]:
            log.info("resuming at step %d of the tuning", said["step"])
        return said["before"], said["step"]

    # ---- writing

    def block(self, number: int) -> Iterator[Packed]:
        """Every matrix of a block as it was tuned or, if that was of no use, as it was solved."""
        tensors, rows = kept(self._file(number))
        for row in rows:
            fate = self._plan.fates[row["name"]]
            layer = self._layer(fate, tensors)
            if self._student is not None:
                codes, scales = self._student.matrices[fate.name].result()
                mask = None if layer.kept is None else layer.kept.to(codes.device)
                layer = QuantizedLinear(codes, scales, layer.group_size, layer.bits, kept=mask)
            yield pack(fate, layer, self._plan, row)


def kept_bytes(plan: Plan) -> int:
    """Bytes on disk of what is solved, until it is tuned and written."""
    return sum(
        fate.k * fate.n * ((2 if fate.layout.bits == 4 else 4) + fate.layout.sparse) for fate in plan.packed
    )


def step_samples(length: int) -> int:
    """How many samples of so many tokens are a step."""
    return max(1, STEP // length)


def _rate(step: int, steps: int) -> float:
    """What learning rates are multiplied with in a step, counted from 0."""
    warm = min(1.0, (step + 1) / max(1.0, WARM_UP * steps))
    return warm * 0.5 * (1 + cos(pi * (step + 0.5) / steps))


def _say(step: int, steps: int, divergence: float, seconds: float, begin: int) -> None:
    """How far it is, and how long it has taken from step `begin` on."""
    log.info(
        "tuning: step %d of %d, held-out divergence %.5f, %.0f s, about %.0f s left",
        step, steps, divergence, seconds, seconds / (step - begin) * (steps - step),
    )  # fmt: skip


def _digits(value: float) -> float | None:
    """Six of them, as JSON can hold them."""
    return float(f"{value:.6g}") if isfinite(value) else None
