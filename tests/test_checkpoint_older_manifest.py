"""Manifests of versions that had no record for a matrix: the same fates are read out of them."""

import json
import shutil
from pathlib import Path

import pytest
import rows

from marlin_convert.checkpoint import manifest as manifests


@pytest.fixture(scope="module")
def output(tinypy: Path, tmp_path_factory) -> Path:
    """A checkpoint with matrices of every fate."""
    directory = tmp_path_factory.mktemp("mixed") / "out"
    from click.testing import CliRunner

    from marlin_convert.cli.main import main

    words = ["--samples", "2", "--sequence-length", "64", "--device", "cpu", "-q", "--group-size", "128"]
    words += ["--sparsity", "2:4", "--skip", "*.0.mlp.down_proj", "--unpruned", "*.1.mlp.down_proj"]
    done = CliRunner().invoke(main, ["quantize", str(tinypy), "-o", str(directory), *words])
    assert done.exit_code == 0, done.output
    return directory


def test_the_same_fates_are_read(output: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(output, tmp_path / "earlier")
    manifest = json.loads((output / manifests.MANIFEST).read_text())
    (directory / manifests.MANIFEST).write_text(json.dumps(rows.earlier(manifest)))
    today, then = (manifests.fates(manifests.load(place)) for place in (output, directory))
    assert then.keys() == today.keys() and len({fate.layout.format for fate in today.values()}) == 3
    for name, fate in today.items():
        if fate.worked_on:
            assert then[name] == fate
        else:  # an earlier one does not say the shape of what was left dense
            assert (then[name].layout.format, then[name].reason) == ("dense", fate.reason)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    "said",
    [
        lambda bits: {"quant_method": "gptq", "bits": bits, "group_size": 128},
        lambda bits: {"config_groups": {"group_0": {"weights": {"num_bits": bits}}}},
    ],
)
def test_the_bits_are_those_of_the_config(bits, said, output: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(output, tmp_path / "earlier")
    manifest = rows.earlier(json.loads((output / manifests.MANIFEST).read_text()))
    manifest["recipe"]["format"] = "gptq"
    (directory / manifests.MANIFEST).write_text(json.dumps(manifest))
    config = json.loads((directory / "config.json").read_text()) | {"quantization_config": said(bits)}
    (directory / "config.json").write_text(json.dumps(config))
    found = manifests.fates(manifests.load(directory)).values()
    assert {fate.layout.bits for fate in found if fate.packed} == {bits}
