"""NVIDIA's compute-sanitizer over a program of ours."""

import os
import shutil
import subprocess
import sys

import pytest

TOOLS = ["memcheck", "racecheck"]


def check(tool: str, program: str) -> None:
    """That one of its tools finds nothing in what a Python program runs on the GPU."""
    found = shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
    if found is None:
        pytest.skip("compute-sanitizer is not installed")
    # memory that torch keeps for later is no error to write to
    alone = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    # racecheck does not see the barriers of mma.cu's teams, each for a part of a block
    but = ["--kernel-name-exclude", "kernel_name=marlin_mma"] if tool == "racecheck" else []
    command = [found, "--tool", tool, *but, "--error-exitcode", "7", sys.executable, "-c", program]
    done = subprocess.run(command, env=alone, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "SUMMARY: 0 errors" in done.stdout or "SUMMARY: 0 hazards displayed" in done.stdout
