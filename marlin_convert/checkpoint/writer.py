"""Checkpoints written append-only, so that an interrupted run can go on; published by one rename.

What is written depends on the tensors alone: no time, no host, no path goes in.
"""

import ctypes
import errno
import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch

from marlin_convert.checkpoint import manifest as manifests
from marlin_convert.checkpoint.reader import DTYPES, INDEX, SINGLE
from marlin_convert.errors import ConvertError, SourceError, reading

DTYPE_CODES = {getattr(torch, name): code for code, (name, _) in DTYPES.items()}

# Bytes that may wait for the disk when one more tensor comes: a block of a 70B model, or of many experts, so
# that solving the next one need not wait for it.
WAITING_BYTES = 1 << 29

# Bytes of tensors that leave a GPU as one: every copy, and every word between threads, makes it wait.
LEAVING = 1 << 24

# Bytes of one write: they are still in the processor's cache after hashing, and the page cache need not find
# long runs of free pages for them, which was seen to cost five times the copy itself.
CHUNK = 1 << 22

# What to do about staged files that are not those of the run.
RESTART = "remove the unfinished directory and start again."

# An earlier output that gives way to a new one by two renames.
REPLACED = "replaced"


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to come."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


@dataclass(frozen=True)
class _Shard:
    file: str
    first: int  # place of its first tensor in the writing order
    header: bytes
    ends: tuple[int, ...]  # where in the file each of its tensors ends


class ShardWriter:
    """The safetensors shards of one checkpoint, whose layout is fixed before any tensor exists.

    Tensors come one at a time in `order`; hashing and writing happen on a thread of their own. Use it as a
    context manager: leaving it stops that thread, whatever happened, and keeps what was written for `resume`.
    """

    def __init__(
        self,
        directory: Path,
        specs: Sequence[TensorSpec],
        max_shard_size: int,
        on_disk: Callable[[str], str] = str,
    ):
        """Lay out `specs` in shards of at most `max_shard_size` bytes; a larger tensor has its own.

        `on_disk` gives the name that a tensor has in the files.
        """
        # Each tensor begins where the one before ends. With sizes divisible by 8 first (nearly all, in the
        # order given), then by 4, then by 2, every one of them is aligned to its dtype.
        self._specs = sorted(specs, key=lambda spec: -min(spec.nbytes & -spec.nbytes or 8, 8))
        self._on_disk = on_disk
        if not specs or len({on_disk(spec.name) for spec in specs}) != len(specs):
            raise RuntimeError("tensor names must be unique, and there must be some")
        self.directory = directory
        self._shards = _layout(self._specs, max_shard_size, on_disk)
        self._next = 0  # tensors handed in
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="shard-writer")
        self._pending: deque[tuple[int, Future[None]]] = deque()  # bytes, and who writes them
        self._waiting = 0  # bytes of them
        self._stream: torch.cuda.Stream | None = None
        self._leaving: list[torch.Tensor] = []  # the last ones taken, if they are on a GPU
        self._leaving_bytes = 0
        # From here on: the writing thread's, or ours while nothing is pending.
        self._failure: Exception | None = None
        self._at = 0  # shard being written
        self._file: BinaryIO | None = None
        self._digest = hashlib.sha256()
        self._digests: dict[str, str] = {}

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_: object) -> None:
        # what is still queued is a few tensors and perhaps a finished block: not worth losing
        self._pool.shutdown()
        if self._file is not None:
            self._file.close()

    @property
    def order(self) -> list[str]:
        """The names in the order in which they must be written."""
        return [spec.name for spec in self._specs]

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Take the next tensor of `order`, on any device; it must not change before the next `sync`.

        Raises the OSError of an earlier write when the disk failed.
        """
        spec = self._specs[self._next] if self._next < len(self._specs) else None
        if spec != TensorSpec(name, tensor.dtype, tuple(tensor.shape)):
            raise RuntimeError(f"expected {spec}, got {name} {tensor.dtype} {tuple(tensor.shape)}")
        self._settle(WAITING_BYTES)
        if not tensor.is_cuda or self._leaving_bytes + spec.nbytes > LEAVING:
            self._leave()
        if tensor.is_cuda:
            self._leaving.append(tensor.detach())
            self._leaving_bytes += spec.nbytes
        else:
            self._submit(partial(self._append, self._next, [tensor.detach()]), spec.nbytes)
        self._next += 1

    def read(self, name: str) -> torch.Tensor:
        """A tensor that is on disk already, for a run that goes on with what an earlier one has found."""
        place = next(place for place, spec in enumerate(self._specs) if spec.name == name)
        shard = next(shard for shard in reversed(self._shards) if shard.first <= place)
        spec, end = self._specs[place], shard.ends[place - shard.first]
        with (self.directory / shard.file).open("rb") as file:
            file.seek(end - spec.nbytes)
            data = bytearray(file.read(spec.nbytes))
        return torch.frombuffer(data, dtype=spec.dtype).view(spec.shape)

    def checkpoint(self, durable: Callable[[int], None]) -> None:
        """Call `durable(count)` once the `count` tensors taken so far are safely on disk.

        It is called on the writing thread; `count` is what `resume` wants. An error of it, or of the disk,
        surfaces with the next call.
        """
        self._leave()
        count = self._next

        def sync() -> None:
            if self._file is not None:
                os.fsync(self._file.fileno())
            fsync(self.directory)
            durable(count)

        self._submit(sync)

    def sync(self) -> int:
        """Wait until everything taken is safely on disk; how many tensors that is, to give to `resume`."""
        done: list[int] = []
        self.checkpoint(done.append)
        self._settle()
        return done[0]

    def resume(self, count: int) -> None:
        """Go on after the first `count` tensors, which an earlier writer of the same layout has left on disk.

        What is there beyond them is removed. Raises SourceError if they are not there.
        """
        if self._next:
            raise RuntimeError("resume comes before the first write")
        if not 0 <= count <= len(self._specs):
            raise SourceError(
                f"cannot resume '{self.directory}': {count} tensors of {len(self._specs)} promised.", RESTART
            )
        for shard in self._shards:
            path = self.directory / shard.file
            kept = min(max(count - shard.first, 0), len(shard.ends))
            if kept:
                self._reopen(path, shard, shard.ends[kept - 1])
                if kept == len(shard.ends):
                    self._finish()
            else:
                path.unlink(missing_ok=True)
        self._next = count

    def close(self) -> dict[str, str]:
        """Write the index, make all of it durable; the sha256 of every file written."""
        if self._next != len(self._specs):
            raise RuntimeError(f"{len(self._specs) - self._next} tensors were never written")
        self._leave()
        self._settle()
        self._pool.shutdown()
        files = dict(self._digests)
        if len(self._shards) > 1:
            index = {
                "metadata": {"total_size": sum(spec.nbytes for spec in self._specs)},
                "weight_map": dict(
                    sorted(
                        (self._on_disk(spec.name), shard.file)
                        for shard in self._shards
                        for spec in self._specs[shard.first : shard.first + len(shard.ends)]
                    )
                ),
            }
            write_json(self.directory / INDEX, index)
            files[INDEX] = hashlib.sha256((self.directory / INDEX).read_bytes()).hexdigest()
        fsync(self.directory)
        return files

    def _leave(self) -> None:
        """Let the writing thread have the tensors of a GPU that were taken since it last had some."""
        if not self._leaving:
            return
        tensors, nbytes = self._leaving, self._leaving_bytes
        self._leaving, self._leaving_bytes = [], 0
        device = tensors[0].device
        ready = torch.cuda.current_stream(device).record_event()
        self._stream = self._stream or torch.cuda.Stream(device)
        self._submit(partial(self._append, self._next - len(tensors), tensors, ready), nbytes)

    def _settle(self, most: int = -1) -> None:
        """Wait until at most so many bytes wait for the disk; without `most`, until all is written."""
        while self._pending and (self._waiting > most or self._pending[0][1].done()):
            nbytes, done = self._pending.popleft()
            self._waiting -= nbytes
            done.result()
        if self._failure is not None:
            raise self._failure

    def _submit(self, work: Callable[[], None], nbytes: int = 0) -> None:
        """Let the writing thread do `work` after all it was given before, unless something of that failed.

        So many bytes wait for the disk until then.
        """

        def unless_failed() -> None:
            if self._failure is None:
                try:
                    work()
                except Exception as error:
                    self._failure = error
                    raise

        self._pending.append((nbytes, self._pool.submit(unless_failed)))
        self._waiting += nbytes

    def _append(self, place: int, tensors: list[torch.Tensor], ready: torch.cuda.Event | None = None) -> None:
        """On the writing thread: tensors; before a shard's first its header, after the last its end.

        They come from a GPU once they are `ready` there, whatever else that has been given to do since.
        """
        if self._stream is not None and ready is not None:
            self._stream.wait_event(ready)
        with nullcontext() if ready is None else torch.cuda.stream(self._stream):
            octets = [one.contiguous().flatten().view(torch.uint8) for one in tensors]
            sizes = [len(one) for one in octets]
            data = (octets[0] if len(octets) == 1 else torch.cat(octets)).cpu().numpy().data
        del octets  # the device has no need of them while the disk is waited for
        while sizes:
            shard = self._shards[self._at]
            if place == shard.first:
                self._file = (self.directory / shard.file).open("wb", buffering=0)
                self._digest = hashlib.sha256()
                self._put(memoryview(shard.header))
            left = shard.first + len(shard.ends) - place
            nbytes = sum(sizes[:left])
            self._put(data[:nbytes])
            data = data[nbytes:]
            place += len(sizes[:left])
            del sizes[:left]
            if place == shard.first + len(shard.ends):
                self._finish()

    def _put(self, data: memoryview) -> None:
        assert self._file is not None
        for start in range(0, len(data), CHUNK):
            chunk = data[start : start + CHUNK]
            self._digest.update(chunk)
            while chunk:
                chunk = chunk[self._file.write(chunk) :]

    def _finish(self) -> None:
        assert self._file is not None
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        self._digests[self._shards[self._at].file] = self._digest.hexdigest()
        self._at += 1

    def _reopen(self, path: Path, shard: _Shard, end: int) -> None:
        size = path.stat().st_size if path.exists() else 0
        if size < end:
            raise SourceError(f"cannot resume: '{path}' has {size} bytes, {end} were written.", RESTART)
        self._file = path.open("r+b", buffering=0)
        if self._file.read(len(shard.header)) != shard.header:
            raise SourceError(f"cannot resume: '{path}' was begun with other tensors.", RESTART)
        self._file.truncate(end)
        self._file.seek(0)
        # Leaves the file at its end, where the next tensor goes.
        self._digest = hashlib.file_digest(self._file, "sha256")


def write_json(path: Path, obj: Any) -> None:
    """Put `obj` at `path` whole or not at all, as JSON indented by 2, in the order it has."""
    write_text(path, to_json(obj))


def to_json(obj: Any) -> str:
    """JSON as all files of ours have it: indented by 2, in the order it has."""
    return json.dumps(obj, indent=2) + "\n"


def write_text(path: Path, text: str) -> None:
    """Put `text` at `path` whole or not at all."""
    with whole(path) as temporary, temporary.open("x", encoding="utf-8", newline="\n") as file:
        file.write(text)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A name to write a file by, which is at `path` when the context ends, and durable; or there is none."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)  # it may be a link, left there to be followed
    try:
        yield temporary
        fsync(temporary)
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    fsync(path.parent)


def check_report(path: Path, about: Path) -> None:
    """ConvertError for a report inside of the directory it is `about`, or in the place of what is none."""
    if about.resolve() in path.resolve().parents:
        raise ConvertError(
            f"the report '{path}' would be a file of '{about}' that its manifest does not know.",
            "choose a file beside it for --report.",
        )
    _check_no_stranger(path)


def _check_no_stranger(path: Path) -> None:
    if not path.is_file():
        return
    with reading(path), path.open("rb") as file:
        start = file.read(max(map(len, manifests.REPORTS)))
    if start and not start.startswith(tuple(one.encode() for one in manifests.REPORTS)):
        raise ConvertError(
            f"'{path}' is there, and is no report of marlin-convert: it is not replaced.",
            "choose another file for --report.",
        )


def write_report(path: Path, text: str, hint: str) -> None:
    """Write what a user wants at `path`: a file whole or not at all; ConvertError if that cannot be done."""
    _check_no_stranger(path)  # again: somebody may have put something there
    try:
        if path.exists() and not path.is_file():  # a pipe or a device, which stays what it is
            path.write_text(text, "utf-8")
        else:
            write_text(path.resolve(), text)
    except OSError as error:
        raise ConvertError(f"the report cannot be written to '{path}': {error.strerror}.", hint) from error


def remove(path: Path) -> None:
    """Remove a file, a link or a whole directory, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def check_replaceable(
    output: Path, overwrite: bool, strangers: Callable[[Path], list[str]] = manifests.strangers
) -> None:
    """ConvertError for an output that must not be replaced: nothing is lost that we did not write.

    An empty directory may be. Another one may be with `overwrite`, where `strangers` finds nothing in it that
    is not ours. A link or a file never is, nor what no rename can replace, or should: a mount point, and the
    directory that the user's shell would then stand in without knowing.
    """
    if not os.path.lexists(output):
        return
    if output.is_symlink():
        raise ConvertError(
            f"'{output}' already exists and is a link.",
            f"name the directory it leads to, '{output.resolve()}', or remove the link.",
        )
    if not output.is_dir():
        raise ConvertError(f"'{output}' already exists and is a file.", "choose another directory.")
    if output.is_mount() or output.samefile("."):
        what = "a mount point" if output.is_mount() else "the current directory"
        raise ConvertError(
            f"'{output}' is {what}: it cannot be the output, which comes by a rename.",
            "give a directory to be made in it.",
        )
    with reading(output):
        if not any(output.iterdir()):
            return
    if not overwrite:
        raise _taken(output)
    if found := strangers(output):
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise ConvertError(
            f"'{output}' is not replaced, as not all of it was written by marlin-convert: {found[0]}{more}.",
            "move away what you want to keep and remove the rest, or choose another directory.",
        )


def _taken(output: Path) -> ConvertError:
    return ConvertError(
        f"'{output}' already exists and is not empty.", "choose another directory, or pass --overwrite."
    )


def publish(partial: Path, output: Path, overwrite: bool) -> None:
    """Make the finished directory `partial` durable and move it to `output` by one rename.

    With `overwrite` an earlier directory is replaced. It is in the place of `partial` then or, where a file
    system cannot exchange two names, REPLACED beside that. Without `overwrite` a non-empty `output` raises
    ConvertError. Whether it may be replaced at all `check_replaceable` says, which must have been asked.
    """
    for folder, _, files in os.walk(partial):
        for name in files:
            fsync(Path(folder, name))
        fsync(Path(folder))
    if not overwrite or not os.path.lexists(output):
        try:
            partial.rename(output)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise
            raise _taken(output) from error
    elif not _exchange(partial, output):
        aside = partial.with_name(REPLACED)
        output.rename(aside)
        try:
            partial.rename(output)
        except OSError:
            aside.rename(output)
            raise
    fsync(output.parent)


def _layout(specs: list[TensorSpec], max_shard_size: int, on_disk: Callable[[str], str]) -> list[_Shard]:
    groups: list[list[TensorSpec]] = []
    room = 0
    for spec in specs:
        if not groups or spec.nbytes > room:
            groups.append([])
            room = max_shard_size
        groups[-1].append(spec)
        room -= spec.nbytes

    shards: list[_Shard] = []
    first = 0
    for number, group in enumerate(groups, 1):
        file = SINGLE if len(groups) == 1 else f"model-{number:05}-of-{len(groups):05}.safetensors"
        # "format" is what transformers asks for; what there is to say of the run is said in other files
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        ends = []
        end = 0
        for spec in group:
            start, end = end, end + spec.nbytes
            ends.append(end)
            entries[on_disk(spec.name)] = {
                "dtype": DTYPE_CODES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [start, end],
            }
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        header = len(text).to_bytes(8, "little") + text
        shards.append(_Shard(file, first, header, tuple(len(header) + end for end in ends)))
        first += len(group)
    return shards


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names at once, where system and file system can (Linux renameat2); say whether it was done."""
    at_cwd, rename_exchange = -100, 2
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    if renameat2(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), rename_exchange) == 0:
        return True
    if (code := ctypes.get_errno()) in (errno.ENOSYS, errno.EINVAL):
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))


def fsync(path: Path) -> None:
    """Make a file, or the names in a directory, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
