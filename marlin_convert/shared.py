"""What several ranks cannot do, or cannot do together: said before the work begins."""

from typing import Any

from marlin_convert.checkpoint.unfinished import differences
from marlin_convert.conversion import Job
from marlin_convert.errors import ConvertError
from marlin_convert.plan import Plan
from marlin_convert.ranks import Ranks
from marlin_convert.tune import STEP, step_samples


def check_shared(job: Job, plan: Plan) -> None:
    """ConvertError for a conversion that is not shared by several ranks."""
    ranks, length = job.ranks.count, plan.recipe.sequence_length
    if plan.repack:
        raise ConvertError(
            f"a source that is quantized already is repacked by one process, torchrun started {ranks}.",
            "run it without torchrun: it is the work of one process.",
        )
    check_samples(job.ranks, plan.recipe.samples)
    samples = step_samples(length)
    if plan.tunes and samples < ranks:
        raise ConvertError(
            f"--effort high takes {samples} samples of {length} tokens a step, which cannot be shared by "
            f"{ranks} processes.",
            f"fewer processes, or --sequence-length {STEP // ranks} or less.",
        )


def check_samples(ranks: Ranks, samples: int) -> None:
    """ConvertError for a text of fewer samples than there are ranks."""
    if samples < ranks.count:
        raise ConvertError(
            f"{samples} samples of text cannot be shared by {ranks.count} processes.",
            f"--samples {ranks.count} or more, of a longer text where some is held out, or fewer processes.",
        )


def check_alike(ranks: Ranks, settings: dict[str, Any]) -> None:
    """ConvertError where a rank has another model, text, version or processor than the first one."""
    if ranks.alone:
        return
    first = ranks.told(settings)
    unlike = ranks.all_say(next(differences(first, settings), None))
    for rank, difference in enumerate(unlike):
        if difference is not None:
            name, theirs, own = difference
            raise ConvertError(
                f"rank {rank} has {name} {own!r}, rank 0 {theirs!r}.",
                "all ranks need the same model, text, versions and kind of processor.",
            )
