"""What a quantization_config says of the layers, in one form for all formats, and reading its keys."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from marlin_convert.errors import FormatError


@dataclass(frozen=True)
class Scheme:
    """How the packed layers of a checkpoint are stored, as its config says.

    format      "marlin", "marlin-24", "gptq", "compressed-tensors" or "awq"
    bits        4 or 8
    group_size  rows sharing a scale; -1: all rows
    symmetric   zero points all in the middle; a claim that the zero tensors may contradict
    version     GPTQ zeros: 1 stored minus one, 2 as they are
    names       suffixes on disk in the order of the format's SUFFIXES; empty: those themselves
    skipped     modules or patterns left dense, informational
    act_order   groups follow activation order; a claim that a g_idx tensor may contradict
    unpruned    linears of a marlin-24 checkpoint that are not 2:4, and stored in marlin
    overrides   patterns of linears (re.match) and the scheme they are stored in instead; the first one counts
    beyond      what the config asks of the model beside its weights, which no repack keeps
    """

    format: str
    bits: int
    group_size: int
    symmetric: bool = True
    version: int = 1
    names: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    act_order: bool = False
    unpruned: frozenset[str] = frozenset()
    overrides: tuple[tuple[str, "Scheme"], ...] = ()
    beyond: str | None = None

    def of(self, linear: str) -> "Scheme":
        """How one linear is stored."""
        if linear in self.unpruned:
            return replace(self, format="marlin", unpruned=frozenset())
        return next((scheme for pattern, scheme in self.overrides if re.match(pattern, linear)), self)

    def skips(self, linear: str) -> bool:
        """Whether a linear is left dense: skipped names it, a module it is in, or the end of its name."""
        return any(f".{module}." in f".{linear}." for module in self.skipped)

    def group_rows(self, k: int, groups: int, *, ragged: bool = False) -> int:
        """Rows of a group, 1 .. k, of a layer with k inputs and scales for groups.

        FormatError when the config's group_size makes another number of groups or, but for ragged, a rest.
        """
        rows = k if self.group_size == -1 else min(self.group_size, k)
        expected = groups_of(k, self.group_size)
        if groups != expected:
            raise FormatError(
                f"{k} inputs in groups of {self.group_size} make {expected} groups, scales have {groups}"
            )
        if k % rows and not ragged:
            raise FormatError(f"{k} inputs do not divide into groups of {rows}")
        return rows


def groups_of(k: int, group_size: int) -> int:
    """Groups of k rows; the last may be short, -1 makes one of all."""
    return 1 if group_size == -1 else -(-k // group_size)


def integer(config: Mapping[str, Any], *keys: str, default: int | None = None) -> int:
    """The first of the keys that the config has, an integer, also as text or as 128.0; else the default.

    FormatError when it is something else, or there is no default.
    """
    for key in keys:
        value = config.get(key)
        if isinstance(value, str) and re.fullmatch(r"-?\d{1,9}", value):
            value = int(value)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if value is not None:
            if isinstance(value, bool) or not isinstance(value, int):
                raise FormatError(f"quantization_config: {key} must be an integer, is {value!r}")
            return value
    if default is None:
        raise FormatError(f"quantization_config: {keys[0]} is missing")
    return default


def boolean(config: Mapping[str, Any], key: str, default: bool) -> bool:
    """What the config says under the key: true, false, one of them as text, 1 or 0. FormatError otherwise."""
    value = config.get(key)
    if isinstance(value, str):
        value = {"true": True, "false": False}.get(value.lower(), value)
    if value in (0, 1):
        value = bool(value)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise FormatError(f"quantization_config: {key} must be true or false, is {value!r}")
    return value


def bits_of(
    config: Mapping[str, Any], *keys: str, allowed: Sequence[int] = (4, 8), default: int | None = None
) -> int:
    """The bits of a code, one of those allowed. FormatError otherwise."""
    bits = integer(config, *keys, default=default)
    if bits not in allowed:
        raise FormatError(
            f"quantization_config: {keys[0]} is {bits}, must be {' or '.join(map(str, allowed))}"
        )
    return bits


def group_size_of(config: Mapping[str, Any], *keys: str) -> int:
    """The rows of a group, positive, or -1 for all. FormatError otherwise."""
    size = integer(config, *keys)
    if size != -1 and size < 1:
        raise FormatError(f"quantization_config: {keys[0]} is {size}, must be -1 or positive")
    return size


def names_of(config: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """A list of module names or patterns, empty when there is none. FormatError when it is something else."""
    names = config.get(key) or ()
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise FormatError(f"quantization_config: {key} must be a list of names, is {names!r}")
    return tuple(names)


def pattern_of(written: str) -> str:
    """A regular expression that a config has. FormatError when it is none."""
    try:
        re.compile(written)
    except re.error as error:
        raise FormatError(
            f"quantization_config: {written!r} is no regular expression: {error}",
            "correct it: a part of a name is meant with '.*' before it, not '*'.",
        ) from error
    return written


def mapping_of(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The object under the key, empty when the config has none. FormatError when it is something else."""
    found = config.get(key) or {}
    if not isinstance(found, Mapping):
        raise FormatError(f"quantization_config: {key} must be an object, is {found!r}")
    return found


def tensor(
    tensors: Mapping[str, Tensor], suffix: str, dtypes: Sequence[torch.dtype], dimensions: int = 2
) -> Tensor:
    """The tensor of that suffix, of one of the dtypes. FormatError when it is absent or anything else."""
    found = tensors.get(suffix)
    if found is None:
        raise FormatError(f"no tensor {suffix}; there are {', '.join(sorted(tensors)) or 'none'}")
    if found.dtype not in dtypes or found.dim() != dimensions or not found.numel():
        kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise FormatError(
            f"{suffix} must be {kinds} with {dimensions} dimensions, is "
            f"{str(found.dtype).removeprefix('torch.')} {tuple(found.shape)}"
        )
    return found


def expect_shape(suffix: str, found: Tensor, shape: tuple[int, ...], of: str) -> None:
    """Raise FormatError when the tensor has not the shape that another tensor, named in `of`, asks for."""
    if tuple(found.shape) != shape:
        raise FormatError(f"{suffix} must be {shape} beside {of}, is {tuple(found.shape)}")


SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
