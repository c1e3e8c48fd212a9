"""--effort high: what it makes is nearer to the original, and stopped at any step it goes on to the same bytes."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from click.testing import Result
from runs import contents, partial

from marlin_convert import quantize as story
from marlin_convert import tune
from marlin_convert.calibration import calibrate, load_tokenizer, tuning_text
from marlin_convert.checkpoint.linears import Weights
from marlin_convert.checkpoint.reader import Checkpoint
from marlin_convert.checks.divergence import compare
from marlin_convert.errors import ConvertError
from marlin_convert.hub import Source
from marlin_convert.models.blocks import BlockModel
from marlin_convert.recipe import Recipe
from marlin_convert.solvers.straight_through import TunedMatrix
from marlin_convert.student import Student

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 512 tokens: a text of some thousand has a few of them."""
    monkeypatch.setattr(tune, "STEP", 512)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two blocks with biases and an output head."""
    model = tiny_models.build("llama", torch.bfloat16)
    return tiny_models.save(model, tmp_path_factory.mktemp("model") / "llama")


def job(model: Path, output: Path, text: Path, *, resume: bool = False, **settings: Any) -> story.Job:
    recipe = {"samples": 4, "sequence_length": 64, "calibration": str(text), "effort": "high", **settings}
    return story.Job(Source(model, model.name, None), output, Recipe(**recipe), CPU, resume=resume)


def divergence(model: Path, made: Path, ids: torch.Tensor) -> float:
    models = [BlockModel(Weights(Checkpoint.open(one)), CPU, fast=False) for one in (model, made)]
    return compare(*models, ids).divergence


def test_it_answers_nearer_to_the_original_than_the_default(tinypy: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text((Path(json.__file__).parent / "decoder.py").read_text() * 2)
    source = Source(tinypy, "tinypy", None)
    ids = calibrate(load_tokenizer(source), "builtin", samples=4, length=256, seed=0, held_out=True).ids
    found = {}
    for effort in ("default", "high"):
        output = tmp_path / effort
        done = story.quantize(job(tinypy, output, text, samples=8, sequence_length=128, effort=effort))
        found[effort] = divergence(tinypy, output, ids)
    tuning = done.manifest["tuning"]
    print(found, tuning)
    assert tuning["kept"]
    assert found["high"] < found["default"]
