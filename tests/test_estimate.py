"""The time that a plan says, on processors with units for bfloat16 and on those without."""

import json
import os
import subprocess
import sys

import pytest
import tiny_models
from transformers import CONFIG_MAPPING

from marlin_convert import recipe
from marlin_convert.checkpoint.linears import Weights
from marlin_convert.checkpoint.reader import Checkpoint
from marlin_convert.estimate import on_gpu
from marlin_convert.plan import make_plan

# One conversion: what was estimated, what it took.
RUN = """
import json, sys
from pathlib import Path
import torch
from marlin_convert import estimate, recipe
from marlin_convert.hub import Source
from marlin_convert.models import blocks
from marlin_convert.commands.quantize import Job, plan_job, quantize
source, text, output, units = sys.argv[1:]
if not int(units):
    blocks.bf16_units = estimate.bf16_units = lambda: False  # the processor's own answer
settings = {"samples": 8, "sequence_length": 256, "calibration": text, "format": "gptq"}
job = Job(
    Source(Path(source), "source", None), Path(output),
    recipe.load(recipe.DEFAULT).changed(settings), torch.device("cpu"),
)
expected = estimate.estimate(plan_job(job)[1], job.device)
print(json.dumps([expected.seconds, quantize(job).seconds]))
"""


@pytest.mark.parametrize("units", [True, False])
def test_the_seconds_are_of_the_right_size(units, tinypy, tmp_path) -> None:
    """Within a factor of two on a machine at rest, which tests do not have; it was a hundredfold off."""
    narrow = {} if units else {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    text = tiny_models.text(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", RUN, tinypy, text, tmp_path / "out", str(int(units))],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"} | narrow, check=True,
    )  # fmt: skip
    expected, took = json.loads(done.stdout)
    assert took / 5 < expected < 5 * took


# Shapes and tokens that were timed on H100s (benchmarks/RESULTS.md), and the seconds of the work without the
# imports: on two hosts; before the products of experts were made as one, and of the whole command. Last what
# the plan says.
MEASURED = {
    "four layers of Qwen3-30B-A3B": (
        "qwen3_moe",
        {
            "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128,
            "num_experts_per_tok": 8, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
            "num_hidden_layers": 4,
        },
        256, 15.9, 24.0, 20.0,
    ),
    "a layer of DeepSeek-V3": (
        "deepseek_v3",
        {
            "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
            "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 8,
            "topk_group": 4, "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536,
            "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
            "first_k_dense_replace": 0, "num_hidden_layers": 1,
        },
        64, 40.8, 51.2, 37.4,
    ),
}  # fmt: skip
# Multiply-adds a second of bfloat16 on an H100, as large products reach them.
H100 = 3.5e14


@pytest.mark.parametrize("case", MEASURED)
def test_the_seconds_of_measured_mixtures(case, tmp_path) -> None:
    """Between what was seen, or 10 % less, and what CHANGELOG says; the rate is that of such a card."""
    model_type, shape, samples, least, most, said = MEASURED[case]
    config = CONFIG_MAPPING[model_type](**shape, vocab_size=4096, dtype="bfloat16")
    source = tiny_models.headers_only(config, tmp_path)
    settings = {"samples": samples, "sequence_length": 2048, "format": "compressed-tensors"}
    plan = make_plan(Weights(Checkpoint.open(source)), recipe.load(recipe.DEFAULT).changed(settings))
    assert 0.9 * least < on_gpu(plan, H100) < most
    assert on_gpu(plan, H100) == pytest.approx(said, rel=0.01)
