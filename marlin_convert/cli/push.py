"""`marlin-convert push`."""

import json
from pathlib import Path
from typing import Any

import click

from marlin_convert.cli.arguments import Place
from marlin_convert.cli.output import file_progress, output_options, set_up_logging
from marlin_convert.options import names


@click.command(short_help="Publish a checkpoint on the Hugging Face Hub, with its card.")
@click.argument("checkpoint", type=Place(path_type=Path))
@click.argument("repo_id")
@click.option("--private/--public", default=None, help="For a new repository.  [default: private]")
@click.option("--revision", "branch", default="main", show_default=True, help="Push to this branch.")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead.")
@click.option("--message", help="Commit message.")
@click.option("--base-model", metavar="ID", help="Hub id of the original, if it cannot be found.")
@click.option("--license", metavar="ID", help="Only if the source's card names none.")
@click.option(
    "--also",
    metavar="FORMAT[,FORMAT]",
    help="Push the same codes as gptq, compressed-tensors to a branch of that name, for stock engines.",
)
@click.option("--allow-unverified", is_flag=True, help="Publish anyway; the card will say so.")
@click.option("--dry-run", is_flag=True, help="List files, sizes, hashes and the card; upload nothing.")
@output_options
def push(
    checkpoint: Path, repo_id: str, dry_run: bool, as_json: bool, quiet: bool, verbose: int, **settings: Any
) -> None:
    """Publish CHECKPOINT (a directory) to REPO_ID on the Hugging Face Hub.

    Refuses unless `verify` passed on exactly these files. What goes up is what the manifest lists, the
    manifest, the report of verify and a model card, in one commit; nothing else that lies in the directory.

    The token is HF_TOKEN or that of 'hf auth login'. After an interruption, run the same command again.
    """
    set_up_logging(quiet, verbose)
    from marlin_convert import report as reports
    from marlin_convert.commands import push as story

    job = story.Job(checkpoint, repo_id, **settings | {"also": names(settings["also"])})
    done = story.push(job, dry_run=dry_run, progress=file_progress(quiet))
    if as_json:
        click.echo(json.dumps(reports.push_json(done, job), indent=2))
    elif not quiet:
        click.echo(reports.push_text(done, job))
