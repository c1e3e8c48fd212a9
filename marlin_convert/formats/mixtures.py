"""What a quantization_config says of matrices that are not all stored alike: patterns of their names.

Engines know a linear by its name in a model, before which they put and leave out prefixes of their own, and
some by the name of the matrix that they fuse it into.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import partial

from marlin_convert.matrix import Fate

# What bits and group size a matrix has.
Kind = tuple[int, int]

# What vLLM and SGLang call linears that they load as one.
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
}


def kinds(fates: Iterable[Fate]) -> dict[str, Kind]:
    """Bits and group size of every packed matrix, by name."""
    return {fate.name: (fate.layout.bits, fate.layout.group_size) for fate in fates if fate.packed}


def usual(found: Mapping[str, Kind]) -> Kind:
    """The bits and the group size that most matrices have."""
    return Counter(found.values()).most_common(1)[0][0]


def left_dense(fates: Iterable[Fate]) -> list[str]:
    """The names of the matrices that are written as floats."""
    return [fate.name for fate in fates if not fate.packed]


def with_fused(found: Mapping[str, Kind]) -> dict[str, Kind]:
    """The same, and the names of what engines fuse out of linears that are all of one kind."""
    more = {}
    for name in found:
        parent, _, last = name.rpartition(".")
        for fused, parts in FUSED.items():
            names = [f"{parent}.{part}" for part in parts]
            if last == parts[0] and len({found.get(one) for one in names}) == 1:
                more[f"{parent}.{fused}"] = found[name]
    return {**found, **more}


def told(found: Mapping[str, Kind]) -> dict[Kind, list[str]]:
    """The names of every kind, with stars for numbers where true of all blocks, or of all in a block."""
    said: dict[Kind, list[str]] = {}
    todo = list(found)
    for starred in (partial(_NUMBER.sub, "*"), _in_its_block, str):
        by_path: dict[str, list[str]] = {}
        for name in todo:
            by_path.setdefault(starred(name), []).append(name)
        todo = []
        for path, names in by_path.items():
            if len({found[name] for name in names}) == 1:
                said.setdefault(found[names[0]], []).append(path)
            else:
                todo += names
    return said


def _in_its_block(name: str) -> str:
    """A name with stars for all numbers but the first, which is the block's."""
    number = _NUMBER.search(name)
    end = number.end() if number else 0
    return name[:end] + _NUMBER.sub("*", name[end:])


def pattern(name: str) -> str:
    """A regular expression (re.match) for a name that `told` gives, whatever stands before the blocks."""
    blocks = re.search(r"[^.]+\.(\d+|\*)\.", name)
    tail = name[blocks.start() :] if blocks else name
    return rf"(.*\.)?{re.escape(tail)}$".replace(r"\*", r"\d+")


_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
