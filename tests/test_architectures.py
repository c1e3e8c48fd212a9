"""A sample of what `make archs` runs: diverse types converted, verified, and read by plain transformers."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "architectures"))
import run
import tiny


@pytest.mark.parametrize("model_type", tiny.SAMPLE)
def test_a_type_is_converted_to_what_engines_load(model_type: str, tmp_path: Path) -> None:
    found = run.convert(model_type, tmp_path)
    assert run.is_done(found), found
    packed = [one["packed"] for one in found["formats"].values() if "packed" in one]
    assert all(count >= 8 for count in packed)


def test_a_tied_head_of_another_name_is_nothing_to_decompress(tmp_path: Path) -> None:
    """compressed-tensors takes every linear for packed that its config does not ignore."""
    run.convert("biogpt", tmp_path)
    config = json.loads((tmp_path / "compressed-tensors" / "config.json").read_text())
    assert config["quantization_config"]["ignore"] == ["lm_head", "output_projection"]


def test_a_wrong_weight_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison is one that can fail."""
    read = run.plain_reading.weight
    monkeypatch.setattr(run.plain_reading, "weight", lambda *found: 1.01 * read(*found))
    with pytest.raises(RuntimeError, match="logits differ"):
        run.convert("llama", tmp_path)


@pytest.mark.parametrize(
    "model_type, said",
    [
        ("longcat_flash", "has experts of a kind of its own"),
        ("gpt2", "keeps most weights of its blocks in Conv1D, not in nn.Linear"),
        ("bart", "is an encoder, or works with one"),
        ("blip-2", "does not run on the ids of a text alone"),
        ("hrm_text", "two lists of blocks"),
    ],
)
def test_what_cannot_be_taken_is_refused_by_name(model_type: str, said: str, tmp_path: Path) -> None:
    found = run.convert(model_type, tmp_path)
    for one in found["formats"].values():
        assert f"'{model_type}'" in one["refused"] and said in one["refused"] and one["hint"]
