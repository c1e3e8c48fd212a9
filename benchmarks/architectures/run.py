"""Every type of model that transformers has, tiny, through conversion, `verify` and an independent reader.

    python benchmarks/architectures/run.py [--write FILE.md] [--sample | TYPE ...]

A type is done where it is converted to gptq, compressed-tensors and (where shapes allow) marlin, `verify`
finds nothing, and plain transformers, over weights dequantized by the formulas alone, gives the logits of our
walk. Else the reason is shown. Anything in between is a failure, and the exit status is 1.
"""

import argparse
import contextlib
import io
import json
import logging
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from marlin_convert import recipe
from marlin_convert.checkpoint.linears import Weights
from marlin_convert.checkpoint.reader import Checkpoint
from marlin_convert.checks.divergence import log_probabilities
from marlin_convert.commands import quantize, verify
from marlin_convert.errors import ConvertError
from marlin_convert.formats import FORMATS, detect
from marlin_convert.hub import Source
from marlin_convert.models.blocks import BlockModel

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "tests")]
import plain_reading  # noqa: E402
import tiny  # noqa: E402

TOKENIZER = HERE.parents[1] / "examples" / "tinypy-4m"
WRITTEN = ("gptq", "compressed-tensors", "marlin")
# Of logits, relative to their spread: two ways to compute one model in float32.
TOLERANCE = 1e-3
LIMIT = 300  # seconds for a type


def convert(model_type: str, directory: Path) -> dict[str, Any]:
    """What becomes of a type: `formats` done, with how many matrices packed, or why it is refused."""
    source = directory / "source"
    try:
        model = tiny.build(model_type)
    except Exception as error:  # nothing of ours
        return {"unbuilt": f"{type(error).__name__}: {error}"}
    with contextlib.redirect_stdout(io.StringIO()):
        model.save_pretrained(source)
    for path in (*TOKENIZER.glob("tokenizer*"), TOKENIZER / "generation_config.json"):
        shutil.copy(path, source)
    found: dict[str, Any] = {"formats": {}, "class": type(model).__name__}
    for format in WRITTEN:
        try:
            found["formats"][format] = one(source, format, directory / format, type(model))
        except ConvertError as error:
            found["formats"][format] = {"refused": str(error), "hint": error.hint}
    return found


def one(source: Path, format: str, output: Path, kind: type) -> dict[str, Any]:
    """A conversion, verified and read by plain transformers; ConvertError where it is refused."""
    settings: dict[str, Any] = {"format": format, "samples": 4, "sequence_length": 64, "sweeps": 0}
    skipped: tuple[str, ...] = ()
    chosen = recipe.Recipe().changed(settings)
    job = quantize.Job(Source(source, source.parent.name, None), output, chosen, torch.device("cpu"))
    try:
        report = quantize.quantize(job)
    except ConvertError as error:
        # the way out that is named for linears of odd sizes, and no other
        skipped = tuple(way_out(error.hint or "", format))
        if not skipped:
            raise
        job = quantize.Job(job.source, output, chosen.changed({"skip": skipped}), job.device)
        report = quantize.quantize(job)
    checked = verify.verify(
        verify.Job(
            Source(output, "out", None), frozenset({"files", "layout", "numbers"}), job.device,
            source=job.source, samples=2, sequence_length=64,
        )
    )  # fmt: skip
    problems = {name: check.reason for name, check in checked.checks.items() if check.status == "fail"}
    # random weights have no perplexity to speak of
    problems = {name: why for name, why in problems.items() if "perplexity" not in why}
    if problems:
        raise RuntimeError(f"verify: {problems}")
    difference = compare(output, output.with_name(f"{format}-plain"), kind)
    if not difference < TOLERANCE:
        raise RuntimeError(f"{format}: logits differ by {difference:.2g} of their spread")
    plan = report.plan
    return {"packed": len(plan.packed), "dense": len(plan.dense), "skipped": skipped}


def way_out(hint: str, format: str) -> Iterator[str]:
    """The patterns of the first way of a hint, if it changes nothing else."""
    words = shlex.split(re.split(r" packs | leaves |; ", hint)[0]) if "--skip" in hint else []
    if "--format" in words or "--group-size" in words:
        parts = [part for part in hint.split(";") if "--format" not in part]
        words = shlex.split(parts[-1].rstrip(".").split(" packs ")[0]) if "--skip" in parts[-1] else []
    for option, value in pairwise(words):
        if option == "--skip":
            yield value


def compare(output: Path, plain: Path, kind: type) -> float:
    """How far transformers, over weights dequantized by the formulas, is from our walk, in spreads of one."""
    tensors, config = {}, json.loads((output / "config.json").read_text())
    for shard in output.glob("*.safetensors"):
        tensors |= load_file(shard)
    scheme = detect(config.pop("quantization_config"))
    first, *others = FORMATS[scheme.format].SUFFIXES
    packed = [name.removesuffix(f".{first}") for name in tensors if name.endswith(f".{first}")]
    gone = {f"{linear}.{suffix}" for linear in packed for suffix in (first, *others)}
    dense = {name: tensor for name, tensor in tensors.items() if name not in gone}
    for linear in packed:
        weight = plain_reading.weight(tensors, linear, scheme.of(linear))
        dense[f"{linear}.weight"] = torch.from_numpy(weight.copy())
    plain.mkdir()
    (plain / "config.json").write_text(json.dumps(config))
    save_file(dense, plain / "model.safetensors", {"format": "pt"})
    model, loading = kind.from_pretrained(plain, dtype=torch.float32, output_loading_info=True)
    if any(name.endswith(("experts.gate_up_proj", "experts.up_proj")) for name in loading["missing_keys"]):
        # of a type whose experts are stacked in files, which transformers takes in no other way
        save_file(stacked(dense, model), plain / "model.safetensors", {"format": "pt"})
        model, loading = kind.from_pretrained(plain, dtype=torch.float32, output_loading_info=True)
    if loading["missing_keys"] or loading["unexpected_keys"]:
        raise RuntimeError(f"transformers does not load it: {loading}")
    ids = torch.randint(5, 3900, (2, 48), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        theirs = model.eval()(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
        weights = Weights(Checkpoint.open(output))
        ours = log_probabilities(BlockModel(weights, torch.device("cpu"), fast=False), ids)
    return float((theirs - ours).abs().max() / theirs.std())


def stacked(dense: dict[str, torch.Tensor], model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The tensors with those of experts stacked as the modules of a model have them."""
    found = dict(dense)
    for name in dense:
        if match := re.fullmatch(r"(.*\.moe)\.experts\.0\.(\w+\.weight)", name):  # of Step 3.7
            around, role = match.groups()
            rows = [one for one in dense if re.fullmatch(rf"{re.escape(around)}\.experts\.\d+\.{role}", one)]
            found[f"{around}.{role}"] = torch.stack(
                [found.pop(f"{around}.experts.{i}.{role}") for i in range(len(rows))]
            )
    hidden = model.config.get_text_config().hidden_size
    for path, module in model.named_modules():
        if not hasattr(module, "is_transposed") and not path.endswith(".experts"):
            continue
        # of Llama 4, whose experts do not say how they are stacked
        transposed = getattr(module, "is_transposed", module.down_proj.shape[-1] == hidden)
        biases, concatenated = getattr(module, "has_bias", False), getattr(module, "is_concatenated", True)
        inside = re.compile(
            rf"^(.*\b)?{re.escape(path)}\.(\d+)\.(gate_proj|up_proj|down_proj)\.(weight|bias)$"
        )
        mine = {match.groups()[1:]: found.pop(name) for name in dense if (match := inside.match(name))}
        if not mine:
            continue
        count = 1 + max(int(number) for number, _, _ in mine)
        for kind in ("weight", "bias") if biases else ("weight",):
            for name, parts in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
                rows = []
                for i in range(count):
                    both = [mine[str(i), part, kind] for part in parts]
                    whole = torch.cat(both) if concatenated else torch.stack(both, 1).flatten(0, 1)
                    rows.append(whole.T if transposed and kind == "weight" else whole)
                found[f"{path}.{name}" + ("_bias" if kind == "bias" else "")] = torch.stack(rows).contiguous()
    return found


def child(model_type: str, place: Path) -> None:
    """One type in a process of its own, which may be killed or run out of time."""
    signal.alarm(LIMIT)
    started = time.monotonic()
    logging.getLogger("marlin_convert").setLevel(logging.ERROR)
    directory = place.with_suffix("")
    directory.mkdir()
    try:
        found = convert(model_type, directory)
    except BaseException as error:
        found = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())}"[:600]}
        if os.environ.get("TRACEBACK"):
            raise
    place.write_text(json.dumps(found | {"seconds": round(time.monotonic() - started, 1)}))
    shutil.rmtree(directory)


def run(todo: list[str], workers: int) -> dict[str, dict[str, Any]]:
    """Every type, a few at a time."""
    found: dict[str, dict[str, Any]] = {}
    running: dict[int, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        places = {name: Path(folder) / f"{name}.json" for name in todo}
        queue = list(todo)
        while queue or running:
            while queue and len(running) < workers:
                name = queue.pop(0)
                process = os.fork()
                if not process:
                    try:
                        child(name, places[name])
                    finally:
                        os._exit(0)
                running[process] = name
            process, status = os.wait()
            name = running.pop(process)
            place = places[name]
            ended = {"failed": f"its process ended with {os.waitstatus_to_exitcode(status)}"}
            found[name] = json.loads(place.read_text()) if place.exists() else ended
            print(f"{len(found):4} of {len(todo)}  {name:28} {said(found[name])}", flush=True)
    return {name: found[name] for name in todo}


def is_done(found: dict[str, Any]) -> bool:
    """Whether a type was converted to what stock engines load."""
    formats = found.get("formats", {})
    return any("packed" in formats.get(name, {}) for name in ("gptq", "compressed-tensors"))


def said(found: dict[str, Any]) -> str:
    """A line on what became of a type."""
    if "failed" in found:
        return f"FAILED: {found['failed']}"
    if "unbuilt" in found:
        return f"not built: {' '.join(found['unbuilt'].split())[:160]}"
    formats = found["formats"]
    done = [name for name in WRITTEN if "packed" in formats[name]]
    if not done:
        return f"refused: {formats[WRITTEN[0]]['refused']}"
    first = formats[done[0]]
    line = f"{', '.join(done)}: {first['packed']} packed, {first['dense']} dense"
    skipped = sorted({pattern for name in done for pattern in formats[name]["skipped"]})
    line += f"; with --skip {' '.join(skipped)}" if skipped else ""
    for name in WRITTEN:
        if name not in done:
            line += f"; {name} refused: {formats[name]['refused']}"
    return line


def main() -> None:
    """Run the types and print, and perhaps write, the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*")
    parser.add_argument("--sample", action="store_true", help="some diverse types, as `make test` has them")
    parser.add_argument("--write", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    started = time.monotonic()
    found = run(asked.types or (list(tiny.SAMPLE) if asked.sample else tiny.types()), asked.workers)
    groups = {
        "done": [name for name, one in found.items() if is_done(one)],
        "failed": [name for name, one in found.items() if "failed" in one],
        "not built": [name for name, one in found.items() if "unbuilt" in one],
    }
    groups["refused"] = [name for name in found if not any(name in names for names in groups.values())]
    total = ", ".join(f"{len(names)} {kind}" for kind, names in groups.items())
    print(f"\n{len(found)} types of transformers {transformers.__version__}: {total}")
    took = f"{(time.monotonic() - started) / 60:.0f} min on {asked.workers} processors"
    print(took)
    if asked.write:
        rows = [f"| {name} | {said(one).replace('|', '/')} |" for name, one in found.items()]
        today = time.strftime("%Y-%m-%d")
        head = f"transformers {transformers.__version__}: {total} ({today}, {took}).\n{NOT_BUILT}"
        asked.write.write_text("\n".join([TITLE, "", head, "", "| type | |", "|---|---|", *rows, ""]))
    sys.exit(1 if groups["failed"] else 0)


TITLE = """# Architectures

Every type of transformers' causal and image-text-to-text models, tiny and with random weights, as `make
archs` found it: converted, verified, and read by plain transformers over weights dequantized by the formulas
of the formats alone, whose logits are those of our walk. `packed` are the matrices that are quantized,
`dense` those left as they are, towers included."""
NOT_BUILT = "Not built are types whose tiny model is beyond the script, or wants packages that are not here."


if __name__ == "__main__":
    main()
