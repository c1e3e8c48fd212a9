"""The plan: what becomes of every linear and every tensor, known from headers before a weight is read."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from marlin_convert import formats
from marlin_convert.checkpoint import manifest as manifests
from marlin_convert.checkpoint.linears import Weights
from marlin_convert.checkpoint.reader import QUANTIZATION_KEYS
from marlin_convert.checkpoint.writer import TensorSpec
from marlin_convert.errors import ConvertError, FormatError, SourceError
from marlin_convert.fate import Fate
from marlin_convert.formats import bounds
from marlin_convert.models.structure import Stage
from marlin_convert.models.tree import OTHER_MODEL, block_linears, check_names, claims_tied, module_tree
from marlin_convert.quantized import QuantizedLinear
from marlin_convert.recipe import Recipe
from marlin_convert.ways import option_for, other_codes, other_layouts, short_group

log = logging.getLogger("marlin_convert")

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}

# What a config.json says of how its own weights are packed, and where somebody once had the source.
_NOT_KEPT = (*QUANTIZATION_KEYS, "_name_or_path")


@dataclass(frozen=True)
class Plan:
    """Everything a conversion will do.

    `repack` says that the codes of the source are kept, `symmetric` that no linear has zero points; the model
    computes in `dtype`; `specs` are the tensors to be written, `owner` maps those that belong to a packed
    linear to (linear, suffix); `left_out` are source tensors not written; `config` becomes the config.json.
    """

    architecture: Architecture
    blocks: int
    recipe: Recipe
    bits: int
    repack: bool
    symmetric: bool
    dtype: torch.dtype
    fates: tuple[Fate, ...]
    specs: tuple[TensorSpec, ...]
    owner: dict[str, tuple[str, str]]
    left_out: tuple[str, ...]
    notes: tuple[str, ...]
    source_bytes: int
    vocabulary: int
    config: dict[str, Any]

    @property
    def quantization_config(self) -> dict[str, Any] | None:
        """What the config.json says of the packed linears; None where none is packed."""
        return self.config.get("quantization_config")

    @property
    def packed(self) -> list[Fate]:
        """The linears that are written as integer codes."""
        return [fate for fate in self.fates if fate.packed]

    @property
    def worked_on(self) -> list[Fate]:
        """The linears that are packed, or pruned and written dense."""
        return [fate for fate in self.fates if fate.packed or fate.pruned]

    @property
    def dense(self) -> list[Fate]:
        """The linears of the blocks that are left as they are."""
        return [fate for fate in self.fates if not (fate.packed or fate.pruned)]

    @property
    def unpruned(self) -> list[Fate]:
        """The packed linears that are not 2:4 while others are."""
        return [fate for fate in self.packed if fate.reason is not None]

    @property
    def sparsity(self) -> str | None:
        """What the packed linears but for the unpruned ones are: 2:4, or nothing special."""
        return manifests.SPARSITY if any(fate.sparse for fate in self.fates) else None

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """The type every tensor is written as."""
        return {spec.name: spec.dtype for spec in self.specs}

    def worked_on_in(self, block: int) -> list[Fate]:
        """Those of one block."""
        prefix = f"{self.architecture.blocks}.{block}."
        return [fate for fate in self.worked_on if fate.linear.startswith(prefix)]

    def suffixes(self, linear: str) -> tuple[str, ...]:
        """The suffixes of the tensors that a linear is written as."""
        return tuple(suffix for owner, suffix in self.owner.values() if owner == linear)

    def pack(self, linear: str, layer: QuantizedLinear) -> dict[str, Tensor]:
        """The tensors that a linear is written as, by suffix."""
        if not self.symmetric and layer.zeros is None:
            # the config speaks for all: one linear with zero points makes every linear store them
            middle = 1 << (layer.bits - 1)
            layer = replace(layer, zeros=torch.full_like(layer.scales, middle, dtype=torch.uint8))
        return formats.FORMATS[self._scheme(linear).format].pack(layer)

    def unpack(
        self, linear: str, tensors: Mapping[str, Tensor], memory: Tensor | None = None
    ) -> QuantizedLinear:
        """A linear from the tensors that it is written as; its codes in memory, if that is given."""
        scheme = self._scheme(linear)
        return formats.FORMATS[scheme.format].unpack(tensors, scheme, memory)

    def _scheme(self, linear: str) -> formats.Scheme:
        assert self.quantization_config is not None
        return formats.detect(self.quantization_config).of(linear)

    @property
    def output_bytes(self) -> int:
        """Bytes of all tensors to be written."""
        return sum(spec.nbytes for spec in self.specs)

    @property
    def bits_per_weight(self) -> float:
        """Bits on disk for one weight of the linears worked on, scales included."""
        stored = sum(spec.nbytes for spec in self.specs if spec.name in self.owner)
        return 8 * stored / max(sum(fate.k * fate.n for fate in self.worked_on), 1)

    def stages(self, block: str) -> list[Stage]:
        """The stages of a block (by module path) that are worked on, in their order."""
        found = {fate.linear for fate in self.worked_on}
        return [
            stage for stage in self.architecture.stages if all(f"{block}.{name}" in found for name in stage)
        ]

    def fate(self, linear: str) -> Fate:
        """What becomes of a linear."""
        return next(fate for fate in self.fates if fate.linear == linear)


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
    architecture = architecture_of(checkpoint.config)
    model = module_tree(weights, trust_remote_code=trust_remote_code)
    repack = weights.scheme is not None and not requantize
    asked, bits = recipe, 4
    if repack:
        assert weights.scheme is not None
        _check_one_scheme(weights)
        recipe = _with_group_size_of_source(recipe, weights.scheme.group_size, group_size)
        bits = weights.scheme.bits
    else:
        recipe = _within_positions(recipe, model)
    claimed = set(weights.sparse_linears(manifests.load(checkpoint.directory)))
    _check_sparsity(weights, recipe, claimed, repack=repack)

    left_out = check_names(weights, model, requantize=requantize)
    linears = block_linears(model, architecture)
    if not linears:
        raise SourceError("config.json means a model without blocks.", OTHER_MODEL)
    fates = tuple(_fates(linears, architecture, recipe, weights, claimed, repack=repack))
    _check_patterns(recipe, linears)
    together = _together(fates, architecture)
    _check_stages(fates, together)
    symmetric, act_order = True, False
    if repack:
        symmetric, act_order = _check_codes(fates, weights, asked, together)
        _check_quads(fates, weights, recipe, together)
    else:
        _check_shapes(fates, recipe, together)

    packed = {
        fate.linear: fate.layout.tensors(
            fate.k, fate.n, bits=bits, group_size=recipe.group_size, symmetric=symmetric
        )
        for fate in fates
        if fate.packed
    }
    owner = {f"{fate.linear}.weight": (fate.linear, "weight") for fate in fates if fate.pruned}
    specs = tuple(_specs(weights, model, architecture, packed, recipe, owner, left_out))
    return Plan(
        architecture=architecture,
        blocks=len(model.get_submodule(architecture.blocks)),  # type: ignore[arg-type]
        recipe=recipe,
        bits=bits,
        repack=repack,
        symmetric=symmetric,
        dtype=DTYPES.get(recipe.dtype, weights.own_dtype),
        fates=fates,
        specs=specs,
        owner=owner,
        left_out=tuple(left_out),
        notes=(*_source_notes(weights, model), *_notes(fates, recipe, weights if repack else None)),
        source_bytes=sum(info.end - info.start for info in checkpoint.tensors.values()),
        vocabulary=model.config.get_text_config().vocab_size,
        config=_config(weights, model, recipe, fates, bits=bits, symmetric=symmetric, act_order=act_order),
    )


def _config(
    weights: Weights, model: PreTrainedModel, recipe: Recipe, fates: Sequence[Fate], **packed: Any
) -> dict[str, Any]:
    """The source's config.json as it is true of what is written; `packed` says how the codes are."""
    config = {key: value for key, value in weights.checkpoint.config.items() if key not in _NOT_KEPT}
    if recipe.dtype != "auto":
        for key in {"dtype", "torch_dtype"} & config.keys() or {"dtype"}:
            config[key] = recipe.dtype
    if claims_tied(weights, model):
        config["tie_word_embeddings"] = False
    if recipe.format != "dense":
        config["quantization_config"] = formats.FORMATS[recipe.format].quantization_config(
            group_size=recipe.group_size,
            skipped=[fate.linear for fate in fates if not fate.packed],
            **packed,
            **_other_layouts(fates, recipe),
        )
    return config


def _check_sparsity(weights: Weights, recipe: Recipe, claimed: set[str], *, repack: bool) -> None:
    """Raise ConvertError when what is asked of sparsity is not what a repack, or quantizing, does."""
    if recipe.format == "dense" and weights.scheme is not None:
        raise ConvertError(
            f"{weights.checkpoint.directory.name} is quantized already ({weights.scheme.format}).",
            "prune the model it was made from, or quantize --requantize --sparsity 2:4.",
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


def _check_one_scheme(weights: Weights) -> None:
    """Raise FormatError where a repack would lose something: what is written is stored in one way."""
    scheme = weights.scheme
    assert scheme is not None
    again = "--requantize solves all of them again from the dequantized weights."
    if scheme.beyond:
        raise FormatError(f"the source has more than packed weights: {scheme.beyond}.", again)
    for linear in weights.packed_linears():
        own = weights.scheme_of(linear)
        if (own.bits, own.group_size) != (scheme.bits, scheme.group_size):
            raise FormatError(
                f"{linear} has {own.bits} bits and groups of {own.group_size}, others {scheme.bits} and "
                f"{scheme.group_size}; a repack writes one of them.",
                again,
            )


def _with_group_size_of_source(recipe: Recipe, stored: int, asked: int | None) -> Recipe:
    if asked not in (None, stored):
        raise ConvertError(
            f"the source is quantized with group size {stored}, which a repack keeps, not {asked}.",
            "--requantize solves again from the dequantized weights.",
        )
    try:
        return recipe.changed({"group_size": stored})
    except ConvertError as error:
        raise FormatError(
            f"the source is quantized with group size {stored}; 128, 64, 32 and -1 can be written.",
            "--requantize solves again from the dequantized weights.",
        ) from error


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


def _notes(fates: Sequence[Fate], recipe: Recipe, repacked: Weights | None) -> Iterator[str]:
    """What the reader of a plan should know."""
    if repacked is not None and repacked.scheme is not None:
        yield f"the source is already {repacked.scheme.format}: its codes are kept, nothing is calibrated"
    if recipe.format in ("gptq", "compressed-tensors", "marlin") and any(fate.sparse for fate in fates):
        yield f"{recipe.format} stores the pruned codes too: engines load it as ordinary int4"
    if recipe.format in ("marlin", "marlin-24"):
        odd = sum(fate.packed and bool(fate.n % 256) for fate in fates)
        if odd:
            yield f"{odd} linears have outputs not divisible by 256: for our own kernel and plugins only"
        if recipe.group_size in (32, 64):  # in marlin: marlin-24 has no such groups
            yield f"group size {recipe.group_size} in marlin files: for our own kernel and plugins only"


def _fates(
    linears: dict[str, torch.nn.Linear],
    architecture: Architecture,
    recipe: Recipe,
    weights: Weights,
    claimed: set[str],
    *,
    repack: bool,
) -> list[Fate]:
    sparse = _sparse(linears, recipe, weights, claimed, repack=repack)
    fates = []
    for name, linear in linears.items():
        path = name.removeprefix(architecture.blocks + ".").partition(".")[2]
        pattern = next((pattern for pattern in recipe.skip if fnmatchcase(name, pattern)), None)
        reason = None
        if repack:
            reason = None if weights.is_packed(name) else "dense in the source"
            if pattern and reason is None:
                raise ConvertError(
                    f"--skip {pattern!r} matches {name}, which is quantized in the source.",
                    "a repack keeps what is quantized; start from the original model to leave it dense.",
                )
        elif pattern:
            reason = f"skipped by {pattern!r}"
        elif architecture.stage_of(path) is None:
            reason = "not in the table of this architecture"
        format: str | None = None if reason or recipe.format == "dense" else recipe.format
        if format is not None and sparse and name not in sparse:
            pattern = next((pattern for pattern in recipe.unpruned if fnmatchcase(name, pattern)), None)
            reason = f"unpruned by {pattern!r}" if pattern else "not 2:4 in the source"
            format = "marlin" if format == "marlin-24" else format
        elif recipe.format == "dense" and reason is None and name not in sparse:
            reason = "left unpruned by the recipe"
        is_sparse = name in sparse and (format is not None or (reason is None and recipe.format == "dense"))
        fates.append(Fate(name, linear.in_features, linear.out_features, format, is_sparse, reason))
    return fates


def _sparse(
    linears: Mapping[str, torch.nn.Linear],
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
    sparse = {name for name in found if not any(fnmatchcase(name, pattern) for pattern in recipe.unpruned)}
    if recipe.unpruned and not sparse:
        raise ConvertError(
            f"--unpruned {recipe.unpruned[0]!r} leaves no linear that is 2:4.",
            "it is for those that are not while others are.",
        )
    return sparse


def _other_layouts(fates: Sequence[Fate], recipe: Recipe) -> dict[str, list[str]]:
    """What a quantization_config says of packed linears in another layout than its own."""
    if recipe.format != "marlin-24":
        return {}
    return {"unpruned": [fate.linear for fate in fates if fate.packed and not fate.sparse]}


def _check_patterns(recipe: Recipe, linears: dict[str, torch.nn.Linear]) -> None:
    for option, patterns in (("--skip", recipe.skip), ("--unpruned", recipe.unpruned)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in linears):
                raise ConvertError(
                    f"{option} {pattern!r} matches no linear of the blocks.",
                    f"their names are like {next(iter(linears))!r}.",
                )


def _together(fates: Sequence[Fate], architecture: Architecture) -> dict[str, list[str]]:
    """The linears of each linear's stage, itself among them: engines fuse them into one."""
    found = {}
    for fate in fates:
        path = fate.linear.removeprefix(architecture.blocks + ".").partition(".")[2]
        block = fate.linear.removesuffix(path)
        found[fate.linear] = [block + name for name in architecture.stage_of(path) or (path,)]
    return found


def _check_stages(fates: Sequence[Fate], together: Mapping[str, Sequence[str]]) -> None:
    """What engines fuse is all packed or not at all, and in one format."""
    found = {fate.linear: fate.format for fate in fates}
    for fate in fates:
        if fate.reason is None:
            continue
        others = [name for name in together[fate.linear] if found[name] not in (None, fate.format)]
        if others:
            kind, option = ("left dense", "--skip") if fate.format is None else ("not 2:4", "--unpruned")
            raise ConvertError(
                f"{fate.linear} is {kind}, {' and '.join(others)} beside it not; engines load them as one.",
                "add " + " ".join(f"{option} '{name}'" for name in others),
            )


def _check_shapes(fates: Sequence[Fate], recipe: Recipe, together: Mapping[str, Sequence[str]]) -> None:
    odd = [fate.linear for fate in fates if fate.sparse and fate.k % 4]
    if odd:
        k = next(fate.k for fate in fates if fate.linear == odd[0])
        raise FormatError(
            f"{odd[0]} has {k} inputs; 2:4 needs them divisible by four.",
            "leave it as it is: " + option_for("--skip", odd, fates),
        )
    _refuse(
        fates,
        lambda fate: (
            fate.layout.refusal(fate.k, fate.n, bits=4, group_size=recipe.group_size)
            or short_group(fate.k, recipe.group_size)
        ),
        lambda: other_layouts(fates, recipe, together),
    )


def _check_codes(
    fates: Sequence[Fate], weights: Weights, recipe: Recipe, together: Mapping[str, Sequence[str]]
) -> tuple[bool, bool]:
    """Check that the formats can hold the codes, which only the stored zero points and group orders tell.

    `recipe` is the one asked for, whatever the source's group size, and `together` what engines fuse.
    Returns whether all linears are symmetric, and whether the groups of any follow activation order.
    """
    scheme = weights.scheme
    assert scheme is not None
    elsewhere = set(weights.packed_linears()) - {fate.linear for fate in fates}
    if elsewhere:
        raise FormatError(
            f"{min(elsewhere)} is quantized in the source; only the linears of the blocks are repacked.",
            "--requantize writes it dense, and solves the blocks again from the dequantized weights.",
        )
    found = {fate.linear: weights.peculiarities(fate.linear, fate.k, fate.n) for fate in fates if fate.packed}

    def refusal(fate: Fate, format: str) -> str | None:
        kind = asdict(found[fate.linear])
        layout = formats.FORMATS[format]
        return layout.refusal(fate.k, fate.n, bits=scheme.bits, group_size=scheme.group_size, **kind)

    _refuse(
        fates,
        lambda fate: refusal(fate, str(fate.format)),
        lambda: other_codes(fates, recipe, together, refusal),
    )
    kinds = found.values()
    return all(kind.symmetric for kind in kinds), any(kind.act_order for kind in kinds)


def _check_quads(
    fates: Sequence[Fate], weights: Weights, recipe: Recipe, together: Mapping[str, Sequence[str]]
) -> None:
    """Check that what becomes marlin-24 and is not yet is 2:4, which only the codes tell."""
    todo = [
        fate
        for fate in fates
        if fate.format == "marlin-24" and weights.scheme_of(fate.linear).format != "marlin-24"
    ]
    if todo:
        log.info("counting the non-zeros of %d linears", len(todo))
    memory = torch.empty(max((fate.k * fate.n for fate in todo), default=0), dtype=torch.uint8)
    refused = []
    for fate in todo:
        layer = weights.quantized(fate.linear, memory)
        try:
            bounds.check_quads(layer)
        except FormatError as error:
            refused.append((fate, str(error)))
    if refused:
        fate, why = refused[0]
        beside = {name for fate, _ in refused for name in together[fate.linear]}
        unpruned = option_for("--unpruned", [fate.linear for fate in fates if fate.linear in beside], fates)
        raise FormatError(
            f"{fate.linear} is not 2:4: {why}{_more(refused)}.",
            f"--format marlin holds it; to write only what is not 2:4 so: {unpruned}"
            if recipe.sparsity == "none"
            else "a repack does not prune: --requantize does, and solves again from the dequantized weights.",
        )


def _refuse(fates: Sequence[Fate], refusal: Callable[[Fate], str | None], way_out: Callable[[], str]) -> None:
    refused = [(fate, why) for fate in fates if fate.packed and (why := refusal(fate))]
    if refused:
        fate, why = refused[0]
        raise FormatError(
            f"{fate.linear} has {fate.k} inputs and {fate.n} outputs; {fate.format} {why}{_more(refused)}.",
            way_out(),
        )


def _more(refused: Sequence[tuple[Fate, str]]) -> str:
    """How many linears are refused beside the first."""
    return f" (and {len(refused) - 1} more linears)" if len(refused) > 1 else ""


def _specs(
    weights: Weights,
    model: torch.nn.Module,
    architecture: Architecture,
    packed: Mapping[str, Mapping[str, tuple[torch.dtype, tuple[int, ...]]]],
    recipe: Recipe,
    owner: dict[str, tuple[str, str]],
    left_out: Sequence[str],
) -> list[TensorSpec]:
    """The tensors to write, block by block and then the rest; fills `owner`.

    `packed` has the tensors of every packed linear: dtype and shape by suffix.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    of_codes = weights.packed_names()
    parameters = dict.fromkeys(
        name.rpartition(".")[0] + ".weight" if name in of_codes else name
        for name in weights.checkpoint.tensors
        if name not in left_out
    )
    specs = []
    for name in parameters:
        linear = name.removesuffix(".weight")
        if linear in packed and linear != name:
            for suffix, (dtype, shape) in packed[linear].items():
                owner[f"{linear}.{suffix}"] = (linear, suffix)
                specs.append(TensorSpec(f"{linear}.{suffix}", dtype, shape))
        else:
            dtype = weights.dtype(name)
            if recipe.dtype != "auto":
                dtype = DTYPES[recipe.dtype]
            specs.append(TensorSpec(name, dtype, shapes[name]))
    blocks = architecture.blocks + "."

    def block(spec: TensorSpec) -> float:
        number = spec.name.removeprefix(blocks).partition(".")[0]
        return int(number) if spec.name.startswith(blocks) else math.inf

    return sorted(specs, key=block)
