"""Whole conversions against a plain reference (reference.py): what is done, and what is said of it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import reference
import rows
import torch
from torch import Tensor
from transformers import AutoTokenizer

from marlin_convert.checkpoint.linears import Weights
from marlin_convert.checkpoint.reader import Checkpoint

LENGTH = 128


class Text:
    """A text file and its tokens (samples, LENGTH): all of its windows, so that none are drawn."""

    def __init__(self, path: Path, text: str, tokenizer) -> None:
        path.write_text(text)
        ids = tokenizer(text).input_ids
        self.path, self.samples = path, len(ids) // LENGTH
        self.ids = torch.tensor(ids[: self.samples * LENGTH]).view(self.samples, LENGTH)

    def options(self, name: str) -> list[object]:
        return [name, self.path, "--samples", self.samples, "--sequence-length", LENGTH, "--device", "cpu"]


@pytest.fixture(scope="module")
def texts(tinypy: Path, tmp_path_factory) -> tuple[Text, Text]:
    """One to calibrate on, and one that is held out."""
    directory, tokenizer = tmp_path_factory.mktemp("texts"), AutoTokenizer.from_pretrained(tinypy)
    words = Path(json.__file__).with_name("decoder.py").read_text()
    parts = {"one.txt": words[:9000], "two.txt": words[9000:]}
    one, two = (Text(directory / name, part, tokenizer) for name, part in parts.items())
    return one, two


def errors_said(output: Path) -> dict[str, float]:
    found = rows.worked_on(json.loads((output / "marlin_convert.json").read_text()))
    return {row["name"]: row["error"] for row in found}


def stored(output: Path) -> Callable[[str, Tensor, Tensor, Tensor], Tensor]:
    """What the output gives a linear, to walk with."""
    weights = Weights(Checkpoint.open(output))
    return lambda name, weight, x, y: weights.read(f"{name}.weight")


@pytest.mark.parametrize("command", ["quantize", "sparsify"])
def test_a_conversion(command: str, tinypy: Path, texts: tuple[Text, Text], tmp_path: Path, cli) -> None:
    """Errors are those for the inputs that the quantized linears before leave; the divergence is verify's."""
    made = tmp_path / command
    done = cli(command, tinypy, "-o", made, *texts[0].options("--calibration"))
    assert done.exit_code == 0, done.output
    source, model = reference.load(tinypy), reference.load(tinypy)
    errors = reference.walk(model, texts[0].ids, stored(made), source)
    said = errors_said(made)
    assert said.keys() == errors.keys()
    for name, error in errors.items():
        assert said[name] == pytest.approx(error, rel=4e-3), name

    held_out = texts[1]
    done = cli("verify", made, "--source", tinypy, "--json", "-q", *held_out.options("--text"))
    assert done.exit_code == 0, done.output
    figures = json.loads(done.stdout)["checks"]["numbers"]["details"]["text"]
    divergence = reference.divergence(source, model, held_out.ids)
    assert figures["divergence"] == pytest.approx(divergence, rel=2e-3)
    swapped = reference.divergence(model, source, held_out.ids)
    assert abs(swapped / divergence - 1) > 3e-3, "the other direction would pass as well"

    if command == "quantize":
        plain = reference.load(tinypy)
        theirs = reference.walk(
            plain, texts[0].ids, lambda _, w, x, y: reference.gptq(reference.compensated(w, x, y), x), source
        )
        ratios = torch.tensor([errors[name] / theirs[name] for name in errors])
        assert ratios.min() > 0.8 and ratios.max() < 0.95 and 0.88 < ratios.mean() < 0.93
        assert 0.9 < divergence / reference.divergence(source, plain, held_out.ids) < 1.05
