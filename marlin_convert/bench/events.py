"""What a server streams: events put together from the parts of a body, and the answer that they make."""

import codecs
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

# What an event, the list of models or the part of a refusal that is looked at may have at most, in bytes.
LONGEST = 1 << 20
# Of a body that is no stream, what is shown.
SHOWN = 1 << 12

# Where text stands in a choice: of the answer, of the reasoning before it, and of parts of either.
TEXTS = ("delta", "message", "text", "content", "reasoning_content", "reasoning", "thinking", "refusal")
# Where a server says what went wrong.
SENTENCES = ("error", "errors", "detail", "message", "msg")
# Why a server stops that has not done what it was asked.
BROKEN_OFF = ("error", "abort")


class Failed(Exception):
    """Why a request did not complete: `reason` is what it is counted by, `detail` is of this one.

    `hint` says what to do about it, where that is known.
    """

    def __init__(self, reason: str, detail: str = "", hint: str | None = None):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail
        self.hint = hint


class Refused(Failed):
    """The server says itself that it does not do what it was asked: by its status, or in its stream.

    `said` is all that it said.
    """

    def __init__(self, reason: str, detail: str = "", hint: str | None = None, said: bytes = b""):
        super().__init__(reason, detail, hint)
        self.said = said


@dataclass
class Answer:
    """What came back: `start` on the clock of time.perf_counter, arrivals of the chunks in seconds after it.

    The first chunk is the first event with text, of the answer or of the reasoning before it: what comes
    earlier names a role, or nothing. From then on every event with a choice is a chunk until the end is said.

    prompt_tokens, completion_tokens  as the server counts them; None where it does not
    texts                             the chunks with text, which stand for tokens that are not counted
    finish_reason                     why the server says that it stopped
    """

    start: float
    arrivals: list[float] = field(default_factory=list)
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    texts: int = 0
    finish_reason: str | None = None

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
        return self.texts if self.completion_tokens is None else self.completion_tokens

    @property
    def tpot(self) -> float | None:
        """Seconds a token after the first; None where there is no second."""
        return (self.latency - self.ttft) / (self.output_tokens - 1) if self.output_tokens > 1 else None

    def has_tokens(self, number: int) -> bool:
        """Whether so many came; of chunks that nobody counted the tokens of, only too many are told."""
        if self.completion_tokens is None:
            return self.texts <= number
        return self.completion_tokens == number

    def ignores_limit(self, number: int) -> bool:
        """Whether the server stopped at another number of tokens than the one it was to stop at."""
        return not self.has_tokens(number) and (self.output_tokens > number or self.finish_reason == "length")


class Listener:
    """Hears the parts of a body as they come, and puts what the events say into an answer.

    `excerpt` makes a line to show of what a server says.
    """

    def __init__(self, answer: Answer, excerpt: Callable[[bytes], str]):
        self.done = False
        self._answer = answer
        self._excerpt = excerpt
        self._first = b""
        self._open = b""  # a line that has not ended
        self._data = b""  # lines of an event that has not ended
        self._name = b""
        self._events = 0

    def hear(self, part: bytes, now: float) -> None:
        """Take a part that came `now` seconds after the start; Failed if it holds an error, or no event."""
        if len(self._first) < SHOWN:
            self._first += part
        *lines, self._open = (self._open + part).split(b"\n")
        for line in lines:
            if self.done:
                return
            self._hear_line(line.strip().removeprefix(codecs.BOM_UTF8), now)
        if len(self._open) + len(self._data) > LONGEST:
            raise Failed("sent an event that has no end")

    def end(self, now: float) -> None:
        """The body is at its end; Failed unless a whole answer has come."""
        self.hear(b"\n\n", now)  # the last lines may have none
        if not self._events and not self.done:
            raise Refused("did not stream", self._excerpt(self._first), said=self._first)
        if not self.done and self._answer.finish_reason is None:
            raise Failed("ended without [DONE] or a finish_reason", self._excerpt(self._first))
        if not self._answer.arrivals or not self._answer.output_tokens:
            raise Failed("answered without a token")

    def _hear_line(self, line: bytes, now: float) -> None:
        if line.startswith(b"data:"):
            data = line[5:].strip()
            self.done = data == b"[DONE]"
            if not self.done:
                self._hear_data(data, now)
        elif line.startswith(b"event:"):
            self._name = line[6:].strip()
        elif not line:
            self._name = b""
        if self._data and (self.done or not line):
            raise Failed("sent what is no event", self._excerpt(self._data))

    def _hear_data(self, data: bytes, now: float) -> None:
        data = self._data + data
        try:
            event = json.loads(data)
        except (ValueError, RecursionError):
            self._data = data  # the rest may be in the lines that follow, up to an empty one
            return
        self._data = b""
        self._events += 1
        try:
            if self._name == b"error" or _is_error(event):
                raise Refused("answered an error in the stream", self._excerpt(data), said=data)
            self._note(event.get("choices") or [], event.get("usage") or {}, now)
        except (ValueError, TypeError, AttributeError) as error:
            raise Failed("sent what is no event", self._excerpt(data)) from error

    def _note(self, choices: list[dict[str, Any]], usage: dict[str, Any], now: float) -> None:
        answer = self._answer
        has_text = any(_has_text(choice) for choice in choices)
        if has_text and not answer.texts:
            answer.arrivals.clear()
        answer.texts += has_text
        if has_text or (choices and answer.finish_reason is None):
            answer.arrivals.append(now)
        for reason in filter(None, [choice.get("finish_reason") for choice in choices]):
            if reason in BROKEN_OFF:
                raise Failed(f"broke off with finish_reason {reason}")
            answer.finish_reason = str(reason)
        # in every chunk, or in the last one
        answer.prompt_tokens = _count(usage.get("prompt_tokens")) or answer.prompt_tokens
        answer.completion_tokens = _count(usage.get("completion_tokens")) or answer.completion_tokens


def _is_error(event: dict[str, Any]) -> bool:
    """Whether an event says what went wrong: under that name, or with a code where choices would be."""
    bare = "choices" not in event and {"code", "message"} <= event.keys()
    return bool(event.get("error")) or event.get("object") == "error" or bare


def _count(said: Any) -> int:
    """A number of tokens; 0, and whatever is no number above it, is what some put where they do not count."""
    try:
        return max(0, int(said))
    except (ValueError, TypeError):
        return 0


def _has_text(said: Any) -> bool:
    """Whether there is a letter anywhere in a choice, a delta, or a list of parts of one."""
    if isinstance(said, dict):
        return any(_has_text(said.get(name)) for name in TEXTS)
    if isinstance(said, list):
        return any(map(_has_text, said))
    return isinstance(said, str) and said != ""


def sentence(body: bytes) -> str:
    """What a body says went wrong: the sentences in it where it is JSON that has any, else all of it."""
    try:
        said = "; ".join(dict.fromkeys(_sentences(json.loads(body))))
    except (ValueError, RecursionError):
        said = ""
    return said or body.decode("utf-8", "replace")


def _sentences(said: Any) -> Iterator[str]:
    match said:
        case str():
            yield said
        case list():
            for one in said:
                yield from _sentences(one)
        case {"loc": [*where], "msg": str(what)}:  # of pydantic: what is wrong with which field
            yield f"{'.'.join(map(str, where))}: {what}"
        case dict():
            for name in SENTENCES:
                yield from _sentences(said.get(name))
            if isinstance(said.get("param"), str):
                yield said["param"]
