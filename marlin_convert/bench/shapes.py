"""The layers that are measured: those of models, and those of the MARLIN paper's artifact."""

import re
from typing import NamedTuple


class Shape(NamedTuple):
    """A layer by name, with k inputs and n outputs."""

    name: str
    k: int
    n: int


def _llama(name: str, width: int, inner: int, qkv: int | None = None) -> tuple[Shape, ...]:
    """The linears of a block, fused as engines fuse them; `qkv` outputs of q, k and v are 3 width if None."""
    return (
        Shape(f"{name}.qkv", width, qkv or 3 * width),
        Shape(f"{name}.o", width, width),
        Shape(f"{name}.gate_up", width, 2 * inner),
        Shape(f"{name}.down", inner, width),
    )


# Of Llama-3, as benchmarks/RESULTS.md has them.
LAYERS = (*_llama("8B", 4096, 14336, 6144), *_llama("70B", 8192, 28672, 10240))

# Those of IST-DASLab/marlin_artifact, whose Llamas have 256 inner columns less than the real ones and whose
# Falcon fuses attention with the MLP; and Llama-3.
MODELS = {
    "Llama-7B": _llama("Llama-7B", 4096, 10752),
    "Llama-13B": _llama("Llama-13B", 5120, 13568),
    "Llama-33B": _llama("Llama-33B", 6656, 17664),
    "Llama-65B": _llama("Llama-65B", 8192, 21760),
    "Falcon-180B": (
        Shape("Falcon-180B.in", 14848, 5 * 14848 + 1024),
        Shape("Falcon-180B.out", 5 * 14848, 14848),
    ),
    "Llama-3-8B": LAYERS[:4],
    "Llama-3-70B": LAYERS[4:],
}

# Of the roofline.
SQUARES = tuple(Shape(f"{width}x{width}", width, width) for width in (4096, 8192, 16384, 32768))

_NAMED = {shape.name: shape for shapes in MODELS.values() for shape in shapes}


def ideal(processors: int) -> Shape:
    """The artifact's matrix for so many multiprocessors: its tiles are shared out without a rest."""
    return Shape("ideal", 4 * 256 * processors, 256 * processors)


def find(text: str) -> Shape:
    """The shape of a name like 8B.qkv, or KxN itself. KeyError when it is neither."""
    sizes = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    return Shape(text, int(sizes[1]), int(sizes[2])) if sizes else _NAMED[text]
