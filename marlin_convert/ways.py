"""The ways out where a layout does not hold a model: what each of them packs, the best first.

Every way is one that the plan takes: it is made of the plan's own refusals.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from marlin_convert.fates import group_size_for, refusal
from marlin_convert.matrix import Fate, Layout
from marlin_convert.recipe import Recipe

# The finest hold the most shapes, the coarsest are the smallest files; one scale for all is furthest from the
# original.
GROUP_SIZES = ("auto", 128, 64, 32, -1)
WRITTEN = ("marlin", "gptq", "compressed-tensors")


@dataclass(frozen=True)
class Way:
    """Options to add to a command, in which format they write, and the linears and weights that they pack."""

    options: tuple[str, ...]
    format: str
    linears: int
    weights: int

    def __str__(self) -> str:
        return " ".join(self.options)


def other_layouts(fates: Mapping[str, Fate], recipe: Recipe, together: Mapping[str, Sequence[str]]) -> str:
    """How to quantize linears that the recipe's layout does not all hold: the best ways, what they pack.

    `together` has the linears that engines fuse with each: these are left dense with it.
    """
    asked = {name: fate for name, fate in fates.items() if fate.packed}
    ways = _ways(asked, recipe, together)
    if not ways:
        return "no format and no group size holds any of them."
    best = ways[0]
    said = f"{best} packs {best.linears} of {len(asked)} linears"
    others = [way for way in ways if (way.format == recipe.format) != (best.format == recipe.format)]
    if others and best.format == "marlin" and others[0].weights == best.weights:
        said += f"; for engines without our plugin, {others[0]} packs as many"
    elif others and best.format != recipe.format and 2 * others[0].weights > best.weights:
        said += f"; in {recipe.format}, {others[0]} packs {others[0].linears}"
    return said + "."


def other_codes(
    fates: Mapping[str, Fate],
    recipe: Recipe,
    together: Mapping[str, Sequence[str]],
    refused: Callable[[Fate, str], str | None],
) -> str:
    """How to go on with codes that the recipe's format does not hold: one that does, or solving them again.

    `refused` says why a format holds the codes of a linear not.
    """
    packed = [fate for fate in fates.values() if fate.packed]
    holding = [format for format in WRITTEN if not any(refused(fate, format) for fate in packed)]
    said = f"--format {holding[0]} holds all of them as they are; " if holding else ""
    again = {
        name: replace(fate, layout=Layout(recipe.format, recipe.bits, 128, sparse=fate.layout.sparse))
        for name, fate in fates.items()
    }
    ways = _ways(again, recipe, together)
    if not ways:
        return said + "no format holds them solved again." if said else "start from the original model."
    options = ["--requantize", *ways[0].options]
    if recipe.format == ways[0].format == "marlin-24" and recipe.sparsity == "none":
        options.append("--sparsity 2:4")
    return (
        f"{said}{' '.join(options)} solves {ways[0].linears} of {len(fates)} linears again from the "
        "dequantized weights."
    )


def _ways(fates: Mapping[str, Fate], recipe: Recipe, together: Mapping[str, Sequence[str]]) -> list[Way]:
    """The ways that pack something: those that pack most, and of these those that change least, first."""
    ways = [
        _way(fates, recipe, format, group_size, together)
        for format in dict.fromkeys((recipe.format, *WRITTEN))
        for group_size in dict.fromkeys((recipe.group_size, *GROUP_SIZES))
    ]
    return sorted((way for way in ways if way.linears), key=lambda way: -way.weights)


def _way(
    fates: Mapping[str, Fate],
    recipe: Recipe,
    format: str,
    group_size: int | str,
    together: Mapping[str, Sequence[str]],
) -> Way:
    """The way to this layout, with what it does not hold, and what engines fuse with that, left dense."""

    def holds(fate: Fate) -> bool:
        # what is not 2:4 is marlin beside marlin-24
        written = "marlin" if format == "marlin-24" and not fate.layout.sparse else format
        bits = fate.layout.bits
        size = group_size_for(fate.matrix, written, bits) if group_size == "auto" else int(group_size)
        return not refusal(fate.matrix, Layout(written, bits, size))

    dense = set().union(*{tuple(together[fate.name]) for fate in fates.values() if not holds(fate)})
    kept = [fate for fate in fates.values() if fate.name not in dense]
    options = [
        *([f"--format {format}"] if format != recipe.format else []),
        *([f"--group-size {group_size}"] if group_size != recipe.group_size else []),
        *([option_for("--skip", dense, fates)] if dense else []),
    ]
    return Way(tuple(options), format, len(kept), sum(fate.k * fate.n for fate in kept))


def option_for(option: str, linears: Collection[str], fates: Collection[str]) -> str:
    """The option for these linears: by kind where all of a kind are among them, else by name."""
    linears = set(linears)
    if len(linears) == 1:
        return f"{option} '{next(iter(linears))}'"
    kinds: dict[str, list[str]] = {}
    for name in fates:
        kinds.setdefault(name.rpartition(".")[2], []).append(name)
    named = []
    for kind, names in sorted(kinds.items()):
        chosen = [name for name in names if name in linears]
        named += [f"*.{kind}"] if len(chosen) == len(names) else chosen
    return " ".join(f"{option} '{name}'" for name in named)
