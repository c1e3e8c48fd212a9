"""The story of `bench latency`: how long batches take through the engine that is installed, offline.

For every batch size the same random prompts are answered with one token and with all, greedily and past the
end of text; the difference, over the tokens in between, is what a token takes after the first. vLLM if it can
be imported, else transformers with a static cache, in CUDA graphs on a GPU.
"""

import gc
import logging
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from marlin_convert.bench.batches import Latencies, Latency, to_dict
from marlin_convert.bench.kernel import results
from marlin_convert.checkpoint.reader import Checkpoint
from marlin_convert.checkpoint.writer import write_json
from marlin_convert.errors import ConvertError

log = logging.getLogger("marlin_convert")

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)

RESULT = "latency.json"
FIGURE = "latency.png"
# What a run writes, and words that are in it.
WRITTEN = {RESULT: '"first_ms":', FIGURE: ""}

# Times that a batch is answered, of which the median counts; the first answer is not timed.
REPEATS = 5

# Answers random prompts (batch, tokens) with so many tokens each.
Answer = Callable[[torch.Tensor, int], None]


@dataclass(frozen=True)
class Job:
    """What to measure: a checkpoint, and perhaps the model it is compared with, both directories.

    vLLM divides every layer among `tensor_parallel_size` GPUs.
    """

    checkpoint: Path
    baseline: Path | None
    device: torch.device
    batch_sizes: tuple[int, ...] = BATCHES
    input_len: int = 64
    output_len: int = 64
    tensor_parallel_size: int = 1


def run(job: Job, output: Path | None = None, overwrite: bool = False) -> Latencies:
    """Measure a checkpoint and its baseline, one after the other; latency.json and latency.png into `output`.

    ConvertError when the output is taken, the models do not hold what is asked, or the engine cannot load or
    run one of them.
    """
    if output is None:
        return _run(job)
    with results(output, overwrite, WRITTEN) as directory:
        found = _run(job)
        write_json(directory / RESULT, to_dict(found))
        if find_spec("matplotlib") is None:
            log.warning("latency not drawn: pip install 'marlin-convert[bench]' brings matplotlib")
        else:
            from marlin_convert.bench import figures

            figures.latency(found).savefig(directory / FIGURE, dpi=150)
    return found


def _run(job: Job) -> Latencies:
    directories = (job.checkpoint, job.baseline)
    vocabularies = {one: _vocabulary(one, job) for one in directories if one is not None}
    engine, load = _engine(job)
    device = "cpu" if job.device.type == "cpu" else torch.cuda.get_device_name(job.device)
    if job.tensor_parallel_size > 1:
        device = f"{job.tensor_parallel_size} x {device}"
    found = Latencies(f"{engine} {_version(engine)}", device, job.input_len, job.output_len)
    for directory, rows in zip(directories, (found.checkpoint, found.baseline), strict=True):
        if directory is None:
            continue
        log.info("%s in %s", directory.name, found.engine)
        try:
            rows += measure(load(directory, job), job, vocabularies[directory])
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


def _engine(job: Job) -> tuple[str, Callable[[Path, Job], Answer]]:
    """The engine there is, and what loads a model; ConvertError where it has not the GPUs asked for."""
    wanted = job.tensor_parallel_size
    if find_spec("vllm") is None or job.device.type != "cuda":
        if wanted > 1:
            where = "is not installed" if job.device.type == "cuda" else "is not used on a CPU"
            raise ConvertError(
                f"--tensor-parallel-size {wanted} is vLLM's, which {where}.",
                f"measure where it is, with {wanted} GPUs, or without this option.",
            )
        return "transformers", _transformers
    if job.device.index:
        raise ConvertError(
            f"vLLM takes the first GPU it sees, not {job.device}.",
            "let it see the GPUs that are meant alone, with CUDA_VISIBLE_DEVICES, and --device auto.",
        )
    if wanted > torch.cuda.device_count():
        raise ConvertError(
            f"--tensor-parallel-size {wanted}, and there are {torch.cuda.device_count()} GPUs.",
            "ask for as many as there are.",
        )
    return "vllm", _vllm


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

    model: nn.Module = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    model = model.to(job.device).eval()
    # a static cache is what lets transformers compile a step into a CUDA graph
    cache = {"cache_implementation": "static"} if job.device.type == "cuda" else {}

    def answer(prompts: torch.Tensor, tokens: int) -> None:
        ids = prompts.to(job.device)
        with torch.inference_mode():
            model.generate(  # type: ignore[operator]
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens,
                do_sample=False, eos_token_id=None, pad_token_id=0, **cache,
            )  # fmt: skip

    return answer


def _vllm(directory: Path, job: Job) -> Answer:
    from vllm import LLM, SamplingParams

    engine = LLM(
        str(directory), max_model_len=job.input_len + job.output_len, enable_prefix_caching=False,
        tensor_parallel_size=job.tensor_parallel_size,
    )  # fmt: skip

    def answer(prompts: torch.Tensor, tokens: int) -> None:
        wanted = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        engine.generate([{"prompt_token_ids": ids} for ids in prompts.tolist()], wanted, use_tqdm=False)

    return answer
