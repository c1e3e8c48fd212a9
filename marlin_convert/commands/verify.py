"""The story of `verify`: named checks of a checkpoint; each passes, fails, or says why it could not run."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from marlin_convert import __version__
from marlin_convert.calibration import calibrate, load_tokenizer
from marlin_convert.card import CARD
from marlin_convert.checkpoint import manifest as manifests
from marlin_convert.checkpoint.linears import Weights
from marlin_convert.checkpoint.reader import PICKLES, Checkpoint
from marlin_convert.checkpoint.writer import check_report, to_json, write_json, write_report
from marlin_convert.checks import CHECKS, files, generate, kernel, layout, numbers, sparsity
from marlin_convert.checks.divergence import Progress
from marlin_convert.checks.outcome import Check
from marlin_convert.checks.subject import Original, Subject
from marlin_convert.errors import ConvertError, OptionError, SourceError, printable
from marlin_convert.hub import Source, fetch, remote_files, resolve
from marlin_convert.models.tree import module_tree
from marlin_convert.options import check_place, names, pick_device
from marlin_convert.page import html
from marlin_convert.ranks import ALONE, Ranks
from marlin_convert.shared import check_alike, check_samples

log = logging.getLogger("marlin_convert")

# What may lie beside the files of a manifest.
BESIDE = (manifests.VERIFIED, manifests.VERIFIED + ".tmp", CARD)

PROBLEMS_SHOWN = 5

# What several ranks share: linear after linear, and the text. All else is done by the first of them.
SHARED = frozenset({"layout", "sparsity", "numbers"})


@dataclass(frozen=True)
class Job:
    """What is asked of one verification; `ranks` are the processes that share the work."""

    checkpoint: Source
    checks: frozenset[str]
    device: torch.device
    source: Source | None = None
    require_kernel: bool = False
    strict: bool = False
    tolerance: float = 1e-3
    text: str = "builtin"
    samples: int = 16
    sequence_length: int = 1024
    trust_remote_code: bool = False
    ranks: Ranks = ALONE


@dataclass(frozen=True)
class Verification:
    """What came of all checks; `manifest_sha256` says of which files, None without a manifest.

    `required` must be able to run. `needed`, asked for or not, must pass for the checkpoint to be verified.
    """

    checkpoint: str
    manifest_sha256: str | None
    checks: dict[str, Check]
    required: frozenset[str]
    needed: frozenset[str]

    @property
    def failed(self) -> bool:
        """Whether a check failed."""
        return any(check.status == "fail" for check in self.checks.values())

    @property
    def passed(self) -> bool:
        """Whether nothing that was asked for failed, or was required in vain: then the exit status is 0."""
        return not self.failed and not self.could_not_run

    @property
    def verified(self) -> bool:
        """Whether the checkpoint counts as verified: all that is needed passed, and nothing else failed."""
        return self.passed and all(self.checks[name].status == "pass" for name in self.needed)

    @property
    def could_not_run(self) -> list[str]:
        """The required checks that were skipped."""
        return [name for name in self.required if self.checks[name].status == "skipped"]

    def to_dict(self) -> dict[str, Any]:
        """The report: no times and no paths, so that the same files give the same report."""
        return {
            "tool": f"marlin-convert {__version__}",
            "checkpoint": self.checkpoint,
            "manifest_sha256": self.manifest_sha256,
            "checks": {name: asdict(check) for name, check in self.checks.items()},
            "needed": sorted(self.needed),
            "passed": self.passed,
            "verified": self.verified,
        }


def make_job(
    checkpoint: str | Path,
    *,
    source: str | Path | None,
    source_revision: str | None,
    checks: str | Iterable[str],
    device: str,
    revision: str | None,
    report: str | Path | None,
    ranks: Ranks = ALONE,
    **settings: Any,
) -> Job:
    """What is asked of `verify` by its options; ConvertError for what they do not take."""
    chosen = frozenset(names(checks))
    if unknown := chosen - set(CHECKS):
        raise OptionError(f"--checks: {min(unknown)!r} is not one of {', '.join(CHECKS)}.")
    for name, least in (("samples", 1), ("sequence_length", 2)):
        if type(settings[name]) is not int or settings[name] < least:
            raise OptionError(f"{name} must be a number of at least {least}, not {settings[name]!r}.")
    if not isinstance(settings["tolerance"], int | float) or not settings["tolerance"] > 0:
        raise OptionError(f"tolerance must be a number above 0, not {settings['tolerance']!r}.")
    if not ranks.alone and not chosen & SHARED:
        raise ConvertError(
            f"--checks {','.join(name for name in CHECKS if name in chosen)} is the work of one process, "
            f"torchrun started {ranks.count}.",
            "run it without torchrun.",
        )
    if source is not None and "numbers" in chosen:
        check_samples(ranks, settings["samples"])
    if report is not None:
        check_place(Path(report))
    where, code = pick_device(device), settings["trust_remote_code"]
    job = Job(
        checkpoint=resolve(str(checkpoint), revision, code=code),
        source=None if source is None else resolve(str(source), source_revision, code=code),
        checks=chosen,
        device=where,
        ranks=ranks,
        **settings,
    )
    if report is not None:
        check_report(Path(report), job.checkpoint.directory)
        if Path(report).suffix == ".html":
            _conversion(job)
    return job


def verify(job: Job, progress: Progress = lambda blocks, total: blocks) -> Verification:
    """Run the checks; ConvertError when the checkpoint or the source is nothing that can be checked."""
    ranks = job.ranks
    original = _open_original(job) if job.source and "numbers" in job.checks else None
    manifest, problems, unseen = ranks.told(_manifest(job) if ranks.first else None)
    digest = None
    if manifest is not None:
        digest = manifests.sha256_file(job.checkpoint.directory / manifests.MANIFEST)
    subject = _open(job, manifest, problems)
    check_alike(ranks, _settings(job, digest, subject, original))

    checks: dict[str, Callable[[], Check]] = {
        "files": partial(files.check, subject, manifest, problems, unseen),
    }
    if subject is not None:
        checks["layout"] = partial(layout.check, subject)
        checks["sparsity"] = partial(sparsity.check, subject)
        checks["numbers"] = partial(
            numbers.check, subject, original, progress, tolerance=job.tolerance, strict=job.strict
        )
        checks["kernel"] = partial(kernel.check, subject, job.tolerance)
        checks["generate"] = partial(generate.check, subject)
    done = {}
    for name in CHECKS:
        if not ranks.first and name not in SHARED:
            continue
        if name not in job.checks and name == "generate":
            continue  # it needs the memory of the whole model: only when it is asked for
        if name not in job.checks:
            done[name] = Check("skipped", "not asked for")
        elif name not in checks:
            done[name] = Check("skipped", "the checkpoint cannot be opened")
        else:
            by = "" if ranks.alone or name in SHARED else ", by the first process alone"
            log.info("checking %s%s", name, by)
            done[name] = checks[name]()
    if not ranks.first:
        return ranks.told()
    # one that stopped half-way has not passed and found nothing: that is no success
    required = {name for name, check in done.items() if check.details.get("stopped")}
    required |= {"kernel"} if job.require_kernel else set()
    needed = {"files", "numbers"}
    if subject is None or subject.weights.scheme is not None:
        needed.add("layout")
    if subject is not None and subject.weights.sparse_linears(manifest):
        needed.add("sparsity")
    whole = Verification(job.checkpoint.name, digest, done, frozenset(required), frozenset(needed))
    return ranks.told(whole)


def save(done: Verification, job: Job, report: Path | None = None) -> None:
    """Write the report of a whole or failed verification beside our manifest, and where it is asked."""
    # a part of the checks does not take the place of all, unless it takes back that they passed
    worth_keeping = done.needed <= job.checks or done.failed
    if worth_keeping and done.manifest_sha256 is not None and job.checkpoint.commit is None:
        try:
            write_json(job.checkpoint.directory / manifests.VERIFIED, done.to_dict())
        except OSError as error:
            log.warning("the report cannot be written into %s: %s", job.checkpoint.name, error.strerror)
    if report is not None:
        said = _page(job, done) if report.suffix == ".html" else to_json(done.to_dict())
        write_report(report, said, "choose another file, or make room.")


def _page(job: Job, done: Verification) -> str:
    """The report as a page."""
    return html(_conversion(job), done.to_dict())


def _conversion(job: Job) -> dict[str, Any]:
    """The manifest, for a page that is of the conversion too; ConvertError where nothing is known of that."""
    manifest = manifests.load(job.checkpoint.directory)
    if manifest is None:
        raise ConvertError(
            f"{job.checkpoint.name} has no manifest of marlin-convert, and a page is of a conversion too.",
            "name a file.json for --report.",
        )
    return manifest


def _settings(
    job: Job, digest: str | None, subject: Subject | None, original: Original | None
) -> dict[str, Any]:
    """What all ranks must have alike."""
    return {
        "tool": f"marlin-convert {__version__}",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "device": job.device.type,
        "manifest": digest,
        "checkpoint": None if subject is None else subject.weights.checkpoint.fingerprint(),
        "source": None if original is None else original.weights.checkpoint.fingerprint(),
        "text": None if original is None else original.text["sha256"],
    }


def _open(job: Job, manifest: dict[str, Any] | None, problems: list[str]) -> Subject | None:
    """The checkpoint, or None where it cannot be opened, which `problems` then tell; what is none raises."""
    directory = job.checkpoint.directory
    try:
        checkpoint = Checkpoint.open(directory)
    except SourceError as error:
        no_model = manifest is None and not problems and not (directory / "config.json").exists()
        if no_model or "files" not in job.checks:
            raise
        problems.append(str(error))
        return None
    try:
        weights = Weights(checkpoint)
        model = module_tree(weights, trust_remote_code=job.trust_remote_code)
        return Subject(weights, model, manifest, job.device, job.trust_remote_code, job.ranks)
    except ConvertError as error:
        if not problems or "files" not in job.checks:
            raise
        problems.append(str(error))
        return None


def _open_original(job: Job) -> Original:
    assert job.source is not None
    if job.source.directory.samefile(job.checkpoint.directory):
        raise ConvertError(
            f"--source is the checkpoint itself, '{job.checkpoint.name}': nothing would be compared.",
            "give the model that it was made from.",
        )
    weights = Weights(Checkpoint.open(job.source.directory))
    tokenizer = load_tokenizer(job.source, trust_remote_code=job.trust_remote_code)
    text = calibrate(
        tokenizer, job.text, samples=job.samples, length=job.sequence_length, seed=0, held_out=True
    )
    samples, length = text.ids.shape
    said = {"name": text.source, "samples": samples, "sequence_length": length, "sha256": text.digest}
    return Original(job.source.name, weights, text.ids, said)


def _manifest(job: Job) -> tuple[dict[str, Any] | None, list[str], str | None]:
    """The manifest, what is wrong with it or with its files, if they are checked, and what went unseen."""
    directory = job.checkpoint.directory
    try:
        manifest = manifests.load(directory)
    except SourceError as error:
        return None, [str(error)], None
    if manifest is None or "files" not in job.checks:
        return manifest, [], None
    problems, unseen = [], None
    if job.checkpoint.commit is not None:
        try:
            problems += _compare_with_repository(job.checkpoint, manifest)
        except SourceError as error:
            unseen = f"what else is in the repository was not looked at: {str(error).removesuffix('.')}"
    try:
        problems += manifests.check_files(directory, manifest, BESIDE)
    except SourceError as error:
        problems.append(str(error))
    return manifest, problems, unseen


def _compare_with_repository(checkpoint: Source, manifest: dict[str, Any]) -> list[str]:
    """What a repository has beside the files of its manifest; those that are not here are fetched.

    Only what a conversion needs is fetched to begin with. Code is looked at here, not run.
    """
    there = remote_files(checkpoint)
    for name in sorted(there & manifest["files"].keys()):
        if not name.endswith(PICKLES) and not (checkpoint.directory / name).exists():
            fetch(checkpoint, name)
    added = there - manifest["files"].keys() - {manifests.MANIFEST, *manifests.COPY_KEEPING, *BESIDE}
    return [f"{name!r} is in the repository and not in the manifest" for name in sorted(added)]


def text(done: Verification, words: str, *, local: bool, verbose: bool = False) -> str:
    """The checks as a table, the figures beside the source's, and the next command to type.

    `words` name the checkpoint on a command line, `local` says that it is a directory.
    """
    lines = []
    for name, check in done.checks.items():
        lines.append(f"{name:8} {check.status:8} {check.reason}")
        problems = check.details.get("problems", [])
        shown = problems if verbose else problems[:PROBLEMS_SHOWN]
        if len(problems) > 1:
            lines += [f"{'':18}{problem}" for problem in shown]
        if len(problems) > len(shown):
            lines.append(f"{'':18}... {len(problems) - len(shown)} more with -v")
    figures = done.checks["numbers"].details
    lines += [f"rounded to nearest: {name}" for name in figures.get("rounded_to_nearest", [])]
    if "text" in figures:
        lines += _figures(figures["source"]["name"], done.checkpoint, figures["text"])
    if not done.failed and not done.could_not_run:
        ours = local and done.manifest_sha256 is not None
        following = f"inspect {words}"
        if ours and done.verified:
            following = f"push {words} you/{done.checkpoint}"
        elif ours and "numbers" in done.needed and done.checks["numbers"].status == "skipped":
            following = f"verify {words} --source MODEL"
        lines.append(f"Next: marlin-convert {following}")
    return "\n".join(printable(line) for line in lines)


def _figures(source: str, checkpoint: str, text: dict[str, Any]) -> list[str]:
    """Source and checkpoint side by side."""

    def shown(value: float | None) -> str:
        return "not finite" if value is None else f"{value:.4f}"

    width = max(len(source), len(checkpoint), 10) + 2
    return [
        "",
        f"{'on ' + text['name']:24}{source:>{width}}{checkpoint:>{width}}",
        f"{'KL divergence':24}{'':{width}}{shown(text['divergence']):>{width}}",
        f"{'perplexity':24}{shown(text['source_perplexity']):>{width}}{shown(text['perplexity']):>{width}}",
        f"{'same likeliest token':24}{'':{width}}{shown(text['agreement']):>{width}}",
        f"{'hidden states off by':24}{'':{width}}{shown(text['hidden'][-1]):>{width}}",
        f"({text['tokens']} predicted tokens, {text['samples']} x {text['sequence_length']})",
        "",
    ]
