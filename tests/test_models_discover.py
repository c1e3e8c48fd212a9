"""What is found by running a model without values, and that blocks run one after another give its logits."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import diverse_models
import pytest
import tiny_models
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from marlin_convert.checkpoint.linears import Weights
from marlin_convert.checkpoint.reader import Checkpoint
from marlin_convert.errors import SourceError
from marlin_convert.models import discover as module_of_discover
from marlin_convert.models import hidden as hidden_module
from marlin_convert.models.blocks import BlockModel
from marlin_convert.models.discover import NOT_FOR_TEXT, discover
from marlin_convert.models.experts import take_apart
from marlin_convert.models.hidden import HiddenStates
from marlin_convert.models.stages import BlockWalk
from marlin_convert.models.structure import Part, Residual, Stage, Structure
from marlin_convert.plan import Plan, make_plan
from marlin_convert.recipe import Recipe

CPU = torch.device("cpu")
IDS = torch.randint(5, 400, (5, 24), generator=torch.Generator().manual_seed(1))

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
BEFORE, BETWEEN = Residual("input_layernorm"), Residual("post_attention_layernorm")
SPLIT = (
    Part("self_attn", (QKV, ("self_attn.o_proj",)), pair=True, residual=BEFORE),
    Part("mlp", (("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)), residual=BETWEEN),
)
FUSED = (
    Part("self_attn", (("self_attn.qkv_proj",), ("self_attn.o_proj",)), pair=True, residual=BEFORE),
    Part("mlp", (("mlp.gate_up_proj",), ("mlp.down_proj",)), residual=BETWEEN),
)
# Where a norm stands before the sum, by family: what reads the residual of attention and of the MLP.
THROUGH_NORMS = {
    "gemma2": ("input_layernorm", "pre_feedforward_layernorm"),
    "gemma3_text": ("input_layernorm", "pre_feedforward_layernorm"),
    "olmo2": ("self_attn", "mlp"),
}
LINEAR_ATTENTION = Part(
    "linear_attn",
    (("linear_attn.in_proj_qkv", "linear_attn.in_proj_z"), ("linear_attn.out_proj",)),
    residual=BEFORE,
)

ZAMBA = ["hybrid"]

DIVERSE = (*diverse_models.TEXT, *diverse_models.IMAGES)


def on_meta(model: PreTrainedModel) -> PreTrainedModel:
    """The same model without values, its experts apart."""
    with torch.device("meta"):
        same = type(model)(model.config).eval()
    take_apart(same)
    return same


def test_a_model_like_an_earlier_one_is_not_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that has another config, or computes otherwise, is; a few are kept."""
    ran: list[str] = []
    run = module_of_discover._run

    def counted(model: PreTrainedModel, *others: Any) -> Any:
        ran.append(model.config.model_type)
        return run(model, *others)

    monkeypatch.setattr(module_of_discover, "_run", counted)
    monkeypatch.setattr(module_of_discover, "_found", {})
    built = diverse_models.build("qwen3_moe")
    assert discover(on_meta(built)) is discover(on_meta(built))
    assert ran == ["qwen3_moe"]
    fewer = discover(on_meta(diverse_models.build("qwen3_moe", num_hidden_layers=1)))
    assert len(fewer.parts) == 1 and ran == ["qwen3_moe"] * 2
    attention = type(built.model.layers[0].self_attn)
    forward = attention.forward
    monkeypatch.setattr(attention, "forward", lambda self, *args, **kwargs: forward(self, *args, **kwargs))
    discover(on_meta(built))
    assert ran == ["qwen3_moe"] * 3
    for layers in range(2, 8):
        discover(on_meta(tiny_models.build("llama", num_hidden_layers=layers)))
    assert len(module_of_discover._found) == module_of_discover.KEPT


def structure(model_type: str) -> Structure:
    return discover(on_meta(diverse_models.build(model_type)))


@pytest.fixture(autouse=True)
def two_samples_a_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(hidden_module.TOKENS, "cpu", 48)


def opened(model: PreTrainedModel, directory: Path) -> BlockModel:
    # under the names that the modules have
    model.save_pretrained(directory, save_original_format=False)
    return BlockModel(Weights(Checkpoint.open(directory)), CPU, fast=False)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_of_known_families_the_parts_are_found(family: str) -> None:
    found = discover(on_meta(tiny_models.build(family)))
    assert found.blocks == "model.layers"
    parts = FUSED if family == "phi3" else SPLIT
    if family in THROUGH_NORMS:
        norms = ("post_attention_layernorm", "post_feedforward_layernorm")
        found_at = zip(parts, THROUGH_NORMS[family], norms, strict=True)
        parts = tuple(replace(part, residual=Residual(read, norm=norm)) for part, read, norm in found_at)
    elif family == "granite":
        parts = tuple(replace(part, residual=replace(part.residual, multiplier=0.22)) for part in parts)
    assert found.parts == 2 * (parts,)
    assert found.returns == (0, 0)
    assert not found.dense and not found.idle


@pytest.mark.parametrize("model_type", DIVERSE)
def test_what_is_added_to_a_residual_gives_the_sum_that_was_found(model_type: str, tmp_path: Path) -> None:
    """The original's residual and output make what a module of the block, or the next block, is handed."""
    whole = diverse_models.build(model_type)
    model = opened(whole, tmp_path)
    hidden = HiddenStates(model, IDS)
    for number in range(len(model)):
        block, handed = model.load(number), []

        def hand(_: torch.nn.Module, args: Any, kwargs: Any, handed: list[Tensor] = handed) -> None:
            handed.extend([x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)][:1])

        hooks = [module.register_forward_pre_hook(hand, with_kwargs=True) for module in block.modules()]
        handed.append(hidden.forward(0, block, number))
        for hook in hooks:
            hook.remove()
        walk = BlockWalk(
            block, model.structure.parts[number], len(hidden),
            lambda i, b=block, n=number: hidden.forward(i, b, n), None, keep_bytes=1 << 40, dtype=model.dtype,
        )  # fmt: skip
        multiplier = {part.last: part.residual.multiplier for part in walk.parts if part.residual}
        seen = set()
        for one in walk.reach(model.structure.stages(number), hidden.put):
            if one.residual is not None and one.output is not None and one.stage not in seen:
                seen.add(one.stage)
                output = one.output if one.norm is None else one.norm(one.output)
                total = multiplier[one.stage] * (one.residual + output)
                same = [x for x in handed if x.numel() == total.numel()]
                assert any(torch.allclose(x.flatten(), total.flatten(), atol=1e-5) for x in same)
        assert seen == multiplier.keys()
        model.unload(number)


@pytest.mark.parametrize("model_type", DIVERSE)
def test_block_after_block_the_logits_are_those_of_the_whole_model(model_type: str, tmp_path: Path) -> None:
    """Bit for bit, for several texts, whether everything is kept between the stages or nothing.

    But for experts, who multiply the tokens of several micro-batches at once, and gate and up apart.
    """
    whole = diverse_models.build(model_type)
    with torch.no_grad():
        expected = [whole(input_ids=ids, use_cache=False).logits for ids in IDS.split(2)]
    assert all(logits.isfinite().all() for logits in expected)
    model = opened(whole, tmp_path)
    check_linears(model.model, model.structure)
    assert model.model.config._attn_implementation == whole.config._attn_implementation
    for keep_bytes in (1 << 40, 0):
        hidden = HiddenStates(model, IDS)
        for number in range(len(model)):
            block = model.load(number)
            seen: list[Stage] = []
            walk = BlockWalk(
                block, model.structure.parts[number], len(hidden),
                lambda i, b=block, n=number, h=hidden: h.forward(i, b, n),
                seen.extend, keep_bytes=keep_bytes, dtype=model.dtype,
            )  # fmt: skip
            for _ in walk.reach(model.structure.stages(number), hidden.put):
                pass
            assert tuple(seen) == model.structure.stages(number) != ()
            model.unload(number)
        for i, (ids, logits) in enumerate(zip(hidden.batches, expected, strict=True)):
            found = model.logits(ids, hidden.state(i))
            assert torch.equal(found, logits) or model.structure.experts
            torch.testing.assert_close(found, logits, atol=1e-5, rtol=1e-4)
            for row, state in enumerate(hidden.samples(i)):
                torch.testing.assert_close(model.logits(ids[row : row + 1], state)[0], logits[row])


def check_linears(model: PreTrainedModel, found: Structure) -> None:
    """Every linear is of a stage or dense by name."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings():
            assert (found.stage_of(name) is None) == (name in found.dense), name
            stage = found.stage_of(name)
            path = name.removeprefix(f"{found.blocks}.").partition(".")[2]
            assert stage is None or path in stage


def test_the_model_is_left_as_it_was() -> None:
    model = on_meta(diverse_models.build("gemma3"))
    before = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    discover(model)
    after = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert before.keys() == after.keys() and all(before[name] is after[name] for name in before)
    assert not any("forward" in vars(module) for module in model.modules())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_a_router_that_is_a_linear_stays_dense() -> None:
    """However many experts there are: what it gives is no tensor."""
    found = discover(on_meta(diverse_models.build("llama4_text", num_local_experts=64)))
    assert found.dense == {f"model.layers.{i}.feed_forward.router": "sends tokens to experts" for i in (1, 3)}


def test_a_hybrid_has_blocks_of_two_kinds() -> None:
    found = structure("qwen3_5_text")
    assert found.parts == 2 * ((LINEAR_ATTENTION, SPLIT[1]), SPLIT)
    assert found.stages(0)[1] == ("linear_attn.out_proj",)
    gates = {f"model.layers.{i}.linear_attn.in_proj_{x}" for i in (0, 2) for x in "ba"}
    assert found.dense == dict.fromkeys(gates, "gates of a linear attention")


def test_blocks_that_take_keys_and_values_from_others_have_none_of_their_own() -> None:
    found = structure("gemma3n_text")
    first = [parts[1].stages[0] for parts in found.parts]
    assert first[1] == SPLIT[0].stages[0] and first[3] == ("self_attn.q_proj",)
    assert found.batch_axis == 1
    assert found.dense["model.layers.0.per_layer_projection"] == "puts the per-layer input in"
    assert found.dense["model.per_layer_model_projection"] == "outside of the blocks"


def test_parallel_parts_read_one_tensor_in_two_stages() -> None:
    assert structure("cohere2").stages(0) == (*SPLIT[0].stages, *SPLIT[1].stages)


def test_a_part_that_does_not_end_in_its_last_linear_has_no_module() -> None:
    assert [part.module for part in structure("bloom").parts[0]] == ["", ""]
    assert [part.module for part in structure("opt").parts[0]] == ["self_attn", "fc1", "fc2"]


@pytest.mark.parametrize("model_type", diverse_models.IMAGES)
def test_towers_stay_dense_and_are_not_read(model_type: str, tmp_path: Path) -> None:
    whole = diverse_models.build(model_type)
    found = discover(on_meta(whole))
    text = whole.get_decoder()
    of_text = {
        id(parameter) for module in (text, whole.get_output_embeddings()) for parameter in module.parameters()
    }
    tower = {name for name, parameter in whole.named_parameters() if id(parameter) not in of_text}
    assert tower and tower <= found.idle
    assert not {name for name, _ in whole.named_parameters()} & found.idle - tower
    linears = {name for name, module in whole.named_modules() if isinstance(module, torch.nn.Linear)}
    never = {name for name, why in found.dense.items() if why == NOT_FOR_TEXT}
    assert never == {name for name in linears if f"{name}.weight" in tower}
    model = opened(whole, tmp_path)
    model.load_outside(head=True)
    taken = sum(
        parameter.untyped_storage().nbytes()
        for name, parameter in model.model.named_parameters()
        if name in tower
    )
    assert taken == 4 * len(tower)


def test_what_every_text_is_handed_is_kept_once(tmp_path: Path) -> None:
    def tensors(model_type: str) -> list[set[int]]:
        hidden = HiddenStates(opened(diverse_models.build(model_type), tmp_path / model_type), IDS)
        leaves = (tree_leaves([(call.args, call.kwargs) for call in calls]) for calls in hidden._calls)
        kept.append(hidden)
        return [{id(x) for x in one if isinstance(x, Tensor)} for one in leaves]

    kept: list[HiddenStates] = []
    first, second, shorter = tensors("olmo3")
    assert first == second and len(first) == len(shorter) < 8  # two masks, the positions, rotary embeddings
    first, second, _ = tensors("gemma3n_text")
    assert len(second - first) == 4  # the per-layer input of every block


class Writer(torch.nn.Module):
    """A block that adds to the hidden states where they are."""

    def forward(self, hidden: Tensor, **_: Any) -> Tensor:
        return hidden.add_(1.0)


def test_a_block_may_write_into_the_hidden_states_it_is_handed(tmp_path: Path) -> None:
    hidden = HiddenStates(opened(tiny_models.build("llama"), tmp_path), IDS)
    before = hidden.state(0)
    for _ in range(2):
        assert torch.equal(hidden.forward(0, Writer(), 0), before + 1.0)


@pytest.mark.parametrize(
    "model_type, changes, why",
    [
        ("gpt2", {}, "keeps most weights of its blocks in Conv1D"),
        ("bert", {}, "is an encoder"),
        ("zamba", {"num_hidden_layers": 2, "layers_block_type": 2 * ZAMBA}, "share weights"),
        ("hrm_text", {"num_hidden_layers": 2, "H_cycles": 1, "L_cycles": 1}, "two lists of blocks"),
        ("llama4_text", {}, "has experts of a kind of its own"),
        (
            "mllama",
            {"text_config": {"num_hidden_layers": 4, "cross_attention_layers": [3]}},
            "only if each is run once",
        ),
        ("blip-2", {}, "does not run on the ids of a text alone"),
        ("bart", {}, "is an encoder, or works with one"),
    ],
)
def test_what_cannot_be_taken_block_by_block_is_refused_by_name(
    model_type: str, changes: dict[str, Any], why: str
) -> None:
    config = CONFIG_MAPPING[model_type](**changes)
    kind = AutoModelForCausalLM if model_type not in ("mllama", "blip-2") else AutoModelForImageTextToText
    with torch.device("meta"):
        model = kind.from_config(config).eval()
    with pytest.raises(SourceError, match=why):
        discover(model)


def test_a_softcap_is_not_lost(tmp_path: Path) -> None:
    assert (
        opened(tiny_models.build("gemma2"), tmp_path / "gemma2").model.config._attn_implementation == "eager"
    )
    assert opened(tiny_models.build("llama"), tmp_path / "llama").model.config._attn_implementation == "sdpa"


def test_the_model_of_a_real_config_is_found_too() -> None:
    """As large as it is: nothing is computed, and nothing has to be made smaller."""
    config = CONFIG_MAPPING["qwen3_5_text"](hidden_size=5120, intermediate_size=25600, num_hidden_layers=8)
    with torch.device("meta"):
        found = discover(AutoModelForCausalLM.from_config(config).eval())
    assert [parts[0].module for parts in found.parts] == 2 * [*["linear_attn"] * 3, "self_attn"]


def planned(model: PreTrainedModel, directory: Path, **settings: Any) -> Plan:
    model.save_pretrained(directory, save_original_format=False)
    return make_plan(Weights(Checkpoint.open(directory)), Recipe(sequence_length=64).changed(settings))


def test_a_plan_names_the_towers_for_engines_to_leave_them_dense(tmp_path: Path) -> None:
    plan = planned(diverse_models.build("gemma3"), tmp_path, format="compressed-tensors")
    never = {name for name, why in plan.structure.dense.items() if why == NOT_FOR_TEXT}
    assert never and {fate.name for fate in plan.dense} == never
    assert plan.quantization_config is not None
    assert set(plan.quantization_config["ignore"]) == never | {"lm_head"}
    assert len(plan.packed) == 7 * plan.blocks == 28


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_of_another_name_is_named_where_it_is_stored(tied: bool, tmp_path: Path) -> None:
    plan = planned(diverse_models.build("biogpt", tie_word_embeddings=tied), tmp_path)
    assert {fate.name: fate.reason for fate in plan.dense} == (
        {} if tied else {"output_projection": "the head"}
    )


def test_rope_that_asks_for_the_last_position_is_found() -> None:
    """A run on tensors without values has none to give."""
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = diverse_models.build("olmo3", rope_parameters=rope, layer_types=["full_attention"] * 4)
    assert len(discover(model).parts) == 4
