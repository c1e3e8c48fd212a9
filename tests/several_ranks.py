"""Command lines in processes that torchrun starts, one of which may be killed or fail where it is told."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from runs import CHANGES, forks

# torchrun's own launcher, in a process that has imported everything and forks: for every line it is given a
# launcher, which forks the ranks.
STARTER = (
    """
import errno, importlib, json, os, signal, sys
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast
from marlin_convert import report
from marlin_convert.commands import quantize, verify
from marlin_convert.cli.main import main

"""
    + CHANGES
    + """
def fail():
    raise MemoryError("no memory is left")

def freeze():
    os.kill(os.getpid(), signal.SIGSTOP)

def full():
    raise OSError(errno.ENOSPC, "No space left on device")

def rank(order):
    for one in (signal.SIGTERM, signal.SIGHUP):  # the launcher's own, inherited
        signal.signal(one, signal.SIG_DFL)
    for place, value in order["constants"].items():
        set_constant(place, value)
    if order["stop"] and os.environ["RANK"] == str(order["stop"][0]):
        _, place, call, how = order["stop"]
        at_call(place, -call, {"kill": kill, "freeze": freeze, "fail": fail, "full": full}[how])
    try:
        main([word.replace("{rank}", os.environ["RANK"]) for word in order["words"]])
        status = 0
    except SystemExit as end:
        status = end.code or 0
    sys.stdout.flush()
    if status:  # of a function that succeeds the launcher wants to see that it returns
        os._exit(status)

print("ready", flush=True)
for line in sys.stdin:
    order = json.loads(line)
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600), 1)
        os.dup2(1, 2)
        config = LaunchConfig(
            min_nodes=1, max_nodes=1, nproc_per_node=order["ranks"], run_id="test", rdzv_backend="c10d",
            rdzv_endpoint="localhost:0", max_restarts=0, monitor_interval=0.1, start_method="fork",
        )
        try:
            elastic_launch(config, rank)(order)
            status = 0
        except ChildFailedError:
            status = 1
        os._exit(status)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""
)


class StartRanks(Protocol):
    """Runs a command line in several ranks; torchrun's exit status, and all that was printed.

    A "{rank}" in a word is the number of the rank. `stop` is one that stops in the n-th call of a function:
    (rank, function, n, how), how being "kill", "freeze", "fail" (for want of memory) or "full" (a disk).
    `constants` are of our modules, to be other than they are.
    """

    def __call__(
        self,
        ranks: int,
        *words: object,
        stop: tuple[int, str, int, str] | None = None,
        constants: dict[str, Any] | None = None,
    ) -> tuple[int, str]: ...


@contextmanager
def ranks_starter(directory: Path, **environment: str) -> Iterator[StartRanks]:
    """A process that starts ranks for every command line; `directory` is for its log."""
    log = directory / "log.txt"
    # counting GPUs through CUDA would initialize it here, and forked processes could not use it
    with forks(STARTER, PYTORCH_NVML_BASED_CUDA_CHECK="1", **environment) as status:

        def start(
            ranks: int,
            *words: object,
            stop: tuple[int, str, int, str] | None = None,
            constants: dict[str, Any] | None = None,
        ) -> tuple[int, str]:
            order = {
                "ranks": ranks,
                "words": [str(word) for word in words],
                "log": str(log),
                "stop": stop,
                "constants": constants or {},
            }
            return status(order), log.read_text()

        yield start


def torchrun(ranks: int, *words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command line as a user does, with torchrun; `--standalone`, for other tests run beside it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return subprocess.run(
        [*command, "-m", "marlin_convert", *map(str, words)],
        capture_output=True, text=True, env=os.environ | environment,
    )  # fmt: skip
