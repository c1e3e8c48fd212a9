"""The time that a plan says, on processors with units for bfloat16 and on those without."""

import json
import os
import subprocess
import sys

import pytest
import tiny_models

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
