"""The story of `verify`: named checks of a checkpoint; each passes, fails, or says why it could not run."""

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import partial, wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from marlin_convert import __version__, formats
from marlin_convert.calibration import Calibration, calibrate, load_tokenizer
from marlin_convert.card import CARD
from marlin_convert.checkpoint import manifest as manifests
from marlin_convert.checkpoint.linears import Weights
from marlin_convert.checkpoint.names import is_wrapped
from marlin_convert.checkpoint.reader import PICKLES, Checkpoint
from marlin_convert.checkpoint.writer import to_json, write_json, write_report
from marlin_convert.errors import ConvertError, FormatError, KernelError, SourceError, printable
from marlin_convert.evaluate import Comparison, compare, log_probabilities
from marlin_convert.formats import bounds
from marlin_convert.hub import Source, fetch, remote_files
from marlin_convert.models.blocks import BlockModel
from marlin_convert.models.tree import block_linears, check_names, claims_tied, module_tree
from marlin_convert.quantized import QuantizedLinear, contiguous_groups, first_crowded, quad_nonzeros

log = logging.getLogger("marlin_convert")

# In the order they are made.
CHECKS = ("files", "layout", "sparsity", "numbers", "kernel", "generate")

# Of a whole weight: rounding to 4 bits stays near 0.1, GPTQ near 0.15.
WEIGHT_ERROR = 0.5
# With half of the weights gone, and the others moved to make up for them.
PRUNED_WEIGHT_ERROR = 0.9
# Of the weights of one output: all zeros would be as near.
OUTPUT_ERROR = 1.0
# How far perplexity may rise over the source's.
PERPLEXITY = 2.0

# What may lie beside the files of a manifest.
BESIDE = (manifests.VERIFIED, manifests.VERIFIED + ".tmp", CARD)

FLOAT16_MAX = torch.finfo(torch.float16).max
PROBLEMS_SHOWN = 5

Progress = Callable[[range, int], Iterable[int]]
P = ParamSpec("P")


@dataclass(frozen=True)
class Job:
    """What is asked of one verification."""

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


@dataclass(frozen=True)
class Check:
    """What came of a check: pass, fail or skipped, and why."""

    status: str
    reason: str
    details: dict[str, Any] = field(default_factory=dict)


class _CannotRun(Exception):
    """What a check needs and is not there, in words for its reason."""


def _reporting(check: Callable[Concatenate[list[str], P], Check]) -> Callable[P, Check]:
    """The check, given a list for its problems: what it has put there is reported whatever stops it.

    Stopped before it has found any it is skipped, and said to have `stopped` where that was no _CannotRun.
    """

    @wraps(check)
    def run(*args: P.args, **kwargs: P.kwargs) -> Check:
        problems: list[str] = []
        try:
            return check(problems, *args, **kwargs)
        except _CannotRun as reason:
            found = Check("skipped", str(reason))
        except Exception as error:
            if not isinstance(error, ConvertError | torch.OutOfMemoryError):
                log.error("the check was stopped by a bug", exc_info=error)
            said = str(error) if isinstance(error, ConvertError) else f"{type(error).__name__}: {error}"
            found = Check("skipped", f"it stopped: {said.removesuffix('.')}", {"stopped": True})
        return _verdict([*problems, f"not finished: {found.reason}"], "") if problems else found

    return run


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


@dataclass(frozen=True)
class _Original:
    """The model a checkpoint was made from, and the text that both are run on."""

    name: str
    weights: Weights
    text: Calibration


@dataclass(frozen=True)
class _Subject:
    """The checkpoint, opened: its weights, and the model its config.json means."""

    weights: Weights
    model: PreTrainedModel
    manifest: dict[str, Any] | None


def verify(job: Job, progress: Progress = lambda blocks, total: blocks) -> Verification:
    """Run the checks; ConvertError when the checkpoint or the source is nothing that can be checked."""
    original = _open_original(job) if job.source and "numbers" in job.checks else None
    manifest, problems, unseen = _manifest(job)
    digest = None
    if manifest is not None:
        digest = manifests.sha256_file(job.checkpoint.directory / manifests.MANIFEST)
    subject = _open(job, manifest, problems)

    checks: dict[str, Callable[[], Check]] = {
        "files": partial(_check_files, subject, manifest, problems, unseen),
    }
    if subject is not None:
        checks["layout"] = partial(_check_layout, subject)
        checks["sparsity"] = partial(_check_sparsity, subject)
        checks["numbers"] = partial(_check_numbers, job, subject, original, progress)
        checks["kernel"] = partial(_check_kernel, job, subject)
        checks["generate"] = partial(_check_generate, job, subject)
    done = {}
    for name in CHECKS:
        if name not in job.checks and name == "generate":
            continue  # it needs the memory of the whole model: only when it is asked for
        if name not in job.checks:
            done[name] = Check("skipped", "not asked for")
        elif name not in checks:
            done[name] = Check("skipped", "the checkpoint cannot be opened")
        else:
            done[name] = checks[name]()
    # one that stopped half-way has not passed and found nothing: that is no success
    required = {name for name, check in done.items() if check.details.get("stopped")}
    required |= {"kernel"} if job.require_kernel else set()
    needed = {"files", "numbers"}
    if subject is None or subject.weights.scheme is not None:
        needed.add("layout")
    if subject is not None and subject.weights.sparse_linears(manifest):
        needed.add("sparsity")
    return Verification(job.checkpoint.name, digest, done, frozenset(required), frozenset(needed))


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
        write_report(report, to_json(done.to_dict()), "choose another file, or make room.")


def _open(job: Job, manifest: dict[str, Any] | None, problems: list[str]) -> _Subject | None:
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
        return _Subject(weights, model, manifest)
    except ConvertError as error:
        if not problems or "files" not in job.checks:
            raise
        problems.append(str(error))
        return None


def _open_original(job: Job) -> _Original:
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
    return _Original(job.source.name, weights, text)


# files


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


@_reporting
def _check_files(
    problems: list[str],
    subject: _Subject | None,
    manifest: dict[str, Any] | None,
    found: list[str],
    unseen: str | None,
) -> Check:
    """Files as in the manifest, tensors as in the architecture, values that float16 can hold."""
    problems += found
    counted = [f"{len(manifest['files'])} files" if manifest else "no manifest, so no sha256 to compare"]
    if subject is not None:
        weights = subject.weights
        try:
            left_out = check_names(weights, subject.model)
        except SourceError as error:
            problems.append(str(error))
            left_out = []
        problems += _engine_problems(subject)
        packed = weights.packed_names()
        for name in weights.checkpoint.tensors:
            if name not in left_out:
                problems += _value_problems(weights.checkpoint, name, scale=name in packed)
        counted.append(f"{len(weights.checkpoint.tensors)} tensors")
    if unseen is not None:
        counted.append(unseen)
    return _verdict(problems, ", ".join(counted), manifest=manifest is not None)


def _engine_problems(subject: _Subject) -> list[str]:
    """Where engines would load another model than the one checked here, or none."""
    problems = []
    if claims_tied(subject.weights, subject.model):
        problems.append(
            "config.json ties the head to the embedding and another head is stored: transformers takes that, "
            "vLLM and SGLang leave it out; write tie_word_embeddings = false"
        )
    if subject.weights.disregarded:
        problems.append(subject.weights.disregarded)
    if subject.weights.scheme is not None and subject.weights.scheme.beyond:
        problems.append(f"{subject.weights.scheme.beyond} are not checked, nor are weights without them")
    wrapped = [name for name in subject.weights.renamed.values() if is_wrapped(name)]
    if wrapped:
        problems.append(f"{len(wrapped)} tensors have names that no engine knows, like {wrapped[0]}")
    return problems


def _value_problems(checkpoint: Checkpoint, name: str, *, scale: bool) -> list[str]:
    """What is wrong with the values of a tensor; of a packed linear, the one with floats is its scales."""
    info = checkpoint.tensors[name]
    if not info.dtype.is_floating_point:
        return []
    try:
        tensor = checkpoint.read(name)
    except SourceError as error:
        return [str(error)]
    if tensor.dtype.itemsize == 1:
        tensor = tensor.float()
    if not tensor.numel():
        return [f"{name} is empty"]
    low, high = (value.item() for value in tensor.aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        return [f"{name} holds NaN or Inf"]
    if max(-low, high) > FLOAT16_MAX:
        return [f"{name} holds {max(-low, high):g}, which float16 cannot"]
    if scale and (zeros := int((tensor.half() == 0).sum())):
        return [f"{name} has {zeros} scales of zero (in float16)"]
    return []


# layout


@_reporting
def _check_layout(problems: list[str], subject: _Subject) -> Check:
    """Packed tensors that unpacking and packing leaves as they are; shapes and groups that engines load."""
    weights, model = subject.weights, subject.model
    linears = weights.packed_linears()
    if not linears:
        return Check("skipped", "no linear is packed")
    problems += _shape_problems(weights, model)
    problems += _stage_problems(weights, model)
    notes = set()
    for linear in linears:
        try:
            layer = weights.quantized(linear)
            problems += _linear_problems(linear, layer, model)
            found, note = _repack_problems(linear, layer, weights)
        except ConvertError as error:
            problems.append(str(error))
            continue
        problems += found
        notes |= {note} if note else set()
    kinds = Counter(weights.scheme_of(linear).format for linear in linears)
    counted = " and ".join(f"{count} {format}" for format, count in kinds.items())
    summary = "; ".join([f"{counted} linears", *sorted(notes)])
    return _verdict(problems, summary, linears=len(linears), notes=sorted(notes))


def _shape_problems(weights: Weights, model: PreTrainedModel) -> list[str]:
    """Dense tensors whose shape is not the architecture's."""
    tensors = weights.checkpoint.tensors
    return [
        f"{name} has shape {tensors[name].shape}, its config.json means {tuple(expected.shape)}"
        for name, expected in model.state_dict().items()
        if name in tensors and tensors[name].shape != tuple(expected.shape)
    ]


def _stage_problems(weights: Weights, model: PreTrainedModel) -> list[str]:
    """Linears that engines fuse into one (q, k and v; gate and up) packed in part, or in two layouts."""
    architecture = architecture_of(weights.checkpoint.config)
    linears = block_linears(model, architecture)
    problems = []
    for number in range(len(model.get_submodule(architecture.blocks))):  # type: ignore[arg-type]
        for stage in architecture.stages:
            names = [f"{architecture.blocks}.{number}.{path}" for path in stage]
            dense = [name for name in names if name in linears and not weights.is_packed(name)]
            if dense and len(dense) < len(names):
                problems.append(f"{' and '.join(dense)} dense, what engines fuse with it packed")
            layouts = {weights.scheme_of(name).format: name for name in names if weights.is_packed(name)}
            if len(layouts) > 1:
                found = " and ".join(f"{name} {format}" for format, name in layouts.items())
                problems.append(f"{found}, which engines fuse")
    return problems


def _linear_problems(linear: str, layer: QuantizedLinear, model: PreTrainedModel) -> list[str]:
    problems = []
    try:
        module = model.get_submodule(linear)
    except AttributeError:
        return [f"{linear} is not in the architecture"]
    expected = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    if (layer.k, layer.n) != expected:
        problems.append(
            f"{linear} has {layer.k} inputs and {layer.n} outputs, its config.json means {expected}"
        )
    if layer.group_of_row is not None:
        problems.append(
            f"{linear}: the groups of g_idx are not runs of {layer.group_size} rows; vLLM ignores them"
        )
    return problems


def _repack_problems(linear: str, layer: QuantizedLinear, weights: Weights) -> tuple[list[str], str | None]:
    """Tensors that unpacking and packing changes, and what could not be compared."""
    scheme = weights.scheme_of(linear)
    layout = formats.FORMATS[scheme.format]
    if not hasattr(layout, "pack"):
        return [], f"{scheme.format} is never written, so not packed again"
    note = None
    if layer.scales.dtype != torch.float16:
        note = f"scales are {str(layer.scales.dtype).removeprefix('torch.')}, only codes are compared"
        layer = replace(layer, scales=torch.ones_like(layer.scales, dtype=torch.float16))
    try:
        version = {"version": scheme.version} if scheme.format == "gptq" else {}
        packed = layout.pack(layer, **version)
    except ConvertError as error:
        return [f"{linear}: {error}"], note
    again = dict(zip(scheme.names or packed, packed.values(), strict=True))
    changed = []
    for suffix, name in weights.stored(linear).items():
        stored = weights.checkpoint.read(name)
        if note and stored.is_floating_point():
            continue
        if suffix in again and not torch.equal(stored, again[suffix].to(stored.dtype)):
            changed.append(f"{name} is not what packing its codes again gives")
    return changed, note


# sparsity


@_reporting
def _check_sparsity(problems: list[str], subject: _Subject) -> Check:
    """Every quad of every linear that is said to be 2:4, by the layout or by the manifest."""
    weights = subject.weights
    linears = weights.sparse_linears(subject.manifest)
    if not linears:
        return Check("skipped", "nothing is said to be 2:4")
    quads = good = unread = 0
    for linear in linears:
        try:
            held, crowded = _quads(weights, linear)
        except ConvertError as error:
            problems.append(str(error))
            unread += 1
            continue
        quads += held.numel()
        good += int((held <= 2).sum())
        problems += [f"{linear} is not 2:4: {crowded}"] if crowded else []
    # rounded down: 100 is all of them
    share = 10_000 * good // max(quads, 1) / 100
    summary = f"{share:.2f} % of {quads} quads"
    summary += f", {unread} linears cannot be read" if unread else ""
    check = _verdict(problems, summary, linears=len(linears), quads=quads, sparse_quads=good)
    return replace(check, reason=f"{summary}; {check.reason}") if problems else check


def _quads(weights: Weights, linear: str) -> tuple[Tensor, str | None]:
    """How many non-zeros every quad of a linear has, and what is wrong with the first that has too many."""
    if not weights.is_packed(linear):
        weight = weights.read(f"{linear}.weight")
        if weight.shape[1] % 4:
            raise SourceError(f"{linear} has {weight.shape[1]} inputs, which are no quads.")
        held = quad_nonzeros(weight)
        crowded = int((held > 2).sum())
        if not crowded:
            return held, None
        return held, (
            f"{crowded} of {held.numel()} quads have more than two non-zeros; {first_crowded(held)}"
        )
    layer = weights.quantized(linear)
    try:
        bounds.check_quads(layer)
    except FormatError as error:
        return layer.quad_weights(), str(error)
    return layer.quad_weights(), None


# numbers


@_reporting
def _check_numbers(
    problems: list[str], job: Job, subject: _Subject, original: _Original | None, progress: Progress
) -> Check:
    """Products of the packed linears and, beside the source, weights and predictions."""
    rounded = manifests.rounded_to_nearest(subject.manifest or {})
    problems += [f"{name} was rounded to nearest" for name in rounded] if job.strict else []
    if original is None and not subject.weights.packed_linears():
        return Check("skipped", "no linear is packed, and no --source was given")
    rows, unreadable = _compare_weights(problems, job, subject, original)
    details: dict[str, Any] = {"tolerance": job.tolerance, "rounded_to_nearest": rounded}
    details["weights"] = [{key: _json_number(value) for key, value in row.items()} for row in rows]
    products = [row["product_error"] for row in rows if "product_error" in row]
    summary = f"{len(products)} products, relative error at most {max(products, default=0.0):.1e}"
    if original is not None:
        errors = [row["error"] for row in rows if "product_error" in row and "error" in row]
        summary += f"; weight error at most {max(errors, default=0.0):.3f}"
        details["source"] = {"name": original.name}
        if unreadable:
            problems.append("the text was not run: not all weights can be read")
        else:
            try:
                text, overflows = _run_text(job, subject, original, progress)
            except ConvertError as error:
                problems.append(str(error))
            else:
                problems += overflows + _text_problems(text)
                details["text"] = _text_details(original.text, text)
    if rounded:
        summary += f"; {len(rounded)} linears rounded to nearest"
    return _verdict(problems, summary, **details)


def _compare_weights(
    problems: list[str], job: Job, subject: _Subject, original: _Original | None
) -> tuple[list[dict[str, Any]], bool]:
    """A row of figures for every weight, and whether some could not be compared."""
    weights, model = subject.weights, subject.model
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    names = [name for name in model.state_dict() if name in weights or name not in tied]
    generator = torch.Generator().manual_seed(0)
    sparse = set(weights.sparse_linears(subject.manifest))
    rows, unreadable = [], False
    for name in names:
        linear = name.removesuffix(".weight")
        packed = name.endswith(".weight") and weights.is_packed(linear)
        if original is None and not packed:
            continue
        row: dict[str, Any] = {"name": linear if packed else name}
        try:
            if packed:
                layer = weights.quantized(linear)
                row["product_error"] = _product_error(layer, generator)
                if not row["product_error"] <= job.tolerance:
                    problems.append(f"{linear}: product off by {row['product_error']:.2e} relative")
                weight = layer.dequantize()
            else:
                weight = weights.read(name)
            if original is not None:
                source = original.weights.read(name)
                if source.shape != weight.shape:
                    raise SourceError(
                        f"{name} has shape {tuple(weight.shape)}, in the source {tuple(source.shape)}"
                    )
                row["error"], row["worst_output"] = _weight_error(weight, source)
                problems += _weight_problems(row, PRUNED_WEIGHT_ERROR if linear in sparse else WEIGHT_ERROR)
        except ConvertError as error:
            problems.append(str(error))
            unreadable = True
        rows.append(row)
    return rows, unreadable


def _product_error(layer: QuantizedLinear, generator: torch.Generator) -> float:
    """How far x @ dequantized is, in float32, from the sum over groups of s (x (q - z)) in float64."""
    x = torch.randn(8, layer.k, generator=generator)
    group = layer.group_of_row
    if group is None:
        group = contiguous_groups(layer.k, layer.group_size)
    expected = torch.zeros(len(x), layer.n, dtype=torch.float64)
    for g in range(layer.groups):
        rows = (group == g).nonzero()[:, 0]
        zero = 1 << (layer.bits - 1) if layer.zeros is None else layer.zeros[g].double()
        codes = layer.codes[rows].double() - zero
        expected += layer.scales[g].double() * (x[:, rows].double() @ codes)
    got = (x @ layer.dequantize().t()).double()
    return ((got - expected).norm() / expected.norm().clamp_min(torch.finfo(torch.float32).tiny)).item()


def _weight_error(weight: Tensor, source: Tensor) -> tuple[float, float]:
    """The relative error of a weight, and the largest of one of its outputs."""
    if weight.dim() < 2:
        weight, source = weight[None], source[None]
    wrong, whole = [], []
    for ours, theirs in zip(weight.flatten(1).split(1024), source.flatten(1).split(1024), strict=True):
        theirs = theirs.float()
        wrong.append((ours.float() - theirs).square().sum(1))
        whole.append(theirs.square().sum(1))
    off, size = torch.cat(wrong), torch.cat(whole)
    tiny = torch.finfo(torch.float32).tiny
    error = (off.sum() / size.sum().clamp_min(tiny)).sqrt().item()
    return error, (off / size.clamp_min(tiny)).max().sqrt().item()


def _weight_problems(row: dict[str, Any], limit: float) -> list[str]:
    if not row["error"] <= limit:
        return [f"{row['name']} is {row['error']:.2f} from the source's, relative; at most {limit}"]
    if not row["worst_output"] <= OUTPUT_ERROR:
        return [
            f"{row['name']} has an output {row['worst_output']:.2f} from the source's, relative; "
            f"at most {OUTPUT_ERROR}"
        ]
    return []


def _run_text(
    job: Job, subject: _Subject, original: _Original, progress: Progress
) -> tuple[Comparison, list[str]]:
    """How the checkpoint predicts the text beside its source, and what of it a float16 engine cannot hold."""
    models = [
        BlockModel(weights, job.device, fast=False, trust_remote_code=job.trust_remote_code)
        for weights in (original.weights, subject.weights)
    ]
    blocks = [len(model) for model in models]
    if blocks[0] != blocks[1]:
        raise SourceError(f"the source has {blocks[0]} blocks, the checkpoint {blocks[1]}")
    vocabulary = subject.model.config.vocab_size
    if original.text.ids.max() >= vocabulary:
        raise SourceError(
            f"the tokenizer gives id {int(original.text.ids.max())}, there are {vocabulary} embeddings"
        )
    found = compare(models[0], models[1], original.text.ids, progress)
    overflows = [
        f"{linear} takes or gives {most:.3g}, which float16 cannot hold: an engine computes infinity; "
        "--dtype bfloat16 writes it for a type that can"
        for linear, most in models[1].overflows.items()
    ]
    return found, overflows


def _text_problems(found: Comparison) -> list[str]:
    if not (math.isfinite(found.perplexity) and math.isfinite(found.divergence)):
        return [f"perplexity is {found.perplexity}, divergence {found.divergence}"]
    if found.perplexity > PERPLEXITY * found.source_perplexity:
        return [
            f"perplexity is {found.perplexity:.4g}, the source's {found.source_perplexity:.4g}; "
            f"at most {PERPLEXITY} times as much"
        ]
    return []


def _text_details(text: Calibration, found: Comparison) -> dict[str, Any]:
    samples, length = text.ids.shape
    return {
        "name": text.source,
        "samples": samples,
        "sequence_length": length,
        "sha256": text.digest,
        **{name: _json_number(value) for name, value in asdict(found).items()},
    }


# kernel


BATCHES = (1, 16, 17, 64, 257, 2048)

# Nats a token between the checkpoint on the kernel and the same weights dequantized, both in 16 bits.
KERNEL_DIVERGENCE = 2e-3

# Nats by which the dequantized model may prefer its likeliest token to the one the kernel finds likeliest.
KERNEL_MARGIN = 0.1


class _OnKernel(BlockModel):
    """The checkpoint with every packed linear multiplied by the kernel."""

    def load(self, i: int) -> nn.Module:
        """Block i, as the kernel takes it."""
        block = super().load(i)
        for path, module in block.named_modules():
            linear = f"{self.name(i)}.{path}"
            if isinstance(module, nn.Linear) and self.weights.is_packed(linear):
                layer, format = self.weights.quantized(linear), self.weights.scheme_of(linear).format
                kernel = _on_kernel(layer, format, self.device, module.bias)
                module.forward = kernel.forward  # type: ignore[method-assign]
        return block

    def unload(self, i: int) -> None:
        """Free the weights of block i."""
        for module in self.blocks[i].modules():
            module.__dict__.pop("forward", None)
        super().unload(i)


def _on_kernel(
    layer: QuantizedLinear, format: str, device: torch.device, bias: Tensor | None = None
) -> nn.Module:
    """A layer as the module that runs its layout's kernel, or marlin's where its layout has none.

    FormatError when that kernel's layout cannot hold it.
    """
    from marlin_convert.kernels.matmul import LINEARS

    layout = format if format in LINEARS else "marlin"
    return LINEARS[layout](**formats.FORMATS[layout].pack(layer), bias=bias).to(device)


@_reporting
def _check_kernel(problems: list[str], job: Job, subject: _Subject) -> Check:
    """Every packed linear through the kernel, then the whole model, each against its dequantized weights."""
    from marlin_convert.kernels.compile import architecture

    layouts = {
        linear: subject.weights.scheme_of(linear).format for linear in subject.weights.packed_linears()
    }
    if not torch.cuda.is_available():
        return Check("skipped", "no CUDA GPU here")
    if job.device.type != "cuda":
        return Check("skipped", f"--device {job.device}")
    if not layouts:
        return Check("skipped", "no linear is packed")
    try:
        architecture(torch.cuda.get_device_capability(job.device))
    except KernelError as error:
        return Check("skipped", str(error).removesuffix("."))
    rows, refused, worst = [], [], 0.0
    for linear, format in layouts.items():
        try:
            found = _kernel_error(subject.weights.quantized(linear), format, job.device)
        except FormatError as error:
            refused.append(f"{linear}: {error}")
            continue
        rows.append({"name": linear, "error": _json_number(found)})
        worst = found if math.isnan(found) else max(worst, found)
        if not found <= job.tolerance:
            problems.append(f"{linear}: the kernel is {found:.1e} off, relative; at most {job.tolerance}")
        log.debug("%s: kernel error %.1e", linear, found)
    if refused:
        raise _CannotRun(
            f"the kernel cannot hold {len(refused)} of {len(layouts)} linears, the first {refused[0]}; "
            f"{len(rows)} were compared, the whole model was not run"
        )
    text = _run_kernel(job, subject)
    if not text.divergence <= KERNEL_DIVERGENCE:
        problems.append(
            f"the whole model on the kernel has divergence {text.divergence:.1e}, at most {KERNEL_DIVERGENCE}"
        )
    if not text.margin <= KERNEL_MARGIN:
        problems.append(
            f"a greedy token on the kernel is {text.margin:.2g} nats less likely than that of the same "
            f"weights dequantized, at most {KERNEL_MARGIN}"
        )
    summary = (
        f"{len(rows)} linears at {len(BATCHES)} batch sizes on {torch.cuda.get_device_name(job.device)}, "
        f"relative error at most {worst:.1e}; whole model: divergence {text.divergence:.1e}, "
        f"{text.agreement:.2%} of the greedy tokens, others within {text.margin:.1e} nats"
    )
    figures = {name: _json_number(value) for name, value in asdict(text).items()}
    return _verdict(problems, summary, tolerance=job.tolerance, linears=rows, model=figures)


def _kernel_error(layer: QuantizedLinear, format: str, device: torch.device) -> float:
    """The largest error of the kernel's product from the one in float64 over the batch sizes, relative."""
    from marlin_convert.kernels.matmul import reference

    kernel = _on_kernel(layer, format, device)
    here = replace(layer, codes=layer.codes.to(device), scales=layer.scales.to(device), zeros=None)
    draw = torch.Generator(device).manual_seed(0)
    x = torch.randn(max(BATCHES), layer.k, device=device, dtype=torch.float16, generator=draw)
    expected = reference(x, here)
    errors = []
    for batch in BATCHES:
        off = kernel(x[:batch]).double() - expected[:batch]
        errors.append((off.norm() / expected[:batch].norm()).item())
    return max(errors, key=lambda error: math.inf if math.isnan(error) else error)


def _run_kernel(job: Job, subject: _Subject) -> Comparison:
    """The model on the kernel beside the model of the same weights, on random tokens."""
    models = [
        kind(subject.weights, job.device, fast=False, trust_remote_code=job.trust_remote_code)
        for kind in (BlockModel, _OnKernel)
    ]
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(subject.model.config.vocab_size, (4, 256), generator=draw)
    return compare(models[0], models[1], ids)


# generate


# Sequences of random tokens, their length, and how many tokens transformers adds to each.
PROMPTS, PROMPT, ANSWER = 2, 32, 16

# Nats between 16 bits there and float32 here; rounding takes 0.014 of it in float16, 0.04 in bfloat16.
GENERATE_DIFFERENCE = 0.1


@_reporting
def _check_generate(problems: list[str], job: Job, subject: _Subject) -> Check:
    """What transformers makes of the directory: greedy tokens, and how likely they are by our own reading."""
    from transformers import AutoModelForCausalLM

    directory = job.checkpoint.directory
    draw = torch.Generator().manual_seed(0)
    prompts = torch.randint(subject.model.config.vocab_size, (PROMPTS, PROMPT), generator=draw)
    try:
        loaded: nn.Module = AutoModelForCausalLM.from_pretrained(
            directory, dtype="auto", trust_remote_code=job.trust_remote_code
        )
    except ImportError as error:
        return Check("skipped", f"transformers needs more for this layout: {_first_line(error)}")
    except Exception as error:  # whatever transformers does with a directory it does not like
        said = f"{type(error).__name__}: {_first_line(error)}"
        return _verdict([f"transformers cannot load it: {said}"], "")
    loaded = loaded.to(job.device).eval()
    ids = prompts.to(job.device)
    try:
        with torch.inference_mode():
            answered = loaded.generate(  # type: ignore[operator]
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=ANSWER, min_new_tokens=ANSWER,
                do_sample=False, eos_token_id=None, pad_token_id=0, output_logits=True,
                return_dict_in_generate=True,
            )  # fmt: skip
    except (ConvertError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # as above
        return _verdict([f"transformers cannot run it: {type(error).__name__}: {_first_line(error)}"], "")
    del loaded
    found = torch.stack(answered.logits, 1).float().log_softmax(-1).cpu()
    sequences = answered.sequences.cpu()
    expected = log_probabilities(
        BlockModel(subject.weights, job.device, fast=False, trust_remote_code=job.trust_remote_code),
        sequences,
    )[:, PROMPT - 1 : -1]
    tokens = sequences[:, PROMPT:, None]
    chosen = expected.gather(-1, tokens)[..., 0]
    difference = (found.gather(-1, tokens)[..., 0] - chosen).abs().max().item()
    margin = (expected.amax(-1) - chosen).max().item()
    if not difference <= GENERATE_DIFFERENCE:
        problems.append(
            f"a token of transformers is {difference:.2g} nats from its likelihood here; at most "
            f"{GENERATE_DIFFERENCE}"
        )
    if not margin <= GENERATE_DIFFERENCE:
        problems.append(
            f"a greedy token of transformers is {margin:.2g} nats less likely than the best; at most "
            f"{GENERATE_DIFFERENCE}"
        )
    summary = f"{tokens.numel()} greedy tokens by transformers, within {max(difference, margin):.1e} nats"
    return _verdict(problems, summary, difference=_json_number(difference), margin=_json_number(margin))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def _verdict(problems: list[str], summary: str, **details: Any) -> Check:
    if not problems:
        return Check("pass", summary, details)
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return Check("fail", problems[0] + more, {"problems": problems, **details})


def _json_number(value: Any) -> Any:
    """Six digits of a float, None where JSON has no number for it."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None


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
        f"{'perplexity':24}{shown(text['source_perplexity']):>{width}}{shown(text['perplexity']):>{width}}",
        f"{'KL divergence':24}{'':{width}}{shown(text['divergence']):>{width}}",
        f"{'same likeliest token':24}{'':{width}}{shown(text['agreement']):>{width}}",
        f"({text['tokens']} predicted tokens, {text['samples']} x {text['sequence_length']})",
        "",
    ]
