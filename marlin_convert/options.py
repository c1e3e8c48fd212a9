"""What the values of options mean, on the command line and in Python: a device, a size, a list of names."""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from marlin_convert.errors import ConvertError, OptionError

if TYPE_CHECKING:
    import torch

log = logging.getLogger("marlin_convert")

# The layouts that --format names.
FORMATS = ("marlin", "marlin-24", "gptq", "compressed-tensors")


def pick_gpu(name: str) -> "torch.device":
    """The CUDA device of --device, for what runs on nothing else; auto is the first one."""
    import torch

    if not torch.cuda.is_available():
        raise ConvertError(
            "there is no CUDA GPU here, and what is measured runs on nothing else.",
            "run it on a machine with an NVIDIA GPU of compute capability 8.0 or later.",
        )
    device = pick_device(name)
    if device.type != "cuda":
        raise OptionError(f"--device {name!r} is not auto, cuda or cuda:N.")
    return device


def pick_device(name: str) -> "torch.device":
    """The torch device of --device; auto is the first GPU, else the CPU with a notice."""
    import torch

    if name == "auto":
        name = "cuda:0" if torch.cuda.is_available() else "cpu"
        if name == "cpu":
            log.info("no CUDA GPU found, working on the CPU")
    try:
        device = torch.device("cuda:0" if name == "cuda" else name)
    except RuntimeError as error:
        raise OptionError(f"--device {name!r} is not auto, cpu, cuda or cuda:N.") from error
    if device.type not in ("cpu", "cuda"):
        raise OptionError(f"--device {name!r} is not auto, cpu, cuda or cuda:N.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ConvertError(f"there is no device {name!r}: {count} CUDA GPUs found.", "pass --device cpu.")
    return device


def shard_size(said: int | str) -> int:
    """Bytes of a size like 5GB or 200MB; OptionError for one that is none."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "": 1}
    number = str(said).upper().rstrip("KMGB")
    unit = str(said).upper()[len(number) :]
    if unit not in units or not number.isdecimal() or int(number) == 0:
        raise OptionError(f"--max-shard-size {said!r} is not a size like 5GB or 500MB.")
    return int(number) * units[unit]


def check_place(report: Path) -> None:
    """OptionError for a report that could not be written after all the work."""
    if not report.absolute().parent.is_dir():
        raise OptionError(f"--report {str(report)!r}: there is no directory '{report.parent}'.")


def names(said: str | Iterable[str] | None) -> tuple[str, ...]:
    """The names of a list like "files,layout", or of another list, each once; OptionError for what is none."""
    several = said.split(",") if isinstance(said, str) else () if said is None else said
    if not isinstance(several, Iterable) or not all(isinstance(name, str) for name in several):
        raise OptionError(f"{said!r} is not a list of names.")
    return tuple(dict.fromkeys(name.strip() for name in several))
