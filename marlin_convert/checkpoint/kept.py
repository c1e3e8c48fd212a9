"""Tensors that a run keeps for itself until its output is complete: whole on disk, or not there."""

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from marlin_convert.checkpoint.writer import fsync, whole
from marlin_convert.errors import ConvertError


def keep(path: Path, tensors: Mapping[str, Tensor], said: Any) -> None:
    """Put tensors, and what is said of them (JSON), in a safetensors file; OSError for a full disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with whole(path) as temporary:
            _save(tensors, temporary, said)
    except BaseException:  # what is not said to be kept is not there
        with suppress(OSError):
            path.unlink()
        raise


def _save(tensors: Mapping[str, Tensor], path: Path, said: Any) -> None:
    contents = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(contents, path, metadata={"said": json.dumps(said)})
    except SafetensorError as error:  # which has what the system said in words alone
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def kept(path: Path) -> tuple[dict[str, Tensor], Any]:
    """The tensors of a file of `keep`, and what is said of them; ConvertError for one damaged or gone."""
    try:
        path.open("rb").close()  # safetensors finds no file, whatever the system said
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
            return tensors, json.loads(file.metadata()["said"])
    except (FileNotFoundError, SafetensorError) as error:
        raise ConvertError(
            f"'{path}', which the unfinished run has kept, is damaged or gone.",
            "remove the unfinished directory and start again.",
        ) from error


def keep_all(directory: Path, files: Iterable[tuple[str, Mapping[str, Tensor]]], said: Any) -> None:
    """Put files of tensors in a directory, in the place of those that an earlier call put there.

    One after another is made and written, so that no memory need hold them all. Wherever it is stopped, the
    directory is whole or not there.
    """
    begun, before = (directory.with_name(directory.name + end) for end in (".tmp", ".old"))
    shutil.rmtree(begun, ignore_errors=True)
    shutil.rmtree(before, ignore_errors=True)
    begun.mkdir()
    for name, tensors in files:
        keep(begun / name, tensors, said)
    if directory.exists():
        directory.replace(before)
    begun.replace(directory)
    fsync(directory.parent)
    shutil.rmtree(before, ignore_errors=True)
