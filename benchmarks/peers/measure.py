"""What every peer's runner shares: its command line and the one JSON line it ends with.

Standard library only: it runs before numpy and torch are imported, as they read the thread settings then.
"""

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

STARTED = time.perf_counter()


def arguments(description: str, batch_size: int, settings: Sequence[str]) -> argparse.Namespace:
    """Parse `MODEL_DIR TOKENS OUT_DIR --setting --group-size --device --threads --batch-size`.

    This process's threads are limited, and on a CPU it sees no GPU, which some peers take unasked.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("model", help="directory of the unquantized model")
    parser.add_argument("tokens", type=Path, help="safetensors file of `input_ids`, int64 (samples, length)")
    parser.add_argument("out", type=Path, help="directory for the quantized checkpoint; must not exist")
    parser.add_argument("--setting", choices=settings, default="default")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=batch_size)
    chosen = parser.parse_args()
    if chosen.out.exists():
        parser.error(f"{chosen.out} exists")
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(chosen.threads)
    os.environ["HF_HUB_OFFLINE"] = "1"
    if chosen.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    return chosen


def report(peer: str, distribution: str, setting: str) -> None:
    """Print the run's cost as one JSON object: the whole process, imports and saving included."""
    wall = time.perf_counter() - STARTED
    times = os.times()
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    sys.stdout.flush()
    print(
        json.dumps(
            {
                "peer": peer,
                "version": version(distribution),
                "setting": setting,
                "wall_s": round(wall, 2),
                "cpu_s": round(times.user + times.system + times.children_user + times.children_system, 2),
                "peak_rss_mb": round(peak / 1024, 1),
            }
        ),
        flush=True,
    )
