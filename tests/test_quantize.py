"""The command from end to end on the trained model of the examples: what it writes, says and leaves alone."""

import gc
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
import rows
import tiny_models
import torch
from click.testing import Result
from runs import earlier_output
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import Parameter

from marlin_convert import formats, recipe
from marlin_convert.checkpoint import manifest as manifests
from marlin_convert.checkpoint.linears import Weights
from marlin_convert.commands import quantize as commands
from marlin_convert.conversion import Job
from marlin_convert.hub import Source

Cli = Callable[..., Result]
SMALL = ["--samples", 8, "--sequence-length", 256, "--device", "cpu"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.text(tmp_path_factory.mktemp("text"))


@pytest.fixture
def quantize(cli: Cli, tinypy: Path, text: Path, tmp_path: Path) -> Callable[..., Result]:
    def run(*words: object, source: Path = tinypy, output: Path = tmp_path / "out") -> Result:
        return cli("quantize", source, "-o", output, "--calibration", text, *SMALL, *words)

    return run


def contents(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def manifest_of(output: Path) -> dict:
    return json.loads((output / "marlin_convert.json").read_text())


def stored_codes(output: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Codes and scales of every packed linear."""
    scheme = formats.detect(json.loads((output / "config.json").read_text())["quantization_config"])
    tensors = load_file(output / "model.safetensors")
    layout = formats.FORMATS[scheme.format]
    found = {}
    for row in rows.worked_on(manifest_of(output)):
        name = row["name"]
        own = {
            key.removeprefix(f"{name}."): value
            for key, value in tensors.items()
            if key.startswith(f"{name}.")
        }
        layer = layout.unpack(own, scheme)
        found[name] = layer.codes, layer.scales.float()
    return found


def test_the_output_projection_is_read_once_to_be_written(
    quantize: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, read = [], Weights.read
    source = tiny_models.save(tiny_models.build("llama"), tmp_path / "source")

    def noting(self: Weights, name: str, *device: torch.device) -> Tensor:
        names.append(name)
        return read(self, name, *device)

    monkeypatch.setattr(Weights, "read", noting)
    assert quantize(source=source).exit_code == 0
    assert (names.count("lm_head.weight"), names.count("model.embed_tokens.weight")) == (1, 2)


def test_nothing_stays_of_a_block_that_is_done(tinypy: Path, text: Path, tmp_path: Path) -> None:
    """Nor of the original's copy of it, until Python happens to look for cycles."""
    settings = {"samples": 2, "sequence_length": 64, "calibration": str(text)}
    changed = recipe.load(recipe.DEFAULT).changed(settings)
    job = Job(Source(tinypy, "tinypy", None), tmp_path / "out", changed, torch.device("cpu"))
    held = []

    def progress(numbers: range, total: int) -> Iterator[int]:
        for number in numbers:
            yield number
            held.append(parameters())

    def parameters() -> int:
        return sum(type(one) is Parameter and not one.is_meta for one in gc.get_objects())

    gc.collect()
    before = parameters()
    gc.disable()
    try:
        commands.quantize(job, progress)
    finally:
        gc.enable()
    assert held == [before] * 4


def test_all_formats_hold_the_same_codes_and_scales(quantize: Callable[..., Result], tmp_path: Path) -> None:
    found = {}
    for name in ("marlin", "gptq", "compressed-tensors"):
        result = quantize("--format", name, output=tmp_path / name)
        assert result.exit_code == 0, result.stderr
        found[name] = stored_codes(tmp_path / name)
        dense = load_file(tmp_path / name / "model.safetensors")
        assert dense["model.norm.weight"].dtype == torch.bfloat16
    one = found.pop("marlin")
    assert len(one) == 28
    for other in found.values():
        assert one.keys() == other.keys()
        for linear, (codes, scales) in one.items():
            assert torch.equal(codes, other[linear][0])
            assert torch.equal(scales, other[linear][1])


@pytest.mark.parametrize("format", ["marlin", "marlin-24", "gptq", "compressed-tensors"])
def test_positive_scales_are_written_said_and_kept(
    format: str, quantize: Callable[..., Result], cli: Cli, tmp_path: Path
) -> None:
    made, again = tmp_path / "made", tmp_path / "again"
    sparse = ["--sparsity", "2:4"] if format == "marlin-24" else []
    result = quantize("--format", format, *sparse, "--scales", "positive", output=made)
    assert result.exit_code == 0, result.stderr
    assert all((scales > 0).all() for _, scales in stored_codes(made).values())
    assert "scales positive" in cli("verify", made, "--checks", "files").stdout
    assert {row["scales"] for row in rows.worked_on(manifest_of(made))} == {"positive"}

    refused = cli("quantize", made, "-o", again, "--format", "gptq", "--scales", "positive")
    assert refused.exit_code == 1 and "--requantize" in refused.stderr and not again.exists()
    assert cli("quantize", made, "-o", again, "--format", "gptq").exit_code == 0
    assert {row["scales"] for row in rows.worked_on(manifest_of(again))} == {"positive"}


@pytest.fixture(scope="module")
def done(tinypy: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result, Path]:
    """One run with most options: its output, what it printed, its report."""
    from click.testing import CliRunner

    from marlin_convert.cli.main import main

    folder = tmp_path_factory.mktemp("done")
    source = Path(shutil.copytree(tinypy, folder / "source"))
    (source / "LICENSE").write_text("free")
    (source / "README.md").write_text("a card")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "run.py").write_text("import os")
    words = [
        "quantize", source, "-o", folder / "out", "--calibration", text, *SMALL, "--skip", "*.down_proj",
        "--report", folder / "report.html", "--max-shard-size", "2MB",
    ]  # fmt: skip
    umask = os.umask(0o027)
    try:
        result = CliRunner().invoke(main, [str(word) for word in words])
    finally:
        os.umask(umask)
    assert result.exit_code == 0, result.stderr
    return folder / "out", result, folder / "report.html"


def test_the_same_command_writes_the_same_bytes(
    done: tuple[Path, Result, Path], quantize: Callable[..., Result], tmp_path: Path
) -> None:
    output, _, _ = done
    again = tmp_path / "elsewhere" / "again"
    result = quantize(
        "--skip", "*.down_proj", "--max-shard-size", "2MB", source=output.with_name("source"), output=again
    )
    assert result.exit_code == 0
    assert contents(again) == contents(output)


def test_shards_and_index(done: tuple[Path, Result, Path]) -> None:
    output, _, _ = done
    index = json.loads((output / "model.safetensors.index.json").read_text())
    shards = sorted(output.glob("*.safetensors"))
    assert len(shards) > 1
    held: dict[str, str] = {}
    for shard in shards:
        with safe_open(shard, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            # the embedding alone is larger
            assert shard.stat().st_size < 2_020_000 or list(file.keys()) == ["model.embed_tokens.weight"]
            held |= {name: shard.name for name in file.keys()}  # noqa: SIM118
    assert held == index["weight_map"]


def test_file_modes_follow_the_umask(done: tuple[Path, Result, Path]) -> None:
    output, _, _ = done
    assert {path.stat().st_mode & 0o777 for path in output.iterdir()} == {0o640}
    assert output.stat().st_mode & 0o777 == 0o750


def test_companions_are_copied_and_no_more(done: tuple[Path, Result, Path]) -> None:
    output, _, _ = done
    source = output.with_name("source")
    names = {path.name for path in output.iterdir() if path.suffix != ".safetensors"}
    copied = {
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "LICENSE",
        "chat_template.jinja",
    }
    ours = {"config.json", "recipe.yaml", "marlin_convert.json", "model.safetensors.index.json"}
    assert names == copied | ours
    assert all((output / name).read_bytes() == (source / name).read_bytes() for name in copied)


def test_the_config_keeps_what_the_source_said(done: tuple[Path, Result, Path]) -> None:
    output, _, _ = done
    config = json.loads((output / "config.json").read_text())
    assert formats.detect(config.pop("quantization_config")).format == "marlin"
    assert config == json.loads((output.with_name("source") / "config.json").read_text())


def test_the_manifest(done: tuple[Path, Result, Path], text: Path) -> None:
    output, _, _ = done
    manifest = manifests.load(output)
    assert manifest is not None
    assert not manifests.check_files(output, manifest)
    assert set(manifest["files"]) == {path.name for path in output.iterdir()} - {"marlin_convert.json"}
    assert manifest["source"] == {"name": "source", "commit": None, "quantization": None, "card": {}}
    assert manifest["tool"].startswith("marlin-convert ")
    assert manifest["calibration"]["text"] == text.name
    assert (manifest["calibration"]["samples"], manifest["calibration"]["sequence_length"]) == (8, 256)
    assert re.fullmatch("[0-9a-f]{64}", manifest["calibration"]["sha256"])
    assert rows.dense(manifest) == {
        f"model.layers.{i}.mlp.down_proj": "skipped by '*.down_proj'" for i in range(4)
    }
    assert len(rows.worked_on(manifest)) == 24
    assert all(0 < row["error"] < 0.3 and row["damping"] == 0.1 for row in rows.worked_on(manifest))
    assert not any("rounded_to_nearest" in row for row in rows.worked_on(manifest))
    assert manifest["bits_per_weight"] == 4.125


def test_the_recipe_of_an_output_is_the_one_that_made_it(
    done: tuple[Path, Result, Path], text: Path, quantize: Callable[..., Result], tmp_path: Path
) -> None:
    output, _, _ = done
    saved = recipe.load(str(output / "recipe.yaml"))
    assert saved.skip == ("*.down_proj",) and (saved.samples, saved.sequence_length) == (8, 256)
    manifest = manifest_of(output)
    assert manifest["recipe"] == saved.to_dict()
    source = output.with_name("source")
    result = quantize("--recipe", output / "recipe.yaml", "--max-shard-size", "2MB", source=source)
    assert result.exit_code == 0, result.stderr
    assert contents(tmp_path / "out") == contents(output)


def test_nothing_of_this_machine_or_hour_is_written(done: tuple[Path, Result, Path], text: Path) -> None:
    output, _, _ = done
    stamp = re.compile(rb"20\d\d-\d\d-\d\d|\d\d:\d\d:\d\d")
    for path in output.iterdir():
        data = path.read_bytes()
        for local in (output.parent, text.parent, Path.home(), Path.cwd()):
            assert str(local).encode() + b"/" not in data, path
        if path.name in ("config.json", "recipe.yaml", "marlin_convert.json"):
            assert not stamp.search(data)
            assert b'"/' not in data


def test_what_is_printed(done: tuple[Path, Result, Path], tinypy: Path) -> None:
    output, result, _ = done
    lines = result.stdout.splitlines()
    errors = sorted((row["error"] for row in rows.worked_on(manifest_of(output))), reverse=True)
    after = manifest_of(output)["divergence"]
    assert len(after) == 4 and after == sorted(after) and 0.01 < after[0] < after[3] < 0.2
    assert lines[0].startswith("hidden states, relative distance from the original's")
    assert (
        lines[1].split()[1:4] == [f"{after[0]:.4f}", "after", "block"]
        and f"{after[3]:.4f} after block 3" in lines[1]
    )
    assert [float(line.split()[-1]) for line in lines[3:8]] == [round(error, 4) for error in errors[:5]]
    assert "left dense: model.layers.2.mlp.down_proj (skipped by '*.down_proj')" in lines
    assert any("24 linears at 4.125 bits per weight" in line and " -> " in line for line in lines)
    assert lines[-1] == f"Next: marlin-convert verify {output} --source {output.with_name('source')}"
    assert "block 4 of 4 done" in result.stderr


def test_the_report_is_one_page_that_needs_nothing_else(done: tuple[Path, Result, Path]) -> None:
    output, _, report = done
    page = report.read_text()
    outside: list[str] = []
    texts: list[str] = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag: str, attributes: list) -> None:
            outside.extend(name for name, _ in attributes if name in ("src", "href"))
            outside.extend([tag] if tag in ("link", "img", "iframe") else [])

        def handle_data(self, data: str) -> None:
            texts.append(data)

    Parser().feed(page)
    assert not outside and "@import" not in page and "url(" not in page
    manifest = manifest_of(output)
    assert all(row["name"] in page for row in rows.worked_on(manifest))
    assert page.count("<circle") == 4 + 24
    assert page.count("<polyline") == 1 + 6
    assert any("skipped by '*.down_proj'" in text for text in texts)
    assert str(output.parent) not in page


def test_a_dry_run_writes_nothing_and_names_everything(
    quantize: Callable[..., Result], tmp_path: Path
) -> None:
    before = contents(tmp_path)
    result = quantize("--dry-run", "--skip", "*.o_proj")
    assert result.exit_code == 0
    assert "24 linears in 4 blocks packed" in result.stdout
    assert "model.layers.3.self_attn.o_proj: skipped by '*.o_proj'" in result.stdout
    assert contents(tmp_path) == before and not list(tmp_path.iterdir())
    plan = json.loads(quantize("--dry-run", "--json", "-v").stdout)
    assert len(rows.worked_on(plan)) == 28
    assert plan["output_bytes"] < plan["source_bytes"] / 2


def test_the_plan_knows_the_size_of_what_is_written(quantize: Callable[..., Result], tmp_path: Path) -> None:
    plan = json.loads(quantize("--dry-run", "--json", "-v").stdout)
    result = quantize("--json", "-q")
    assert result.stderr == ""
    summary = json.loads(result.stdout)
    assert summary["manifest"] == manifest_of(tmp_path / "out")
    assert summary["output_bytes"] == plan["output_bytes"]
    with (tmp_path / "out" / "model.safetensors").open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert size - header - 8 == plan["output_bytes"]


def test_another_dtype_for_what_stays_dense(
    quantize: Callable[..., Result], tinypy: Path, tmp_path: Path
) -> None:
    assert quantize("--dtype", "float16").exit_code == 0
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    source = load_file(tinypy / "model.safetensors")
    dense = {name: tensor for name, tensor in tensors.items() if name in source}
    assert dense and all(torch.equal(tensor, source[name].half()) for name, tensor in dense.items())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "float16"


def test_another_dtype_under_every_name_that_a_config_has_for_it(tinypy, cli, tmp_path) -> None:
    source = shutil.copytree(tinypy, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    assert "dtype" in config
    (source / "config.json").write_text(json.dumps(config | {"torch_dtype": "bfloat16"}))
    words = ("--dtype", "float16", "--samples", 2, "--sequence-length", 64, "--device", "cpu")
    assert cli("quantize", source, "-o", tmp_path / "out", *words).exit_code == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["dtype"], config["torch_dtype"]) == ("float16", "float16")


def test_an_earlier_output_is_replaced_only_if_asked(quantize: Callable[..., Result], tmp_path: Path) -> None:
    earlier_output(tmp_path / "out")
    assert quantize().exit_code == 1
    assert quantize("--overwrite").exit_code == 0
    assert not (tmp_path / "out" / "earlier.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_empty_directory_does_for_an_output(quantize: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert quantize().exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_linear_without_input_is_rounded_to_nearest_and_named(
    quantize: Callable[..., Result], tinypy: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(tinypy, tmp_path / "source"))
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.post_attention_layernorm.weight"].zero_()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    result = quantize(source=source)
    assert result.exit_code == 0
    rounded = {
        row["name"] for row in rows.worked_on(manifest_of(tmp_path / "out")) if row.get("rounded_to_nearest")
    }
    # gate and up see zeros, and so does down behind them
    assert rounded == {f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")}
    for name in rounded:
        assert f"rounded to nearest: {name}" in result.stdout
        assert name in result.stderr


@pytest.mark.parametrize("suffix", ["B", "s"])
def test_what_does_not_survive_its_format_is_not_published(
    suffix: str, quantize: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One bit that packing gets wrong, in one linear."""
    pack, calls = formats.marlin.pack, []

    def wrong(layer):
        calls.append(layer)
        tensors = pack(layer)
        if len(calls) == 3:
            tensors[suffix].view(torch.int16)[1, 5] ^= 1
        return tensors

    monkeypatch.setattr(formats.marlin, "pack", wrong)
    with pytest.raises(RuntimeError, match="does not survive marlin"):
        quantize()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_source_of_another_type(
    dtype: torch.dtype, quantize: Callable[..., Result], tinypy: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(tinypy, tmp_path / "source"))
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(source / "model.safetensors").items()}
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"dtype": str(dtype).removeprefix("torch.")}))
    assert quantize(source=source).exit_code == 0
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written["model.norm.weight"].dtype == dtype
    errors = [row["error"] for row in rows.worked_on(manifest_of(tmp_path / "out"))]
    assert sum(errors) / len(errors) < 0.06


def test_a_sharded_source_gives_the_same_weights(
    quantize: Callable[..., Result], tinypy: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(tinypy, tmp_path / "source"))
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {name: f"model-0000{1 + i % 3}-of-00003.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == file}, source / file)
    index = {"metadata": {}, "weight_map": files}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    assert quantize(source=source, output=tmp_path / "sharded").exit_code == 0
    assert quantize(output=tmp_path / "single").exit_code == 0
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("sharded", "single"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_source_is_left_as_it_was(quantize: Callable[..., Result], tinypy: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tinypy, tmp_path / "source"))
    before = {
        path.name: (hashlib.sha256(path.read_bytes()).digest(), path.stat().st_mtime_ns)
        for path in source.iterdir()
    }
    assert quantize(source=source).exit_code == 0
    assert before == {
        path.name: (hashlib.sha256(path.read_bytes()).digest(), path.stat().st_mtime_ns)
        for path in source.iterdir()
    }
