"""Engines load what we write, as it is, and answer as its dequantized weights do (make engines).

What plugs into them is this package, installed in a directory of its own that a test puts on their path or
does not.
"""

import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import packed_models
import pytest
import torch
from engine_programs import (
    HERE,
    INHERITED,
    PROMPTS,
    SETTINGS,
    TOKENS,
    TOLERANCE,
    TWO_RANKS,
    Answers,
    answer,
    needs_avx512,
    programs,
    run,
)  # fmt: skip
from safetensors import safe_open
from safetensors.torch import load_file

from marlin_convert.checkpoint.linears import Weights
from marlin_convert.checkpoint.reader import Checkpoint

pytestmark = pytest.mark.engines


@contextmanager
def vllm_serve(checkpoint: Path, log: Path, **environment: str) -> Iterator[str]:
    """The address of a vLLM server of this checkpoint."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [programs("vllm") / "vllm", "serve", checkpoint, "--dtype", "float16"]
    with log.open("w") as file:
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**INHERITED, **SETTINGS, **environment},
        )
    try:
        late = time.monotonic() + 600
        while not answers_at(f"http://127.0.0.1:{port}/health"):
            assert server.poll() is None and time.monotonic() < late, log.read_text()[-4000:]
            time.sleep(1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def answers_at(address: str) -> bool:
    try:
        return urlopen(address).status == 200
    except URLError:
        return False


def complete(address: str, model: Path) -> Answers:
    """The answers of a server with OpenAI's interface; `return_token_ids` is vLLM's own."""
    body = {
        "model": str(model),
        "prompt": PROMPTS,
        "max_tokens": TOKENS,
        "temperature": 0,
        "logprobs": 0,
        "return_token_ids": True,
    }
    request = Request(
        f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    return [
        {
            "prompt": choice["prompt_token_ids"],
            "tokens": choice["token_ids"],
            "logprobs": choice["logprobs"]["token_logprobs"],
        }
        for choice in json.load(urlopen(request))["choices"]
    ]


def called(checkpoint: Path, quantization: dict[str, Any], directory: Path) -> Path:
    """The same checkpoint with another quantization_config."""
    shutil.copytree(checkpoint, directory)
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = quantization
    (directory / "config.json").write_text(json.dumps(config))
    return directory


# In vLLM on a CPU.


@needs_avx512
@pytest.mark.parametrize("format", ["gptq", "compressed-tensors"])
def test_vllm_answers_right(format, quantized, deviation, tmp_path):
    answers, _ = answer("vllm", "vllm_generate.py", quantized(format), tmp_path)
    assert deviation(answers, quantized(format)) < TOLERANCE


@pytest.fixture(scope="session")
def mixture(tinypy, tmp_path_factory) -> Callable[[str], Path]:
    """A checkpoint whose attention has finer groups than the rest. vLLM has no 8 bits on a CPU."""

    @cache
    def make(format: str) -> Path:
        directory = tmp_path_factory.mktemp("mixture")
        recipe = {
            "format": format,
            "overrides": {"*.self_attn.*": {"group_size": 64}},
            "samples": 4,
            "sequence_length": 128,
            "effort": "fast",
        }
        (directory / "recipe.yaml").write_text(json.dumps(recipe))
        words = ["quantize", tinypy, "-o", directory / format, "--recipe", directory / "recipe.yaml", "-q"]
        done = run(sys.executable, "-m", "marlin_convert", *words)
        assert done.returncode == 0, done.stdout
        return directory / format

    return make


@needs_avx512
@pytest.mark.parametrize("format", ["gptq", "compressed-tensors"])
def test_vllm_answers_right_of_a_mixture(format, mixture, deviation, tmp_path):
    answers, _ = answer("vllm", "vllm_generate.py", mixture(format), tmp_path)
    assert deviation(answers, mixture(format)) < TOLERANCE


def test_vllm_with_the_plugin_answers_right_of_a_mixture(mixture, plugin, deviation, tmp_path):
    answers, _ = answer("vllm", "vllm_generate.py", mixture("marlin"), tmp_path, **plugin)
    assert deviation(answers, mixture("marlin")) < TOLERANCE


@needs_avx512
@pytest.mark.parametrize("format", ["gptq", "compressed-tensors"])
def test_vllm_serves_right_answers(format, quantized, deviation, tmp_path):
    with vllm_serve(quantized(format), tmp_path / "server.log") as address:
        answers = complete(address, quantized(format))
    assert deviation(answers, quantized(format)) < TOLERANCE


def tolerance(format: str) -> float:
    """Twice as much of 2:4: its plain weights were seen 0.0123 off too, to the bit what packed ones were.

    A group that is lost, or 8 outputs in the places of others, is 0.8 and more.
    """
    return (2 if format == "marlin-24" else 1) * TOLERANCE


@pytest.mark.parametrize("ranks", [2, 1])
@pytest.mark.parametrize("format", ["marlin", "marlin-24"])
def test_vllm_with_the_plugin_answers_right(format, ranks, plugin, quantized, deviation, tmp_path):
    options, cores = ({"tensor_parallel_size": 2}, TWO_RANKS) if ranks == 2 else ({}, {})
    answers, _ = answer(
        "vllm", "vllm_generate.py", quantized(format), tmp_path, options=options, **plugin, **cores
    )
    assert deviation(answers, quantized(format)) < tolerance(format)


@pytest.mark.parametrize("name", ["marlin", "marlin-24-channel"])
def test_vllm_with_the_plugin_gives_a_rank_64_inputs(name, plugin, deviation, tmp_path):
    packed_models.make(name, tmp_path / "narrow")
    arguments = (tmp_path / "narrow", tmp_path)
    options = {"tensor_parallel_size": 2}
    answers, _ = answer("vllm", "vllm_generate.py", *arguments, options=options, **plugin, **TWO_RANKS)
    assert deviation(answers, tmp_path / "narrow") < TOLERANCE


def odd(name: str, directory: Path) -> Path:
    """Linears of which half of the inputs is an odd multiple of 64."""
    kind, pack, config = packed_models.SOURCES[name]
    shapes = {"o_proj": (128, 128), "down_proj": (1152, 256)}
    linears = {
        f"model.layers.0.{linear}": packed_models.random_linear(k, n, k, **kind)
        for linear, (k, n) in shapes.items()
    }
    return packed_models.save(directory, linears, pack, config)


@pytest.mark.parametrize("name", ["quantized marlin", "quantized marlin-24", "marlin", "marlin-24-channel"])
def test_vllm_with_the_plugin_gives_a_rank_its_part(name, plugin, quantized, tmp_path):
    """Exactly, whatever its arithmetic makes of it."""
    script = (programs("vllm") / "python", HERE / "vllm_parts.py")
    checkpoint = quantized(name.split()[1]) if " " in name else odd(name, tmp_path / "odd")
    done = run(*script, checkpoint, tmp_path / "parts.safetensors", **plugin)
    assert done.returncode == 0, done.stdout[-4000:]
    weights = Weights(Checkpoint.open(checkpoint))
    for name, found in load_file(tmp_path / "parts.safetensors").items():
        linear, part, rank = name.rsplit(".", 2)
        half = weights.read(f"{linear}.weight").chunk(2, 1 if part == "rows" else 0)[int(rank)]
        assert torch.equal(found, torch.cat((half, half)) if part == "fused" else half), name
    with safe_open(tmp_path / "parts.safetensors", "pt") as file:
        said = file.metadata()
    assert said.pop("lora") == "meta"
    assert said and all(f": {without.split()[1]} is missing" in line for without, line in said.items())


@pytest.mark.parametrize(
    ("format", "name"),
    [("marlin", {"is_marlin_format": True}), ("marlin-24", {"checkpoint_format": "marlin_24"})],
)
def test_vllm_with_the_plugin_knows_older_names(format, name, plugin, quantized, deviation, tmp_path):
    checkpoint = called(
        quantized(format), packed_models.gptq_config(group_size=128, **name), tmp_path / "old"
    )
    answers, _ = answer("vllm", "vllm_generate.py", checkpoint, tmp_path, **plugin)
    assert deviation(answers, checkpoint) < tolerance(format)


def test_vllm_with_the_plugin_answers_right_to_a_mixture(plugin, mixed, deviation, tmp_path):
    answers, _ = answer("vllm", "vllm_generate.py", mixed, tmp_path, **plugin)
    assert deviation(answers, mixed) < TOLERANCE


@pytest.mark.parametrize("format", ["marlin", "marlin-24"])
def test_vllm_with_the_plugin_serves_right_answers(format, plugin, quantized, deviation, tmp_path):
    with vllm_serve(quantized(format), tmp_path / "server.log", **plugin) as address:
        answers = complete(address, quantized(format))
    assert deviation(answers, quantized(format)) < tolerance(format)


def test_vllm_with_the_plugin_runs_bfloat16(plugin, quantized, deviation, tmp_path):
    """Of eight times coarser numbers: plain weights were seen 0.0834 off, to the bit as packed ones."""
    options = {"dtype": "bfloat16"}
    answers, _ = answer("vllm", "vllm_generate.py", quantized("marlin"), tmp_path, options=options, **plugin)
    assert deviation(answers, quantized("marlin")) < 16 * TOLERANCE


def test_vllm_with_the_plugin_refuses_what_it_cannot_split(plugin, tmp_path):
    packed_models.make("marlin-sparse", tmp_path / "narrow")  # in groups of 128
    command = (programs("vllm") / "vllm", "serve", tmp_path / "narrow", "--host", "127.0.0.1", "--port", 0)
    done = run(*command, "--tensor-parallel-size", 2, **plugin, **TWO_RANKS)
    assert done.returncode != 0
    assert (
        "model.layers.0.self_attn.o_proj has 128 inputs and 128 outputs, of which a rank gets 64 and 128: "
        "marlin needs inputs divisible by the group size 128, has 64." in done.stdout
    ), done.stdout[-4000:]


def test_vllm_without_the_plugin_refuses_marlin(quantized, tmp_path):
    done = run(programs("vllm") / "vllm", "serve", quantized("marlin"), "--host", "127.0.0.1", "--port", 0)
    assert done.returncode != 0 and "Unknown quantization method: marlin" in done.stdout, done.stdout[-4000:]


# In transformers: 5.23.0, and 5.17.0 in llm-compressor's environment. On a CPU its float16 arithmetic is
# up to 0.014 from float32, with plain weights as well: these are what its answers are compared with.


def test_transformers_answers_right_to_gptq(quantized, deviation, tmp_path):
    """With GPTQModel's layers, whose arithmetic is another one."""
    answers, _ = answer("transformers", "transformers_generate.py", quantized("gptq"), tmp_path)
    assert deviation(answers, quantized("gptq")) < TOLERANCE


@pytest.mark.parametrize("environment", ["transformers", "llmc"])
def test_transformers_answers_as_with_plain_weights(environment, quantized, plain, tmp_path):
    script, checkpoint = "transformers_generate.py", quantized("compressed-tensors")
    answers, _ = answer(environment, script, checkpoint, tmp_path)
    expected, _ = answer(environment, script, plain(checkpoint), tmp_path)
    for one, other in zip(answers, expected, strict=True):
        assert one["tokens"] == other["tokens"]
        assert one["logprobs"] == pytest.approx(other["logprobs"], abs=TOLERANCE)


@pytest.mark.parametrize("environment", ["transformers", "llmc"])
@pytest.mark.parametrize("format", ["marlin", "marlin-24", "mixed"])
def test_transformers_with_the_quantizer_answers_as_with_plain_weights(
    environment, format, plugin, quantized, mixed, plain, tmp_path
):
    """To the bit: it multiplies by the same float16 weights."""
    checkpoint = mixed if format == "mixed" else quantized(format)
    script = "transformers_generate.py"
    options = {"device_map": "auto"}
    answers, _ = answer(environment, script, checkpoint, tmp_path, options=options, **plugin)
    expected, _ = answer(environment, script, plain(checkpoint), tmp_path, options=options)
    assert answers == expected


@pytest.mark.parametrize("environment", ["transformers", "llmc"])
def test_transformers_without_the_quantizer_takes_random_weights(environment, quantized, deviation, tmp_path):
    answers, printed = answer(environment, "transformers_generate.py", quantized("marlin"), tmp_path)
    assert "Unknown quantization type, got marlin" in printed and "newly initialized" in printed
    assert deviation(answers, quantized("marlin")) > 1
