"""The story of `bench kernel`: measure, keep every number in a CSV file, draw the figures, say it in a table.

1. Find the peers that can be imported.
2. Measure the ceilings: bandwidth, and operations a second.
3. Time every cell of the sweeps, each product compared with that of the dequantized weights before.
4. Load the GPU for minutes, if `sustained` is wanted.
5. Draw the figures, and move the directory to its place.
"""

import csv
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from marlin_convert.bench.measurements import (
    CELL_COLUMNS,
    SLICE_COLUMNS,
    Measurements,
    Row,
    cell_line,
    cell_rows,
    slice_rows,
)
from marlin_convert.bench.multipliers import CUBLAS, DENSE, Multiplier, ours, peers
from marlin_convert.bench.shapes import MODELS, SQUARES, Shape, ideal
from marlin_convert.bench.sustained import Slice, read, sustain, uuid
from marlin_convert.bench.timing import Cell, ceilings, measure
from marlin_convert.checkpoint.writer import REPLACED, check_replaceable, publish, remove
from marlin_convert.errors import ConvertError, FormatError
from marlin_convert.formats import marlin

log = logging.getLogger("marlin_convert")

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
# The artifact's: of the ideal matrix, of the models, of the roofline.
PEAK_BATCHES = BATCHES[:9]
MODELS_BATCH = 16
ROOFLINE_BATCHES = tuple(1 << power for power in range(17))

CELLS = "kernel.csv"
SUSTAINED = "sustained.csv"
# What a run writes, and words that are in it.
WRITTEN = {
    CELLS: ",".join(CELL_COLUMNS),
    SUSTAINED: ",".join(SLICE_COLUMNS),
    **dict.fromkeys(("peak.png", "models.png", "roofline.png", "sustained.png"), ""),
}


@dataclass(frozen=True)
class Job:
    """What to measure and where to write it.

    figures      any of peak, models, roofline, sustained
    shapes       layers to sweep beside the figures
    batch_sizes  of all but the figure of models; None: of each its own
    group_size   rows that share a scale, -1 for all
    minutes      of load, for sustained
    """

    output: Path
    device: torch.device
    figures: tuple[str, ...]
    shapes: tuple[Shape, ...]
    batch_sizes: tuple[int, ...] | None = None
    group_size: int = 128
    minutes: float = 5
    overwrite: bool = False


@dataclass(frozen=True)
class Sweep:
    """Layers at batch sizes: those asked for, or those of a figure; of all or only our dense kernel."""

    name: str
    shapes: tuple[Shape, ...]
    batches: tuple[int, ...]
    dense_only: bool = False


def run(job: Job) -> Measurements:
    """Measure and write all that a job asks for.

    ConvertError when the output is taken, or clocks cannot be read; FormatError for a shape that MARLIN
    cannot hold; KernelError when there is no kernel for the GPU, or a product of ours is wrong.
    """
    asked = sweeps(job, torch.cuda.get_device_properties(job.device).multi_processor_count)
    _check_shapes(asked, job.group_size)
    if "sustained" in job.figures:
        read(uuid(job.device))  # better now than after the sweeps
    with results(job.output, job.overwrite, WRITTEN) as directory, torch.cuda.device(job.device):
        mine, missing = ours(job.group_size)
        others, absent = peers()
        missing |= absent
        for name, why in missing.items():
            log.info("%s is left out: %s", name, why)
        done = Measurements(
            device=torch.cuda.get_device_name(job.device),
            group_size=job.group_size,
            multipliers={one.name: one.source for one in (CUBLAS, *mine, *others)},
            missing=missing,
            ceilings=ceilings(),
        )
        for sweep in asked:
            found = done.cells[sweep.name] = []
            for cell in _measure(sweep, (DENSE,) if sweep.dense_only else (*mine, *others), job):
                _append(directory / CELLS, CELL_COLUMNS, cell_rows(sweep.name, cell))
                found.append(cell)
        if "sustained" in job.figures:
            for one in _sustain(mine, job):
                _append(directory / SUSTAINED, SLICE_COLUMNS, slice_rows(one))
                done.slices.append(one)
        _draw(done, job.figures, directory)
        done.files = sorted(path.name for path in directory.iterdir())
    return done


def sweeps(job: Job, processors: int) -> list[Sweep]:
    """The cells to time on a GPU with so many multiprocessors; sustained has its own way."""
    own = job.batch_sizes
    found = {
        "layers": Sweep("layers", job.shapes, own or BATCHES),
        "peak": Sweep("peak", (ideal(processors),), own or PEAK_BATCHES),
        "models": Sweep(
            "models", tuple(shape for shapes in MODELS.values() for shape in shapes), (MODELS_BATCH,)
        ),
        "roofline": Sweep("roofline", SQUARES, own or ROOFLINE_BATCHES, dense_only=True),
    }
    return [found[name] for name in ("layers", *job.figures) if name in found and found[name].shapes]


def _check_shapes(asked: Sequence[Sweep], group_size: int) -> None:
    for shape in {shape for sweep in asked for shape in sweep.shapes}:
        reason = marlin.refusal(shape.k, shape.n, bits=4, group_size=group_size)
        if reason:
            raise FormatError(
                f"{shape.name}: marlin {reason}.", "leave it out of --shapes, or choose another --group-size."
            )


@contextmanager
def results(output: Path, overwrite: bool, written: Mapping[str, str]) -> Iterator[Path]:
    """A new directory in OUTPUT.partial, which takes the place of `output` in the end.

    `written` are the names of the files that may come, and words that are in each of them: an earlier output
    that holds anything else is not replaced. If the work does not end, what was measured stays there.
    ConvertError when one of the two is taken.
    """

    def strangers(directory: Path) -> list[str]:
        return [f"{path.name!r} is there" for path in sorted(directory.iterdir()) if not _is(path, written)]

    if not output.is_symlink():  # which is refused below, by its own name
        output = output.resolve()
    partial = output.with_name(output.name + ".partial")
    staging, aside = partial / "results", partial / REPLACED
    if aside.is_dir() and not aside.is_symlink() and not strangers(aside):
        _tidy(output, partial)
    check_replaceable(output, overwrite, strangers)
    try:
        partial.mkdir(parents=True)
    except FileExistsError as error:
        raise ConvertError(
            f"'{partial}' is in the way: perhaps what an interrupted run has measured.",
            "move or remove it, or choose another output directory.",
        ) from error
    staging.mkdir()
    try:
        yield staging
    except BaseException:
        with suppress(OSError):  # not empty: something was measured
            staging.rmdir()
            partial.rmdir()
        raise
    check_replaceable(output, overwrite, strangers)  # again: somebody may have put something there
    publish(staging, output, overwrite)
    if staging.exists():
        staging.rename(aside)  # from now on it is known for what it is, wherever this is stopped
    remove(partial)


def _tidy(output: Path, partial: Path) -> None:
    """Put back or remove the earlier results of a run that was stopped while it replaced them."""
    if not os.path.lexists(output):
        (partial / REPLACED).rename(output)
    elif [path.name for path in partial.iterdir()] == [REPLACED]:
        remove(partial)


def _is(path: Path, written: Mapping[str, str]) -> bool:
    """Whether this is a file of an earlier run."""
    if path.is_symlink() or not path.is_file() or path.name not in written:
        return False
    return written[path.name].encode() in path.read_bytes()


def _append(path: Path, columns: Sequence[str], found: Iterable[Row]) -> None:
    """Add rows to a CSV file; what a run that does not end has measured is on disk."""
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        rows = csv.DictWriter(file, columns)
        if new:
            rows.writeheader()
        rows.writerows(found)


def _measure(sweep: Sweep, multipliers: Sequence[Multiplier], job: Job) -> Iterator[Cell]:
    for number, shape in enumerate(sweep.shapes, 1):
        place = f"{number} of {len(sweep.shapes)}"
        log.info("%s: %s, %d x %d (%s)", sweep.name, shape.name, shape.k, shape.n, place)
        for cell in measure(shape, sweep.batches, multipliers, job.group_size, job.device):
            log.debug("%s", cell_line(cell))
            yield cell


def _sustain(multipliers: Sequence[Multiplier], job: Job) -> Iterator[Slice]:
    shape = ideal(torch.cuda.get_device_properties(job.device).multi_processor_count)
    batches = job.batch_sizes or PEAK_BATCHES
    log.info("sustained: %g minutes of load with %d x %d", job.minutes, shape.k, shape.n)
    for found in sustain(shape, batches, multipliers, job.group_size, job.minutes, job.device):
        clocks = found.clocks()
        log.info(
            "%4.0f s: SM clock %s MHz, %s W", found.second, clocks["sm_mhz_median"], clocks["watts_median"]
        )
        yield found


def _draw(done: Measurements, wanted: Sequence[str], directory: Path) -> None:
    """One PNG per figure, if matplotlib is installed."""
    if not wanted:
        return
    if find_spec("matplotlib") is None:
        done.undrawn = f"{', '.join(wanted)} not drawn: pip install 'marlin-convert[bench]' brings matplotlib"
        log.warning("%s", done.undrawn)
        return
    from marlin_convert.bench import figures

    draw = {
        "peak": lambda: figures.peak(done.cells["peak"], done.names, done.ceilings, done.device),
        "models": lambda: figures.models(done.of_models(), done.names, MODELS_BATCH, done.device),
        "roofline": lambda: figures.roofline(done.cells["roofline"], DENSE.name, done.ceilings, done.device),
        "sustained": lambda: figures.sustained(done.slices, done.device),
    }
    for name in wanted:
        draw[name]().savefig(directory / f"{name}.png", dpi=150)
