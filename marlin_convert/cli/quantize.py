"""`marlin-convert quantize`."""

from pathlib import Path
from typing import Any

import click

from marlin_convert.cli import torchrun
from marlin_convert.cli.arguments import NameOrPlace, Names
from marlin_convert.cli.conversion import conversion_options, convert
from marlin_convert.cli.imports import imports
from marlin_convert.cli.output import output_options, set_up_logging
from marlin_convert.options import FORMATS


@click.command(short_help="Write a 4-bit checkpoint of a model, or repack one in another layout.")
@click.argument("model", type=NameOrPlace())
@click.option(
    "--format",
    type=Names(FORMATS),
    metavar="FORMAT[,FORMAT]",
    help=f"On-disk layout: {', '.join(FORMATS)}. Of several each gets a directory of its name in that of -o: "
    "solved once, the same codes.  [default: marlin, or marlin-24 with --sparsity 2:4]",
)
@click.option(
    "--group-size",
    type=click.Choice(["auto", "128", "64", "32", "-1"]),
    help="Weights that share a scale: -1 is one per column, auto the largest that divides the inputs.  "
    "[default: auto]",
)
@click.option(
    "--bits",
    type=click.Choice(["4", "8"]),
    help="Bits of a weight; 8 in gptq and compressed-tensors.  [default: 4]",
)
@click.option(
    "--scales",
    type=click.Choice(["signed", "positive"]),
    help="Signed scales are nearer to the weights; some kernels take every scale for positive.  "
    "[default: signed]",
)
@click.option("--sparsity", type=click.Choice(["2:4"]), help="Prune two weights of every four as well.")
@click.option(
    "--unpruned",
    multiple=True,
    metavar="PATTERN",
    help="Matching linears are not 2:4: in marlin-24 they are stored as marlin; repeatable.",
)
@click.option(
    "--requantize", is_flag=True, help="Solve again from the dequantized weights of a quantized MODEL."
)
@conversion_options
@output_options
def quantize(
    model: str,
    output: Path,
    recipe: str,
    device: str,
    revision: str | None,
    max_shard_size: str,
    requantize: bool,
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
    """Quantize MODEL (a Hub id or a local directory) and write a 4-bit checkpoint.

    A MODEL that is already quantized (GPTQ, MARLIN, AWQ, compressed-tensors) is repacked: its codes are kept
    and nothing is calibrated. One that is 2:4 keeps its zeros. What cannot be done is said before anything is
    written.
    """
    set_up_logging(quiet, verbose)
    with imports():
        from marlin_convert.commands import quantize as story
        from marlin_convert.conversion import make_job
        from marlin_convert.tune import step_samples

    with torchrun.ranks() as ranks:
        size, bits = settings["group_size"], settings["bits"]
        settings |= {"group_size": int(size) if size not in (None, "auto") else size}
        settings |= {"bits": int(bits) if bits else None}
        job = make_job(
            model, output, recipe, settings,
            device=torchrun.device(device), revision=revision, max_shard_size=max_shard_size,
            requantize=requantize, resume=resume, overwrite=overwrite, trust_remote_code=trust_remote_code,
            report=report, ranks=ranks,
        )  # fmt: skip
        tunes = job.recipe.effort == "high"
        torchrun.advise(device, job.device, step_samples(job.recipe.sequence_length) if tunes else None)
        said = {"dry_run": dry_run, "as_json": as_json, "quiet": quiet, "verbose": bool(verbose)}
        convert(job, story.plan_job, story.quantize, **said)
