"""Every quad of every linear that is said to be 2:4."""

from dataclasses import replace

from torch import Tensor

from marlin_convert.checkpoint.linears import Weights
from marlin_convert.checks.outcome import Check, reporting, verdict
from marlin_convert.checks.subject import Subject
from marlin_convert.errors import ConvertError, FormatError, SourceError
from marlin_convert.formats import bounds
from marlin_convert.quantized import first_crowded, quad_nonzeros


@reporting
def check(problems: list[str], subject: Subject) -> Check:
    """Count the non-zeros of the quads of what the layout or the manifest says is 2:4."""
    weights = subject.weights
    linears = weights.sparse_linears(subject.manifest)
    if not linears:
        return Check("skipped", "nothing is said to be 2:4")
    quads = good = unread = 0
    for counted, found in subject.ranks.each(linears, lambda linear: _counted(weights, linear)):
        problems += found
        if counted is None:
            unread += 1
        else:
            quads, good = quads + counted[0], good + counted[1]
    # rounded down: 100 is all of them
    share = 10_000 * good // max(quads, 1) / 100
    summary = f"{share:.2f} % of {quads} quads"
    summary += f", {unread} linears cannot be read" if unread else ""
    check = verdict(problems, summary, linears=len(linears), quads=quads, sparse_quads=good)
    return replace(check, reason=f"{summary}; {check.reason}") if problems else check


def _counted(weights: Weights, linear: str) -> tuple[tuple[int, int] | None, list[str]]:
    """The quads of a linear and how many are 2:4, None if it cannot be read; what is wrong with it."""
    try:
        held, crowded = _quads(weights, linear)
    except ConvertError as error:
        return None, [str(error)]
    wrong = [f"{linear} is not 2:4: {crowded}"] if crowded else []
    return (held.numel(), int((held <= 2).sum())), wrong


def _quads(weights: Weights, linear: str) -> tuple[Tensor, str | None]:
    """How many non-zeros every quad of a linear has, and what is wrong with the first that has too many."""
    if not weights.is_packed(linear):
        weight = weights.read(f"{linear}.weight")
        if weight.shape[1] % 4:
            raise SourceError(f"{linear} has {weight.shape[1]} inputs, which are no quads.")
        held = quad_nonzeros(weight)
        crowded = int((held > 2).sum())
        if not crowded:
            return held, None
        return held, (
            f"{crowded} of {held.numel()} quads have more than two non-zeros; {first_crowded(held)}"
        )
    layer = weights.quantized(linear)
    try:
        bounds.check_quads(layer)
    except FormatError as error:
        return layer.quad_weights(), str(error)
    return layer.quad_weights(), None
