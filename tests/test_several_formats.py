"""Several formats of one solve: the same codes in each, whatever stops the run on its way."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny_models
import torch
from click.testing import Result
from runs import Start, contents, starter

from marlin_convert.checkpoint.linears import Weights
from marlin_convert.checkpoint.reader import Checkpoint

SMALL = ("--samples", 8, "--sequence-length", 256, "--device", "cpu")
FORMATS = ("marlin", "gptq", "compressed-tensors")

Cli = Callable[..., Result]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    with starter(tmp_path_factory.mktemp("log")) as start:
        yield start


@pytest.fixture(scope="module")
def words(tinypy: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[object, ...]:
    text = tiny_models.text(tmp_path_factory.mktemp("text"))
    small = ("--calibration", text, "--samples", 4, "--sequence-length", 64, "--device", "cpu")
    return ("quantize", tinypy, "--format", "marlin,gptq", *small)


@pytest.fixture(scope="module")
def whole(
    start: Start, words: tuple[object, ...], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """What a run writes that nothing stops."""
    output = tmp_path_factory.mktemp("whole") / "out"
    status, said = start(*words, "-o", output)
    assert status == 0, said
    assert "the same codes as marlin: " in said and f"verify {output}/gptq" in said, said
    return contents(output)


def codes(directory: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    weights = Weights(Checkpoint.open(directory))
    layers = {name: weights.quantized(name) for name in weights.packed_linears()}
    return {name: (layer.codes.clone(), layer.scales.clone()) for name, layer in layers.items()}


def same_codes(one: Path, other: Path) -> None:
    ours, theirs = codes(one), codes(other)
    assert ours.keys() == theirs.keys()
    for name, pair in ours.items():
        assert all(torch.equal(a, b) for a, b in zip(pair, theirs[name], strict=True)), name


def test_every_format_is_complete_and_has_the_same_codes(
    cli: Cli, tinypy: Path, quantized: Callable[[str], Path], tmp_path: Path
) -> None:
    """Each as a run for it alone writes it, and verified as any other."""
    output = tmp_path / "out"
    done = cli("quantize", tinypy, "-o", output, "--format", ",".join(FORMATS), *SMALL)
    assert done.exit_code == 0, done.output
    assert {path.name for path in output.iterdir()} == set(FORMATS)
    for format in FORMATS:
        alone = quantized(format)
        assert contents(output / format)["model.safetensors"] == contents(alone)["model.safetensors"]
        assert contents(output / format).keys() == contents(alone).keys() - {"marlin_convert_verify.json"}
        same_codes(output / format, output / "gptq")
        checked = cli("verify", output / format, "--source", tinypy, "--samples", 2, "--sequence-length", 128)
        assert checked.exit_code == 0, checked.output
        manifest = json.loads((output / format / "marlin_convert.json").read_text())
        assert all(row["error"] for row in manifest["matrices"])  # carried along with the codes


def test_two_of_four_in_two_formats(cli: Cli, words: tuple[object, ...], tmp_path: Path) -> None:
    output, small = tmp_path / "out", [word for word in words if word != "marlin,gptq"]
    small.remove("--format")
    done = cli(*small, "-o", output, "--format", "gptq,marlin-24", "--sparsity", "2:4")
    assert done.exit_code == 0, done.output
    same_codes(output / "gptq", output / "marlin-24")
    for format in ("gptq", "marlin-24"):
        checked = cli("verify", output / format, "--checks", "files,layout,sparsity")
        assert checked.exit_code == 0 and "sparsity pass" in checked.output, checked.output


def test_a_plan_of_several_formats(cli: Cli, words: tuple[object, ...], tmp_path: Path) -> None:
    done = cli(*words, "-o", tmp_path / "out", "--dry-run")
    assert done.exit_code == 0 and "then repacked to marlin: " in done.stdout, done.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "place, call",
    [
        ("marlin_convert.checkpoint.unfinished:UnfinishedRun.save", 3),  # two blocks are solved
        ("marlin_convert.commands.quantize:publish", -1),  # all is solved, and nothing is there
        ("marlin_convert.commands.quantize:publish", 1),  # one format is there
        ("marlin_convert.checkpoint.unfinished:UnfinishedRun.save", 8),  # the other is begun
        ("marlin_convert.commands.quantize:publish", -2),  # it is written
        ("marlin_convert.commands.quantize:publish", 2),  # both are there
        ("marlin_convert.checkpoint.unfinished:UnfinishedRun.forget", 1),  # and one is tidied up
        ("marlin_convert.checkpoint.unfinished:UnfinishedRun.forget", -2),
    ],
)
def test_a_run_that_was_killed_goes_on(
    place: str, call: int, start: Start, words: tuple[object, ...], whole: dict[str, bytes], tmp_path: Path
) -> None:
    """To the same bytes; what is there already is not made again."""
    output = tmp_path / "out"
    status, said = start(*words, "-o", output, kill=(place, call))
    assert status == -9, said
    there = {
        path: path.stat().st_mtime_ns
        for path in output.glob("*/model.safetensors")
        if ".partial" not in str(path)
    }
    status, said = start(*words, "-o", output, "--resume")
    assert status == 0, said
    assert contents(output) == whole
    assert there == {path: path.stat().st_mtime_ns for path in there}


def test_what_is_finished_is_not_taken_for_another_runs(
    start: Start, words: tuple[object, ...], whole: dict[str, bytes], tmp_path: Path
) -> None:
    """What stands where another format is to be is refused before work, replaced only where that is asked."""
    output = tmp_path / "out"
    shutil.copytree(Path(str(words[1])), output / "marlin")
    for more in ((), ("--resume",), ("--overwrite",)):
        status, said = start(*words, "-o", output, *more)
        assert status == 1 and f"'{output}/marlin'" in said and "block 1" not in said, said
    shutil.rmtree(output)
    assert start(*words, "-o", output, "--seed", 3)[0] == 0
    before = contents(output)
    status, said = start(*words, "-o", output)
    assert status == 1 and "already exists and is not empty" in said and contents(output) == before
    status, said = start(*words, "-o", output, "--overwrite")
    assert status == 0, said
    found = contents(output)
    assert all(found[name] == whole[name] for name in whole if name.endswith(".safetensors"))
    assert found.keys() == whole.keys() and found != before


@pytest.mark.parametrize(
    "more, status, said",
    [
        (("--bits", 8, "--format", "gptq,marlin"), 1, "marlin"),
        (("--format", "marlin-24,gptq"), 1, "--sparsity 2:4"),
        (("--format", "gptq,gguf"), 2, "'gguf' is not one of marlin, marlin-24, gptq, compressed-tensors"),
        (("--format", ","), 2, "'' is not one of"),
    ],
)
def test_what_one_of_them_cannot_hold_is_refused_before_work(
    more: tuple[object, ...], status: int, said: str, cli: Cli, words: tuple[object, ...], tmp_path: Path
) -> None:
    done = cli(*words, "-o", tmp_path / "out", *more)
    assert done.exit_code == status and said in done.output, done.output
    assert not list(tmp_path.iterdir())


def test_a_shape_that_one_of_them_cannot_hold(cli: Cli, words: tuple[object, ...], tmp_path: Path) -> None:
    """gptq holds 32 outputs, marlin does not."""
    model = tiny_models.save(
        tiny_models.build("llama", torch.bfloat16, intermediate_size=224), tmp_path / "model"
    )
    odd = [model if word == words[1] else word for word in words]
    done = cli(*odd, "-o", tmp_path / "out", "--group-size", 32)
    assert done.exit_code == 1 and "has 128 inputs and 224 outputs; marlin " in done.output, done.output
    assert not (tmp_path / "out").exists()


def test_a_model_is_no_place_for_several(
    cli: Cli, words: tuple[object, ...], quantized: Callable[[str], Path], tmp_path: Path
) -> None:
    shutil.copytree(quantized("gptq"), tmp_path / "out")
    done = cli(*words, "-o", tmp_path / "out", "--overwrite")
    assert done.exit_code == 1 and "is a model itself" in done.output, done.output


def test_codes_that_are_there_already_in_several_formats(
    cli: Cli, quantized: Callable[[str], Path], tmp_path: Path
) -> None:
    done = cli("quantize", quantized("gptq"), "-o", tmp_path / "out", "--format", "compressed-tensors,marlin")
    assert done.exit_code == 0, done.output
    for format in ("compressed-tensors", "marlin"):
        same_codes(tmp_path / "out" / format, quantized("gptq"))
