"""Engines in environments of their own, asked as subprocesses on a CPU; they answer with JSON.

The environments are built by benchmarks/peers/environments.sh in the directory that INTEROP_ENVIRONMENTS
names, or in .interop at the top of the repository.
"""

import json
import os
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

PROMPTS = ["def __init__(self, name):\n", "import os\nimport sys\n\n", "    for i in range(len("]
TOKENS = 16
# float16 arithmetic in the engines, float32 in the reference
TOLERANCE = 0.01

# What a test is run with is not installed in the engines.
INHERITED = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
# Nothing but this machine is asked for anything, and one gigabyte of keys and values is plenty.
SETTINGS = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
# A core for each.
TWO_RANKS = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}

Answers = list[dict[str, Any]]

needs_avx512 = pytest.mark.skipif(
    "avx512f" not in Path("/proc/cpuinfo").read_text(),
    reason="vLLM's CPU build has int4 products (cpu_gemm_wna16) for AVX-512 only",
)
needs_amx = pytest.mark.skipif(
    "amx_tile" not in Path("/proc/cpuinfo").read_text(),
    reason="vLLM's CPU build has int4 experts (CPUExpertsInt4) for AMX only",
)


def run(*command: object, **environment: str) -> subprocess.CompletedProcess:
    """The finished command, all that it printed in stdout."""
    return subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**INHERITED, **SETTINGS, **environment},
    )


@cache
def programs(environment: str) -> Path:
    """The bin directory of an engine's environment, built if it is not there."""
    directory = Path(os.environ.get("INTEROP_ENVIRONMENTS", ROOT / ".interop")).absolute()
    built = run(ROOT / "benchmarks" / "peers" / "environments.sh", environment, directory)
    assert built.returncode == 0, built.stdout[-4000:]
    return directory / environment / "bin"


def answer(
    engine: str,
    script: str,
    checkpoint: Path,
    out: Path,
    *,
    options: dict[str, Any] | None = None,
    answers: Answers | None = None,
    **environment: str,
) -> tuple[Answers, str]:
    """What an engine answers, and all that it printed; `options` are those of the engine.

    Where `answers` are given, vLLM says what it thinks of those.
    """
    request = out / "request.json"
    asked = {"prompts": PROMPTS, "tokens": TOKENS, "options": options or {}, "answers": answers or []}
    request.write_text(json.dumps(asked))
    written = out / "answers.json"
    written.unlink(missing_ok=True)
    done = run(programs(engine) / "python", HERE / script, checkpoint, request, written, **environment)
    # vLLM's workers have been seen to abort on their way out, when all was answered
    assert written.exists(), done.stdout[-4000:]
    return json.loads(written.read_text()), done.stdout
