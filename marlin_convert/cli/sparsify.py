"""`marlin-convert sparsify`."""

from pathlib import Path
from typing import Any

import click

from marlin_convert.cli import torchrun
from marlin_convert.cli.arguments import NameOrPlace
from marlin_convert.cli.conversion import conversion_options, convert
from marlin_convert.cli.imports import imports
from marlin_convert.cli.output import output_options, set_up_logging


@click.command(short_help="Prune two weights of every four of a model, and write it dense.")
@click.argument("model", type=NameOrPlace())
@click.option(
    "--method",
    type=click.Choice(["sparsegpt", "wanda", "magnitude"]),
    help="How weights are chosen; with sparsegpt the others make up for those pruned.  [default: sparsegpt]",
)
@conversion_options
@output_options
def sparsify(
    model: str,
    output: Path,
    recipe: str,
    device: str,
    revision: str | None,
    max_shard_size: str,
    resume: bool,
    overwrite: bool,
    trust_remote_code: bool,
    report: Path | None,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    verbose: int,
    **settings: Any,
) -> None:
    """Prune the linears of MODEL to 2:4, two weights of every four, and write a dense checkpoint.

    Any tool loads it, to be fine-tuned or quantized: quantize keeps its zeros.
    """
    set_up_logging(quiet, verbose)
    with imports():
        from marlin_convert.commands import sparsify as story

    with torchrun.ranks() as ranks:
        job = story.make_job(
            model, output, recipe, settings,
            device=torchrun.device(device), revision=revision, max_shard_size=max_shard_size, resume=resume,
            overwrite=overwrite, trust_remote_code=trust_remote_code, report=report, ranks=ranks,
        )  # fmt: skip
        torchrun.advise(device, job.device)
        said = {"dry_run": dry_run, "as_json": as_json, "quiet": quiet, "verbose": bool(verbose)}
        convert(job, story.plan_job, story.sparsify, **said)
