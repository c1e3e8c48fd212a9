"""The figures, most after those of the MARLIN paper's artifact. The one module that needs matplotlib."""

import statistics
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from marlin_convert.bench.batches import Latencies
from marlin_convert.bench.latencies import TIMES, Served
from marlin_convert.bench.multipliers import CUBLAS, DENSE, SPARSE
from marlin_convert.bench.sustained import Slice
from marlin_convert.bench.timing import Ceilings, Cell
from marlin_convert.errors import printable

SPEEDUP = "speed-up over cuBLAS float16"


def peak(cells: Sequence[Cell], names: Sequence[str], ceilings: Ceilings, device: str) -> Figure:
    """Speed-up over the batch size on the ideal matrix, and what the measured ceilings allow at most."""
    figure, axes = _axes()
    batches = [cell.batch for cell in cells]
    for name, style in ((DENSE.name, "--"), (SPARSE.name, ":")):
        if name in names:
            best = [possible(cell, name, ceilings) for cell in cells]
            axes.plot(batches, best, style, color="black", label=f"{name} at most")
    for name in names:
        _line(axes, batches, [cell.speedup(name) for cell in cells], name)
    shape, group = cells[0].shape, cells[0].group_size
    axes.set_title(f"{device}: {shape.k} x {shape.n}, {_groups(group)}")
    _over_batches(axes, batches)
    return figure


def possible(cell: Cell, name: str, ceilings: Ceilings) -> float:
    """The speed-up of a multiplier over cuBLAS if both ran at the ceilings."""
    return ceilings.least(cell, CUBLAS.name) / ceilings.least(cell, name)


def models(
    speedups: Mapping[str, Mapping[str, float]], names: Sequence[str], batch: int, device: str
) -> Figure:
    """Speed-up by model and multiplier over all linears of a block; no bar where a layer failed."""
    figure, axes = _axes()
    width = 0.8 / len(names)
    for number, name in enumerate(names):
        there = [(place, found[name]) for place, found in enumerate(speedups.values()) if name in found]
        left = [place + (number - (len(names) - 1) / 2) * width for place, _ in there]
        axes.bar(left, [value for _, value in there], width, label=name)
    axes.set_xticks(range(len(speedups)), list(speedups))
    axes.tick_params("x", labelsize="small")
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_ylabel(SPEEDUP)
    axes.set_title(f"{device}: linears of a block, batch {batch}")
    figure.legend(loc="outside lower center", ncols=len(names))
    return figure


def roofline(cells: Sequence[Cell], name: str, ceilings: Ceilings, device: str) -> Figure:
    """TFLOP/s over arithmetic intensity of one multiplier by layer, under the ceilings measured with it."""
    figure, axes = _axes()
    done = [cell for cell in cells if name in cell.us]
    intensities = [cell.operations / cell.nbytes(name) for cell in done]
    ridge = ceilings.compute / ceilings.bandwidth
    ends = [min([*intensities, ridge]) / 2, ridge, max([*intensities, ridge]) * 2]
    roof = [min(one * ceilings.bandwidth, ceilings.compute) / 1e12 for one in ends]
    axes.plot(
        ends,
        roof,
        color="black",
        label=f"{ceilings.bandwidth / 1e12:.2f} TB/s, {ceilings.compute / 1e12:.0f} TFLOP/s",
    )
    for shape in dict.fromkeys(cell.shape for cell in done):
        mine = [cell for cell in done if cell.shape == shape]
        axes.plot(
            [cell.operations / cell.nbytes(name) for cell in mine],
            [cell.operations / cell.us[name] / 1e6 for cell in mine],
            marker=".",
            label=shape.name,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOP per byte")
    axes.set_ylabel("TFLOP/s")
    axes.set_title(f"{device}: {name}")
    axes.legend()
    return figure


def sustained(slices: Sequence[Slice], device: str) -> Figure:
    """Speed-up by batch size under load, speed-up over the minutes, and the clocks of these minutes."""
    figure = Figure(figsize=(9, 12), layout="constrained")
    by_batch, by_time, clocks = figure.subplots(3)
    batches = list(slices[0].us)
    minutes = [one.second / 60 for one in slices]
    for name in slices[0].names:
        settled = [
            statistics.median(one.speedup(batch, name) for one in slices[len(slices) // 2 :])
            for batch in batches
        ]
        _line(by_batch, batches, settled, name)
        for batch in batches:
            found = [one.speedup(batch, name) for one in slices]
            by_time.plot(minutes, found, marker=".", label=f"{name}, batch {batch}")
    _over_batches(by_batch, batches)
    by_batch.set_title(f"{device}: under load, second half of {minutes[-1]:.1f} minutes")
    by_time.set_ylabel(SPEEDUP)
    by_time.set_ylim(bottom=0)
    by_time.legend(fontsize="small", ncols=2)
    for key, label in (("sm_mhz_min", "least"), ("sm_mhz_median", "median")):
        clocks.plot(minutes, [_or_nan(one.clocks()[key]) for one in slices], marker=".", label=label)
    clocks.set_xlabel("minutes")
    clocks.set_ylabel("SM clock, MHz")
    clocks.legend(loc="lower left")
    power = clocks.twinx()
    power.plot(minutes, [_or_nan(one.clocks()["watts_median"]) for one in slices], color="gray")
    power.set_ylabel("power, W (gray)")
    for axes in (by_batch, by_time, clocks):
        axes.grid(alpha=0.3)
    return figure


def served(servers: Sequence[Served]) -> Figure:
    """The share of requests (of pairs of chunks) that took at most so many milliseconds, a line a server."""
    figure = Figure(figsize=(9, 7), layout="constrained")
    for axes, (name, said) in zip(figure.subplots(2, 2).flat, TIMES.items(), strict=True):
        for place, server in zip(("server", "baseline"), servers, strict=False):
            if values := server.times()[name]:
                # a dollar would begin a formula
                axes.ecdf(values, label=printable(f"{place}: {server.model}").replace("$", r"\$"))
        axes.set_xlabel(f"{said}, ms")
        axes.set_ylabel("share at most that")
        axes.grid(alpha=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(servers))
    return figure


def latency(found: Latencies) -> Figure:
    """Speed-up over the baseline by batch size or, without one, milliseconds a token after the first."""
    figure, axes = _axes()
    speedups = found.speedups()
    if speedups:
        axes.plot(list(speedups), list(speedups.values()), marker="o", label="speed-up")
        axes.axhline(1, color="black", linewidth=0.8)
    else:
        times = [one.token_ms for one in found.checkpoint]
        axes.plot([one.batch for one in found.checkpoint], times, marker="o", label="ms a token")
    axes.set_title(f"{found.device}, {found.engine}: {found.input_len} tokens in, {found.output_len} out")
    _over_batches(axes, [one.batch for one in found.checkpoint])
    axes.set_ylabel("speed-up over the baseline" if speedups else "ms a token after the first")
    return figure


def _axes() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    return figure, axes


def _line(axes: Axes, batches: Sequence[int], values: Sequence[float | None], name: str) -> None:
    """A line that is broken where a value is missing."""
    axes.plot(batches, [_or_nan(value) for value in values], marker="o", label=name)


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value


def _over_batches(axes: Axes, batches: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("batch size")
    axes.set_ylabel(SPEEDUP)
    axes.legend()


def _groups(group_size: int) -> str:
    return "one scale per output" if group_size == -1 else f"groups of {group_size}"
