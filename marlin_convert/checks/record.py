"""Whether the fates that a manifest holds are true of the tensors."""

from collections.abc import Iterator

from marlin_convert.checkpoint import manifest as manifests
from marlin_convert.checks.subject import Subject
from marlin_convert.errors import SourceError
from marlin_convert.matrix import Fate


def record_problems(subject: Subject) -> list[str]:
    """Where the record and the tensors disagree, a line each; none without a manifest."""
    fates = manifests.fates(subject.manifest)
    problems = [line for fate in fates.values() for line in _problems(subject, fate)]
    if fates:
        unknown = [name for name in subject.weights.packed_linears() if name not in fates]
        problems += [f"{name} is packed, and the manifest has no row of it" for name in unknown]
    return problems


def _problems(subject: Subject, fate: Fate) -> Iterator[str]:
    weights, layout = subject.weights, fate.layout
    if not fate.packed:
        if weights.is_packed(fate.name):
            yield f"{fate.name} is packed, the manifest says that it is dense"
        elif (weight := weights.checkpoint.tensors.get(f"{fate.name}.weight")) is None:
            if f"{fate.name}.weight" not in subject.model.all_tied_weights_keys:
                yield f"{fate.name} of the manifest is not in the files"
        elif fate.k and weight.shape != (
            fate.n,
            fate.k,
        ):  # earlier ones do not say the shape of what is dense
            yield f"{fate.name} has shape {weight.shape}, the manifest says {(fate.n, fate.k)}"
        return
    if not weights.is_packed(fate.name):
        yield f"{fate.name} is not packed, the manifest says that it is"
        return
    try:
        weights.check(fate.name, fate.k, fate.n)
    except SourceError as error:
        yield f"with {fate.k} inputs and {fate.n} outputs, as the manifest says: {error}"
    scheme = weights.scheme_of(fate.name)
    stored = scheme.format, scheme.bits, scheme.group_size
    said = layout.format, layout.bits, layout.group_size
    if stored != said:
        yield (
            f"{fate.name} is stored as {' '.join(map(str, stored))} by config.json, "
            f"{' '.join(map(str, said))} by the manifest"
        )
