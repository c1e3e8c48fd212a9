"""What the tests of engines share: this package as a plugin, and the answers that are right."""

import json
import shutil
import sys
from collections.abc import Callable
from functools import cache
from math import isfinite
from pathlib import Path

import packed_models
import pytest
import torch
import transformers
from engine_programs import PROMPTS, ROOT, TOKENS, Answers, run
from transformers import AutoTokenizer


@pytest.fixture(scope="session")
def plugin(tmp_path_factory) -> dict[str, str]:
    """The environment variables with which an engine finds this package installed."""
    sources, installed = (
        tmp_path_factory.mktemp("sources") / "marlin-convert",
        tmp_path_factory.mktemp("plugin"),
    )
    unwanted = shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__", "examples", "tests")
    shutil.copytree(ROOT, sources, symlinks=True, ignore=unwanted)
    pip = (sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--no-build-isolation")
    done = run(*pip, "--target", installed, sources)
    assert done.returncode == 0, done.stdout[-4000:]
    return {"PYTHONPATH": str(installed)}


@pytest.fixture(scope="session")
def plain(tmp_path_factory) -> Callable[..., Path]:
    """A checkpoint with its codes written out as weights, in the type that they are to be computed with."""

    @cache
    def write(checkpoint: Path, dtype: torch.dtype = torch.float16) -> Path:
        directory = tmp_path_factory.mktemp("plain") / checkpoint.name
        return packed_models.dequantize(checkpoint, directory, dtype)

    return write


@pytest.fixture(scope="session")
def reference(plain) -> Callable[[Path], torch.nn.Module]:
    """The plain weights of a checkpoint, loaded to compute in float32."""

    @cache
    def load(checkpoint: Path) -> torch.nn.Module:
        [name] = json.loads((checkpoint / "config.json").read_text())["architectures"]
        return getattr(transformers, name).from_pretrained(plain(checkpoint), dtype=torch.float32)

    return load


@pytest.fixture
def deviation(reference, record_property) -> Callable[..., float]:
    """How far an engine's answers are from the reference's: the largest difference in a logprob of a `share`.

    The reference is given the tokens that the engine chose. Where it would have chosen another one, two
    logprobs are off, and half of the difference between them counts as well.
    """

    def measure(answers: Answers, checkpoint: Path, share: float = 1) -> float:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        assert [answer["prompt"] for answer in answers] == tokenizer(PROMPTS).input_ids
        differences = []
        for answer in answers:
            prompt, tokens = answer["prompt"], torch.tensor(answer["tokens"])
            assert len(tokens) == TOKENS
            with torch.inference_mode():
                logits = reference(checkpoint)(input_ids=torch.tensor([prompt + answer["tokens"]])).logits
            logprobs = logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            chosen = logprobs.gather(1, tokens[:, None])[:, 0]
            off = (chosen - torch.tensor(answer["logprobs"])).abs()
            differences += torch.maximum(off, (logprobs.amax(-1) - chosen) / 2).tolist()
        assert all(map(isfinite, differences))
        differences.sort()
        record_property("largest difference", differences[-1])  # in the file of --junit-xml
        return differences[int(share * len(differences)) - 1]

    return measure
