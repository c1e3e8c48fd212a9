"""The story of `quantize`: plan, calibrate, solve block by block, pack, write, publish.

A source that is already quantized is repacked: its codes take the place of calibrating and solving.
"""

import errno
import logging
import os
import platform
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

import torch
import transformers
from torch import Tensor

from marlin_convert import __version__
from marlin_convert.calibration import Calibration, calibrate, load_tokenizer, shown
from marlin_convert.checkpoint.linears import Weights
from marlin_convert.checkpoint.manifest import MANIFEST, sha256_file
from marlin_convert.checkpoint.reader import Checkpoint, json_file
from marlin_convert.checkpoint.writer import ShardWriter, publish, write_json
from marlin_convert.errors import ConvertError, FormatError, SourceError
from marlin_convert.hub import Source
from marlin_convert.models.architectures import Stage
from marlin_convert.models.blocks import BlockModel
from marlin_convert.models.hidden import HiddenStates, memory_for_activations
from marlin_convert.models.stages import BlockWalk
from marlin_convert.plan import Fate, Plan, make_plan
from marlin_convert.quantized import QuantizedLinear, same_codes
from marlin_convert.recipe import Recipe
from marlin_convert.solvers.gptq import Solution, solve
from marlin_convert.solvers.hessian import Hessian

log = logging.getLogger("marlin_convert")

PROGRESS = "progress.json"
RECIPE = "recipe.yaml"

# Linears of a repack in work at once, where there are as many processors: hashing keeps up with no more.
WORKERS = 4


@dataclass(frozen=True)
class Job:
    """What is asked of one conversion.

    `group_size` is set when one was asked for by name: a quantized source keeps its own, and one that differs
    from it is refused; the recipe's may be a mere default.
    """

    source: Source
    output: Path
    recipe: Recipe
    device: torch.device
    group_size: int | None = None
    max_shard_size: int = 5_000_000_000
    requantize: bool = False
    resume: bool = False
    overwrite: bool = False
    trust_remote_code: bool = False

    @property
    def partial(self) -> Path:
        """Where an unfinished run is kept."""
        return self.output.with_name(self.output.name + ".partial")

    @property
    def staging(self) -> Path:
        """What becomes `output` by one rename at the end."""
        return self.partial / "checkpoint"


@dataclass(frozen=True)
class Report:
    """What a conversion did: the manifest as written, and what only this run knows."""

    manifest: dict[str, Any]
    plan: Plan
    seconds: float
    replayed: int  # times a part of a block was computed again for want of memory, over all micro-batches


Packed = tuple[dict[str, Tensor], dict[str, Any]]  # tensors of a linear, and what the manifest says of it


class Codes(Protocol):
    """Where the codes of a block come from: solved, or unpacked from a quantized source."""

    replayed: int

    def block(self, number: int) -> Iterator[Packed]:
        """Every packed linear of a block."""
        ...


def plan_job(job: Job) -> tuple[Weights, Plan]:
    """Open the source and plan the conversion from headers alone; ConvertError for bad input."""
    weights = Weights(Checkpoint.open(job.source.directory))
    plan = make_plan(
        weights, job.recipe, group_size=job.group_size, requantize=job.requantize,
        trust_remote_code=job.trust_remote_code,
    )  # fmt: skip
    if not plan.packed:
        raise ConvertError("nothing is left to quantize: every linear stays dense.", "skip fewer of them.")
    _check_output(job, plan)
    return weights, plan


def quantize(
    job: Job, progress: Callable[[range, int], Iterable[int]] = lambda blocks, total: blocks
) -> Report:
    """Convert the job's source into its output directory; ConvertError for what cannot be done.

    Whatever stops it, the source and an earlier output stay as they are, and what is finished can be resumed.
    """
    started = time.monotonic()
    weights, plan = plan_job(job)
    calibration = None if plan.repack else _calibration(job, plan)
    settings = _settings(job, plan, weights, calibration)
    done = _earlier_run(job, settings)
    replayed = 0
    manifest = _published(job)
    try:
        if manifest is None:
            _begin(job, settings, done)
            files, rows, replayed = _convert(job, plan, weights, calibration, settings, done, progress)
            manifest = _assemble(job, plan, weights, settings, rows, files)
            publish(job.staging, job.output, job.overwrite)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ConvertError(
                f"no space left for '{job.output}' ({error.strerror}).",
                "free some and continue with --resume.",
            ) from error
        raise ConvertError(
            f"cannot write '{job.output}': {error.strerror} ('{error.filename}').",
            "choose another directory, or mend this one and continue with --resume.",
        ) from error
    finally:
        if not _finished_blocks(job):
            shutil.rmtree(job.partial, ignore_errors=True)
    shutil.rmtree(job.partial)
    return Report(manifest, plan, time.monotonic() - started, replayed)


def _convert(
    job: Job,
    plan: Plan,
    weights: Weights,
    calibration: Calibration | None,
    settings: dict[str, Any],
    done: dict[str, Any],
    progress: Callable[[range, int], Iterable[int]],
) -> tuple[dict[str, str], list[dict[str, Any]], int]:
    """Write the shards; returns their sha256, the manifest's row of every linear, and the parts replayed."""
    rows: list[dict[str, Any]] = done["linears"]
    with ExitStack() as stack:
        writer = stack.enter_context(ShardWriter(job.staging, plan.specs, job.max_shard_size))
        writer.resume(done["tensors"])
        codes: Codes
        if calibration is not None and done["blocks"] < plan.blocks:
            codes = Solve(job, plan, weights, calibration, writer, done["blocks"])
        else:
            codes = stack.enter_context(Repack(plan, weights, done["blocks"]))
        names = iter(writer.order[done["tensors"] :])
        name = next(names, None)
        packed: dict[str, Tensor] = {}
        for number in progress(range(done["blocks"], plan.blocks), plan.blocks):
            for tensors, row in codes.block(number):
                packed |= tensors
                rows.append(row)
                while name in packed or (name is not None and name not in plan.owner):
                    writer.write(name, packed.pop(name) if name in packed else _dense(weights, plan, name))
                    name = next(names, None)
            finished = {"blocks": number + 1, "linears": list(rows)}
            writer.checkpoint(partial(_save_progress, job, settings, finished))
        while name is not None:
            writer.write(name, _dense(weights, plan, name))
            name = next(names, None)
        return writer.close(), rows, codes.replayed


class Repack:
    """The codes of a source that is already quantized, untouched.

    A few linears are read and packed ahead of the one asked for. Inside its context torch uses one thread for
    every operation: threads that share one wait for each other, and on a busy machine do little else.
    """

    replayed = 0

    def __init__(self, plan: Plan, weights: Weights, done: int):
        """Begin with the linears of block `done`, in the order in which they are written."""
        self._plan = plan
        self._weights = weights
        fates = {fate.linear: fate for number in range(done, plan.blocks) for fate in plan.packed_in(number)}
        order = dict.fromkeys(plan.owner[spec.name][0] for spec in plan.specs if spec.name in plan.owner)
        self._todo = iter([fates[linear] for linear in order if linear in fates])
        self._ahead: deque[Future[Packed]] = deque()
        self._threads = torch.get_num_threads()
        self._workers = min(WORKERS, self._threads)
        self._pool = ThreadPoolExecutor(self._workers, thread_name_prefix="repack")
        largest = max((fate.k * fate.n for fate in fates.values()), default=0)
        # the codes of a linear, and those it is checked with, for every linear in work
        self._memory: SimpleQueue[Tensor] = SimpleQueue()
        for _ in range(self._workers):
            self._memory.put(torch.empty(2, largest, dtype=torch.uint8))

    def __enter__(self) -> "Repack":
        torch.set_num_threads(1)
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self._threads)

    def block(self, number: int) -> Iterator[Packed]:
        """The linears of a block, each unpacked from the source's layout and packed in the plan's."""
        for _ in self._plan.packed_in(number):
            missing = self._workers + 1 - len(self._ahead)
            self._ahead.extend(self._pool.submit(self._repack, fate) for fate in islice(self._todo, missing))
            yield self._ahead.popleft().result()

    def _repack(self, fate: Fate) -> Packed:
        row = {"name": fate.linear, "k": fate.k, "n": fate.n}
        memory = self._memory.get()
        try:
            layer = self._weights.quantized(fate.linear, memory[0])
            return _pack(fate.linear, layer, self._plan, memory[1]), row
        finally:
            self._memory.put(memory)


class Solve:
    """The codes that the solver finds for a dense source, one block after another."""

    def __init__(
        self, job: Job, plan: Plan, weights: Weights, calibration: Calibration, writer: ShardWriter, done: int
    ):
        """Embed the calibration text and take it through the blocks that an earlier run has finished."""
        self._plan = plan
        self._recipe = plan.recipe
        self._model = BlockModel(weights, job.device, trust_remote_code=job.trust_remote_code)
        self._hidden = HiddenStates(self._model, calibration.ids, job.partial)
        self.replayed = 0
        for number in range(done):
            log.debug("block %d was finished before, running the text through it", number)
            block = self._model.load(number)
            for fate in plan.packed_in(number):
                stored = {suffix: writer.read(f"{fate.linear}.{suffix}") for suffix in plan.suffixes}
                self._model.replace(fate.linear, plan.unpack(stored).dequantize(self._model.dtype))
            self._hidden.advance(block, number)
            self._model.unload(number)

    def block(self, number: int) -> Iterator[Packed]:
        """Solve the block stage by stage, with the inputs that the stages before leave it."""
        model, hidden = self._model, self._hidden
        path = model.name(number)
        stages = self._plan.stages(path)
        block = model.load(number)
        hessians: dict[Stage, Hessian] = {}
        solved: list[Packed] = []

        def observe(stage: Stage, x: Tensor) -> None:
            if stage not in hessians:
                hessians[stage] = Hessian(x.shape[-1], x.device)
            hessians[stage].add(x)

        def solve_stage(stage: Stage) -> None:
            solved.extend(self._solve([f"{path}.{name}" for name in stage], hessians.pop(stage).mean()))

        walk = BlockWalk(
            block, model.architecture.parts, len(hidden), lambda i: hidden.forward(i, block, number),
            observe, solve_stage, keep_bytes=memory_for_activations(model.device), dtype=model.dtype,
        )  # fmt: skip
        walk.run(stages, hidden.put)
        self.replayed += walk.replayed
        model.unload(number)
        yield from solved

    def _solve(self, linears: list[str], hessian: Tensor) -> Iterator[Packed]:
        """Solve the linears of a stage as one matrix and put the dequantized weights into the model."""
        if not hessian.isfinite().all():
            raise SourceError(
                f"the inputs of {linears[0]} are not finite; the model overflows on this text.",
                "its weights may be damaged, or their type too narrow for them.",
            )
        model = self._model
        weights: list[Tensor] = [model.model.get_parameter(f"{linear}.weight") for linear in linears]
        k = hessian.shape[0]
        group_size = k if self._recipe.group_size == -1 else self._recipe.group_size
        found = solve(
            torch.cat(weights), hessian, bits=self._plan.bits, group_size=group_size,
            damping=self._recipe.damping, sweeps=self._recipe.sweeps,
        )  # fmt: skip
        start = 0
        for linear, weight in zip(linears, weights, strict=True):
            columns = slice(start, start + len(weight))
            start += len(weight)
            layer = QuantizedLinear(
                found.codes[:, columns].contiguous(), found.scales[:, columns].contiguous(), group_size
            )
            model.replace(linear, layer.dequantize(model.dtype))
            row = _row(linear, layer, found, columns)
            log.debug("%s: relative output error %.4f", linear, row["error"])
            yield _pack(linear, layer, self._plan), row


def _row(linear: str, layer: QuantizedLinear, found: Solution, columns: slice) -> dict[str, Any]:
    """What the manifest says of a solved linear; `error` is ||x(W - W_q)|| / ||xW|| on the calibration."""
    energy = found.energy[columns].sum().item()
    error = (max(found.error[columns].sum().item(), 0.0) / energy) ** 0.5 if energy > 0 else 0.0
    row = {
        "name": linear,
        "k": layer.k,
        "n": layer.n,
        "error": float(f"{error:.6g}"),
        "damping": found.damping,
    }
    if found.damping is None:
        row["rounded_to_nearest"] = True
        log.warning("%s: its Hessian could not be factorised; weights are rounded to nearest", linear)
    return row


def _pack(
    linear: str, layer: QuantizedLinear, plan: Plan, memory: Tensor | None = None
) -> dict[str, Tensor]:
    """The tensors of a packed linear by full name; what was packed is unpacked again, in memory, and compared."""
    try:
        packed = plan.pack(layer)
    except FormatError as error:
        raise FormatError(f"{linear}: {error}.", error.hint) from error
    again = plan.unpack(packed, memory)
    if not (
        same_codes(again.codes, layer.codes)
        and torch.equal(again.scales.float(), layer.scales.float())
        and all(
            one is other or (one is not None and other is not None and torch.equal(one, other))
            for one, other in ((again.zeros, layer.zeros), (again.group_of_row, layer.group_of_row))
        )
    ):
        raise RuntimeError(
            f"{linear} does not survive {plan.recipe.format}; this is a bug, nothing was published"
        )
    return {f"{linear}.{suffix}": tensor for suffix, tensor in packed.items()}


def _dense(weights: Weights, plan: Plan, name: str) -> Tensor:
    """A tensor that is copied from the source, in the type it is written as."""
    tensor = weights.read(name)
    if not tensor.is_floating_point():
        return tensor
    if not _finite(tensor):
        raise SourceError(f"{name} holds NaN or Inf.", "the source is damaged; fetch it again.")
    written = tensor.to(plan.dtypes[name])
    if not _finite(written):
        raise FormatError(
            f"{name} does not fit {plan.recipe.dtype}: its largest value is {tensor.abs().max()}.",
            "keep the model's own type with --dtype auto.",
        )
    return written


def _finite(tensor: Tensor) -> bool:
    """Whether a tensor holds no NaN and no infinity, found without temporaries of its size."""
    return not tensor.numel() or bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


def _calibration(job: Job, plan: Plan) -> Calibration:
    tokenizer = load_tokenizer(job.source, trust_remote_code=job.trust_remote_code)
    recipe = plan.recipe
    calibration = calibrate(
        tokenizer, recipe.calibration, samples=recipe.samples, length=recipe.sequence_length, seed=recipe.seed
    )
    if calibration.ids.max() >= plan.vocabulary:
        raise SourceError(
            f"the tokenizer gives id {calibration.ids.max()}, the model has {plan.vocabulary} embeddings.",
            "the tokenizer may be of another model.",
        )
    return calibration


def _settings(job: Job, plan: Plan, weights: Weights, calibration: Calibration | None) -> dict[str, Any]:
    """Everything that decides the bytes of the output; a resumed run must agree in all of it."""
    device = str(job.device.type)
    if job.device.type == "cuda":
        device = torch.cuda.get_device_name(job.device)
    return {
        "tool": f"marlin-convert {__version__}",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "source": {
            "name": job.source.name,
            "commit": job.source.commit,
            "quantization": weights.scheme.format if weights.scheme else None,
            "fingerprint": weights.checkpoint.fingerprint(),
        },
        "recipe": _published_recipe(plan).to_dict(),
        "requantized": weights.scheme is not None and job.requantize,
        "calibration": None
        if calibration is None
        else {
            "text": calibration.source,
            "samples": len(calibration.ids),
            "sequence_length": calibration.ids.shape[1],
            "sha256": calibration.digest,
        },
        "device": device,
        "max_shard_size": job.max_shard_size,
    }


def _published_recipe(plan: Plan) -> Recipe:
    """The recipe without the folders of this machine."""
    return plan.recipe.changed({"calibration": shown(plan.recipe.calibration)})


def _check_output(job: Job, plan: Plan) -> None:
    output, source = job.output.resolve(), job.source.directory.resolve()
    if output == source or source in output.parents or output in source.parents:
        raise ConvertError(f"'{job.output}' overlaps the source.", "choose another directory.")
    if job.output.name in ("", ".."):
        raise ConvertError(
            f"'{job.output}' cannot be the output: it comes by a rename.", "give a directory to be made."
        )
    if os.path.lexists(job.partial) and not _ours(job.partial):
        raise ConvertError(
            f"'{job.partial}' is in the way: it is not an unfinished run.",
            "move it, or choose another output directory.",
        )
    if _published(job):
        return
    replaceable = job.output.is_dir() and (job.overwrite or not any(job.output.iterdir()))
    if job.output.exists() and not replaceable:
        raise ConvertError(
            f"'{job.output}' already exists and is not empty.",
            "choose another directory, or pass --overwrite.",
        )
    place = next(parent for parent in output.parents if parent.exists())
    free = shutil.disk_usage(place).free
    present = sum(path.stat().st_size for path in job.staging.glob("*")) if job.staging.is_dir() else 0
    if plan.output_bytes > free + present:
        raise ConvertError(
            f"no space left: the output takes {plan.output_bytes:,} bytes, {free:,} are free.",
            "free some, or choose a directory on another disk.",
        )


def _ours(partial: Path) -> bool:
    """Whether a directory is what an unfinished run leaves, and may be removed."""
    if partial.is_symlink() or not partial.is_dir():
        return False
    names = {path.name for path in partial.iterdir()}
    return PROGRESS in names or names <= {PROGRESS + ".tmp"}


def _published(job: Job) -> dict[str, Any] | None:
    """The manifest of an output that was in place when the run to be resumed was stopped."""
    if not job.resume or not (job.partial / PROGRESS).exists() or not (job.output / MANIFEST).exists():
        return None
    digest = json_file(job.partial, PROGRESS).get("manifest")
    if digest != sha256_file(job.output / MANIFEST):
        return None
    return json_file(job.output, MANIFEST)


def _earlier_run(job: Job, settings: dict[str, Any]) -> dict[str, Any]:
    """What an interrupted run has finished; nothing without --resume, ConvertError if it differs."""
    nothing: dict[str, Any] = {"blocks": 0, "tensors": 0, "linears": []}
    if not _finished_blocks(job):
        return nothing
    earlier = json_file(job.partial, PROGRESS)
    done = earlier["done"]
    if not job.resume:
        if not job.overwrite:
            raise ConvertError(
                f"'{job.partial}' holds an interrupted run that has finished {done['blocks']} blocks.",
                "continue it with --resume, or remove the directory.",
            )
        return nothing
    for name, then, now in _differences(earlier["settings"], settings):
        raise ConvertError(
            f"cannot resume '{job.partial}': it was started with {name} {then!r}, not {now!r}.",
            "use the settings it was started with, or remove the directory.",
        )
    log.info("resuming at block %d", done["blocks"])
    return done


def _differences(then: Any, now: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(then, dict) and isinstance(now, dict):
        # in the order of `now`: what was chosen is named before what follows from it
        for key in {**now, **then}:
            yield from _differences(then.get(key), now.get(key), f"{name}.{key}".removeprefix("."))
    elif then != now:
        yield name, then, now


def _finished_blocks(job: Job) -> int:
    """How many blocks an unfinished run has safely on disk."""
    if not (job.partial / PROGRESS).exists():
        return 0
    return json_file(job.partial, PROGRESS)["done"]["blocks"]


def _save_progress(job: Job, settings: dict[str, Any], finished: dict[str, Any], tensors: int) -> None:
    """Note how far the run is: from here --resume goes on."""
    write_json(job.partial / PROGRESS, {"settings": settings, "done": {**finished, "tensors": tensors}})


def _begin(job: Job, settings: dict[str, Any], done: dict[str, Any]) -> None:
    """Make the directory everything is written to; what an abandoned run left there goes."""
    if not done["blocks"] and job.partial.exists():
        shutil.rmtree(job.partial)
    job.partial.mkdir(parents=True, exist_ok=True)
    _save_progress(job, settings, {"blocks": done["blocks"], "linears": done["linears"]}, done["tensors"])
    job.staging.mkdir(exist_ok=True)


def _assemble(
    job: Job,
    plan: Plan,
    weights: Weights,
    settings: dict[str, Any],
    rows: list[dict[str, Any]],
    files: dict[str, str],
) -> dict[str, Any]:
    """Put everything but the weights into the output: config, tokenizer, licences, recipe, manifest."""
    staging = job.staging
    config = {key: value for key, value in weights.checkpoint.config.items() if key != "quantization_config"}
    if plan.recipe.dtype != "auto":
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = plan.recipe.dtype
    config["quantization_config"] = plan.quantization_config
    write_json(staging / "config.json", config)
    if plan.recipe.format == "gptq":
        write_json(staging / "quantize_config.json", plan.quantization_config)
    (staging / RECIPE).write_text(_published_recipe(plan).dump(), "utf-8")
    for name in weights.checkpoint.companions():
        (staging / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(weights.checkpoint.directory / name, staging / name)
    for path in staging.rglob("*"):
        name = path.relative_to(staging).as_posix()
        if path.is_file() and name not in files and name != MANIFEST:
            files[name] = sha256_file(path)
    source = {key: value for key, value in settings["source"].items() if key != "fingerprint"}
    manifest = {
        **settings,
        "source": source,
        "bits_per_weight": round(plan.bits_per_weight, 4),
        "linears": rows,
        "dense": {fate.linear: fate.reason for fate in plan.dense},
        "left_out": list(plan.left_out),
        "files": {
            name: {"sha256": files[name], "size": (staging / name).stat().st_size} for name in sorted(files)
        },
    }
    write_json(staging / MANIFEST, manifest)
    # a run that is stopped between its last rename and its clean-up is known by this
    progress = json_file(job.partial, PROGRESS) | {"manifest": sha256_file(staging / MANIFEST)}
    write_json(job.partial / PROGRESS, progress)
    return manifest
