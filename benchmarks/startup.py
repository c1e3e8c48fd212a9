"""Start-up: milliseconds of `marlin-convert --help`, median of ten runs, beside a bare Python."""

import statistics
import subprocess
import sys
import time

RUNS = 10


def milliseconds(*arguments: str) -> float:
    """The median time of a Python process with these arguments."""
    seconds = []
    for _ in range(RUNS):
        started = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - started)
    return 1000 * statistics.median(seconds)


print(f"marlin-convert --help  {milliseconds('-m', 'marlin_convert', '--help'):6.0f} ms")
print(f"python -c pass         {milliseconds('-c', 'pass'):6.0f} ms")
