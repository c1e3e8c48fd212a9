"""The story of `quantize`: plan, calibrate, solve block by block, pack, write, publish.

A source that is already quantized is repacked: its codes take the place of calibrating and solving.
"""

import errno
import logging
import platform
import shutil
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from marlin_convert import __version__, provenance
from marlin_convert.calibration import Calibration, calibrate, load_tokenizer, shown
from marlin_convert.card import read_facts
from marlin_convert.checkpoint import manifest as manifests
from marlin_convert.checkpoint import remote_code
from marlin_convert.checkpoint.linears import Weights
from marlin_convert.checkpoint.manifest import MANIFEST, sha256_file
from marlin_convert.checkpoint.reader import Checkpoint, json_file
from marlin_convert.checkpoint.unfinished import UnfinishedRun
from marlin_convert.checkpoint.writer import (
    ShardWriter,
    check_replaceable,
    check_report,
    publish,
    write_json,
    write_report,
)
from marlin_convert.codes import Codes
from marlin_convert.errors import ConvertError, FormatError, SourceError, reading
from marlin_convert.hub import Source
from marlin_convert.models.blocks import bf16_units
from marlin_convert.page import html
from marlin_convert.plan import Plan, make_plan
from marlin_convert.recipe import Recipe, to_yaml
from marlin_convert.repack import Repack
from marlin_convert.solve import Solve

log = logging.getLogger("marlin_convert")


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
    report: Path | None = None

    @property
    def run(self) -> UnfinishedRun:
        """What there is of the output until it is complete."""
        return UnfinishedRun(self.output)


@dataclass(frozen=True)
class Report:
    """What a conversion did: the manifest as written, and what only this run knows."""

    manifest: dict[str, Any]
    plan: Plan
    seconds: float
    replayed: int  # times a part of a block was computed again for want of memory, over all micro-batches


def plan_job(job: Job) -> tuple[Weights, Plan]:
    """Open the source and plan the conversion from headers alone; ConvertError for bad input."""
    weights = Weights(Checkpoint.open(job.source.directory))
    plan = make_plan(
        weights, job.recipe, group_size=job.group_size, requantize=job.requantize,
        trust_remote_code=job.trust_remote_code,
    )  # fmt: skip
    if not plan.worked_on:
        raise ConvertError("nothing is left to do: every linear stays as it is.", "skip fewer of them.")
    _check_output(job, plan)
    return weights, plan


def quantize(
    job: Job, progress: Callable[[range, int], Iterable[int]] = lambda blocks, total: blocks
) -> Report:
    """Convert the job's source into its output directory; ConvertError for what cannot be done.

    Whatever stops it, the source and an earlier output stay as they are, and what is finished can be resumed.
    """
    started = time.monotonic()
    _check_names(job)
    run = job.run
    if not job.resume:
        try:
            run.tidy()
        except OSError as error:
            raise _disk_error(job, error) from error
    weights, plan = plan_job(job)
    calibration = None if plan.repack else _calibration(job, plan)
    settings = _settings(job, plan, weights, calibration)
    done = run.earlier(settings, resume=job.resume, discard=job.overwrite)
    replayed = 0
    manifest = run.published() if job.resume else None
    try:
        if manifest is None:
            run.begin(settings, done)
            files, found, replayed = _convert(job, plan, weights, calibration, settings, done, progress)
            manifest = _assemble(job, plan, weights, settings, found, files)
            run.complete({"blocks": plan.blocks, "tensors": len(plan.specs), **found})
            check_replaceable(job.output, job.overwrite)  # again: somebody may have put something there
            publish(run.staging, job.output, job.overwrite)
        if job.report is not None:
            hint = "choose another file, or make room; then --resume writes it: the output is complete."
            write_report(job.report, html(manifest), hint)
        run.forget()
    except OSError as error:
        raise _disk_error(job, error) from error
    finally:
        run.release()
    return Report(manifest, plan, time.monotonic() - started, replayed)


def _disk_error(job: Job, error: OSError) -> ConvertError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return ConvertError(
            f"no space left for '{job.output}' ({error.strerror}).", "free some and continue with --resume."
        )
    where = f" ('{error.filename}')" if error.filename else ""
    return ConvertError(
        f"cannot write '{job.output}': {error.strerror}{where}.",
        "choose another directory, or mend this one and continue with --resume.",
    )


def _convert(
    job: Job,
    plan: Plan,
    weights: Weights,
    calibration: Calibration | None,
    settings: dict[str, Any],
    done: dict[str, Any],
    progress: Callable[[range, int], Iterable[int]],
) -> tuple[dict[str, str], dict[str, Any], int]:
    """Write the shards; returns their sha256, what the manifest says of the work, and the replays."""
    rows: list[dict[str, Any]] = done["matrices"]
    divergence: list[float] = done["divergence"]
    with ExitStack() as stack:
        writer = stack.enter_context(
            ShardWriter(job.run.staging, plan.specs, job.max_shard_size, weights.on_disk)
        )
        writer.resume(done["tensors"])
        codes: Codes
        if calibration is not None and done["blocks"] < plan.blocks:
            codes = Solve(
                plan, weights, calibration, job.device,
                directory=job.run.directory, trust_remote_code=job.trust_remote_code,
            )  # fmt: skip
            codes.skip(done["blocks"], writer)
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
            if codes.divergence is not None:
                divergence.append(codes.divergence)
            finished = {"blocks": number + 1, "matrices": list(rows), "divergence": list(divergence)}
            if packed:
                continue  # tensors of odd sizes come last of all: until they are written nothing is finished
            writer.checkpoint(partial(job.run.save, settings, finished))
        while name is not None:
            writer.write(name, _dense(weights, plan, name))
            name = next(names, None)
        return writer.close(), {"matrices": rows, "divergence": divergence}, codes.replayed


def _dense(weights: Weights, plan: Plan, name: str) -> Tensor:
    """A tensor that is copied from the source, in the type it is written as."""
    tensor = weights.read(name)
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
    before = provenance.earlier(job.source.directory)
    recipe, text = _published_recipe(plan).to_dict(), _stated(calibration)
    if plan.repack:
        recipe = provenance.recipe_of_codes(recipe, before)
        text = before[-1]["calibration"] if before else None
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
            **({"stored_in": weights.stored_in} if weights.stored_in else {}),
            # of ours: which one it was
            **({"manifest": sha256_file(job.source.directory / MANIFEST)} if before else {}),
            "fingerprint": weights.checkpoint.fingerprint(),
        },
        "recipe": recipe,
        "requantized": weights.scheme is not None and job.requantize,
        "repacked": plan.repack,
        "history": before,
        "calibration": text,
        "device": device,
        "processor": None if calibration is None else processor(job.device),
        "max_shard_size": job.max_shard_size,
        "trust_remote_code": job.trust_remote_code,
    }


def _stated(calibration: Calibration | None) -> dict[str, Any] | None:
    """What a manifest says of the text."""
    if calibration is None:
        return None
    return {
        "text": calibration.source,
        "samples": len(calibration.ids),
        "sequence_length": calibration.ids.shape[1],
        "sha256": calibration.digest,
    }


def processor(device: torch.device) -> dict[str, Any] | None:
    """What sums on a CPU depend on, as torch reports it; nothing of it matters to a GPU."""
    if device.type != "cpu":
        return None
    return {
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "bf16_units": bf16_units(),
    }


def _published_recipe(plan: Plan) -> Recipe:
    """The recipe without the folders of this machine."""
    return plan.recipe.changed({"calibration": shown(plan.recipe.calibration)})


def _copy_from_source(job: Job, plan: Plan, checkpoint: Checkpoint) -> list[str]:
    """Write the config and copy the other files of the source; what of them stays behind.

    Code comes with the words that name it, where it is trusted, or neither does.
    """
    source, staging = checkpoint.directory, job.run.staging
    config = plan.config
    code, behind = remote_code.code_files(checkpoint)
    named = remote_code.named_in(source)
    if not job.trust_remote_code:
        config = remote_code.without_code(config)
        code, behind = [], [f"{key} of {name}" for name, keys in named.items() for key in keys]
    write_json(staging / "config.json", config)
    copied = [*checkpoint.companions(), *code]
    for name in copied:
        (staging / name).parent.mkdir(exist_ok=True)
        if name in named and not job.trust_remote_code:
            write_json(staging / name, remote_code.without_code(json_file(source, name)))
            continue
        with reading(source / name):
            data = (source / name).read_bytes()
        (staging / name).write_bytes(data)
    others = [name for name in checkpoint.others() if name not in copied]
    ours = manifests.load(source)
    if ours is not None:  # what somebody has put beside our files is no part of it
        others = [name for name in others if name in ours["files"]]
    return list(dict.fromkeys([*behind, *others]))


def _recipe_text(making: dict[str, Any], *, first: bool) -> str:
    """A recipe file; it says so where the settings that made the codes are not known."""
    if not (making["repacked"] and first):
        return to_yaml(making["recipe"])
    said = f"The source was {making['source']['quantization']} already, and its codes are kept."
    return f"# {said}\n# How they were calibrated is not known.\n{to_yaml(making['recipe'])}"


def _check_names(job: Job) -> None:
    output, source = job.output.resolve(), job.source.directory.resolve()
    if output == source or source in output.parents or output in source.parents:
        raise ConvertError(f"'{job.output}' overlaps the source.", "choose another directory.")
    if job.output.name in ("", ".."):
        raise ConvertError(
            f"'{job.output}' cannot be the output: it comes by a rename.", "give a directory to be made."
        )
    if job.report is not None:
        check_report(job.report, job.output)


def _check_output(job: Job, plan: Plan) -> None:
    _check_names(job)
    job.run.check_ours()
    if job.resume and job.run.published():
        return
    check_replaceable(job.output, job.overwrite)
    place = next(parent for parent in job.output.resolve().parents if parent.exists())
    free = shutil.disk_usage(place).free
    if plan.output_bytes > free + job.run.staged_bytes:
        raise ConvertError(
            f"no space left: the output takes {plan.output_bytes:,} bytes, {free:,} are free.",
            "free some, or choose a directory on another disk.",
        )


def _assemble(
    job: Job,
    plan: Plan,
    weights: Weights,
    settings: dict[str, Any],
    found: dict[str, Any],
    files: dict[str, str],
) -> dict[str, Any]:
    """Put everything but the weights into the output: config, tokenizer, licences, recipe, manifest."""
    staging = job.run.staging
    left_behind = _copy_from_source(job, plan, weights.checkpoint)
    if plan.recipe.format == "gptq":
        write_json(staging / "quantize_config.json", plan.quantization_config)
    makings = provenance.makings(settings)
    for number, making in enumerate(makings):
        name = provenance.recipe_file(number, len(makings))
        (staging / name).write_text(_recipe_text(making, first=not number), "utf-8")
    for path in staging.rglob("*"):
        name = path.relative_to(staging).as_posix()
        if path.is_file() and name not in files and name != MANIFEST:
            files[name] = sha256_file(path)
    source = {key: value for key, value in settings["source"].items() if key != "fingerprint"}
    manifest = {
        **settings,
        "source": {**source, "card": read_facts(job.source.directory)},
        "bits_per_weight": round(plan.bits_per_weight, 4),
        "matrices": [*found["matrices"], *(fate.row() for fate in plan.dense)],
        "divergence": found["divergence"],
        "left_out": list(plan.left_out),
        "beside": list(plan.beside),
        "left_behind": left_behind,
        "files": {
            name: {"sha256": files[name], "size": (staging / name).stat().st_size} for name in sorted(files)
        },
    }
    if plan.repack:
        manifest |= provenance.carried(manifest, job.source.directory)
    write_json(staging / MANIFEST, manifest)
    return manifest
