"""Mixtures of experts: taken apart, calibrated one by one, written one by one, and named where in doubt."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diverse_models
import pytest
import rows
import tiny_models
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from marlin_convert import solve
from marlin_convert.checkpoint.linears import Weights
from marlin_convert.checkpoint.reader import Checkpoint
from marlin_convert.models import routing
from marlin_convert.models.experts import experts_of, routed
from marlin_convert.models.tree import module_tree

SHARD = "model.safetensors"
SMALL = ("--samples", 8, "--sequence-length", 64)
Cli = Callable[..., Result]


@pytest.fixture
def source(tmp_path: Path) -> Callable[..., Path]:
    def make(model_type: str, *, stacked: bool = False, **changes: Any) -> Path:
        model = diverse_models.build(model_type, vocab_size=4096, **changes)
        directory = tiny_models.save(model, tmp_path / model_type)
        if stacked:
            model.save_pretrained(directory, save_original_format=False)
        return directory

    return make


def experts_by_hand(model: torch.nn.Module) -> dict[str, Tensor]:
    """Every expert's weights as the stacked tensors of transformers' modules have them."""
    found = {}
    for path, module in model.named_modules():
        if hasattr(module, "is_transposed"):
            both, down = module.gate_up_proj, module.down_proj
            if module.is_transposed:
                both, down = both.mT, down.mT
            half = both.shape[1] // 2
            for i in range(len(both)):
                gate, up = (
                    (both[i, :half], both[i, half:])
                    if module.is_concatenated
                    else (both[i, 0::2], both[i, 1::2])
                )
                found |= {f"{path}.{i}.{name}": x for name, x in zip("gud", (gate, up, down[i]), strict=True)}
    return found


@pytest.mark.parametrize("stacked", [False, True], ids=["a tensor an expert", "stacked"])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "granitemoe"])
def test_every_expert_gets_its_own_weights(model_type: str, stacked: bool, source) -> None:
    directory = source(model_type, stacked=stacked)
    weights = Weights(Checkpoint.open(directory))
    model = module_tree(weights)
    whole = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    expected = experts_by_hand(whole)
    for path, experts in experts_of(model):
        for number in range(experts.count):
            for letter, role in zip("gud", experts.roles, strict=True):
                read = weights.read(f"{path}.{number}.{role}.weight").float()
                assert torch.equal(read, expected.pop(f"{path}.{number}.{letter}"))
    assert not expected


def test_experts_are_written_one_by_one_under_the_names_that_engines_know(source, cli: Cli, tmp_path) -> None:
    for model_type, inside in (("mixtral", "block_sparse_moe"), ("qwen3_moe", "mlp"), ("granitemoe", None)):
        output = tmp_path / f"{model_type}-out"
        done = cli("quantize", source(model_type), "-o", output, "--format", "gptq", *SMALL)
        assert done.exit_code == 0, done.stderr
        names = {name for name in load_file(output / SHARD) if ".experts." in name}
        last = "w2" if model_type == "mixtral" else "down_proj"
        inside = inside or "block_sparse_moe"
        assert {
            f"model.layers.{i}.{inside}.experts.{e}.{last}.qweight" for i in range(4) for e in range(4)
        } <= names
        assert len(names) == 4 * 4 * 3 * 4  # layers, experts, linears, tensors


def test_the_manifest_has_the_tokens_of_every_expert(source, cli: Cli, tmp_path) -> None:
    output = tmp_path / "out"
    assert cli("quantize", source("qwen3_moe"), "-o", output, "--format", "gptq", *SMALL).exit_code == 0
    manifest = json.loads((output / "marlin_convert.json").read_text())
    of_layer: dict[str, int] = {}
    for row in rows.worked_on(manifest):
        assert ("tokens" in row) == (".experts." in row["name"])
        if row["name"].endswith("down_proj"):
            layer = row["name"].partition(".experts.")[0]
            of_layer[layer] = of_layer.get(layer, 0) + row["tokens"]
    assert set(of_layer.values()) == {8 * 64 * 2}  # every token goes to two


@pytest.fixture
def lonely(source) -> Path:
    """A model in which no token goes to the last expert of a layer, and all go to the first."""
    directory = source("qwen3_moe")
    tensors = load_file(directory / SHARD)
    name = "model.layers.1.mlp.gate.weight"
    router = torch.zeros_like(tensors[name])
    tensors[name] = router  # equal shares: top-k takes the first
    save_file(tensors, directory / SHARD, {"format": "pt"})
    return directory


def test_an_expert_that_no_token_goes_to_is_calibrated_and_named(lonely: Path, cli: Cli, tmp_path) -> None:
    output = tmp_path / "out"
    done = cli("quantize", lonely, "-o", output, "--format", "gptq", *SMALL)
    assert done.exit_code == 0, done.stderr
    manifest = json.loads((output / "marlin_convert.json").read_text())
    none = [row["name"] for row in rows.worked_on(manifest) if row.get("tokens") == 0]
    assert none and all(name.startswith("model.layers.1.mlp.experts.") for name in none)
    assert not any(row.get("rounded_to_nearest") for row in manifest["matrices"])
    assert f"none to {len(none) // 3}; they were calibrated on others too" in done.stdout
    assert cli("verify", output).exit_code == 0
    strict = cli("verify", output, "--strict")
    assert strict.exit_code == 3 and f"no token went to {none[0]}" in strict.stdout


def test_tokens_are_divided_as_transformers_walks_them() -> None:
    """By choice and then by token; what is no expert's number goes nowhere."""
    index = torch.randint(0, 6, (50, 3), generator=torch.Generator().manual_seed(1))
    for number, (tokens, choices) in enumerate(routed(index, 5)):
        where = torch.where(torch.nn.functional.one_hot(index, 6).permute(2, 1, 0)[number])
        assert torch.equal(choices, where[0]) and torch.equal(tokens, where[1])
    assert [len(one) for one, _ in routed(torch.zeros(4, 1, dtype=torch.long), 3)] == [4, 0, 0]


def test_others_are_evenly_spaced_and_as_many_as_are_missing() -> None:
    x = torch.arange(100.0)[:, None]
    index = torch.zeros(100, 1, dtype=torch.long)
    index[7] = 1
    entering = [
        routing.Entering(x[part], routed(index[part], 3), index[part])
        for part in (slice(40), slice(40, None))
    ]
    own, others = routing.chosen(entering, 1, 11)
    assert routing.gathered(entering, own).flatten().tolist() == [7.0] and routing.weight(own) == 1.0
    assert routing.gathered(entering, others).flatten().tolist() == [10.0 * i for i in range(10)]
    assert routing.weight(others) == routing.WEIGHT**0.5
    assert len(list(routing.chosen(entering, 0, 50))) == 1
    (everyone,) = routing.chosen(entering, 2, 1000)
    assert len(routing.gathered(entering, everyone)) == 100


def test_what_is_left_dense_of_a_layer_is_left_dense_of_all_its_experts(source, cli: Cli, tmp_path) -> None:
    model, output = source("qwen3_moe"), tmp_path / "out"
    done = cli("quantize", model, "-o", output, "--format", "gptq", "--skip", "*.experts.3.*", *SMALL)
    assert done.exit_code == 1 and "engines load them as one" in done.stderr and not output.exists()
    done = cli("quantize", model, "-o", output, "--format", "gptq", "--skip", "*.experts.*", *SMALL)
    assert done.exit_code == 0, done.stderr
    before, after = load_file(model / SHARD), load_file(output / SHARD)
    dense = [name for name in before if ".experts." in name]
    assert dense and all(torch.equal(before[name], after[name]) for name in dense)
    assert done.stdout.count(".experts.") < 10  # not a line an expert


def test_only_experts(source, cli: Cli, tmp_path) -> None:
    model, output = source("qwen3_moe"), tmp_path / "out"
    done = cli("quantize", model, "-o", output, "--format", "gptq", "--only", "experts", *SMALL)
    assert done.exit_code == 0, done.stderr
    matrices = json.loads((output / "marlin_convert.json").read_text())["matrices"]
    assert {row["format"] == "gptq" for row in matrices if ".experts." in row["name"]} == {True}
    assert {row.get("reason") for row in matrices if ".experts." not in row["name"]} == {"not among --only"}
    assert cli("verify", output).exit_code == 0
    dense = diverse_models.build("olmo3", vocab_size=4096)
    done = cli(
        "quantize", tiny_models.save(dense, tmp_path / "olmo"), "-o", tmp_path / "no", "--only", "experts"
    )
    assert done.exit_code == 1 and "--only 'experts' matches no linear" in done.stderr
    done = cli("quantize", output, "-o", tmp_path / "no", "--format", "marlin", "--only", "*.self_attn.*")
    assert done.exit_code == 1 and "--only '*.self_attn.*' leaves out" in done.stderr


def test_overrides_know_experts_too(source, cli: Cli, tmp_path) -> None:
    """A word that --only takes is no pattern that matches and then does nothing."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("format: gptq\noverrides: {experts: {bits: 8}}\n")
    done = cli(
        "quantize", source("qwen3_moe"), "-o", tmp_path / "out", "--recipe", recipe, "--dry-run", "--json"
    )
    assert done.exit_code == 0, done.stderr
    bits = {(".experts." in row["name"], row["bits"]) for row in json.loads(done.stdout)["matrices"]}
    assert bits == {(True, 8), (False, 4)}


def test_one_group_size_for_all_experts_of_a_layer(source, cli: Cli, tmp_path) -> None:
    """Engines have one for gate, up and down; 192 inputs of down want 64."""
    model = source("qwen3_moe", moe_intermediate_size=192)
    done = cli(
        "quantize", model, "-o", tmp_path / "out", "--format", "compressed-tensors", "--dry-run", "--json"
    )
    assert done.exit_code == 0, done.stderr
    sizes: dict[bool, set[int]] = {}
    for row in json.loads(done.stdout)["matrices"]:
        sizes.setdefault(".experts." in row["name"], set()).add(row["group_size"])
    assert sizes == {True: {64}, False: {128}}


def test_a_stopped_run_goes_on_to_the_same_bytes(source, cli: Cli, tmp_path, monkeypatch) -> None:
    model, whole, output = source("mixtral"), tmp_path / "whole", tmp_path / "out"
    words = ("quantize", model, "--format", "gptq", *SMALL)
    assert cli(*words, "-o", whole).exit_code == 0
    block = solve.Solve.block

    def stopped(self: solve.Solve, number: int) -> Any:
        if number == 2:
            raise KeyboardInterrupt
        return block(self, number)

    monkeypatch.setattr(solve.Solve, "block", stopped)
    assert cli(*words, "-o", output).exit_code == 130 and not output.exists()
    monkeypatch.undo()
    assert cli(*words, "-o", output, "--resume").exit_code == 0
    assert (output / SHARD).read_bytes() == (whole / SHARD).read_bytes()
    manifests = [json.loads((path / "marlin_convert.json").read_text()) for path in (whole, output)]
    assert manifests[0]["matrices"] == manifests[1]["matrices"]


def test_repacks_are_exact(source, cli: Cli, tmp_path) -> None:
    made = tmp_path / "gptq"
    assert cli("quantize", source("mixtral"), "-o", made, "--format", "gptq", *SMALL).exit_code == 0
    for format, before, after in (
        ("compressed-tensors", made, "ct"),
        ("marlin", "ct", "marlin"),
        ("gptq", "marlin", "again"),
    ):
        done = cli("quantize", tmp_path / before, "-o", tmp_path / after, "--format", format)
        assert done.exit_code == 0, done.stderr
    first, last = load_file(made / SHARD), load_file(tmp_path / "again" / SHARD)
    assert first.keys() == last.keys() and all(torch.equal(first[name], last[name]) for name in first)
    manifests = [
        json.loads((path / "marlin_convert.json").read_text()) for path in (made, tmp_path / "again")
    ]
    tokens = [{row["name"]: row.get("tokens") for row in one["matrices"]} for one in manifests]
    assert tokens[0] == tokens[1]


def test_two_experts_that_change_places_fail_verify(source, cli: Cli, tmp_path) -> None:
    model, output = source("qwen3_moe"), tmp_path / "out"
    assert cli("quantize", model, "-o", output, "--format", "compressed-tensors", *SMALL).exit_code == 0
    assert cli("verify", output, "--source", model).exit_code == 0
    (output / "marlin_convert.json").unlink()  # whose sha256 tells too
    tensors = load_file(output / SHARD)
    one, other = (f"model.layers.2.mlp.experts.{i}.down_proj." for i in (0, 3))
    swapped = {
        name.replace(one, other) if one in name else name.replace(other, one): tensor
        for name, tensor in tensors.items()
    }
    save_file(swapped, output / SHARD, {"format": "pt"})
    done = cli("verify", output, "--source", model, "--samples", 2)
    assert done.exit_code == 3 and f"{one[:-1]} is 1.4" in done.stdout


def test_high_effort_is_refused(source, cli: Cli, tmp_path) -> None:
    done = cli("quantize", source("mixtral"), "-o", tmp_path / "out", "--effort", "high", *SMALL)
    assert done.exit_code == 1 and "which expert a token is to go to" in done.stderr


def without(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


GATE = "model.layers.1.mlp.experts.2.gate_proj.weight"


@pytest.mark.parametrize(
    "change, config, said",
    [
        (without(GATE), {}, f"{GATE} of the architecture not in"),
        (lambda x: x | {GATE: torch.zeros(64, 128)}, {}, f"{GATE} has shape (64, 128), its config"),
        (lambda x: x, {"num_local_experts": 8}, "of the architecture not in"),
        (lambda x: x, {"num_local_experts": 2}, "mlp.gate.weight has shape (4, 128), its config.json"),
        (lambda x: x, {"num_experts_per_tok": 9}, "does not run on the ids of a text alone"),
        (lambda x: x, {"num_experts_per_tok": None}, "config.json"),
    ],
)  # fmt: skip
def test_a_mixture_that_is_not_what_its_config_says(
    change, config: dict[str, Any], said: str, source, cli: Cli, tmp_path
) -> None:
    directory = source("qwen3_moe")
    save_file(change(load_file(directory / SHARD)), directory / SHARD, {"format": "pt"})
    settings = json.loads((directory / "config.json").read_text()) | config
    (directory / "config.json").write_text(json.dumps(settings))
    done = cli("quantize", directory, "-o", tmp_path / "out", "--format", "gptq", *SMALL)
    assert done.exit_code == 1 and said in done.stderr, done.stderr
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("format", ["marlin", "marlin-24"])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_transformers_loads_experts_in_our_layouts(
    model_type: str, format: str, source, cli: Cli, tmp_path
) -> None:
    """The very logits that the dequantized weights give, and the same bytes when it is saved again."""
    import marlin_convert  # noqa: F401  (registers the layouts)

    output, plain = tmp_path / "out", tmp_path / "plain"
    sparse = ["--sparsity", "2:4"] if format == "marlin-24" else []
    done = cli("quantize", source(model_type), "-o", output, "--format", format, *sparse, *SMALL)
    assert done.exit_code == 0, done.stderr
    assert "load in transformers with marlin-convert, not in vLLM" in done.stdout
    model = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    weights = Weights(Checkpoint.open(output))
    reference = diverse_models.build(model_type, vocab_size=4096)
    state = reference.state_dict()
    module_tree(weights)  # names
    for name in weights.packed_linears():
        if ".experts." not in name:
            state[f"{name}.weight"] = weights.read(f"{name}.weight")
    for path, module in reference.named_modules():
        if hasattr(module, "is_transposed"):
            for i in range(len(module.down_proj)):
                roles = (
                    ("w1", "w3", "w2") if model_type == "mixtral" else ("gate_proj", "up_proj", "down_proj")
                )
                gate, up, down = (weights.read(f"{path}.{i}.{role}.weight") for role in roles)
                both = (
                    torch.cat([gate, up])
                    if module.is_concatenated
                    else torch.stack([gate, up], 1).flatten(0, 1)
                )
                state[f"{path}.gate_up_proj"][i] = both.T if module.is_transposed else both
                state[f"{path}.down_proj"][i] = down.T if module.is_transposed else down
    for name in state:
        if name in weights and not weights.is_packed(name.removesuffix(".weight")):
            state[name] = weights.read(name)
    reference.load_state_dict({name: x.float() for name, x in state.items()})
    ids = torch.randint(5, 4000, (2, 24), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, reference(ids).logits, atol=2e-3, rtol=1e-3)
    model.save_pretrained(plain)
    before, after = load_file(output / SHARD), load_file(plain / SHARD)
    assert {name for name in before if ".experts." in name} == {name for name in after if ".experts." in name}
    assert all(
        torch.equal(before[name], after[name]) for name in before if name.endswith((".B", ".B_24", ".s"))
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3"])
def test_experts_of_a_loaded_model_are_multiplied_at_once(
    model_type: str, source, cli: Cli, tmp_path
) -> None:
    """The logits of the CPU, from one kernel for all experts; what is saved then are the same bytes."""
    import marlin_convert  # noqa: F401  (registers the layouts)
    from marlin_convert.integrations import transformers_experts as integration

    output, plain = tmp_path / "out", tmp_path / "plain"
    done = cli("quantize", source(model_type), "-o", output, *SMALL, "--device", "cpu")
    assert done.exit_code == 0, done.stderr
    ids = torch.randint(5, 4000, (3, 24), generator=torch.Generator().manual_seed(3))
    model = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float16)
    with torch.no_grad():
        expected = model.float()(ids).logits
        model = model.half().cuda()
        found = model(ids.cuda()).logits.cpu().float()
        layers = [one for _, one in experts_of(model)]
        assert layers and all(one in integration._grouped for one in layers)
        assert (found - expected).norm() / expected.norm() < 0.01
        assert torch.equal(model(ids.cuda()).logits.cpu().float(), found)
        model.cpu().cuda()  # to other memory
        assert torch.equal(model(ids.cuda()).logits.cpu().float(), found)
    model.save_pretrained(plain)
    before, after = load_file(output / SHARD), load_file(plain / SHARD)
    packed = [name for name in before if name.endswith((".B", ".s"))]
    assert packed and all(torch.equal(before[name], after[name]) for name in packed)
