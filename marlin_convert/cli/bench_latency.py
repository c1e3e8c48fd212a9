"""`marlin-convert bench latency`."""

import json
from pathlib import Path

import click

from marlin_convert.cli.arguments import NameOrPlace, Place, parse_counts
from marlin_convert.cli.imports import imports
from marlin_convert.cli.output import output_options, set_up_logging
from marlin_convert.options import pick_device


@click.command("latency")
@click.argument("checkpoint", type=NameOrPlace())
@click.option(
    "--baseline", type=NameOrPlace(), metavar="MODEL", help="A directory or Hub id to compare with."
)
@click.option(
    "--batch-sizes",
    default="1,2,4,8,16,32,64,128",
    show_default=True,
    callback=parse_counts,
    metavar="N,N,...",
    help="Sequences at a time.",
)
@click.option(
    "--input-len", type=click.IntRange(1), default=64, show_default=True, help="Tokens of a random prompt."
)
@click.option(
    "--output-len", type=click.IntRange(2), default=64, show_default=True, help="Tokens of an answer."
)
@click.option(
    "--device", default="auto", show_default=True, metavar="auto|cpu|cuda[:N]", help="Where to compute."
)
@click.option(
    "--tensor-parallel-size",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="GPUs that vLLM divides a model among.",
)
@click.option("-o", "--output", type=Place(path_type=Path), help="Directory to write. Must not exist.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier output once this is complete.")
@output_options
def bench_latency(
    checkpoint: str,
    baseline: str | None,
    batch_sizes: tuple[int, ...],
    input_len: int,
    output_len: int,
    device: str,
    tensor_parallel_size: int,
    output: Path | None,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
    verbose: int,
) -> None:
    """Measure how long a batch takes through the engine that is installed, without a server.

    Milliseconds to the first token and per token after it, and with a baseline how many times as fast. The
    engine is vLLM on a GPU if it is installed, else transformers, on a GPU with a static cache.
    """
    set_up_logging(quiet, verbose)
    with imports():
        from marlin_convert.bench import batches
        from marlin_convert.bench import latency as story
        from marlin_convert.hub import resolve

    job = story.Job(
        checkpoint=resolve(checkpoint, None).directory,
        baseline=resolve(baseline, None).directory if baseline else None,
        device=pick_device(device),
        batch_sizes=batch_sizes,
        input_len=input_len,
        output_len=output_len,
        tensor_parallel_size=tensor_parallel_size,
    )
    done = story.run(job, output, overwrite)
    if as_json:
        click.echo(json.dumps(batches.to_dict(done), indent=2))
    elif not quiet:
        click.echo(batches.table(done))
