"""Large files of a repository on the Hub that are not on this disk: parts of them, or all in time.

A plan needs their headers alone, and these are asked for as ranges of bytes. Once a conversion has begun,
whole files come in the order in which it needs them, ahead of it; who reads one that is not there yet waits.
"""

import io
import logging
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from marlin_convert.errors import ConvertError, SourceError
from marlin_convert.hub_calls import aside, hub_errors

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

log = logging.getLogger("marlin_convert")

# What is asked for of a file to begin with: most headers are no longer.
BEGINNING = 1 << 17


@dataclass(frozen=True)
class Remote:
    """What of a repository at one commit is not on this disk.

    `files` are its weight files that are not, by name; `nbytes` is what all files take that a model is read
    from, `missing` what is to come of them.
    """

    files: Mapping[str, "RemoteFile"]
    nbytes: int
    missing: int


@dataclass
class RemoteFile:
    """A file of a repository of some `kind`, known by its size and its digest.

    What is read of it are parts that are asked for one by one or, if it `comes`, the whole that was fetched.
    """

    repository: str
    commit: str
    name: str
    size: int
    digest: str
    kind: str = "model"
    comes: bool = False
    _path: Path | None = None
    _turn: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __str__(self) -> str:
        return f"{self.repository}/{self.name}"

    def open(self, mode: Literal["rb"], buffering: int = -1) -> io.RawIOBase | io.BufferedReader:
        """The bytes, to be read from any place; without buffering no more is asked for than is read."""
        raw = io.FileIO(self.fetch()) if self.comes else _Parts(self)
        return io.BufferedReader(raw, BEGINNING if buffering < 0 else buffering) if buffering else raw

    def fetch(self) -> Path:
        """Where the file is, once it is in the cache; SourceError if it cannot be had."""
        from huggingface_hub import hf_hub_download

        with self._turn:
            if self._path is None:
                with hub_errors(self.repository):
                    path = aside(
                        lambda: hf_hub_download(
                            self.repository, self.name, repo_type=self.kind, revision=self.commit
                        )
                    )
                self._path = Path(path)
            return self._path

    def part(self, start: int, end: int) -> bytes:
        """Some of its bytes; SourceError if the Hub does not give them, and only them."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

        url = hf_hub_url(self.repository, self.name, repo_type=self.kind, revision=self.commit)
        headers = build_hf_headers() | {"Range": f"bytes={start}-{end - 1}"}
        with hub_errors(self.repository), http_stream_backoff("GET", url, headers=headers) as answer:
            if answer.status_code >= 400:
                answer.read()  # the sentence of the Hub is in it
            hf_raise_for_status(answer)
            in_part = answer.status_code == 206
            data = answer.read() if in_part else b""
        if len(data) != end - start:
            given = (
                f"gives {len(data)} bytes of '{self}' for" if in_part else f"gives '{self}' only whole, not"
            )
            kind = "" if self.kind == "model" else f" --repo-type {self.kind}"
            raise SourceError(
                f"the Hub {given} bytes {start} to {end}.",
                "what stands before it (HF_ENDPOINT) may not know ranges; 'hf download "
                f"{self.repository}{kind} --revision {self.commit}' says where it is, to be given instead.",
            )
        return data


class _Parts(io.RawIOBase):
    """A file of the Hub from which every read is a request."""

    def __init__(self, file: RemoteFile):
        super().__init__()
        self._file, self._at = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._file.size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: "WriteableBuffer") -> int:
        view = memoryview(buffer).cast("B")
        end = min(self._at + len(view), self._file.size)
        if end <= self._at:
            return 0
        data = self._file.part(self._at, end)
        view[: len(data)] = data
        self._at = end
        return len(data)


@contextmanager
def fetched_ahead(files: Iterable[RemoteFile], *, by_others: bool = False) -> Iterator[None]:
    """Fetch whole files in this order while the context lasts, in a thread that nobody waits for at its end.

    What goes wrong there is said to whoever reads the file: that fetches it again. Where others
    do so on this machine (`by_others`) files are fetched as they are read; of those that want one at once the
    cache lets one process fetch it.
    """
    todo, ended = list(files), threading.Event()
    for file in todo:
        file.comes = True

    def run() -> None:
        for count, file in enumerate(todo, 1):
            if ended.is_set():
                return
            try:
                file.fetch()
            except ConvertError as error:
                log.debug("%s: %s", file, error)
            else:
                log.info("fetched %s, %d of %d weight files", file.name, count, len(todo))

    if not by_others:
        threading.Thread(target=run, daemon=True, name="fetch").start()
    try:
        yield
    finally:
        ended.set()
