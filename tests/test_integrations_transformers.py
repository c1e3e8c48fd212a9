"""transformers loads, runs and saves what we write, once marlin_convert is imported."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import packed_models
import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaForCausalLM

from marlin_convert import integrations
from marlin_convert.errors import FormatError, KernelError, SourceError
from marlin_convert.kernels.matmul import Marlin24Linear, MarlinLinear

IDS = torch.arange(2, 42).view(2, 20)


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()
    }


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@torch.inference_mode()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(IDS).logits


@pytest.mark.parametrize("format", ["marlin", "marlin-24"])
def test_it_answers_as_the_dequantized_weights_do(format, quantized, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(quantized(format), dtype=torch.float32)
    dense = packed_models.dequantize(quantized(format), tmp_path / "dense", torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    assert torch.equal(logits(model), logits(reference))
    answers = [one.generate(IDS, do_sample=False, max_new_tokens=16) for one in (model, reference)]
    assert torch.equal(*answers)


@pytest.mark.parametrize(
    "options, groups", [("--format marlin", (2, 5)), ("--format marlin-24 --sparsity 2:4", (1, 1))]
)
def test_widths_that_64_divides_answer_as_the_dequantized_weights_do(options, groups, cli, tmp_path):
    widths = {"hidden_size": 192, "intermediate_size": 320}
    source = tiny_models.save(tiny_models.build("llama", **widths), tmp_path / "source")
    calibration = ("--calibration", tiny_models.text(tmp_path), "--samples", 4, "--sequence-length", 64)
    words = (source, "-o", tmp_path / "out", "--device", "cpu", *options.split(), *calibration)
    assert "14 linears have inputs not divisible by 128" in cli("quantize", *words, "--dry-run").stdout
    assert cli("quantize", *words).exit_code == 0
    assert cli("verify", tmp_path / "out").exit_code == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    dense = packed_models.dequantize(tmp_path / "out", tmp_path / "dense", torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    block = model.model.layers[0]
    assert (len(block.self_attn.o_proj.s), len(block.mlp.down_proj.s)) == groups  # of 256 inputs and of 320
    assert torch.equal(logits(model), logits(reference))


def test_a_mixture_answers_as_the_dequantized_weights_do(mixed, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(mixed, dtype=torch.float32)
    dense = packed_models.dequantize(mixed, tmp_path / "dense", torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    assert torch.equal(logits(model), logits(reference))
    attention, mlps = model.model.layers[0].self_attn, [layer.mlp for layer in model.model.layers]
    assert type(attention.q_proj) is Marlin24Linear and attention.q_proj.bias is not None
    assert type(mlps[0].up_proj) is MarlinLinear and mlps[0].up_proj.bias is not None
    assert type(mlps[1].up_proj) is torch.nn.Linear and type(model.lm_head) is torch.nn.Linear


@pytest.mark.parametrize("dtype", ["auto", torch.float16])
def test_saving_writes_the_same_bytes(dtype, mixed, tmp_path):
    """But for those of a dtype that was asked for."""
    model, told = AutoModelForCausalLM.from_pretrained(mixed, dtype=dtype, output_loading_info=True)
    assert not any(told.values())
    model.generate(IDS, max_new_tokens=2)
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    before, after = tensors(mixed), tensors(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 and before.keys() == after.keys()
    for name, tensor in before.items():
        expected = tensor.half() if dtype != "auto" and tensor.dtype == torch.bfloat16 else tensor
        assert same_bytes(after[name], expected), name
    configs = [json.loads((where / "config.json").read_text()) for where in (mixed, tmp_path)]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]

    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert torch.equal(logits(again), logits(model))


def test_a_model_without_a_head_is_packed_as_well(mixed):
    with_head = AutoModelForCausalLM.from_pretrained(mixed, dtype=torch.float32)
    without = AutoModel.from_pretrained(mixed, dtype=torch.float32)
    assert type(without.layers[0].self_attn.q_proj) is Marlin24Linear
    with torch.inference_mode():
        assert torch.equal(without(IDS)[0], with_head.model(IDS)[0])


def test_a_snapshot_of_the_hub_is_links(quantized, tmp_path):
    snapshot, blobs = tmp_path / "snapshots" / "commit", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in quantized("marlin").iterdir():
        (blobs / path.name).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(blobs / path.name)
    model = AutoModelForCausalLM.from_pretrained(snapshot)
    assert type(model.model.layers[0].mlp.up_proj) is MarlinLinear


@pytest.fixture
def copied(quantized, tmp_path) -> Path:
    """A marlin checkpoint that may be changed."""
    return Path(shutil.copytree(quantized("marlin"), tmp_path / "copied"))


UP = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("dropped", "added", "message"),
    [
        (f"{UP}.s", {}, f"{UP}.s is not in"),
        (f"{UP}.s", {f"{UP}.s": torch.ones(1, 256).half()}, f"{UP}.s has shape"),
        ((".B", ".s"), {}, "none is packed"),
    ],
    ids=["missing", "misshapen", "not packed"],
)
def test_what_would_be_random_is_refused(dropped, added, message, copied):
    kept = {name: tensor for name, tensor in tensors(copied).items() if not name.endswith(dropped)}
    save_file(kept | added, copied / "model.safetensors", {"format": "pt"})
    with pytest.raises(SourceError, match=message):
        AutoModelForCausalLM.from_pretrained(copied)


def test_a_config_that_the_layout_does_not_hold_is_refused(copied):
    config = json.loads((copied / "config.json").read_text())
    config["quantization_config"]["bits"] = 8
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match="bits is 8"):
        AutoModelForCausalLM.from_pretrained(copied)


def test_a_state_dict_is_refused(quantized):
    config = AutoConfig.from_pretrained(quantized("marlin"))
    with pytest.raises(SourceError, match="not from a state_dict"):
        LlamaForCausalLM.from_pretrained(None, config=config, state_dict=tensors(quantized("marlin")))


KNOWN = (
    "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as known; assert 'marlin_24' in known"
)


@pytest.mark.parametrize(
    "program",
    [
        "import marlin_convert, sys; assert not {'torch', 'transformers'} & sys.modules.keys()",
        f"import marlin_convert; {KNOWN}",
        f"import transformers, marlin_convert; {KNOWN}",
        f"import transformers.modeling_utils, marlin_convert; {KNOWN}",
        f"import marlin_convert.integrations.transformers; {KNOWN}",
    ],
    ids=["alone", "first", "after", "late", "itself"],
)
def test_the_import_is_enough_and_imports_nothing(program):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_an_engine_that_does_not_fit_goes_on(caplog, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    integrations.plug_into_vllm()
    [line] = caplog.messages
    assert line.startswith("marlin-convert does not fit this vLLM") and "tried with 0.32.0" in line


SPLIT = """
import os, sys
import marlin_convert
from marlin_convert.errors import SourceError
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1], tp_plan="auto")
    said = "loaded"
except SourceError as error:
    said = str(error)
open(sys.argv[2] + os.environ["RANK"], "w").write(said)
"""


def test_a_model_that_transformers_would_split_is_refused(quantized, tmp_path):
    """Each rank would go on with all of the tensors, and the sums would be wrong."""
    (tmp_path / "split.py").write_text(SPLIT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(tmp_path / "split.py"), str(quantized("marlin")), str(tmp_path / "said-")]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for rank in "01":
        assert "tensor parallelism is not supported" in (tmp_path / f"said-{rank}").read_text()


def test_a_scale_too_large_is_refused_by_name(copied):
    changed = tensors(copied)
    changed[f"{UP}.s"][0, 0] = 9000
    save_file(changed, copied / "model.safetensors", {"format": "pt"})
    with pytest.raises(KernelError, match=f"{UP} has a scale of 9000"):
        AutoModelForCausalLM.from_pretrained(copied)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_casting_a_model_leaves_its_packed_tensors(dtype, mixed, tmp_path):
    before = tensors(mixed)
    model = AutoModelForCausalLM.from_pretrained(mixed).to(dtype)
    model.save_pretrained(tmp_path)
    packed = {name for name in before if name.endswith((".B", ".s", ".B_24", ".B_meta"))}
    assert packed
    for name, tensor in tensors(tmp_path).items():
        assert same_bytes(tensor, before[name]) if name in packed else tensor.dtype == model.dtype, name


@pytest.mark.parametrize("offload_buffers", [False, True])
def test_layers_on_the_disk_answer_the_same_and_are_not_held(offload_buffers, quantized, tmp_path):
    expected = logits(AutoModelForCausalLM.from_pretrained(quantized("marlin")))
    places = dict.fromkeys(("model.embed_tokens", "lm_head", "model.norm", "model.rotary_emb"), "cpu")
    places |= {f"model.layers.{number}": "cpu" if number < 2 else "disk" for number in range(4)}
    model = AutoModelForCausalLM.from_pretrained(
        quantized("marlin"), device_map=places, offload_folder=tmp_path, offload_buffers=offload_buffers
    )
    assert torch.equal(logits(model), expected) and torch.equal(logits(model), expected)
    on_disk = model.model.layers[3].mlp.up_proj
    assert (on_disk.B.is_meta and on_disk._weight is None) == offload_buffers


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("format", ["marlin", "marlin-24"])
def test_layers_on_two_gpus_answer_the_same(format, quantized):
    places = dict.fromkeys(("model.embed_tokens", "lm_head", "model.norm", "model.rotary_emb"), 0)
    places |= {f"model.layers.{number}": number % 2 for number in range(4)}
    answers = []
    for where in ({"": 0}, places):
        model = AutoModelForCausalLM.from_pretrained(quantized(format), device_map=where)
        with torch.inference_mode():
            answers.append(model(IDS.cuda(0)).logits)
        answers.append(model.generate(IDS.cuda(0), do_sample=False, max_new_tokens=8))
    assert torch.equal(answers[0], answers[2]) and torch.equal(answers[1], answers[3])
