"""The story of `bench latency`: how long batches take through the engine that is installed, offline.

For every batch size the same random prompts are answered with one token and with all, greedily and past the
end of text; the difference, over the tokens in between, is what a token takes after the first. vLLM if it can
be imported, else transformers with a static cache, in CUDA graphs on a GPU.
"""

import gc
import logging
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from marlin_convert.checkpoint.reader import Checkpoint
from marlin_convert.errors import ConvertError

log = logging.getLogger("marlin_convert")

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)

# Times that a batch is answered, of which the median counts; the first answer is not timed.
REPEATS = 5

# Answers random prompts (batch, tokens) with so many tokens each.
Answer = Callable[[torch.Tensor, int], None]


@dataclass(frozen=True)
class Job:
    """What to measure: a checkpoint, and perhaps the model it is compared with, both directories."""

    checkpoint: Path
    baseline: Path | None
    device: torch.device
    batch_sizes: tuple[int, ...] = BATCHES
    input_len: int = 64
    output_len: int = 64


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


def run(job: Job) -> Latencies:
    """Measure a checkpoint and its baseline, one after the other.

    ConvertError when they do not hold what is asked, or the engine cannot load or run one of them.
    """
    if job.output_len < 2:
        raise ConvertError("there is no token after the first of 1.", "ask for --output-len 2 or more.")
    engine, load = (
        ("vllm", _vllm)
        if find_spec("vllm") and job.device.type == "cuda"
        else ("transformers", _transformers)
    )
    device = "cpu" if job.device.type == "cpu" else torch.cuda.get_device_name(job.device)
    found = Latencies(f"{engine} {_version(engine)}", device, job.input_len, job.output_len)
    for directory, rows in ((job.checkpoint, found.checkpoint), (job.baseline, found.baseline)):
        if directory is None:
            continue
        vocabulary = _vocabulary(directory, job)
        log.info("%s in %s", directory.name, found.engine)
        try:
            rows += measure(load(directory, job), job, vocabulary)
        except (ConvertError, KeyboardInterrupt):
            raise
        except Exception as error:  # whatever an engine does with a model it does not like
            line = next(iter(str(error).strip().splitlines()), "")
            raise ConvertError(
                f"{found.engine} cannot run {directory.name}: {type(error).__name__}: {line}",
                "see whether the engine runs it by itself; -v shows more.",
            ) from error
        finally:
            gc.collect()
            if job.device.type == "cuda":
                torch.cuda.empty_cache()
    return found


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


def _vocabulary(directory: Path, job: Job) -> int:
    """The vocabulary of a model that holds the sequences asked for; ConvertError if it does not."""
    config = Checkpoint.open(directory).config
    config = config.get("text_config") or config
    limit, size = config.get("max_position_embeddings"), config.get("vocab_size")
    if isinstance(limit, int) and job.input_len + job.output_len > limit:
        raise ConvertError(
            f"{directory.name} holds {limit} tokens, not {job.input_len} + {job.output_len}.",
            "ask for a shorter --input-len or --output-len.",
        )
    if not isinstance(size, int) or size < 1:
        raise ConvertError(f"the config of {directory.name} gives no vocab_size.", "fetch the model again.")
    return size


def measure(answer: Answer, job: Job, vocabulary: int) -> Iterator[Latency]:
    """Every batch size: medians of the times of one token and of all."""
    draw = torch.Generator().manual_seed(0)
    for batch in job.batch_sizes:
        prompts = torch.randint(vocabulary, (batch, job.input_len), generator=draw)
        one, all_ = (_seconds(answer, prompts, tokens, job.device) for tokens in (1, job.output_len))
        found = Latency(batch, 1e3 * one, 1e3 * (all_ - one) / (job.output_len - 1))
        log.info("batch %d: first token %.2f ms, then %.3f ms a token", batch, found.first_ms, found.token_ms)
        yield found


def _seconds(answer: Answer, prompts: torch.Tensor, tokens: int, device: torch.device) -> float:
    times = []
    for _ in range(1 + REPEATS):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        answer(prompts, tokens)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


def _transformers(directory: Path, job: Job) -> Answer:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", device_map=str(job.device)).eval()
    # a static cache is what lets transformers compile a step into a CUDA graph
    cache = {"cache_implementation": "static"} if job.device.type == "cuda" else {}

    def answer(prompts: torch.Tensor, tokens: int) -> None:
        ids = prompts.to(model.device)
        with torch.inference_mode():
            model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens,
                do_sample=False, eos_token_id=None, pad_token_id=0, **cache,
            )  # fmt: skip

    return answer


def _vllm(directory: Path, job: Job) -> Answer:
    from vllm import LLM, SamplingParams

    engine = LLM(str(directory), max_model_len=job.input_len + job.output_len, enable_prefix_caching=False)

    def answer(prompts: torch.Tensor, tokens: int) -> None:
        wanted = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        engine.generate([{"prompt_token_ids": ids} for ids in prompts.tolist()], wanted, use_tqdm=False)

    return answer


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
