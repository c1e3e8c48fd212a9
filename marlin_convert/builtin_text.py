"""The text that a model is calibrated on where none is given: Python and English, most of it out of CPython.

A fifth is other English prose, in marlin_convert/texts: without it models lose more of their English
(benchmarks/RESULTS.md).
"""

import gzip
import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

OTHER = Path(__file__).parent / "texts" / "other.txt.gz"

# Characters of a piece: a text of few tokens has many documents, and of none all there is.
PIECE = 8192

# Directories of the standard library that hold tests, tools or generated tables rather than prose and code.
# What a build writes down of its machine (_sysconfigdata, config-*) is left out too, so that the same version
# of Python gives the same text everywhere.
_LEFT_OUT = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "lib2to3",
    "encodings",
    "pydoc_data",
    "__pycache__",
}


def pieces() -> Iterator[str]:
    """What is there to calibrate on, cut at ends of lines."""
    for document in (*python(held_out=False), *other()):
        start = 0
        while start < len(document):
            end = document.rfind("\n", start + 1, start + PIECE) + 1
            stop = len(document) if len(document) - start <= PIECE else end or start + PIECE
            yield document[start:stop]
            start = stop


def python(*, held_out: bool) -> Iterator[str]:
    """The language reference and library sources of this CPython; a fourth of them, by name, is held out."""
    import pydoc_data.topics

    library = Path(sysconfig.get_path("stdlib"))
    sources = sorted(
        path.relative_to(library).as_posix()
        for path in library.rglob("*.py")
        if not _LEFT_OUT.intersection(path.relative_to(library).parts)
        and not path.name.startswith("_sysconfigdata")
        and not path.parent.name.startswith("config-")
    )
    topics = sorted(pydoc_data.topics.topics)
    for topic in topics:
        if _is_held_out(topic) == held_out:
            yield pydoc_data.topics.topics[topic]
    for name in sources:
        if _is_held_out(name) == held_out:
            yield (library / name).read_text("utf-8", errors="replace")


def _is_held_out(name: str) -> bool:
    """Whether a document is kept from calibration: the same wherever and beside whatever it is installed."""
    return hashlib.sha256(name.encode()).digest()[0] % 4 == 0


def other() -> list[str]:
    """The documents that Python does not carry."""
    return gzip.decompress(OTHER.read_bytes()).decode().split("\f")
