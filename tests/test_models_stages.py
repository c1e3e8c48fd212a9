"""The walk of a block: whatever is kept or computed again, every stage sees the same numbers."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import rows
import tiny_models
import torch
from torch import Tensor, nn

from marlin_convert.checkpoint.linears import Weights
from marlin_convert.checkpoint.reader import Checkpoint
from marlin_convert.commands import quantize as story
from marlin_convert.errors import ConvertError, SourceError
from marlin_convert.hub import Source
from marlin_convert.models import blocks as blocks_module
from marlin_convert.models import hidden as hidden_module
from marlin_convert.models.blocks import BlockModel
from marlin_convert.models.hidden import HiddenStates
from marlin_convert.models.stages import BlockWalk
from marlin_convert.models.structure import Part, Stage
from marlin_convert.recipe import Recipe
from marlin_convert.solvers.hessian import Hessian

CPU = torch.device("cpu")
SAMPLES = 3
IDS = torch.randint(4096, (SAMPLES, 64), generator=torch.Generator().manual_seed(1))

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(autouse=True)
def one_sample_a_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(hidden_module.TOKENS, "cpu", 64)


def rounded(weight: Tensor) -> Tensor:
    """A stand-in for what the solver does to a weight: coarse, so that it shows in everything after it."""
    return (weight.float() * 4).round() / 4 + 0.01


def open_model(family: str, dtype: torch.dtype, tmp_path: Path) -> tuple[BlockModel, HiddenStates]:
    source = tiny_models.save(tiny_models.build(family, dtype), tmp_path / "source")
    model = BlockModel(Weights(Checkpoint.open(source)), CPU)
    return model, HiddenStates(model, IDS)


def walk_blocks(
    model: BlockModel,
    hidden: HiddenStates,
    keep_bytes: int,
    stages: Callable[[list[Stage]], list[Stage]] = lambda stages: stages,
) -> SimpleNamespace:
    """Walk every block; the Hessians, the inputs that stages saw, the last hidden states, parts replayed."""
    seen = SimpleNamespace(hessians={}, inputs={}, replayed=0, order=[])
    for number in range(len(model)):
        parts = model.structure.parts[number]
        block = model.load(number)

        def solve(stages: Sequence[Stage], number: int = number) -> None:
            (stage,) = stages
            seen.order.append((number, stage))
            for linear in (f"{model.name(number)}.{name}" for name in stage):
                model.replace(linear, rounded(model.model.get_submodule(linear).weight))

        walk = BlockWalk(
            block, parts, len(hidden), lambda i, b=block, n=number: hidden.forward(i, b, n), solve,
            keep_bytes=keep_bytes, dtype=model.dtype,
        )  # fmt: skip
        for one in walk.reach(stages([stage for part in parts for stage in part.stages]), hidden.put):
            hessian = seen.hessians.setdefault((number, one.stage), Hessian(one.x.shape[-1], one.x.device))
            hessian.add(one.x)
            seen.inputs.setdefault((number, one.stage), []).append(one.x.clone())
        seen.replayed += walk.replayed
        model.unload(number)
    seen.hidden = torch.cat([hidden.state(i) for i in range(len(hidden))])
    return seen


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2", "gemma3_text"])
def test_keeping_everything_or_nothing_gives_the_same_bits(family: str, dtype: str, tmp_path: Path) -> None:
    runs = {}
    for keep in (1 << 40, 40_000, 0):
        model, hidden = open_model(family, DTYPES[dtype], tmp_path / str(keep))
        runs[keep] = walk_blocks(model, hidden, keep)
    everything, some, nothing = runs.values()
    for other in (some, nothing):
        assert torch.equal(everything.hidden, other.hidden)
        assert everything.hessians.keys() == other.hessians.keys()
        for key, hessian in everything.hessians.items():
            assert torch.equal(hessian.sum, other.hessians[key].sum), key
    # attention's output is needed at gate/up, at down and at the end; the mlp's at the end
    assert everything.replayed == 0
    assert 0 < some.replayed < nothing.replayed
    assert nothing.replayed == (3 + 1) * SAMPLES * 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_bf16_units_it_is_the_same_too(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks_module, "bf16_units", lambda: False)
    runs = []
    for keep in (1 << 40, 0):
        model, hidden = open_model("qwen3", DTYPES[dtype], tmp_path / str(keep))
        runs.append(walk_blocks(model, hidden, keep))
    assert torch.equal(runs[0].hidden, runs[1].hidden)
    for key, hessian in runs[0].hessians.items():
        assert torch.equal(hessian.sum, runs[1].hessians[key].sum)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2"])
def test_the_walk_leaves_what_a_plain_forward_gives(family: str, dtype: str, tmp_path: Path) -> None:
    """So a run that is resumed, which only runs the finished blocks, goes on with the same bits."""
    model, hidden = open_model(family, DTYPES[dtype], tmp_path / "walked")
    walked = walk_blocks(model, hidden, 1 << 40)
    model, hidden = open_model(family, DTYPES[dtype], tmp_path / "advanced")
    for number in range(len(model)):
        block = model.load(number)
        for stage in model.structure.stages(number):
            for linear in (f"{model.name(number)}.{name}" for name in stage):
                model.replace(linear, rounded(model.model.get_submodule(linear).weight))
        hidden.advance(block, number)
        model.unload(number)
    advanced = torch.cat([hidden.state(i) for i in range(len(hidden))])
    assert torch.equal(walked.hidden, advanced)


@pytest.mark.parametrize("keep_bytes", [1 << 40, 0])
@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3_text"])
def test_a_stage_sees_its_input_with_the_stages_before_it_replaced(
    family: str, keep_bytes: int, tmp_path: Path
) -> None:
    model, hidden = open_model(family, torch.float32, tmp_path)
    entering = [hidden.state(i).clone() for i in range(len(hidden))]
    seen = walk_blocks(model, hidden, keep_bytes)
    assert seen.order == [(number, stage) for number in range(2) for stage in model.structure.stages(number)]

    block = model.load(0)
    inputs: dict[str, Tensor] = {}
    for stage in model.structure.stages(0):
        hook = block.get_submodule(stage[0]).register_forward_pre_hook(
            lambda _, args: inputs.update(x=args[0])
        )
        for i, state in enumerate(entering):
            with torch.no_grad():
                block(state, *hidden._calls[i][0].args, **hidden._calls[i][0].kwargs)
            torch.testing.assert_close(seen.inputs[0, stage][i], inputs["x"], rtol=1e-5, atol=1e-5)
        hook.remove()
        for name in stage:
            linear = block.get_submodule(name)
            linear.weight = nn.Parameter(rounded(linear.weight), requires_grad=False)


@pytest.mark.parametrize("keep_bytes", [1 << 40, 0])
def test_stages_can_be_passed_over(keep_bytes: int, tmp_path: Path) -> None:
    model, hidden = open_model("llama", torch.float32, tmp_path / "a")
    seen = walk_blocks(model, hidden, keep_bytes, lambda stages: [stages[1], stages[2]])
    assert [stage for _, stage in seen.order] == 2 * [
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
    ]
    model, hidden = open_model("llama", torch.float32, tmp_path / "b")
    for number in range(len(model)):
        block = model.load(number)
        for name in ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj"):
            model.replace(f"{model.name(number)}.{name}", rounded(block.get_submodule(name).weight))
        hidden.advance(block, number)
        model.unload(number)
    assert torch.equal(seen.hidden, torch.cat([hidden.state(i) for i in range(len(hidden))]))


@pytest.mark.parametrize("keep_bytes", [1 << 40, 0])
def test_the_original_can_be_walked_beside_what_it_becomes(keep_bytes: int, tmp_path: Path) -> None:
    model, hidden = open_model("llama", torch.float32, tmp_path / "model")
    alone = walk_blocks(*open_model("llama", torch.float32, tmp_path / "alone"), keep_bytes)
    original, plain = open_model("llama", torch.float32, tmp_path / "original")
    unchanged = HiddenStates(model, IDS)
    for number in range(len(model)):

        def solve(stages: Sequence[Stage], number: int = number) -> None:
            for linear in (f"{model.name(number)}.{name}" for stage in stages for name in stage):
                model.replace(linear, rounded(model.model.get_submodule(linear).weight))

        block = model.load(number)
        walks = [
            BlockWalk(
                one, model.structure.parts[number], len(states),
                lambda i, b=one, s=states, n=number: s.forward(i, b, n),
                action, keep_bytes=keep_bytes, dtype=model.dtype,
            ).reach(model.structure.stages(number), states.put)
            for one, states, action in (
                (block, hidden, solve), (model.unchanging(block), unchanged, None),
            )
        ]  # fmt: skip
        seen: dict[Stage, list[Tensor]] = {}
        for one, before in zip(*walks, strict=True):
            assert one.stage == before.stage and one.x.shape == before.x.shape
            seen.setdefault(one.stage, []).append(one.x.clone())
        for stage, found in seen.items():
            assert all(map(torch.equal, found, alone.inputs[number, stage]))
        plain.advance(original.load(number), number)
    assert torch.equal(alone.hidden, torch.cat([hidden.state(i) for i in range(SAMPLES)]))
    for i in range(SAMPLES):
        assert torch.equal(unchanged.state(i), plain.state(i))
    shares = (alone.hidden - torch.cat([plain.state(i) for i in range(SAMPLES)])).square().sum(-1)
    shares /= torch.cat([plain.state(i) for i in range(SAMPLES)]).square().sum(-1)
    assert hidden.divergence(unchanged) == pytest.approx(shares.mean().sqrt().item(), rel=1e-5)


@pytest.mark.parametrize("room", [True, False])
def test_the_next_block_is_read_meanwhile_where_there_is_room(
    room: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = open_model("llama", torch.bfloat16, tmp_path)
    size = sum(parameter.numel() for parameter in model.blocks[0].parameters())
    size *= 2 if blocks_module.bf16_units() else 4
    monkeypatch.setattr(blocks_module, "free_memory", lambda device: 5 * size if room else 3 * size)
    read, begun = model.weights.read, threading.Event()

    def noting(name: str, device: torch.device) -> Tensor:
        if ".layers.1." in name:
            begun.set()
        return read(name, device)

    monkeypatch.setattr(model.weights, "read", noting)
    model.load(0)
    assert begun.wait(20 if room else 1) == room
    model.load(1)
    assert begun.is_set()


def test_what_is_outside_of_the_blocks_is_there_while_it_is_used(tmp_path: Path) -> None:
    model, hidden = open_model("llama", torch.float32, tmp_path)
    blocks = f"{model.structure.blocks}."

    def there() -> set[str]:
        return {
            name for name, one in model.model.named_parameters() if not one.is_meta and blocks not in name
        }

    ids = hidden.batches[0]
    assert there() == {"model.embed_tokens.weight", "model.norm.weight"}
    before = model.logits(ids, hidden.state(0))
    assert there() == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    model.unload_outside()
    assert not there()
    assert torch.equal(model.logits(ids, hidden.state(0)), before)
    model.unload_outside()
    assert torch.equal(model.embed(ids)[0], hidden.state(0))


def test_the_modules_of_a_block_are_left_as_they_were(tmp_path: Path) -> None:
    model, hidden = open_model("llama", torch.float32, tmp_path)
    walk_blocks(model, hidden, 1 << 40)
    for module in model.blocks.modules():
        assert "forward" not in vars(module)
        assert not module._forward_pre_hooks


ATTENTION = Part(
    "self_attn",
    (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",)),
    pair=True,
)


@pytest.mark.parametrize(
    "parts, why",
    [
        (
            (Part("mlp", (("mlp.gate_proj", "self_attn.k_proj"),)),),
            "mlp.gate_proj of .* reads another input than",
        ),
        # attention has run when the mlp answers: its first stage comes too late
        (
            (ATTENTION, Part("", (ATTENTION.stages[0],))),
            "self_attn.q_proj of .* is not called",
        ),
    ],
)
def test_a_model_that_computes_otherwise_than_was_found_is_refused(
    parts: tuple[Part, ...], why: str, tmp_path: Path
) -> None:
    model, hidden = open_model("llama", torch.float32, tmp_path)
    block = model.load(0)
    walk = BlockWalk(
        block, parts, len(hidden), lambda i: hidden.forward(i, block, 0),
        lambda stages: None, keep_bytes=1 << 40, dtype=model.dtype,
    )  # fmt: skip
    with pytest.raises(SourceError, match=why) as refused:
        for _ in walk.reach([stage for part in parts for stage in part.stages], hidden.put):
            pass
    assert "--skip" in (refused.value.hint or "")


def convert(source: Path, output: Path, **settings: object) -> dict:
    recipe = Recipe(samples=4, sequence_length=64, calibration=str(tiny_models.text(output.parent)))
    job = story.Job(Source(source, source.name, None), output, recipe.changed(settings), CPU)
    return story.quantize(job).manifest


def test_a_skipped_stage_stays_dense(tmp_path: Path) -> None:
    source = tiny_models.save(tiny_models.build("llama"), tmp_path / "source")
    manifest = convert(source, tmp_path / "out", skip=("*.down_proj", "model.layers.0.self_attn.[qkv]_proj"))
    skipped = {f"model.layers.{i}.mlp.down_proj" for i in range(2)}
    skipped |= {f"model.layers.0.self_attn.{name}_proj" for name in "qkv"}
    assert set(rows.dense(manifest)) == skipped
    assert len(rows.worked_on(manifest)) == 14 - len(skipped)
    before, after = Checkpoint.open(source), Checkpoint.open(tmp_path / "out")
    for name in skipped:
        assert torch.equal(before.read(f"{name}.weight"), after.read(f"{name}.weight"))


def test_half_a_stage_cannot_be_skipped(tmp_path: Path) -> None:
    source = tiny_models.save(tiny_models.build("llama"), tmp_path / "source")
    with pytest.raises(ConvertError, match=r"q_proj.*k_proj.*v_proj") as refused:
        convert(source, tmp_path / "out", skip=("*.q_proj",))
    assert refused.value.hint == "add --skip '*.k_proj' --skip '*.v_proj'"


@pytest.mark.parametrize("directory", [None, "spilled"])
def test_hidden_states_in_a_file_are_the_same(
    directory: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, hidden = open_model("llama", torch.bfloat16, tmp_path)
    monkeypatch.setattr(hidden_module, "free_memory", lambda device: 0)
    folder = tmp_path / directory if directory else None
    if folder:
        folder.mkdir()
    other = HiddenStates(model, IDS, folder)
    assert all(torch.equal(hidden.state(i), other.state(i)) for i in range(len(hidden)))
    assert folder is None or not list(folder.iterdir())
