"""Input that cannot be converted: a sentence and a hint, exit 1, nothing written, the source as it was."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers
from click.testing import Result
from runs import earlier_output
from safetensors.torch import load_file, save_file

Cli = Callable[..., Result]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("good")
    return tiny_models.save(tiny_models.build("qwen3", tie_word_embeddings=True), directory / "single")


@pytest.fixture(scope="module")
def good_sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("good")
    model = tiny_models.build("qwen3", tie_word_embeddings=True)
    tiny_models.save(model, directory / "sharded", max_shard_size="1MB")
    assert (directory / "sharded" / INDEX).exists()
    return directory / "sharded"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.text(tmp_path_factory.mktemp("text"))


def contents(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def refused(cli: Cli, model: object, output: Path, *words: object, code: int = 1) -> str:
    """The Error and Hint of a command that must fail without a trace; one line."""
    source = contents(Path(str(model))) if str(model) and Path(str(model)).is_dir() else None
    around = set(output.parent.iterdir()) if output.parent.is_dir() else None
    sized = [] if "--samples" in words else ["--samples", 4, "--sequence-length", 64]
    result = cli("quantize", model, "-o", output, "--device", "cpu", *sized, *words)
    assert result.exit_code == code, result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    lines = result.stderr.splitlines()
    errors = [line for line in lines if line.startswith("Error: ")]
    hints = [line for line in lines if line.startswith("Hint: ")]
    assert len(errors) == 1, result.stderr
    assert len(hints) == 1 or code == 2, result.stderr
    assert around is None or set(output.parent.iterdir()) == around
    assert source is None or contents(Path(str(model))) == source
    return " ".join(errors + hints)


def edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def edit_tensors(model: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(model / SINGLE)
    change(tensors)
    save_file(tensors, model / SINGLE, {"format": "pt"})


def edit_header(path: Path, change: Callable[[str], str]) -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = change(data[8 : 8 + length].decode()).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])


def first_shard(model: Path) -> Path:
    return sorted(model.glob("model-*.safetensors"))[0]


# --- the model cannot be found or opened


@pytest.mark.parametrize("model", ["no/such/model/here", "./missing", "a b", "org/na me", "", "../x"])
def test_a_name_that_is_nothing(model: str, cli: Cli, tmp_path: Path) -> None:
    assert "neither a directory nor a Hub id" in refused(cli, model, tmp_path / "out")


def test_a_file_for_a_model(cli: Cli, good: Path, tmp_path: Path) -> None:
    assert "neither a directory nor a Hub id" in refused(cli, good / SINGLE, tmp_path / "out")


def test_an_empty_directory(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    assert "has no config.json" in refused(cli, tmp_path / "model", tmp_path / "out")


def test_a_revision_of_a_directory(cli: Cli, good: Path, tmp_path: Path) -> None:
    assert "--revision" in refused(cli, good, tmp_path / "out", "--revision", "main")


# --- damaged directories: what is done to a good one, and what must be said of it

Damage = Callable[[Path], object]


def only_pickles(model: Path) -> None:
    (model / SINGLE).rename(model / "pytorch_model.bin")


def no_weights(model: Path) -> None:
    (model / SINGLE).unlink()


def cut_in_the_data(model: Path) -> None:
    os.truncate(model / SINGLE, (model / SINGLE).stat().st_size - 100)


def cut_in_the_header(model: Path) -> None:
    os.truncate(model / SINGLE, 50)


def empty_file(model: Path) -> None:
    os.truncate(model / SINGLE, 0)


def not_safetensors(model: Path) -> None:
    (model / SINGLE).write_bytes(b"PK\3\4" * 1000)


def link_out(model: Path) -> None:
    shutil.move(model / SINGLE, model.parent / "elsewhere.safetensors")
    (model / SINGLE).symlink_to(model.parent / "elsewhere.safetensors")


def duplicate_name(model: Path) -> None:
    def twice(header: str) -> str:
        start = header.index('"model.norm.weight"')
        entry = header[start : header.index("}", start) + 1]
        return header.replace(entry, f"{entry},{entry}")

    edit_header(model / SINGLE, twice)


def foreign_tensor(model: Path) -> None:
    edit_tensors(model, lambda tensors: tensors.update({"model.layers.0.mlp.extra.weight": torch.ones(4)}))


def missing_tensor(model: Path) -> None:
    edit_tensors(model, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))


def wrong_shape(model: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    edit_tensors(model, lambda tensors: tensors.update({name: tensors[name][:128].contiguous()}))


def wrong_norm_shape(model: Path) -> None:
    edit_tensors(model, lambda tensors: tensors.update({"model.norm.weight": torch.ones(64)}))


def spoil(name: str, value: float) -> Damage:
    def change(model: Path) -> None:
        edit_tensors(model, lambda tensors: tensors[name].view(-1)[7:8].fill_(value))

    return change


def stored_as(dtype: torch.dtype) -> Damage:
    def change(model: Path) -> None:
        name = "model.norm.weight"
        edit_tensors(model, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))

    return change


def config(**settings: object) -> Damage:
    return lambda model: edit_json(model / "config.json", lambda found: found.update(settings))


def garbage(name: str, data: bytes) -> Damage:
    return lambda model: (model / name).write_bytes(data)


DAMAGES: list[Any] = [
    (only_pickles, ["pickle", "pytorch_model.bin"]),
    (no_weights, ["no weights"]),
    (cut_in_the_data, ["truncated", SINGLE]),
    (cut_in_the_header, ["truncated", SINGLE]),
    (empty_file, ["truncated", SINGLE]),
    (not_safetensors, [SINGLE]),
    (link_out, [SINGLE, "link"]),
    (duplicate_name, ["'model.norm.weight' is there twice"]),
    (foreign_tensor, ["model.layers.0.mlp.extra.weight", "not of the architecture"]),
    (missing_tensor, ["model.layers.1.mlp.up_proj.weight"]),
    (wrong_shape, ["model.layers.1.mlp.up_proj.weight", "(128, 128)", "(256, 128)"]),
    (wrong_norm_shape, ["model.norm.weight", "(64,)", "(128,)"]),
    (stored_as(torch.float8_e5m2), ["model.norm.weight is stored as F8_E5M2; F16, BF16, F32 are read"]),
    (stored_as(torch.int32), ["model.norm.weight is stored as I32"]),
    (spoil("model.embed_tokens.weight", torch.nan), ["model.embed_tokens.weight holds NaN or Inf"]),
    (spoil("model.norm.weight", torch.inf), ["model.norm.weight holds NaN or Inf"]),
    (
        spoil("model.layers.0.mlp.down_proj.weight", -torch.inf),
        ["model.layers.0.mlp.down_proj.weight holds NaN or Inf"],
    ),
    (config(model_type="gpt_bigcode"), ["transformer.h.0.attn.c_attn.bias", "of the architecture not in"]),
    (config(model_type="llama9"), ["'llama9' is not a type of model that transformers", "pip install -U"]),
    (config(model_type=None), ["None is not a type of model"]),
    (config(model_type=["qwen3"]), ["is not a type of model"]),
    (config(model_type="\x1b[2J"), ["'\\x1b[2J' is not a type of model"]),
    (config(model_type="vit"), ["'vit' is no language model"]),
    (config(num_hidden_layers=10**9), ["num_hidden_layers = 1000000000, more than 1000"]),
    (config(num_labels=10**9), ["num_labels = 1000000000, more than 1000"]),
    (config(hidden_size="wide"), ["config.json"]),
    (config(rope_parameters=tiny_models.LLAMA3_ROPE | {"low_freq_factor": True}), ["config.json"]),
    (config(hidden_size=0), ["config.json"]),
    (config(num_attention_heads=None), ["config.json"]),
    (config(num_hidden_layers=3, layer_types=3 * ["full_attention"]), ["model.layers.2."]),
    (config(num_hidden_layers=1, layer_types=["full_attention"]), ["model.layers.1."]),
    (config(quantization_config="gptq"), ["quantization_config"]),
    (garbage("config.json", b"{"), ["config.json", "JSON"]),
    (garbage("config.json", b"\xff\xfe"), ["config.json", "JSON"]),
    (garbage("config.json", b"[]"), ["config.json"]),
    (garbage("tokenizer.json", b"{}"), ["tokenizer"]),
    (garbage("tokenizer.json", b"\x00garbage"), ["tokenizer"]),
]


def damage_name(damage: object) -> str:
    return getattr(damage, "__name__", "")


@pytest.mark.parametrize("damage, said", DAMAGES, ids=damage_name)
def test_a_damaged_model(
    damage: Damage, said: list[str], cli: Cli, good: Path, text: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(good, tmp_path / "model"))
    damage(model)
    sentence = refused(cli, model, tmp_path / "out", "--calibration", text)
    assert all(part in sentence for part in said), sentence


def test_no_tokenizer(cli: Cli, good: Path, text: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(good, tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer*")))
    assert "no tokenizer" in refused(cli, model, tmp_path / "out", "--calibration", text)


def test_a_tokenizer_of_another_model(cli: Cli, text: Path, tmp_path: Path) -> None:
    model = tiny_models.save(tiny_models.build("qwen3", vocab_size=64), tmp_path / "model")
    sentence = refused(cli, model, tmp_path / "out", "--calibration", text)
    assert "tokenizer" in sentence and "64 embeddings" in sentence


def test_nan_in_a_late_block_is_named_and_what_is_done_can_be_kept(
    cli: Cli, good: Path, text: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(good, tmp_path / "model"))
    spoil("model.layers.1.mlp.up_proj.weight", torch.nan)(model)
    before = contents(model)
    result = cli(
        "quantize", model, "-o", tmp_path / "out", "--calibration", text, "--samples", 4,
        "--sequence-length", 64, "--device", "cpu",
    )  # fmt: skip
    assert result.exit_code == 1
    assert "Error: model.layers.1.mlp.up_proj.weight holds NaN or Inf" in result.stderr
    assert "Hint: " in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()
    assert contents(model) == before


# --- damaged sets of shards


def move_tensor(to: object) -> Damage:
    def change(model: Path) -> None:
        edit_json(model / INDEX, lambda index: index["weight_map"].update({"model.norm.weight": to}))

    return change


def lose_a_shard(model: Path) -> None:
    first_shard(model).unlink()


def same_tensor_in_two_shards(model: Path) -> None:
    one, other = sorted(model.glob("model-*.safetensors"))[:2]
    tensors = load_file(one)
    name = next(iter(tensors))
    save_file(load_file(other) | {name: tensors[name]}, other, {"format": "pt"})


def tensor_the_index_does_not_have(model: Path) -> None:
    shard = first_shard(model)
    save_file(load_file(shard) | {"stranger": torch.ones(4)}, shard, {"format": "pt"})


def no_index(model: Path) -> None:
    (model / INDEX).unlink()


def cut_a_shard(model: Path) -> None:
    os.truncate(first_shard(model), first_shard(model).stat().st_size - 8)


SHARD_DAMAGES: list[tuple[Damage, list[str]]] = [
    (lose_a_shard, ["lacks 1 of", "model-00001"]),
    (move_tensor("model-00099-of-00099.safetensors"), ["model-00099-of-00099.safetensors"]),
    (move_tensor("../x.safetensors"), ["'../x.safetensors'", "not a plain file name"]),
    (move_tensor("/etc/x.safetensors"), ["'/etc/x.safetensors'", "not a plain file name"]),
    (move_tensor("..\\x.safetensors"), ["not a plain file name"]),
    (move_tensor("x.bin"), ["'x.bin'"]),
    (move_tensor(7), ["7"]),
    (same_tensor_in_two_shards, ["stored in two shards", "in 'model-00001", "and 'model-00002"]),
    (tensor_the_index_does_not_have, ["'stranger'", "not in the index"]),
    (no_index, [INDEX]),
    (cut_a_shard, ["truncated", "model-00001"]),
    (garbage(INDEX, b"{}"), [INDEX, "weight_map"]),
    (garbage(INDEX, b'{"weight_map": 1'), [INDEX, "JSON"]),
]


@pytest.mark.parametrize("damage, said", SHARD_DAMAGES, ids=damage_name)
def test_damaged_shards(
    damage: Damage, said: list[str], cli: Cli, good_sharded: Path, text: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(good_sharded, tmp_path / "model"))
    damage(model)
    sentence = refused(cli, model, tmp_path / "out", "--calibration", text)
    assert all(part in sentence for part in said), sentence


# --- shapes and families


@pytest.mark.parametrize(
    "changes, words, said",
    [
        (
            {"intermediate_size": 320},
            ("--group-size", 128),
            ["model.layers.0.mlp.down_proj has 320 inputs and 128 outputs", "group size 128"],
        ),
        ({"intermediate_size": 416}, (), ["416", "64"]),
        ({"hidden_size": 160}, (), ["self_attn.q_proj has 160 inputs", "by 64", "more linears"]),
    ],
)
def test_a_shape_the_format_cannot_hold(
    changes: dict, words: tuple, said: list[str], cli: Cli, text: Path, tmp_path: Path
) -> None:
    model = tiny_models.save(tiny_models.build("qwen3", **changes), tmp_path / "model")
    sentence = refused(cli, model, tmp_path / "out", "--calibration", text, *words)
    assert all(part in sentence for part in said), sentence


def test_a_model_without_blocks(cli: Cli, tmp_path: Path) -> None:
    source = tiny_models.save(tiny_models.build("llama", num_hidden_layers=0), tmp_path / "model")
    assert "a model without blocks" in refused(cli, source, tmp_path / "out", "--skip", "*.up_proj")


def test_another_architecture(cli: Cli, tmp_path: Path) -> None:
    settings = transformers.GPT2Config(n_embd=128, n_layer=1, n_head=2, vocab_size=4096)
    source = tiny_models.save(transformers.GPT2LMHeadModel(settings), tmp_path / "model")
    assert "'gpt2' keeps most weights of its blocks in Conv1D" in refused(cli, source, tmp_path / "out")


# --- settings


def test_a_skip_that_matches_nothing(cli: Cli, good: Path, tmp_path: Path) -> None:
    assert "--skip '*.lm_head'" in refused(cli, good, tmp_path / "out", "--skip", "*.lm_head")


def test_half_a_fused_group_skipped(cli: Cli, good: Path, tmp_path: Path) -> None:
    sentence = refused(cli, good, tmp_path / "out", "--skip", "*.gate_proj")
    assert "model.layers.0.mlp.gate_proj" in sentence and "up_proj" in sentence
    assert "--skip '*.up_proj'" in sentence  # of all blocks, not of one after another
    sentence = refused(cli, good, tmp_path / "out", "--skip", "*.1.mlp.gate_proj")
    assert "--skip 'model.layers.1.mlp.up_proj'" in sentence


def test_everything_skipped(cli: Cli, good: Path, tmp_path: Path) -> None:
    assert "skip" in refused(cli, good, tmp_path / "out", "--skip", "*")


def test_a_calibration_text_too_short(cli: Cli, good: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("def f(x):\n    return x\n" * 20)
    sentence = refused(cli, good, tmp_path / "out", "--calibration", short)
    assert "short.txt" in sentence and "4 samples of 64 need 256" in sentence and "--samples" in sentence


@pytest.mark.parametrize(
    "name, data, said",
    [
        ("gone.txt", None, "does not exist"),
        ("text.docx", b"PK", "neither .txt, .jsonl nor .parquet"),
        ("empty.txt", b"", "has 0 tokens"),
        ("empty.jsonl", b"", "has 0 tokens"),
        ("lines.jsonl", b'{"text": "a"}\n{"text": \n', "lines.jsonl, line 2"),
        ("lines.jsonl", b'{"prompt": "a"}\n', "lines.jsonl, line 1"),
        ("lines.jsonl", b"[1, 2]\n", "lines.jsonl, line 1"),
        ("lines.jsonl", b"\xff\xfe\x00", "lines.jsonl' is not UTF-16-LE: byte 2"),
        ("lines.jsonl", b'{"messages": "hello"}\n', "lines.jsonl, line 1"),
        ("chat.jsonl", b'{"messages": [{"role": "user", "content": "hello"}]}\n', "chat template"),
    ],
)
def test_a_calibration_text_that_is_none(
    name: str, data: bytes | None, said: str, cli: Cli, good: Path, tmp_path: Path
) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    assert said in refused(cli, good, tmp_path / "out", "--calibration", tmp_path / name)


def test_a_missing_calibration_text_is_refused_before_the_model_is_looked_at(
    cli: Cli, tmp_path: Path
) -> None:
    gone = tmp_path / "gone.txt"
    assert "gone.txt' does not exist" in refused(
        cli, tmp_path / "no-model", tmp_path / "out", "--calibration", gone
    )


@pytest.mark.parametrize(
    "recipe, said",
    [
        ("group_sise: 64", "group_sise"),
        ("group_size: 48", "group_size = 48"),
        ("samples: many", "samples must be int"),
        ("samples: true", "samples must be int"),
        ("skip: '*.up_proj'", "skip must be a list"),
        ("damping: 0", "damping"),
        ("- 1\n- 2", "not a mapping"),
        ("a: [", "cannot be read as YAML"),
    ],
)
def test_a_recipe_that_is_none(recipe: str, said: str, cli: Cli, good: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(recipe)
    assert said in refused(cli, good, tmp_path / "out", "--recipe", path)


# --- where to write


def test_an_output_that_exists(cli: Cli, good: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine.txt").write_text("mine")
    sentence = refused(cli, good, output)
    assert "already exists and is not empty" in sentence and "--overwrite" in sentence
    assert contents(output) == {"mine.txt": b"mine"}


@pytest.mark.parametrize("words", [(), ("--overwrite",)])
def test_a_file_for_an_output(words: tuple, cli: Cli, good: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.write_text("mine")
    assert "already exists" in refused(cli, good, output, *words)
    assert output.read_text() == "mine"


def test_an_output_under_a_file(cli: Cli, good: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    sentence = refused(cli, good, tmp_path / "file" / "out", "--calibration", text)
    assert "cannot write" in sentence
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("place", [".", "..", "quantized"])
def test_an_output_that_overlaps_the_source(place: str, cli: Cli, good: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(good, tmp_path / "a" / "model"))
    assert "overlaps the source" in refused(cli, model, model / place, "--overwrite")


@pytest.mark.parametrize("output", [".", "..", "../.."])
def test_an_output_without_a_name(
    output: str, cli: Cli, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    assert "cannot be the output" in refused(cli, good, Path(output), "--overwrite")


def test_a_failure_leaves_an_earlier_output(cli: Cli, good: Path, text: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(good, tmp_path / "model"))
    spoil("model.norm.weight", torch.nan)(model)
    output = tmp_path / "out"
    earlier = earlier_output(output)
    assert "NaN" in refused(cli, model, output, "--overwrite", "--calibration", text)
    assert contents(output) == earlier


def test_a_report_where_none_can_be_written(cli: Cli, good: Path, text: Path, tmp_path: Path) -> None:
    report = tmp_path / "missing" / "report.html"
    sentence = refused(cli, good, tmp_path / "out", "--report", report, "--calibration", text, code=2)
    assert "there is no directory" in sentence


def test_a_dense_number_that_float16_cannot_hold(cli: Cli, good: Path, text: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(good, tmp_path / "model"))
    spoil("model.layers.0.input_layernorm.weight", 1e6)(model)
    sentence = refused(cli, model, tmp_path / "out", "--dtype", "float16", "--calibration", text)
    assert "model.layers.0.input_layernorm.weight does not fit float16" in sentence


def test_a_weight_that_no_float16_scale_can_hold(cli: Cli, good: Path, text: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(good, tmp_path / "model"))
    spoil("model.layers.0.mlp.down_proj.weight", 1e8)(model)
    sentence = refused(cli, model, tmp_path / "out", "--calibration", text)
    assert "model.layers.0.mlp.down_proj" in sentence and "--skip" in sentence


def test_a_whole_process_prints_the_same(good: Path, tmp_path: Path) -> None:
    """The cases above run in one process; this is one of them as a user types it."""
    command = [
        sys.executable,
        "-m",
        "marlin_convert",
        "quantize",
        good,
        "-o",
        tmp_path / "out",
        "--skip",
        "x",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    assert [line.split(":")[0] for line in done.stderr.splitlines()][-2:] == ["Error", "Hint"]
    assert not list(tmp_path.iterdir())
