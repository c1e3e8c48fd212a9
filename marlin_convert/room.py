"""The room that a conversion takes on disks, known before anything is downloaded or written."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from marlin_convert.chunks import chunk_bytes
from marlin_convert.errors import ConvertError
from marlin_convert.tune import kept_bytes

if TYPE_CHECKING:
    from marlin_convert.conversion import Job
    from marlin_convert.plan import Plan


@dataclass(frozen=True)
class Room:
    """Bytes that are to come on the disk of `place`, by what they are, and those that are free there."""

    place: Path
    taken: Mapping[str, int]
    free: int

    @property
    def enough(self) -> bool:
        """Whether all of it goes there."""
        return sum(self.taken.values()) <= self.free

    def __str__(self) -> str:
        taken = ", ".join(f"{what} {nbytes:,}" for what, nbytes in self.taken.items())
        return f"{taken} bytes, {self.free:,} are free"


def rooms(job: "Job", plan: "Plan") -> list[Room]:
    """What a conversion takes on every disk: the download, what is kept meanwhile, and the output.

    Of several ranks the first one writes.
    """
    taken: dict[tuple[Path, str], int] = {}
    if job.ranks.first:
        written = plan.output_bytes + sum(other.output_bytes for other in plan.also)
        taken[job.output, "the output takes"] = written
        if plan.tunes:
            taken[job.output, "what is solved to be tuned"] = kept_bytes(plan)
        if chunks := chunk_bytes(plan, job.device):
            taken[job.output, "what is solved of a block"] = chunks
    if job.source.remote is not None and job.source.remote.missing:
        from huggingface_hub.constants import HF_HUB_CACHE

        taken[Path(HF_HUB_CACHE), "the model to be downloaded takes"] = job.source.remote.missing
    disks: dict[int, tuple[Path, dict[str, int]]] = {}
    for (path, what), nbytes in taken.items():
        place = next(parent for parent in path.resolve().parents if parent.exists())
        disks.setdefault(place.stat().st_dev, (place, {}))[1][what] = nbytes
    found = [Room(place, what, shutil.disk_usage(place).free) for place, what in disks.values()]
    if job.ranks.first:  # what an earlier run has written is taken already
        found[0] = replace(found[0], free=found[0].free + job.run.staged_bytes)
    return found


def check_room(job: "Job", plan: "Plan") -> None:
    """ConvertError where a disk has not the room for what is to come on it."""
    for room in rooms(job, plan):
        if not room.enough:
            raise ConvertError(
                f"no space left on the disk of '{room.place}': {room}.",
                "free some, or choose a directory on another disk"
                + (" (-o; HF_HOME for what is downloaded)." if job.source.remote else "."),
            )
