"""Checkpoints go to the peers and come back with every weight the same, bit for bit (make interop).

The peers live in environments of their own, built by benchmarks/peers/environments.sh in the directory that
INTEROP_ENVIRONMENTS names, or in .interop at the top of the repository. They run as subprocesses on a CPU and
answer with safetensors files: the weights as their own layers apply them.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from marlin_convert.checkpoint.linears import Weights
from marlin_convert.checkpoint.reader import Checkpoint
from marlin_convert.formats import FORMATS
from marlin_convert.quantized import QuantizedLinear

pytestmark = pytest.mark.interop

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PEERS = ROOT / "benchmarks" / "peers"
MODEL = ROOT / "examples" / "tinypy-4m"

AUTOGPTQ = ("symmetric", "asymmetric", "act-order", "asymmetric-act-order", "marlin")
LOADERS = {
    "AutoGPTQ": ("autogptq", "autogptq_load.py"),
    "GPTQModel": ("gptqm", "gptqmodel_load.py"),
    "compressed-tensors": ("llmc", "compressed_tensors_load.py"),
}
RUNNERS = {"GPTQModel": ("gptqm", "gptqmodel_.py"), "llm-compressor": ("llmc", "llm_compressor.py")}


def run(*command: object) -> str:
    """The command's output; its last lines are the failure's message if it fails."""
    done = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


@cache
def python(environment: str) -> Path:
    """The Python of a peer's environment, built if it is not there."""
    directory = Path(os.environ.get("INTEROP_ENVIRONMENTS", ROOT / ".interop")).absolute()
    run(PEERS / "environments.sh", environment, directory)
    return directory / environment / "bin" / "python"


def loaded_by(peer: str, checkpoint: Path, out: Path) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint's quantized linears as the peer loads and applies them."""
    environment, script = LOADERS[peer]
    run(python(environment), HERE / script, checkpoint, out)
    return load_file(out)


def marlin_convert(source: Path, out: Path, layout: str) -> Path:
    """What our command makes of a model, dense or quantized."""
    sizes = ["--samples", 8, "--sequence-length", 128] if source == MODEL else []
    run(sys.executable, "-m", "marlin_convert", "quantize", source, "-o", out, "--format", layout, *sizes)
    return out


def linears(directory: Path) -> dict[str, QuantizedLinear]:
    """Every quantized linear of a checkpoint as our reader sees it."""
    checkpoint = Checkpoint.open(directory)
    weights = Weights(checkpoint)
    return {
        name.rpartition(".")[0]: weights.quantized(name.rpartition(".")[0])
        for name in checkpoint.tensors
        if name.endswith((".qweight", ".weight_packed", ".B"))
    }


def assert_same_weights(ours: dict[str, QuantizedLinear], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, linear in ours.items():
        assert torch.equal(linear.dequantize(theirs[name].dtype), theirs[name]), name


def assert_same_codes(ours: dict[str, QuantizedLinear], theirs: dict[str, QuantizedLinear]) -> None:
    assert ours.keys() == theirs.keys()
    for name, linear in ours.items():
        other = theirs[name]
        assert torch.equal(linear.codes, other.codes), name
        assert torch.equal(linear.scales.float(), other.scales.float()), name
        for mine, its in ((linear.zeros, other.zeros), (linear.group_of_row, other.group_of_row)):
            assert (mine is None) == (its is None) and (mine is None or torch.equal(mine, its)), name


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """A checkpoint and its weights, both by the peer named: "AutoGPTQ marlin", "GPTQModel best" and so on."""

    @cache
    def make(maker: str) -> tuple[Path, Path]:
        peer, setting = maker.split()
        directory = tmp_path_factory.mktemp(maker.replace(" ", "-"))
        checkpoint, weights = directory / "checkpoint", directory / "weights.safetensors"
        if peer == "AutoGPTQ":
            out = directory / "made"
            run(python("autogptq"), HERE / "autogptq_pack.py", setting, out)
            return out / "checkpoint", out / "weights.safetensors"
        tokens = torch.randint(4096, (8, 128), generator=torch.Generator().manual_seed(0))
        save_file({"input_ids": tokens}, directory / "tokens.safetensors")
        environment, script = RUNNERS[peer]
        arguments = (MODEL, directory / "tokens.safetensors", checkpoint, "--setting", setting)
        printed = run(python(environment), PEERS / script, *arguments)
        assert json.loads(printed.splitlines()[-1])["peer"] == peer
        loaded_by("compressed-tensors" if peer == "llm-compressor" else peer, checkpoint, weights)
        return checkpoint, weights

    return make


MADE = [f"AutoGPTQ {kind}" for kind in AUTOGPTQ] + [
    f"{peer} {setting}" for peer in RUNNERS for setting in ("default", "best")
]


@pytest.mark.parametrize("maker", MADE)
def test_reads_what_a_peer_wrote(maker, made):
    checkpoint, weights = made(maker)
    assert_same_weights(linears(checkpoint), load_file(weights))


@pytest.mark.parametrize("maker", MADE)
def test_packs_the_bytes_that_the_peer_packed(maker, made):
    checkpoint = Checkpoint.open(made(maker)[0])
    weights = Weights(checkpoint)
    layout = FORMATS[weights.scheme.format]
    for name, linear in linears(checkpoint.directory).items():
        for suffix, packed in layout.pack(linear).items():
            stored = checkpoint.read(f"{name}.{suffix}")
            assert torch.equal(packed.to(stored.dtype), stored), f"{name}.{suffix}"


@pytest.mark.parametrize(
    ("layout", "peer"),
    [("gptq", "AutoGPTQ"), ("gptq", "GPTQModel"), ("compressed-tensors", "compressed-tensors")],
)
def test_a_peer_loads_what_we_wrote(layout, peer, tmp_path):
    checkpoint = marlin_convert(MODEL, tmp_path / "checkpoint", layout)
    assert_same_weights(linears(checkpoint), loaded_by(peer, checkpoint, tmp_path / "weights.safetensors"))


@pytest.mark.parametrize(
    ("maker", "layout", "peer"),
    [
        ("AutoGPTQ symmetric", "compressed-tensors", "compressed-tensors"),
        ("AutoGPTQ asymmetric", "compressed-tensors", "compressed-tensors"),
        ("AutoGPTQ marlin", "gptq", "AutoGPTQ"),
        ("AutoGPTQ marlin", "compressed-tensors", "compressed-tensors"),
        ("GPTQModel default", "compressed-tensors", "compressed-tensors"),
        ("llm-compressor default", "gptq", "AutoGPTQ"),
        ("llm-compressor default", "gptq", "GPTQModel"),
    ],
)
def test_carries_a_peers_weights_to_another_peer(maker, layout, peer, made, tmp_path):
    source, weights = made(maker)
    checkpoint = marlin_convert(source, tmp_path / "checkpoint", layout)
    theirs, before = loaded_by(peer, checkpoint, tmp_path / "weights.safetensors"), load_file(weights)
    assert theirs.keys() == before.keys()
    for name in before:
        assert torch.equal(theirs[name], before[name]), name


@pytest.mark.parametrize("maker", ["AutoGPTQ symmetric", "GPTQModel best", "llm-compressor best"])
def test_carries_a_peers_codes_to_marlin(maker, made, tmp_path):
    source, _ = made(maker)
    assert_same_codes(linears(marlin_convert(source, tmp_path / "checkpoint", "marlin")), linears(source))
