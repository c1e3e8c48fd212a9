"""`bench latency`: batches through transformers on this machine, and what cannot be measured."""

import json
import sys
from types import SimpleNamespace

import pytest
import tiny_models
import torch

from marlin_convert.bench import latency
from marlin_convert.bench.batches import Latencies, Latency, table
from marlin_convert.bench.latency import Job, measure
from marlin_convert.errors import ConvertError


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_models.save(tiny_models.build("llama"), tmp_path_factory.mktemp("source") / "model")


def test_a_model_beside_itself(model, tmp_path, cli):
    result = cli(
        "bench", "latency", model, "--baseline", model, "--batch-sizes", "1,3", "--input-len", 8,
        "--output-len", 5, "-o", tmp_path / "out", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found == json.loads((tmp_path / "out" / "latency.json").read_text())
    assert found["engine"].startswith("transformers 5") and found["device"] == "cpu"
    assert (
        [row["batch"] for row in found["checkpoint"]] == [1, 3] == [row["batch"] for row in found["baseline"]]
    )
    for mine, other in zip(found["checkpoint"], found["baseline"], strict=True):
        ratio = other["token_ms"] / mine["token_ms"]
        assert found["speedups"][str(mine["batch"])] == pytest.approx(ratio, rel=1e-2)
    assert (tmp_path / "out" / "latency.png").read_bytes().startswith(b"\x89PNG")


def test_the_first_token_is_not_counted():
    """An engine that takes 30 ms to its first token and 2 ms for every one after it."""
    import time

    asked = []

    def answer(prompts, tokens):
        asked.append((tuple(prompts.shape), tokens, int(prompts.max())))
        time.sleep(0.030 + 0.002 * (tokens - 1))

    job = Job(None, None, torch.device("cpu"), batch_sizes=(2, 4), input_len=7, output_len=21)
    for found, batch in zip(measure(answer, job, 100), (2, 4), strict=True):
        assert found.batch == batch
        assert 30 <= found.first_ms < 60 and 1.5 < found.token_ms < 4
        assert found.tokens_per_second == pytest.approx(1e3 * batch / found.token_ms)
    assert {shape for shape, _, _ in asked} == {(2, 7), (4, 7)} and {count for _, count, _ in asked} == {
        1,
        21,
    }
    assert max(most for _, _, most in asked) < 100


def test_the_table():
    found = Latencies("vllm 1", "GPU", 64, 64, [Latency(1, 5, 2), Latency(8, 9, 4)], [Latency(1, 8, 5)])
    assert found.speedups() == {1: 2.5}
    lines = table(found).splitlines()
    assert "2.50x" in lines[2] and lines[3].split() == ["8", "9.00", "4.000", "2000"]


def test_gpus_that_are_not_there_are_refused(model, cli):
    """Before anything is loaded."""
    result = cli("bench", "latency", model, "--device", "cpu", "--tensor-parallel-size", 2)
    assert result.exit_code == 1 and "--tensor-parallel-size 2 is vLLM's" in result.output
    assert cli("bench", "latency", model, "--tensor-parallel-size", 0).exit_code == 2


def test_vllm_is_given_the_gpus_that_are_asked_for(model, monkeypatch):
    """On a machine with two GPUs and vLLM, as it seems here."""
    engines = []

    class Engine:
        def __init__(self, directory, **settings):
            engines.append((directory, settings))

        def generate(self, prompts, *_, **__):
            assert prompts

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=Engine, SamplingParams=dict))
    monkeypatch.setattr(latency, "find_spec", lambda name: name == "vllm")
    monkeypatch.setattr(latency, "_version", lambda name: "1.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)

    def found(device: str, size: int) -> Latencies:
        return latency.run(Job(model, None, torch.device(device), (1,), tensor_parallel_size=size))

    assert [found(device, size).device for device, size in (("cuda", 2), ("cuda:0", 1))] == ["2 x GPU", "GPU"]
    assert [settings["tensor_parallel_size"] for _, settings in engines] == [2, 1]
    with pytest.raises(ConvertError, match="--tensor-parallel-size 3, and there are 2 GPUs"):
        found("cuda", 3)
    with pytest.raises(ConvertError, match="the first GPU it sees, not cuda:1") as refused:
        found("cuda:1", 1)
    assert "CUDA_VISIBLE_DEVICES" in refused.value.hint
    assert len(engines) == 2


def test_what_cannot_be_measured(model, tmp_path, cli):
    limit = json.loads((model / "config.json").read_text())["max_position_embeddings"]
    result = cli("bench", "latency", model, "--input-len", limit, "-o", tmp_path / "out")
    assert result.exit_code == 1 and f"holds {limit} tokens" in result.output and not list(tmp_path.iterdir())
    assert cli("bench", "latency", model, "--output-len", 1).exit_code == 2
    assert cli("bench", "latency", model, "--batch-sizes", "0").exit_code == 2
    assert cli("bench", "latency", tmp_path / "nowhere").exit_code == 1
    broken = tmp_path / "broken"
    broken.mkdir()
    config = json.loads((model / "config.json").read_text()) | {"model_type": "no such model"}
    (broken / "config.json").write_text(json.dumps(config))
    (broken / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes())
    result = cli("bench", "latency", broken, "--batch-sizes", "1")
    assert result.exit_code == 1 and "cannot run broken" in result.output
