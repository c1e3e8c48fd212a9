"""The terminal of a run: log lines above its bars, names that it cannot show, signals that end the run."""

import logging
import os
import signal
import sys
import threading
from contextlib import nullcontext, suppress
from types import FrameType, TracebackType
from typing import Any, NoReturn

from marlin_convert.errors import printable


class AboveBars(logging.StreamHandler):
    """Writes log lines to stderr; a bar that is on the terminal makes way, and is drawn again below."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        bars = getattr(sys.modules.get("tqdm"), "tqdm", None)  # not imported: there is no bar
        with bars.external_write_mode(file=self.stream) if bars else nullcontext():
            super().emit(record)


def show_every_letter_of_lines() -> None:
    """Escape what would move the cursor in every log line and warning from now on, of any library.

    Libraries put names out of a model's files into their lines, and have handlers of their own.
    """

    def record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        made = logging.LogRecord(*args, **kwargs)
        made.msg, made.args = "\n".join(map(printable, made.getMessage().split("\n"))), None
        return made

    logging.setLogRecordFactory(record)
    logging.captureWarnings(True)


def stand_in_for_closed() -> None:
    """Put the null device where stdin, stdout or stderr was closed; Python has None for such a stream.

    A file that is opened for a checkpoint would get the number, and what a library prints.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # which takes the lowest number
            setattr(sys, name, os.fdopen(number, mode, closefd=False))


def show_every_name() -> None:
    """Escape what the encoding of stdout and stderr has no letter for, in place of failing at it."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a stream of Python's own
            stream.reconfigure(errors="backslashreplace")


def leave(status: int) -> NoReturn:
    """End the process now, whatever its other threads are at; what was printed is printed."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(status)


class Ending:
    """While the context lasts, SIGTERM and SIGHUP end the run as Ctrl-C does: every context is left in turn.

    `status` is what the process then exits with.
    """

    def __init__(self) -> None:
        self._signal: signal.Signals | None = None
        self._ours: list[signal.Signals] = []

    @property
    def begun(self) -> bool:
        """Whether SIGTERM or SIGHUP has come."""
        return self._signal is not None

    @property
    def status(self) -> int:
        """128 and the number of the signal: 143 for SIGTERM, 130 for Ctrl-C."""
        return 128 + (self._signal or signal.SIGINT)

    def __enter__(self) -> "Ending":
        if threading.current_thread() is threading.main_thread():
            for one in (signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(one) == signal.SIG_DFL:  # nohup ignores SIGHUP, and it stays so
                    signal.signal(one, self._end)
                    self._ours.append(one)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for one in self._ours:
            signal.signal(one, signal.SIG_DFL)

    def _end(self, number: int, frame: FrameType | None) -> None:
        self._signal = signal.Signals(number)
        for one in self._ours:  # timeout and others send it twice; cleaning up is not to be cut short
            signal.signal(one, signal.SIG_IGN)
        raise KeyboardInterrupt
