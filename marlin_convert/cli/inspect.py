"""`marlin-convert inspect`."""

import json

import click

from marlin_convert.cli.arguments import NameOrPlace
from marlin_convert.cli.output import output_options, set_up_logging


@click.command(short_help="Say what a checkpoint contains, from its headers alone.")
@click.argument("checkpoint", type=NameOrPlace())
@click.option("--revision", help="Branch, tag or commit of a Hub CHECKPOINT.")
@output_options
def inspect(checkpoint: str, revision: str | None, as_json: bool, quiet: bool, verbose: int) -> None:
    """Say what CHECKPOINT (a directory or a Hub id) contains, from its headers alone.

    Format, group size, linears packed and left dense, bits per weight, size on disk, recipe, source, and the
    last verification.
    """
    set_up_logging(quiet, verbose)
    from marlin_convert.commands import inspect as story
    from marlin_convert.hub import resolve

    found = story.inspect(resolve(checkpoint, revision, only_look=True))
    if as_json:
        click.echo(json.dumps(found, indent=2))
    elif not quiet:
        click.echo(story.text(found, checkpoint, verbose=bool(verbose)))
