"""The hint where a layout does not hold a model: every way in it works, and packs what it says."""

import json
import re
import shlex
from pathlib import Path

import packed_models
import pytest
import tiny_models

WAY = re.compile(r"(--(?:[^;,']|'[^']*')+?) (?:packs|solves) (\d+)")
AS_THEY_ARE = re.compile(r"(--format [a-z-]+) holds all of them as they are")


def refused(cli, source: Path, output: Path, *words: object) -> str:
    """The hint of a plan that is refused."""
    result = cli("quantize", source, "-o", output, "--dry-run", "--device", "cpu", *words)
    assert result.exit_code == 1, result.stdout
    return result.stderr.partition("Hint: ")[2].strip()


def packed(cli, source: Path, output: Path, *words: object) -> int:
    """How many linears a plan packs that is taken."""
    result = cli("quantize", source, "-o", output, "--dry-run", "--device", "cpu", "--json", "-v", *words)
    assert result.exit_code == 0, (words, result.stderr)
    return sum(one["format"] != "dense" for one in json.loads(result.stdout)["matrices"])


def without(words: tuple, way: list[str]) -> list[str]:
    """The words of a command but for options that the way gives anew."""
    pairs = list(zip(words[::2], words[1::2], strict=True))
    return [str(word) for pair in pairs if pair[0] not in way for word in pair]


WIDTH_192 = {"hidden_size": 192, "num_attention_heads": 3, "num_key_value_heads": 3}
WIDTH_576 = {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3}  # SmolLM2-135M
G128 = ("--group-size", 128)
SPARSE = ("--sparsity", "2:4", "--format", "marlin-24")
QWEN_15_32B = {"hidden_size": 128, "intermediate_size": 6848}  # 27392 / 4: groups of 64 divide it


@pytest.mark.parametrize(
    "changes, words, best",
    [
        (WIDTH_192, G128, "--group-size auto"),
        (WIDTH_576, G128, "--group-size auto"),
        (WIDTH_576, ("--format", "gptq", *G128), "--group-size auto"),
        ({"hidden_size": 192}, ("--format", "compressed-tensors", *G128), "--group-size auto"),
        ({"intermediate_size": 320}, G128, "--group-size auto"),
        ({"intermediate_size": 320}, ("--format", "gptq", *G128), "--group-size auto"),
        ({"intermediate_size": 416}, G128, "--format gptq --group-size auto"),
        ({"intermediate_size": 272}, (), "--format compressed-tensors --group-size -1"),
        (QWEN_15_32B, G128, "--group-size auto"),
        ({}, (*SPARSE, "--group-size", 64), "--group-size auto"),
        ({"intermediate_size": 320}, (*SPARSE, *G128), "--group-size auto"),
    ],
)  # fmt: skip
def test_every_way_works_and_the_best_is_first(changes, words, best, cli, tmp_path) -> None:
    source = tiny_models.save(tiny_models.build("qwen3", **changes), tmp_path / "source")
    hint = refused(cli, source, tmp_path / "out", *words)
    ways = WAY.findall(hint)
    assert ways and ways[0] == (best, "14"), hint
    for way, count in ways:
        options = shlex.split(way[way.index("--") :])
        assert packed(cli, source, tmp_path / "out", *without(words, options), *options) == int(count)


def test_what_no_layout_holds_is_left_dense_with_what_engines_fuse(cli, tmp_path) -> None:
    """k has outputs that gptq does not take: q and v, which it is fused with, stay dense too."""
    model = tiny_models.build("qwen3", head_dim=24, num_attention_heads=8, num_key_value_heads=2)
    source = tiny_models.save(model, tmp_path / "source")
    for format in ("gptq", "marlin"):
        hint = refused(cli, source, tmp_path / "out", "--format", format)
        for way, count in WAY.findall(hint):
            options = shlex.split(way[way.index("--") :])
            words = without(("--format", format), options)
            assert packed(cli, source, tmp_path / "out", *words, *options) == int(count)
    assert "--format compressed-tensors" in hint


@pytest.mark.parametrize(
    "name, target, holding",
    [
        ("gptq-8bit", "marlin", "--format gptq"),
        ("gptq-asymmetric", "marlin", "--format gptq"),
        ("gptq-v2-zero-0", "gptq", "--format compressed-tensors"),
        ("gptq-act-order", "compressed-tensors", "--format gptq"),
        ("gptq-v2-act-order", "marlin", "--format gptq"),
        ("gptq", "marlin-24", "--format marlin"),
        ("compressed-tensors-asymmetric", "marlin", "--format gptq"),
    ],
)
def test_codes_that_a_format_does_not_hold(name, target, holding, cli, tmp_path) -> None:
    packed_models.make(name, source := tmp_path / "source")
    hint = refused(cli, source, tmp_path / "out", "--format", target)
    assert AS_THEY_ARE.findall(hint) == [holding], hint
    assert packed(cli, source, tmp_path / "out", *holding.split()) == 14
    ((again, count),) = WAY.findall(hint.partition("; ")[2])
    assert again.startswith("--requantize")
    words = without(("--format", target), shlex.split(again))
    assert packed(cli, source, tmp_path / "out", *words, *shlex.split(again)) == int(count) == 14
