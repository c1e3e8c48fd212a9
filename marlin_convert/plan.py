"""The plan: what becomes of every matrix and every tensor, known from headers before a weight is read."""

import gc
import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from marlin_convert import formats, refusals
from marlin_convert.checkpoint import manifest as manifests
from marlin_convert.checkpoint.linears import Weights
from marlin_convert.checkpoint.reader import QUANTIZATION_KEYS
from marlin_convert.checkpoint.writer import TensorSpec
from marlin_convert.errors import ConvertError, FormatError
from marlin_convert.fates import DTYPES, fates_of
from marlin_convert.formats import mixtures
from marlin_convert.kernels.experts import MOST
from marlin_convert.matrix import Fate, Matrix, dense
from marlin_convert.models.discover import discover
from marlin_convert.models.experts import Experts, ScoresOnInputs
from marlin_convert.models.names import Names
from marlin_convert.models.structure import Stage, Structure
from marlin_convert.models.tree import check_names, claims_tied, module_tree
from marlin_convert.quantized import QuantizedLinear
from marlin_convert.recipe import GROUP_SIZES, Recipe

log = logging.getLogger("marlin_convert")

# What a config.json says of how its own weights are packed, and where somebody once had the source.
_NOT_KEPT = (*QUANTIZATION_KEYS, "_name_or_path")

Modules = Mapping[str, torch.nn.Module]  # all of a model, by their paths


@dataclass(frozen=True)
class Plan:
    """Everything a conversion will do.

    `repack` says that the codes of the source are kept; the model computes in `dtype`; `fates` are of all
    matrices, by name; `specs` are the tensors to be written, `owner` maps those that belong to a matrix that
    is worked on to (its name, suffix); `left_out` are source tensors not written, `beside` those that are
    written and no part of the model as it is built; `config` becomes the config.json; `also` are the plans of
    the same codes in other formats.
    """

    structure: Structure
    blocks: int
    recipe: Recipe
    repack: bool
    dtype: torch.dtype
    fates: Mapping[str, Fate]
    specs: tuple[TensorSpec, ...]
    owner: Mapping[str, tuple[str, str]]
    left_out: tuple[str, ...]
    beside: tuple[str, ...]
    notes: tuple[str, ...]
    source_bytes: int
    vocabulary: int
    config: dict[str, Any]
    also: tuple["Plan", ...] = ()

    @property
    def quantization_config(self) -> dict[str, Any] | None:
        """What the config.json says of the packed matrices; None where none is packed."""
        return self.config.get("quantization_config")

    @cached_property
    def packed(self) -> list[Fate]:
        """The matrices that are written as integer codes."""
        return [fate for fate in self.fates.values() if fate.packed]

    @cached_property
    def worked_on(self) -> list[Fate]:
        """The matrices that are packed, or pruned and written dense."""
        return [fate for fate in self.fates.values() if fate.worked_on]

    @property
    def compensates(self) -> bool:
        """Whether the original model walks along, so that codes make up for what those before have lost.

        Wanda and magnitude, ways to prune only, leave the weights that they keep as they are.
        """
        solved = bool(self.packed) or self.recipe.method == "sparsegpt"
        return solved and not self.repack and self.recipe.effort != "fast"

    @property
    def tunes(self) -> bool:
        """Whether codes, scales and norms are tuned once all are solved."""
        return self.recipe.effort == "high"

    @cached_property
    def dense(self) -> list[Fate]:
        """The matrices that are left as they are."""
        return [fate for fate in self.fates.values() if not fate.worked_on]

    @cached_property
    def unpruned(self) -> list[Fate]:
        """The packed matrices that are not 2:4 while others are."""
        return [fate for fate in self.packed if fate.reason is not None]

    @property
    def sparsity(self) -> str | None:
        """What the packed matrices but for the unpruned ones are: 2:4, or nothing special."""
        return manifests.SPARSITY if any(fate.layout.sparse for fate in self.fates.values()) else None

    @cached_property
    def dtypes(self) -> dict[str, torch.dtype]:
        """The type every tensor is written as."""
        return {spec.name: spec.dtype for spec in self.specs}

    @cached_property
    def _by_block(self) -> dict[int, list[Fate]]:
        found: dict[int, list[Fate]] = {}
        for fate in self.worked_on:
            number = self.structure.block_of(fate.name)
            assert number is not None  # what is outside of the blocks stays dense
            found.setdefault(number, []).append(fate)
        return found

    def worked_on_in(self, block: int) -> list[Fate]:
        """Those of one block."""
        return self._by_block.get(block, [])

    def suffixes(self, fate: Fate) -> tuple[str, ...]:
        """The suffixes of the tensors that a matrix is written as."""
        return tuple(_tensors(fate)) if fate.packed else ("weight",)

    def pack(self, fate: Fate, layer: QuantizedLinear) -> dict[str, Tensor]:
        """The tensors that a matrix is written as, by suffix."""
        if not fate.layout.symmetric and layer.zeros is None:
            # the config speaks for all: one linear with zero points makes every linear store them
            middle = 1 << (layer.bits - 1)
            layer = replace(layer, zeros=torch.full_like(layer.scales, middle, dtype=torch.uint8))
        return formats.FORMATS[fate.layout.format].pack(layer)

    def divided(self, fate: Fate, tensors: Mapping[str, Tensor], count: int) -> list[dict[str, Tensor]]:
        """Of so many matrices like `fate` that were packed side by side the tensors of each, by suffix."""
        pieces = {}
        for suffix, (_, shape) in _tensors(fate).items():
            whole = tensors[suffix]
            if suffix == formats.SHAPE:
                whole = whole.new_tensor([fate.n, fate.k])
            grown = [axis for axis, size in enumerate(shape) if whole.shape[axis] != size]
            pieces[suffix] = whole.split(shape[grown[0]], grown[0]) if grown else [whole] * count
        return [{suffix: of_all[i].contiguous() for suffix, of_all in pieces.items()} for i in range(count)]

    def unpack(
        self, fate: Fate, tensors: Mapping[str, Tensor], memory: Tensor | None = None
    ) -> QuantizedLinear:
        """A matrix from the tensors that it is written as; its codes in memory, if that is given."""
        layout = fate.layout
        scheme = formats.Scheme(
            layout.format, layout.bits, layout.group_size,
            symmetric=layout.symmetric, act_order=layout.act_order,
        )  # fmt: skip
        return formats.FORMATS[layout.format].unpack(tensors, scheme, memory)

    @property
    def output_bytes(self) -> int:
        """Bytes of all tensors to be written."""
        return sum(spec.nbytes for spec in self.specs)

    @property
    def bits_per_weight(self) -> float:
        """Bits on disk for one weight of the matrices worked on, scales included."""
        stored = sum(spec.nbytes for spec in self.specs if spec.name in self.owner)
        return 8 * stored / max(sum(fate.k * fate.n for fate in self.worked_on), 1)

    def stages(self, block: int) -> list[Stage]:
        """The stages of a block that are worked on, in their order."""
        path = f"{self.structure.blocks}.{block}"
        found = {fate.name for fate in self.worked_on_in(block)}
        return [
            stage
            for stage in self.structure.stages(block)
            if all(f"{path}.{name}" in found for name in stage)
        ]


@contextmanager
def _all_stays() -> Iterator[None]:
    """Make objects by the hundred thousand and not look for garbage among them, which takes as long again."""
    looked = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if looked:
            gc.enable()


@_all_stays()
def make_plan(
    weights: Weights,
    recipe: Recipe,
    *,
    group_size: int | None = None,
    requantize: bool = False,
    trust_remote_code: bool = False,
) -> Plan:
    """Plan a conversion of `weights` by `recipe`.

    A source that is quantized keeps its group size whatever the recipe says; `group_size` is one that was
    asked for and not just a recipe's default, and must agree with it.

    Raises SourceError for a model that is not what its config says, FormatError naming every linear that the
    format cannot hold and the --skip that leaves it dense.
    """
    checkpoint = weights.checkpoint
    model = module_tree(weights, trust_remote_code=trust_remote_code)
    structure = discover(model)
    repack = weights.scheme is not None and not requantize
    asked = recipe
    if repack:
        refusals.check_source(weights, recipe.format)
        recipe = _as_stored(recipe, weights, group_size)
    else:
        recipe = _within_positions(recipe, model)
    refusals.check_effort(recipe, repack=repack, experts=bool(structure.experts))
    refusals.check_scales(recipe, repack=repack)
    claimed = set(weights.sparse_linears(manifests.load(checkpoint.directory)))
    refusals.check_sparsity(weights, recipe, claimed, repack=repack)

    names, modules = Names(model), dict(model.named_modules())
    left_out = check_names(weights, names, requantize=requantize)
    linears = {
        name: module
        for name, module in modules.items()
        if isinstance(module, torch.nn.Linear)
        and (structure.stage_of(name) or name in structure.dense)
        and f"{name}.weight" in weights  # a head that is the embedding is not
        # of what is quantized only the blocks' is repacked
        and (structure.block_of(name) is not None or not weights.is_packed(name))
    }
    together = {name: structure.together(name) for name in linears}
    fates = fates_of(linears, structure.dense, together, recipe, weights, claimed, repack=repack)
    refusals.check_patterns(recipe, list(linears))
    refusals.check_stages(fates, together, repack=repack)
    if repack:
        fates = refusals.with_codes(fates, weights, asked, together)
        if not checkpoint.only_looked_at:
            refusals.check_quads(fates, weights, recipe, together)
    else:
        refusals.check_shapes(fates, recipe, together)

    refusals.check_reordered(fates, recipe, model.config.get_text_config().model_type)

    specs, owner = _specs(weights, names.shapes, structure, fates, recipe, left_out)
    return Plan(
        structure=structure,
        blocks=len(structure.parts),
        recipe=recipe,
        repack=repack,
        dtype=DTYPES.get(recipe.dtype, weights.own_dtype),
        fates=fates,
        specs=tuple(specs),
        owner=owner,
        left_out=tuple(left_out),
        beside=tuple(names.beside(checkpoint.tensors)),
        notes=(
            *_source_notes(weights, model),
            *_expert_notes(modules, structure, fates),
            *_notes(fates, recipe, weights if repack else None),
        ),
        source_bytes=sum(info.end - info.start for info in checkpoint.tensors.values()),
        vocabulary=model.config.get_text_config().vocab_size,
        config=_config(weights, model, modules, recipe, fates),
    )


def _config(
    weights: Weights, model: PreTrainedModel, modules: Modules, recipe: Recipe, fates: Mapping[str, Fate]
) -> dict[str, Any]:
    """The source's config.json as it is true of what is written."""
    config = {key: value for key, value in weights.checkpoint.config.items() if key not in _NOT_KEPT}
    if recipe.dtype != "auto":
        for key in {"dtype", "torch_dtype"} & config.keys() or {"dtype"}:
            config[key] = recipe.dtype
    if claims_tied(weights, model):
        config["tie_word_embeddings"] = False
    if any(fate.packed for fate in fates.values()):
        layout = formats.FORMATS[recipe.format]
        config["quantization_config"] = layout.quantization_config(
            [
                *fates.values(),
                *_as_in_files(weights, fates),
                *_tied_head(model, modules, fates),
                *_routers(weights, modules),
            ]
        )
    return config


def _as_in_files(weights: Weights, fates: Mapping[str, Fate]) -> Iterator[Fate]:
    """The dense matrices by the names that they have in the files alone, from which vLLM makes its own."""
    for name, fate in fates.items():
        called = weights.on_disk(f"{name}.weight").removesuffix(".weight")
        if not fate.packed and called != name:
            yield replace(fate, matrix=replace(fate.matrix, name=called))


def _routers(weights: Weights, modules: Modules) -> Iterator[Fate]:
    """What sends tokens to experts, by both of its names: no linears here, but engines take them for some."""
    around = {path.rpartition(".")[0] for path, module in modules.items() if isinstance(module, Experts)}
    for name, module in modules.items():
        weight = module._parameters.get("weight")
        if weight is None or weight.dim() != 2 or isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            continue
        if any(name.startswith(f"{path}.") for path in around):
            called = weights.on_disk(f"{name}.weight").removesuffix(".weight")
            for one in dict.fromkeys((name, called)):
                yield dense(Matrix(one, weight.shape[1], weight.shape[0]), "float16", "a router")


def _tied_head(model: PreTrainedModel, modules: Modules, fates: Mapping[str, Fate]) -> Iterator[Fate]:
    """The head where it is the embedding and so no matrix of the files, which engines take for a linear."""
    head = model.get_output_embeddings()
    for name, module in modules.items():
        if module is head and isinstance(head, torch.nn.Linear) and name not in (*fates, "lm_head"):
            yield dense(Matrix(name, head.in_features, head.out_features), "float16", "the embedding")


def _as_stored(recipe: Recipe, weights: Weights, asked: int | None) -> Recipe:
    """The recipe with the bits and group sizes that the codes of the source have."""
    found = {}
    for linear in weights.packed_linears():
        scheme = weights.scheme_of(linear)
        found[linear] = (scheme.bits, scheme.group_size)
        if asked not in (None, scheme.group_size):
            raise ConvertError(
                f"the source is quantized with group size {scheme.group_size}, which a repack keeps, "
                f"not {asked}.",
                "--requantize solves again from the dequantized weights.",
            )
        if scheme.group_size not in GROUP_SIZES:
            raise FormatError(
                f"the source is quantized with group size {scheme.group_size}; 128, 64, 32 and -1 can be "
                "written.",
                "--requantize solves again from the dequantized weights.",
            )
    bits, size = mixtures.usual(found)
    others = {
        name: {"bits": kind[0], "group_size": kind[1]}
        for kind, names in mixtures.told(found).items()
        if kind != (bits, size)
        for name in names
    }
    return recipe.changed({"bits": bits, "group_size": size, "overrides": others})


def _within_positions(recipe: Recipe, model: PreTrainedModel) -> Recipe:
    """The recipe with sequences no longer than the model was made for."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is None or recipe.sequence_length <= limit:
        return recipe
    log.warning(
        "calibration sequences of %d tokens, not %d: the model's limit", limit, recipe.sequence_length
    )
    return recipe.changed({"sequence_length": limit})


def _source_notes(weights: Weights, model: PreTrainedModel) -> Iterator[str]:
    """In what the source is not quite what it says."""
    if weights.stored_in:
        yield f"stored in {weights.stored_in}: read as floats"
    if weights.disregarded:
        yield f"{weights.disregarded}: they are taken as they are, and the words left out"
    if weights.scheme is not None and weights.scheme.beyond:
        yield f"left out: {weights.scheme.beyond}"
    if weights.scheme is not None and (weights.checkpoint.quantization_config or {}).get("kv_cache_scheme"):
        yield "kv_cache_scheme is left out: engines keep the cache in 16 bits"
    if claims_tied(weights, model):
        yield (
            "the head is stored and is not the embedding, though config.json ties them: it is kept, as "
            "transformers does, and tie_word_embeddings written as false"
        )
    if weights.renamed:
        full, name = next(iter(weights.renamed.items()))
        yield f"{len(weights.renamed)} tensors are written under their full names, {name} as {full}"


def _expert_notes(modules: Modules, structure: Structure, fates: Mapping[str, Fate]) -> Iterator[str]:
    """Of a mixture of experts: how many there are, and what vLLM refuses of them."""
    counts = Counter(structure.experts.values())
    for count, layers in counts.items():
        yield f"{layers} layers of {count} experts, each calibrated on the tokens that go to it; routers stay"
    ours = {
        fate.layout.format
        for fate in fates.values()
        if fate.layout.format in ("marlin", "marlin-24") and structure.part_of_experts(fate.name)
    }
    experts = [module for module in modules.values() if isinstance(module, Experts)]
    refused = {
        "in marlin-24": "marlin-24" in ours,
        "with biases": any(one.has_bias for one in experts),
        f"that are more than {MOST} on a rank": any(count > MOST for count in counts),
        "without a gate": not all(one.has_gate for one in experts),
        "that read tokens times their scores": any(
            isinstance(one, ScoresOnInputs) for one in modules.values()
        ),
    }
    if ours and any(refused.values()):
        yield (
            f"experts {' and '.join(why for why, true in refused.items() if true)} load in transformers with "
            "marlin-convert, not in vLLM, which takes --format gptq or compressed-tensors"
        )


def _notes(fates: Mapping[str, Fate], recipe: Recipe, repacked: Weights | None) -> Iterator[str]:
    """What the reader of a plan should know."""
    packed = [fate for fate in fates.values() if fate.packed]
    if repacked is not None and repacked.scheme is not None:
        yield f"the source is already {repacked.scheme.format}: its codes are kept, nothing is calibrated"
        if repacked.checkpoint.only_looked_at:
            yield "zero points, the order of groups and 2:4 are as its config says until its files are here"
    if recipe.format in ("gptq", "compressed-tensors", "marlin") and any(
        fate.layout.sparse for fate in fates.values()
    ):
        yield f"{recipe.format} stores the pruned codes too: engines load it as ordinary int4"
    if recipe.format in ("marlin", "marlin-24"):
        odd = sum(bool(fate.k % 128 or fate.n % 256) for fate in packed)
        if odd:
            yield (
                f"{odd} linears have inputs not divisible by 128 or outputs not by 256: for our own kernel "
                "and plugins only"
            )
        small = sorted({fate.layout.group_size for fate in packed} & {32, 64})
        if small:  # in marlin: marlin-24 has no such groups
            sizes = " and ".join(map(str, small))
            yield f"group size {sizes} in marlin files: for our own kernel and plugins only"
    if packed and recipe.group_size == "auto":
        (usual, _), *others = Counter(fate.layout.group_size for fate in packed).most_common()
        for size, count in others:
            yield f"{count} linears in groups of {size}, the others of {usual}: what divides their inputs"


def _tensors(fate: Fate) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of the tensors that a packed matrix is written as, by suffix."""
    layout = fate.layout
    return formats.FORMATS[layout.format].tensors(
        fate.k, fate.n, bits=layout.bits, group_size=layout.group_size, symmetric=layout.symmetric
    )


def _specs(
    weights: Weights,
    shapes: Mapping[str, tuple[int, ...]],
    structure: Structure,
    fates: Mapping[str, Fate],
    recipe: Recipe,
    left_out: list[str],
) -> tuple[list[TensorSpec], dict[str, tuple[str, str]]]:
    """The tensors to write, block by block and then the rest, and whose those of a matrix worked on are."""
    of_codes, out = weights.packed_names(), set(left_out)
    parameters = dict.fromkeys(
        name.rpartition(".")[0] + ".weight" if name in of_codes else name
        for name in weights.checkpoint.tensors
        if name not in out
    )
    owner = {f"{fate.name}.weight": (fate.name, "weight") for fate in fates.values() if fate.pruned}
    specs = []
    for name in parameters:
        linear = name.removesuffix(".weight")
        fate = fates.get(linear) if linear != name else None
        if fate is not None and fate.packed:
            for suffix, (dtype, shape) in _tensors(fate).items():
                owner[f"{linear}.{suffix}"] = (linear, suffix)
                specs.append(TensorSpec(f"{linear}.{suffix}", dtype, shape))
        else:
            stored = weights.dtype(name)
            written = DTYPES.get(recipe.dtype, stored) if stored.is_floating_point else stored
            specs.append(TensorSpec(name, written, shapes.get(name) or weights.shape(name)))

    def block(spec: TensorSpec) -> float:
        number = structure.block_of(spec.name)
        return math.inf if number is None else number

    return sorted(specs, key=block), owner
