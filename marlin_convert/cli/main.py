"""`marlin-convert`: the commands there are, and how a command that fails or is interrupted ends."""

import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NoReturn

import click

from marlin_convert import __version__
from marlin_convert.cli import terminal, torchrun
from marlin_convert.cli.bench import bench
from marlin_convert.cli.env import env
from marlin_convert.cli.generate import generate
from marlin_convert.cli.inspect import inspect
from marlin_convert.cli.output import show_error
from marlin_convert.cli.push import push
from marlin_convert.cli.quantize import quantize
from marlin_convert.cli.recipes import recipes
from marlin_convert.cli.sparsify import sparsify
from marlin_convert.cli.verify import verify
from marlin_convert.errors import ConvertError, OptionError


class Commands(click.Group):
    """A group that prints ConvertError as a sentence and a hint, and exits 130 on Ctrl-C, 143 on SIGTERM."""

    def main(self, args: Sequence[str] | None = None, *more: Any, **kwargs: Any) -> Any:
        """Run a command line; the exit codes are in every command's help."""
        words = sys.argv[1:] if args is None else list(args)
        terminal.stand_in_for_closed()
        terminal.show_every_name()
        with terminal.Ending() as ending:
            try:
                self._run(ending, words, *more, **{**kwargs, "standalone_mode": False})
            except KeyboardInterrupt:
                # a process that was told to end does not wait for threads that still upload
                terminal.leave(ending.status) if args is None else sys.exit(ending.status)

    def _run(self, ending: terminal.Ending, words: list[str], *more: Any, **kwargs: Any) -> None:
        try:
            super().main(words, *more, **kwargs)
        except ConvertError as error:
            show_error(error)
            sys.exit(2 if isinstance(error, OptionError) else 1)
        except click.NoSuchOption as error:
            torchrun.show(resembling(error))
            sys.exit(error.exit_code)
        except click.ClickException as error:
            torchrun.show(error)
            sys.exit(error.exit_code)
        except (click.Abort, KeyboardInterrupt) as interrupt:
            self._interrupted(words, interrupt)
        except Exception as error:
            # a signal in a lock of Python's own comes out as an error of the lock
            if ending.begun or isinstance(error.__context__, KeyboardInterrupt):
                self._interrupted(words, error)
            if not isinstance(error, OSError):
                raise
            # a disk that fails where no code can say more than it does
            where = f" ('{error.filename}')" if error.filename else ""
            click.echo(f"Error: {error.strerror or error}{where}.", err=True)
            click.echo("Hint: check the disk and its permissions, then run the same command again.", err=True)
            sys.exit(1)

    def _interrupted(self, words: Sequence[str], why: BaseException) -> NoReturn:
        with suppress(OSError):  # the terminal may be what has gone
            click.echo("Interrupted.", err=True)
            if hint := going_on(words):
                click.echo(f"Hint: {hint}", err=True)
        raise KeyboardInterrupt from why


def resembling(error: click.NoSuchOption) -> click.NoSuchOption:
    """The error, suggesting what is like the option that there is not: to click, dashes are likeness too."""
    from difflib import SequenceMatcher

    name = error.option_name.lstrip("-")
    alike = [
        option
        for option in error.possibilities or ()
        if SequenceMatcher(None, name, option.lstrip("-")).ratio() >= 0.6
    ]
    return click.NoSuchOption(error.option_name, error.message, alike, error.ctx)


def going_on(words: Sequence[str]) -> str | None:
    """How to go on with a command line that was interrupted, where it need not begin again."""
    match words:
        case ["quantize" | "sparsify" as name, *others]:
            resume = [] if "--resume" in others else ["--resume"]
            return f"go on with: {shlex.join(['marlin-convert', name, *resume, *others])}"
        case ["push", *_]:
            return "run the same command again; what is uploaded already is not uploaded twice."
    return None


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="marlin-convert")
@click.pass_context
def main(context: click.Context) -> None:
    """Quantize Hugging Face language models to 4 bits, write them in the MARLIN layout, check, and publish.

    \b
    Example:
      marlin-convert quantize Qwen/Qwen3-0.6B -o qwen3-marlin
      marlin-convert generate qwen3-marlin --compare Qwen/Qwen3-0.6B
      marlin-convert verify qwen3-marlin --source Qwen/Qwen3-0.6B
      marlin-convert push qwen3-marlin me/Qwen3-0.6B-MARLIN --also gptq

    Exit status: 0 done, 1 it could not be done, 2 wrong usage, 3 verify found a difference, 130 interrupted,
    143 ended by SIGTERM.
    """
    torchrun.begin(str(context.invoked_subcommand))


for command in (quantize, sparsify, verify, generate, push, inspect, recipes, bench, env):
    main.add_command(command)
