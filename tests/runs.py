"""Command lines in processes of their own, which are killed or meet a failing disk where they are told."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

# What a process that is started does to the product before it runs: something before (-n) or after (n) the
# n-th call of a function, and constants that are others.
CHANGES = """
def at_call(place, call, do):
    module, name = place.split(":")
    holder = importlib.import_module(module)
    *path, name = name.split(".")
    for part in path:
        holder = getattr(holder, part)
    function, calls = getattr(holder, name), 0
    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == -call:
            do()
        result = function(*args, **kwargs)
        if calls == call:
            do()
        return result
    setattr(holder, name, counted)

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

def set_constant(place, value):
    module, name = place.split(":")
    setattr(importlib.import_module(module), name, value)
"""

# Starts a process for every line it is given, without importing torch each time.
STARTER = (
    """
import ctypes, importlib, json, os, signal, sys
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast
from marlin_convert import calibration, estimate, report
from marlin_convert.commands import quantize, verify
from marlin_convert.cli.main import main
from marlin_convert.models import hidden

"""
    + CHANGES
    + """
print("ready", flush=True)
for line in sys.stdin:
    order = json.loads(line)
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), 1)
        os.dup2(1, 2)
        for place, value in order["constants"].items():
            set_constant(place, value)
        if order["kill"]:
            at_call(*order["kill"], kill)
        if fault := order["fault"]:
            hidden.free_memory = lambda device: 0  # so that everything that can go to the disk does
            ctypes.CDLL(None).failing_disk(
                os.fsencode(fault["under"]), fault["kind"], fault["first"], fault["last"], fault["outcome"],
                os.fsencode(fault["trace"]),
            )
        if order["seconds"] is not None:  # SIGALRM ends a process as abruptly as SIGKILL does
            signal.setitimer(signal.ITIMER_REAL, order["seconds"])
        try:
            main(order["words"])
            status = 0
        except SystemExit as end:
            status = end.code
        sys.stdout.flush()
        os._exit(status)  # taking torch down would take longer than the whole run
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""
)


# The same of command lines as a shell has them, in an environment of their own: of what is imported before
# nothing heeds it.
BEGINNER = """
import atexit, json, os, runpy, sys, tempfile, traceback
import torch._dynamo, torch.distributed.tensor, torch.onnx

print("ready", flush=True)
for line in sys.stdin:
    order = json.loads(line)
    child = os.fork()
    if not child:
        os.chdir(order["directory"])
        os.environ.clear()
        os.environ.update(order["environment"])
        tempfile.tempdir = None
        for number, path in enumerate((os.devnull, order["stdout"], order["stderr"])):
            os.dup2(os.open(path, os.O_WRONLY if number else os.O_RDONLY), number)
        sys.argv = ["marlin_convert", *order["words"]]
        status = 0
        try:
            runpy.run_module("marlin_convert", run_name="__main__", alter_sys=True)
        except SystemExit as end:
            status = end.code
        except BaseException:
            traceback.print_exc()
            status = 1
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


@dataclass(frozen=True)
class Fault:
    """What failing_disk.c is told; the calls are in the file `trace` then, a line each."""

    under: str
    kind: int
    first: int
    last: int
    outcome: int
    trace: str


class Start(Protocol):
    """Runs a command line; the exit status, and all that was printed.

    It is killed before (-n) or after (n) the n-th call of the function `kill`, or after so many `seconds`.
    `constants` are of our modules, to be other than they are.
    """

    def __call__(
        self,
        *words: object,
        kill: tuple[str, int] | None = None,
        seconds: float | None = None,
        fault: Fault | None = None,
        constants: dict[str, Any] | None = None,
    ) -> tuple[int, str]: ...


@contextmanager
def forks(program: str, **environment: str) -> Iterator[Callable[[dict[str, Any]], int]]:
    """A process that forks for every order; what is yielded gives one, and waits for its exit status.

    The `program` says a line when it is ready, and the exit status of every order.
    """
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"} | environment,  # as the command itself has it
    ) as server:  # fmt: skip
        assert server.stdin and server.stdout
        asked, answers = server.stdin, server.stdout
        answers.readline()

        def status(order: dict[str, Any]) -> int:
            print(json.dumps(order), file=asked, flush=True)
            return int(answers.readline())

        yield status
        asked.close()


@contextmanager
def starter(directory: Path, **environment: str) -> Iterator[Start]:
    """A process that forks for every command line; `directory` is for its log."""
    log = directory / "log.txt"
    with forks(STARTER, **environment) as status:

        def start(
            *words: object,
            kill: tuple[str, int] | None = None,
            seconds: float | None = None,
            fault: Fault | None = None,
            constants: dict[str, Any] | None = None,
        ) -> tuple[int, str]:
            order = {
                "words": [str(word) for word in words],
                "log": str(log),
                "kill": kill,
                "seconds": seconds,
                "fault": fault and asdict(fault),
                "constants": constants or {},
            }
            return status(order), log.read_text()

        yield start


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below a directory."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def earlier_output(directory: Path) -> dict[str, bytes]:
    """Make what an earlier run might have written, of a file and its manifest; its contents."""
    directory.mkdir(parents=True)
    (directory / "earlier.txt").write_text("an earlier output")
    entry = {"sha256": hashlib.sha256(b"an earlier output").hexdigest(), "size": 17}
    (directory / "marlin_convert.json").write_text(json.dumps({"files": {"earlier.txt": entry}}))
    return contents(directory)


def partial(output: Path) -> Path:
    """Where a run works until its output is complete."""
    return output.with_name(output.name + ".partial")


def blocks_done(output: Path) -> int:
    """How many blocks an unfinished run has finished."""
    try:
        return json.loads((partial(output) / "progress.json").read_text())["done"]["blocks"]
    except FileNotFoundError:
        return 0


class Begin(Protocol):
    """Runs a command line in a directory and an environment, to its end."""

    def __call__(
        self, *words: object, directory: Path, environment: dict[str, str]
    ) -> subprocess.CompletedProcess[str]: ...


@contextmanager
def beginner(log: Path) -> Iterator[Begin]:
    """A process that forks for every command line, as `python -m marlin_convert` with torch imported."""
    with forks(BEGINNER) as status:

        def begin(
            *words: object, directory: Path, environment: dict[str, str]
        ) -> subprocess.CompletedProcess[str]:
            said = {name: log / name for name in ("stdout", "stderr")}
            for path in said.values():
                path.write_text("")
            order = {
                "words": [str(word) for word in words],
                "directory": str(directory),
                "environment": environment,
                **{name: str(path) for name, path in said.items()},
            }
            ended = status(order)
            return subprocess.CompletedProcess(words, ended, *(path.read_text() for path in said.values()))

        yield begin
