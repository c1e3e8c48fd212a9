"""inspect: what it says of checkpoints, and that headers are all it reads."""

import json
import os
import shutil
import subprocess
import sys
import time

import packed_models
import pytest

from marlin_convert.checkpoint.manifest import MANIFEST, VERIFIED

PYTHON = [sys.executable, "-m", "marlin_convert"]


@pytest.mark.parametrize("format", ["marlin", "marlin-24", "gptq", "compressed-tensors"])
def test_contents(format, quantized, cli):
    found = json.loads(cli("inspect", quantized(format), "--json").stdout)
    assert (found["name"], found["model_type"], found["format"]) == (format, "llama", format)
    assert (found["bits"], found["group_sizes"], found["packed"], found["dense"]) == ([4], [128], 28, {})
    assert (found["sparsity"], found["unpruned"]) == ("2:4" if format == "marlin-24" else None, {})
    manifest = json.loads((quantized(format) / MANIFEST).read_text())
    assert found["bits_per_weight"] == manifest["bits_per_weight"]
    for key in ("tool", "source", "recipe", "calibration"):
        assert found[key] == manifest[key]
    assert found["bytes"] == sum(path.stat().st_size for path in quantized(format).iterdir())
    assert found["shards"] == 1 and found["verified"] is None


def test_one_scale_a_column_and_linears_left_dense(tinypy, tmp_path, cli):
    words = ("--format", "gptq", "--group-size", -1, "--skip", "*.3.mlp.down_proj", "-q")
    text = ("--samples", 1, "--sequence-length", 32)
    assert cli("quantize", tinypy, "-o", tmp_path / "out", *words, *text).exit_code == 0
    found = json.loads(cli("inspect", tmp_path / "out", "--json").stdout)
    assert (found["packed"], found["group_sizes"]) == (27, [-1])
    assert found["dense"] == {"model.layers.3.mlp.down_proj": "skipped by '*.3.mlp.down_proj'"}
    lines = cli("inspect", tmp_path / "out").stdout.splitlines()
    assert any("one per column" in line for line in lines)
    assert "  model.layers.3.mlp.down_proj: skipped by '*.3.mlp.down_proj'" in lines
    assert lines[-1] == f"Next: marlin-convert verify {tmp_path / 'out'}"


def test_bits_of_marlin_24(quantized, tmp_path, cli):
    found = json.loads(cli("inspect", quantized("marlin-24"), "--json").stdout)
    assert found["bits_per_weight"] == 3.125
    lines = cli("inspect", quantized("marlin-24")).stdout.splitlines()
    assert "format       marlin-24, 4 bits, group size 128" in lines
    assert "2:4          28 of 28 linears" in lines


@pytest.mark.parametrize("source", ["marlin-24", "marlin-24-channel", "marlin-24-compressed"])
def test_marlin_24_of_peers(source, tmp_path, cli):
    packed_models.make(source, tmp_path / "peer")
    found = json.loads(cli("inspect", tmp_path / "peer", "--json").stdout)
    size = packed_models.SOURCES[source][0]["group_size"]
    assert (found["format"], found["packed"], found["sparsity"]) == ("marlin-24", 14, "2:4")
    # 128 inputs make one group of 128
    assert found["group_sizes"] == ([-1] if size == -1 else [-1, 128])


@pytest.mark.parametrize("format", ["marlin-24", "gptq"])
def test_a_part_that_is_sparse(format, quantized, tmp_path, cli):
    words = ("--format", format, "--unpruned", "*.3.mlp.*", "-q")
    assert cli("quantize", quantized("marlin-24"), "-o", tmp_path / "out", *words).exit_code == 0
    found = json.loads(cli("inspect", tmp_path / "out", "--json").stdout)
    names = [f"model.layers.3.mlp.{name}_proj" for name in ("down", "gate", "up")]
    assert (found["format"], found["packed"], found["sparsity"]) == (format, 28, "2:4")
    assert found["unpruned"] == dict.fromkeys(names, "unpruned by '*.3.mlp.*'")
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert found["bits_per_weight"] == manifest["bits_per_weight"]
    lines = cli("inspect", tmp_path / "out").stdout.splitlines()
    assert "2:4          25 of 28 linears" + ", the others are marlin" * (format == "marlin-24") in lines
    assert f"  {names[0]}: unpruned by '*.3.mlp.*'" in lines


def test_what_a_peer_wrote(quantized, tmp_path, cli):
    directory = shutil.copytree(quantized("compressed-tensors"), tmp_path / "peer")
    (directory / MANIFEST).unlink()
    found = json.loads(cli("inspect", directory, "--json").stdout)
    assert (found["format"], found["packed"], found["tool"]) == ("compressed-tensors", 28, None)


def test_a_dense_model(tinypy, cli):
    found = json.loads(cli("inspect", tinypy, "--json").stdout)
    assert (found["format"], found["packed"], found["bits_per_weight"]) == (None, 0, None)
    assert len(found["dense"]) == 28 and "model.embed_tokens" not in found["dense"]
    assert "... 18 more with -v" in cli("inspect", tinypy).stdout
    assert "  model.layers.3.mlp.down_proj" in cli("inspect", tinypy, "-v").stdout.splitlines()


def test_the_last_verification(quantized, tmp_path, cli):
    directory = shutil.copytree(quantized("marlin"), tmp_path / "out")
    assert "verified     not yet" in cli("inspect", directory).stdout
    cli("verify", directory, "--checks", "files,layout", "-q")
    assert "verified     not yet" in cli("inspect", directory).stdout  # a part is no verification
    cli("verify", directory, "-q")
    expected = "verified     passed (files pass, layout pass, sparsity skipped, numbers pass, kernel skipped)"
    assert cli("inspect", directory).stdout.splitlines()[-1] == expected
    with (directory / MANIFEST).open("a") as file:
        file.write("\n")
    assert "verified     not since the manifest changed" in cli("inspect", directory).stdout


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", MANIFEST, VERIFIED])
def test_damage_is_said(name, quantized, tmp_path, cli):
    directory = shutil.copytree(quantized("marlin"), tmp_path / "out")
    (directory / name).write_text("[]")
    result = cli("inspect", directory)
    assert result.exit_code == 1 and result.stderr.startswith("Error: ") and result.stdout == ""


def test_a_terminal_cannot_be_attacked(quantized, tmp_path, cli):
    directory = shutil.copytree(quantized("marlin"), tmp_path / "out")
    manifest = json.loads((directory / MANIFEST).read_text())
    rows = [row | {"name": "\x1b[2J", "rounded_to_nearest": True} for row in manifest["matrices"]]
    (directory / MANIFEST).write_text(json.dumps(manifest | {"tool": "a\nb", "matrices": rows}))
    inspected, verified = cli("inspect", directory).stdout, cli("verify", directory).stdout
    assert "a\\nb" in inspected
    for text in (inspected, verified):
        assert "\x1b" not in text and "rounded to nearest: \\x1b[2J" in text


def write_headers(directory, blocks, shards):
    """The headers of a Llama-3-70B in marlin, before files that are all hole."""
    shapes = {
        "self_attn.q_proj": (8192, 8192),
        "self_attn.k_proj": (8192, 1024),
        "self_attn.v_proj": (8192, 1024),
        "self_attn.o_proj": (8192, 8192),
        "mlp.gate_proj": (8192, 28672),
        "mlp.up_proj": (8192, 28672),
        "mlp.down_proj": (28672, 8192),
    }
    tensors = {}
    for block in range(blocks):
        for path, (k, n) in shapes.items():
            tensors[f"model.layers.{block}.{path}.B"] = ("I32", [k // 16, 2 * n], k * n // 2)
            tensors[f"model.layers.{block}.{path}.s"] = ("F16", [k // 128, n], k * n // 64)
        for path in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{block}.{path}.weight"] = ("BF16", [8192], 2 * 8192)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = ("BF16", [128256, 8192], 2 * 128256 * 8192)
    names = list(tensors)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        header, end = {}, 0
        for name in names[shard::shards]:
            dtype, shape, nbytes = tensors[name]
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + nbytes]}
            end += nbytes
            weight_map[name] = file
        text = json.dumps(header).encode()
        with (directory / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            out.truncate(8 + len(text) + end)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = {"quant_method": "marlin", "bits": 4, "group_size": 128}
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": config}))


def test_70b_in_under_a_second(tmp_path):
    write_headers(tmp_path, blocks=80, shards=30)
    seconds = []
    for _ in range(3):
        started = time.monotonic()
        result = subprocess.run([*PYTHON, "inspect", tmp_path, "--json"], capture_output=True, check=True)
        seconds.append(time.monotonic() - started)
    found = json.loads(result.stdout)
    assert (found["packed"], found["group_sizes"], found["bits_per_weight"]) == (560, [128], 4.125)
    assert found["shards"] == 30 and found["bytes"] > 39e9
    assert min(seconds) < 1, seconds


def test_torch_is_not_imported(quantized):
    program = (
        "import sys; from marlin_convert.cli.main import main\n"
        "try: main()\nfinally: assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    words = [sys.executable, "-c", program, "inspect", str(quantized("gptq"))]
    result = subprocess.run(words, capture_output=True, text=True, env=dict(os.environ), check=False)
    assert result.returncode == 0, result.stderr
