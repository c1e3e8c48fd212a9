"""`marlin-convert bench serve`."""

import json
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from marlin_convert.cli.arguments import NameOrPlace, Place
from marlin_convert.cli.imports import imports
from marlin_convert.cli.output import output_options, request_progress, set_up_logging
from marlin_convert.errors import ConvertError

if TYPE_CHECKING:
    from marlin_convert.bench.stream import Server

log = logging.getLogger("marlin_convert")


def parse_server(context: click.Context, parameter: click.Parameter, value: str | None) -> "Server | None":
    """The server of an address; its key is in the environment, where no list of processes shows it."""
    from marlin_convert.bench.stream import Server

    if value is None:
        return None
    try:
        return Server.at(value, os.environ.get("OPENAI_API_KEY"))
    except ValueError as error:
        raise click.BadParameter(f"it {error}.") from error


def asks_chat(chat: bool, servers: Sequence["Server"]) -> bool:
    """Whether chats are asked for: by --chat, or by an address that ends in its endpoint."""
    said = {server.chat for server in servers} - {None} | ({True} if chat else set())
    if len(said) > 1:
        raise click.UsageError(
            "of --chat, --url and --baseline-url one asks for /chat/completions, another for /completions."
        )
    return said == {True}


def parse_positive(context: click.Context, parameter: click.Parameter, value: float) -> float:
    """A number above 0; inf is one."""
    if not value > 0:
        raise click.BadParameter("it must be above 0.")
    return value


@click.command("serve")
@click.option(
    "--url", required=True, callback=parse_server, help="The server, with or without /v1, or its endpoint."
)
@click.option(
    "--baseline-url", metavar="URL", callback=parse_server, help="Another one to measure and compare with."
)
@click.option("--model", metavar="NAME", help="Of the server.  [default: the first that it lists]")
@click.option("--chat", is_flag=True, help="Ask /chat/completions in place of /completions.")
@click.option(
    "--request-rate",
    type=float,
    default=math.inf,
    show_default=True,
    callback=parse_positive,
    metavar="R",
    help="Requests a second, arriving as a Poisson process; inf sends all at once.",
)
@click.option("--max-concurrency", type=click.IntRange(1), metavar="N", help="Most requests at a time.")
@click.option(
    "--num-prompts", "number", type=click.IntRange(1), default=100, show_default=True, help="Requests."
)
@click.option(
    "--num-warmups",
    "warmups",
    type=click.IntRange(0),
    default=5,
    show_default=True,
    help="Requests before, with prompts of their own.",
)
@click.option(
    "--input-len",
    "input_tokens",
    type=click.IntRange(1),
    default=1024,
    show_default=True,
    help="Tokens of a random prompt.",
)
@click.option(
    "--output-len", type=click.IntRange(1), default=128, show_default=True, help="Tokens to ask for."
)
@click.option(
    "--tokenizer",
    type=NameOrPlace(),
    metavar="DIR|ID",
    help="Of random prompts.  [default: the model's, if it is on this machine; else words]",
)
@click.option(
    "--prompts",
    type=Place(path_type=Path, dir_okay=False, exists=True),
    help="Take prompts from a text file, one a line.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Draws prompts and arrivals.")
@click.option(
    "--ignore-eos/--no-ignore-eos",
    default=True,
    show_default=True,
    help="Ask for all output tokens, whatever the model says; where a server refuses that, go on without.",
)
@click.option(
    "--timeout",
    type=float,
    default=600,
    show_default=True,
    callback=parse_positive,
    metavar="SECONDS",
    help="Longest time for one request.",
)
@click.option("-o", "--output", type=Place(path_type=Path), help="Directory to write. Must not exist.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier output once this is complete.")
@output_options
def bench_serve(
    url: "Server",
    baseline_url: "Server | None",
    request_rate: float,
    max_concurrency: int | None,
    output_len: int,
    chat: bool,
    seed: int,
    as_json: bool,
    quiet: bool,
    verbose: int,
    **settings: Any,
) -> None:
    """Measure a server with OpenAI's interface under load, alone or beside a baseline.

    Time to the first token, time per output token, time between chunks and of the whole answer, and requests
    and tokens a second, defined as `vllm bench serve` defines them and under the same keys with --json.

    A baseline gets the same requests at the same times, after the server. With -o every request is in
    result.json, and the distributions are in serve.png. A key is read from OPENAI_API_KEY.

    Exit status: 0 measured, 1 a server completed no request, 2 wrong usage, 130 interrupted: what was
    measured until then is printed.
    """
    set_up_logging(quiet, verbose)
    with imports():
        from marlin_convert.bench import latencies
        from marlin_convert.bench import serve as story

    servers = (url, baseline_url) if baseline_url else (url,)
    job = story.Job(
        servers=servers,
        load=latencies.Load(request_rate, max_concurrency, output_len, asks_chat(chat, servers), seed),
        **settings,
    )
    done = story.run(job, request_progress(quiet))
    if as_json:
        click.echo(json.dumps(latencies.as_json(done), indent=2))
    elif not quiet:
        click.echo(latencies.text(done))
    if done.interrupted:
        raise KeyboardInterrupt
    for served in done.servers:
        if not served.answers:
            hint = served.hints[0] if served.hints else None
            raise ConvertError(f"{served.url} completed none of {job.number} requests.", hint)
        for hint in served.hints:
            log.warning("Hint: %s", hint)
