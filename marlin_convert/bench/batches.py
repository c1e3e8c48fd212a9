"""What `bench latency` found out: milliseconds by batch size, as data and as a table."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one batch size: to the first token, and a token after it."""

    batch: int
    first_ms: float
    token_ms: float

    @property
    def tokens_per_second(self) -> float:
        """Of all sequences of the batch, after the first token."""
        return 1e3 * self.batch / self.token_ms


@dataclass
class Latencies:
    """What was measured with which engine; of the baseline as well, if there is one."""

    engine: str
    device: str
    input_len: int
    output_len: int
    checkpoint: list[Latency] = field(default_factory=list)
    baseline: list[Latency] = field(default_factory=list)

    def speedups(self) -> dict[int, float]:
        """How many times as fast as the baseline a token after the first is, by batch size."""
        times = {one.batch: one.token_ms for one in self.baseline}
        return {one.batch: times[one.batch] / one.token_ms for one in self.checkpoint if one.batch in times}


def to_dict(found: Latencies) -> dict[str, Any]:
    """What was measured as JSON holds it: milliseconds, tokens a second, speed-ups."""

    def rows(latencies: Sequence[Latency]) -> list[dict[str, float]]:
        return [
            {
                "batch": one.batch,
                "first_ms": round(one.first_ms, 4),
                "token_ms": round(one.token_ms, 4),
                "tokens_per_second": round(one.tokens_per_second, 2),
            }
            for one in latencies
        ]

    return {
        "engine": found.engine,
        "device": found.device,
        "input_len": found.input_len,
        "output_len": found.output_len,
        "checkpoint": rows(found.checkpoint),
        "baseline": rows(found.baseline),
        "speedups": {str(batch): round(ratio, 4) for batch, ratio in found.speedups().items()},
    }


def table(found: Latencies) -> str:
    """The latencies by batch size and, with a baseline, how many times as fast."""
    lines = [
        f"{found.device}, {found.engine}: {found.input_len} tokens in, {found.output_len} out; "
        "milliseconds a token after the first",
        f"{'batch':>5} {'first ms':>9} {'token ms':>9} {'tokens/s':>9}"
        + (f" {'baseline':>9} {'speed-up':>9}" if found.baseline else ""),
    ]
    before, speedups = {one.batch: one.token_ms for one in found.baseline}, found.speedups()
    for one in found.checkpoint:
        line = f"{one.batch:5} {one.first_ms:9.2f} {one.token_ms:9.3f} {one.tokens_per_second:9.0f}"
        if one.batch in before:
            line += f" {before[one.batch]:9.3f} {speedups[one.batch]:8.2f}x"
        lines.append(line)
    return "\n".join(lines)
