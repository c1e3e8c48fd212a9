"""Bits and groups of every matrix's own: by `auto` or a recipe, written, named, verified and repacked."""

import json
from pathlib import Path

import pytest
import tiny_models
import torch

from marlin_convert.checkpoint import manifest as manifests
from marlin_convert.checkpoint.linears import Weights
from marlin_convert.checkpoint.reader import Checkpoint
from marlin_convert.formats import mixtures

SHORT = ("--samples", 4, "--sequence-length", 64, "--device", "cpu")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A model of which 128 divides the inputs of down_proj alone."""
    directory = tmp_path_factory.mktemp("odd")
    model = tiny_models.build("qwen3", hidden_size=192, num_attention_heads=3, num_key_value_heads=3)
    tiny_models.text(directory)
    return tiny_models.save(model, directory / "source")


def stored(output: Path) -> dict[str, tuple[int, int]]:
    """Bits and group size of every packed linear, as the config says and its tensors are."""
    weights = Weights(Checkpoint.open(output))
    found = {name: weights.quantized(name) for name in weights.packed_linears()}
    fates = manifests.fates(manifests.load(output))
    for name, layer in found.items():
        layout = fates[name].layout
        assert (layout.bits, layout.group_size) == (layer.bits, layer.group_size), name
    return {name.rpartition(".")[2]: (layer.bits, layer.group_size) for name, layer in found.items()}


@pytest.mark.parametrize("format", ["marlin", "compressed-tensors", "gptq"])
def test_auto_takes_what_divides_the_inputs(format, source, cli, tmp_path) -> None:
    """gptq gets one size, as its readers without `dynamic` know no other."""
    text = ("--calibration", source.parent / "text.txt")
    output = tmp_path / "out"
    result = cli("quantize", source, "-o", output, "--format", format, *text, *SHORT)
    assert result.exit_code == 0, result.stderr
    sizes = stored(output)
    assert sizes["q_proj"] == sizes["gate_proj"] == (4, 64)
    assert sizes["down_proj"] == ((4, 64) if format == "gptq" else (4, 128))
    assert ("in groups of 128, the others of 64" in result.stdout) == (format != "gptq")
    result = cli("verify", output, "--source", source, "--text", text[1], *SHORT)
    assert result.exit_code == 0, result.stdout


RECIPE = 'format: {}\nbits: {}\noverrides:\n  "*.self_attn.*": {{bits: {}, group_size: 32}}\n'


@pytest.mark.parametrize("format, other", [("gptq", "compressed-tensors"), ("compressed-tensors", "gptq")])
@pytest.mark.parametrize("bits, of_attention", [(4, 8), (8, 4)])
def test_a_mixture_is_solved_and_repacked_exactly(
    format, other, bits, of_attention, source, cli, tmp_path
) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(format, bits, of_attention))
    text = ("--calibration", source.parent / "text.txt")
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    words = ("--recipe", tmp_path / "recipe.yaml", *text, *SHORT)
    assert cli("quantize", source, "-o", first, *words).exit_code == 0
    assert stored(first)["v_proj"] == (of_attention, 32) and stored(first)["up_proj"][0] == bits
    assert cli("verify", first, "--source", source, "--text", text[1], *SHORT).exit_code == 0
    assert cli("quantize", first, "-o", second, "--format", other).exit_code == 0
    assert cli("quantize", second, "-o", third, "--format", format).exit_code == 0
    assert (first / "model.safetensors").read_bytes() == (third / "model.safetensors").read_bytes()
    assert stored(second) == stored(first)
    # finer codes are nearer
    original, made = (Weights(Checkpoint.open(place)) for place in (source, first))
    error = {}
    for path in ("self_attn.v_proj", "mlp.up_proj"):
        name = f"model.layers.0.{path}.weight"
        weight = original.read(name).float()
        error[path] = float((made.read(name) - weight).norm() / weight.norm())
    assert (error["self_attn.v_proj"] < error["mlp.up_proj"]) == (of_attention == 8)
    assert min(error.values()) < 0.02 < max(error.values())
    said = cli("inspect", second).stdout
    assert "4 and 8 bits" in said


@pytest.mark.parametrize(
    "recipe, words, said",
    [
        ('overrides: {"*.q_proj": {bits: 8}}', ("--format", "gptq"), "engines load them as one"),
        ('overrides: {"*.zz": {bits: 8}}', (), "'*.zz' matches no linear"),
        ("bits: 8", (), "marlin holds 4 bits, not 8"),
        ("bits: 8", ("--sparsity", "2:4"), "not to 8"),
        ('overrides: {"*": {group_size: 128}}', (), "needs inputs divisible by the group size 128, has 192"),
    ],
)
def test_what_no_engine_or_format_takes_is_refused(recipe, words, said, source, cli, tmp_path) -> None:
    (tmp_path / "recipe.yaml").write_text(recipe)
    result = cli("quantize", source, "-o", tmp_path / "out", "--recipe", tmp_path / "recipe.yaml", *words)
    assert result.exit_code == 1 and said in result.stderr and "Hint: " in result.stderr, result.stderr
    assert list(tmp_path.iterdir()) == [tmp_path / "recipe.yaml"]


def test_the_config_names_a_mixture_once_for_all_blocks(source, cli, tmp_path) -> None:
    text = ("--calibration", source.parent / "text.txt")
    assert cli("quantize", source, "-o", tmp_path / "out", *text, *SHORT).exit_code == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["group_size"] == 64
    assert list(config["dynamic"]) == [r"+:(.*\.)?layers\.\d+\.mlp\.down_proj$"]


def test_the_config_names_what_engines_fuse() -> None:
    """vLLM asks for the fused linear by its name, of attention, of the MLP and of Qwen3.5's mixer."""
    parts = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    parts += ("linear_attn.in_proj_qkv", "linear_attn.in_proj_z")
    fused = mixtures.with_fused({f"model.layers.0.{part}": (8, 64) for part in parts})
    found = {name.removeprefix("model.layers.0.") for name in fused}
    assert found - set(parts) == {"self_attn.qkv_proj", "mlp.gate_up_proj", "linear_attn.in_proj_qkvz"}


def test_eight_bits_are_all_but_exact(source, cli, tmp_path) -> None:
    text = ("--calibration", source.parent / "text.txt")
    output = tmp_path / "out"
    words = ("--bits", 8, "--format", "compressed-tensors", *text, *SHORT)
    assert cli("quantize", source, "-o", output, *words).exit_code == 0
    original, made = (Weights(Checkpoint.open(place)) for place in (source, output))
    for name in made.packed_linears():
        weight = original.read(f"{name}.weight").float()
        assert torch.linalg.norm(made.read(f"{name}.weight") - weight) < 0.01 * torch.linalg.norm(weight)
