"""The story of `sparsify`: that of `quantize`, but what is solved for are pruned weights, written dense."""

from collections.abc import Callable, Iterable
from dataclasses import replace

from marlin_convert.checkpoint.linears import Weights
from marlin_convert.commands.quantize import Job, Report, quantize
from marlin_convert.commands.quantize import plan_job as plan_quantizing
from marlin_convert.plan import Plan


def plan_job(job: Job) -> tuple[Weights, Plan]:
    """Open the source and plan the pruning from headers alone; ConvertError for bad input."""
    return plan_quantizing(_pruning(job))


def sparsify(
    job: Job, progress: Callable[[range, int], Iterable[int]] = lambda blocks, total: blocks
) -> Report:
    """Prune the job's source to 2:4 into its output directory; ConvertError for what cannot be done.

    Interruptions and resuming are as in `quantize`.
    """
    return quantize(_pruning(job), progress)


def _pruning(job: Job) -> Job:
    """The job with a recipe that prunes and does not quantize."""
    return replace(job, recipe=job.recipe.changed({"format": "dense", "sparsity": "2:4"}))
