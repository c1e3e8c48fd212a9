"""Text files that a user gives: read as the characters they hold, or refused with the byte that is none."""

import codecs
from pathlib import Path

from marlin_convert.errors import SourceError, reading

# The longer marks first: that of UTF-32 begins as that of UTF-16 does.
_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}


def read(path: Path) -> str:
    """The text of a file in UTF-8 or, if a byte order mark says so, UTF-16 or UTF-32; the mark is left out.

    Line ends become "\\n". SourceError names the file and the byte offset of what is no character.
    """
    with reading(path):
        data = path.read_bytes()
    mark, encoding = next(
        ((mark, name) for mark, name in _MARKS.items() if data.startswith(mark)), (b"", "utf-8")
    )
    try:
        text = data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        at = len(mark) + error.start
        raise SourceError(
            f"'{path}' is not {encoding.upper()}: byte {at} (0x{data[at]:02x}) is no part of a character.",
            "save it as UTF-8, for instance with iconv -f GBK -t UTF-8 if it is Chinese text in GBK.",
        ) from error
    if "\0" in text:
        raise SourceError(
            f"'{path}' holds a NUL, after {text.index(chr(0))} characters: it is no text, or it is UTF-16 "
            "without a byte order mark.",
            "save it as UTF-8, for instance with iconv -f UTF-16LE -t UTF-8.",
        )
    return text.replace("\r\n", "\n").replace("\r", "\n")
