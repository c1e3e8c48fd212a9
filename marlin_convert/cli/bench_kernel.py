"""`marlin-convert bench kernel`."""

import json
from pathlib import Path
from typing import Any

import click

from marlin_convert.cli.arguments import Place, parse_counts
from marlin_convert.cli.output import output_options, set_up_logging
from marlin_convert.options import pick_gpu

FIGURES = ("peak", "models", "roofline", "sustained")


def parse_figures(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[str, ...]:
    """The names in a list like peak,roofline, each once."""
    names = tuple(dict.fromkeys(name.strip() for name in value.split(","))) if value else ()
    for name in names:
        if name not in FIGURES:
            raise click.BadParameter(f"{name!r} is not one of {', '.join(FIGURES)}.")
    return names


def parse_shapes(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[Any, ...]:
    """The layers in a list like 8B.qkv,4096x4096."""
    from marlin_convert.bench import shapes

    found = []
    for name in dict.fromkeys(name.strip() for name in value.split(",")) if value else ():
        try:
            found.append(shapes.find(name))
        except KeyError as error:
            raise click.BadParameter(f"{name!r} is no layer like 8B.qkv, and not KxN.") from error
    return tuple(found)


@click.command("kernel")
@click.option(
    "-o", "--output", required=True, type=Place(path_type=Path), help="Where to write. Must not exist."
)
@click.option(
    "--figures",
    callback=parse_figures,
    metavar="NAME[,NAME]",
    help="Of peak, models, roofline, sustained.  [default: the first three; none with --shapes]",
)
@click.option(
    "--shapes",
    callback=parse_shapes,
    metavar="NAME|KxN[,...]",
    help="Layers to sweep, like 8B.qkv.  [default: of Llama-3 8B and 70B; none with --figures]",
)
@click.option(
    "--batch-sizes",
    callback=parse_counts,
    metavar="N[,N]",
    help="Of all but the figure models.  [default: powers of 2 as in the paper; 1 to 4096 for layers]",
)
@click.option(
    "--group-size",
    type=click.Choice(["128", "64", "32", "-1"]),
    default="128",
    show_default=True,
    help="Weights that share a scale; -1 is one per column.",
)
@click.option(
    "--minutes",
    type=click.FloatRange(min=0, min_open=True),
    default=5,
    show_default=True,
    metavar="N",
    help="Of load, for sustained.",
)
@click.option("--device", default="auto", show_default=True, metavar="auto|cuda[:N]", help="What to measure.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier output once this is complete.")
@output_options
def bench_kernel(
    output: Path,
    figures: tuple[str, ...],
    shapes: tuple[Any, ...],
    group_size: str,
    device: str,
    as_json: bool,
    quiet: bool,
    verbose: int,
    **settings: Any,
) -> None:
    """Time the kernel beside cuBLAS float16 and the peers that can be imported.

    Peers are vLLM's Marlin and Machete, and Humming. Weights are cold, launches are in CUDA graphs, times are
    medians, and every product is compared with that of the dequantized weights before it is timed.

    \b
    peak       speed-up over the batch size on the paper's ideal matrix
    models     speed-up at batch 16 over the linears of seven models
    roofline   TFLOP/s over arithmetic intensity, under measured ceilings
    sustained  speed-up and clocks during minutes of load

    Every number goes into kernel.csv (sustained: sustained.csv), every figure into a PNG.
    """
    set_up_logging(quiet, verbose)
    where = pick_gpu(device)
    from marlin_convert.bench import kernel as story
    from marlin_convert.bench import measurements
    from marlin_convert.bench.shapes import LAYERS

    if not figures and not shapes:
        figures, shapes = FIGURES[:3], LAYERS
    job = story.Job(output, where, figures, shapes, group_size=int(group_size), **settings)
    done = story.run(job)
    if as_json:
        click.echo(json.dumps(measurements.as_json(done), indent=2))
    elif not quiet:
        click.echo(measurements.text(done))
