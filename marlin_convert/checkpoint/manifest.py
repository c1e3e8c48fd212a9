"""marlin_convert.json, which says of every file of an output what it must be."""

import hashlib
import os
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from marlin_convert.checkpoint import older_manifest
from marlin_convert.checkpoint.reader import belongs, json_file
from marlin_convert.errors import SourceError, reading
from marlin_convert.matrix import Fate, by_name, fate_of

MANIFEST = "marlin_convert.json"
# What `verify` found, beside the manifest and about it; no file of it.
VERIFIED = "marlin_convert_verify.json"

# How the reports begin that --report writes: the page of a conversion, and what `verify` found.
PAGE = "<!doctype html><html lang=en><meta charset=utf-8><meta name=generator content=marlin-convert>"
REPORTS = (PAGE, '{\n  "tool": "marlin-convert ')

# What a manifest calls the sparsity of linears of which two weights in four are left.
SPARSITY = "2:4"

# What git and the Hugging Face client add to a copy of a repository; no part of what we wrote.
COPY_KEEPING = (".cache", ".git", ".gitattributes")


def load(directory: Path) -> dict[str, Any] | None:
    """Read the manifest of `directory`, None if it has none; raises SourceError if it is no manifest."""
    path = directory / MANIFEST
    if not os.path.lexists(path):
        return None
    manifest = json_file(directory, MANIFEST)
    if "linears" in manifest:
        beside = json_file(directory, "config.json") if (directory / "config.json").is_file() else {}
        manifest["matrices"] = older_manifest.rows(manifest, beside)
    files = manifest.get("files")
    if not isinstance(files, dict):
        raise SourceError(f"'{path}' is not a manifest: it lists no files.")
    for name, entry in files.items():
        if (
            not isinstance(entry, dict)
            or type(entry.get("size")) is not int
            or not isinstance(entry.get("sha256"), str)
        ):
            raise SourceError(f"'{path}' gives no size and sha256 for {name!r}.")
    rows = manifest.setdefault("matrices", [])
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise SourceError(f"'{path}' is not a manifest: its matrices are no list of rows.")
    after = manifest.setdefault("divergence", [])
    if not isinstance(after, list) or not all(type(one) in (int, float) for one in after):
        raise SourceError(f"'{path}' is not a manifest: its divergence is no list of numbers.")
    for row in rows:
        try:
            fate_of(row)
        except ValueError as error:
            raise SourceError(
                f"'{path}' says of {row.get('name')!r} what makes no matrix: {error}."
            ) from error
    return manifest


def fates(manifest: Mapping[str, Any] | None) -> dict[str, Fate]:
    """What has become of every matrix of a manifest that was loaded, by name; empty without one."""
    return by_name(fate_of(row) for row in (manifest or {}).get("matrices", ()))


def is_verified(report: Mapping[str, Any]) -> bool:
    """Whether a report of `verify` says that the checkpoint counts as verified.

    Where it has no `verified`, it is of a version in which `passed` said that.
    """
    return report.get("passed") is True and report.get("verified", True) is True


def check_files(directory: Path, manifest: dict[str, Any], ignore: Collection[str] = ()) -> list[str]:
    """Compare every file with the manifest; what is wrong, a line each, without what is named in `ignore`."""
    problems = []
    found = present(directory)
    for name, entry in manifest["files"].items():
        path = directory / name
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name:
            problems.append(f"{name!r} leads out of the directory")
        elif name not in found:
            problems.append(f"{name!r} is missing")
        elif not belongs(path, directory):
            problems.append(f"{name!r} is a link leading out of the directory, or no regular file")
        elif (size := path.stat().st_size) != entry["size"]:
            problems.append(f"{name!r} has {size} bytes, not {entry['size']}")
        else:
            try:
                digest = sha256_file(path)
            except SourceError as error:  # one file that cannot be read hides nothing of the others
                problems.append(str(error))
                continue
            if digest != entry["sha256"]:
                problems.append(f"{name!r} has sha256 {digest}, not {entry['sha256']}")
    extra = found - manifest["files"].keys() - {MANIFEST, *ignore}
    return problems + [f"{name!r} is not in the manifest" for name in sorted(extra)]


def strangers(directory: Path) -> list[str]:
    """What is in a directory that no conversion of ours has written, or has changed since, a line each."""
    try:
        manifest = load(directory)
    except SourceError as error:
        return [str(error).removesuffix(".")]
    if manifest is None:
        return [f"it has no {MANIFEST}"]
    keeping = [f"{name!r} is there" for name in COPY_KEEPING if os.path.lexists(directory / name)]
    return keeping + check_files(directory, manifest, (VERIFIED, VERIFIED + ".tmp"))


def rounded_to_nearest(manifest: Mapping[str, Any]) -> list[str]:
    """The matrices for which the solver found nothing better."""
    return [row["name"] for row in manifest.get("matrices", ()) if row.get("rounded_to_nearest")]


def scales(manifest: Mapping[str, Any]) -> str | None:
    """Of what signs the scales of all packed matrices are; None where that is not said of every one."""
    said = [row.get("scales") for row in manifest.get("matrices", ()) if row["format"] != "dense"]
    if not said or not all(one in ("signed", "positive") for one in said):
        return None
    return "signed" if "signed" in said else "positive"


def sparsity(manifest: Mapping[str, Any] | None) -> str | None:
    """What a manifest says that its matrices are, but for the unpruned ones: 2:4, or nothing special."""
    return SPARSITY if any(fate.layout.sparse for fate in fates(manifest).values()) else None


def sha256_file(path: Path) -> str:
    """The sha256 of a file, in hex, in constant memory."""
    with reading(path), path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def present(directory: Path) -> set[str]:
    """The names of everything but folders, links to folders among them, relative to `directory`."""
    names: set[str] = set()
    with reading(directory):
        for folder, folders, files in os.walk(directory, onerror=_raise):
            here = Path(folder)
            links = [name for name in folders if (here / name).is_symlink()]
            names.update((here / name).relative_to(directory).as_posix() for name in files + links)
            if here == directory:
                folders[:] = [name for name in folders if name not in COPY_KEEPING]
    return names - set(COPY_KEEPING)


def _raise(error: OSError) -> None:
    raise error
