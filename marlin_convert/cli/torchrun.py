"""A command that torchrun has started several times: one of the processes speaks, and all end together."""

import logging
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import click

from marlin_convert.cli import terminal
from marlin_convert.cli.output import show_error
from marlin_convert.errors import ConvertError, OptionError

if TYPE_CHECKING:
    from marlin_convert.ranks import Ranks


def count() -> int:
    """How many processes torchrun has started, on all machines; 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def is_first() -> bool:
    """Whether this process is the one that speaks."""
    return count() == 1 or os.environ["RANK"] == "0"


def begin(command: str) -> None:
    """Let one process log what all have to say; ConvertError where several have the work of one."""
    if not is_first():
        logging.disable()
    if count() > 1 and command not in ("quantize", "sparsify", "verify"):
        if not is_first():
            terminal.leave(1)
        raise ConvertError(
            f"{command} is the work of one process, torchrun started {count()}.", "run it without torchrun."
        )


def show(error: click.ClickException) -> None:
    """Print wrong usage, once."""
    if is_first():
        error.show()


@contextmanager
def ranks(*, resumes: bool = True) -> Iterator["Ranks"]:
    """The processes that torchrun has started, while the context lasts; one that fails ends all of them.

    Then one of them says why, and nobody waits for threads that talk to the others. `resumes` is whether the
    command takes --resume.
    """
    from marlin_convert.ranks import ALONE, Ranks

    if count() == 1:
        yield ALONE
        return
    found = Ranks.join()
    try:
        yield found
        found.part()
    except BaseException as error:
        for one in (signal.SIGTERM, signal.SIGINT):  # torchrun tells the others to end
            signal.signal(one, signal.SIG_IGN)
        terminal.leave(_end(found, error, resumes))


def _end(ranks: "Ranks", error: BaseException, resumes: bool) -> int:
    """Say why, if it is for this rank to say; the exit status."""
    from marlin_convert.ranks import RankLost

    interrupted = isinstance(error, KeyboardInterrupt)
    why = None if interrupted or isinstance(error, RankLost) else str(error) or type(error).__name__
    said = ranks.last_words(why)
    with suppress(OSError):  # the terminal may be what has gone
        if said is not None and said is why and not isinstance(error, ConvertError):
            click.echo(f"rank {ranks.rank} failed:", err=True)
            traceback.print_exception(error)
        if said is not None:
            who = f"rank {ranks.rank}: " if said is why and not ranks.first else ""
            hint = getattr(error, "hint", None) if said is why else None
            if not hint and resumes:
                hint = "what is finished can be gone on from: --resume."
            show_error(ConvertError(who + said, hint))
        elif interrupted and ranks.first:
            click.echo("Interrupted.", err=True)
            if resumes:
                click.echo("Hint: go on with the same command and --resume.", err=True)
    return 130 if interrupted and said is None else 2 if isinstance(error, OptionError) else 1


def device(said: str) -> str:
    """The --device of this process: of several each takes the GPU of its own number on its machine."""
    if count() == 1 or said == "cpu":
        return said
    import torch

    if said not in ("auto", "cuda"):
        raise OptionError(
            f"--device {said!r} is one device, torchrun started {count()} processes: each takes its own."
        )
    number, on_this_machine = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    gpus = torch.cuda.device_count()
    if said == "auto" and not gpus:
        return "cpu"
    if on_this_machine > gpus:
        raise ConvertError(
            f"torchrun started {on_this_machine} processes here, and there are {gpus} GPUs.",
            f"--nproc-per-node {gpus}." if gpus else "pass --device cpu.",
        )
    torch.cuda.set_device(number)
    return f"cuda:{number}"


def advise(said: str, device: Any, most: int | None = None) -> None:
    """Say how to use all GPUs of this machine, where one of several is used and --device chose none.

    No more than `most` processes can share the work, if that is given.
    """
    import torch

    one_of_several = device.type == "cuda" and said in ("auto", "cuda") and count() == 1
    gpus = torch.cuda.device_count() if one_of_several else 1
    used = min(gpus, most or gpus)
    if used > 1:
        logging.getLogger("marlin_convert").info(
            "one of %d GPUs is used; %s of them: torchrun --nproc-per-node %d -m marlin_convert %s",
            gpus, "all" if used == gpus else used, used, shlex.join(sys.argv[1:]),
        )  # fmt: skip
