"""What becomes of every matrix: the recipe, the source and the shapes decide."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from marlin_convert import formats
from marlin_convert.checkpoint.linears import Weights
from marlin_convert.errors import ConvertError
from marlin_convert.matrix import Fate, Layout, Matrix, by_name, dense
from marlin_convert.recipe import Recipe, first_match

# The sizes that `auto` chooses from, the first that fits: coarser groups are smaller files, finer ones hold
# more shapes.
SIZES = (128, 64, 32)
SIZES_OF_24 = (128, -1)
# Formats in which one size is right for all matrices: their readers know no other.
ONE_SIZE = ("gptq", "marlin-24")

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def fates_of(
    linears: Mapping[str, nn.Linear],
    reasons: Mapping[str, str],
    together: Mapping[str, Sequence[str]],
    recipe: Recipe,
    weights: Weights,
    claimed: set[str],
    *,
    repack: bool,
) -> dict[str, Fate]:
    """The fate of every linear, by name and in their order; ConvertError for patterns that cannot be heeded.

    `reasons` says which linears nothing can be done to, and why; `together` has the linears that engines load
    as one with each; `claimed` are 2:4, as the source says.
    """
    sparse = _sparse(linears, recipe, weights, claimed, repack=repack)
    fates = []
    for name, linear in linears.items():
        matrix = Matrix(name, linear.in_features, linear.out_features)
        reason = _left(name, reasons, recipe, weights, repack=repack)
        written = str(DTYPES.get(recipe.dtype) or weights.dtype(f"{name}.weight")).removeprefix("torch.")
        if recipe.format == "dense":
            pruned = reason is None and name in sparse
            unlike = None if pruned else reason or "left unpruned by the recipe"
            fates.append(dense(matrix, written, unlike, sparse=pruned))
            continue
        if reason is not None:
            fates.append(dense(matrix, written, reason))
            continue
        format = recipe.format
        if sparse and name not in sparse:
            pattern = first_match(name, recipe.unpruned)
            reason = f"unpruned by {pattern!r}" if pattern else "not 2:4 in the source"
            format = "marlin" if format == "marlin-24" else format
        layout = _layout(matrix, format, recipe, weights, sparse=name in sparse, repack=repack)
        fates.append(Fate(matrix, layout, reason))
    if not repack and recipe.format in ONE_SIZE:
        fates = _of_one_size(fates, recipe)
    elif not repack:
        found = by_name(fates)
        for names in dict.fromkeys(tuple(together[name]) for name in found):
            one = [found[name] for name in names if name in found]
            if len({fate.layout.group_size for fate in one if fate.packed}) > 1:
                found |= by_name(_of_one_size(one, recipe))
        fates = list(found.values())
    return by_name(fates)


def _left(
    name: str, reasons: Mapping[str, str], recipe: Recipe, weights: Weights, *, repack: bool
) -> str | None:
    """Why a linear is left as it is, None if it is not."""
    pattern = first_match(name, recipe.skip)
    others = bool(recipe.only) and not first_match(name, recipe.only)
    if repack and weights.is_packed(name):
        if pattern or others:
            by = f"--skip {pattern!r} matches" if pattern else f"--only {recipe.only[0]!r} leaves out"
            raise ConvertError(
                f"{by} {name}, which is quantized in the source.",
                "a repack keeps what is quantized; start from the original model to leave it dense.",
            )
        return None
    if repack:
        return "dense in the source"
    if pattern:
        return f"skipped by {pattern!r}"
    return reasons.get(name) or ("not among --only" if others else None)


def _layout(
    matrix: Matrix, format: str, recipe: Recipe, weights: Weights, *, sparse: bool, repack: bool
) -> Layout:
    """How a packed matrix is stored: as many bits and groups as the source has, or as the recipe says."""
    if repack:
        scheme = weights.scheme_of(matrix.name)
        return Layout(format, scheme.bits, scheme.group_size, sparse=sparse)
    bits, size = recipe.of(matrix.name)
    if size == "auto":
        size = group_size_for(matrix, format, bits)
    return Layout(format, bits, int(size), sparse=sparse)


def group_size_for(matrix: Matrix, format: str, bits: int) -> int:
    """The largest group size that holds the matrix in a format; 128 if none does."""
    return next((size for size in sizes(format) if not refusal(matrix, Layout(format, bits, size))), 128)


def sizes(format: str) -> tuple[int, ...]:
    """The group sizes that `auto` tries for a format, the preferred one first."""
    return SIZES_OF_24 if format == "marlin-24" else SIZES


def refusal(matrix: Matrix, layout: Layout) -> str | None:
    """Why a format cannot hold what is solved for it in these groups, None if it can.

    Files may end in a short group; we solve none.
    """
    refused = formats.FORMATS[layout.format].refusal(
        matrix.k, matrix.n, bits=layout.bits, group_size=layout.group_size
    )
    if refused is None and layout.group_size != -1 and matrix.k % layout.group_size:
        return f"needs inputs divisible by the group size {layout.group_size}, has {matrix.k}"
    return refused


def _of_one_size(fates: Sequence[Fate], recipe: Recipe) -> list[Fate]:
    """The fates with one group size where it is free, the largest that holds all that any size holds."""
    free = {fate.name for fate in fates if fate.packed and recipe.of(fate.name)[1] == "auto"}

    def held(size: int) -> int:
        return sum(
            not refusal(fate.matrix, replace(fate.layout, group_size=size))
            for fate in fates
            if fate.name in free
        )

    best = max(sizes(recipe.format), key=held)
    return [
        replace(fate, layout=replace(fate.layout, group_size=best)) if fate.name in free else fate
        for fate in fates
    ]


def _sparse(
    linears: Mapping[str, nn.Linear],
    recipe: Recipe,
    weights: Weights,
    claimed: set[str],
    *,
    repack: bool,
) -> set[str]:
    """The linears that are 2:4: those of which the source says so or, if it is asked for, all."""
    found = claimed
    if repack and recipe.format == "marlin-24":
        found = found or set(weights.packed_linears())
    elif not repack and recipe.sparsity != "none":
        found = set(linears)
    sparse = {name for name in found if not first_match(name, recipe.unpruned)}
    if recipe.unpruned and not sparse:
        raise ConvertError(
            f"--unpruned {recipe.unpruned[0]!r} leaves no linear that is 2:4.",
            "it is for those that are not while others are.",
        )
    return sparse
