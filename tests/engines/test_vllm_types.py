"""vLLM loads what we write of models of many types, towers included, and answers as it should (make engines).

Its own loader is told to insist that every parameter is in the files: what it takes for packed and is not, or
knows by another name, would go on with whatever the memory held.
"""

import json
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import served_models
import torch
from engine_programs import (
    PROMPTS,
    TOLERANCE,
    TWO_RANKS,
    Answers,
    answer,
    needs_amx,
    needs_avx512,
    programs,
    run,
)
from transformers import AutoTokenizer

pytestmark = [pytest.mark.engines, needs_avx512]

# vLLM refuses float16 for Gemma 3, and its mixer of Qwen3.5 on a CPU takes nothing else; its float16
# attention of DeepSeek on a CPU is off by nats
BFLOAT16 = ("gemma3_text", "gemma3", "qwen3_5_text", "qwen3_5", "deepseek_v3")
EXPERTS = ("qwen3_moe", "mixtral")
ELSEWHERE = (*EXPERTS, "deepseek_v3", "llama4_text")  # in tests of their own, below
# A token whose router is near a tie goes to one expert or another by a rounding: the share of the others.
# Two experts of a layer changed for one another, it is off by 0.13 of Qwen3's, 0.46 of Mixtral's.
NO_TIE = 0.9
ON_TORCHVISION = (*served_models.PICTURES, "qwen3_5_text")
STRICT = {"model_loader_extra_config": {"enable_weights_track": True}, "enforce_eager": True}


@cache
def has_torchvision() -> bool:
    return run(programs("vllm") / "python", "-c", "import torchvision").returncode == 0


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> Callable[[str], Path]:
    """A model of a type."""

    @cache
    def make(model_type: str) -> Path:
        return served_models.make(model_type, tmp_path_factory.mktemp("types") / model_type)

    return make


def convert(source: Path, output: Path, **settings: object) -> Path:
    """What `quantize` makes of a model by a recipe of these settings."""
    recipe = output.with_name("recipe.yaml")
    recipe.write_text(json.dumps({"samples": 4, "sequence_length": 64, **settings}))
    words = ("quantize", source, "-o", output, "--recipe", recipe, "-q")
    done = run(sys.executable, "-m", "marlin_convert", *words)
    assert done.returncode == 0, done.stdout
    return output


def ask(
    checkpoint: Path,
    model_type: str,
    out: Path,
    *,
    tracked: bool = True,
    answers: Answers | None = None,
    **environment: str,
) -> Answers:
    """vLLM's answers, or what it thinks of others', in the type that it takes."""
    strict = STRICT if tracked else {"enforce_eager": True}
    if answers:  # which of them go through the model together is a matter of time, and moves bfloat16
        strict = {**strict, "max_num_seqs": 1}
    dtype = "bfloat16" if model_type in BFLOAT16 else "float16"
    options = {"dtype": dtype, **strict}
    told, _ = answer(
        "vllm", "vllm_generate.py", checkpoint, out, options=options, answers=answers, **environment
    )
    return told


def tolerance(model_type: str) -> float:
    """Numbers of bfloat16 are eight times coarser."""
    return (8 if model_type in BFLOAT16 else 1) * TOLERANCE


@pytest.mark.parametrize("format", ["gptq", "compressed-tensors", "marlin"])
@pytest.mark.parametrize("model_type", [one for one in served_models.CHANGES if one not in ELSEWHERE])
def test_vllm_answers_right_of_a_type(model_type, format, source, plugin, deviation, tmp_path):
    if model_type in ON_TORCHVISION and not has_torchvision():
        pytest.skip(
            "no torchvision beside vLLM, whose models with a tower import it: build .interop/vllm anew"
        )
    checkpoint = convert(source(model_type), tmp_path / format, format=format)
    answers = ask(checkpoint, model_type, tmp_path, **(plugin if format == "marlin" else {}))
    assert deviation(answers, checkpoint) < tolerance(model_type)


@pytest.mark.parametrize(
    "format",
    [*(pytest.param(one, marks=needs_amx) for one in ("gptq", "compressed-tensors")), "marlin"],
)
@pytest.mark.parametrize("model_type", EXPERTS)
def test_vllm_answers_right_of_a_mixture(model_type, format, source, plugin, deviation, tmp_path):
    checkpoint = convert(source(model_type), tmp_path / format, format=format)
    # of experts in gptq vLLM makes biases, and takes away those that are not in the files
    environment = plugin if format == "marlin" else {}
    answers = ask(checkpoint, model_type, tmp_path, tracked=format != "gptq", **environment)
    assert deviation(answers, checkpoint, NO_TIE) < 2 * TOLERANCE


@pytest.mark.parametrize("options", [{}, {"enable_expert_parallel": True}], ids=["matrices", "experts"])
@pytest.mark.parametrize("model_type", EXPERTS)
def test_vllm_with_the_plugin_splits_experts(model_type, options, source, plugin, deviation, tmp_path):
    """Each of two ranks has half of every expert, or half of the experts."""
    settings = {"format": "marlin", "group_size": 64, "skip": ["*.self_attn.*"]}
    checkpoint = convert(source(model_type), tmp_path / "marlin", **settings)
    options = {"dtype": "float16", "enforce_eager": True, "tensor_parallel_size": 2, **options}
    answers, _ = answer(
        "vllm", "vllm_generate.py", checkpoint, tmp_path, options=options, **plugin, **TWO_RANKS
    )
    assert deviation(answers, checkpoint, NO_TIE) < 2 * TOLERANCE


def test_vllm_with_the_plugin_answers_right_of_grouped_routing(source, plugin, plain, tmp_path):
    """DeepSeek's, for which its CPU build has no kernel of its own; beside experts that see all tokens.

    Its attention there is off by tenths of a nat in bfloat16, and answers NaN with AMX where it is packed: so
    it stays dense, and vLLM is asked what it thinks of the same text with plain weights.
    """
    settings = {"format": "marlin", "skip": ["*.self_attn.*"]}
    checkpoint = convert(source("deepseek_v3"), tmp_path / "marlin", **settings)
    prompts = AutoTokenizer.from_pretrained(checkpoint)(PROMPTS).input_ids
    text: Answers = [{"prompt": prompt[:1], "tokens": prompt[1:]} for prompt in prompts]
    one = ask(checkpoint, "deepseek_v3", tmp_path, answers=text, **plugin)
    other = ask(plain(checkpoint, torch.bfloat16), "deepseek_v3", tmp_path, answers=text)
    thought = (torch.tensor([p for at in answers for p in at["logprobs"]]) for answers in (one, other))
    off = (next(thought) - next(thought)).abs().sort().values
    assert off.isfinite().all()
    assert off[int(NO_TIE * len(off))] < 2 * TOLERANCE


@pytest.mark.parametrize(
    "format, skip",
    [("compressed-tensors", []), ("gptq", ["*.q_proj", "*.k_proj", "*.v_proj"])],
    ids=["packed", "dense"],
)
def test_vllm_answers_right_of_what_it_reorders(format, skip, source, deviation, tmp_path):
    """Q and k of Llama 4; packed in gptq they are refused."""
    checkpoint = convert(source("llama4_text"), tmp_path / format, format=format, skip=skip)
    answers = ask(checkpoint, "llama4_text", tmp_path)
    assert deviation(answers, checkpoint) < tolerance("llama4_text")


@pytest.mark.parametrize("format", ["gptq", "compressed-tensors"])
def test_vllm_answers_right_of_a_mixer_with_groups_of_its_own(format, source, deviation, tmp_path):
    if not has_torchvision():
        pytest.skip("no torchvision beside vLLM, whose Qwen3.5 imports it: build .interop/vllm anew")
    overrides = {"*.linear_attn.*": {"group_size": 64}}
    checkpoint = convert(source("qwen3_5_text"), tmp_path / format, format=format, overrides=overrides)
    answers = ask(checkpoint, "qwen3_5_text", tmp_path)
    assert deviation(answers, checkpoint) < tolerance("qwen3_5_text")
