"""Mixtures of experts: taken apart, calibrated one by one, written one by one, and named where in doubt."""

import json
import re
from collections.abc import Callable, Sequence
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
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, Qwen3MoeConfig

from marlin_convert import chunks, solve
from marlin_convert.checkpoint.linears import Weights
from marlin_convert.checkpoint.reader import Checkpoint
from marlin_convert.checks.divergence import log_probabilities
from marlin_convert.codes import pack, pack_all, pack_as_one
from marlin_convert.commands.quantize import Job, plan_job
from marlin_convert.errors import FormatError
from marlin_convert.hub import Source
from marlin_convert.models import divided, hidden, routing
from marlin_convert.models import experts as module_of_experts
from marlin_convert.models.blocks import BlockModel
from marlin_convert.models.experts import experts_of, routed
from marlin_convert.models.hidden import HiddenStates
from marlin_convert.models.stages import BlockWalk
from marlin_convert.models.structure import Stage
from marlin_convert.models.tree import module_tree
from marlin_convert.plan import make_plan
from marlin_convert.quantized import QuantizedLinear, dequantized_as_one
from marlin_convert.ranks import Ranks
from marlin_convert.recipe import Recipe
from marlin_convert.solvers import gptq

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
        if hasattr(module, "gate_up_proj") and module.gate_up_proj.dim() == 3:
            both, down = module.gate_up_proj, module.down_proj
            if getattr(module, "is_transposed", type(module).__name__ == "Llama4TextExperts"):
                both, down = both.mT, down.mT
            half = both.shape[1] // 2
            for i in range(len(both)):
                gate, up = (
                    (both[i, :half], both[i, half:])
                    if getattr(module, "is_concatenated", True)
                    else (both[i, 0::2], both[i, 1::2])
                )
                found |= {f"{path}.{i}.{name}": x for name, x in zip("gud", (gate, up, down[i]), strict=True)}
    return found


@pytest.mark.parametrize("stacked", [False, True], ids=["a tensor an expert", "stacked"])
@pytest.mark.parametrize(
    "model_type",
    ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "granitemoe", "llama4_text", "step3p7"],
)
@pytest.mark.parametrize("square", [False, True])
def test_every_expert_gets_its_own_weights(model_type: str, square: bool, stacked: bool, source) -> None:
    """Whatever way the files have them, also where a weight is as wide as high."""
    width = {"intermediate_size": 128, "moe_intermediate_size": 128} if square else {}
    directory = source(model_type, stacked=stacked, **width)
    weights = Weights(Checkpoint.open(directory))
    model = module_tree(weights)
    whole = (
        AutoModelForImageTextToText if model_type == "step3p7" else AutoModelForCausalLM
    ).from_pretrained(directory, dtype=torch.float32)
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
    index = torch.tensor([[299, 150], [300, -1], [40000, 65537], [2**31, 0]])
    found = {number: tokens.tolist() for number, (tokens, _) in enumerate(routed(index, 300))}
    assert {number: tokens for number, tokens in found.items() if tokens} == {0: [3], 150: [0], 299: [0]}


def test_others_are_evenly_spaced_and_as_many_as_are_missing() -> None:
    x = torch.arange(100.0)[:, None]
    index = torch.zeros(100, 1, dtype=torch.long)
    index[7] = 1
    entering = routing.Entering(x.expand(100, 11), [own for own, _ in routed(index, 3)])
    own, others = routing.chosen(entering, 1)
    assert own.tokens.tolist() == [7] and own.own and own.weight == 1.0
    assert others.tokens.tolist() == [10 * i for i in range(10)]
    assert not others.own and others.weight == routing.WEIGHT**0.5
    (all_its_own,) = routing.chosen(entering, 0)
    assert len(all_its_own.tokens) == 99 and all_its_own.own
    (everyone,) = routing.chosen(routing.Entering(x.expand(100, 1000), entering.routed), 2)
    assert everyone.tokens.tolist() == list(range(100)) and not everyone.own


def test_many_tokens_come_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(routing.ROWS, "cpu", 40)
    entering = routing.Entering(torch.zeros(120, 110), [torch.arange(10, 110), torch.arange(0)])
    for number, own in ((0, [40, 40, 20]), (1, [])):
        pieces = list(routing.chosen(entering, number))
        assert [len(piece.tokens) for piece in pieces if piece.own] == own
        others = torch.cat([torch.arange(0), *(piece.tokens for piece in pieces if not piece.own)])
        assert len(others) == len(others.unique()) == 110 - sum(own)


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
        "quantize",
        source("qwen3_moe"),
        "-o",
        tmp_path / "out",
        "--recipe",
        recipe,
        "--dry-run",
        "--json",
        "-v",
    )
    assert done.exit_code == 0, done.stderr
    bits = {(".experts." in row["name"], row["bits"]) for row in json.loads(done.stdout)["matrices"]}
    assert bits == {(True, 8), (False, 4)}


def test_one_group_size_for_all_experts_of_a_layer(source, cli: Cli, tmp_path) -> None:
    """Engines have one for gate, up and down; 192 inputs of down want 64."""
    model = source("qwen3_moe", moe_intermediate_size=192)
    done = cli(
        "quantize",
        model,
        "-o",
        tmp_path / "out",
        "--format",
        "compressed-tensors",
        "--dry-run",
        "--json",
        "-v",
    )
    assert done.exit_code == 0, done.stderr
    sizes: dict[bool, set[int]] = {}
    for row in json.loads(done.stdout)["matrices"]:
        sizes.setdefault(".experts." in row["name"], set()).add(row["group_size"])
    assert sizes == {True: {64}, False: {128}}


@pytest.fixture
def micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three of three samples at most, the last one smaller."""
    monkeypatch.setitem(hidden.TOKENS, "cpu", 192)


def test_a_stopped_run_goes_on_to_the_same_bytes(
    source, cli: Cli, tmp_path, monkeypatch, micro_batches
) -> None:
    model, whole, output = source("mixtral"), tmp_path / "whole", tmp_path / "out"
    words = ("quantize", model, "--format", "gptq", *SMALL)
    assert cli(*words, "-o", whole).exit_code == 0
    block = solve.Solve.block

    def stopped(self: solve.Solve, number: int) -> Any:
        if number == 2:
            raise KeyboardInterrupt
        return block(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(solve.Solve, "block", stopped)
        assert cli(*words, "-o", output).exit_code == 130 and not output.exists()
    assert cli(*words, "-o", output, "--resume").exit_code == 0
    assert (output / SHARD).read_bytes() == (whole / SHARD).read_bytes()
    manifests = [json.loads((path / "marlin_convert.json").read_text()) for path in (whole, output)]
    assert manifests[0]["matrices"] == manifests[1]["matrices"]


def made(cli: Cli, output: Path, *words: object) -> tuple[bytes, list[dict[str, Any]]]:
    """The bytes of a checkpoint and the rows of its matrices, in order of their names."""
    done = cli("quantize", *words, "-o", output, "--format", "gptq", *SMALL)
    assert done.exit_code == 0, done.stderr
    rows = json.loads((output / "marlin_convert.json").read_text())["matrices"]
    return (output / SHARD).read_bytes(), sorted(rows, key=lambda row: row["name"])


@pytest.mark.parametrize("effort", ["fast", "default"])
def test_it_is_the_same_how_many_experts_are_solved_at_once(
    effort: str, source, cli: Cli, tmp_path, monkeypatch, micro_batches
) -> None:
    """On one thread, bit for bit: alone, three and then one, all; with an expert that no token goes to."""
    model, found, solved = source("qwen3_moe", num_local_experts=4), {}, []
    tensors = load_file(model / SHARD)
    for i in range(4):  # expert 2 is never chosen
        tensors[f"model.layers.{i}.mlp.gate.weight"][2] = tensors[f"model.layers.{i}.mlp.gate.weight"][1]
    save_file(tensors, model / SHARD, {"format": "pt"})
    batch = gptq.solve_batch

    def noting(weights: Tensor, *rest: Any, **settings: Any) -> Any:
        solved.append(len(weights))
        return batch(weights, *rest, **settings)

    monkeypatch.setattr(gptq, "solve_batch", noting)
    words = (model, "--effort", effort)
    for at_once in (1, 3, 4):
        solved.clear()
        monkeypatch.setattr(solve, "experts_at_once", lambda *_, count=at_once: count)
        found[at_once] = made(cli, tmp_path / f"{effort}-{at_once}", *words)
        # q, k and v, o, and twice the experts
        sizes = [at_once] * (4 // at_once) + [4 % at_once] * (4 % at_once > 0)
        assert solved == 4 * ([1, 1] + [size for size in sizes for _ in range(2)])
    assert found[1] == found[3] == found[4]


@pytest.mark.parametrize(
    "words",
    [
        ("quantize", "--format", "gptq", "--sparsity", "2:4", "--unpruned", "*.experts.1.*"),
        ("quantize", "--format", "gptq", "--sparsity", "2:4", "--unpruned", "*.experts.2.up_proj"),
        ("sparsify", "--skip", "*.experts.0.*"),
    ],
)
def test_experts_of_which_not_all_are_pruned(
    words: tuple[str, ...], source, cli: Cli, tmp_path, monkeypatch
) -> None:
    model, found = source("qwen3_moe"), []
    for at_once in (1, 4):
        monkeypatch.setattr(solve, "experts_at_once", lambda *_, count=at_once: count)
        output = tmp_path / str(at_once)
        done = cli(words[0], model, "-o", output, *words[1:], *SMALL)
        assert done.exit_code == 0, done.stderr
        found.append((output / SHARD).read_bytes())
    assert found[0] == found[1]


def test_experts_are_walked_beside_the_original(source, micro_batches) -> None:
    """Both leave what plain forwards leave, bit for bit; of the original only the experts are given up."""
    ids = torch.randint(4096, (8, 64), generator=torch.Generator().manual_seed(1))
    directory = source("qwen3_moe")

    def opened() -> tuple[BlockModel, list[HiddenStates]]:
        model = BlockModel(Weights(Checkpoint.open(directory)), torch.device("cpu"))
        return model, [HiddenStates(model, ids), HiddenStates(model, ids)]

    def changed(weight: Tensor) -> Tensor:
        return (weight.float() * 16).round() / 16

    (model, states), (plain, plain_states) = opened(), opened()
    for number in range(len(model)):
        block, groups = model.load(number), []

        def replace_all(stages: Sequence[Stage], number: int = number, groups: list = groups) -> None:
            groups.append(len(stages))
            for linear in (f"{model.name(number)}.{name}" for stage in stages for name in stage):
                model.replace(linear, changed(model.model.get_submodule(linear).weight))

        blocks, walks = (block, model.unchanging(block)), []
        for one, hidden_states, action in zip(blocks, states, (replace_all, None), strict=True):
            walks.append(
                BlockWalk(
                    one, model.structure.parts[number], len(hidden_states),
                    lambda i, b=one, s=hidden_states, n=number: s.forward(i, b, n), action,
                    keep_bytes=1 << 30, dtype=model.dtype, at_once=3, beside=walks[0] if walks else None,
                )
            )  # fmt: skip
        stages = model.structure.stages(number)
        seen: dict[Stage, int] = {}
        reached = (walk.reach(stages, one.put) for walk, one in zip(walks, states, strict=True))
        for one, before in zip(*reached, strict=True):
            assert one.stage == before.stage and one.x.shape == before.x.shape
            seen[one.stage] = seen.get(one.stage, 0) + (one.routed or 0)
        assert groups == [1, 1, 3, 3, 1, 1]
        assert sum(rows for (name, *_), rows in seen.items() if "down" in name) == 2 * ids.numel()
        for name, parameter in blocks[1].named_parameters():
            assert parameter.is_meta == (".experts." in name)
        loaded = plain.load(number)
        plain_states[1].advance(loaded, number)
        for linear in (f"{plain.name(number)}.{name}" for stage in stages for name in stage):
            plain.replace(linear, changed(plain.model.get_submodule(linear).weight))
        plain_states[0].advance(loaded, number)
        for walked, advanced in zip(states, plain_states, strict=True):
            for i in range(len(walked)):
                assert torch.equal(walked.state(i), advanced.state(i))


def test_how_many_experts_are_solved_at_once_follows_from_shapes(source, monkeypatch) -> None:
    job = Job(
        Source(source("qwen3_moe"), "source", None), Path("out"), Recipe(samples=8, sequence_length=64),
        torch.device("cpu"),
    )  # fmt: skip
    plan = plan_job(job)[1]
    # gate and up are 128 inputs, 256 outputs; half of the tokens go to each of four; float32, in two models
    expert = gptq.bytes_taken(128, 256) + 2 * 4 * 128 * 8 * 64 // 2
    for space, count in ((0, 1), (3 * expert - 1, 2), (3 * expert, 3), (100 * expert, 4)):
        monkeypatch.setitem(chunks.AT_ONCE, "cpu", space)
        assert chunks.experts_at_once(plan, 1, torch.device("cpu")) == count


def test_repacks_are_exact(source, cli: Cli, tmp_path) -> None:
    first_made = tmp_path / "gptq"
    made(cli, first_made, source("mixtral"))
    for format, before, after in (
        ("compressed-tensors", first_made, "ct"),
        ("marlin", "ct", "marlin"),
        ("gptq", "marlin", "again"),
    ):
        done = cli("quantize", tmp_path / before, "-o", tmp_path / after, "--format", format)
        assert done.exit_code == 0, done.stderr
    first, last = load_file(first_made / SHARD), load_file(tmp_path / "again" / SHARD)
    assert first.keys() == last.keys() and all(torch.equal(first[name], last[name]) for name in first)
    manifests = [
        json.loads((path / "marlin_convert.json").read_text()) for path in (first_made, tmp_path / "again")
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
    refused = ["in marlin-24"] * (format == "marlin-24") + ["with biases"] * (model_type == "gpt_oss")
    note = f"experts {' and '.join(refused)} load in transformers with marlin-convert, not in vLLM"
    assert note in done.stdout if refused else "vLLM" not in done.stdout
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


@pytest.mark.parametrize("format", ["marlin", "gptq"])
def test_the_plan_says_that_vllm_refuses_experts_without_a_gate(
    format: str, source, cli: Cli, tmp_path
) -> None:
    done = cli(
        "quantize", source("nemotron_h"), "-o", tmp_path / "out", "--dry-run", "--only", "experts",
        "--format", format, *SMALL,
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    note = "experts without a gate load in transformers with marlin-convert, not in vLLM"
    assert (note in done.stdout) == (format == "marlin"), done.stdout


@pytest.mark.parametrize(("count", "refused"), [(512, False), (513, True)])
def test_the_plan_says_that_vllm_takes_512_experts_on_a_rank(count: int, refused: bool, tmp_path) -> None:
    """As the plugin does where it loads them."""
    shape: dict[str, Any] = {"hidden_size": 64, "moe_intermediate_size": 64, "num_attention_heads": 2}
    config = Qwen3MoeConfig(
        **shape, num_experts=count, num_experts_per_tok=2, num_hidden_layers=1, num_key_value_heads=2,
        head_dim=32, vocab_size=64, dtype="bfloat16",
    )  # fmt: skip
    plan = make_plan(Weights(Checkpoint.open(tiny_models.headers_only(config, tmp_path))), Recipe())
    said = [note for note in plan.notes if "that are more than 512 on a rank load in transformers" in note]
    assert len(said) == refused


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "gpt_oss", "granitemoe"])
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
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)(ids).logits
        model = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float16, device_map="cuda")
        found = model(ids.cuda()).logits.cpu().float()
        layers = [one for _, one in experts_of(model)]
        assert layers and all(one in integration._grouped for one in layers)
        # a token whose router is near a tie goes to other experts by a rounding of float16: one in ten of
        # gpt-oss's, and the same ones where a GPU multiplies one expert after another
        off = ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).flatten().sort().values
        assert off[int(0.75 * len(off))] < 0.003 and off[-1] < 1
        assert torch.equal(model(ids.cuda()).logits.cpu().float(), found)
        model.cpu().cuda()  # to other memory
        assert torch.equal(model(ids.cuda()).logits.cpu().float(), found)
    model.save_pretrained(plain)
    before, after = load_file(output / SHARD), load_file(plain / SHARD)
    packed = [name for name in before if name.endswith((".B", ".s"))]
    assert packed and all(torch.equal(before[name], after[name]) for name in packed)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "nemotron_h"])
@pytest.mark.parametrize("at_once", [1, 3, 100])
def test_products_of_many_experts_are_those_of_each(
    model_type: str, at_once: int, source, monkeypatch
) -> None:
    """With and without biases and gates, some at once; where no token goes to one, and a choice to none."""
    model = BlockModel(Weights(Checkpoint.open(source(model_type))), torch.device("cpu"))
    number = next(i for i, parts in enumerate(model.structure.parts) if any(part.experts for part in parts))
    ((_, experts),) = experts_of(model.load(number))
    weight = experts.linear(0, experts.roles[0]).weight
    monkeypatch.setattr(module_of_experts, "GROUPED", at_once * weight.nbytes)
    draw = torch.Generator().manual_seed(1)
    index = torch.rand(40, experts.count, generator=draw).argsort(1)[:, :2]
    index[index == 1] = experts.count
    x, shares = torch.randn(40, weight.shape[1], generator=draw), torch.rand(40, 2, generator=draw)
    with torch.no_grad():
        expected = experts(x, index, shares)
        assert expected.abs().max() > 1e-3
        for parts in ([range(experts.count)], [range(2), range(2, experts.count)]):
            found = sum(experts.in_groups(numbers, x, index, shares) for numbers in parts)
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
            one_by_one = sum(experts.sum_of(numbers, x, index, shares) for numbers in parts)
            torch.testing.assert_close(one_by_one, expected, atol=1e-6, rtol=1e-5)
        of_each = [tokens for tokens, _ in routed(index, experts.count)]
        pieces = [(number, piece) for number, own in enumerate(of_each) for piece in own.split(5)]
        expected = experts.inner(x, pieces, torch.float32)
        found = experts.inner_in_groups(x, pieces, torch.float32)
        assert max(one.abs().max() for one in expected if len(one)) > 1e-3
        for one, another in zip(found, expected, strict=True):
            torch.testing.assert_close(one, another, atol=1e-6, rtol=1e-5)


def test_what_is_picked_out_for_many_experts_is_limited() -> None:
    """By pieces and by rows; a piece that is larger comes alone, and one of no rows with others."""
    pieces = [(number, torch.arange(rows)) for number, rows in enumerate([3, 0, 4, 9, 9, 20, 1])]

    def sizes(most: int, rows: int) -> list[list[int]]:
        found = list(module_of_experts._batches(pieces, most, rows=rows))
        assert [number for some in found for number, _ in some] == list(range(len(pieces)))
        return [[len(own) for _, own in some] for some in found]

    assert sizes(100, 10) == [[3, 0, 4], [9], [9], [20], [1]]
    assert sizes(2, 100) == [[3, 0], [4, 9], [9, 20], [1]]
    assert sizes(100, 100) == [[3, 0, 4, 9, 9, 20, 1]]
    assert list(module_of_experts._batches([], 1, rows=1)) == []


def test_experts_of_other_processes_are_not_copied_with_a_block(source) -> None:
    """And what is replaced of the others is what it was in the copy."""
    weights = Weights(Checkpoint.open(source("qwen3_moe")))
    model = BlockModel(weights, torch.device("cpu"), experts=lambda count: range(1, count, 2))
    ((path, experts),) = experts_of(model.load(1))
    ((_, copied),) = experts_of(model.unchanging(model.blocks[1]))
    role = experts.roles[0]
    for number in range(experts.count):
        shared = copied.linear(number, role) is experts.linear(number, role)
        assert shared == experts.linear(number, role).weight.is_meta == (number % 2 == 0)
    own = experts.linear(1, role).weight
    model.replace(f"{model.name(1)}.{path}.1.{role}", torch.zeros_like(own))
    assert torch.equal(copied.linear(1, role).weight, own) and not experts.linear(1, role).weight.any()


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "llama4_text"])
def test_what_divided_experts_answer_adds_up(model_type: str, source, monkeypatch) -> None:
    """Of three processes with 13, 1 and 26 tokens, a few at a time; tests/test_ranks.py has real ones."""
    monkeypatch.setitem(divided.TOKENS, "cpu", 5)
    model = BlockModel(Weights(Checkpoint.open(source(model_type))), torch.device("cpu"))
    number = next(i for i, parts in enumerate(model.structure.parts) if any(part.experts for part in parts))
    ((_, experts),) = experts_of(model.load(number))
    draw = torch.Generator().manual_seed(1)
    index = torch.rand(40, experts.count, generator=draw).argsort(1)[:, :2]
    x = torch.randn(40, experts.linear(0, experts.roles[0]).weight.shape[1], generator=draw)
    called = divided.Called(x, index, torch.rand(40, 2, generator=draw), [13, 1, 26])
    found = []

    class Process(Ranks):
        def begin_sum(self, tensor: torch.Tensor, owner: int):
            parts[owner].append(tensor)
            return lambda: None

    with torch.no_grad():
        for rank in range(3):
            parts: dict[int, list[torch.Tensor]] = {0: [], 1: [], 2: []}
            answers = divided.answered(Process(rank, 3), experts, called, torch.float32)
            assert torch.equal(answers, torch.cat(parts[rank]))
            found.append(torch.cat([part for owner in range(3) for part in parts[owner]]))
        expected = experts(x, index, called.shares)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(sum(found), expected, atol=1e-6, rtol=1e-5)
    assert all(not torch.allclose(one, expected, atol=1e-4) for one in found)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "nemotron_h"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_gpu_multiplies_many_experts_at_once(model_type: str, dtype: torch.dtype, source) -> None:
    """As a CPU does one by one, in every type, and the same bits twice."""
    weights = Weights(Checkpoint.open(source(model_type)))
    draw, found = torch.Generator().manual_seed(1), []
    for device in ("cpu", "cuda"):
        model = BlockModel(weights, torch.device(device), dtype=dtype, fast=False)
        number = next(i for i, parts in enumerate(model.structure.parts) if any(one.experts for one in parts))
        ((_, experts),) = experts_of(model.load(number))
        if not found:
            x = torch.randn(500, experts.linear(0, experts.roles[0]).in_features, generator=draw)
            index = torch.rand(500, experts.count, generator=draw).argsort(1)[:, :2]
            shares = torch.rand(500, 2, generator=draw)
        given = x.to(device, model.compute_dtype), index.to(device), shares.to(device, model.compute_dtype)
        with torch.no_grad():
            found.append(experts(*given).cpu().float())
            assert torch.equal(experts(*given).cpu().float(), found[-1])
    assert experts._aligned()
    assert (found[1] - found[0]).norm() < 2 * torch.finfo(dtype).eps * found[0].norm() + 1e-4


@pytest.mark.parametrize(
    "layout, bits",
    [
        ("marlin", 4),
        ("marlin-24", 4),
        *((name, bits) for name in ("gptq", "compressed-tensors") for bits in (4, 8)),
    ],
)
@pytest.mark.parametrize("group_size", [-1, 128])
def test_experts_are_packed_side_by_side_as_each_alone(
    layout: str, bits: int, group_size: int, source
) -> None:
    """Byte for byte; and one that no layout can hold is named."""
    directory = source("qwen3_moe", hidden_size=256, moe_intermediate_size=128)
    sparsity = "2:4" if layout == "marlin-24" else "none"
    recipe = Recipe(format=layout, bits=bits, group_size=group_size, sparsity=sparsity)
    plan = make_plan(Weights(Checkpoint.open(directory)), recipe)
    draw = torch.Generator().manual_seed(1)
    matrices: list[Any] = []
    for fate in [one for one in plan.packed if ".experts." in one.name and one.n == 128][:5]:
        codes = torch.randint(0, 1 << bits, (fate.k, fate.n), generator=draw, dtype=torch.uint8)
        kept = None
        if fate.layout.sparse:
            codes.view(-1, 4, fate.n)[:, 1:3] = 8
            codes[::8] = 8  # of which kept says that it is no hole
            kept = torch.zeros(codes.shape, dtype=torch.bool)
            kept.view(-1, 4, fate.n)[:, [0, 3]] = True
        groups = 1 if group_size == -1 else fate.k // group_size
        scales = torch.rand(groups, fate.n, generator=draw).half() / 100 + 0.001
        if len(matrices) == 2:
            scales[0, 1] *= -1
        layer = QuantizedLinear(codes, scales, fate.k // groups, bits, kept=kept)
        matrices.append((fate, layer, {"name": fate.name}))
    assert len(matrices) == 5
    together = pack_as_one(matrices, plan)
    for (tensors, row), matrix in zip(together, matrices, strict=True):
        fate, layer, _ = matrix
        expected, its_row = pack(fate, layer, plan, {"name": fate.name})
        assert row == its_row and tensors.keys() == expected.keys()
        for name, tensor in tensors.items():
            assert tensor.is_contiguous() and tensor.dtype == expected[name].dtype
            assert torch.equal(tensor, expected[name])
    assert [row["scales"] for _, row in together] == ["positive"] * 2 + ["signed"] + ["positive"] * 2
    matrices[3][1].scales[0, 5] = 0
    assert pack_as_one(matrices, plan) == []
    with pytest.raises(FormatError, match=re.escape(matrices[3][0].name)):
        list(pack_all(matrices, plan))


def test_what_is_2_4_and_what_is_not_are_dequantized_as_one() -> None:
    """With outputs of their own; as each alone."""
    draw = torch.Generator().manual_seed(1)
    layers = []
    for n, sparse in (64, False), (128, True), (192, False):
        codes = torch.randint(0, 16, (256, n), generator=draw, dtype=torch.uint8)
        scales = torch.randn(2, n, generator=draw).half()
        kept = torch.ones(codes.shape, dtype=torch.bool) if sparse else None
        layers.append(QuantizedLinear(codes, scales, 128, kept=kept))
    for one, layer in zip(dequantized_as_one(layers), layers, strict=True):
        assert torch.equal(one, layer.dequantize())


def test_a_number_of_no_expert_goes_nowhere() -> None:
    found = routed(torch.tensor([[0, 1], [1, -1], [2, 3]]), 3)
    assert [tokens.tolist() for tokens, _ in found] == [[0], [1, 0], [2]]


@pytest.mark.parametrize("top_k", [1, 2])
def test_experts_of_llama_4_read_the_tokens_that_go_to_them(top_k: int, source) -> None:
    """Where transformers hands all of them everything, and gives the same logits."""
    directory = source("llama4_text", num_experts_per_tok=top_k)
    whole = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ids = torch.randint(5, 4000, (2, 24), generator=torch.Generator().manual_seed(3))
    scores = []
    whole.model.layers[1].feed_forward.router.register_forward_hook(
        lambda *found: scores.append(found[-1][0])
    )
    with torch.no_grad():
        expected = whole(ids).logits
    model = BlockModel(Weights(Checkpoint.open(directory)), torch.device("cpu"), fast=False)
    hidden, seen = HiddenStates(model, ids), []
    with torch.no_grad():
        for number in range(len(model)):
            block = model.load(number)
            for path, experts in experts_of(block) if number == 1 else ():
                assert path == "feed_forward.experts"
                experts.register_forward_pre_hook(lambda _, args: seen.append(args))
            hidden.advance(block, number)
            model.unload(number)
    ((x, index, shares),) = seen
    assert len(x) == ids.numel() * top_k and (shares == 1).all()
    assert torch.equal(index.flatten().bincount(minlength=4), (scores[0] > 0).sum(0))
    torch.testing.assert_close(model.logits(ids, hidden.state(0)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model_type", ["llama4_text", "step3p7"])
def test_what_does_not_use_the_experts_interface_is_converted_as_what_does(
    model_type: str, source, cli: Cli, tmp_path
) -> None:
    """Written one by one under the names that vLLM knows, with the tokens of every expert in the manifest."""
    output = tmp_path / "out"
    done = cli("quantize", source(model_type), "-o", output, "--format", "compressed-tensors", *SMALL)
    assert done.exit_code == 0, done.stderr
    inside = {"llama4_text": "feed_forward", "step3p7": "moe"}[model_type]
    tensors = load_file(output / SHARD)
    packed = {name for name in tensors if ".experts." in name and name.endswith(".weight_packed")}
    assert packed == {
        f"model.layers.{i}.{inside}.experts.{e}.{role}_proj.weight_packed"
        for i in (1, 3) for e in range(4) for role in ("gate", "up", "down")
    }  # fmt: skip
    assert {tensors[name].dim() for name in packed} == {2}
    counted = [
        row["tokens"]
        for row in rows.worked_on(json.loads((output / "marlin_convert.json").read_text()))
        if ".layers.3." in row["name"] and row["name"].endswith("down_proj") and "tokens" in row
    ]
    assert len(counted) == 4 and sum(counted) == 8 * 64 * 2
    checked = cli("verify", output, "--source", tmp_path / model_type)
    assert checked.exit_code == 0, checked.stdout + checked.stderr


@pytest.mark.parametrize("model_type", ["llama4_text", "step3p7"])
def test_transformers_loads_them_as_it_loads_others(model_type: str, source, cli: Cli, tmp_path) -> None:
    """The logits of our walk, and when it is saved again the same tensors under the same names."""
    import marlin_convert  # noqa: F401  (registers the layouts)

    output, again = tmp_path / "out", tmp_path / "again"
    done = cli("quantize", source(model_type), "-o", output, *SMALL)
    assert done.exit_code == 0, done.stderr
    kind = AutoModelForImageTextToText if model_type == "step3p7" else AutoModelForCausalLM
    model, info = kind.from_pretrained(output, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    ids = torch.randint(5, 4000, (2, 24), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        found = model(input_ids=ids).logits.log_softmax(-1)
    walked = BlockModel(Weights(Checkpoint.open(output)), torch.device("cpu"), fast=False)
    torch.testing.assert_close(found, log_probabilities(walked, ids), atol=2e-3, rtol=1e-3)
    model.save_pretrained(again)
    before, after = load_file(output / SHARD), load_file(again / SHARD)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before if name.endswith((".B", ".s")))


@pytest.mark.parametrize("model_type", ["llama4_text", "phimoe"])
def test_a_router_that_is_a_linear_routes_in_16_bits_too(model_type: str, tmp_path: Path) -> None:
    """Where linears are rounded to the model's type on a CPU: a router does more than multiply."""
    whole = diverse_models.build(model_type, vocab_size=4096).half()
    directory = tiny_models.save(whole, tmp_path)
    ids = torch.randint(5, 4000, (2, 24), generator=torch.Generator().manual_seed(3))
    model = BlockModel(Weights(Checkpoint.open(directory)), torch.device("cpu"))
    with torch.no_grad():
        expected = whole.float()(input_ids=ids).logits.log_softmax(-1)
    torch.testing.assert_close(log_probabilities(model, ids), expected, atol=0.02, rtol=0)


def test_what_vllm_reorders_is_refused_where_it_does_not(source, cli: Cli, tmp_path) -> None:
    """It knows q and k of Llama 4 in compressed-tensors alone, and would go on with wrong ones in gptq."""
    directory, output = source("llama4_text"), tmp_path / "out"
    words = ("quantize", directory, "-o", output, "--dry-run", *SMALL)
    done = cli(*words, "--format", "gptq")
    assert done.exit_code == 1
    assert "vLLM reorders model.layers.0.self_attn.q_proj and 7 more" in done.stderr
    for name in ("q", "k", "v"):
        words += ("--skip", f"*.{name}_proj")
    assert cli(*words, "--format", "gptq").exit_code == 0
    done = cli(*words[: -2 * 3], "--format", "marlin")
    assert done.exit_code == 0
    said = "experts that read tokens times their scores load in transformers with marlin-convert, not in vLLM"
    assert said in done.stdout
    done = cli(*words[: -2 * 3], "--format", "marlin", "--skip", "*.experts.*")
    assert done.exit_code == 1 and "but not in marlin" in done.stderr
