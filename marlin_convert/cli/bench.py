"""`marlin-convert bench`."""

import click

from marlin_convert.cli.bench_kernel import bench_kernel
from marlin_convert.cli.bench_latency import bench_latency
from marlin_convert.cli.bench_serve import bench_serve


@click.group(short_help="Time the kernel, a checkpoint or a server on this machine.")
def bench() -> None:
    """Measure on this machine what the package is for."""


for command in (bench_kernel, bench_serve, bench_latency):
    bench.add_command(command)
