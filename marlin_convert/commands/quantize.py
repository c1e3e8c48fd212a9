"""The story of `quantize`: plan, calibrate, solve block by block, pack, write, publish.

A source that is already quantized is repacked: its codes take the place of calibrating and solving.
"""

import errno
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from marlin_convert.assemble import assemble, settings_of
from marlin_convert.calibration import Calibration, calibrate, load_tokenizer, tuning_text
from marlin_convert.checkpoint.linears import Weights, is_finite
from marlin_convert.checkpoint.reader import Checkpoint
from marlin_convert.checkpoint.writer import (
    ShardWriter,
    check_replaceable,
    check_report,
    publish,
    write_report,
)
from marlin_convert.codes import Codes, weight_of
from marlin_convert.conversion import Job
from marlin_convert.errors import ConvertError, FormatError, SourceError
from marlin_convert.estimate import tuning_memory
from marlin_convert.further_formats import is_made, repacks
from marlin_convert.hub import complete
from marlin_convert.matrix import Fate
from marlin_convert.models.memory import free_memory
from marlin_convert.page import html
from marlin_convert.plan import Plan, make_plan
from marlin_convert.remote import RemoteFile, fetched_ahead
from marlin_convert.repack import Repack
from marlin_convert.room import check_room
from marlin_convert.shared import check_alike, check_samples, check_shared
from marlin_convert.solve import Solve
from marlin_convert.tune import HELD_OUT, TOKENS, Tune

log = logging.getLogger("marlin_convert")


@dataclass(frozen=True)
class Report:
    """What a conversion did: the manifest as written, and what only this run knows."""

    manifest: dict[str, Any]
    plan: Plan
    seconds: float
    replayed: int  # times a part of a block was computed again for want of memory, over all micro-batches
    tuned: float = 0.0  # seconds of them that were spent on tuning


def plan_job(job: Job) -> tuple[Weights, Plan]:
    """Open the source and plan the conversion from headers alone; ConvertError for bad input."""
    return _planned(job, _opened(job))


def _opened(job: Job) -> Checkpoint:
    remote = job.source.remote
    return Checkpoint.open(job.source.directory, remote.files if remote else None)


def _planned(job: Job, checkpoint: Checkpoint) -> tuple[Weights, Plan]:
    weights = Weights(checkpoint)
    plan, *also = (
        make_plan(
            Weights(checkpoint) if format in job.also else weights,
            job.recipe.changed({"format": format}),
            group_size=job.group_size,
            requantize=job.requantize,
            trust_remote_code=job.trust_remote_code,
        )
        for format in (job.recipe.format, *job.also)
    )
    plan = replace(plan, also=tuple(also))
    if not plan.worked_on:
        raise ConvertError("nothing is left to do: every linear stays as it is.", "skip fewer of them.")
    if not job.ranks.alone:
        check_shared(job, plan)
    if job.ranks.first:
        _check_output(job)
    if plan.tunes:
        _check_memory(job, plan)
    return weights, plan


def quantize(
    job: Job, progress: Callable[[range, int], Iterable[int]] = lambda blocks, total: blocks
) -> Report:
    """Convert the job's source into its output directory; ConvertError for what cannot be done.

    Whatever stops it, the source and an earlier output stay as they are, and what is finished can be resumed.
    """
    started = time.monotonic()
    log.info("planning %s", job.source.name)
    _check_names(job)
    run = job.run
    if job.ranks.first and not job.resume:
        try:
            run.tidy()
        except OSError as error:
            raise _disk_error(job, error) from error
    with _on_its_way(job) as (weights, plan):
        return _quantize(job, weights, plan, progress, started)


@contextmanager
def _on_its_way(job: Job) -> Iterator[tuple[Weights, Plan]]:
    """The source and the plan; files of the Hub come while the context lasts, as blocks want them."""
    checkpoint = _opened(job)
    weights, plan = _planned(job, checkpoint)
    if job.ranks.first_here and not (job.resume and job.run.published()):
        check_room(job, plan)
    if job.source.remote is None:
        yield weights, plan
        return
    complete(job.source, code=job.trust_remote_code)
    with fetched_ahead(_in_order(weights, plan), by_others=not job.ranks.first_here):
        # again, where it is not all in the headers
        yield _planned(job, checkpoint) if weights.supposed else (weights, plan)


def _in_order(weights: Weights, plan: Plan) -> list[RemoteFile]:
    """The files that are not here, in the order of the blocks whose weights are in them."""
    needed: dict[str, tuple[float, RemoteFile]] = {}
    for name, info in weights.checkpoint.tensors.items():
        if isinstance(info.file, RemoteFile):
            number = plan.structure.block_of(name)
            at = math.inf if number is None else number
            needed[info.file.name] = min(at, needed.get(info.file.name, (at,))[0]), info.file
    return [file for _, file in sorted(needed.values(), key=lambda one: (one[0], one[1].name))]


def _quantize(
    job: Job,
    weights: Weights,
    plan: Plan,
    progress: Callable[[range, int], Iterable[int]],
    started: float,
) -> Report:
    run = job.run
    calibration = None if plan.repack else _calibration(job, plan)
    settings = settings_of(job, plan, weights, calibration)
    log.info(
        "%s: %d linears in %d blocks to %s", "repacking" if plan.repack else "solving",
        len(plan.worked_on), plan.blocks, plan.recipe.format,
    )  # fmt: skip
    check_alike(job.ranks, settings)
    if not job.ranks.first:
        return _solve_along(job, plan, weights, calibration, started)
    done = run.earlier(settings, resume=job.resume, discard=job.overwrite)
    replayed, tuned = 0, 0.0
    manifest = run.published() if job.resume else None
    try:
        if manifest is None:
            run.begin(settings, done)
            job.ranks.told((done["blocks"], done["solved"]))
            files, found, codes = _convert(job, plan, weights, calibration, settings, done, progress)
            replayed, tuned = codes.replayed, codes.tuned.seconds if codes.tuned else 0.0
            manifest = assemble(job, plan, weights, settings, found, files)
            run.complete({"blocks": plan.blocks, "solved": 0, "tensors": len(plan.specs), **found})
            check_replaceable(job.output, job.overwrite)  # again: somebody may have put something there
            publish(run.staging, job.output, job.overwrite)
        # until they are there too, what says that the output is complete stays for --resume
        for beside in repacks(job):
            if not is_made(beside):
                quantize(beside)
            beside.run.tidy()
        job.ranks.told(manifest)
        if job.report is not None:
            hint = "choose another file, or make room; then --resume writes it: the output is complete."
            made = {
                "made on": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
                "took": f"{time.monotonic() - started:.0f} s",
                "tensors": f"{plan.source_bytes / 1e6:,.2f} MB before, {plan.output_bytes / 1e6:,.2f} MB now",
            }
            write_report(job.report, html(manifest, run=made), hint)
        run.forget()
    except OSError as error:
        raise _disk_error(job, error) from error
    finally:
        run.release()
    return Report(manifest, plan, time.monotonic() - started, replayed, tuned)


def _solve_along(
    job: Job, plan: Plan, weights: Weights, calibration: Calibration | None, started: float
) -> Report:
    """What the ranks do that do not write: solve with the first what is left, and wait for the output."""
    done = job.ranks.told()
    replayed = 0
    if isinstance(done, tuple):
        blocks, solved = done
        if calibration is not None and blocks < plan.blocks:
            replayed = _codes_along(job, plan, weights, calibration, blocks, solved).replayed
        done = job.ranks.told()
    return Report(done, plan, time.monotonic() - started, replayed)


def _codes_along(
    job: Job, plan: Plan, weights: Weights, calibration: Calibration, blocks: int, solved: int
) -> Codes:
    """Solve, or solve and tune, with the first rank what is left after so many finished blocks."""
    if plan.tunes:
        return _tuned(job, plan, weights, calibration, solved, range(solved, plan.blocks))
    codes = _solve(job, plan, weights, calibration)
    codes.skip(blocks)
    for number in range(blocks, plan.blocks):
        for _ in codes.block(number):
            raise AssertionError("only the first rank is given what is packed")
    return codes


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
) -> tuple[dict[str, str], dict[str, Any], Codes]:
    """Write the shards; returns their sha256, what the manifest says of the work, and the codes' origin."""
    rows: list[dict[str, Any]] = done["matrices"]
    divergence: list[float] = done["divergence"]
    todo = range(done["blocks"], plan.blocks)
    walk = progress(todo, plan.blocks)
    with ExitStack() as stack:
        writer = stack.enter_context(
            ShardWriter(job.run.staging, plan.specs, job.max_shard_size, weights.on_disk)
        )
        writer.resume(done["tensors"])
        codes: Codes
        if calibration is not None and calibration.tuning is not None and todo:
            solved = done["solved"]
            blocks = progress(range(solved, plan.blocks), plan.blocks)
            note = partial(_note, job, settings, done)
            codes, walk = _tuned(job, plan, weights, calibration, solved, blocks, note), todo
        elif calibration is not None and todo:
            codes = _solve(job, plan, weights, calibration)
            codes.skip(done["blocks"], partial(_written, plan, writer))
        else:
            codes = stack.enter_context(Repack(plan, weights, done["blocks"]))
        names = iter(writer.order[done["tensors"] :])
        name = next(names, None)
        packed: dict[str, Tensor] = {}
        place = {fate: number for number, fate in enumerate(plan.fates)}
        for number in walk:
            of_block: list[dict[str, Any]] = []
            for tensors, row in codes.block(number):
                packed |= tensors
                of_block.append(row)
                while name in packed or (name is not None and name not in plan.owner):
                    writer.write(
                        name, packed.pop(name) if name in packed else _dense(weights, plan, codes, name)
                    )
                    name = next(names, None)
            tensors = {}  # all that it came with is not to stay for the next block
            # as they stand in the model: in which order they are solved depends on the ranks
            rows += sorted(of_block, key=lambda row: place[row["name"]])
            if codes.divergence is not None:
                divergence.append(codes.divergence)
            finished = {"blocks": number + 1, "matrices": list(rows), "divergence": list(divergence)}
            if packed or plan.tunes:
                # tensors of odd sizes come last of all: until they are written nothing is finished; and what
                # is tuned is kept elsewhere
                continue
            writer.checkpoint(partial(job.run.save, settings, finished))
        log.info("writing the rest")
        while name is not None:
            writer.write(name, _dense(weights, plan, codes, name))
            name = next(names, None)
        tuning = codes.tuned.record if codes.tuned else done["tuning"]
        found = {"matrices": rows, "divergence": divergence, "tuning": tuning}
        return writer.close(), found, codes


def _solve(job: Job, plan: Plan, weights: Weights, calibration: Calibration) -> Solve:
    return Solve(
        plan, weights, calibration, job.device,
        directory=job.run.directory, trust_remote_code=job.trust_remote_code, ranks=job.ranks,
    )  # fmt: skip


def _written(plan: Plan, writer: ShardWriter, fate: Fate) -> Tensor:
    """The weight that an earlier run has written for a matrix."""
    stored = {suffix: writer.read(f"{fate.name}.{suffix}") for suffix in plan.suffixes(fate)}
    return weight_of(fate, stored, plan)


def _tuned(
    job: Job,
    plan: Plan,
    weights: Weights,
    calibration: Calibration,
    solved: int,
    blocks: Iterable[int],
    note: Callable[[int, float | None], None] = lambda solved, divergence: None,
) -> Tune:
    """The codes that tuning makes of the solver's: those of all blocks, before the first is written.

    Of the `blocks` that are left after those that were `solved` before, `note` is told.
    """
    assert calibration.tuning is not None
    codes = Tune(
        plan, weights, calibration.tuning, job.device,
        directory=job.run.directory, trust_remote_code=job.trust_remote_code, ranks=job.ranks,
    )  # fmt: skip
    if solved < plan.blocks:
        codes.solve(_solve(job, plan, weights, calibration), blocks, solved, note)
    codes.tune()
    return codes


def _note(
    job: Job, settings: dict[str, Any], done: dict[str, Any], solved: int, divergence: float | None
) -> None:
    """Keep in mind that so many blocks are solved, the last of them so far off."""
    done["solved"] = solved
    done["divergence"].append(divergence)
    job.run.save(settings, {key: value for key, value in done.items() if key != "tensors"}, 0)


def _dense(weights: Weights, plan: Plan, codes: Codes, name: str) -> Tensor:
    """A tensor that is tuned, or copied from the source, in the type it is written as."""
    if codes.tuned and name in codes.tuned.norms:
        return codes.tuned.norms[name]
    tensor = weights.read(name)
    if not is_finite(tensor):
        raise SourceError(f"{name} holds NaN or Inf.", "the source is damaged; fetch it again.")
    written = tensor.to(plan.dtypes[name])
    if not is_finite(written):
        raise FormatError(
            f"{name} does not fit {plan.recipe.dtype}: its largest value is {tensor.abs().max()}.",
            "keep the model's own type with --dtype auto.",
        )
    return written


def _calibration(job: Job, plan: Plan) -> Calibration:
    tokenizer = load_tokenizer(job.source, trust_remote_code=job.trust_remote_code)
    recipe = plan.recipe
    log.info("reading %d x %d tokens of %s", recipe.samples, recipe.sequence_length, recipe.calibration)
    calibration = calibrate(
        tokenizer, recipe.calibration, samples=recipe.samples, length=recipe.sequence_length, seed=recipe.seed
    )
    if calibration.ids.max() >= plan.vocabulary:
        raise SourceError(
            f"the tokenizer gives id {calibration.ids.max()}, the model has {plan.vocabulary} embeddings.",
            "the tokenizer may be of another model.",
        )
    if plan.tunes:
        text = tuning_text(
            tokenizer, recipe.calibration, samples=recipe.samples, length=recipe.sequence_length,
            seed=recipe.seed, tokens=TOKENS, held_out=HELD_OUT,
        )  # fmt: skip
        check_samples(job.ranks, len(text.ids))
        calibration = replace(calibration, tuning=text)
    return calibration


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


def _check_output(job: Job) -> None:
    _check_names(job)
    job.run.check_ours()
    complete = job.resume and job.run.published()
    for beside in repacks(job):
        beside.run.check_ours()
        if not (complete and is_made(beside)):
            check_replaceable(beside.output, job.overwrite)
        if not job.resume:
            beside.run.earlier({}, resume=False, discard=job.overwrite)
    if not complete:
        check_replaceable(job.output, job.overwrite)


def _check_memory(job: Job, plan: Plan) -> None:
    """ConvertError for a model that cannot be tuned as a whole in the memory there is."""
    sharing = job.ranks.count_here if job.device.type == "cpu" else 1
    needed, free = sharing * tuning_memory(plan, job.device), free_memory(job.device)
    if needed > free:
        of_each = f" in each of {sharing} processes" if sharing > 1 else ""
        raise ConvertError(
            f"--effort high takes {needed / 1e9:.1f} GB of memory on {job.device}, for the model twice and "
            f"what it learns{of_each}; {free / 1e9:.1f} GB are free.",
            f"{'fewer processes, or ' * bool(of_each)}--effort default, which needs one block at a time; or "
            "use a device with more memory.",
        )
