"""A server with OpenAI's interface that answers at fixed times, in good ways and bad ones.

    python tests/stub_server.py FIRST GAP LOG

FIRST seconds after a request the first chunk is sent, GAP seconds after each the next. It listens on a port
of 127.0.0.1 that it prints. The first part of the path is how it answers: http://127.0.0.1:PORT/plain/v1.
For every request a line of JSON goes to LOG: what was asked, when it was received and when each chunk was
sent, on the clock of time.perf_counter, which all processes of a Linux machine share.
"""

import json
import socket
import struct
import sys
import threading
import time
from pathlib import Path
from typing import Any

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
INPUT_TOKENS = 11


class Answering:
    """One connection: a request is read, then answered as its path says."""

    def __init__(self, connection: socket.socket, first: float, gap: float, log: Path, count: list[int]):
        self.socket, self.first, self.gap, self.log, self.count = connection, first, gap, log, count
        self.sent: list[float] = []
        self.chunked = True

    def __call__(self) -> None:
        with self.socket:
            request = self.socket.makefile("rb")
            method, path, _ = request.readline().decode().split()
            headers = {}
            while (line := request.readline().decode().strip()) != "":
                name, _, value = line.partition(": ")
                headers[name.lower()] = value
            body = request.read(int(headers.get("content-length", 0)))
            self.received = time.perf_counter()
            _, how, _, *rest = path.split("/")
            self.chat = rest[0] == "chat"
            try:
                if rest == ["models"]:
                    self.models(how)
                else:
                    self.asked = json.loads(body)
                    self.generate(how, headers)
            except OSError:  # the client has gone
                pass
            if method == "POST":
                self.write_down(how, path, headers)

    def write_down(self, how: str, path: str, headers: dict[str, str]) -> None:
        key = headers.get("authorization")
        times = {"received": self.received, "sent": self.sent}
        line = json.dumps({"how": how, "path": path, "key": key, "body": self.asked, **times})
        with self.log.open("a") as file:
            file.write(line + "\n")

    def models(self, how: str) -> None:
        listed = {"object": "list", "data": [{"id": f"model-{how}", "object": "model"}]}
        self.whole("200 OK", "nothing" if how == "nomodels" else json.dumps(listed))

    def whole(self, status: str, body: str, more: str = "") -> None:
        self.socket.sendall(f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{more}\r\n{body}".encode())

    def generate(self, how: str, headers: dict[str, str]) -> None:
        self.count[0] += 1
        if hasattr(self, how):
            getattr(self, how)()
        elif how == "refuses" or (how == "third" and self.count[0] % 3 == 0):
            self.whole("503 Service Unavailable", json.dumps({"error": f"no {headers.get('authorization')}"}))
        elif how == "elsewhere":
            self.whole("307 Temporary Redirect", "", "Location: http://127.0.0.1:1/v1/completions\r\n")
        elif how == "page":
            self.whole("200 OK", "<html>\nwelcome\x1b[2J\n</html>")
        elif how == "noise":
            self.socket.sendall(b"220 mail.example ESMTP\r\n")
        elif how == "leaves":
            pass
        elif how == "resets":
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        else:
            self.stream()

    # the ways to stream

    def stream(self, usage: bool = True, end: bool = True) -> None:
        self.start()
        self.events()
        if usage:
            self.part(self.usage())
        if end:
            self.done()

    def roles(self) -> None:
        """A chunk that only names the role comes long before the first token, one with the end after all."""
        self.start()
        self.part(self.data({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}))
        self.events()
        self.part(self.data({"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]}))
        self.part(self.usage())
        self.done()

    def thinks(self) -> None:
        """A model that reasons: text is in one of two fields before it is in the answer, here in a list."""
        self.start()
        part = {"type": "text", "text": "word"}
        kinds = ({"reasoning_content": "word"}, {"reasoning": "word", "content": None}, {"content": [part]})
        for number in range(self.tokens):
            delta = kinds[number * len(kinds) // self.tokens]
            self.send(self.data({"choices": [{"index": 0, "delta": delta}], "error": None}), number)
        self.done()

    def stops(self) -> None:
        """Whole by its finish_reason, beside the last text; neither [DONE] nor the end of the body comes."""
        self.start()
        self.events(finish_reason="length")
        self.part(self.usage())

    def halfcounted(self) -> None:
        self.start()
        self.events()
        usage = {"prompt_tokens": None, "completion_tokens": self.tokens}
        self.part(self.data({"choices": [], "usage": usage}))
        self.done()

    def strict(self) -> None:
        """Refuses the first field that it does not know, in the words of one server or another."""
        for name, body in (
            ("stream_options", {"detail": [{"loc": ["body", "stream_options"], "msg": "Extra inputs"}]}),
            ("ignore_eos", {"error": {"message": "Unrecognized argument", "param": "ignore_eos"}}),
            ("temperature", {"message": "Unsupported value: 'temperature' is 1 here"}),
            ("max_completion_tokens", {"error": "json: unknown field max_completion_tokens"}),
        ):
            if name in self.asked:
                return self.whole("422 Unprocessable Content", json.dumps(body))
        return self.stream()

    def older(self) -> None:
        """Knows max_tokens alone, also in a chat, and passes over what it does not know."""
        limit = self.asked.get("max_tokens", 9)
        self.start()
        for number in range(limit):
            self.send(self.event(number), number)
        self.part(self.data({"choices": [], "usage": {"prompt_tokens": 11, "completion_tokens": limit}}))
        self.done()

    def nousage(self) -> None:
        self.stream(usage=False)

    def unfinished(self) -> None:
        """All in order, but [DONE] is missing."""
        self.stream(end=False)
        self.socket.sendall(b"0\r\n\r\n")

    def closes(self) -> None:
        """The end of the connection is that of the body."""
        self.chunked = False
        self.stream()

    def split(self) -> None:
        """Every event comes in three pieces: it is there when the last one is."""
        self.start()
        for number in range(self.tokens):
            event = self.event(number)
            self.wait(number, early=self.gap / 2)
            self.part(event[:3])
            self.part(event[3:40])
            self.send(event[40:], number)
        self.part(self.usage())
        self.done()

    def packed(self) -> None:
        """Two events in every packet, with comments, names and other line ends."""
        self.start()
        for number in range(0, self.tokens, 2):
            both = self.event(number) + b": ping\r\n\r\nevent: message\n" + self.event(number + 1)
            self.send(both.replace(b"data: ", b"data:").replace(b"\n", b"\r\n"), number)
            self.sent.append(self.sent[-1])
        self.part(self.usage())
        self.done()

    def dies(self) -> None:
        self.start()
        for number in range(2):
            self.send(self.event(number), number)

    def stalls(self) -> None:
        self.dies()
        time.sleep(60)

    def silent(self) -> None:
        time.sleep(60)

    def garbage(self) -> None:
        self.start()
        self.part(b"data: {nothing\n\n")
        self.done()

    def shapeless(self) -> None:
        self.start()
        self.part(b'data: {"choices": {"text": 1}}\n\n')
        self.done()

    def endless(self) -> None:
        self.start()
        while True:
            self.part(b"data: " + b"x" * 100_000)

    def empty(self) -> None:
        self.start()
        self.done()

    def breaks(self) -> None:
        """An error where the second event would be."""
        self.start()
        self.send(self.event(0), 0)
        self.part(b'data: {"error": {"message": "out of memory"}}\n\n')
        self.done()

    # the parts of an answer

    @property
    def tokens(self) -> int:
        return self.asked.get("max_completion_tokens") or self.asked["max_tokens"]

    def start(self) -> None:
        self.socket.sendall(HEAD + (b"Transfer-Encoding: chunked\r\n\r\n" if self.chunked else b"\r\n"))

    def events(self, finish_reason: str | None = None) -> None:
        for number in range(self.tokens):
            last = number == self.tokens - 1
            self.send(self.event(number, finish_reason if last else None), number)

    def event(self, number: int, finish_reason: str | None = None) -> bytes:
        text = f" wörd{number}"
        choice: dict[str, Any] = {"delta": {"content": text}} if self.chat else {"text": text}
        choice["finish_reason"] = finish_reason
        return self.data({"id": "cmpl-1", "choices": [{"index": 0, **choice}], "usage": None})

    def usage(self) -> bytes:
        counts = {"prompt_tokens": INPUT_TOKENS, "completion_tokens": self.tokens}
        return self.data({"id": "cmpl-1", "choices": [], "usage": counts})

    def data(self, event: dict[str, Any]) -> bytes:
        return b"data: " + json.dumps(event, ensure_ascii=False).encode() + b"\n\n"

    def wait(self, number: int, early: float = 0) -> None:
        late = self.received + self.first + number * self.gap - early - time.perf_counter()
        time.sleep(max(0, late))

    def send(self, data: bytes, number: int) -> None:
        self.wait(number)
        self.sent.append(time.perf_counter())
        self.part(data)

    def part(self, data: bytes) -> None:
        self.socket.sendall(b"%x\r\n%s\r\n" % (len(data), data) if self.chunked else data)

    def done(self) -> None:
        self.part(b"data: [DONE]\n\n")
        if self.chunked:
            self.socket.sendall(b"0\r\n\r\n")


def main(first: float, gap: float, log: Path) -> None:
    count = [0]
    with socket.create_server(("127.0.0.1", 0), backlog=512) as listening:
        print(listening.getsockname()[1], flush=True)
        while True:
            connection, _ = listening.accept()
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=Answering(connection, first, gap, log, count), daemon=True).start()


if __name__ == "__main__":
    main(float(sys.argv[1]), float(sys.argv[2]), Path(sys.argv[3]))
