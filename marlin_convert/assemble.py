"""Everything of an output but its weights: config, tokenizer, licences, recipe, and the manifest.

What decides the bytes stands in the manifest, and a run that is resumed must agree in all of it.
"""

import platform
from typing import TYPE_CHECKING, Any

import torch
import transformers

from marlin_convert import __version__, provenance
from marlin_convert.calibration import Calibration, TuningText, shown
from marlin_convert.card import read_facts
from marlin_convert.checkpoint import manifest as manifests
from marlin_convert.checkpoint import remote_code
from marlin_convert.checkpoint.linears import Weights
from marlin_convert.checkpoint.manifest import MANIFEST, sha256_file
from marlin_convert.checkpoint.reader import Checkpoint, json_file
from marlin_convert.checkpoint.writer import write_json
from marlin_convert.errors import reading
from marlin_convert.models.blocks import bf16_units
from marlin_convert.plan import Plan
from marlin_convert.recipe import Recipe, to_yaml

if TYPE_CHECKING:
    from marlin_convert.conversion import Job


def settings_of(job: "Job", plan: Plan, weights: Weights, calibration: Calibration | None) -> dict[str, Any]:
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
        **({} if job.ranks.alone else {"ranks": job.ranks.count}),
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
        **({} if calibration.tuning is None else {"tuning": _stated_tuning(calibration.tuning)}),
    }


def _stated_tuning(text: TuningText) -> dict[str, Any]:
    return {"samples": len(text.ids), "held_out": len(text.held_out), "sha256": text.digest}


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


def assemble(
    job: "Job",
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
        **({"tuning": found["tuning"]} if found["tuning"] else {}),
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


def _copy_from_source(job: "Job", plan: Plan, checkpoint: Checkpoint) -> list[str]:
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
