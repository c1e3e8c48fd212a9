"""What a source is taken for: the model that transformers loads, whatever its names and config say."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny_models
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from marlin_convert.checkpoint.linears import Weights
from marlin_convert.checkpoint.reader import Checkpoint
from marlin_convert.checks.divergence import log_probabilities
from marlin_convert.models.blocks import BlockModel
from marlin_convert.models.tree import FORWARD

Tensors = dict[str, Tensor]
Cli = Callable[..., Result]
CPU = torch.device("cpu")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FAST = ("--samples", 4, "--sequence-length", 64, "--device", "cpu")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A qwen3 whose head is its embedding, in float32 so that nothing rounds."""
    model = tiny_models.build("qwen3", tie_word_embeddings=True)
    return tiny_models.save(model, tmp_path_factory.mktemp("sources") / "plain")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.text(tmp_path_factory.mktemp("text"))


@pytest.fixture
def source(plain: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of plain with other tensors, and other words in its config.json."""

    def make(change: Callable[[Tensors], object] = lambda _: None, **config: object) -> Path:
        directory = Path(shutil.copytree(plain, tmp_path / "source", dirs_exist_ok=True))
        tensors = load_file(plain / "model.safetensors")
        changed = change(tensors)
        tensors = changed if isinstance(changed, dict) else tensors
        tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
        words = json.loads((plain / "config.json").read_text()) | config
        (directory / "config.json").write_text(json.dumps(words))
        return directory

    return make


def ids() -> Tensor:
    return torch.randint(4096, (2, 24), generator=torch.Generator().manual_seed(3))


def ours(directory: Path) -> Tensor:
    return log_probabilities(BlockModel(Weights(Checkpoint.open(directory)), CPU, fast=False), ids())


def theirs(directory: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        return model(input_ids=ids(), return_dict=True).logits.log_softmax(-1)


def renamed(change: Callable[[str], str]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {change(name): tensor for name, tensor in tensors.items()}


def own_head(tensors: Tensors) -> None:
    tensors[HEAD] = torch.randn(4096, 128, generator=torch.Generator().manual_seed(5))


def equal_head(tensors: Tensors) -> None:
    tensors[HEAD] = tensors[EMBEDDING].clone()


def only_head(tensors: Tensors) -> None:
    tensors[HEAD] = tensors.pop(EMBEDDING)


def bare(name: str) -> str:
    return name.removeprefix("model.")


@pytest.mark.parametrize(
    "change, config",
    [
        (own_head, {}),
        (equal_head, {}),
        (only_head, {}),
        (own_head, {"tie_word_embeddings": False}),
        (renamed(bare), {}),
        (renamed(lambda name: bare(name) if ".0." in name else name), {}),
        (renamed(lambda name: f"model.{name}"), {}),
    ],
    ids=["own head", "equal head", "only the head", "untied", "bare", "some bare", "prefix twice"],
)
def test_what_is_judged_is_what_transformers_loads(source, change, config) -> None:
    directory = source(change, **config)
    torch.testing.assert_close(ours(directory), theirs(directory), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.{name}",
        lambda name: f"_orig_mod.module.{name}",
        lambda name: name.replace(".mlp.", "._checkpoint_wrapped_module.mlp."),
        lambda name: name.replace("model.", "transformer.", 1),
    ],
)
def test_names_from_inside_a_wrapper_are_read_and_written_in_full(wrap, source, plain, cli, text, tmp_path):
    directory = source(renamed(wrap))
    assert torch.equal(ours(directory), ours(plain))
    outputs = []
    for one in (directory, plain):
        result = cli("quantize", one, "-o", tmp_path / f"{one.name}-4", "--calibration", text, *FAST)
        assert result.exit_code == 0, result.stderr
        outputs.append(load_file(tmp_path / f"{one.name}-4" / "model.safetensors"))
        assert ("under their full names" in result.stderr + result.stdout) == (one is directory)
    assert outputs[0].keys() == outputs[1].keys()
    assert all(torch.equal(tensor, outputs[1][name]) for name, tensor in outputs[0].items())
    # no engine would read them so
    result = cli("verify", directory, "--checks", "files")
    assert result.exit_code == 3 and "names that no engine knows" in result.stdout


def test_a_head_of_its_own_is_written_so_that_all_engines_load_it(source, cli, text, tmp_path) -> None:
    directory = source(own_head)
    output = tmp_path / "out"
    result = cli("quantize", directory, "-o", output, "--calibration", text, *FAST)
    assert result.exit_code == 0 and "tie_word_embeddings" in result.stdout + result.stderr
    assert json.loads((output / "config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(
        load_file(output / "model.safetensors")[HEAD], load_file(directory / "model.safetensors")[HEAD]
    )
    assert cli("verify", output, "--checks", "files").exit_code == 0
    # as the words were, vLLM leaves out the head that transformers takes
    result = cli("verify", directory, "--checks", "files")
    assert result.exit_code == 3 and "vLLM" in result.stdout


def test_a_tied_config_stays_as_it_is(source, cli, text, tmp_path) -> None:
    result = cli("quantize", source(equal_head), "-o", tmp_path / "out", "--calibration", text, *FAST)
    assert result.exit_code == 0, result.stderr
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True


def drop_head(tensors: Tensors) -> None:
    tensors.pop(HEAD, None)


def third_block(tensors: Tensors) -> None:
    tensors |= {name.replace(".1.", ".2."): tensor for name, tensor in tensors.items() if ".1." in name}


def without_second_block(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if ".1." not in name}


def one_twice(tensors: Tensors) -> None:
    tensors["layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"] + 1


def biases(tensors: Tensors) -> None:
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(256)


def adapted(tensors: Tensors) -> Tensors:
    return {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    "change, config, said",
    [
        (drop_head, {"tie_word_embeddings": False}, ["lm_head.weight", "tie_word_embeddings = true"]),
        (third_block, {}, ["num_hidden_layers = 2", "3 blocks"]),
        (without_second_block, {}, ["num_hidden_layers = 2", "1 blocks"]),
        (one_twice, {}, ["layers.0.mlp.up_proj.weight and", "model.layers.0.mlp.up_proj.weight"]),
        (biases, {}, ["q_proj.bias", "attention_bias"]),
        (adapted, {}, ["names like 'base_model.model.", "adapters merged"]),
        (lambda _: None, {"vocab_size": 4000}, ["(4096, 128)", "(4000, 128)"]),
    ],
)  # fmt: skip
def test_what_transformers_would_fill_or_drop_is_refused_by_name(change, config, said, source, cli, tmp_path):
    result = cli("quantize", source(change, **config), "-o", tmp_path / "out", *FAST)
    assert result.exit_code == 1 and not (tmp_path / "out").exists()
    assert all(part in result.stderr for part in said), result.stderr


def test_what_is_no_parameter_is_left_out_and_named(source, plain, cli, text, tmp_path) -> None:
    block = "model.layers.0."
    extra = {
        block + "mlp.up_proj._extra_state": torch.zeros(4, dtype=torch.uint8),
        block + "self_attn._extra_state": torch.zeros(0, dtype=torch.uint8),
        block + "self_attn.rotary_emb.inv_freq": torch.ones(32),
        block + "self_attn.k_scale": torch.ones(1),
        block + "self_attn.v_proj.output_scale": torch.ones(1),
        block + "self_attn.q_proj.bias": torch.zeros(256),
    }
    directory = source(lambda tensors: tensors | extra)
    result = cli("quantize", directory, "-o", tmp_path / "out", "--calibration", text, *FAST)
    assert result.exit_code == 0, result.stderr
    manifest = json.loads((tmp_path / "out" / "marlin_convert.json").read_text())
    assert set(manifest["left_out"]) == set(extra)
    assert all(name in result.stdout + result.stderr for name in extra)
    assert extra.keys().isdisjoint(load_file(tmp_path / "out" / "model.safetensors"))


WORDS = [(key, not value) for key, value in FORWARD.items()]
WORDS += [("_attn_implementation", "flash_attention_2"), ("attn_implementation", "flash_attention_2")]


def test_a_config_of_a_training_with_checkpoints_of_its_gradients(source, cli, text, tmp_path) -> None:
    directory = source(gradient_checkpointing=True)
    result = cli("quantize", directory, "-o", tmp_path / "out", "--calibration", text, *FAST)
    assert result.exit_code == 0, result.stderr


@pytest.mark.parametrize("key, value", WORDS)
def test_what_a_config_asks_a_forward_for_changes_nothing(key, value, source, plain) -> None:
    directory = source(**{key: value})
    assert torch.equal(ours(directory), ours(plain))


@pytest.fixture(scope="module")
def loud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[torch.dtype], Path]]:
    """tinypy's first block in a type, what enters down_proj far beyond what float16 holds."""

    def make(dtype: torch.dtype) -> Path:
        directory = tmp_path_factory.mktemp("loud") / str(dtype).removeprefix("torch.")
        shutil.copytree(tiny_models.TOKENIZER, directory)
        config = json.loads((directory / "config.json").read_text())
        name = "model.layers.0.mlp."
        tensors = load_file(directory / "model.safetensors")
        tensors = {key: tensor for key, tensor in tensors.items() if ".layers." not in key or ".0." in key}
        tensors[name + "up_proj.weight"] = tensors[name + "up_proj.weight"].float() * 2**15
        tensors[name + "down_proj.weight"] = tensors[name + "down_proj.weight"].float() / 2**7
        save_file({key: tensor.to(dtype) for key, tensor in tensors.items()}, directory / "model.safetensors")
        config |= {"num_hidden_layers": 1, "dtype": str(dtype).removeprefix("torch.")}
        (directory / "config.json").write_text(json.dumps(config))
        return directory

    yield make


def test_a_model_that_overflows_in_its_type_is_refused_with_a_way_that_works(loud, cli, text, tmp_path):
    words = ("--format", "gptq", "--calibration", text, *FAST)
    half, brain = loud(torch.float16), loud(torch.bfloat16)
    for source, dtype, way in ((half, "auto", "--dtype bfloat16"), (brain, "float16", "--dtype auto")):
        result = cli("quantize", source, "-o", tmp_path / "out", "--dtype", dtype, *words)
        assert result.exit_code == 1 and "mlp.down_proj are not finite" in result.stderr
        assert way in result.stderr.partition("Hint:")[2]
        output = tmp_path / source.name
        assert cli("quantize", source, "-o", output, *way.split(), *words).exit_code == 0
        assert json.loads((output / "config.json").read_text())["dtype"] == "bfloat16"
        result = cli(
            "verify", output, "--source", brain, "--text", text, "--samples", 2, "--sequence-length", 64
        )
        assert result.exit_code == 0, result.stdout


def test_what_leaves_the_last_block_may_not_overflow_either(loud, cli, text, tmp_path) -> None:
    source = loud(torch.float32)
    path = source / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.mlp."
    tensors[name + "up_proj.weight"] /= 2**15
    tensors[name + "down_proj.weight"] *= 2**23
    save_file(tensors, path)
    words = ("--format", "compressed-tensors", "--skip", "*.mlp.*", "--calibration", text, *FAST)
    result = cli("quantize", source, "-o", tmp_path / "out", "--dtype", "float16", *words)
    assert result.exit_code == 1 and "what model.layers.0 gives is not finite" in result.stderr
    assert "--dtype auto" in result.stderr


def test_verify_does_not_pass_what_overflows_in_an_engine(loud, cli, text, tmp_path) -> None:
    """A repack computes nothing, so that only verify can see it."""
    brain = loud(torch.bfloat16)
    words = ("--calibration", text, *FAST)
    cli("quantize", brain, "-o", tmp_path / "brain", "--format", "gptq", *words)
    result = cli("quantize", tmp_path / "brain", "-o", tmp_path / "half", "--dtype", "float16", *words[2:])
    assert result.exit_code == 0, result.stderr
    result = cli(
        "verify", tmp_path / "half", "--source", brain, "--text", text, "--samples", 2,
        "--sequence-length", 64,
    )  # fmt: skip
    assert result.exit_code == 3
    assert "mlp.down_proj takes or gives" in result.stdout and "float16 cannot hold" in result.stdout
