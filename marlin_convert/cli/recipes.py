"""`marlin-convert recipes`."""

import json

import click

from marlin_convert.cli.output import output_options, set_up_logging


@click.command(short_help="List the recipes that --recipe knows by name.")
@output_options
def recipes(as_json: bool, quiet: bool, verbose: int) -> None:
    """List the recipes that --recipe knows by name, and what each of them sets; a file can be one too."""
    set_up_logging(quiet, verbose)
    from marlin_convert import recipe

    found = {name: recipe.about(name) for name in recipe.named_recipes()}
    if as_json:
        click.echo(json.dumps(found, indent=2))
    elif not quiet:
        width = max(map(len, found)) + 2
        for name, said in found.items():
            click.echo(f"{name:{width}}{said}")
