"""What a run of `bench serve` has found, as the keys of `vllm bench serve`, a table and JSON."""

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from marlin_convert.bench.dialect import INSTEAD
from marlin_convert.bench.events import Answer, Failed
from marlin_convert.bench.measurements import table
from marlin_convert.bench.prompts import Prompts
from marlin_convert.errors import printable

TIMES = {
    "ttft": "time to first token",
    "tpot": "time per output token",
    "itl": "between two chunks",
    "e2el": "whole answer",
}
RATES = {
    "request_throughput": "requests/s",
    "output_throughput": "output tokens/s",
    "total_token_throughput": "all tokens/s",
}
STATISTICS = ("mean", "median", "p99")

# Above this share of a processor, the client's own work is in the times of a server that shares none with it.
BUSY = 0.8


@dataclass
class Served:
    """What a server did with the requests: answers and failures by the number of the request.

    start, duration  of the run, on the clock of time.perf_counter and in seconds
    busy             the share of one processor that the client took
    refused          the fields of requests that it does not take, and what it said of them
    """

    url: str
    model: str
    prompts: Prompts
    start: float = 0
    duration: float = 0
    busy: float = 0
    refused: dict[str, str] = field(default_factory=dict)
    answers: dict[int, Answer] = field(default_factory=dict)
    failures: dict[int, Failed] = field(default_factory=dict)

    def times(self) -> dict[str, list[float]]:
        """Milliseconds by the names of TIMES, of every answer, and of every pair of chunks for itl."""
        answers = self.answers.values()
        found: dict[str, list[float]] = {
            "ttft": [answer.ttft for answer in answers],
            "tpot": [answer.tpot for answer in answers if answer.tpot is not None],
            "itl": [itl for answer in answers for itl in answer.itls],
            "e2el": [answer.latency for answer in answers],
        }
        return {name: [1e3 * one for one in values] for name, values in found.items()}

    @property
    def uncounted(self) -> int:
        """Answers without the server's count of their tokens."""
        return sum(answer.completion_tokens is None for answer in self.answers.values())

    @property
    def uncounted_prompts(self) -> int:
        """Answers without the server's count of the tokens of their prompts."""
        return sum(answer.prompt_tokens is None for answer in self.answers.values())

    def of_other_length(self, number: int) -> list[int]:
        """The lengths, in order, of the answers that have another number of tokens than they should."""
        answers = self.answers.values()
        return sorted(one.output_tokens for one in answers if not one.has_tokens(number))

    @property
    def hints(self) -> list[str]:
        """What to do about the failures, each once."""
        return list(dict.fromkeys(failed.hint for failed in self.failures.values() if failed.hint))

    def input_tokens(self, number: int) -> int:
        """Of a request that was answered: as the server counts, else as the prompt was made."""
        counted = self.answers[number].prompt_tokens
        return self.prompts.tokens[number] if counted is None else counted


@dataclass(frozen=True)
class Load:
    """How requests are sent: so many a second (math.inf: all at once), at most so many at a time."""

    rate: float
    concurrency: int | None
    output_tokens: int
    chat: bool
    seed: int


@dataclass
class Report:
    """All that a run has found; `undrawn` says why there is no figure."""

    load: Load
    servers: list[Served]
    interrupted: bool = False
    files: list[str] = field(default_factory=list)
    undrawn: str | None = None
    date: str = field(default_factory=lambda: datetime.now().strftime("%Y%m%d-%H%M%S"))

    def speedups(self) -> dict[str, float | None]:
        """How many times as fast as the baseline, by key; None where one of the two has no value."""
        if len(self.servers) < 2:
            return {}
        ours, baseline = map(metrics, self.servers)
        found: dict[str, float | None] = {}
        for key in (*RATES, *(f"{kind}_{name}_ms" for name in TIMES for kind in STATISTICS)):
            above, below = (ours, baseline) if key in RATES else (baseline, ours)
            found[key] = above[key] / below[key] if above[key] and below[key] else None
        return found


def metrics(served: Served) -> dict[str, Any]:
    """The figures of a server under vLLM's keys; None for the statistics of no values at all."""
    seconds = served.duration or math.inf  # interrupted before it began
    tokens_in = sum(map(served.input_tokens, served.answers))
    tokens_out = sum(answer.output_tokens for answer in served.answers.values())
    found: dict[str, Any] = {
        "duration": served.duration,
        "completed": len(served.answers),
        "failed": len(served.failures),
        "total_input_tokens": tokens_in,
        "total_output_tokens": tokens_out,
        "request_throughput": len(served.answers) / seconds,
        "request_goodput": None,  # vLLM's without --goodput
        "output_throughput": tokens_out / seconds,
        "total_token_throughput": (tokens_in + tokens_out) / seconds,
        "max_output_tokens_per_s": _busiest_second(served),
        "max_concurrent_requests": _most_at_once(served),
    }
    for name, values in served.times().items():
        found[f"mean_{name}_ms"] = statistics.fmean(values) if values else None
        found[f"median_{name}_ms"] = statistics.median(values) if values else None
        found[f"std_{name}_ms"] = statistics.pstdev(values) if values else None
        found[f"p99_{name}_ms"] = percentile(values, 99) if values else None
    return found


def percentile(values: Sequence[float], percent: float) -> float:
    """Between the two values nearest to it, as numpy's is."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def _busiest_second(served: Served) -> int:
    """The most chunks that came in one second of the run."""
    seconds = Counter(
        int(answer.start + arrival - served.start)
        for answer in served.answers.values()
        for arrival in answer.arrivals
    )
    return max(seconds.values(), default=0)


def _most_at_once(served: Served) -> int:
    answers = served.answers.values()
    # an end sorts before a start at the same time
    steps = sorted([(one.start, 1) for one in answers] + [(one.start + one.latency, -1) for one in answers])
    now = most = 0
    for _, step in steps:
        now += step
        most = max(most, now)
    return most


def as_json(report: Report, *, details: bool = False) -> dict[str, Any]:
    """vLLM's keys and what it has no key for; a baseline's stand under `baseline`.

    `details` adds vLLM's lists with a value per request, in seconds; 0 or [] where it failed.
    """
    first, *others = (_served_json(report.load, served, details) for served in report.servers)
    return {
        "date": report.date,
        **first,
        "baseline": others[0] if others else None,
        "speedups": report.speedups(),
        "interrupted": report.interrupted,
        "undrawn": report.undrawn,
        "files": report.files,
    }


def _served_json(load: Load, served: Served, details: bool) -> dict[str, Any]:
    backend = "openai-chat" if load.chat else "openai"
    return {
        "endpoint_type": backend,
        "backend": backend,
        "label": None,
        "model_id": served.model,
        "tokenizer_id": served.prompts.tokenizer,
        "num_prompts": len(served.prompts.texts),
        "request_rate": load.rate if math.isfinite(load.rate) else "inf",
        "burstiness": 1.0,
        "max_concurrency": load.concurrency,
        **metrics(served),
        **(_details(served) if details else {}),
        "url": served.url,
        "prompts": served.prompts.source,
        "seed": load.seed,
        "output_len": load.output_tokens,
        "without_usage": served.uncounted,
        "without_prompt_tokens": served.uncounted_prompts,
        "of_other_length": len(served.of_other_length(load.output_tokens)),
        "refused_fields": served.refused,
        "client_busy": served.busy,
        "failures": [
            {"reason": reason, "requests": numbers, "detail": detail}
            for reason, (numbers, detail) in by_reason(served.failures).items()
        ],
    }


def _details(served: Served) -> dict[str, list[Any]]:
    numbers = range(len(served.prompts.texts))
    found = [served.answers.get(number) for number in numbers]
    failures = [served.failures.get(number) for number in numbers]
    return {
        "input_lens": [served.input_tokens(number) if number in served.answers else 0 for number in numbers],
        "output_lens": [one.output_tokens if one else 0 for one in found],
        "ttfts": [one.ttft if one else 0 for one in found],
        "itls": [one.itls if one else [] for one in found],
        "latencies": [one.latency if one else 0 for one in found],
        "start_times": [one.start if one else 0 for one in found],
        "errors": [str(one) if one else "" for one in failures],
    }


def by_reason(failures: Mapping[int, Failed]) -> dict[str, tuple[list[int], str]]:
    """The numbers of the requests that failed for a reason, and what was said about the first of them."""
    found: dict[str, tuple[list[int], str]] = {}
    for number, failed in sorted(failures.items()):
        found.setdefault(failed.reason, ([], failed.detail))[0].append(number)
    return found


def text(report: Report) -> str:
    """What was asked of whom, a table, what failed, and the files."""
    load = report.load
    pace = f"{load.rate:g} requests/s" if math.isfinite(load.rate) else "all requests at once"
    limit = f", at most {load.concurrency} at a time" if load.concurrency else ""
    asked = report.servers[0].prompts
    lines = [f"{asked.source}; {load.output_tokens} tokens out; {pace}{limit}; seed {load.seed}"]
    for served in report.servers:
        total = len(served.prompts.texts)
        done = f"{len(served.answers)} of {total} requests completed in {served.duration:.1f} s"
        lines += [f"{served.url}: {served.model}, {done}", *_remarks(served, load)]
    return "\n".join(
        printable(line)
        for line in [
            *lines,
            "",
            *_table(report),
            *(["", report.undrawn] if report.undrawn else []),
            *(["", f"written: {', '.join(report.files)}"] if report.files else []),
        ]
    )


def _remarks(served: Served, load: Load) -> list[str]:
    lines = []
    for name, said in served.refused.items():
        instead = f"{INSTEAD[name]} is sent in its place" if INSTEAD[name] else "it is left out"
        lines.append(f"  it does not take {name}, {instead}: {said}")
    for reason, (numbers, detail) in by_reason(served.failures).items():
        named = ", ".join(map(str, numbers[:10])) + (", ..." if len(numbers) > 10 else "")
        lines.append(
            f"  {len(numbers)} failed: {reason}; requests {named}" + (f" ({detail})" if detail else "")
        )
    if served.uncounted:
        lines.append(
            f"  {served.uncounted} answers came without usage: their tokens are the chunks with text"
        )
    if served.uncounted_prompts > served.uncounted:
        lines.append(
            f"  {served.uncounted_prompts} answers came without prompt_tokens: those are as prompts were made"
        )
    if lengths := served.of_other_length(load.output_tokens):
        least, most = lengths[0], lengths[-1]
        lines.append(
            f"  {len(lengths)} answers have not the {load.output_tokens} tokens that were asked for, but "
            + (f"{least} to {most}" if least < most else f"{most}")
        )
    if served.busy > BUSY:
        lines.append(f"  the client took {served.busy:.0%} of a processor: its own work is in these times")
    return lines


def _table(report: Report) -> list[str]:
    both, speedups = [metrics(served) for served in report.servers], report.speedups()
    keys = {key: said for key, said in RATES.items()}
    keys |= {
        f"{kind}_{name}_ms": f"{said}, {kind}, ms" for name, said in TIMES.items() for kind in STATISTICS
    }
    head = ["", "server", "baseline", "speed-up"][: 2 if len(both) == 1 else 4]
    rows = []
    for key, said in keys.items():
        row = [said, *("-" if one[key] is None else f"{one[key]:.2f}" for one in both)]
        if speedups:
            speedup = speedups[key]
            row.append(f"{speedup:.2f}x" if speedup else "-")
        rows.append(row)
    return table(head, rows)
