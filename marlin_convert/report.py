"""What a conversion says of itself: the plan before, the table after."""

import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from marlin_convert.matrix import Fate
from marlin_convert.recipe import REPACKED

if TYPE_CHECKING:
    from marlin_convert.commands.push import Job as PushJob
    from marlin_convert.commands.push import Outcome
    from marlin_convert.commands.quantize import Report
    from marlin_convert.conversion import Job
    from marlin_convert.plan import Plan

WORST = 5


def plan_json(plan: "Plan", job: "Job", *, verbose: bool) -> dict[str, Any]:
    """The plan as data, with what it will take; a row for every matrix if `verbose`."""
    from marlin_convert.estimate import estimate
    from marlin_convert.room import rooms

    needs = estimate(plan, job.device)
    return {
        "format": plan.recipe.format,
        "repack": plan.repack,
        "recipe": {
            key: value
            for key, value in plan.recipe.to_dict().items()
            if key in REPACKED or not plan.repack  # the others are about what a repack does not do
        },
        **({"matrices": [fate.row() for fate in plan.fates.values()]} if verbose else {}),
        "linears": len(plan.worked_on),
        "left_dense": len(plan.dense),
        "blocks": plan.blocks,
        "sparsity": plan.sparsity,
        "left_out": list(plan.left_out),
        "beside": list(plan.beside),
        "notes": list(plan.notes),
        "bits_per_weight": round(plan.bits_per_weight, 4),
        "source_bytes": plan.source_bytes,
        "output_bytes": plan.output_bytes,
        "download_bytes": job.source.remote.missing if job.source.remote else 0,
        "room": all(room.enough for room in rooms(job, plan)),
        "device": str(job.device),
        "seconds": round(needs.seconds),
        "memory_bytes": round(needs.memory),
    }


def plan_text(plan: "Plan", job: "Job") -> str:
    """The plan for a reader, with what it will take."""
    from marlin_convert.estimate import estimate
    from marlin_convert.room import rooms

    recipe = plan.recipe
    if recipe.format == "dense":
        lines = [f"Prune {job.source.name} to 2:4 by {recipe.method}", f"  {_worked_on(plan)}"]
    else:
        lines = [
            f"{'Repack' if plan.repack else 'Quantize'} {job.source.name} to {recipe.format}, "
            f"{groups(plan.fates.values())}",
            f"  {_worked_on(plan)}",
        ]
    lines += [
        *([f"  {len(plan.unpruned)} of them not 2:4"] if plan.unpruned else []),
        *(f"    {fate.name}: {fate.layout.format}, {fate.reason}" for fate in plan.unpruned),
        f"  {len(plan.dense)} linears {_left(plan)}",
        *(f"    {names}: {reason}" for names, reason in _dense(plan)),
        f"  tensors {_size(plan.source_bytes)} -> {_size(plan.output_bytes)}",
    ]
    if not plan.repack:
        lines.append(
            f"  calibration: {recipe.calibration}, {recipe.samples} x {recipe.sequence_length} tokens, "
            f"seed {recipe.seed}"
        )
        beside_it = "; the original runs beside it" if plan.compensates else ""
        lines.append(f"  effort: {recipe.effort}{beside_it}")
        lines += _tuning(plan)
    needs = estimate(plan, job.device)
    lines.append(f"  on {job.device}: about {_time(needs.seconds)}, {_size(needs.memory)} of memory")
    lines += [f"  then repacked to {one.recipe.format}: {_size(one.output_bytes)}" for one in plan.also]
    for room in rooms(job, plan):
        taken = ", ".join(f"{what} {_size(nbytes)}" for what, nbytes in room.taken.items())
        short = "" if room.enough else ": not enough, nothing would be begun"
        lines.append(f"  disk of {room.place}: {taken}; {_size(room.free)} are free{short}")
    lines += [f"  {line}" for line in (*left_out(plan), *beside(plan))]
    lines += [f"  note: {note}" for note in plan.notes]
    return "\n".join(lines)


def _tuning(plan: "Plan") -> list[str]:
    """What is tuned, on how much text."""
    from marlin_convert.tune import DENSE, HELD_OUT, SPARSE, TOKENS

    if not plan.tunes:
        return []
    length, epochs = plan.recipe.sequence_length, (SPARSE if plan.sparsity else DENSE).epochs
    windows = max(plan.recipe.samples, TOKENS // length)
    return [
        f"  then codes, scales and norms are tuned: {epochs} epoch{'s' * (epochs > 1)} of at most {windows} "
        f"x {length} tokens, {max(1, HELD_OUT // length)} x {length} held out"
    ]


def groups(fates: Iterable[Fate]) -> str:
    """The bits and group sizes of what is packed."""
    layouts = [fate.layout for fate in fates if fate.packed]
    bits = " and ".join(map(str, sorted({layout.bits for layout in layouts})))
    sizes = " and ".join(map(str, sorted({layout.group_size for layout in layouts}, reverse=True)))
    return f"{bits} bits, group size {sizes}" if layouts else "dense"


def _left(plan: "Plan") -> str:
    """What linears are that nothing is done to."""
    return "left as they are" if plan.recipe.format == "dense" else "left dense"


def _dense(plan: "Plan") -> list[tuple[str, str | None]]:
    """What is left dense and why; what nobody asked for (gates, towers) by the first that is called so."""
    found: dict[tuple[str, str | None], list[str]] = {}
    for fate in plan.dense:
        by_itself = plan.structure.dense.get(fate.name) == fate.reason
        called = fate.name
        if by_itself or plan.structure.part_of_experts(fate.name):
            called = re.sub(r"(?<=\.)\d+(?=\.)", "*", called)
        found.setdefault((called, fate.reason), []).append(fate.name)
    return [
        (names[0] + f" and {len(names) - 1} like it" * (len(names) > 1), reason)
        for (_, reason), names in found.items()
    ]


def _worked_on(plan: "Plan") -> str:
    if plan.recipe.format == "dense":
        return f"{len(plan.worked_on)} linears in {plan.blocks} blocks pruned"
    return (
        f"{len(plan.packed)} linears in {plan.blocks} blocks packed "
        f"at {plan.bits_per_weight:.3f} bits per weight{', 2:4' if plan.sparsity else ''}"
    )


def left_out(plan: "Plan") -> list[str]:
    """The source tensors that are not written, those of one name on one line; the manifest lists them all."""
    names: dict[str, list[str]] = {}
    for name in plan.left_out:
        names.setdefault(".".join(name.split(".")[-2:]), []).append(name)
    return [
        f"left out: {group[0]}" + f" and {len(group) - 1} like it" * (len(group) > 1)
        for group in names.values()
    ]


def beside(plan: "Plan") -> list[str]:
    """The tensors that are written and of no part of the model as it is built, on one line."""
    if not plan.beside:
        return []
    more = f" and {len(plan.beside) - 1} more" * (len(plan.beside) > 1)
    return [f"copied, no part of the model that is built: {plan.beside[0]}{more}"]


def summary(done: "Report") -> dict[str, Any]:
    """What was done, as data: the manifest and this run's figures."""
    return {
        "manifest": done.manifest,
        "seconds": round(done.seconds, 2),
        "source_bytes": done.plan.source_bytes,
        "output_bytes": done.plan.output_bytes,
        "replayed": done.replayed,
        "tuning_seconds": round(done.tuned, 2),
        "also": [one.recipe.format for one in done.plan.also],
    }


def summary_text(done: "Report", job: "Job") -> str:
    """The table at the end of a run: worst linears, sizes, seconds, and the next command to type."""
    plan, rows = done.plan, done.manifest["matrices"]
    lines = []
    # figures of a repack were found by another run
    if done.manifest["divergence"] and not plan.repack:
        lines += _divergence(done.manifest["divergence"])
    if done.manifest.get("tuning"):
        lines.append(_tuned(done.manifest["tuning"], done.tuned))
    errors = sorted((row for row in rows if "error" in row), key=lambda row: -row["error"])
    if errors and not plan.repack:
        mean = sum(row["error"] for row in errors) / len(errors)
        lines.append(f"{'linear':48} {'inputs':>7} {'outputs':>7} {'error':>8}")
        lines += [f"{row['name']:48} {row['k']:7} {row['n']:7} {row['error']:8.4f}" for row in errors[:WORST]]
        lines.append(f"{f'mean of {len(errors)} linears':48} {'':7} {'':7} {mean:8.4f}")
    lines += _few_tokens(rows) if not plan.repack else []
    lines += [f"rounded to nearest: {row['name']}" for row in rows if row.get("rounded_to_nearest")]
    lines += [f"not 2:4: {fate.name}, as {fate.layout.format} ({fate.reason})" for fate in plan.unpruned]
    lines += [f"{_left(plan)}: {names} ({reason})" for names, reason in _dense(plan)]
    lines += [*left_out(plan), *beside(plan)]
    if done.manifest["left_behind"]:
        lines.append(f"not copied from the source: {', '.join(done.manifest['left_behind'])}")
    lines += [f"note: {note}" for note in plan.notes]
    what = (
        "pruned to 2:4" if plan.recipe.format == "dense" else f"at {plan.bits_per_weight:.3f} bits per weight"
    )
    lines.append(
        f"{len(plan.worked_on)} linears {what}, "
        f"{_size(plan.source_bytes)} -> {_size(plan.output_bytes)}, {done.seconds:.1f} s"
    )
    if done.replayed:
        lines.append(
            f"computed again for want of memory: {done.replayed} parts of blocks, over all micro-batches"
        )
    lines += [
        f"the same codes as {one.recipe.format}: {job.output.with_name(one.recipe.format)}, "
        f"{_size(one.output_bytes)}"
        for one in plan.also
    ]
    source = shlex.quote(str(job.source.directory))
    if job.source.commit:
        source = f"{job.source.name} --source-revision {job.source.commit}"
    lines.append(f"Next: marlin-convert verify {shlex.quote(str(job.output))} --source {source}")
    return "\n".join(lines)


def _few_tokens(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Which experts the rows of a manifest say fewer tokens went to than they have inputs."""
    inputs: dict[str, tuple[int, int]] = {}
    for row in rows:
        if "tokens" in row:
            inputs.setdefault(row["name"].rpartition(".")[0], (row["tokens"], row["k"]))
    few = sorted((tokens, name) for name, (tokens, k) in inputs.items() if tokens < k)
    if not few:
        return []
    (tokens, name), none = few[0], sum(not tokens for tokens, _ in few)
    return [
        f"experts: to {len(few)} of {len(inputs)} fewer tokens went than they have inputs, {tokens} to {name}"
        + (f", none to {none}" if none else "")
        + "; they were calibrated on others too"
    ]


def _tuned(tuning: dict[str, Any], seconds: float) -> str:
    """What tuning was good for; the seconds are of this run, 0 where an earlier one has tuned."""
    before, after = (
        "not finite" if one is None else f"{one:.5f}"
        for one in (tuning["held_out_divergence"]["solved"], tuning["held_out_divergence"]["tuned"])
    )
    took = f", {seconds:.1f} s" if seconds else ""
    kept = "" if tuning["kept"] else ": of no use, the solver's codes are written"
    said = f"tuned, {tuning['steps']} steps{took}: held-out divergence {before} -> {after}{kept}"
    return said + ("; above and below are the solver's figures" if tuning["kept"] else "")


# Of a curve in a line of text that any terminal and log can show.
_HEIGHTS = ".:-=+*#@"


def _divergence(after: list[float]) -> list[str]:
    """How far the hidden states are from the original's, as a curve over the blocks and as numbers."""
    most = max(after) or 1.0
    curve = "".join(_HEIGHTS[round(one / most * (len(_HEIGHTS) - 1))] for one in after)
    return [
        "hidden states, relative distance from the original's, block by block:",
        f"  {curve}  {after[0]:.4f} after block 0, {after[-1]:.4f} after block {len(after) - 1}, "
        f"at most {max(after):.4f}",
    ]


def push_json(done: "Outcome", job: "PushJob") -> dict[str, Any]:
    """What was pushed or, after a dry run, would be: every branch with its files, and where it is now."""
    pushed = {one.branch: asdict(one) for one in done.pushed}
    return {
        "repository": job.repository,
        "warnings": done.warnings,
        "branches": [
            {
                "branch": release.branch,
                "format": release.format,
                "files": {
                    name: {"size": file.size, "sha256": file.sha256} for name, file in release.files.items()
                },
                "not_pushed": release.left,
                "card": release.card,
                "pushed": pushed.get(release.branch),
            }
            for release in done.releases
        ],
    }


def push_text(done: "Outcome", job: "PushJob") -> str:
    """Where everything is now, and the next command; after a dry run the files, hashes and cards."""
    lines = []
    for release in done.releases if not done.pushed else ():
        size = sum(file.size for file in release.files.values())
        lines.append(f"{job.repository}, branch {release.branch}: {len(release.files)} files, {_size(size)}")
        lines += [f"  {file.sha256}  {file.size:>12}  {name}" for name, file in release.files.items()]
        lines += ["", *(f"  {line}".rstrip() for line in release.card.splitlines()), ""]
    for one in done.pushed:
        lines.append(
            f"{one.branch}: {one.url}" + "" if one.changed else f"{one.branch}: {one.url} (unchanged)"
        )
        lines += [f"  removed: {name}" for name in one.removed]
        lines += [f"  pull request: {one.pull_request}"] if one.pull_request else []
    if not done.pushed:
        lines.append("Nothing was uploaded.")
    else:
        revision = "" if job.branch == "main" else f" --revision {job.branch}"
        lines.append(f"Next: marlin-convert verify {job.repository}{revision}")
    return "\n".join(lines)


def _size(nbytes: float) -> str:
    """Bytes for a reader."""
    for unit in ("B", "kB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} GB"


def _time(seconds: float) -> str:
    """Seconds for a reader."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
