"""The model card: what the source's says that still holds, and the one that a published checkpoint gets.

Everything in it comes from the manifest, the verification and the options of `push`; nothing is invented.
"""

import logging
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from marlin_convert import provenance
from marlin_convert.checkpoint import manifest as manifests
from marlin_convert.checkpoint.reader import belongs
from marlin_convert.errors import ConvertError
from marlin_convert.hub import is_hub_id
from marlin_convert.matrix import fate_of
from marlin_convert.recipe import first_match

log = logging.getLogger("marlin_convert")

CARD = "README.md"

# What stays true of a model when its weights are rounded, and what leads to the model it is one of.
FACTS = (
    "license",
    "license_name",
    "license_link",
    "language",
    "pipeline_tag",
    "base_model",
    "base_model_relation",
)
LARGEST = 1_000_000
LONGEST = 200
MOST = 200

TAGS = {
    "marlin": ("marlin",),
    "marlin-24": ("marlin", "sparse-24"),
    "gptq": ("gptq", "vllm"),
    "compressed-tensors": ("compressed-tensors", "vllm"),
    "dense": ("sparse-24",),
}

_PYTHON = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{repository}"{keyword})
tokenizer = AutoTokenizer.from_pretrained("{repository}"{keyword})
tokens = {tokens}
print(tokenizer.decode(model.generate(**tokens, max_new_tokens=32)[0]))
```
"""
# What the model goes on with: a text, or what its chat template makes of a message.
_TEXT = 'tokenizer("Hello", return_tensors="pt")'
_CHAT = """\
tokenizer.apply_chat_template(
    [{"role": "user", "content": "Hello"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
)"""
_STOCK = (
    """\
```
pip install vllm
vllm serve {repository}{revision}
```

```python
# pip install transformers %s
"""
    + _PYTHON
)
_OURS = (
    """\
vLLM and transformers load this layout where marlin-convert is installed beside them.{also}

```
pip install marlin-convert  # or, in a checkout of it: pip install .
vllm serve {repository}{revision}
marlin-convert generate {repository}{revision}
```

```python
import marlin_convert
"""
    + _PYTHON
    + """\

> **Not without `import marlin_convert`.** transformers alone does not know the layout, prints a warning, and
> goes on with random weights. vLLM alone refuses it with an error.

{experts}Its codes can be written in a layout that both load alone, exactly:

```
marlin-convert quantize {repository}{revision} -o DIR --format gptq
```
"""
)
# What integrations/vllm_experts.py refuses.
_EXPERTS = """\
Experts in `marlin-24`, with biases, without a gate or of Llama 4 load in transformers; vLLM refuses them.

"""
_DENSE = """\
It loads as the original does. To quantize it, keeping its zeros:

```
marlin-convert quantize {repository}{revision} -o DIR --format marlin-24
```
"""

# Of packed layouts, only what tests/engines has seen load and answer right.
SERVING = {
    "dense": _DENSE,
    "marlin": _OURS,
    "marlin-24": _OURS,
    "gptq": _STOCK % "optimum gptqmodel",
    "compressed-tensors": _STOCK % "compressed-tensors",
}
SCALES = {
    "signed": "signed: some are negative, which kernels that take every scale for positive read wrong",
    "positive": "all positive",
}
# Those that need marlin-convert.
OURS = ("marlin", "marlin-24")


@dataclass(frozen=True)
class Facts:
    """What the options of `push` say of the model, or else the card of its source."""

    base_model: str | None
    license: dict[str, str]
    language: str | list[str] | None
    pipeline_tag: str
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Published:
    """One branch as the card describes it: where it is, what it holds, and what is known of that."""

    repository: str
    branch: str
    manifest: dict[str, Any]
    manifest_sha256: str
    report: dict[str, Any] | None
    origin: dict[str, Any]  # the manifest of the checkpoint whose codes these are: its own, but for --also
    measured: dict[str, Any] | None  # the report about that one
    also: tuple[str, ...] = ()  # branches with the same codes in other layouts
    chats: bool = False  # whether its tokenizer has a chat template
    older: tuple[str, ...] = ()  # branches of earlier pushes, of other codes for all that is known

    @property
    def format(self) -> str:
        """Its layout."""
        return self.manifest["recipe"]["format"]


def read_facts(directory: Path) -> dict[str, Any]:
    """What a model's card says under the names of FACTS; without a card, what our manifest keeps of one."""
    found = _metadata_of(directory / CARD) if belongs(directory / CARD, directory) else {}
    if not found and (manifest := manifests.load(directory)):
        found = _object(_object(manifest.get("source")).get("card"))
        found |= {
            "base_model": _base_model(provenance.earlier(directory)),
            "base_model_relation": "quantized",
        }
    facts = {name: found[name] for name in FACTS if found.get(name) is not None}
    for name in [name for name, value in facts.items() if not _usable(value)]:
        log.warning("the card of the source gives no usable %s", name)
        del facts[name]
    return facts


def _metadata_of(card: Path) -> dict[str, Any]:
    from huggingface_hub import metadata_load

    try:
        if card.stat().st_size > LARGEST:
            raise ValueError(f"it has more than {LARGEST:,} bytes")
        return _object(metadata_load(card))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        log.warning("the card of the source is left aside: %s", str(error).partition("\n")[0])
        return {}


def _object(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, dict) else {}


def facts(manifest: dict[str, Any], base_model: str | None, license: str | None) -> Facts:
    """The facts for the card; ConvertError if `license` contradicts the source's."""
    source = manifest["source"]
    known = {name: value for name, value in _object(source.get("card")).items() if _usable(value)}
    warnings = []
    stated = {name: str(known[name]) for name in FACTS[:3] if isinstance(known.get(name), str)}
    if license is not None and stated.get("license", license) != license:
        raise ConvertError(
            f"the source's card says its license is {stated['license']!r}, not {license!r}.",
            "leave --license out; it is for a source whose card names none.",
        )
    if license is not None:
        stated["license"] = license
    if "license" not in stated:
        stated = {}
        warnings.append("the license is not known and left out of the card: give it with --license.")
    elif stated["license"] == "other" and "license_name" not in stated:
        warnings.append("the license is 'other' without a name: the source's card does not give it.")
    base = base_model or _base_model(provenance.steps(manifest))
    if base is None:
        warnings.append("the original is not known on the Hub: give its id with --base-model.")
    return Facts(
        base, stated, known.get("language"), str(known.get("pipeline_tag", "text-generation")), warnings
    )


def _base_model(steps: list[dict[str, Any]]) -> str | None:
    """The Hub id of the model whose weights were rounded or pruned last, or of the one it was made from.

    Of a source that was quantized already it is what that one's own card names.
    """
    named: list[Any] = []
    for number, step in reversed(list(enumerate(steps))):
        source = step["source"]
        own = [source.get("name")] if source.get("commit") else []
        if not source.get("quantization"):
            named = [*own, *named]
        else:
            stated = _object(source.get("card")).get("base_model")
            stated = stated[0] if isinstance(stated, list) and len(stated) == 1 else stated
            # only what nobody of us has made is an original
            named += [stated, *own] if not number else [stated]
        if own and not source.get("quantization"):
            break
    return next((name for name in named if is_hub_id(name)), None)


def _usable(value: Any) -> bool:
    """Whether a value is a short line of text, or a list of such."""
    if isinstance(value, list):
        return 0 < len(value) <= MOST and all(isinstance(one, str) and _usable(one) for one in value)
    return isinstance(value, str) and 0 < len(value) <= LONGEST and value.isprintable()


def write(published: Published, facts: Facts) -> str:
    """The card, as Markdown with its metadata in front."""
    metadata = _metadata(published, facts)
    parts = [
        f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---\n",
        f"# {published.repository.partition('/')[2]}\n",
        _overview(published, facts),
    ]
    if published.report is None:
        parts.append("> **Not verified.** This was published with `--allow-unverified`.\n")
    parts += ["## Serve it\n", _serving(published)]
    parts += ["## How it was made\n", _making(published)]
    parts += ["## Quality\n", _quality(published)]
    parts += ["## Check it\n", _check(published, facts)]
    parts += ["## Files\n", _files(published)]
    card = "\n".join(parts)
    if yaml.safe_load(card.split("---\n")[1]) != metadata:
        raise ConvertError("the metadata of the card does not survive being written.", "this is a bug.")
    return card


def _metadata(published: Published, facts: Facts) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    if facts.base_model:
        relation = "finetune" if published.format == "dense" else "quantized"
        metadata |= {"base_model": facts.base_model, "base_model_relation": relation}
    metadata |= facts.license
    if facts.language:
        metadata["language"] = facts.language
    # the Hub takes a repository with a config.json for one that transformers loads, and tells people to
    metadata["library_name"] = "marlin-convert" if published.format in OURS else "transformers"
    metadata["pipeline_tag"] = facts.pipeline_tag
    tags = (
        ["marlin-convert"]
        if published.format == "dense"
        else ["quantized", "4-bit", "w4a16", "marlin-convert"]
    )
    metadata["tags"] = sorted({*tags, *TAGS[published.format]})
    return metadata


def _overview(published: Published, facts: Facts) -> str:
    manifest = published.manifest
    base = facts.base_model
    original = (
        f"[{base}](https://huggingface.co/{base})"
        if base
        else _code(provenance.makings(manifest)[0]["source"]["name"])
    )
    if published.format == "dense":
        return (
            f"{original} with two of every four weights of its linears pruned (2:4), dense, made by "
            f"{_code(manifest['tool'])}.\n"
        )
    packed = [fate.layout for fate in manifests.fates(manifest).values() if fate.packed]
    pruned = ", two of every four pruned (2:4)" if manifests.sparsity(manifest) else ""
    sizes = sorted({layout.group_size for layout in packed}, reverse=True)
    several = " or ".join(str(size) for size in sizes if size != -1)
    groups = f"one scale for every {several} weights" if several else "one scale for every output"
    bits = " or ".join(str(bits) for bits in sorted({layout.bits for layout in packed}))
    return (
        f"{original} with the weights of its linears in {bits} bits{pruned} "
        f"({manifest['bits_per_weight']} bits per weight with {groups}), in the `{published.format}` layout, "
        f"made by {_code(manifest['tool'])}.\n"
    )


def _serving(published: Published) -> str:
    branch, main = published.branch, published.branch == "main"
    also = ""
    if published.also:
        branches = " and ".join(f"`--revision {name}`" for name in published.also)
        also = f" The same codes are in layouts that stock engines load: {branches}."
    packed = [name for name, fate in manifests.fates(published.manifest).items() if fate.packed]
    text = SERVING[published.format].format(
        repository=published.repository,
        revision="" if main else f" --revision {branch}",
        keyword="" if main else f', revision="{branch}"',
        also=also,
        tokens=_CHAT if published.chats else _TEXT,
        experts=_EXPERTS if any(first_match(name, ["experts"]) for name in packed) else "",
    )
    others = [name for name in published.also if published.format not in OURS]
    text += f"\nOther layouts of the same codes: branches {', '.join(others)}.\n" if others else ""
    if published.older:
        names = ", ".join(_code(name) for name in published.older)
        text += f"\nOf an earlier push, and not made from these files: the branches {names}.\n"
    return text


def _making(published: Published) -> str:
    manifest = published.manifest
    makings = provenance.makings(manifest)
    source = makings[0]["source"]
    commit = source.get("commit")
    rows = {"source": _code(source["name"]) + (f" at commit {_code(commit)}" if commit else ", a directory")}
    for number, step in enumerate(makings):
        of = "" if len(makings) == 1 else f"{number + 1}. "
        rows |= {f"{of}{name}": text for name, text in _step(step, first=not number).items()}
    if manifest.get("repacked") and provenance.steps(manifest)[:-1]:
        layout = manifest["source"]["quantization"]
        rows["repacked"] = f"from {_code(layout)} by {_code(manifest['tool'])}: the same codes"
    fates = manifests.fates(manifest).values()
    done = [row for row in manifest["matrices"] if fate_of(row).worked_on]
    dense = {fate.name: str(fate.reason) for fate in fates if not fate.worked_on}
    what = "pruned" if published.format == "dense" else "packed"
    rows["linears"] = f"{len(done)} {what}, {len(dense)} of the blocks left dense"
    unpruned = {fate.name: fate.reason for fate in fates if fate.packed and fate.reason}
    if manifests.sparsity(manifest):
        rows["sparsity"] = f"2:4 in {len(done) - len(unpruned)} of the {what} linears"
    if scales := manifests.scales(manifest):
        rows["scales"] = SCALES[scales]
    after = manifest["divergence"]
    if after:
        rows["hidden states"] = (
            f"{after[-1]:.4f} from the original's after the last of {len(after)} blocks, relative, on the "
            "calibration text"
        )
    errors = [row["error"] for row in done if "error" in row]
    if errors:
        rows["error"] = (
            f"{sum(errors) / len(errors):.4f} on average, {max(errors):.4f} at worst: relative error of a "
            "linear's output on the calibration text"
        )
    lines = [_table(["", ""], [[name, value] for name, value in rows.items()])]
    lines += [f"- left dense: {_code(name)} ({_line(reason)})" for name, reason in dense.items()]
    lines += [f"- not 2:4: {_code(name)} ({_line(reason)})" for name, reason in unpruned.items()]
    named = [*manifest["left_out"], *manifest.get("left_behind", ())]
    lines += [f"- left out: {_code(name)}" for name in named]
    lines += [f"- rounded to nearest: {_code(row['name'])}" for row in done if row.get("rounded_to_nearest")]
    files = [_code(provenance.recipe_file(number, len(makings))) for number in range(len(makings))]
    again = "\n".join(provenance.commands(manifest))
    return "\n".join(lines) + (
        f"\n\nTo make it again, with {' and '.join(files)} of this repository:\n\n```\n{again}\n```\n"
    )


def _step(step: dict[str, Any], *, first: bool) -> dict[str, str]:
    """What there is to say of one of the steps that make a checkpoint."""
    if step["repacked"] and not first:
        return {"codes": f"of the step before, as {_code(step['recipe']['format'])}"}
    recipe, text, processor = step["recipe"], step["calibration"], _object(step["processor"])
    rows = {
        "tool": _code(step["tool"]),
        "versions": _line(", ".join(f"{name} {value}" for name, value in step["versions"].items())),
        "recipe": _code(", ".join(f"{name} {value}" for name, value in recipe.items() if name != "format")),
    }
    if step["repacked"]:
        rows["codes"] = (
            f"kept from the source, which was {_code(step['source']['quantization'])} already; how they were "
            "calibrated is not known"
        )
    if text:
        rows["calibration"] = (
            f"{text['samples']} x {text['sequence_length']} tokens of {_code(text['text'])}, "
            f"token ids sha256 {_code(text['sha256'])}"
        )
    if not step["repacked"]:
        named = [str(step["device"]), *(f"{name} {value}" for name, value in processor.items())]
        rows["computed on"] = _code(", ".join(named))
    return rows


def _quality(published: Published) -> str:
    done = published.report
    if done is None:
        return "Not measured.\n"
    rows = [[name, check["status"], _line(check["reason"])] for name, check in done["checks"].items()]
    lines = [_table(["check", "", ""], rows)]
    text = (published.measured or done)["checks"]["numbers"]["details"].get("text")
    if text is None:
        lines.append("Perplexity was not measured.\n")
    else:
        lines.append(
            f"On {_code(text['name'])}, text that calibration never uses ({text['tokens']} predicted tokens "
            f"in {text['samples']} sequences of {text['sequence_length']}):\n"
        )
        figures = [
            ["perplexity", f"{text['source_perplexity']:.4g}", f"{text['perplexity']:.4g}"],
            ["KL divergence to the original, nats a token", "", f"{text['divergence']:.3g}"],
            ["same likeliest token", "", f"{text['agreement']:.3g}"],
        ]
        lines.append(_table(["", "original", "this"], figures))
    if published.origin is not published.manifest:
        layout = published.origin["recipe"]["format"]
        lines.append(
            f"Codes and scales are those of the `{layout}` layout of this repository, compared one by one.\n"
        )
    return "\n".join(lines)


def _check(published: Published, facts: Facts) -> str:
    revision = "" if published.branch == "main" else f" --revision {published.branch}"
    commits = {
        step["source"]["name"]: step["source"].get("commit") for step in provenance.steps(published.manifest)
    }
    source = ""
    if facts.base_model and (commit := commits.get(facts.base_model)):
        source = f" --source {facts.base_model} --source-revision {commit}"
    return f"```\nmarlin-convert verify {published.repository}{revision}{source}\n```\n"


def _files(published: Published) -> str:
    rows = [
        [_code(name), str(int(entry["size"])), _code(entry["sha256"])]
        for name, entry in published.manifest["files"].items()
    ]
    table = _table(["file", "bytes", "sha256"], rows)
    return f"{table}\nThe manifest, `marlin_convert.json`, has sha256 `{published.manifest_sha256}`.\n"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *([cell.replace("|", r"\|") for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _line(text: str) -> str:
    """Text from a file as one line that holds no markup."""
    return re.sub(r"([\\`*_<>\[\]#&])", r"\\\1", " ".join(str(text).split()))


def _code(text: str) -> str:
    """Text from a file as one line of code, which it cannot end."""
    return f"`{' '.join(str(text).replace('`', chr(39)).split())}`"
