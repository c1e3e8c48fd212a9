"""What a checkpoint says of how it came to be, and that it comes to be again by that."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rows
import tiny_models
import torch
import yaml
from click.testing import Result

from marlin_convert.checkpoint.manifest import MANIFEST
from marlin_convert.recipe import REPACKED

Cli = Callable[..., Result]
SHORT = ("--calibration", "text.txt", "--samples", 3, "--sequence-length", 64, "--seed", 5, "--device", "cpu")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_models.build("llama", torch.bfloat16)
    return tiny_models.save(model, tmp_path_factory.mktemp("models") / "original")


@pytest.fixture
def run(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """A command that must succeed, in a directory that has the calibration text."""
    tiny_models.text(tmp_path)
    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> Result:
        result = cli(*words)
        assert result.exit_code == 0, result.output
        return result

    return run


def manifest_of(directory: Path | str) -> dict[str, Any]:
    return json.loads((Path(directory) / MANIFEST).read_text())


def card_of(run: Cli, directory: str) -> str:
    planned = run("push", directory, "me/tiny", "--allow-unverified", "--dry-run", "--json", "-v", "-q")
    return json.loads(planned.stdout)["branches"][-1]["card"]


def make_again(run: Cli, directory: str, model: Path, commands: int = 1) -> None:
    """Type what the card says under "To make it again", on the original: the same weights come of it."""
    lines = card_of(run, directory).split("To make it again")[1].split("```")[1].strip().splitlines()
    assert len(lines) == commands
    for earlier in Path().glob("DIR*"):
        shutil.rmtree(earlier)
    for recipe in Path(directory).glob("recipe*.yaml"):
        shutil.copyfile(recipe, recipe.name)
    for line in lines:
        tool, *words = line.replace("MODEL", str(model)).split()
        assert tool == "marlin-convert"
        run(*words, "-q", "--device", "cpu")
    assert Path("DIR/model.safetensors").read_bytes() == (Path(directory) / "model.safetensors").read_bytes()
    assert (Path("DIR") / "config.json").read_bytes() == (Path(directory) / "config.json").read_bytes()


def test_a_chain_of_repacks_carries_what_made_its_codes(run: Cli, original: Path) -> None:
    run("quantize", original, "-o", "first", "--format", "gptq", "--skip", "*.1.mlp.*", *SHORT, "-q")
    run("quantize", "first", "-o", "second", "-q")
    run("quantize", "second", "-o", "third", "--format", "compressed-tensors", "-q")
    first, third = manifest_of("first"), manifest_of("third")
    assert third["recipe"] == first["recipe"] | {"format": "compressed-tensors", "group_size": 128}
    assert yaml.safe_load(Path("third/recipe.yaml").read_text()) == third["recipe"]
    assert third["calibration"] == first["calibration"] and third["calibration"]["samples"] == 3
    assert third["repacked"] and third["processor"] is None and not first["repacked"]
    assert third["source"]["name"] == "second" and third["source"]["quantization"] == "marlin"
    assert [step["source"]["name"] for step in third["history"]] == ["original", "first"]
    assert [step["repacked"] for step in third["history"]] == [False, True]
    assert third["history"][0]["processor"] == first["processor"] != None  # noqa: E711
    # what the solver found out about the codes, and why some are none
    found = {row["name"]: row | {"format": third["recipe"]["format"]} for row in rows.worked_on(first)}
    assert {row["name"]: row for row in rows.worked_on(third)} == found
    assert rows.dense(third) == rows.dense(first) and "skipped by" in next(iter(rows.dense(third).values()))
    text = card_of(run, "third")
    assert "| source | `original`, a directory |" in text and "3 x 64 tokens of `text.txt`" in text
    assert "from `marlin` by `marlin-convert" in text
    assert "original     original, in 3 steps" in run("inspect", "third").stdout
    make_again(run, "third", original)


def test_of_a_foreign_source_nothing_is_made_up(run: Cli, original: Path) -> None:
    run("quantize", original, "-o", "foreign", "--format", "gptq", *SHORT, "-q")
    Path("foreign", MANIFEST).unlink()
    Path("foreign", "README.md").write_text("---\nbase_model: org/original\nlicense: mit\n---\n")
    run("quantize", "foreign", "-o", "first", "-q")
    run("quantize", "first", "-o", "second", "--format", "compressed-tensors", "-q")
    for directory, layout in (("first", "marlin"), ("second", "compressed-tensors")):
        manifest = manifest_of(directory)
        assert manifest["recipe"].keys() == set(REPACKED)
        assert manifest["recipe"]["format"] == layout and manifest["calibration"] is None
        recipe = Path(directory, "recipe.yaml").read_text()
        assert "# How they were calibrated is not known." in recipe and "samples" not in recipe
        said = run("inspect", directory).stdout
        assert "foreign, gptq already; how that was calibrated is not known" in said
        text = card_of(run, directory)
        assert "`gptq` already; how they were calibrated is not known" in text and "samples" not in text
        assert "base_model: org/original" in text and "license: mit" in text
    make_again(run, "second", Path("foreign"))
    plan = json.loads(run("quantize", "foreign", "-o", "x", "--dry-run", "--json", "-v").stdout)
    assert "samples" not in plan["recipe"]


def test_the_pruning_is_a_part_of_the_history(run: Cli, original: Path) -> None:
    run("sparsify", original, "-o", "pruned", *SHORT, "-q")
    run("quantize", "pruned", "-o", "first", "--format", "gptq", *SHORT, "--samples", 2, "-q")
    run("quantize", "first", "-o", "second", "--format", "marlin-24", "-q")
    second = manifest_of("second")
    assert [step["recipe"]["format"] for step in second["history"]] == ["dense", "gptq"]
    assert [step["calibration"]["samples"] for step in second["history"]] == [3, 2]
    text = card_of(run, "second")
    assert "| 1. calibration | 3 x 64 tokens" in text and "| 2. calibration | 2 x 64 tokens" in text
    assert "| source | `original`, a directory |" in text
    assert "| 3. codes | of the step before, as `marlin-24` |" in text
    assert not any("not known" in path.read_text() for path in Path("second").glob("recipe*.yaml"))
    make_again(run, "second", original, commands=3)
    run("quantize", "second", "-o", "third", "-q")
    make_again(run, "third", original, commands=2)


def test_solved_again_from_codes(run: Cli, original: Path) -> None:
    run("quantize", original, "-o", "first", "--format", "gptq", *SHORT, "-q")
    again = ("--requantize", "--group-size", 64, "--max-shard-size", "10MB", "--samples", 2)
    run("quantize", "first", "-o", "second", *SHORT, *again, "-q")
    run("quantize", "second", "-o", "third", "--format", "gptq", "-q")
    third = manifest_of("third")
    assert [step["requantized"] for step in third["history"]] == [False, True]
    assert third["recipe"]["samples"] == 2 and third["recipe"]["group_size"] == 64
    make_again(run, "third", original, commands=2)


def test_rounding_to_nearest_stays_known(run: Cli, original: Path) -> None:
    run("quantize", original, "-o", "first", "--format", "gptq", *SHORT, "-q")
    manifest = manifest_of("first")
    rows.worked_on(manifest)[3]["rounded_to_nearest"] = True
    Path("first", MANIFEST).write_text(json.dumps(manifest))
    run("quantize", "first", "-o", "second", "-q")
    name = rows.worked_on(manifest)[3]["name"]
    assert f"rounded to nearest: {name}" in run("verify", "second").stdout


def test_what_an_earlier_version_wrote_is_read(run: Cli, original: Path) -> None:
    """Its repacks have a recipe, of which only what a repack heeds is true."""
    run("quantize", original, "-o", "first", "--format", "gptq", *SHORT, "-q")
    run("quantize", "first", "-o", "second", "-q")
    manifest = rows.earlier(manifest_of("second"))
    for key in ("repacked", "history", "processor"):
        del manifest[key]
    manifest["calibration"] = None
    Path("second", MANIFEST).write_text(json.dumps(manifest))
    assert "how they were calibrated is not known" in card_of(run, "second")
    assert "first, gptq already" in run("inspect", "second").stdout
    run("quantize", "second", "-o", "third", "--format", "gptq", "-q")
    assert "samples" not in manifest_of("third")["recipe"]
    run("verify", "third", "-q")


@pytest.mark.parametrize(
    "change",
    [
        {"history": 3},
        {"history": ["x"]},
        {"history": [{}]},
        {"recipe": None},
        {"recipe": {"format": "shiny"}},
        {"source": {"name": 1}},
        {"calibration": {"text": 1}},
        {"linears": [{"name": "model.layers.0.mlp.up_proj", "error": "much"}], "dense": 1, "left_out": 2},
    ],
)
def test_a_manifest_that_says_nonsense(
    change: dict[str, Any], run: Cli, cli: Cli, original: Path, tmp_path: Path
) -> None:
    if not (first := original.with_name("first")).exists():
        run("quantize", original, "-o", first, "--format", "gptq", *SHORT, "-q")
    shutil.copytree(first, "bad")
    Path("bad", MANIFEST).write_text(json.dumps(manifest_of("bad") | change))
    run("quantize", "bad", "-o", "out", "--report", "report.html")
    assert "how they were calibrated" in card_of(run, "out") or "linears" in change
    run("inspect", "bad")
