"""What the words of a command line mean: paths, lists of numbers."""

import os
from collections.abc import Sequence
from typing import Any

import click
from click.shell_completion import CompletionItem


def at_home(name: str) -> str:
    """A name with the home directory in place of a ~ at its beginning."""
    return os.path.expanduser(name)  # noqa: PTH111, Path makes a '.' of an empty name


class Place(click.Path):
    """A path; a ~ at its beginning is the home directory, though no shell has seen it, as in --output=~/x."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path as click gives it."""
        return super().convert(at_home(value), param, ctx)


class NameOrPlace(click.ParamType):
    """A name, or a path, of which a ~ at the beginning is the home directory."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The name or the path as text."""
        return at_home(value)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """The directories of this machine; names on the Hub are not asked for."""
        return [CompletionItem(incomplete, type="dir")]


class RecipeName(NameOrPlace):
    """The name of a recipe, or its file."""

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Those that come with the package, and files."""
        from marlin_convert.recipe import named_recipes

        names = [CompletionItem(name) for name in named_recipes() if name.startswith(incomplete)]
        return names or [CompletionItem(incomplete, type="file")]


class Names(click.ParamType):
    """Names with commas between them, each one of `known`."""

    name = "text"

    def __init__(self, known: Sequence[str]):
        self.known = known

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """What the last name may become."""
        before, comma, last = incomplete.rpartition(",")
        return [CompletionItem(f"{before}{comma}{name}") for name in self.known if name.startswith(last)]


def parse_counts(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> tuple[int, ...] | None:
    """The numbers in a list like 1,16, each once."""
    if value is None:
        return None
    words = [word.strip() for word in value.split(",")]
    if not all(word.isdecimal() and int(word) for word in words):
        raise click.BadParameter(f"{value!r} is not a list of numbers like 1,16,64.")
    return tuple(dict.fromkeys(map(int, words)))
