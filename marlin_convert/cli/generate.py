"""`marlin-convert generate`."""

import json
import shlex
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from marlin_convert.cli.arguments import NameOrPlace
from marlin_convert.cli.imports import imports
from marlin_convert.cli.output import output_options, set_up_logging
from marlin_convert.errors import OptionError, printable

if TYPE_CHECKING:
    from marlin_convert.commands.generate import Answer, Messages, Speaker


@click.command(short_help="Let a checkpoint write text, the original beside it.")
@click.argument("checkpoint", type=NameOrPlace())
@click.option(
    "--prompt", metavar="TEXT", help="What the model goes on with, or answers if it has a chat template."
)
@click.option("--chat", is_flag=True, help="Converse: every line of the input is answered, until it ends.")
@click.option(
    "--compare", type=NameOrPlace(), metavar="MODEL", help="Let this one, the original, answer as well."
)
@click.option(
    "--max-new-tokens", type=click.IntRange(1), default=128, show_default=True, help="Most of an answer."
)
@click.option(
    "--device", default="auto", show_default=True, metavar="auto|cpu|cuda[:N]", help="Where to compute."
)
@click.option("--revision", help="Branch, tag or commit of a Hub CHECKPOINT.")
@click.option("--compare-revision", help="Branch, tag or commit of a Hub --compare.")
@click.option("--trust-remote-code", is_flag=True, help="Allow code from the model repository to run.")
@output_options
def generate(
    checkpoint: str,
    prompt: str | None,
    chat: bool,
    compare: str | None,
    compare_revision: str | None,
    max_new_tokens: int,
    device: str,
    revision: str | None,
    trust_remote_code: bool,
    as_json: bool,
    quiet: bool,
    verbose: int,
) -> None:
    """Let CHECKPOINT (a directory or a Hub id) write text, through transformers with our modules in it.

    A prompt is put into the chat template, where the tokenizer has one. Always the likeliest token comes
    next, so that answers can be compared. Tokens a second are those of the answer, over the time that reading
    the prompt and writing took.
    """
    set_up_logging(quiet, verbose)
    if chat and (as_json or prompt is not None):
        raise OptionError("--chat goes with neither --prompt nor --json: it reads what is typed.")
    with imports():
        from marlin_convert.commands import generate as story

    job = story.make_job(
        checkpoint, compare=compare, compare_revision=compare_revision, max_new_tokens=max_new_tokens,
        device=device, revision=revision, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    text = story.PROMPT if prompt is None else prompt
    if as_json:
        click.echo(json.dumps({"prompt": text} | story.generate(job, text).to_dict(), indent=2))
        return
    speakers = story.speakers(job, None if chat else text)
    if chat:
        converse(speakers, quiet)
        return
    done = story.Generated(*(speak(one, text, len(speakers) > 1, quiet) for one in speakers))
    if done.same_tokens is not None and not quiet:
        longest = max(len(one.tokens) for one in (done.answer, done.compared) if one)
        click.echo(f"the first {done.same_tokens} of {longest} tokens are the same")
    if not quiet:
        source = [compare or "MODEL", *(["--source-revision", compare_revision] if compare_revision else [])]
        click.echo(f"Next: marlin-convert verify {shlex.join([checkpoint, '--source', *source])}")


def converse(speakers: "list[Speaker]", quiet: bool) -> None:
    """Answer line after line of the input, every model in a conversation of its own."""
    said: list[list[dict[str, str]]] = [[] for _ in speakers]
    for line in lines():
        for speaker, messages in zip(speakers, said, strict=True):
            messages.append({"role": "user", "content": line})
            answer = speak(speaker, messages, len(speakers) > 1, quiet)
            messages.append({"role": "assistant", "content": answer.text})


def lines() -> Iterator[str]:
    """The lines of the input that are not empty; a terminal is asked for each."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if line:
            yield line


def speak(speaker: "Speaker", prompt: "str | Messages", named: bool, quiet: bool) -> "Answer":
    """Show an answer while it comes, and how fast it came; what is gone on with stands before it."""
    if named:
        click.echo(f"{printable(speaker.name)}:")
    show("" if speaker.chats else str(prompt))
    answer = speaker.answer(prompt, show)
    click.echo()
    if not quiet:
        click.echo(f"({len(answer.tokens)} tokens, {answer.tokens_per_second:.1f} a second)")
    return answer


def show(text: str) -> None:
    """A part of a text; what would move the cursor of a terminal is escaped."""
    click.echo("".join(one if one in "\n\t" else printable(one) for one in text), nl=False)
