"""The story of `sparsify`: that of `quantize`, but what is solved for are pruned weights, written dense."""

from collections.abc import Callable, Iterable
from dataclasses import replace

from marlin_convert import quantize as quantizing
from marlin_convert.checkpoint.linears import Weights
from marlin_convert.errors import ConvertError
from marlin_convert.plan import Plan
from marlin_convert.quantize import Job, Report


def plan_job(job: Job) -> tuple[Weights, Plan]:
    """Open the source and plan the pruning from headers alone; ConvertError for bad input."""
    weights, plan = quantizing.plan_job(dense(job))
    if weights.scheme is not None:
        raise ConvertError(
            f"{job.source.name} is quantized already ({weights.scheme.format}).",
            "prune the model it was made from, or quantize --requantize --sparsity 2:4.",
        )
    return weights, plan


def sparsify(
    job: Job, progress: Callable[[range, int], Iterable[int]] = lambda blocks, total: blocks
) -> Report:
    """Prune the job's source to 2:4 into its output directory; ConvertError for what cannot be done."""
    plan_job(job)
    return quantizing.quantize(dense(job), progress)


def dense(job: Job) -> Job:
    """The job with a recipe that prunes and does not quantize."""
    return replace(job, recipe=job.recipe.changed({"format": "dense", "sparsity": "2:4"}))
