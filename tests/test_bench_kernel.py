"""`bench kernel`: what it asks for, measures, writes and draws; the measuring itself on a GPU only."""

import csv
import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import pytest
import torch
from matplotlib.axes import Axes

from marlin_convert.bench import figures, kernel, measurements, multipliers, shapes, sustained, timing
from marlin_convert.bench.measurements import Measurements, means
from marlin_convert.bench.shapes import LAYERS, MODELS, Shape
from marlin_convert.bench.sustained import Reading, Slice
from marlin_convert.bench.timing import Ceilings, Cell
from marlin_convert.cli import bench_kernel as command
from marlin_convert.errors import ConvertError, KernelError
from marlin_convert.formats import words

CPU = torch.device("cpu")
CEILINGS = Ceilings(bandwidth=4e12, compute=800e12)
SMALL = Shape("256x512", 256, 512)


def cell(shape: Shape = SMALL, batch: int = 1, **us: float) -> Cell:
    """A cell with these microseconds, and 10 of cuBLAS; a peer of 0 microseconds failed."""
    times = {"cublas": 10.0} | {name.replace("_", "-"): time for name, time in us.items()}
    failed = {name: "RuntimeError: not this shape" for name, time in times.items() if not time}
    done = {name: time for name, time in times.items() if time}
    return Cell(shape, 128, batch, done, dict.fromkeys(done, 3e-4), failed)


def part(second: float, speedup: float = 4.0, mhz: float | None = 1500) -> Slice:
    readings = (Reading(mhz, 60, 500, frozenset({"power cap"})), Reading(1700, 70, None, frozenset()))
    us = {batch: {"cublas": 10.0, "marlin-convert": 10 / speedup} for batch in (1, 16)}
    return Slice(second, readings, us)


def measured(**changes: object) -> Measurements:
    """A run whose vllm-marlin failed at one cell of each sweep."""
    known = {"cublas": "torch 2", "marlin-convert": "0.1", "vllm-marlin": "vllm 0.26"}
    cells = {
        "layers": [
            cell(LAYERS[0], 1, marlin_convert=2.5, vllm_marlin=5),
            cell(LAYERS[0], 16, marlin_convert=5, vllm_marlin=0),
            cell(LAYERS[1], 1, marlin_convert=10, vllm_marlin=20),
            cell(LAYERS[1], 16, marlin_convert=5, vllm_marlin=5),
        ],
        "peak": [
            cell(shapes.ideal(132), 1, marlin_convert=2.5, vllm_marlin=5),
            cell(shapes.ideal(132), 16, marlin_convert=4, vllm_marlin=0),
        ],
        "models": [
            cell(shape, 16, marlin_convert=5, vllm_marlin=0 if shape.name == "8B.o" else 8)
            for model in MODELS.values()
            for shape in model
        ],
        "roofline": [cell(shapes.SQUARES[0], batch, marlin_convert=2.0 * batch) for batch in (1, 16)],
    }
    done = Measurements("GPU", 128, known, {"humming": "humming is not installed"}, CEILINGS, cells)
    done.slices = [part(10), part(20, 3.0, None), part(30, 2.0)]
    return replace(done, **changes)  # type: ignore[arg-type]


# what is asked for


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "--output"),
        (("-o", "out", "--figures", "peak,moods"), "'moods' is not one of peak, models, roofline, sustained"),
        (("-o", "out", "--shapes", "9B.o"), "'9B.o' is no layer like 8B.qkv, and not KxN"),
        (("-o", "out", "--shapes", "0x64"), "'0x64' is no layer"),
        (("-o", "out", "--batch-sizes", "1,0"), "'1,0' is not a list of numbers"),
        (("-o", "out", "--batch-sizes", "16x"), "'16x' is not a list of numbers"),
        (("-o", "out", "--group-size", "16"), "--group-size"),
        (("-o", "out", "--minutes", "0"), "--minutes"),
    ],
)
def test_wrong_usage_is_2(words, said, cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = cli("bench", "kernel", *words)
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["auto", "cuda", "cpu"])
def test_without_a_gpu_it_is_1(device, cli, tmp_path):
    result = cli("bench", "kernel", "-o", tmp_path / "out", "--device", device)
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: there is no CUDA GPU here")
    assert "Hint: run it on a machine with an NVIDIA GPU" in result.stderr
    assert not list(tmp_path.iterdir())


def test_the_artifacts_shapes():
    assert shapes.ideal(72) == ("ideal", 73728, 18432)
    assert shapes.find("Llama-65B.gate_up") == ("Llama-65B.gate_up", 8192, 43520)
    assert shapes.find("384x64") == ("384x64", 384, 64)
    assert [shape[1:] for shape in MODELS["Falcon-180B"]] == [(14848, 75264), (74240, 14848)]
    assert [shape[1:] for shape in LAYERS[:4]] == [(4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096)]


def job(output: Path, **changes: object) -> kernel.Job:
    return replace(kernel.Job(output, CPU, (), (SMALL,)), **changes)  # type: ignore[arg-type]


def test_sweeps_are_those_asked_for(tmp_path):
    def names(**changes: object) -> list[str]:
        return [sweep.name for sweep in kernel.sweeps(job(tmp_path, **changes), 132)]

    assert names() == ["layers"]
    assert names(shapes=(), figures=("roofline", "peak")) == ["roofline", "peak"]
    assert names(figures=("sustained",)) == ["layers"]


def test_batch_sizes_are_of_all_but_the_models(tmp_path):
    asked = job(tmp_path, figures=("peak", "models", "roofline"))
    assert [len(sweep.batches) for sweep in kernel.sweeps(asked, 132)] == [13, 9, 1, 17]
    asked = replace(asked, batch_sizes=(3,))
    assert [sweep.batches for sweep in kernel.sweeps(asked, 132)] == [(3,), (3,), (16,), (3,)]


# what is measured


def test_peers_that_are_not_there_are_named(monkeypatch):
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name.partition(".")[0])

    monkeypatch.setattr(multipliers, "import_module", missing)
    found, why = multipliers.peers()
    assert not found
    assert why == {
        "vllm-marlin": "vllm is not installed",
        "vllm-machete": "vllm is not installed",
        "humming": "humming is not installed",
    }


def test_peers_that_break_are_named(monkeypatch, tmp_path):
    def broken(name: str) -> None:
        raise RuntimeError("no driver\nand more")

    monkeypatch.setattr(multipliers, "import_module", broken)
    library = tmp_path / "no_library.so"
    library.touch()
    found, why = multipliers.peers(library)
    assert not found
    assert why["humming"] == "humming cannot be imported: RuntimeError: no driver"
    assert why["vllm-marlin"].startswith("vllm cannot be imported: OSError:")


def test_an_operator_that_vllm_has_not_is_named(monkeypatch):
    monkeypatch.setattr(multipliers, "import_module", lambda name: None)
    found, why = multipliers.peers()
    assert [one.name for one in found] == ["humming"]
    assert why["vllm-machete"] == "vllm of unknown version has no machete_mm here"


@pytest.mark.parametrize("group_size", [128, 32, -1])
def test_peers_get_the_same_weights(group_size, monkeypatch):
    monkeypatch.setattr(multipliers, "COLD", 1e6)
    weights = multipliers.Weights(384, 192, group_size, CPU)
    assert (len(weights.B), len(weights.plain)) == (28, 7)
    for (packed, scales), dense in zip(weights.gptq, weights.plain, strict=False):
        codes = words.unpack_rows(packed, 4, 384).float() - 8
        expanded = scales.float().repeat_interleave(384 // len(scales), 0)
        assert torch.equal((codes * expanded).half().t(), dense)


@pytest.mark.parametrize("group_size", [128, -1])
def test_weights_that_are_2_4(group_size, monkeypatch):
    monkeypatch.setattr(multipliers, "COLD", 1e6)
    weights = multipliers.Weights(384, 192, group_size, CPU)
    assert len(weights.sparse) == 37
    assert [tensor.shape for tensor in weights.sparse[0].values()][:2] == [(12, 384), (12, 384)]
    assert not torch.equal(weights.sparse[0]["B_meta"], weights.sparse[1]["B_meta"])
    left = (weights.pruned.view(192, 96, 4) != 0).sum(2)
    assert left.max() == 2 and left.float().mean() > 1.8, "a code in sixteen is that of zero"


def test_groups_that_sparse_marlin_has_not_are_named():
    both, missing = multipliers.ours(-1)
    assert [one.name for one in both] == ["marlin-convert", "marlin-convert 2:4"] and not missing
    one, missing = multipliers.ours(64)
    assert [one.name for one in one] == ["marlin-convert"]
    assert missing == {"marlin-convert 2:4": "needs groups of 128 rows or one for all 128, has 64"}


def fake(
    name: str, scale: float = 1, fails: Exception | None = None, sparse: bool = False
) -> multipliers.Multiplier:
    """Multiplies on the CPU, `scale` times too much, or raises; by the weights that are 2:4 if `sparse`."""

    def multiply(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if fails and len(x) > 1:
            raise fails
        return multiplied(x) * scale

    def prepare(weights: multipliers.Weights) -> list[multipliers.Multiply]:
        multiplied.weight = weights.pruned if sparse else weights.plain[0]
        return [multiply]

    return multipliers.Multiplier(name, "", prepare, Exception, sparse=sparse)


class Multiplied:
    weight: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.t()


multiplied = Multiplied()


@pytest.fixture
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure on the CPU: every call takes a microsecond."""
    monkeypatch.setattr(multipliers, "COLD", 1e6)
    monkeypatch.setattr(timing, "timed", lambda calls: 1.0)


def test_a_peer_that_fails_leaves_its_cell_empty(untimed):
    every = [fake("right"), fake("wrong", scale=1.01), fake("small", fails=RuntimeError("one token only"))]
    one, two = timing.measure(SMALL, (1, 2), every, 128, CPU)
    assert list(one.us) == ["cublas", "right", "small"]
    assert one.errors["right"] < timing.LARGEST_ERROR
    assert one.failed["wrong"].startswith("KernelError: the product of wrong for 1 tokens")
    assert list(two.us) == ["cublas", "right"]
    assert two.failed["small"] == "RuntimeError: one token only"


def test_what_is_sparse_is_compared_with_weights_that_are_2_4(untimed):
    (found,) = timing.measure(SMALL, (1,), [fake("2:4", sparse=True)], 128, CPU)
    assert found.errors["2:4"] < timing.LARGEST_ERROR
    (found,) = timing.measure(SMALL, (1,), [replace(fake("dense"), sparse=True)], 128, CPU)
    assert "the product of dense" in found.failed["dense"]


def test_a_wrong_product_of_ours_stops_the_run(untimed):
    ours = replace(fake("ours", scale=math.nan), may_fail=torch.cuda.OutOfMemoryError)
    with pytest.raises(KernelError, match="the product of ours for 1 tokens and 512 outputs is nan off"):
        list(timing.measure(SMALL, (1,), [ours], 128, CPU))


def test_what_the_memory_cannot_hold_is_left_empty(untimed, monkeypatch):
    def full(*_: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(timing, "activations", full)
    (found,) = timing.measure(SMALL, (4,), [fake("peer")], 128, CPU)
    assert not found.us
    assert found.failed == dict.fromkeys(("cublas", "peer"), "the GPU's memory is too small")
    monkeypatch.setattr(timing, "Weights", full)
    assert list(timing.measure(SMALL, (4,), [fake("peer")], 128, CPU)) == [found]


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An nvidia-smi that prints what is in the file."""
    said = tmp_path / "said"
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\nexec cat {said}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    return said


def test_clocks_are_read(smi):
    smi.write_text("1980, 45, 612.30, 0x0000000000000024\n")
    expected = Reading(1980, 45, 612.3, frozenset({"power cap", "software thermal"}))
    assert sustained.read("GPU-0") == expected
    with sustained.Clocks("GPU-0") as clocks:
        time.sleep(1.3)
        assert set(clocks.taken()) == {expected}
        assert clocks.taken() == ()
    smi.write_text("[N/A], 45, [N/A], [N/A]\n")
    assert sustained.read("GPU-0") == Reading(None, 45, None, frozenset())


@pytest.mark.parametrize("words", ["", "No devices were found\n"])
def test_clocks_that_cannot_be_read(words, smi):
    smi.write_text(words)
    with pytest.raises(ConvertError, match="the clocks of the GPU cannot be read"):
        sustained.read("GPU-0")


def test_a_slice_says_what_its_clocks_were():
    assert part(10).clocks() == {
        "sm_mhz_min": 1500,
        "sm_mhz_median": 1600,
        "watts_median": 500,
        "celsius_max": 70,
    }
    assert part(10).slowed_by == "power cap"
    empty = replace(part(10), readings=())
    assert set(empty.clocks().values()) == {None} and empty.slowed_by == ""


# what is written


@pytest.fixture
def measuring(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Shape]]:
    """The command without a GPU: cells come from `cell`; the shapes that were measured."""
    seen: list[Shape] = []

    def measure(shape, batches, multipliers, group_size, device):
        seen.append(shape)
        for batch in batches:
            yield cell(
                shape, batch, marlin_convert=2.0, **{"vllm_marlin": 0.0} if len(multipliers) > 1 else {}
            )

    class Properties:
        multi_processor_count = 132
        uuid = "0"

    peer = replace(fake("vllm-marlin"), source="vllm 0.26")
    monkeypatch.setattr(command, "pick_gpu", lambda name: torch.device("cuda:0"))
    monkeypatch.setattr(kernel, "measure", measure)
    monkeypatch.setattr(kernel, "ceilings", lambda: CEILINGS)
    monkeypatch.setattr(kernel, "peers", lambda: ([peer], {"humming": "humming is not installed"}))
    monkeypatch.setattr(kernel, "read", lambda gpu: None)
    monkeypatch.setattr(kernel, "sustain", lambda *_: iter([part(10), part(20)]))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA TEST")
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    yield seen


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_everything(measuring, cli, tmp_path):
    out = tmp_path / "out"
    result = cli("bench", "kernel", "-o", out, "--figures", "peak,models,roofline,sustained")
    assert result.exit_code == 0, result.stderr
    names = {"kernel.csv", "sustained.csv", "peak.png", "models.png", "roofline.png", "sustained.png"}
    assert {path.name for path in out.iterdir()} == names
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    for name in ("peak", "models", "roofline", "sustained"):
        pixels = matplotlib.image.imread(out / f"{name}.png")
        assert pixels.shape[0] > 500 and pixels.std() > 0.05
    rows = rows_of(out / "kernel.csv")
    assert {row["sweep"] for row in rows} == {"peak", "models", "roofline"}
    assert len([row for row in rows if row["sweep"] == "models"]) == 3 * 26
    assert "NVIDIA TEST" in result.stdout
    assert "without humming: humming is not installed" in result.stdout
    assert (
        "vllm-marlin failed at ideal, batch 1, 2, 4, 8, 16, 32, 64, 128, 256: RuntimeError" in result.stdout
    )
    assert result.stdout.splitlines()[-1] == f"written: {', '.join(sorted(names))}"
    assert "humming is left out: humming is not installed" in result.stderr


def test_shapes_alone_draw_nothing(measuring, cli, tmp_path):
    words = ("bench", "kernel", "-o", tmp_path / "out", "--shapes", "8B.o,384x64", "--batch-sizes", "16,1,16")
    result = cli(*words, "--json")
    assert result.exit_code == 0, result.stderr
    assert measuring == [("8B.o", 4096, 4096), ("384x64", 384, 64)]
    found = json.loads(result.stdout)
    assert found["files"] == ["kernel.csv"]
    assert [row["batch"] for row in found["cells"][::3]] == [16, 1, 16, 1]
    assert found["ceilings"] == {"bandwidth": 4e12, "compute": 800e12}
    assert (found["models"], found["sustained"], found["undrawn"]) == ({}, [], None)
    quiet = cli(*words, "--overwrite", "-q")
    assert (quiet.exit_code, quiet.stdout, quiet.stderr) == (0, "", "")


def test_by_default_the_layers_and_three_figures(measuring, cli, tmp_path):
    result = cli("bench", "kernel", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert measuring[:8] == list(LAYERS)
    assert {path.stem for path in (tmp_path / "out").glob("*.png")} == {"peak", "models", "roofline"}


def test_a_shape_that_marlin_cannot_hold_is_1(measuring, cli, tmp_path):
    result = cli("bench", "kernel", "-o", tmp_path / "out", "--shapes", "100x64")
    assert result.exit_code == 1
    assert "100x64: marlin needs inputs divisible by 64, has 100" in result.stderr
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_figures_are_named(measuring, cli, tmp_path, monkeypatch):
    monkeypatch.setattr(kernel, "find_spec", lambda name: None)
    result = cli("bench", "kernel", "-o", tmp_path / "out", "--figures", "peak,roofline")
    assert result.exit_code == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["kernel.csv"]
    said = "peak, roofline not drawn: pip install 'marlin-convert[bench]' brings matplotlib"
    assert said in result.stdout and said in result.stderr


def test_nothing_but_the_figures_needs_matplotlib():
    code = "from marlin_convert.bench import kernel, serve; import sys; print('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_an_output_that_is_there_is_not_lost(measuring, cli, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    words = ("bench", "kernel", "-o", out, "--shapes", "8B.o", "--batch-sizes", "1")
    assert cli(*words).exit_code == 0, "an empty one may be there"
    (out / "mine").touch()
    result = cli(*words)
    assert result.exit_code == 1
    assert "already exists and is not empty" in result.stderr
    assert "Hint: choose another directory, or pass --overwrite." in result.stderr
    result = cli(*words, "--overwrite")
    assert result.exit_code == 1 and "'mine' is there" in result.stderr
    assert {path.name for path in out.iterdir()} == {"kernel.csv", "mine"}
    (out / "mine").unlink()
    (out / "kernel.csv").write_text("my own figures")
    assert "'kernel.csv' is there" in cli(*words, "--overwrite").stderr
    assert (out / "kernel.csv").read_text() == "my own figures"
    (out / "kernel.csv").unlink()
    assert cli(*words).exit_code == 0 and cli(*words, "--overwrite").exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in out.iterdir()] == ["kernel.csv"]


def test_what_a_kill_leaves_of_replaced_results_goes_with_the_next_run(measuring, cli, tmp_path):
    out, aside = tmp_path / "out", tmp_path / "out.partial" / "replaced"
    words = ("bench", "kernel", "-o", out, "--shapes", "8B.o", "--batch-sizes", "1")
    assert cli(*words).exit_code == 0
    # stopped while they were removed
    shutil.copytree(out, aside)
    assert cli(*words, "--overwrite").exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    # between two renames
    aside.parent.mkdir()
    out.rename(aside)
    result = cli(*words)
    assert result.exit_code == 1 and "already exists" in result.stderr
    assert (out / "kernel.csv").exists()
    # and what only looks like it
    aside.mkdir(exist_ok=True, parents=True)
    (aside / "mine").touch()
    assert "is in the way" in cli(*words, "--overwrite").stderr
    assert (aside / "mine").exists()


def test_what_an_interrupted_run_has_measured_stays(measuring, cli, tmp_path, monkeypatch):
    def interrupted(shape, batches, *_):
        yield cell(shape, batches[0], marlin_convert=2.0)
        raise KeyboardInterrupt

    monkeypatch.setattr(kernel, "measure", interrupted)
    words = ("bench", "kernel", "-o", tmp_path / "out", "--shapes", "8B.o")
    assert cli(*words).exit_code == 130
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    assert [row["kernel"] for row in rows_of(tmp_path / "out.partial" / "results" / "kernel.csv")] == [
        "cublas",
        "marlin-convert",
    ]
    result = cli(*words)
    assert result.exit_code == 1
    assert "out.partial' is in the way" in result.stderr


def test_a_directory_in_the_way_is_left_alone(measuring, cli, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine").touch()
    result = cli("bench", "kernel", "-o", tmp_path / "out", "--shapes", "8B.o", "--overwrite")
    assert result.exit_code == 1
    assert [path.name for path in tmp_path.rglob("*")] == ["out.partial", "mine"]


def test_nothing_stays_of_a_run_that_has_measured_nothing(measuring, cli, tmp_path, monkeypatch):
    def failing(*_: object) -> Iterator[Cell]:
        raise KernelError("there is no compiler.", "install one.")

    monkeypatch.setattr(kernel, "measure", failing)
    result = cli("bench", "kernel", "-o", tmp_path / "out")
    assert (result.exit_code, "there is no compiler" in result.stderr) == (1, True)
    assert not list(tmp_path.iterdir())


def test_rows():
    found = cell(Shape("8B.o", 4096, 4096), 16, marlin_convert=8, humming=0)
    cublas, ours, humming = measurements.cell_rows("layers", found)
    assert ours == {
        "sweep": "layers",
        "shape": "8B.o",
        "k": 4096,
        "n": 4096,
        "group_size": 128,
        "batch": 16,
        "kernel": "marlin-convert",
        "microseconds": 8.0,
        "speedup": 1.25,
        "tflops": 67.109,
        "gb_per_second": 1114.1,
        "relative_error": 3e-4,
        "failed": None,
    }
    assert tuple(ours) == tuple(cublas) == tuple(humming) == measurements.CELL_COLUMNS
    assert cublas["gb_per_second"] == 3381.7
    assert [humming[column] for column in measurements.CELL_COLUMNS[7:12]] == [None] * 5
    assert humming["failed"] == "RuntimeError: not this shape"
    slow = next(measurements.slice_rows(part(10)))
    assert tuple(slow) == measurements.SLICE_COLUMNS


def test_tables():
    lines = measurements.text(measured()).splitlines()
    table = lines.index("layers: microseconds, and speed-up over cuBLAS float16")
    assert lines[table + 1 : table + 4] == [
        "shape   batch  cublas  marlin-convert   vllm-marlin",
        "8B.qkv      1    10.0     2.5   4.00x   5.0   2.00x",
        "8B.qkv     16    10.0     5.0   2.00x             -",
    ]
    means = lines.index("layers: geometric mean of the speed-ups (least-most)")
    assert lines[means + 2].split() == ["1", "2.00", "(1.00-4.00)", "1.00", "(0.50-2.00)"]
    assert lines[means + 3].split() == ["16", "2.00", "(2.00-2.00)", "2.00", "(2.00-2.00)", "of", "1"]
    models = lines.index("models: speed-up over the linears of a block, batch 16")
    assert lines[models + 2].split() == ["Llama-7B", "2.00", "1.25"]
    assert lines[models + 7].split() == ["Llama-3-8B", "2.00", "-"]
    assert "vllm-marlin failed at 8B.o, batch 16: RuntimeError: not this shape" in lines
    assert any(line.split()[:3] == ["30", "1500", "1600"] for line in lines)


# what is drawn


def drawn(axes: Axes) -> dict[str, tuple[list[float], list[float]]]:
    return {
        str(line.get_label()): (list(line.get_xdata()), list(line.get_ydata()))  # type: ignore[arg-type]
        for line in axes.get_lines()
    }


def test_peak():
    done = measured()
    figure = figures.peak(done.cells["peak"], done.names, CEILINGS, "GPU")
    lines = drawn(figure.axes[0])
    assert lines["marlin-convert"] == ([1, 16], [4, 2.5])
    assert lines["vllm-marlin"][1][0] == 2 and math.isnan(lines["vllm-marlin"][1][1])
    assert lines["marlin-convert at most"][1] == pytest.approx([3.878, 3.873], abs=1e-3)
    assert figure.axes[0].get_title() == "GPU: 135168 x 33792, groups of 128"


def test_peak_of_both_kernels():
    times = {"cublas": 10.0, "marlin-convert": 2.5, "marlin-convert 2:4": 2.0}
    cells = [Cell(shapes.ideal(132), 128, batch, times, {}, {}) for batch in (1, 4096)]
    lines = drawn(figures.peak(cells, list(times)[1:], CEILINGS, "GPU").axes[0])
    assert lines["marlin-convert 2:4"] == ([1, 4096], [5, 5])
    # 3.125 bits a weight, and twice the operations a second
    assert lines["marlin-convert 2:4 at most"][1] == pytest.approx([5.12, 2], abs=1e-2)
    assert lines["marlin-convert at most"][1] == pytest.approx([3.878, 1], abs=1e-3)


def test_the_share_of_the_floor():
    """By hand: 4.125 bits a weight and 16 of activations at 4 TB/s, or 800 TFLOP/s, twice that of 2:4."""
    few, many = (Cell(shapes.find("4096x4096"), 128, batch, {}, {}, {}) for batch in (1, 4096))
    least = (4096 * 4096 * 4.125 / 8 + 2 * (4096 + 4096)) / 4e12 * 1e6
    assert CEILINGS.least(few, "marlin-convert") == pytest.approx(least)
    assert CEILINGS.least(many, "marlin-convert") == pytest.approx(2 * 4096**3 / 800e12 * 1e6)
    assert CEILINGS.least(many, "marlin-convert 2:4") == pytest.approx(4096**3 / 800e12 * 1e6)
    few.us["marlin-convert"] = 2 * least
    assert CEILINGS.share(few, "marlin-convert") == pytest.approx(0.5)
    assert CEILINGS.share(few, "vllm-marlin") is None
    assert "0.50" in means([few], ["marlin-convert", "vllm-marlin"], CEILINGS.share)[-1]


def test_models():
    done = measured()
    axes = figures.models(done.of_models(), done.names, 16, "GPU").axes[0]
    ours, others = axes.containers
    assert [bar.get_height() for bar in ours] == [2] * 7
    assert [bar.get_height() for bar in others] == [1.25] * 6, "none where a layer failed"
    assert [round(bar.get_x() + bar.get_width()) for bar in others] == [0, 1, 2, 3, 4, 6]
    assert [label.get_text() for label in axes.get_xticklabels()] == list(MODELS)


def test_roofline():
    cells = measured().cells["roofline"]
    lines = drawn(figures.roofline(cells, "marlin-convert", CEILINGS, "GPU").axes[0])
    intensity, speed = lines["4096x4096"]
    assert intensity == pytest.approx([3.87, 60.2], abs=0.05)
    assert speed == pytest.approx([16.78, 16.78], abs=0.01)
    (low, ridge, high), roof = lines["4.00 TB/s, 800 TFLOP/s"]
    assert ridge == 200 and roof == [low * 4, 800, 800]
    assert low < min(intensity) and high > 200


def test_sustained():
    slices = measured().slices
    by_batch, by_time, clocks, power = figures.sustained(slices, "GPU").axes
    assert drawn(by_batch)["marlin-convert"] == ([1, 16], [2.5, 2.5])
    minutes, speedups = drawn(by_time)["marlin-convert, batch 16"]
    assert minutes == pytest.approx([1 / 6, 1 / 3, 1 / 2])
    assert speedups == [4, 3, 2]
    assert drawn(clocks)["least"][1] == [1500, 1700, 1500]
    assert list(power.get_lines()[0].get_ydata()) == [500, 500, 500]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu(cli, tmp_path):
    out = tmp_path / "out"
    options = ("--shapes", "8B.o", "--figures", "sustained", "--batch-sizes", "1,16", "--minutes", 0.1)
    result = cli("bench", "kernel", "-o", out, *options)
    assert result.exit_code == 0, result.stderr
    rows = rows_of(out / "kernel.csv")
    both = {"marlin-convert", "marlin-convert 2:4"}
    ours = [row for row in rows if row["kernel"] in both]
    assert [row["batch"] for row in ours] == ["1", "1", "16", "16"]
    assert all(1 < float(row["speedup"]) < 10 and float(row["relative_error"]) < 1e-3 for row in ours)
    loaded = rows_of(out / "sustained.csv")
    assert {row["kernel"] for row in loaded} == {"cublas", *both}
    assert all(float(row["sm_mhz_min"]) > 100 for row in loaded)
    assert (out / "sustained.png").is_file()
