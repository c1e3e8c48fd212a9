"""Products of the packed linears and, beside the source, weights and predictions."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from marlin_convert.checkpoint import manifest as manifests
from marlin_convert.checkpoint.linears import Weights
from marlin_convert.checks.divergence import Comparison, Progress, compare, joined
from marlin_convert.checks.outcome import Check, json_numbers, reporting, verdict
from marlin_convert.checks.subject import Original, Subject
from marlin_convert.errors import ConvertError, SourceError
from marlin_convert.models.blocks import BlockModel
from marlin_convert.models.names import Names
from marlin_convert.quantized import QuantizedLinear, contiguous_groups

if TYPE_CHECKING:
    from marlin_convert.ranks import Share

# Of a whole weight, and of the weights of one output. Rounding to 4 bits stays near 0.1, GPTQ near 0.2, from
# weights that are moved by 0.4 at most (solvers/drift.py); all zeros would be as near as 1.
WEIGHT_ERROR = 0.5, 1.0
# With half of the weights gone, the others moved to make up for them and for what blocks before have lost:
# in SmolLM2 0.98, and 5.1 of an output with next to no weights. There the answers to the text judge.
PRUNED_WEIGHT_ERROR = 2.0, 20.0
# How far perplexity may rise over the source's.
PERPLEXITY = 2.0
# How far hidden states may be from the source's after a block, relative, and with half of the weights gone.
HIDDEN, PRUNED_HIDDEN = 0.5, 0.8


@reporting
def check(
    problems: list[str],
    subject: Subject,
    original: Original | None,
    progress: Progress,
    *,
    tolerance: float,
    strict: bool,
) -> Check:
    """Compare products, and beside the source weights and what is predicted of its text."""
    manifest = subject.manifest or {}
    rounded = manifests.rounded_to_nearest(manifest)
    if strict:
        sparse = bool(subject.weights.sparse_linears(subject.manifest))
        problems += [f"{name} was rounded to nearest" for name in rounded]
        rows_of = manifest.get("matrices", ())
        problems += [f"no token went to {row['name']}" for row in rows_of if row.get("tokens") == 0]
        problems += _hidden_problems(manifest.get("divergence", ()), sparse, "the calibration text")
    if original is None and not subject.weights.packed_linears():
        return Check("skipped", "no linear is packed, and no --source was given")
    rows, unreadable = _compare_weights(problems, subject, original, tolerance)
    details: dict[str, Any] = {"tolerance": tolerance, "rounded_to_nearest": rounded}
    details["weights"] = [json_numbers(row) for row in rows]
    products = [row["product_error"] for row in rows if "product_error" in row]
    summary = f"{len(products)} products, relative error at most {max(products, default=0.0):.1e}"
    if original is not None:
        errors = [row["error"] for row in rows if "product_error" in row and "error" in row]
        summary += f"; weight error at most {max(errors, default=0.0):.3f}"
        details["source"] = {"name": original.name}
        if unreadable:
            problems.append("the text was not run: not all weights can be read")
        else:
            try:
                text, overflows = _run_text(subject, original, progress)
            except ConvertError as error:
                problems.append(str(error))
            else:
                problems += overflows + _text_problems(text)
                problems += _hidden_problems(text.hidden, sparse, "the text") if strict else []
                summary = f"divergence {text.divergence:.4f} nats a token; {summary}"
                details["text"] = {**original.text, **json_numbers(asdict(text))}
    if rounded:
        summary += f"; {len(rounded)} linears rounded to nearest"
    return verdict(problems, summary, **details)


def _compare_weights(
    problems: list[str], subject: Subject, original: Original | None, tolerance: float
) -> tuple[list[dict[str, Any]], bool]:
    """A row of figures for every weight, and whether some could not be compared."""
    weights, model = subject.weights, subject.model
    known = Names(model)
    if original is not None:  # of the same model, perhaps under its other names
        known.place(original.weights)
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    names = [name for name in model.state_dict() if name in weights or name not in tied]
    if original is not None:  # of a tower that files hold in other tensors, and no text reads
        names = [name for name in names if name in weights or name in original.weights]
    packed_names = weights.packed_names()
    names += [name for name in known.beside(weights.checkpoint.tensors) if name not in packed_names]
    sparse = set(weights.sparse_linears(subject.manifest))
    source = None if original is None else original.weights
    if source is None:
        names = [name for name in names if _is_packed(weights, name)]

    def compared(name: str) -> tuple[dict[str, Any], list[str], bool]:
        limits = PRUNED_WEIGHT_ERROR if name.removesuffix(".weight") in sparse else WEIGHT_ERROR
        return _compare_weight(name, weights, source, tolerance, limits)

    rows, unreadable = [], False
    for row, found, readable in subject.ranks.each(names, compared):
        rows.append(row)
        problems += found
        unreadable |= not readable
    return rows, unreadable


def _is_packed(weights: Weights, name: str) -> bool:
    return name.endswith(".weight") and weights.is_packed(name.removesuffix(".weight"))


def _compare_weight(
    name: str, weights: Weights, original: Weights | None, tolerance: float, limits: tuple[float, float]
) -> tuple[dict[str, Any], list[str], bool]:
    """The row of a weight, what is wrong with it, and whether it could be compared."""
    linear, packed = name.removesuffix(".weight"), _is_packed(weights, name)
    row: dict[str, Any] = {"name": linear if packed else name}
    problems = []
    try:
        if packed:
            layer = weights.quantized(linear)
            row["product_error"] = _product_error(layer)
            if not row["product_error"] <= tolerance:
                problems.append(f"{linear}: product off by {row['product_error']:.2e} relative")
            weight = layer.dequantize()
        else:
            weight = weights.read(name)
        if original is not None:
            source = original.read(name)
            if source.shape != weight.shape:
                raise SourceError(
                    f"{name} has shape {tuple(weight.shape)}, in the source {tuple(source.shape)}"
                )
            row["error"], row["worst_output"] = _weight_error(weight, source)
            problems += _weight_problems(row, limits)
    except ConvertError as error:
        return row, [*problems, str(error)], False
    return row, problems, True


def _product_error(layer: QuantizedLinear) -> float:
    """How far x @ dequantized is, in float32, from the sum over groups of s (x (q - z)) in float64."""
    x = torch.randn(8, layer.k, generator=torch.Generator().manual_seed(0))
    group = layer.group_of_row
    if group is None:
        group = contiguous_groups(layer.k, layer.group_size)
    expected = torch.zeros(len(x), layer.n, dtype=torch.float64)
    for g in range(layer.groups):
        rows = (group == g).nonzero()[:, 0]
        zero = 1 << (layer.bits - 1) if layer.zeros is None else layer.zeros[g].double()
        codes = layer.codes[rows].double() - zero
        expected += layer.scales[g].double() * (x[:, rows].double() @ codes)
    got = (x @ layer.dequantize().t()).double()
    return ((got - expected).norm() / expected.norm().clamp_min(torch.finfo(torch.float32).tiny)).item()


def _weight_error(weight: Tensor, source: Tensor) -> tuple[float, float]:
    """The relative error of a weight, and the largest of one of its outputs."""
    if weight.dim() < 2:
        weight, source = weight.reshape(1, -1), source.reshape(1, -1)
    wrong, whole = [], []
    for ours, theirs in zip(weight.flatten(1).split(1024), source.flatten(1).split(1024), strict=True):
        theirs = theirs.float()
        wrong.append((ours.float() - theirs).square().sum(1))
        whole.append(theirs.square().sum(1))
    off, size = torch.cat(wrong), torch.cat(whole)
    tiny = torch.finfo(torch.float32).tiny
    error = (off.sum() / size.sum().clamp_min(tiny)).sqrt().item()
    return error, (off / size.clamp_min(tiny)).max().sqrt().item()


def _weight_problems(row: dict[str, Any], limits: tuple[float, float]) -> list[str]:
    limit, of_output = limits
    if not row["error"] <= limit:
        return [f"{row['name']} is {row['error']:.2f} from the source's, relative; at most {limit}"]
    if not row["worst_output"] <= of_output:
        return [
            f"{row['name']} has an output {row['worst_output']:.2f} from the source's, relative; "
            f"at most {of_output}"
        ]
    return []


def _run_text(subject: Subject, original: Original, progress: Progress) -> tuple[Comparison, list[str]]:
    """How the checkpoint predicts the text beside its source, and what of it a float16 engine cannot hold.

    Of several ranks each runs its share of the text.
    """
    overflows: dict[str, float] = {}
    parts = []
    for part, most in subject.ranks.each(
        subject.ranks.shares, lambda share: _run_share(subject, original, progress, share)
    ):
        parts.append(part)
        overflows |= {linear: max(one, overflows.get(linear, 0.0)) for linear, one in most.items()}
    said = [
        f"{linear} takes or gives {most:.3g}, which float16 cannot hold: an engine computes infinity; "
        "--dtype bfloat16 writes it for a type that can"
        for linear, most in overflows.items()
    ]
    return joined(parts), said


def _run_share(
    subject: Subject, original: Original, progress: Progress, share: "Share"
) -> tuple[Comparison, dict[str, float]]:
    """The comparison on a share of the samples, and the largest value of what overflows in it, by linear."""
    models = [
        BlockModel(weights, subject.device, fast=False, trust_remote_code=subject.trust_remote_code)
        for weights in (original.weights, subject.weights)
    ]
    blocks = [len(model) for model in models]
    if blocks[0] != blocks[1]:
        raise SourceError(f"the source has {blocks[0]} blocks, the checkpoint {blocks[1]}")
    vocabulary = subject.model.config.get_text_config().vocab_size
    if original.ids.max() >= vocabulary:
        raise SourceError(
            f"the tokenizer gives id {int(original.ids.max())}, there are {vocabulary} embeddings"
        )
    ids = original.ids[share.slice(len(original.ids))]
    return compare(models[0], models[1], ids, progress), models[1].overflows


def _text_problems(found: Comparison) -> list[str]:
    if not (math.isfinite(found.perplexity) and math.isfinite(found.divergence)):
        return [f"perplexity is {found.perplexity}, divergence {found.divergence}"]
    if found.perplexity > PERPLEXITY * found.source_perplexity:
        return [
            f"perplexity is {found.perplexity:.4g}, the source's {found.source_perplexity:.4g}; "
            f"at most {PERPLEXITY} times as much"
        ]
    return []


def _hidden_problems(after: Sequence[float], sparse: bool, text: str) -> list[str]:
    """What is wrong with the distance of hidden states from the source's, block by block."""
    limit = PRUNED_HIDDEN if sparse else HIDDEN
    block = next((block for block, one in enumerate(after) if not one <= limit), None)
    if block is None:
        return []
    return [
        f"hidden states after block {block} are {after[block]:.2f} from the source's on {text}, relative; "
        f"at most {limit}"
    ]
