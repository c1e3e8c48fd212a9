"""`marlin-convert env`."""

import json

import click

from marlin_convert.cli.output import output_options, set_up_logging


@click.command(short_help="Print versions, processor and GPUs, for a report of a fault.")
@output_options
def env(as_json: bool, quiet: bool, verbose: int) -> None:
    """Print versions, processor and GPUs, for a report of a fault: no names, no paths, no tokens."""
    set_up_logging(quiet, verbose)
    from marlin_convert.commands import env as story

    found = story.environment()
    if as_json:
        click.echo(json.dumps(found, indent=2))
    elif not quiet:
        click.echo(story.text(found))
