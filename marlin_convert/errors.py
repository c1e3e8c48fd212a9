"""The one family of errors a user can cause; anything else is a bug and shows its traceback."""

from collections.abc import Iterator
from contextlib import contextmanager


class ConvertError(Exception):
    """Something could not be done: what and where, with the numbers; `hint` says what to do about it."""

    def __init__(self, message: str, hint: str | None = None):
        super().__init__(printable(message))
        self.hint = hint
        if hint:
            self.add_note(f"Hint: {hint}")  # where an engine shows a traceback


class OptionError(ConvertError):
    """An option does not take this value: wrong usage, which on the command line has a status of its own."""


class SourceError(ConvertError):
    """The model or checkpoint given cannot be read, or is not valid."""


class FormatError(ConvertError):
    """An on-disk format cannot hold this layer, or does not say this."""


class KernelError(ConvertError):
    """A kernel cannot be compiled, loaded or launched, or is given what it cannot multiply."""


@contextmanager
def reading(path: object) -> Iterator[None]:
    """Turn what the disk refuses while `path` is read into a SourceError."""
    try:
        yield
    except OSError as error:
        raise SourceError(
            f"cannot read '{path}': {error.strerror}.",
            "check its permissions and the disk, then run the same command again.",
        ) from error


def printable(line: str) -> str:
    """A line with nothing hidden: what would move a terminal's cursor, or is no character, is escaped."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in line)


def readable(name: str) -> str:
    """The name of a file as text that another file can hold; what is no UTF-8 in it is escaped.

    Where the locale says ASCII, Python has surrogates for the bytes of every other letter.
    """
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
