"""The story of `sparsify`: that of `quantize`, but what is solved for are pruned weights, written dense."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from marlin_convert import recipe as recipes
from marlin_convert.checkpoint.linears import Weights
from marlin_convert.commands.quantize import Report, quantize
from marlin_convert.commands.quantize import plan_job as plan_quantizing
from marlin_convert.conversion import Job, resolve_job
from marlin_convert.plan import Plan


def make_job(
    model: str | Path, output: str | Path, recipe: str | Path, settings: Mapping[str, Any], **options: Any
) -> Job:
    """What is asked of `sparsify` by its options; as `conversion.make_job`."""
    return resolve_job(model, output, recipes.load(str(recipe)).changed(recipes.given(settings)), **options)


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
