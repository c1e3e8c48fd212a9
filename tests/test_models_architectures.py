"""Every family of the table, as a tiny random model: nothing of a block is missed, the logits are right."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import rows
import tiny_models
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from marlin_convert.checkpoint.linears import Weights
from marlin_convert.checkpoint.reader import Checkpoint
from marlin_convert.commands import quantize as story
from marlin_convert.errors import SourceError
from marlin_convert.hub import Source
from marlin_convert.models.blocks import BlockModel
from marlin_convert.models.hidden import HiddenStates
from marlin_convert.models.tree import check_type
from marlin_convert.recipe import Recipe

CPU = torch.device("cpu")

CASES = {family: (family, {}) for family in tiny_models.FAMILIES} | {
    "qwen2-narrow": ("qwen2", tiny_models.NARROW),
    "gemma3_text-narrow": ("gemma3_text", tiny_models.NARROW),
}


def dequantize_marlin(b: Tensor, s: Tensor) -> Tensor:
    """The weight (n, k) of a MARLIN linear, by the index formulas of the format and nothing of ours."""
    k, n = b.shape[0] * 16, b.shape[1] // 2
    row, column, field = torch.meshgrid(
        torch.arange(k // 16), torch.arange(2 * n), torch.arange(8), indexing="ij"
    )
    codes = (b.long() & 0xFFFFFFFF)[:, :, None] >> (4 * field) & 15
    lane, j = column % 128 // 4, column % 4
    from_k = 16 * row + 2 * (lane % 4) + (field >> 2) + 8 * (field & 1)
    from_n = 64 * (column // 128) + 16 * j + lane // 4 + 8 * ((field >> 1) & 1)
    weight = torch.zeros(k, n, dtype=torch.int64)
    weight[from_k, from_n] = codes
    out = torch.arange(n)
    if s.shape[0] > 1:
        source = 64 * (out // 64) + out % 64 // 8 + 8 * (out % 8)
    else:
        source = 32 * (out // 32) + 2 * (out % 32 // 8) + 8 * (out % 8 // 2) + out % 2
    scales = torch.zeros(s.shape)
    scales[:, source] = s.float()
    return ((weight - 8) * scales.repeat_interleave(k // s.shape[0], 0)).T.contiguous()


def convert(source: Path, output: Path, **settings: object) -> dict:
    """Quantize with 4 x 64 tokens of calibration; the manifest."""
    text = tiny_models.text(output.parent)
    recipe = Recipe(samples=4, sequence_length=64, calibration=str(text)).changed(settings)
    job = story.Job(Source(source, source.name, None), output, recipe, CPU)
    return story.quantize(job).manifest


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    family, changes = CASES[request.param]
    directory = tmp_path_factory.mktemp(request.param)
    model = tiny_models.build(family, **changes)
    source = tiny_models.save(model, directory / "source")
    output = directory / "output"
    manifest = convert(source, output)
    ids = torch.randint(4096, (3, 64), generator=torch.Generator().manual_seed(1))
    return SimpleNamespace(
        family=family, model=model, source=source, output=output, manifest=manifest, ids=ids
    )


def our_logits(directory: Path, ids: Tensor) -> Tensor:
    """Logits from the blocks run one at a time over a dense or a packed checkpoint."""
    model = BlockModel(Weights(Checkpoint.open(directory)), CPU, fast=False)
    hidden = HiddenStates(model, ids)
    for number in range(len(model)):
        hidden.advance(model.load(number), number)
        model.unload(number)
    return torch.cat([model.logits(batch, hidden.state(i)) for i, batch in enumerate(hidden.batches)])


def block_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Every nn.Linear of the blocks, found on the module tree of transformers."""
    return {
        f"model.layers.{name}": module
        for name, module in model.model.layers.named_modules()
        if isinstance(module, nn.Linear)
    }


def test_the_dense_model_run_block_by_block_gives_the_logits_of_transformers(case: SimpleNamespace) -> None:
    with torch.no_grad():
        expected = case.model(case.ids, use_cache=False).logits
    torch.testing.assert_close(our_logits(case.source, case.ids), expected, rtol=1e-4, atol=1e-4)


def test_every_linear_of_every_block_is_packed_or_named(case: SimpleNamespace) -> None:
    packed = {row["name"] for row in rows.worked_on(case.manifest)}
    dense = set(rows.dense(case.manifest))
    assert packed | dense == set(block_linears(case.model))
    assert not packed & dense
    stored = load_file(case.output / "model.safetensors")
    for name, linear in block_linears(case.model).items():
        assert (f"{name}.B" in stored) == (name in packed)
        assert (f"{name}.weight" in stored) == (name in dense)
        assert (f"{name}.bias" in stored) == (linear.bias is not None)
    assert not dense


def test_the_checkpoint_read_independently_gives_the_same_logits(case: SimpleNamespace) -> None:
    stored = load_file(case.output / "model.safetensors")
    state = {name: tensor for name, tensor in stored.items() if not name.endswith((".B", ".s"))} | {
        name.removesuffix(".B") + ".weight": dequantize_marlin(tensor, stored[name.removesuffix("B") + "s"])
        for name, tensor in stored.items()
        if name.endswith(".B")
    }
    quantized = AutoModelForCausalLM.from_config(case.model.config).eval()
    lacking, foreign = quantized.load_state_dict(state, strict=False)
    assert not foreign
    assert not [name for name in lacking if name != "lm_head.weight" or "lm_head.weight" in stored]
    quantized.tie_weights()
    with torch.no_grad():
        logits = quantized(case.ids, use_cache=False).logits
        original = case.model(case.ids, use_cache=False).logits
    assert logits.isfinite().all()
    torch.testing.assert_close(our_logits(case.output, case.ids), logits, rtol=1e-4, atol=1e-4)
    # quantized, and still the same model
    assert not torch.allclose(logits, original, atol=1e-4)
    similarity = nn.functional.cosine_similarity(logits.flatten(0, 1), original.flatten(0, 1), dim=-1)
    assert similarity.mean() > 0.7


def test_every_weight_of_a_narrow_model_can_be_kept(tmp_path: Path) -> None:
    """Widths that are multiples of 64 as outputs, of 128 as inputs."""
    source = tiny_models.save(tiny_models.build("qwen2", **tiny_models.NARROW), tmp_path / "source")
    manifest = convert(source, tmp_path / "output", group_size=-1)
    assert {(row["k"], row["n"]) for row in rows.worked_on(manifest)} == {
        (384, 128), (384, 64), (128, 384), (384, 640), (640, 384)
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_16_bit_model_gives_the_logits_of_transformers(dtype: torch.dtype, tmp_path: Path) -> None:
    source = tiny_models.save(tiny_models.build("llama", dtype), tmp_path / "source")
    ids = torch.randint(4096, (3, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = tiny_models.build("llama", dtype).float()(ids, use_cache=False).logits
    ours = our_logits(source, ids)
    difference = (ours - expected).norm() / expected.norm()
    assert difference < (0.001 if dtype == torch.float16 else 0.01)  # hidden states rounded between blocks


@pytest.mark.parametrize("config", [{"model_type": "llama9"}, {}, {"model_type": ["qwen3"]}])
def test_an_unknown_type_is_refused_by_name(config: dict) -> None:
    with pytest.raises(SourceError, match=r"is not a type of model that transformers .* knows") as refused:
        check_type(config)
    assert repr(config.get("model_type")) in str(refused.value)
    assert "pip install -U transformers" in (refused.value.hint or "")


def test_what_is_no_language_model_is_refused_by_name() -> None:
    with pytest.raises(SourceError, match="'vit' is no language model"):
        check_type({"model_type": "vit"})
