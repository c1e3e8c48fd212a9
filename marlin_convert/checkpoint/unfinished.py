"""OUT.partial: what a run has finished so far, kept so that a run stopped at any moment can go on."""

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from marlin_convert.checkpoint.manifest import MANIFEST, sha256_file
from marlin_convert.checkpoint.reader import json_file
from marlin_convert.checkpoint.writer import REPLACED, remove, write_json
from marlin_convert.errors import ConvertError, SourceError, reading

log = logging.getLogger("marlin_convert")

PROGRESS = "progress.json"
LOCK = "lock"
# Of models/hidden.py, which unlinks it as soon as it is there; a kill may come between the two.
HIDDEN_STATES = "hidden_states.bin"
# Of tune.py: what the solver has found, block by block, and how far its tuning is.
SOLVED, TUNING = "solved", "tuning"
# Of chunks.py: what is solved of blocks that are not finished, a directory each.
CHUNKS = "chunks"


class UnfinishedRun:
    """The directory beside an output in which a run works until the output is complete.

    Its progress.json holds the `settings` that decide every byte of the output, and what is `done`: finished
    blocks, tensors safely on disk, and the manifest's rows of their linears. An earlier output that the new
    one has replaced is in this directory too, until all of it is removed.
    """

    def __init__(self, output: Path):
        self.output = output
        self.directory = output.with_name(output.name + ".partial")
        self.staging = self.directory / "checkpoint"  # becomes `output` by one rename
        self._chunks = self.directory / CHUNKS
        self._progress = self.directory / PROGRESS
        self._lock_file: IO[str] | None = None

    @property
    def blocks(self) -> int:
        """How many blocks are finished, or solved to be tuned, and safely on disk."""
        if not self._progress.exists():
            return 0
        done = json_file(self.directory, PROGRESS)["done"]
        return done["blocks"] or done.get("solved", 0)

    @property
    def _in_chunks(self) -> bool:
        """Whether a part of a block is solved and safely on disk."""
        return self._progress.exists() and any(self._chunks.glob("*/*.safetensors"))

    @property
    def staged_bytes(self) -> int:
        """Bytes that are already taken on the disk."""
        places = (self.staging, self.directory / SOLVED, self._chunks)
        files = (path for place in places if place.is_dir() for path in place.rglob("*"))
        return sum(path.stat().st_size for path in files if path.is_file())

    def check_ours(self) -> None:
        """ConvertError if what stands in the directory's place is not what a run leaves, and nothing else."""
        if not os.path.lexists(self.directory):
            return
        stranger = self._stranger()
        if stranger is not None:
            raise ConvertError(
                f"'{self.directory}' is in the way: it is not an unfinished run ({stranger}).",
                "move it, or choose another output directory.",
            )

    def _stranger(self) -> str | None:
        """What shows that the directory is not only a run's own, None if nothing does."""
        if self.directory.is_symlink() or not self.directory.is_dir():
            return "no directory"
        with reading(self.directory):
            names = {path.name for path in self.directory.iterdir()}
        known = {LOCK, PROGRESS + ".tmp"}
        if PROGRESS in names:
            known |= {PROGRESS, self.staging.name, REPLACED, HIDDEN_STATES, SOLVED, CHUNKS, CHUNKS + ".tmp"}
            known |= {TUNING, TUNING + ".tmp", TUNING + ".old"}
            try:
                noted = json_file(self.directory, PROGRESS)
            except SourceError as error:
                return str(error).removesuffix(".")
            done = noted.get("done")
            if not isinstance(noted.get("settings"), dict) or not isinstance(done, dict):
                return f"{PROGRESS} is not one of marlin-convert"
            if type(done.get("blocks")) is not int or not isinstance(done.get("matrices"), list):
                return f"{PROGRESS} is not one of marlin-convert"
        if names - known:
            return f"it holds {min(names - known)!r}"
        lock = self.directory / LOCK
        if LOCK in names and (lock.is_symlink() or not lock.is_file() or lock.stat().st_size):
            return f"{LOCK} is not one of marlin-convert"
        return None

    def published(self) -> dict[str, Any] | None:
        """The output's manifest if the run was stopped between its last rename and its clean-up."""
        if not self._progress.exists():
            return None
        digest = json_file(self.directory, PROGRESS).get("manifest")
        return json_file(self.output, MANIFEST) if digest and _is(self.output, digest) else None

    def tidy(self) -> None:
        """Remove what a run has left that ended before it had anything, or after its output was complete."""
        if not os.path.lexists(self.directory) or self._stranger() is not None:
            return
        if not (self.blocks or self._in_chunks) or self.published() is not None:
            self._lock()
            self.forget()

    def earlier(self, settings: dict[str, Any], *, resume: bool, discard: bool) -> dict[str, Any]:
        """What is done already and can be gone on from: nothing, unless `resume`.

        ConvertError if an earlier run would be lost without `discard`, or was started with other settings.
        """
        nothing: dict[str, Any] = {
            "blocks": 0, "solved": 0, "tensors": 0, "matrices": [], "divergence": [], "tuning": None,
            "chunks": False,
        }  # fmt: skip
        if not (self.blocks or self._in_chunks):
            return nothing
        progress = json_file(self.directory, PROGRESS)
        digest = progress.get("manifest")
        if digest and not _is(self.staging, digest):
            return nothing  # it was published, and moved away or replaced since
        if not resume:
            if not discard:
                raise ConvertError(
                    f"'{self.directory}' holds an interrupted run that has finished {self.blocks} blocks"
                    f"{' and a part of another' * self._in_chunks}.",
                    "continue it with --resume, or remove the directory.",
                )
            return nothing
        for name, then, now in differences(progress["settings"], settings):
            raise ConvertError(
                f"cannot resume '{self.directory}': it was started with {name} {then!r}, not {now!r}.",
                _way_on(name, then),
            )
        log.info("resuming at block %d", self.blocks)
        return nothing | progress["done"] | {"chunks": self._in_chunks}

    def begin(self, settings: dict[str, Any], done: dict[str, Any]) -> None:
        """Make the directory, for this process alone; what an abandoned run left there goes."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self._lock()
        replaced = self.directory / REPLACED
        if os.path.lexists(replaced) and not os.path.lexists(self.output):  # stopped between two renames
            replaced.rename(self.output)
        remove(replaced)
        aside = self._chunks.with_name(CHUNKS + ".tmp")
        remove(aside)
        if self._chunks.exists() and not done.get("chunks"):
            self._chunks.rename(aside)  # all of them at once, and before there is a note of other settings
            remove(aside)
        # first the note, then what it is about: what is noted as done is there at any moment
        finished = {key: value for key, value in done.items() if key != "tensors"}
        self.save(settings, finished, done["tensors"])
        if not done["blocks"]:
            remove(self.staging)
        if not done.get("solved"):
            remove(self.directory / SOLVED)
            remove(self.directory / TUNING)
        self.staging.mkdir(exist_ok=True)
        for leftover in self.staging.glob("*.tmp"):
            leftover.unlink()

    def _lock(self) -> None:
        """Keep other processes out until this one ends; ConvertError if one is at work here."""
        lock_file = (self.directory / LOCK).open("w")
        try:
            fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConvertError(
                f"another process is at work in '{self.directory}'.", "wait for it, or choose another output."
            ) from error
        self._lock_file = lock_file

    def release(self) -> None:
        """Let other processes in again; nothing stays of a run that has nothing to go on with."""
        try:
            if self._lock_file is None:  # never ours, or forgotten; an empty directory may be left
                with suppress(OSError):
                    self.directory.rmdir()
            elif not (self.blocks or self._in_chunks):
                self.forget()
        finally:
            self._unlock()

    def _unlock(self) -> None:
        if self._lock_file is not None:
            with suppress(OSError):
                self._lock_file.close()
            self._lock_file = None

    def save(self, settings: dict[str, Any], finished: dict[str, Any], tensors: int) -> None:
        """Note how far the run is: from here --resume goes on. Chunks of finished blocks are removed."""
        write_json(self._progress, {"settings": settings, "done": {**finished, "tensors": tensors}})
        over = {str(number) for number in range(finished["blocks"])}
        for chunks in self._chunks.glob("*"):
            if chunks.name in over:
                remove(chunks)

    def complete(self, done: dict[str, Any]) -> None:
        """Note that the staged files are complete, so that they are known wherever the run is stopped."""
        noted = {"done": done, "manifest": sha256_file(self.staging / MANIFEST)}
        write_json(self._progress, json_file(self.directory, PROGRESS) | noted)

    def forget(self) -> None:
        """Remove the directory; a warning says so if it cannot be done, for nobody needs it any more."""
        try:
            for path in self.directory.iterdir():
                if path.name not in (PROGRESS, LOCK):
                    remove(path)
            # until now they said what this directory is, and kept others out
            for name in (PROGRESS, LOCK):
                (self.directory / name).unlink(missing_ok=True)
            self.directory.rmdir()
        except OSError as error:
            log.warning(
                "'%s' could not be removed (%s); nothing in it is needed", self.directory, error.strerror
            )
        self._unlock()


def _is(directory: Path, digest: str) -> bool:
    """Whether this is the directory whose manifest has that sha256."""
    manifest = directory / MANIFEST
    return manifest.exists() and sha256_file(manifest) == digest


def _way_on(name: str, then: Any) -> str:
    """How to go on with a run that was started with another value of a setting."""
    if name == "processor.threads":
        return f"continue with OMP_NUM_THREADS={then}, as sums depend on it, or remove the directory."
    if name == "ranks":
        how = f"torchrun and {then} processes" if then else "one process"
        return f"continue with {how}, as sums depend on it, or remove the directory."
    if name in ("device", "processor") or name.startswith("processor."):
        return "continue on a machine like the one it was started on, or remove the directory."
    return "use the settings it was started with, or remove the directory."


def differences(then: Any, now: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(then, dict) and isinstance(now, dict):
        # in the order of `now`: what was chosen is named before what follows from it
        for key in {**now, **then}:
            yield from differences(then.get(key), now.get(key), f"{name}.{key}".removeprefix("."))
    elif then != now:
        yield name, then, now
