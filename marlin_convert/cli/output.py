"""What every command says besides its result: options for that, log lines and bars on stderr."""

import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import click

from marlin_convert.cli import terminal
from marlin_convert.errors import ConvertError

log = logging.getLogger("marlin_convert")


def output_options(command: Callable) -> Callable:
    """--json, -q and -v, the same on every command."""
    for option in (
        click.option("-v", "--verbose", count=True, help="More lines on stderr, one per linear."),
        click.option("-q", "--quiet", is_flag=True, help="Only warnings and errors on stderr."),
        click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout."),
    ):
        command = option(command)
    return command


def show_error(error: ConvertError) -> None:
    """Print what could not be done, and what to do about it."""
    click.echo(f"Error: {error}", err=True)
    if error.hint:
        click.echo(f"Hint: {error.hint}", err=True)


def set_up_logging(quiet: bool, verbose: int) -> None:
    """Plain lines on stderr, and bars of the Hub's client, which is imported later, on a terminal only."""
    if quiet or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    level = logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO
    logging.basicConfig(
        handlers=[terminal.AboveBars()], format="%(message)s", level=logging.WARNING, force=True
    )
    log.setLevel(level)
    terminal.show_every_letter_of_lines()


def block_progress(quiet: bool) -> Callable[[range, int], Iterable[int]]:
    """A bar over the blocks on a terminal, else a line per block with what it took and what is left."""

    def progress(blocks: range, total: int) -> Iterable[int]:
        from tqdm import tqdm

        started = time.monotonic()
        bar = tqdm(blocks, initial=blocks.start, total=total, unit="block", disable=True if quiet else None)
        for number in bar:
            yield number
            if bar.disable:
                taken = time.monotonic() - started
                left = taken / (number + 1 - blocks.start) * (blocks.stop - number - 1)
                times = (tqdm.format_interval(seconds) for seconds in (taken, left))
                log.info("block %d of %d done after %s, %s left", number + 1, total, *times)

    return progress


def file_progress(quiet: bool) -> Callable[[Sequence[str]], Iterable[str]]:
    """A bar over the files that are checked, on a terminal."""

    def progress(names: Sequence[str]) -> Iterable[str]:
        from tqdm import tqdm

        return tqdm(names, desc="checking", unit="file", disable=True if quiet else None)

    return progress


def request_progress(quiet: bool) -> Callable[[Iterator, int], Iterable]:
    """A bar over the requests that are answered, on a terminal."""

    def progress(answered: Iterator, total: int) -> Iterable:
        from tqdm import tqdm

        return tqdm(answered, total=total, unit="request", disable=True if quiet else None)

    return progress
