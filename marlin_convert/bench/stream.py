"""One request to a server with OpenAI's interface, streamed, and when each part of its answer came.

HTTP is h11's, which the Hub's client brings, straight on asyncio's streams: the client library above it takes
twice the time for every chunk, and the client's time is in what is measured.
"""

import asyncio
import errno
import json
import re
import ssl
import textwrap
import time
from dataclasses import dataclass, field
from functools import cached_property
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import h11

from marlin_convert.bench.events import LONGEST, Answer, Failed, Listener, Refused, sentence
from marlin_convert.errors import printable

READ = 1 << 16

# What may stand at the end of an address that is a whole endpoint, and whether chats are asked for there.
ENDPOINTS = {"/chat/completions": True, "/completions": False, "/models": None}
_VERSION = re.compile(r"v\d+(alpha|beta)?\d*")

_CERTIFICATE_HINT = (
    "if it is to be trusted, set SSL_CERT_FILE to a PEM file with the certificate that signed its own."
)
_OF_ANOTHER_NAME = (62, 64)  # of OpenSSL: the host's name, or its IP address
_NAME_HINT = "use an address with a name that the certificate is valid for."
_NO_TLS_HINT = "if it is a server without TLS, its address begins with http://."
_COMPRESSED_HINT = "ask the server itself, or let what is in front of it leave streams as they are."
_KEY_HINT = "set OPENAI_API_KEY to a key that the server takes."
_BROKEN_HINT = "the server, or one behind it, has a fault: its log may say more."
_HINTS = {
    401: _KEY_HINT,
    403: _KEY_HINT,
    429: "send fewer requests: --max-concurrency, or --request-rate.",
}
_FILES_HINT = "let this machine open more files with 'ulimit -n', or send fewer at a time: --max-concurrency."


@dataclass(frozen=True)
class Server:
    """A server's address, split; requests go to paths under `prefix`, which mostly ends in /v1.

    The key goes with every request, and nowhere else. `chat` is what the address says of the endpoint, if it
    names one.
    """

    tls: bool
    host: str
    port: int
    name: str
    prefix: str
    key: str | None = field(default=None, repr=False)
    chat: bool | None = None

    @classmethod
    def at(cls, url: str, key: str | None = None) -> "Server":
        """The server of an address; ValueError says what is wrong with it, or the key.

        /v1 is put behind it unless it names a version already, as /api/v3 does, or ends in an endpoint.
        """
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
        prefix, chat = parts.path.rstrip("/"), None
        endpoint = next((one for one in ENDPOINTS if prefix.endswith(one)), None)
        if endpoint is not None:
            prefix, chat = prefix.removesuffix(endpoint), ENDPOINTS[endpoint]
        elif not any(map(_VERSION.fullmatch, prefix.split("/"))):
            prefix += "/v1"
        return cls(tls, parts.hostname, port or (443 if tls else 80), parts.netloc, prefix, key or None, chat)

    @property
    def url(self) -> str:
        """The address that the paths of requests are put behind."""
        return f"http{'s' if self.tls else ''}://{self.name}{self.prefix}"

    @cached_property
    def context(self) -> ssl.SSLContext | None:
        """For TLS, with the certificates of this machine; made once, as that takes many milliseconds."""
        return ssl.create_default_context() if self.tls else None

    def excerpt(self, body: bytes) -> str:
        """The sentence of what the server says, in one line, and never the key that it may repeat."""
        text = sentence(body)
        if self.key:
            text = text.replace(self.key, "***")
        return printable(textwrap.shorten(text, 200)).rstrip(".")


@dataclass(frozen=True)
class Asked:
    """One request: the path under the server's prefix, and the fields of the JSON to post."""

    path: str
    fields: dict[str, object]


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
            raise _unconnected(error) from error
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.transport.abort()  # all was read, or no more is wanted

    async def ask(self, method: str, path: str, body: bytes = b"") -> None:
        """Send a request and wait until its answer begins; Failed if that is no success, or not plain."""
        server, http = self._server, self._http
        headers = [
            ("Host", server.name),
            ("Connection", "close"),
            ("Content-Type", "application/json"),
            ("Accept-Encoding", "identity"),
            ("Content-Length", str(len(body))),
        ]
        if server.key:
            headers.append(("Authorization", f"Bearer {server.key}"))
        sent = [h11.Request(method=method, target=server.prefix + path, headers=headers), h11.Data(data=body)]
        self._writer.write(b"".join(http.send(event) or b"" for event in (*sent, h11.EndOfMessage())))
        while isinstance(answer := await self._event(), h11.InformationalResponse):
            pass
        assert isinstance(answer, h11.Response)  # h11 lets nothing else come first
        coding = dict(answer.headers).get(b"content-encoding", b"identity").decode("ascii", "replace")
        if coding.lower() != "identity":
            said = f"in {printable(coding)}, with status {answer.status_code}"
            raise Failed("answered compressed, which it was asked not to", said, _COMPRESSED_HINT)
        if answer.status_code // 100 != 2:
            raise await self._refused(answer)

    async def _refused(self, answer: h11.Response) -> Failed:
        # a redirection is not followed: it may lead to another host, and the key would go there too
        where = dict(answer.headers).get(b"location") if answer.status_code // 100 == 3 else None
        said = b"to " + where if where else await self.rest()
        status = answer.status_code
        hint = _HINTS.get(status, _BROKEN_HINT if status >= 500 else None)
        return Refused(f"answered {status}", self._server.excerpt(said), hint, said)

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


def _unconnected(error: OSError) -> Failed:
    if isinstance(error, ssl.SSLCertVerificationError):
        said, other = error.verify_message.rstrip("."), error.verify_code in _OF_ANOTHER_NAME
        hint = _NAME_HINT if other else _CERTIFICATE_HINT
        return Failed("has a certificate that is not trusted", said, hint)
    if isinstance(error, ssl.SSLError):
        return Failed("speaks no TLS", error.reason or str(error), _NO_TLS_HINT)
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return Failed("not sent, for this machine has too many open files", hint=_FILES_HINT)
    return Failed("cannot connect", error.strerror or str(error))


async def generate(server: Server, asked: Asked, timeout: float) -> Answer:
    """Post a request that streams, and note when each chunk comes; Failed if it does not complete.

    The clock starts when the request is sent over a connection that is open.
    """
    answer, body = Answer(0), json.dumps(asked.fields).encode()
    try:
        async with asyncio.timeout(timeout), Connection(server) as connection:
            answer.start = time.perf_counter()
            await connection.ask("POST", asked.path, body)
            await _listen(connection, server, answer)
    except TimeoutError as error:
        chunks = f"after {len(answer.arrivals)} chunks" if answer.arrivals else "without a chunk"
        raise Failed(f"did not end in {timeout:g} s", chunks) from error
    return answer


async def _listen(connection: Connection, server: Server, answer: Answer) -> None:
    listener = Listener(answer, server.excerpt)
    while not listener.done:
        try:
            part = await connection.part()
        except Failed:
            if answer.finish_reason is None:
                raise
            part = None  # all has come but the end of the body
        if part is None:
            break
        listener.hear(part, time.perf_counter() - answer.start)
    listener.end(time.perf_counter() - answer.start)


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
