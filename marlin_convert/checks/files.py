"""Files as in the manifest, tensors as in the architecture, values that float16 can hold."""

import math
from typing import Any

import torch

from marlin_convert.checkpoint.names import is_wrapped
from marlin_convert.checkpoint.reader import Checkpoint
from marlin_convert.checks.outcome import Check, reporting, verdict
from marlin_convert.checks.record import record_problems
from marlin_convert.checks.subject import Subject
from marlin_convert.errors import SourceError
from marlin_convert.models.names import Names
from marlin_convert.models.tree import check_names, claims_tied

FLOAT16_MAX = torch.finfo(torch.float16).max


@reporting
def check(
    problems: list[str],
    subject: Subject | None,
    manifest: dict[str, Any] | None,
    found: list[str],
    unseen: str | None,
) -> Check:
    """Take what was `found` wrong with the files and went `unseen`, and look at every tensor."""
    problems += found
    scales = None
    counted = [f"{len(manifest['files'])} files" if manifest else "no manifest, so no sha256 to compare"]
    if subject is not None:
        weights = subject.weights
        try:
            left_out = check_names(weights, Names(subject.model))
        except SourceError as error:
            problems.append(str(error))
            left_out = []
        problems += _engine_problems(subject)
        problems += record_problems(subject)
        packed = weights.packed_names()
        signs: dict[str, str] = {}
        for name in weights.checkpoint.tensors:
            if name not in left_out:
                found, least = _values(weights.checkpoint, name, scale=name in packed)
                problems += found
                if name in packed and least is not None:
                    signs[name.rpartition(".")[0]] = "signed" if least < 0 else "positive"
        counted.append(f"{len(weights.checkpoint.tensors)} tensors")
        if signs:
            scales = "signed" if "signed" in signs.values() else "positive"
            counted.append(f"scales {scales}")
            problems += _sign_problems(manifest, signs)
    if unseen is not None:
        counted.append(unseen)
    return verdict(problems, ", ".join(counted), manifest=manifest is not None, scales=scales)


def _engine_problems(subject: Subject) -> list[str]:
    """Where engines would load another model than the one checked here, or none."""
    problems = []
    if claims_tied(subject.weights, subject.model):
        problems.append(
            "config.json ties the head to the embedding and another head is stored: transformers takes that, "
            "vLLM and SGLang leave it out; write tie_word_embeddings = false"
        )
    if subject.weights.disregarded:
        problems.append(subject.weights.disregarded)
    if subject.weights.scheme is not None and subject.weights.scheme.beyond:
        problems.append(f"{subject.weights.scheme.beyond} are not checked, nor are weights without them")
    wrapped = [name for name in subject.weights.renamed.values() if is_wrapped(name)]
    if wrapped:
        problems.append(f"{len(wrapped)} tensors have names that no engine knows, like {wrapped[0]}")
    return problems


def _sign_problems(manifest: dict[str, Any] | None, signs: dict[str, str]) -> list[str]:
    """Where the scales are not of the signs that the manifest says."""
    rows = (manifest or {}).get("matrices", ())
    return [
        f"the scales of {row['name']} are {signs[row['name']]}, the manifest says {row['scales']}"
        for row in rows
        if row["name"] in signs and row.get("scales", signs[row["name"]]) != signs[row["name"]]
    ]


def _values(checkpoint: Checkpoint, name: str, *, scale: bool) -> tuple[list[str], float | None]:
    """What is wrong with the values of a tensor, and the least of them; None where there are no floats.

    Of a packed linear, the tensor with floats is its scales.
    """
    info = checkpoint.tensors[name]
    if not info.dtype.is_floating_point:
        return [], None
    try:
        tensor = checkpoint.read(name)
    except SourceError as error:
        return [str(error)], None
    if tensor.dtype.itemsize == 1:
        tensor = tensor.float()
    if not tensor.numel():
        return [f"{name} is empty"], None
    low, high = (value.item() for value in tensor.aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        return [f"{name} holds NaN or Inf"], None
    if max(-low, high) > FLOAT16_MAX:
        return [f"{name} holds {max(-low, high):g}, which float16 cannot"], low
    if scale and (zeros := int((tensor.half() == 0).sum())):
        return [f"{name} has {zeros} scales of zero (in float16)"], low
    return [], low
