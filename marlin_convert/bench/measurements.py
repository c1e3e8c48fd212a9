"""What a run of `bench kernel` has found, as rows of CSV files, tables and JSON."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from marlin_convert.bench.multipliers import CUBLAS, DENSE
from marlin_convert.bench.shapes import MODELS
from marlin_convert.bench.sustained import Slice
from marlin_convert.bench.timing import Ceilings, Cell
from marlin_convert.errors import printable

CELL_COLUMNS = (
    "sweep", "shape", "k", "n", "group_size", "batch", "kernel", "microseconds", "speedup", "tflops",
    "gb_per_second", "relative_error", "failed",
)  # fmt: skip
SLICE_COLUMNS = (
    "second", "sm_mhz_min", "sm_mhz_median", "watts_median", "celsius_max", "slowed_by", "batch", "kernel",
    "microseconds", "speedup",
)  # fmt: skip

Row = dict[str, str | int | float | None]


@dataclass
class Measurements:
    """All that a run has found: cells by sweep, slices of the load, the files written, and what is missing.

    `multipliers` are where each comes from by name, cuBLAS first; `missing` says by name why one is left out,
    and `undrawn` why no figure was drawn.
    """

    device: str
    group_size: int
    multipliers: dict[str, str]
    missing: dict[str, str]
    ceilings: Ceilings
    cells: dict[str, list[Cell]] = field(default_factory=dict)
    slices: list[Slice] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    undrawn: str | None = None

    @property
    def names(self) -> list[str]:
        """The multipliers, cuBLAS left out."""
        return [name for name in self.multipliers if name != CUBLAS.name]

    def of_models(self) -> dict[str, dict[str, float]]:
        """Speed-up over all linears of a block, by model and by those multipliers that failed at none."""
        us = {cell.shape: cell.us for cell in self.cells["models"]}
        found: dict[str, dict[str, float]] = {}
        for model, shapes in MODELS.items():
            times = {
                name: sum(us[shape][name] for shape in shapes)
                for name in self.multipliers
                if all(name in us[shape] for shape in shapes)
            }
            cublas = times.pop(CUBLAS.name, None)
            found[model] = {name: cublas / time for name, time in times.items()} if cublas else {}
        return found

    def failures(self) -> list[str]:
        """One line for every way in which a multiplier failed at a layer, with the batch sizes."""
        batches: dict[tuple[str, str, str], list[int]] = {}
        for cells in self.cells.values():
            for cell in cells:
                for name, why in cell.failed.items():
                    batches.setdefault((name, cell.shape.name, why), []).append(cell.batch)
        return [
            f"{name} failed at {shape}, batch {', '.join(map(str, dict.fromkeys(found)))}: {why}"
            for (name, shape, why), found in batches.items()
        ]


def cell_rows(sweep: str, cell: Cell) -> Iterator[Row]:
    """A row of CELL_COLUMNS per multiplier; without figures, and with the reason, where it failed."""
    for name in (*cell.us, *cell.failed):
        us = cell.us.get(name)
        yield {
            "sweep": sweep,
            "shape": cell.shape.name,
            "k": cell.shape.k,
            "n": cell.shape.n,
            "group_size": cell.group_size,
            "batch": cell.batch,
            "kernel": name,
            "microseconds": _digits(us),
            "speedup": _digits(cell.speedup(name)),
            "tflops": _digits(cell.operations / us / 1e6 if us else None),
            "gb_per_second": _digits(cell.nbytes(name) / us / 1e3 if us else None),
            "relative_error": _digits(cell.errors.get(name)),
            "failed": cell.failed.get(name),
        }


def slice_rows(found: Slice) -> Iterator[Row]:
    """A row of SLICE_COLUMNS per batch size and multiplier."""
    for batch, us in found.us.items():
        for name, time in us.items():
            yield {
                "second": _digits(found.second),
                **found.clocks(),
                "slowed_by": found.slowed_by,
                "batch": batch,
                "kernel": name,
                "microseconds": _digits(time),
                "speedup": _digits(found.speedup(batch, name)),
            }


def _digits(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")


def as_json(done: Measurements) -> dict[str, Any]:
    """Everything, for --json."""
    return {
        "device": done.device,
        "group_size": done.group_size,
        "kernels": done.multipliers,
        "missing": done.missing,
        "ceilings": asdict(done.ceilings),
        "cells": [
            row for sweep, cells in done.cells.items() for cell in cells for row in cell_rows(sweep, cell)
        ],
        "models": done.of_models() if "models" in done.cells else {},
        "sustained": [row for one in done.slices for row in slice_rows(one)],
        "failures": done.failures(),
        "undrawn": done.undrawn,
        "files": done.files,
    }


def text(done: Measurements) -> str:
    """What was measured with what, a table per sweep, what failed or is missing, and the files."""
    known = ", ".join(f"{name} ({source})" for name, source in done.multipliers.items())
    lines = [
        f"{done.device}, {_groups(done.group_size)}: {known}",
        *(f"without {name}: {why}" for name, why in done.missing.items()),
        f"measured ceilings: {done.ceilings.bandwidth / 1e12:.2f} TB/s, "
        f"{done.ceilings.compute / 1e12:.0f} TFLOP/s",
    ]
    for sweep in ("layers", "peak"):
        if sweep in done.cells:
            lines += ["", f"{sweep}: microseconds, and speed-up over cuBLAS float16"]
            lines += _cells(done.cells[sweep], list(done.multipliers))
    if "layers" in done.cells:
        lines += ["", "layers: geometric mean of the speed-ups (least-most)"]
        lines += means(done.cells["layers"], done.names)
    if "models" in done.cells:
        lines += ["", f"models: speed-up over the linears of a block, batch {done.cells['models'][0].batch}"]
        lines += table(
            ["", *done.names],
            [
                [model, *(f"{found[name]:.2f}" if name in found else "-" for name in done.names)]
                for model, found in done.of_models().items()
            ],
        )
    if "roofline" in done.cells:
        lines += ["", "roofline: TFLOP/s of our dense kernel", *_roofline(done.cells["roofline"])]
    if done.slices:
        lines += ["", "sustained: speed-up over cuBLAS float16, and the clocks", *_slices(done.slices)]
    if failures := done.failures():
        lines += ["", *failures]
    lines += ["", *([done.undrawn] if done.undrawn else []), f"written: {', '.join(done.files)}"]
    return "\n".join(printable(line) for line in lines)


def cell_line(cell: Cell) -> str:
    """A cell in one line."""
    times = (f"{name} {us:.1f} us ({cell.speedup(name) or 0:.2f}x)" for name, us in cell.us.items())
    return "  ".join((f"{cell.shape.name:12} {cell.batch:5}", *times, *(f"{name} -" for name in cell.failed)))


def _cells(cells: Sequence[Cell], names: Sequence[str]) -> list[str]:
    rows = []
    for cell in cells:
        row = [cell.shape.name, str(cell.batch)]
        for name in names:
            speedup = cell.speedup(name)
            ratio = f" {speedup:6.2f}x" if speedup and name != CUBLAS.name else ""
            row.append(f"{cell.us[name]:.1f}{ratio}" if name in cell.us else "-")
        rows.append(row)
    return table(["shape", "batch", *names], rows)


def means(
    cells: Sequence[Cell],
    names: Sequence[str],
    value: Callable[[Cell, str], float | None] = Cell.speedup,
) -> list[str]:
    """A table of the geometric means of speed-ups, or another value, over layers: by batch and multiplier."""
    rows = []
    for batch in dict.fromkeys(cell.batch for cell in cells):
        row = [str(batch)]
        for name in names:
            found = [value(cell, name) for cell in cells if cell.batch == batch]
            known = [one for one in found if one]
            partly = f" of {len(known)}" if len(known) < len(found) else ""
            row.append(
                f"{statistics.geometric_mean(known):.2f} ({min(known):.2f}-{max(known):.2f}){partly}"
                if known
                else "-"
            )
        rows.append(row)
    return table(["batch", *names], rows)


def _roofline(cells: Sequence[Cell]) -> list[str]:
    name = DENSE.name
    shapes = list(dict.fromkeys(cell.shape for cell in cells))
    found = {
        (cell.shape, cell.batch): cell.operations / cell.us[name] / 1e6 for cell in cells if name in cell.us
    }
    rows = [
        [
            str(batch),
            *(f"{found[shape, batch]:.1f}" if (shape, batch) in found else "-" for shape in shapes),
        ]
        for batch in dict.fromkeys(cell.batch for cell in cells)
    ]
    return table(["batch", *(shape.name for shape in shapes)], rows)


def _slices(slices: Sequence[Slice]) -> list[str]:
    names = slices[0].names
    pairs = [(batch, name) for batch in slices[0].us for name in names]
    rows = []
    for one in slices:
        clocks = ("-" if value is None else f"{value:.0f}" for value in one.clocks().values())
        row = [f"{one.second:.0f}", *clocks]
        row += [f"{one.speedup(batch, name):.2f}" for batch, name in pairs]
        rows.append([*row, one.slowed_by or "-"])
    by_batch = [f"{batch}" if len(names) == 1 else f"{name} {batch}" for batch, name in pairs]
    return table(["s", "MHz min", "median", "W", "C", *by_batch, "slowed by"], rows)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as what is in them, the first one to the left."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    return [
        "  ".join(
            word.rjust(width) if column else word.ljust(width)
            for column, (word, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (head, *rows)
    ]


def _groups(group_size: int) -> str:
    return "one scale per output" if group_size == -1 else f"groups of {group_size}"
