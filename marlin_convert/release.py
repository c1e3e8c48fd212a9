"""What may go up to the Hub: the files of a manifest, each proven to be the one that was verified."""

import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from marlin_convert.card import CARD, Facts, Published, write
from marlin_convert.checkpoint import manifest as manifests
from marlin_convert.checkpoint.reader import PICKLES
from marlin_convert.errors import SourceError

# Read into memory: what was hashed is what goes up, whatever happens to the file.
SMALL = 32_000_000
# Of a larger one, so much is read at a time.
PIECE = 1 << 20

READ_HINT = "check its permissions and the disk, then run the same command again."

Progress = Callable[[Sequence[str]], Iterable[str]]


@dataclass(frozen=True)
class File:
    """A file as it goes up: its bytes or, if it is large, where it is."""

    size: int
    sha256: str
    content: bytes | Path

    def holds(self, secret: bytes) -> bool:
        """Whether these bytes are anywhere in it; SourceError when it cannot be read."""
        if isinstance(self.content, bytes):
            return secret in self.content
        try:
            with os.fdopen(os.open(self.content, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
                end = b""
                while read := file.read(PIECE):
                    piece = end + read  # what begins in one piece may end in the next
                    if secret in piece:
                        return True
                    end = piece[max(0, len(piece) - len(secret) + 1) :]
        except OSError as error:
            raise SourceError(f"'{self.content}' cannot be read ({error.strerror}).", READ_HINT) from error
        return False

    @classmethod
    def of(cls, data: bytes) -> "File":
        """A file of these bytes."""
        return cls(len(data), hashlib.sha256(data).hexdigest(), data)


@dataclass(frozen=True)
class Release:
    """What one branch will hold and its card says, and the files of the directory that stay here."""

    published: Published
    facts: Facts
    checked: dict[str, File]
    left: list[str]

    @cached_property
    def files(self) -> dict[str, File]:
        """Every file, with the card."""
        return {CARD: File.of(write(self.published, self.facts).encode()), **self.checked}

    @property
    def branch(self) -> str:
        """Where it goes."""
        return self.published.branch

    @property
    def format(self) -> str:
        """Its layout."""
        return self.published.format

    @property
    def card(self) -> str:
        """The text of its model card."""
        content = self.files[CARD].content
        assert isinstance(content, bytes)
        return content.decode()


@dataclass(frozen=True)
class Checked:
    """A checkpoint of ours whose files are those of its manifest.

    `files` are those and the manifest, with the report of `verify` where it is about them and a pass; else
    `report` is None and `unverified` says why.
    """

    manifest: dict[str, Any]
    files: dict[str, File]
    report: dict[str, Any] | None
    unverified: str | None
    left: list[str]


def check(directory: Path, progress: Progress) -> Checked:
    """Compare every file with the manifest; SourceError for one that is another, or is none to publish."""
    manifest = manifests.load(directory)
    if manifest is None:
        raise SourceError(
            f"'{directory}' has no {manifests.MANIFEST}: marlin-convert did not write it.",
            "quantize it with marlin-convert; a model that is quantized already is repacked.",
        )
    code = manifest.get("trust_remote_code") is True
    problems = [f"{name!r} {why}" for name in manifest["files"] if (why := _unpublishable(name, code))]
    files = {}
    for name in () if problems else progress(list(manifest["files"])):
        entry = manifest["files"][name]
        try:
            file = files[name] = _read(directory, name)
        except SourceError as error:
            problems.append(str(error))
        else:
            if (file.size, file.sha256) != (entry["size"], entry["sha256"]):
                problems.append(
                    f"{name!r} has {file.size} bytes and sha256 {file.sha256}, "
                    f"not {entry['size']} and {entry['sha256']}"
                )
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise SourceError(
            f"'{directory}' cannot be published: {problems[0]}{more}.",
            "it is not what its manifest says, or not what may go up; make it again.",
        )
    files[manifests.MANIFEST] = _read(directory, manifests.MANIFEST)
    report, unverified = _verification(directory, files)
    left = sorted(manifests.present(directory) - files.keys() - {manifests.VERIFIED})
    return Checked(manifest, dict(sorted(files.items())), report, unverified, left)


def _unpublishable(name: str, code: bool) -> str | None:
    """Why a file of this name is never pushed, whatever the manifest says."""
    path = PurePosixPath(name)
    inside = not path.is_absolute() and ".." not in path.parts and str(path) == name and "\\" not in name
    if not inside or not name.isprintable():
        return "is no path inside the directory"
    if any(part.startswith(".") for part in path.parts):
        return "is hidden"
    if path.suffix.lower() in PICKLES:
        return "is a pickle, which can run code"
    if path.suffix.lower() == ".py" and not code:
        return "is code, and did not come with --trust-remote-code"
    if name in (CARD, manifests.MANIFEST, manifests.VERIFIED):
        return "is for push itself to write"
    return None


def _read(directory: Path, name: str) -> File:
    """Read or hash a regular file that no link leads to; SourceError for anything else."""
    path = directory / name
    folders = [directory / folder for folder in PurePosixPath(name).parents]
    try:
        if any(folder.is_symlink() for folder in folders[:-1]) or not stat.S_ISREG(path.lstat().st_mode):
            raise SourceError(f"{name!r} is a link, or no regular file", "put the file itself there.")
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size <= SMALL:
                return File.of(file.read())
            return File(size, hashlib.file_digest(file, "sha256").hexdigest(), path)
    except OSError as error:
        raise SourceError(f"{name!r} cannot be read ({error.strerror})", READ_HINT) from error


def _verification(directory: Path, files: dict[str, File]) -> tuple[dict[str, Any] | None, str | None]:
    """The report of `verify`, put among `files`; else why these files do not count as verified."""
    if not os.path.lexists(directory / manifests.VERIFIED):
        return None, "verify has not been run on it"
    file = _read(directory, manifests.VERIFIED)
    try:
        assert isinstance(file.content, bytes)
        report = json.loads(file.content)
        status = {name: check["status"] for name, check in report["checks"].items()}
        if report["manifest_sha256"] != files[manifests.MANIFEST].sha256:
            return None, "it has been changed since it was verified"
        missed = [name for name, found in status.items() if found not in ("pass", "skipped")]
        needed = report.get("needed", ("files", "layout", "numbers"))
        missed += [name for name in needed if status.get(name) in (None, "skipped")]
        if missed or not manifests.is_verified(report):
            return None, f"{' and '.join(missed) or 'a required check'} did not pass"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None, f"{manifests.VERIFIED} is no report of verify"
    files[manifests.VERIFIED] = file
    return report, None
