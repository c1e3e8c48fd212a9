"""The story of `bench serve`: ask, send prompts, note when every chunk comes, say it in a table and a figure.

1. Ask each server for its model, and make the prompts.
2. Warm up: some requests, with prompts of their own, that are not measured.
3. Measure: the same requests at the same times to the server, then to the baseline.
4. Draw the figure, and move the directory to its place.
"""

import asyncio
import gc
import json
import logging
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from marlin_convert.bench.dialect import Dialect
from marlin_convert.bench.events import Answer, Failed
from marlin_convert.bench.kernel import results
from marlin_convert.bench.latencies import Load, Report, Served, as_json
from marlin_convert.bench.prompts import Prompts, lines_of, load_tokenizer, random_prompts, random_words
from marlin_convert.bench.stream import Asked, Server, first_model
from marlin_convert.errors import ConvertError, SourceError

log = logging.getLogger("marlin_convert")

RESULT = "result.json"
FIGURE = "serve.png"
# What a run writes, and words that are in it.
WRITTEN = {RESULT: '"undrawn":', FIGURE: ""}

Progress = Callable[[Iterator, int], Iterable]


@dataclass(frozen=True)
class Job:
    """What to ask of whom.

    servers      one, or it and its baseline
    model        of the first server; None, and for the baseline: the first that it lists
    tokenizer    of the random prompts; None: the model's, if it is on this machine
    prompts      a file with a prompt a line, in place of random ones
    ignore_eos   ask for all of the output tokens, which is an extension of vLLM and SGLang
    timeout      seconds for one request
    output       a directory to write, if any
    """

    servers: tuple[Server, ...]
    load: Load
    model: str | None = None
    tokenizer: str | None = None
    prompts: Path | None = None
    input_tokens: int = 1024
    number: int = 100
    warmups: int = 5
    ignore_eos: bool = True
    timeout: float = 600
    output: Path | None = None
    overwrite: bool = False


def run(job: Job, progress: Progress) -> Report:
    """Measure and write all that a job asks for; what there is until then after a Ctrl-C.

    ConvertError when the output is taken, there are no prompts, or a server cannot be asked at all.
    """
    with results(job.output, job.overwrite, WRITTEN) if job.output else nullcontext() as directory:
        models = _models(job)
        prompts = _prompts(job, models[0])
        dialects = [Dialect(server) for server in job.servers]
        for dialect, model in zip(dialects, models, strict=True):
            _warm_up(job, dialect, _requests(job, model, prompts)[job.number :])
        prompts = replace(prompts, texts=prompts.texts[: job.number], tokens=prompts.tokens[: job.number])
        report = Report(job.load, [])
        try:
            for dialect, model in zip(dialects, models, strict=True):
                served = Served(dialect.server.url, model, prompts, refused=dialect.refused)
                report.servers.append(served)
                log.info("measuring %s: %d requests to %s", served.url, job.number, model)
                _measure(job, dialect, _requests(job, model, prompts), served, progress)
        except KeyboardInterrupt:
            report.interrupted = True
        if directory:
            _write(report, directory)
    return report


def _models(job: Job) -> list[str]:
    models = [job.model] if job.model else []
    for server in job.servers[len(models) :]:
        try:
            models.append(asyncio.run(first_model(server, job.timeout)))
        except Failed as failed:
            raise ConvertError(
                f"{server.url} does not say its model: {failed}.",
                failed.hint
                or "check the address, of which the whole endpoint can be given; or name it: --model.",
            ) from failed
    return models


def _prompts(job: Job, model: str) -> Prompts:
    """Those to measure with, then those to warm up with: a server that remembers the latter gains nothing."""
    number, length, seed = job.number + job.warmups, job.input_tokens, job.load.seed
    if job.prompts:
        return lines_of(job.prompts, number)
    if job.tokenizer:
        return random_prompts(load_tokenizer(job.tokenizer), job.tokenizer, number, length, seed)
    try:
        return random_prompts(load_tokenizer(model, local=True), model, number, length, seed)
    except SourceError:
        log.info("no tokenizer of %s on this machine: prompts are of words, not tokens (--tokenizer)", model)
        return random_words(number, length, seed)


def _requests(job: Job, model: str, prompts: Prompts) -> list[Asked]:
    asked = []
    for text in prompts.texts:
        body: dict[str, object] = {
            "model": model,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if job.ignore_eos:
            body["ignore_eos"] = True
        if job.load.chat:
            body |= {"messages": [{"role": "user", "content": text}]}
            body |= {"max_completion_tokens": job.load.output_tokens}
        else:
            body |= {"prompt": text, "max_tokens": job.load.output_tokens}
        path = "/chat/completions" if job.load.chat else "/completions"
        asked.append(Asked(path, body))
    return asked


def _warm_up(job: Job, dialect: Dialect, requests: list[Asked]) -> None:
    """Send requests, all at once, and see what the server takes; ConvertError if none is answered."""

    async def send() -> list[Answer | BaseException]:
        limit = asyncio.Semaphore(job.load.concurrency or len(requests))

        async def one(asked: Asked) -> Answer:
            async with limit:
                return await dialect.ask(asked, job.timeout)

        return await asyncio.gather(*map(one, requests), return_exceptions=True)

    if not requests:
        return
    url, length = dialect.server.url, job.load.output_tokens
    log.info("warming up %s: %d requests", url, len(requests))
    found = asyncio.run(send())
    for one in found:
        if isinstance(one, BaseException) and not isinstance(one, Failed):
            raise one
    failures = [one for one in found if isinstance(one, Failed)]
    if len(failures) == len(requests):
        raise ConvertError(
            f"{url} answered no request of the warm-up: {failures[0]}.",
            failures[0].hint
            or "check the address, --model and OPENAI_API_KEY; a server that knows only OpenAI's own fields "
            "needs --no-ignore-eos.",
        )
    ignored = [one for one in found if isinstance(one, Answer) and one.ignores_limit(length)]
    if job.load.chat and ignored:  # it may know the older name of the limit alone
        came = ignored[0].output_tokens
        dialect.refuse("max_completion_tokens", f"asked for {length}, it gave {came} tokens")
    if failures:
        log.warning("%d of %d requests of the warm-up failed: %s", len(failures), len(requests), failures[0])


def _measure(job: Job, dialect: Dialect, requests: list[Asked], served: Served, progress: Progress) -> None:
    """Send each request at its time; answers and failures are in `served` as soon as they are there."""

    async def send() -> None:
        limit = asyncio.Semaphore(job.load.concurrency or len(requests))
        served.start = time.perf_counter()

        async def one(number: int, wait: float) -> None:
            await asyncio.sleep(served.start + wait - time.perf_counter())
            async with limit:
                try:
                    served.answers[number] = await dialect.ask(requests[number], job.timeout)
                except Failed as failed:
                    log.debug("request %d: %s", number, failed)
                    served.failures[number] = failed

        arriving = arrivals(len(requests), job.load.rate, job.load.seed)
        tasks = [asyncio.create_task(one(number, wait)) for number, wait in enumerate(arriving)]
        for next_one in progress(asyncio.as_completed(tasks), len(tasks)):
            await next_one

    # what was imported and made until now is no garbage: looking for some takes milliseconds
    gc.collect()
    gc.freeze()
    begin, worked = time.perf_counter(), time.process_time()
    try:
        asyncio.run(send())
    finally:
        served.duration = time.perf_counter() - begin
        served.busy = (time.process_time() - worked) / served.duration


def arrivals(number: int, rate: float, seed: int) -> list[float]:
    """Seconds after the start at which requests are sent: a Poisson process, all at 0 if the rate is inf.

    The last one comes at number / rate, so that the rate is the same whatever the seed; vLLM does it so.
    """
    if math.isinf(rate):
        return [0.0] * number
    draw = random.Random(seed)
    times = [0.0]
    for _ in range(number):
        times.append(times[-1] + draw.expovariate(rate))
    return [time * number / rate / times[-1] for time in times[1:]]


def _write(report: Report, directory: Path) -> None:
    if find_spec("matplotlib") is None:
        report.undrawn = f"{FIGURE} not drawn: pip install 'marlin-convert[bench]' brings matplotlib"
        log.warning("%s", report.undrawn)
    elif any(served.answers for served in report.servers):
        from marlin_convert.bench import figures

        figures.served(report.servers).savefig(directory / FIGURE, dpi=150)
    report.files = sorted([RESULT, *(path.name for path in directory.iterdir())])
    (directory / RESULT).write_text(json.dumps(as_json(report, details=True), indent=1) + "\n", "utf-8")
