"""`marlin-convert verify`."""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import click

from marlin_convert.checks import BY_DEFAULT, CHECKS
from marlin_convert.cli import torchrun
from marlin_convert.cli.arguments import NameOrPlace, Names, Place
from marlin_convert.cli.output import block_progress, output_options, set_up_logging
from marlin_convert.errors import ConvertError


@click.command(short_help="Check a checkpoint: files, layout, numbers, and the kernel's output.")
@click.argument("checkpoint", type=NameOrPlace())
@click.option(
    "--source", type=NameOrPlace(), metavar="MODEL", help="Also compare with the model it was made from."
)
@click.option(
    "--checks",
    type=Names(CHECKS),
    default=",".join(BY_DEFAULT),
    show_default=True,
    metavar="NAME[,NAME]",
    help="Checks to run.",
)
@click.option("--require-kernel", is_flag=True, help="Exit 1 if the kernel check cannot run.")
@click.option(
    "--strict",
    is_flag=True,
    help="Fail if a linear was rounded to nearest, or hidden states are far from the source's.",
)
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0, min_open=True),
    default=1e-3,
    show_default=True,
    help="Largest relative error of a product.",
)
@click.option(
    "--text",
    type=NameOrPlace(),
    default="builtin",
    show_default=True,
    metavar="builtin|FILE|hf:DATASET[:SPLIT]",
    help="Text to run with --source; builtin is a part that calibration never uses.",
)
@click.option("--samples", type=click.IntRange(1), default=16, show_default=True, help="Sequences of it.")
@click.option(
    "--sequence-length", type=click.IntRange(2), default=1024, show_default=True, help="Tokens per sequence."
)
@click.option(
    "--device", default="auto", show_default=True, metavar="auto|cpu|cuda[:N]", help="Where to run the text."
)
@click.option("--revision", help="Branch, tag or commit of a Hub CHECKPOINT.")
@click.option("--source-revision", help="Branch, tag or commit of a Hub --source.")
@click.option("--trust-remote-code", is_flag=True, help="Allow code from the model repository to run.")
@click.option(
    "--report",
    type=Place(path_type=Path, dir_okay=False),
    help="Also write the report here: FILE.html is a page of the conversion too, else JSON.",
)
@output_options
def verify(
    checkpoint: str,
    device: str,
    revision: str | None,
    report: Path | None,
    as_json: bool,
    quiet: bool,
    verbose: int,
    **settings: Any,
) -> None:
    """Check CHECKPOINT (a directory or a Hub id), alone or against the model it was made from.

    \b
    files    all as in the manifest, every tensor once, no NaN, no zero scale
    layout   the same bytes when unpacked and packed; shapes, fused groups
    sparsity every quad of what is said to be 2:4
    numbers  products; with --source also weights, perplexity, divergence
    kernel   the kernel's output on a GPU

    A check that cannot run is skipped, never passed. The report is also written into a CHECKPOINT of ours.

    Exit status: 0 nothing failed, 3 a check failed, 1 a required check could not run, 2 wrong usage.
    """
    set_up_logging(quiet, verbose)
    from marlin_convert.commands import verify as story

    with torchrun.ranks(resumes=False) as ranks:
        job = story.make_job(
            checkpoint, revision=revision, device=torchrun.device(device), ranks=ranks,
            report=report if ranks.first else None, **settings,
        )  # fmt: skip
        done = story.verify(job, block_progress(quiet or not ranks.first))
        if ranks.first:
            if as_json:
                click.echo(json.dumps(done.to_dict(), indent=2))
            elif not quiet:
                words = shlex.join([checkpoint, *(["--revision", revision] if revision else [])])
                local = job.checkpoint.commit is None
                click.echo(story.text(done, words, local=local, verbose=bool(verbose)))
            story.save(done, job, report)
        for name in () if done.failed else done.could_not_run:
            raise ConvertError(f"the {name} check is required and could not run: {done.checks[name].reason}.")
    if done.failed:
        sys.exit(3)
