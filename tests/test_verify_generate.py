"""`verify --checks generate`: what transformers makes of a checkpoint."""

import json
import shutil

import pytest

CHECKS = ("--checks", "files,layout,sparsity,numbers,generate")


@pytest.mark.parametrize("format", ["marlin", "marlin-24"])
def test_transformers_finds_the_same_tokens(format, tinypy, tmp_path, cli):
    words = ("--sparsity", "2:4") if format == "marlin-24" else ()
    short = ("--samples", 4, "--sequence-length", 256, "-q")
    assert cli("quantize", tinypy, "-o", tmp_path / "out", *words, *short).exit_code == 0
    result = cli("verify", tmp_path / "out", *CHECKS)
    assert result.exit_code == 0, result.output
    assert "generate pass     32 greedy tokens by transformers" in result.output
    report = json.loads((tmp_path / "out" / "marlin_convert_verify.json").read_text())
    assert report["checks"]["generate"]["details"]["difference"] < 0.1
    assert "generate" not in cli("verify", tmp_path / "out").output


def test_a_stock_layout_runs_or_says_what_it_needs(quantized, tmp_path, cli):
    # a copy: verify writes its report into the directory, which other tests share
    directory = shutil.copytree(quantized("compressed-tensors"), tmp_path / "copy")
    result = cli("verify", directory, *CHECKS)
    assert result.exit_code == 0 and "generate " in result.output
    assert "generate skipped  transformers needs more" in result.output or "generate pass" in result.output
