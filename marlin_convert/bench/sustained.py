"""Minutes of load, ours and cuBLAS in turn, with the clocks the GPU runs at meanwhile; its settings stay."""

import statistics
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType

import torch

from marlin_convert.bench.multipliers import CUBLAS, Multiplier, Weights
from marlin_convert.bench.shapes import Shape
from marlin_convert.bench.timing import activations, bind, capture, checked, products, replay
from marlin_convert.errors import ConvertError

# Seconds of a slice, in which every batch size has its turn with every multiplier.
SLICE = 10.0

# What NVML calls the bits of clocks_event_reasons.active.
REASONS = {
    0x1: "idle",
    0x2: "application clocks",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "software thermal",
    0x40: "hardware thermal",
    0x80: "power brake",
}


@dataclass(frozen=True)
class Reading:
    """What nvidia-smi said at one moment: MHz of the multiprocessors, degrees Celsius, watts, what slows it.

    None for what this GPU does not tell.
    """

    sm_mhz: float | None
    celsius: float | None
    watts: float | None
    reasons: frozenset[str]


@dataclass(frozen=True)
class Slice:
    """When it ended, in seconds; the readings during it; and microseconds by batch size and multiplier."""

    second: float
    readings: tuple[Reading, ...]
    us: dict[int, dict[str, float]]

    @property
    def slowed_by(self) -> str:
        """All that slowed the GPU, in words."""
        return ", ".join(sorted(frozenset().union(*(one.reasons for one in self.readings))))

    @property
    def names(self) -> list[str]:
        """The multipliers, cuBLAS left out."""
        return [name for name in next(iter(self.us.values())) if name != CUBLAS.name]

    def clocks(self) -> dict[str, float | None]:
        """SM clock (least, median), power (median) and temperature (highest); None where nothing was read."""
        mhz = [one.sm_mhz for one in self.readings if one.sm_mhz is not None]
        watts = [one.watts for one in self.readings if one.watts is not None]
        celsius = [one.celsius for one in self.readings if one.celsius is not None]
        return {
            "sm_mhz_min": min(mhz, default=None),
            "sm_mhz_median": statistics.median(mhz) if mhz else None,
            "watts_median": statistics.median(watts) if watts else None,
            "celsius_max": max(celsius, default=None),
        }

    def speedup(self, batch: int, name: str) -> float:
        """How many times as fast as cuBLAS float16."""
        return self.us[batch][CUBLAS.name] / self.us[batch][name]


def uuid(device: torch.device) -> str:
    """The UUID of a GPU, by which nvidia-smi finds the same one whatever CUDA_VISIBLE_DEVICES says."""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"


def read(gpu: str) -> Reading:
    """The clocks of the GPU with this UUID now; ConvertError when nvidia-smi does not tell them."""
    fields = "clocks.sm,temperature.gpu,power.draw,clocks_event_reasons.active"
    command = ["nvidia-smi", f"--id={gpu}", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        line = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
        mhz, celsius, watts, bits = (word.strip() for word in line.split(","))
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise ConvertError(
            f"the clocks of the GPU cannot be read ({error}).", "leave sustained out of --figures."
        ) from error
    active = int(bits, 16) if bits.startswith("0x") else 0
    return Reading(
        _number(mhz), _number(celsius), _number(watts),
        frozenset(name for bit, name in REASONS.items() if active & bit),
    )  # fmt: skip


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:  # [N/A]
        return None


class Clocks:
    """Reads the clocks of a GPU once a second while the context lasts."""

    def __init__(self, gpu: str):
        """`gpu` is its UUID, as nvidia-smi takes it."""
        self._gpu = gpu
        self._readings: list[Reading] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Clocks":
        self._readings.append(read(self._gpu))
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def taken(self) -> tuple[Reading, ...]:
        """The readings since the last call."""
        # the thread may append meanwhile: what is taken is what is removed
        found = tuple(self._readings)
        del self._readings[: len(found)]
        return found

    def _run(self) -> None:
        while not self._stop.wait(1):
            try:
                self._readings.append(read(self._gpu))
            except ConvertError:  # one reading less; a slice without any has none in the report
                continue


def sustain(
    shape: Shape,
    batches: Sequence[int],
    multipliers: Sequence[Multiplier],
    group_size: int,
    minutes: float,
    device: torch.device,
) -> Iterator[Slice]:
    """Load the GPU for so many minutes; cuBLAS and the multipliers take turns at every batch size.

    ConvertError when the clocks cannot be read, or the layer does not fit into the memory of the GPU;
    KernelError when a product is wrong.
    """
    with Clocks(uuid(device)) as clocks:
        try:
            graphs, copies, _kept = _graphs(shape, batches, (CUBLAS, *multipliers), group_size, device)
        except torch.cuda.OutOfMemoryError as error:
            raise ConvertError(
                f"the GPU's memory is too small for the {shape.k} x {shape.n} matrix of sustained.",
                "leave sustained out of --figures.",
            ) from error
        share = SLICE / len(graphs)
        start = time.monotonic()
        clocks.taken()
        while time.monotonic() - start < 60 * minutes:
            us: dict[int, dict[str, float]] = {batch: {} for batch in batches}
            for (batch, name), graph in graphs.items():
                us[batch][name] = _replayed(graph, share) * 1e3 / copies[name]
            yield Slice(time.monotonic() - start, clocks.taken(), us)


def _graphs(
    shape: Shape,
    batches: Sequence[int],
    multipliers: Sequence[Multiplier],
    group_size: int,
    device: torch.device,
) -> tuple[dict[tuple[int, str], torch.cuda.CUDAGraph], dict[str, int], list[object]]:
    """Graphs by batch size and multiplier, copies of the weights in each, and what must live as long."""
    weights = Weights(shape.k, shape.n, group_size, device)
    ready = {multiplier: multiplier.prepare(weights) for multiplier in multipliers}
    graphs: dict[tuple[int, str], torch.cuda.CUDAGraph] = {}
    kept: list[object] = [weights, ready]
    for batch in batches:
        x, y = activations(weights, batch)
        kept.append((x, y))
        expected = products(x, weights, ready)
        for one, copies in ready.items():
            checked(one.name, copies[0](x, y), expected[one.sparse])
            graphs[batch, one.name] = capture(bind(copies, x, y))
    return graphs, {one.name: len(copies) for one, copies in ready.items()}, kept


def _replayed(graph: torch.cuda.CUDAGraph, seconds: float) -> float:
    """Median milliseconds of the replays of so many seconds, at least one."""
    end = time.monotonic() + seconds
    times = [replay(graph)]
    while time.monotonic() < end:
        times.append(replay(graph))
    return statistics.median(times)
