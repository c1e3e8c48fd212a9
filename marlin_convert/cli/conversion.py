"""What `quantize` and `sparsify` share: most of their options, and what they print."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from marlin_convert.cli.arguments import NameOrPlace, Place, RecipeName
from marlin_convert.cli.output import block_progress

if TYPE_CHECKING:
    from marlin_convert.conversion import Job


def conversion_options(command: Callable) -> Callable:
    """What quantize and sparsify share, recipe settings among it."""
    for option in (
        click.option(
            "-o",
            "--output",
            required=True,
            type=Place(path_type=Path),
            help="Where to write. Must not exist.",
        ),
        click.option(
            "--recipe",
            type=RecipeName(),
            default="w4a16",
            show_default=True,
            metavar="NAME|FILE",
            help="Settings to start from.",
        ),
        click.option(
            "--only",
            multiple=True,
            metavar="PATTERN",
            help="Leave all but matching linears as they are (experts: those of a mixture); repeatable.",
        ),
        click.option(
            "--skip", multiple=True, metavar="PATTERN", help="Leave matching linears as they are; repeatable."
        ),
        click.option(
            "--calibration",
            type=NameOrPlace(),
            metavar="builtin|FILE|hf:DATASET[:SPLIT]",
            help="Text to calibrate on: .txt, .jsonl or .parquet.",
        ),
        click.option("--samples", type=click.IntRange(1), help="Calibration sequences.  [default: 256]"),
        click.option(
            "--sequence-length", type=click.IntRange(1), help="Tokens per sequence.  [default: 2048]"
        ),
        click.option(
            "--effort",
            type=click.Choice(["fast", "default", "high"]),
            help="default: the original runs beside the quantized model, and codes make up for what those "
            "before them have lost; fast: without; high: then codes, scales and norms are tuned as a whole, "
            "which takes a GPU that holds the model twice, and some minutes more.",
        ),
        click.option("--seed", type=int, help="Draws the calibration windows.  [default: 0]"),
        click.option(
            "--dtype",
            type=click.Choice(["auto", "float16", "bfloat16"]),
            help="Type computed in, and of dense tensors.",
        ),
        click.option(
            "--device",
            default="auto",
            show_default=True,
            metavar="auto|cpu|cuda[:N]",
            help="Where to compute.",
        ),
        click.option("--revision", help="Branch, tag or commit of a Hub MODEL."),
        click.option("--max-shard-size", default="5GB", show_default=True, help="Largest file."),
        click.option("--resume", is_flag=True, help="Continue an interrupted run."),
        click.option("--overwrite", is_flag=True, help="Replace an earlier output once this is complete."),
        click.option(
            "--trust-remote-code", is_flag=True, help="Allow code from the model repository to run."
        ),
        click.option(
            "--report",
            type=Place(path_type=Path, dir_okay=False),
            help="Write an HTML page with the error of every linear.",
        ),
        click.option(
            "--dry-run",
            is_flag=True,
            help="Print the plan and stop; of a Hub MODEL no weights are downloaded.",
        ),
    )[::-1]:
        command = option(command)
    return command


def convert(
    job: "Job",
    plan_job: Callable,
    story: Callable,
    *,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Print the plan of a conversion, or do it and print what was done."""
    from marlin_convert import report as reports

    if not job.ranks.first:  # the first one prints
        (plan_job if dry_run else story)(job)
        return
    if dry_run:
        _, plan = plan_job(job)
        said = json.dumps(reports.plan_json(plan, job, verbose=verbose), indent=2) if as_json else None
        click.echo(said or reports.plan_text(plan, job))
        return
    done = story(job, block_progress(quiet))
    if as_json:
        click.echo(json.dumps(reports.summary(done), indent=2))
    elif not quiet:
        click.echo(reports.summary_text(done, job))
