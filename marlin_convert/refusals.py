"""What cannot be converted as it was asked, with the best way out, known before a weight is solved."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace

import torch

from marlin_convert import formats
from marlin_convert.checkpoint.linears import Weights
from marlin_convert.errors import ConvertError, FormatError
from marlin_convert.fates import refusal
from marlin_convert.formats import bounds
from marlin_convert.matrix import Fate, by_name
from marlin_convert.recipe import Recipe, first_match
from marlin_convert.ways import option_for, other_codes, other_layouts

log = logging.getLogger("marlin_convert")

Fates = Mapping[str, Fate]
Together = Mapping[str, Sequence[str]]  # the linears of each linear's stage, which engines fuse into one


# Types of which vLLM reorders q and k for its rotary embedding while it loads them, knowing them by the names
# that compressed-tensors gives to codes and scales.
REORDERED = ("llama4_text",)


def check_patterns(recipe: Recipe, linears: Sequence[str]) -> None:
    """ConvertError for a pattern of the recipe that matches no linear."""
    for option, patterns in (
        ("--only", recipe.only),
        ("--skip", recipe.skip),
        ("--unpruned", recipe.unpruned),
        ("the recipe's overrides:", recipe.overrides),
    ):
        for pattern in patterns:
            if not any(first_match(name, [pattern]) for name in linears):
                raise ConvertError(
                    f"{option} {pattern!r} matches no linear of the blocks.",
                    f"their names are like {linears[0]!r}.",
                )


def check_effort(recipe: Recipe, *, repack: bool, experts: bool) -> None:
    """ConvertError for an effort that tunes codes where none are made, or those of experts."""
    if recipe.effort == "high" and experts:
        raise ConvertError(
            "--effort high tunes a model as a whole, and does not know which expert a token is to go to.",
            "--effort default, which makes up for drift in mixtures of experts too.",
        )
    if recipe.effort == "high" and recipe.format == "dense":
        raise ConvertError(
            "--effort high tunes codes, and pruning alone makes none.",
            "--effort default; quantize --sparsity 2:4 --effort high prunes, quantizes and tunes at once.",
        )
    if recipe.effort == "high" and repack:
        raise ConvertError(
            "--effort high tunes codes, and a repack keeps those of the source as they are.",
            "--effort default; or --requantize, which solves again from the dequantized weights.",
        )


def check_scales(recipe: Recipe, *, repack: bool) -> None:
    """ConvertError where positive scales are asked of what finds none."""
    if recipe.scales == "positive" and recipe.format == "dense":
        raise ConvertError(
            "pruning alone makes no scales, positive or signed.",
            "leave scales out of the recipe; quantize --sparsity 2:4 --scales positive prunes and quantizes.",
        )
    if recipe.scales == "positive" and repack:
        raise ConvertError(
            "--scales positive is about scales that are searched, and a repack keeps those of the source.",
            "--requantize, which solves again from the dequantized weights.",
        )


def check_sparsity(weights: Weights, recipe: Recipe, claimed: set[str], *, repack: bool) -> None:
    """ConvertError when what is asked of sparsity is not what a repack, or quantizing, does."""
    if recipe.format == "dense" and weights.scheme is not None:
        raise ConvertError(
            f"{weights.checkpoint.directory.name} is quantized already ({weights.scheme.format}).",
            "prune the model it was made from, or quantize --requantize --sparsity 2:4.",
        )
    if not repack and recipe.format != "dense" and recipe.sparsity != "none" and recipe.all_bits != {4}:
        raise ConvertError(
            "2:4 is pruned and quantized at once to 4 bits, not to 8.",
            "leave --bits 8 or --sparsity out.",
        )
    if repack and recipe.sparsity != "none" and not claimed and recipe.format != "marlin-24":
        raise ConvertError(
            "the source is quantized and not known to be 2:4; a repack does not prune.",
            "--requantize prunes and solves again from the dequantized weights.",
        )
    if not repack and recipe.format == "marlin-24" and recipe.sparsity == "none" and not claimed:
        raise FormatError(
            "marlin-24 holds codes that are 2:4, and the source is not known to be.",
            "prune while quantizing with --sparsity 2:4, or choose another --format.",
        )


def check_stages(fates: Fates, together: Together, *, repack: bool) -> None:
    """ConvertError where what engines fuse is not all packed or not at all, and in one layout."""
    stages = [
        [fates[name] for name in names if name in fates]
        for names in dict.fromkeys(tuple(together[name]) for name in fates)
    ]
    for stage in stages:
        # one of each kind will do, of as many experts as there may be
        kinds = {(one.packed, one.reason is None, one.layout.format, _codes(one)): one for one in stage}
        for fate in kinds.values():
            _check_beside(fate, stage, fates, stages, repack=repack)


def _written_otherwise(fate: Fate, stage: Sequence[Fate]) -> list[str]:
    return [one.name for one in stage if one.packed and one.layout.format != fate.layout.format]


def _check_beside(
    fate: Fate, stage: Sequence[Fate], fates: Fates, stages: Sequence[Sequence[Fate]], *, repack: bool
) -> None:
    """ConvertError where what is loaded as one with a matrix is written otherwise."""
    if fate.reason is not None:
        others = _written_otherwise(fate, stage)
        if others:
            kind, option = ("not 2:4", "--unpruned") if fate.packed else ("left dense", "--skip")
            left = [
                (one, beside)
                for beside in stages
                for one in beside
                if one.reason is not None and one.packed == fate.packed
            ]
            everywhere = [name for one, beside in left for name in _written_otherwise(one, beside)]
            named = " and ".join(others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
            raise ConvertError(
                f"{fate.name} is {kind}, {named} beside it not; engines load them as one.",
                f"add {option_for(option, everywhere, fates)}",
            )
    unlike = [one for one in stage if one.packed and fate.packed and _codes(one) != _codes(fate)]
    if unlike:
        raise ConvertError(
            f"{fate.name} has {fate.layout.bits} bits in groups of {fate.layout.group_size}, "
            f"{unlike[0].name} beside it {unlike[0].layout.bits} in groups of "
            f"{unlike[0].layout.group_size}; engines load them as one.",
            "--requantize solves all of them again from the dequantized weights."
            if repack
            else "let a pattern of the recipe's overrides match all of them, or none.",
        )


def _codes(fate: Fate) -> tuple[int, int]:
    return fate.layout.bits, fate.layout.group_size


def check_shapes(fates: Fates, recipe: Recipe, together: Together) -> None:
    """FormatError naming the linears that the recipe's layouts do not hold, and how to go on."""
    odd = [fate for fate in fates.values() if fate.layout.sparse and fate.k % 4]
    if odd:
        raise FormatError(
            f"{odd[0].name} has {odd[0].k} inputs; 2:4 needs them divisible by four.",
            "leave it as it is: " + option_for("--skip", [fate.name for fate in odd], fates),
        )
    _refuse(
        fates,
        lambda fate: refusal(fate.matrix, fate.layout),
        lambda: other_layouts(fates, recipe, together),
    )


def check_reordered(fates: Fates, recipe: Recipe, model_type: str) -> None:
    """FormatError for q and k that vLLM ought to reorder while it loads them, and in this format does not.

    Those beside experts that it refuses do no harm.
    """
    packed = [name for name, fate in fates.items() if fate.packed]
    refused = recipe.format.startswith("marlin") and any(".experts." in name for name in packed)
    if model_type not in REORDERED or recipe.format == "compressed-tensors" or refused:
        return
    turned = [name for name in packed if name.endswith((".q_proj", ".k_proj"))]
    if turned:
        raise FormatError(
            f"vLLM reorders {turned[0]} and {len(turned) - 1} more while it loads {model_type}, but not in "
            f"{recipe.format}: its answers would be wrong.",
            "--format compressed-tensors; or --skip '*.q_proj' --skip '*.k_proj' --skip '*.v_proj' "
            "leaves them dense.",
        )


def check_source(weights: Weights, format: str) -> None:
    """FormatError where a repack would lose something of the source."""
    scheme = weights.scheme
    assert scheme is not None
    again = "--requantize solves all of them again from the dequantized weights."
    if scheme.beyond:
        raise FormatError(f"the source has more than packed weights: {scheme.beyond}.", again)
    if format != "marlin-24":
        return
    for linear in weights.packed_linears():
        own = weights.scheme_of(linear)
        if own.group_size != scheme.group_size:
            raise FormatError(
                f"{linear} has groups of {own.group_size}, others of {scheme.group_size}; marlin-24 is "
                "written in one size.",
                again,
            )


def with_codes(fates: Fates, weights: Weights, recipe: Recipe, together: Together) -> dict[str, Fate]:
    """The fates with what only the stored zero points and group orders tell; FormatError if formats lack it.

    The config speaks for all: one linear with zero points makes every linear store them.
    """
    elsewhere = set(weights.packed_linears()) - fates.keys()
    if elsewhere:
        raise FormatError(
            f"{min(elsewhere)} is quantized in the source; only the linears of the blocks are repacked.",
            "--requantize writes it dense, and solves the blocks again from the dequantized weights.",
        )
    found = {
        fate.name: weights.peculiarities(fate.name, fate.k, fate.n) for fate in fates.values() if fate.packed
    }

    def refused(fate: Fate, format: str) -> str | None:
        kind = asdict(found[fate.name])
        return formats.FORMATS[format].refusal(
            fate.k, fate.n, bits=fate.layout.bits, group_size=fate.layout.group_size, **kind
        )

    _refuse(
        fates,
        lambda fate: refused(fate, fate.layout.format),
        lambda: other_codes(fates, recipe, together, refused),
    )
    symmetric = all(kind.symmetric for kind in found.values())
    return by_name(
        replace(
            fate,
            layout=replace(fate.layout, symmetric=symmetric, act_order=found[fate.name].act_order),
        )
        if fate.packed
        else fate
        for fate in fates.values()
    )


def check_quads(fates: Fates, weights: Weights, recipe: Recipe, together: Together) -> None:
    """FormatError where what becomes marlin-24 and is not yet is not 2:4, which only the codes tell."""
    todo = [
        fate
        for fate in fates.values()
        if fate.layout.format == "marlin-24" and weights.scheme_of(fate.name).format != "marlin-24"
    ]
    if todo:
        log.info("counting the non-zeros of %d linears", len(todo))
    memory = torch.empty(max((fate.k * fate.n for fate in todo), default=0), dtype=torch.uint8)
    refused = []
    for fate in todo:
        layer = weights.quantized(fate.name, memory)
        try:
            bounds.check_quads(layer)
        except FormatError as error:
            refused.append((fate, str(error)))
    if refused:
        fate, why = refused[0]
        beside = {name for fate, _ in refused for name in together[fate.name]}
        unpruned = option_for("--unpruned", [name for name in fates if name in beside], fates)
        raise FormatError(
            f"{fate.name} is not 2:4: {why}{_more(refused)}.",
            f"--format marlin holds it; to write only what is not 2:4 so: {unpruned}"
            if recipe.sparsity == "none"
            else "a repack does not prune: --requantize does, and solves again from the dequantized weights.",
        )


def _refuse(fates: Fates, refused: Callable[[Fate], str | None], way_out: Callable[[], str]) -> None:
    found = [(fate, why) for fate in fates.values() if fate.packed and (why := refused(fate))]
    if found:
        fate, why = found[0]
        raise FormatError(
            f"{fate.name} has {fate.k} inputs and {fate.n} outputs; "
            f"{fate.layout.format} {why}{_more(found)}.",
            way_out(),
        )


def _more(refused: Sequence[tuple[Fate, str]]) -> str:
    """How many linears are refused beside the first."""
    return f" (and {len(refused) - 1} more linears)" if len(refused) > 1 else ""
