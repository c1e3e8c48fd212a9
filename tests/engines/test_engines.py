"""Engines load what we write, as it is, and answer as its dequantized weights do (make engines).

The engines live in environments of their own, built by benchmarks/peers/environments.sh in the directory that
INTEROP_ENVIRONMENTS names, or in .interop at the top of the repository. They run as subprocesses on a CPU and
answer with JSON: for each prompt its tokens, the tokens chosen greedily and their logprobs.
"""

import json
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from marlin_convert.checkpoint.linears import Weights
from marlin_convert.checkpoint.reader import Checkpoint

pytestmark = pytest.mark.engines

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

PROMPTS = ["def __init__(self, name):\n", "import os\nimport sys\n\n", "    for i in range(len("]
TOKENS = 16
# float16 arithmetic in the engines, float32 in the reference
TOLERANCE = 0.01

# Nothing but this machine is asked for anything, and one gigabyte of keys and values is plenty.
SETTINGS = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}

Answers = list[dict[str, Any]]


def run(*command: object) -> subprocess.CompletedProcess:
    """The finished command, all that it printed in stdout."""
    return subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **SETTINGS},
    )


@cache
def programs(environment: str) -> Path:
    """The bin directory of an engine's environment, built if it is not there."""
    directory = Path(os.environ.get("INTEROP_ENVIRONMENTS", ROOT / ".interop")).absolute()
    built = run(ROOT / "benchmarks" / "peers" / "environments.sh", environment, directory)
    assert built.returncode == 0, built.stdout[-4000:]
    return directory / environment / "bin"


def generate(environment: str, script: str, checkpoint: Path, out: Path) -> tuple[Answers, str]:
    """What an engine answers, and all that it printed."""
    request = out / "request.json"
    request.write_text(json.dumps({"prompts": PROMPTS, "tokens": TOKENS}))
    done = run(programs(environment) / "python", HERE / script, checkpoint, request, out / "answers.json")
    assert done.returncode == 0, done.stdout[-4000:]
    return json.loads((out / "answers.json").read_text()), done.stdout


@contextmanager
def vllm_serve(checkpoint: Path, log: Path) -> Iterator[str]:
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
            env={**os.environ, **SETTINGS},
        )
    try:
        late = time.monotonic() + 300
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


@pytest.fixture(scope="session")
def reference(quantized, tmp_path_factory) -> Callable[[str], torch.nn.Module]:
    """Our codes of a format, written out as plain float16 weights and loaded to compute in float32."""

    @cache
    def load(format: str) -> torch.nn.Module:
        checkpoint = Checkpoint.open(quantized(format))
        weights = Weights(checkpoint)
        linears = {f"{linear}.weight" for linear in weights.packed_linears()}
        names = checkpoint.tensors.keys() - weights.packed_names() | linears
        directory = tmp_path_factory.mktemp("reference")
        save_file({name: weights.read(name).half() for name in names}, directory / "model.safetensors")
        config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
        (directory / "config.json").write_text(json.dumps(config))
        return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)

    return load


@pytest.fixture
def deviation(reference, tinypy) -> Callable[[Answers, str], float]:
    """How far an engine's answers are from the reference's: the largest difference in a logprob.

    The reference is given the tokens that the engine chose. Where it would have chosen another one, the
    difference between the logprobs of these two counts as well.
    """
    tokenizer = AutoTokenizer.from_pretrained(tinypy)

    def measure(answers: Answers, format: str) -> float:
        assert [answer["prompt"] for answer in answers] == tokenizer(PROMPTS).input_ids
        largest = 0.0
        for answer in answers:
            prompt, tokens = answer["prompt"], torch.tensor(answer["tokens"])
            assert len(tokens) == TOKENS
            with torch.inference_mode():
                logits = reference(format)(torch.tensor([prompt + answer["tokens"]])).logits
            logprobs = logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            chosen = logprobs.gather(1, tokens[:, None])[:, 0]
            for difference in (chosen - torch.tensor(answer["logprobs"]), logprobs.amax(-1) - chosen):
                largest = max(largest, difference.abs().max().item())
        return largest

    return measure


@pytest.mark.parametrize("format", ["gptq", "compressed-tensors"])
def test_vllm_answers_right(format, quantized, deviation, tmp_path):
    answers, _ = generate("vllm", "vllm_generate.py", quantized(format), tmp_path)
    assert deviation(answers, format) < TOLERANCE


@pytest.mark.parametrize("format", ["gptq", "compressed-tensors"])
def test_vllm_serves_right_answers(format, quantized, deviation, tmp_path):
    with vllm_serve(quantized(format), tmp_path / "server.log") as address:
        answers = complete(address, quantized(format))
    assert deviation(answers, format) < TOLERANCE


@pytest.mark.parametrize(
    ("environment", "format"),
    [("transformers", "gptq"), ("transformers", "compressed-tensors"), ("llmc", "compressed-tensors")],
)
def test_transformers_answers_right(environment, format, quantized, deviation, tmp_path):
    answers, _ = generate(environment, "transformers_generate.py", quantized(format), tmp_path)
    assert deviation(answers, format) < TOLERANCE


def test_vllm_refuses_marlin(quantized, tmp_path):
    done = run(programs("vllm") / "vllm", "serve", quantized("marlin"), "--host", "127.0.0.1", "--port", 0)
    assert done.returncode != 0 and "Unknown quantization method: marlin" in done.stdout, done.stdout[-4000:]


@pytest.mark.parametrize("environment", ["transformers", "llmc"])
def test_transformers_takes_random_weights_for_marlin(environment, quantized, deviation, tmp_path):
    answers, printed = generate(environment, "transformers_generate.py", quantized("marlin"), tmp_path)
    assert "Unknown quantization type, got marlin" in printed and "newly initialized" in printed
    assert deviation(answers, "marlin") > 1
