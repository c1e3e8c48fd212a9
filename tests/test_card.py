"""The model card: what it takes from the source's card and the manifest, and that it invents nothing."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result

from marlin_convert import card
from marlin_convert.checkpoint.manifest import MANIFEST
from marlin_convert.errors import ConvertError
from marlin_convert.matrix import Fate, Layout, Matrix, dense

Cli = Callable[..., Result]

SOURCE_CARD = """---
license: other
license_name: tiny-licence
license_link: LICENSE
language: [en, code]
pipeline_tag: text-generation
base_model: org/bigger
tags: [shiny]
model-index: []
---
# The best model ever
"""


def source_card(directory: Path, text: str) -> dict[str, Any]:
    (directory / "README.md").write_text(text)
    return card.read_facts(directory)


def test_facts_are_read_and_marketing_is_not(tmp_path: Path) -> None:
    assert source_card(tmp_path, SOURCE_CARD) == {
        "license": "other",
        "license_name": "tiny-licence",
        "license_link": "LICENSE",
        "language": ["en", "code"],
        "pipeline_tag": "text-generation",
        "base_model": "org/bigger",
    }


def test_without_a_card_there_are_no_facts(tmp_path: Path) -> None:
    assert card.read_facts(tmp_path) == {}
    (tmp_path / "README.md").symlink_to("/etc/hostname")
    assert card.read_facts(tmp_path) == {}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# Only a title",
        "---\n[1, 2]\n---\n",
        "---\nlicense: [\n---\n",
        "---\nlicense: !!python/object/apply:os.system ['true']\n---\n",
        "---\n" + "a: " + "[" * 5000 + "\n---\n",
        "---\nlicense: mit\n---\n" + " " * 1_000_001,
        "---\nlicense: {a: b}\nlanguage: [1, 2]\nbase_model: []\n---\n",
        "---\nlicense: " + "x" * 201 + "\nlanguage: " + json.dumps(["en"] * 201) + "\n---\n",
        '---\nlicense: "a\\nb"\n---\n',
    ],
)
def test_a_card_that_cannot_be_used_gives_no_facts(text: str, tmp_path: Path) -> None:
    assert source_card(tmp_path, text) == {}


def manifest(source: dict[str, Any]) -> dict[str, Any]:
    return {"source": {"name": "org/model", "commit": "c" * 40, "quantization": None, **source}}


@pytest.mark.parametrize(
    "source, base",
    [
        ({}, "org/model"),
        ({"name": "model", "commit": None}, None),
        # of a model that was fine-tuned from another, what we quantized is the base
        ({"card": {"base_model": "org/bigger"}}, "org/model"),
        # of one that was quantized already, what it was quantized from
        ({"quantization": "gptq", "card": {"base_model": "org/bigger"}}, "org/bigger"),
        ({"quantization": "gptq", "card": {"base_model": ["org/bigger"]}}, "org/bigger"),
        ({"quantization": "gptq", "card": {"base_model": ["a/b", "c/d"]}}, "org/model"),
        ({"quantization": "gptq", "card": {"base_model": "/home/me/bigger"}}, "org/model"),
        ({"quantization": "gptq", "card": {"base_model": "../bigger"}}, "org/model"),
        ({"quantization": "gptq", "commit": None, "card": {}}, None),
    ],
)
def test_the_base_model(source: dict[str, Any], base: str | None) -> None:
    found = card.facts(manifest(source), None, None)
    assert found.base_model == base
    assert any("--base-model" in warning for warning in found.warnings) == (base is None)
    assert card.facts(manifest(source), "me/mine", None).base_model == "me/mine"


def test_the_license() -> None:
    unknown = card.facts(manifest({}), None, None)
    assert unknown.license == {} and "--license" in unknown.warnings[0]
    assert card.facts(manifest({}), None, "mit").license == {"license": "mit"}
    known = {"card": {"license": "other", "license_name": "x", "license_link": "LICENSE", "language": "en"}}
    found = card.facts(manifest(known), None, None)
    assert found.license == {"license": "other", "license_name": "x", "license_link": "LICENSE"}
    assert found.language == "en" and not found.warnings
    assert card.facts(manifest(known), None, "other").license == found.license
    with pytest.raises(ConvertError, match="says its license is 'other', not 'mit'"):
        card.facts(manifest(known), None, "mit")
    assert card.facts(manifest({"card": {"license": "other"}}), None, None).warnings


@pytest.fixture
def published(quantized: Callable[[str], Path]) -> card.Published:
    content = json.loads((quantized("marlin") / MANIFEST).read_text())
    return card.Published("me/tiny", "main", content, "0" * 64, None, content, None)


FACTS = card.Facts("org/model", {"license": "mit"}, ["en"], "text-generation")


def test_the_metadata(published: card.Published) -> None:
    _, metadata, text = card.write(published, FACTS).split("---\n", 2)
    assert yaml.safe_load(metadata) == {
        "base_model": "org/model",
        "base_model_relation": "quantized",
        "license": "mit",
        "language": ["en"],
        "library_name": "marlin-convert",
        "pipeline_tag": "text-generation",
        "tags": ["4-bit", "marlin", "marlin-convert", "quantized", "w4a16"],
    }
    for entry in published.manifest["files"].values():
        assert entry["sha256"] in text
    assert "random weights" in text and "**Not verified.**" in text
    unknown = card.write(published, card.Facts(None, {}, None, "text-generation"))
    assert set(yaml.safe_load(unknown.split("---\n")[1])) == {"library_name", "pipeline_tag", "tags"}


def test_the_signs_of_the_scales_are_said(published: card.Published) -> None:
    """Where every row says them; those of an earlier version do not."""
    rows = [row for row in published.manifest["matrices"] if row["format"] != "dense"]
    for said, text in (("signed", "some are negative"), ("positive", "all positive"), (None, None)):
        for row in rows:
            row["scales"] = said
        assert ("| scales |" in card.write(published, FACTS)) == (text is not None)
        assert text is None or text in card.write(published, FACTS)
    rows[0]["scales"] = []
    assert "| scales |" not in card.write(published, FACTS)


def test_a_part_that_is_sparse(quantized: Callable[[str], Path], tmp_path: Path, cli: Cli) -> None:
    words = ("--format", "marlin-24", "--unpruned", "*.3.mlp.*", "-q")
    assert cli("quantize", quantized("marlin-24"), "-o", tmp_path / "out", *words).exit_code == 0
    content = json.loads((tmp_path / "out" / MANIFEST).read_text())
    text = card.write(card.Published("me/tiny", "main", content, "0" * 64, None, content, None), FACTS)
    metadata = yaml.safe_load(text.split("---\n")[1])
    assert metadata["library_name"] == "marlin-convert" and "sparse-24" in metadata["tags"]
    assert "| sparsity | 2:4 in 25 of the packed linears |" in text and "random weights" in text
    assert "- not 2:4: `model.layers.3.mlp.up_proj` (unpruned by '\\*.3.mlp.\\*')" in text


def test_the_sample_speaks_as_the_model_does(published: card.Published) -> None:
    for chats in (False, True):
        text = card.write(replace(published, chats=chats), FACTS)
        (sample,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        compile(sample, "card", "exec")
        assert ("apply_chat_template" in sample) == chats
        assert "marlin-convert generate me/tiny" in text and "checkout of it: pip install ." in text


@pytest.mark.parametrize("part", ["experts.0", "shared_experts"])
def test_what_vllm_refuses_of_experts_is_said(part: str, published: card.Published) -> None:
    content = json.loads(json.dumps(published.manifest))
    matrix = Matrix(f"model.layers.0.mlp.{part}.up_proj", 128, 128)
    content["matrices"] += [Fate(matrix, Layout("marlin", 4, 128), None).row()]
    text = card.write(replace(published, manifest=content), FACTS)
    said = (
        "Experts in `marlin-24`, with biases, without a gate or of Llama 4 load in transformers; "
        "vLLM refuses them."
    )
    assert (said in text) == (part == "experts.0") and said not in card.write(published, FACTS)


def test_names_from_a_manifest_cannot_become_markup(published: card.Published) -> None:
    evil = "`x` | <script>\n\n# Pwned\n---\nlicense: mine"
    content = json.loads(json.dumps(published.manifest))
    content["source"]["name"] = content["tool"] = content["calibration"]["text"] = evil
    content["matrices"] += [dense(Matrix(evil, 4, 4), "float16", evil).row()]
    content["matrices"] += [Fate(Matrix(evil, 4, 4), Layout("marlin", 4, 128), evil).row()]
    content["left_out"] = [evil]
    content["matrices"][0] |= {"name": evil, "rounded_to_nearest": True}
    content["files"][evil] = {"size": 1, "sha256": evil}
    content["versions"] = {evil: evil}
    text = card.write(replace(published, manifest=content, origin=content), replace(FACTS, base_model=None))
    _, metadata, body = text.split("---\n", 2)
    assert "mine" not in metadata and body.startswith("\n# tiny\n")
    # only inside of code, or with its markup escaped
    for line in body.splitlines():
        assert "<script>" not in re.sub(r"`[^`]*`", "", line).replace(r"\<script\>", "")
    assert "\n# Pwned" not in body and "\n---\nlicense" not in body


def test_a_repack_keeps_what_is_known_of_the_original(
    quantized: Callable[[str], Path], tmp_path: Path, cli: Cli
) -> None:
    """Marlin from the Hub, repacked here: the original is still the original."""
    first = tmp_path / "first"
    shutil.copytree(quantized("marlin"), first)
    content = json.loads((first / MANIFEST).read_text())
    content["source"] |= {"name": "org/model", "commit": "c" * 40, "card": {"license": "mit"}}
    (first / MANIFEST).write_text(json.dumps(content))
    result = cli("quantize", first, "-o", tmp_path / "second", "--format", "gptq", "-q")
    assert result.exit_code == 0, result.stderr
    repacked = json.loads((tmp_path / "second" / MANIFEST).read_text())
    found = card.facts(repacked, None, None)
    assert (found.base_model, found.license) == ("org/model", {"license": "mit"})
