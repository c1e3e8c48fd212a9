"""One request to a server with OpenAI's interface, streamed, and when each part of its answer came.

HTTP is h11's, which the Hub's client brings, straight on asyncio's streams: the client library above it takes
twice the time for every chunk, and the client's time is in what is measured.
"""

import asyncio
import json
import ssl
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import h11

from marlin_convert.errors import printable

READ = 1 << 16
# What an event, the list of models or the part of a refusal that is looked at may have at most, in bytes.
LONGEST = 1 << 20


class Failed(Exception):
    """Why a request did not complete: `reason` is what it is counted by, `detail` is of this one."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Server:
    """A server's address, split; `prefix` ends in /v1. The key goes with every request, and nowhere else."""

    tls: bool
    host: str
    port: int
    name: str
    prefix: str
    key: str | None = field(default=None, repr=False)

    @classmethod
    def at(cls, url: str, key: str | None = None) -> "Server":
        """The server of an address with or without /v1; ValueError says what is wrong with it, or the key."""
        if not url.isascii() or not url.isprintable() or " " in url:
            raise ValueError("has characters that no address has")
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise ValueError("has a host or port that is none") from error
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("is not like http://host:port or https://host")
        if "@" in parts.netloc:
            raise ValueError("has a user or password; a key goes into OPENAI_API_KEY")
        if parts.query or parts.fragment:
            raise ValueError("has a '?' or '#'; the address ends with the path")
        if key is not None and not (key.isascii() and key.isprintable() and " " not in key):
            raise ValueError("cannot be asked: OPENAI_API_KEY has characters that no key has")
        tls = parts.scheme == "https"
        prefix = parts.path.rstrip("/")
        prefix += "" if prefix.endswith("/v1") else "/v1"
        return cls(tls, parts.hostname, port or (443 if tls else 80), parts.netloc, prefix, key or None)

    @property
    def url(self) -> str:
        """The address, with /v1."""
        return f"http{'s' if self.tls else ''}://{self.name}{self.prefix}"

    @cached_property
    def context(self) -> ssl.SSLContext | None:
        """For TLS, with the certificates of this machine; made once, as that takes many milliseconds."""
        return ssl.create_default_context() if self.tls else None

    def excerpt(self, body: bytes) -> str:
        """The beginning of what the server says, in one line, and never the key that it may repeat."""
        text = body.decode("utf-8", "replace")
        if self.key:
            text = text.replace(self.key, "***")
        return printable(textwrap.shorten(text, 200))


@dataclass(frozen=True)
class Asked:
    """One request: the path under /v1, and the JSON to post."""

    path: str
    body: bytes


@dataclass
class Answer:
    """What came back: `start` on the clock of time.perf_counter, arrivals of the chunks in seconds after it.

    A chunk is an event with a choice, whatever its text. `usage` is the server's count of tokens, in and out;
    `texts` are the chunks with text, which stand for tokens where there is no usage.
    """

    start: float
    arrivals: list[float] = field(default_factory=list)
    usage: tuple[int, int] | None = None
    texts: int = 0

    @property
    def ttft(self) -> float:
        """Seconds to the first chunk."""
        return self.arrivals[0]

    @property
    def latency(self) -> float:
        """Seconds to the last chunk."""
        return self.arrivals[-1]

    @property
    def itls(self) -> list[float]:
        """Seconds between one chunk and the next."""
        return [after - before for before, after in pairwise(self.arrivals)]

    @property
    def output_tokens(self) -> int:
        """As the server counts them, else the chunks with text."""
        return self.usage[1] if self.usage else self.texts

    @property
    def tpot(self) -> float | None:
        """Seconds a token after the first; None where there is no second."""
        return (self.latency - self.ttft) / (self.output_tokens - 1) if self.output_tokens > 1 else None


class Connection:
    """One request and its answer over a connection of its own: open when the context begins."""

    def __init__(self, server: Server):
        self._server = server
        self._http = h11.Connection(h11.CLIENT)

    async def __aenter__(self) -> "Connection":
        server = self._server
        try:
            self._reader, self._writer = await asyncio.open_connection(
                server.host, server.port, ssl=server.context
            )
        except OSError as error:
            raise Failed("cannot connect", error.strerror or str(error)) from error
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.transport.abort()  # all was read, or no more is wanted

    async def ask(self, method: str, path: str, body: bytes = b"") -> None:
        """Send a request and wait until its answer begins; Failed if that is not a 200."""
        server, http = self._server, self._http
        headers = [
            ("Host", server.name),
            ("Connection", "close"),
            ("Content-Type", "application/json"),
            ("Content-Length", str(len(body))),
        ]
        if server.key:
            headers.append(("Authorization", f"Bearer {server.key}"))
        sent = [h11.Request(method=method, target=server.prefix + path, headers=headers), h11.Data(data=body)]
        self._writer.write(b"".join(http.send(event) or b"" for event in (*sent, h11.EndOfMessage())))
        while isinstance(answer := await self._event(), h11.InformationalResponse):
            pass
        assert isinstance(answer, h11.Response)  # h11 lets nothing else come first
        if answer.status_code != 200:
            raise await self._refused(answer)

    async def _refused(self, answer: h11.Response) -> Failed:
        # a redirection is not followed: it may lead to another host, and the key would go there too
        where = dict(answer.headers).get(b"location") if answer.status_code // 100 == 3 else None
        detail = b"to " + where if where else await self.rest()
        return Failed(f"answered {answer.status_code}", self._server.excerpt(detail))

    async def part(self) -> bytes | None:
        """The next part of the body as soon as it is there; None at the end."""
        event = await self._event()
        return bytes(event.data) if isinstance(event, h11.Data) else None

    async def rest(self) -> bytes:
        """The whole body, or as much of it as anybody looks at."""
        body = b""
        while len(body) < LONGEST and (part := await self.part()) is not None:
            body += part
        return body

    async def _event(self) -> object:
        data = None
        try:
            while (event := self._http.next_event()) is h11.NEED_DATA:
                data = await self._reader.read(READ)
                self._http.receive_data(data)
        except h11.RemoteProtocolError as error:
            if data == b"":
                raise Failed("closed the connection in the middle") from error
            raise Failed("speaks no HTTP", str(error)) from error
        except OSError as error:
            raise Failed("closed the connection in the middle", error.strerror or "") from error
        return event


async def generate(server: Server, asked: Asked, timeout: float) -> Answer:
    """Post a request that streams, and note when each chunk comes; Failed if it does not complete.

    The clock starts when the request is sent over a connection that is open.
    """
    answer = Answer(0)
    try:
        async with asyncio.timeout(timeout), Connection(server) as connection:
            answer.start = time.perf_counter()
            await connection.ask("POST", asked.path, asked.body)
            await _listen(connection, server, answer)
    except TimeoutError as error:
        chunks = f"after {len(answer.arrivals)} chunks" if answer.arrivals else "without a chunk"
        raise Failed(f"did not end in {timeout:g} s", chunks) from error
    return answer


async def _listen(connection: Connection, server: Server, answer: Answer) -> None:
    lines = _Lines()
    ended = False
    while (part := await connection.part()) is not None:
        now = time.perf_counter() - answer.start
        for line in lines.of(part):
            if not line.startswith(b"data:"):  # an empty line, a comment, or the name of an event
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                ended = True
            elif not ended:
                _note(server, answer, data, now)
    if not ended:
        raise Failed("ended without [DONE]", server.excerpt(lines.first))
    if not answer.arrivals:
        raise Failed("answered without a token")


class _Lines:
    """Puts lines together again, of which a part of the body may hold several, or a piece of one."""

    def __init__(self) -> None:
        self.first = b""
        self._open = b""

    def of(self, part: bytes) -> Iterator[bytes]:
        """The lines that are complete with this part."""
        self.first = self.first or part
        *lines, self._open = (self._open + part).split(b"\n")
        if len(self._open) > LONGEST:
            raise Failed("sent an event that has no end")
        yield from lines


def _note(server: Server, answer: Answer, data: bytes, now: float) -> None:
    """Put an event into the answer; Failed if it is an error, or no event."""
    try:
        event = json.loads(data)
        choices, usage = event.get("choices"), event.get("usage")
        if "error" in event:
            raise Failed("answered an error in the stream", server.excerpt(data))
        if choices:
            answer.arrivals.append(now)
            choice = choices[0]
            answer.texts += bool((choice.get("delta") or {}).get("content") or choice.get("text"))
        if usage:
            answer.usage = int(usage["prompt_tokens"]), int(usage["completion_tokens"])
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise Failed("sent what is no event", server.excerpt(data)) from error


async def first_model(server: Server, timeout: float) -> str:
    """The name of the first model that a server lists; Failed if it names none."""
    try:
        async with asyncio.timeout(timeout), Connection(server) as connection:
            await connection.ask("GET", "/models")
            body = await connection.rest()
    except TimeoutError as error:
        raise Failed(f"did not end in {timeout:g} s") from error
    try:
        listed: Any = json.loads(body)
        return str(listed["data"][0]["id"])
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise Failed("lists no model", server.excerpt(body)) from error
