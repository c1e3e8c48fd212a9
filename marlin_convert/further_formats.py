"""The further formats of one run: what is solved is written in one, and repacked to the others beside it."""

from collections.abc import Iterator

import torch

from marlin_convert import recipe as recipes
from marlin_convert.checkpoint import manifest as manifests
from marlin_convert.checkpoint.manifest import MANIFEST
from marlin_convert.conversion import Job
from marlin_convert.hub import Source


def repacks(job: Job) -> Iterator[Job]:
    """What repacks the finished output to the other formats."""
    for format in job.also:
        yield Job(
            source=Source(job.output, job.output.name, None),
            output=job.output.with_name(format),
            recipe=recipes.load(recipes.DEFAULT).changed({"format": format}),
            device=torch.device("cpu"),
            max_shard_size=job.max_shard_size,
            resume=job.resume,
            overwrite=job.overwrite,
            trust_remote_code=job.trust_remote_code,
        )


def is_made(repack: Job) -> bool:
    """Whether the output of a repack is there already, from the very checkpoint that is there now."""
    if not (repack.output / MANIFEST).is_file():
        return False
    source = (manifests.load(repack.output) or {}).get("source")
    made_from = source.get("manifest") if isinstance(source, dict) else None
    return made_from == manifests.sha256_file(repack.source.directory / MANIFEST)
