"""What `marlin_convert` gives to Python: commands as functions, with the names and defaults of their options.

Errors name options as the command line spells them: `--group-size` is `group_size` here. Bad input is a
ConvertError and nothing else. Nothing is printed; the logger `marlin_convert` says what goes on.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from marlin_convert.checks import BY_DEFAULT
from marlin_convert.options import names

if TYPE_CHECKING:
    from marlin_convert.commands.generate import Generated
    from marlin_convert.commands.push import Outcome
    from marlin_convert.commands.quantize import Report
    from marlin_convert.commands.verify import Verification
    from marlin_convert.conversion import Job
    from marlin_convert.plan import Plan

# Called with the numbers of the blocks to do and how many there are in all; yields each number in turn.
Progress = Callable[[range, int], Iterable[int]]


@dataclass(frozen=True)
class Result:
    """What a conversion wrote, and what it cost.

    Of several formats `output` is the directory of the one that was solved for, `also` has the others.
    `divergence` is how far the hidden states are from the original's after every block, relative; `errors`
    the relative error of every linear's output. They are empty where nobody has measured them: the first with
    effort "fast", both for a source that others have quantized. `manifest` is marlin_convert.json as written.

    After a dry run there is a `plan`, with the keys of `--dry-run --json`, and the sizes are those planned.
    """

    output: Path
    also: tuple[Path, ...]
    seconds: float
    source_bytes: int
    output_bytes: int
    bits_per_weight: float
    divergence: tuple[float, ...] = field(repr=False)
    errors: dict[str, float] = field(repr=False)
    manifest: dict[str, Any] = field(repr=False)
    plan: dict[str, Any] = field(repr=False, default_factory=dict)


def quantize(
    model: str | Path,
    output: str | Path,
    *,
    recipe: str | Path = "w4a16",
    format: str | Sequence[str] | None = None,
    group_size: int | str | None = None,
    bits: int | None = None,
    scales: str | None = None,
    sparsity: str | None = None,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    unpruned: Sequence[str] = (),
    calibration: str | Path | None = None,
    samples: int | None = None,
    sequence_length: int | None = None,
    effort: str | None = None,
    seed: int | None = None,
    dtype: str | None = None,
    requantize: bool = False,
    device: str = "auto",
    revision: str | None = None,
    max_shard_size: int | str = "5GB",
    resume: bool = False,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    report: str | Path | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Quantize a model (a Hub id or a directory) into a directory; a quantized one is repacked.

    A setting that is None, or no pattern at all, is as the recipe has it: the default recipe, w4a16, says in
    its file what each of them means. `progress` is called with the numbers of the blocks to do and how many
    there are in all, and yields each number when it is its turn. With `dry_run` nothing is downloaded but
    headers and nothing written: the result has the `plan`.

    ConvertError for what cannot be done. Whatever stops it, the source and an earlier output stay as they
    are, and `resume=True` goes on from the last finished block.
    """
    from marlin_convert.commands import quantize as story
    from marlin_convert.conversion import make_job

    settings = dict(
        format=format, group_size=group_size, bits=bits, scales=scales, sparsity=sparsity, only=only,
        skip=skip, unpruned=unpruned, calibration=calibration, samples=samples,
        sequence_length=sequence_length, effort=effort, seed=seed, dtype=dtype,
    )  # fmt: skip
    job = make_job(
        model, output, recipe, settings,
        device=device, revision=revision, max_shard_size=max_shard_size, requantize=requantize, resume=resume,
        overwrite=overwrite, trust_remote_code=trust_remote_code, report=report,
    )  # fmt: skip
    if dry_run:
        return _planned(job, story.plan_job(job)[1])
    return _result(job, story.quantize(job, progress or _silent))


def sparsify(
    model: str | Path,
    output: str | Path,
    *,
    recipe: str | Path = "w4a16",
    method: str | None = None,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    calibration: str | Path | None = None,
    samples: int | None = None,
    sequence_length: int | None = None,
    effort: str | None = None,
    seed: int | None = None,
    dtype: str | None = None,
    device: str = "auto",
    revision: str | None = None,
    max_shard_size: int | str = "5GB",
    resume: bool = False,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    report: str | Path | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Prune a model to 2:4, two weights of every four, into a directory with dense weights.

    Settings, `progress`, `dry_run`, errors and resuming are as those of `quantize`.
    """
    from marlin_convert.commands import sparsify as story

    settings = dict(
        method=method, only=only, skip=skip, calibration=calibration, samples=samples,
        sequence_length=sequence_length, effort=effort, seed=seed, dtype=dtype,
    )  # fmt: skip
    job = story.make_job(
        model, output, recipe, settings,
        device=device, revision=revision, max_shard_size=max_shard_size, resume=resume, overwrite=overwrite,
        trust_remote_code=trust_remote_code, report=report,
    )  # fmt: skip
    if dry_run:
        return _planned(job, story.plan_job(job)[1])
    return _result(job, story.sparsify(job, progress or _silent))


def verify(
    checkpoint: str | Path,
    *,
    source: str | Path | None = None,
    checks: str | Iterable[str] = BY_DEFAULT,
    require_kernel: bool = False,
    strict: bool = False,
    tolerance: float = 1e-3,
    text: str | Path = "builtin",
    samples: int = 16,
    sequence_length: int = 1024,
    device: str = "auto",
    revision: str | None = None,
    source_revision: str | None = None,
    trust_remote_code: bool = False,
    report: str | Path | None = None,
    progress: Progress | None = None,
) -> "Verification":
    """Check a checkpoint (a directory or a Hub id), alone or against the model it was made from.

    What it finds is no exception: `passed` says whether all is well, `checks` has the status, the reason and
    the figures of every check by its name. As the command does, it leaves its report in a directory of ours.

    ConvertError where there is nothing that can be checked.
    """
    from marlin_convert.commands import verify as story

    job = story.make_job(
        checkpoint, source=source, checks=checks, require_kernel=require_kernel, strict=strict,
        tolerance=tolerance, text=str(text), samples=samples, sequence_length=sequence_length,
        device=device, revision=revision, source_revision=source_revision,
        trust_remote_code=trust_remote_code, report=report,
    )  # fmt: skip
    done = story.verify(job, progress or _silent)
    story.save(done, job, None if report is None else Path(report))
    return done


def generate(
    checkpoint: str | Path,
    prompt: "str | Sequence[dict[str, str]] | None" = None,
    *,
    compare: str | Path | None = None,
    compare_revision: str | None = None,
    max_new_tokens: int = 128,
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> "Generated":
    """Let a checkpoint write text, and the model it is compared with: always the likeliest token.

    A prompt is put into the chat template, where there is one; a conversation, a list of
    {"role": "user" or "assistant", "content": text}, needs one. `answer` has the text, the tokens and how
    many came in a second; so has `compared`, and `same_tokens` says how many both begin with.

    ConvertError for what is no model or does not run in transformers, and for a prompt that it does not take.
    """
    from marlin_convert.commands import generate as story

    job = story.make_job(
        checkpoint, compare=compare, compare_revision=compare_revision, max_new_tokens=max_new_tokens,
        device=device, revision=revision, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    return story.generate(job, story.PROMPT if prompt is None else prompt)


def push(
    checkpoint: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str = "main",
    create_pr: bool = False,
    message: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    also: str | Iterable[str] = (),
    allow_unverified: bool = False,
    dry_run: bool = False,
) -> "Outcome":
    """Publish a verified checkpoint, a directory, on the Hugging Face Hub; a new repository is private.

    `releases` are what was prepared, with the card of each; `pushed` what the Hub holds now, empty after a
    dry run. The token is HF_TOKEN or that of 'hf auth login'.

    ConvertError says what stood in the way, and then no branch has changed.
    """
    from marlin_convert.commands import push as story

    job = story.Job(
        checkpoint=Path(checkpoint), repository=repo_id, branch=revision, private=private,
        create_pr=create_pr, message=message, base_model=base_model, license=license, also=names(also),
        allow_unverified=allow_unverified,
    )  # fmt: skip
    return story.push(job, dry_run=dry_run)


def inspect(checkpoint: str | Path, *, revision: str | None = None) -> dict[str, Any]:
    """Say what a checkpoint (a directory or a Hub id) contains, from its headers alone.

    The keys are those that `marlin-convert inspect --json` prints. ConvertError for what is no checkpoint.
    """
    from marlin_convert.commands import inspect as story
    from marlin_convert.hub import resolve

    return story.inspect(resolve(str(checkpoint), revision, only_look=True))


def _silent(blocks: range, total: int) -> Iterable[int]:
    return blocks


def _planned(job: "Job", plan: "Plan") -> Result:
    from marlin_convert.report import plan_json

    return Result(
        output=job.output,
        also=job.beside,
        seconds=0.0,
        source_bytes=plan.source_bytes,
        output_bytes=plan.output_bytes,
        bits_per_weight=plan.bits_per_weight,
        divergence=(),
        errors={},
        manifest={},
        plan=plan_json(plan, job, verbose=False),
    )


def _result(job: "Job", done: "Report") -> Result:
    manifest, plan = done.manifest, done.plan
    return Result(
        output=job.output,
        also=job.beside,
        seconds=round(done.seconds, 2),
        source_bytes=plan.source_bytes,
        output_bytes=plan.output_bytes,
        bits_per_weight=plan.bits_per_weight,
        divergence=tuple(manifest["divergence"]),
        errors={row["name"]: row["error"] for row in manifest["matrices"] if "error" in row},
        manifest=manifest,
    )
