"""Where a command computes, by its --device."""

import logging
from typing import TYPE_CHECKING

import click

from marlin_convert.errors import ConvertError

if TYPE_CHECKING:
    import torch

log = logging.getLogger("marlin_convert")


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
        raise click.BadParameter(f"{name!r} is not auto, cuda or cuda:N.", param_hint="--device")
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
        raise click.BadParameter(
            f"{name!r} is not auto, cpu, cuda or cuda:N.", param_hint="--device"
        ) from error
    if device.type not in ("cpu", "cuda"):
        raise click.BadParameter(f"{name!r} is not auto, cpu, cuda or cuda:N.", param_hint="--device")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ConvertError(f"there is no device {name!r}: {count} CUDA GPUs found.", "pass --device cpu.")
    return device
