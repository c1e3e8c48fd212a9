"""How a checkpoint came to be: its steps from the original model on, which every manifest hands to the next.

A step is what one run of quantize or sparsify says of itself. One that `repacked` keeps the codes of its
source: its recipe is that of the codes, as far as it is known, in another layout.
"""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from marlin_convert.checkpoint import manifest as manifests
from marlin_convert.errors import ConvertError, SourceError
from marlin_convert.hub import is_hub_id
from marlin_convert.recipe import REPACKED, from_settings

log = logging.getLogger("marlin_convert")

_COMMIT = re.compile("[0-9a-f]{7,64}")

# What a manifest says of its step.
STEP = (
    "tool",
    "versions",
    "source",
    "recipe",
    "requantized",
    "repacked",
    "calibration",
    "device",
    "processor",
    "max_shard_size",
    "trust_remote_code",
)
# Layouts that say nothing but codes and scales.
WITHOUT_MASK = ("marlin", "gptq", "compressed-tensors")
# What is known of a linear's codes wherever they are copied to.
OF_CODES: dict[str, type] = {"error": float, "damping": float, "rounded_to_nearest": bool, "tokens": int}


def steps(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every step, that of the original first, the manifest's own last."""
    own: dict[str, Any] = {key: manifest.get(key) for key in STEP}
    if own["repacked"] is None:  # of an earlier version, whose repacks have a recipe that they did not follow
        own["repacked"] = bool(own["source"]["quantization"]) and not own["requantized"]
        if own["repacked"]:
            own["recipe"] = {key: value for key, value in (own["recipe"] or {}).items() if key in REPACKED}
    return [*manifest.get("history", ()), own]


def earlier(directory: Path) -> list[dict[str, Any]]:
    """The steps that made a source; none where that is the original, or not ours, or does not say."""
    manifest = manifests.load(directory)
    if manifest is None:
        return []
    try:
        found = steps(manifest)
        for step in found:
            _check(step)
    except (ConvertError, KeyError, TypeError, AttributeError, ValueError) as error:
        log.warning("how the source was made is not known: its manifest does not say (%s)", error)
        return []
    return found


def _check(step: dict[str, Any]) -> None:
    """An error of any kind for a step that is none."""
    source, text = step["source"], step["calibration"]
    if not isinstance(source["name"], str) or not isinstance(source["commit"], str | None):
        raise SourceError("its source has no name.")
    from_settings(dict(step["recipe"]), "of the source")
    if text is not None:
        int(text["samples"]), int(text["sequence_length"]), text["text"] + text["sha256"]
    dict(step["versions"])


def recipe_of_codes(own: Mapping[str, Any], before: list[dict[str, Any]]) -> dict[str, Any]:
    """The settings of a repack: those that made its codes, as far as they are known, in its own layout."""
    heeded = {key: own[key] for key in REPACKED}
    if not before:
        return heeded
    chosen = {key: own[key] for key in ("format", "bits", "group_size", "overrides")}
    chosen |= {"unpruned": own["unpruned"]} if own["unpruned"] else {}
    chosen |= {"dtype": own["dtype"]} if own["dtype"] != "auto" else {}
    return {**before[-1]["recipe"], **chosen}


def carried(stated: dict[str, Any], directory: Path) -> dict[str, Any]:
    """What the manifest of a repack states, with what that of its source says of the same linears.

    Errors, the damping and the divergence come with the codes, reasons with what was left dense, and the
    names of the tensors left out before with those left out now.
    """
    source = manifests.load(directory) or {}
    rows = {row["name"]: row for row in source.get("matrices", ())}
    matrices = []
    for row in stated["matrices"]:
        known = rows.get(row["name"], {})
        more = {key: known[key] for key, kind in OF_CODES.items() if isinstance(known.get(key), kind)}
        if row["format"] == known.get("format") == "dense" and known.get("reason"):
            more["reason"] = known["reason"]
        matrices.append(row | more)
    before = [name for name in _list(source.get("left_out")) if isinstance(name, str)]
    left_out = [*before, *stated["left_out"]]
    return {"matrices": matrices, "left_out": left_out, "divergence": source.get("divergence", [])}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def original(manifest: Mapping[str, Any]) -> str:
    """What it all began with, in words."""
    first, *more = steps(manifest)
    name, quantization = first["source"]["name"], first["source"]["quantization"]
    commit = f" at {first['source']['commit']}" if first["source"].get("commit") else ""
    if first["repacked"]:
        return f"{name}{commit}, {quantization} already; how that was calibrated is not known"
    return f"{name}{commit}" + (f", in {len(more) + 1} steps" if more else "")


def makings(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The fewest steps that make the same again from the original, the first of which is of its name.

    A repack is none, as its codes can be made in its layout at once. One to marlin-24 is: it finds out from
    the codes what a layout before it did not say, that they are 2:4 and which zeros were kept.
    """
    found: list[dict[str, Any]] = []
    for step in steps(manifest):
        format = step["recipe"]["format"]
        at_once = bool(found) and format in (found[-1]["recipe"]["format"], *WITHOUT_MASK)
        if step["repacked"] and at_once:
            while format in WITHOUT_MASK and len(found) > 1 and found[-1]["repacked"]:
                found.pop()
            written = ("recipe", "max_shard_size", "trust_remote_code")
            found[-1] = {**found[-1], **{key: step[key] for key in written}}
        else:
            found.append(step)
    return found


def recipe_file(number: int, total: int) -> str:
    """The file with the recipe of a making, counted from 0: the last one has the well-known name."""
    return "recipe.yaml" if number == total - 1 else f"recipe.{number + 1}.yaml"


def commands(manifest: Mapping[str, Any]) -> list[str]:
    """The command lines that make it again from the original, MODEL where that is not on the Hub."""
    lines = []
    todo = makings(manifest)
    source = todo[0]["source"]
    model = "MODEL"
    if is_hub_id(source["name"]) and _COMMIT.fullmatch(str(source.get("commit"))):
        model = f"{source['name']} --revision {source['commit']}"
    for number, step in enumerate(todo):
        verb = "sparsify" if step["recipe"]["format"] == "dense" else "quantize"
        output = "DIR" if number == len(todo) - 1 else f"DIR.{number + 1}"
        words = [f"marlin-convert {verb} {model} -o {output}"]
        words.append(f"--recipe {recipe_file(number, len(todo))}")
        words += ["--requantize"] * bool(step["requantized"])
        words += ["--trust-remote-code"] * bool(step["trust_remote_code"])
        if step["max_shard_size"] not in (None, 5_000_000_000):
            words.append(f"--max-shard-size {int(step['max_shard_size'])}")
        lines.append(" ".join(words))
        model = output
    return lines
