"""What is asked of one conversion, by `quantize` or `sparsify`: its options as they are said, looked at."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from marlin_convert import recipe as recipes
from marlin_convert.checkpoint.unfinished import UnfinishedRun
from marlin_convert.documents import check_source
from marlin_convert.errors import ConvertError, OptionError
from marlin_convert.hub import Source, resolve
from marlin_convert.options import FORMATS, check_place, names, pick_device, shard_size
from marlin_convert.ranks import ALONE, Ranks
from marlin_convert.recipe import Recipe

# The groups that each of these takes the ones behind it take too, and 2:4 is no more than zeros to them.
PICKIEST = ("marlin-24", "gptq", "compressed-tensors", "marlin")


@dataclass(frozen=True)
class Job:
    """What is asked of one conversion.

    `group_size` is set when one was asked for by name: a quantized source keeps its own, and one that differs
    from it is refused; the recipe's may be a mere default. `also` are formats that the output is repacked to,
    each in a directory beside it that is called as the format. `ranks` are the processes that share the work.
    """

    source: Source
    output: Path
    recipe: Recipe
    device: torch.device
    group_size: int | None = None
    max_shard_size: int = 5_000_000_000
    requantize: bool = False
    resume: bool = False
    overwrite: bool = False
    trust_remote_code: bool = False
    report: Path | None = None
    also: tuple[str, ...] = ()
    ranks: Ranks = ALONE

    @property
    def beside(self) -> tuple[Path, ...]:
        """The outputs in the other formats."""
        return tuple(self.output.with_name(format) for format in self.also)

    @property
    def run(self) -> UnfinishedRun:
        """What there is of the output until it is complete."""
        return UnfinishedRun(self.output)


def make_job(
    model: str | Path, output: str | Path, recipe: str | Path, settings: Mapping[str, Any], **options: Any
) -> Job:
    """What is asked of `quantize` by its options; ConvertError for what they do not take.

    `settings` go over those of the recipe, but for what is None or empty; `options` are `resolve_job`'s.
    """
    start, formats = recipes.load(str(recipe)), names(settings["format"])
    for name in formats:
        if name not in FORMATS:
            raise OptionError(f"--format {name!r} is not one of {', '.join(FORMATS)}.")
    format = formats[0] if formats else None
    if settings["sparsity"] == "2:4" and not format and start.format == "marlin":
        format = "marlin-24"
    chosen = start.changed(recipes.given({**settings, "format": format}))
    if chosen.format == "dense":
        raise ConvertError(
            f"{str(recipe)!r} is a recipe of sparsify.", "name a layout with --format, or sparsify."
        )
    size = settings["group_size"]
    asked = size if isinstance(size, int) else None
    job = resolve_job(model, output, chosen, group_size=asked, **options)
    return _in_formats(job, formats) if len(formats) > 1 else job


def resolve_job(
    model: str | Path,
    output: str | Path,
    recipe: Recipe,
    *,
    device: str,
    revision: str | None,
    max_shard_size: int | str,
    trust_remote_code: bool,
    report: str | Path | None,
    **more: Any,
) -> Job:
    """The job of options as they are said, with the model looked at: it is downloaded when its blocks are."""
    if report is not None:
        check_place(Path(report))
    check_source(recipe.calibration)
    return Job(
        output=Path(output),
        recipe=recipe,
        device=pick_device(device),
        max_shard_size=shard_size(max_shard_size),
        trust_remote_code=trust_remote_code,
        report=None if report is None else Path(report),
        source=resolve(str(model), revision, code=trust_remote_code, only_look=True),
        **more,
    )


def _in_formats(job: Job, formats: Sequence[str]) -> Job:
    """The job for several formats, each in a directory of its name in the output: one solve, and repacks.

    It solves for the one whose groups all others take. ConvertError for an output that is a checkpoint.
    """
    if (job.output / "config.json").exists():
        raise ConvertError(
            f"'{job.output}' is a model itself; with several formats it gets a directory for each.",
            "choose another directory.",
        )
    first, *also = sorted(formats, key=PICKIEST.index)
    recipe = job.recipe.changed({"format": first})
    return replace(job, output=job.output / first, recipe=recipe, also=tuple(also))
