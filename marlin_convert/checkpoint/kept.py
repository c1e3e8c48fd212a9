"""Tensors that a run keeps for itself until its output is complete: whole on disk, or not there."""

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from marlin_convert.checkpoint.writer import fsync
from marlin_convert.errors import ConvertError


def keep(path: Path, tensors: Mapping[str, Tensor], said: Any) -> None:
    """Put tensors, and what is said of them (JSON), in a safetensors file; OSError for a full disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        save_file(
            {name: tensor.cpu().contiguous() for name, tensor in tensors.items()},
            temporary,
            metadata={"said": json.dumps(said)},
        )
    except SafetensorError as error:  # which has what the system said in words alone
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
    fsync(temporary)
    temporary.replace(path)
    fsync(path.parent)


def kept(path: Path) -> tuple[dict[str, Tensor], Any]:
    """The tensors of a file of `keep`, and what is said of them; ConvertError for one damaged or gone."""
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
            return tensors, json.loads(file.metadata()["said"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ConvertError(
            f"cannot resume: '{path}' is not as it was kept ({error}).",
            "remove the unfinished directory and start again.",
        ) from error


def keep_all(directory: Path, files: Iterable[tuple[str, Mapping[str, Tensor]]], said: Any) -> None:
    """Put files of tensors in a directory, in the place of those that an earlier call put there.

    One after another is made and written, so that no memory need hold them all.
    """
    begun = directory.with_name(directory.name + ".tmp")
    shutil.rmtree(begun, ignore_errors=True)
    begun.mkdir()
    for name, tensors in files:
        keep(begun / name, tensors, said)
    shutil.rmtree(directory, ignore_errors=True)
    begun.replace(directory)
