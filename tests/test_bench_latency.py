"""`bench latency`: batches through transformers on this machine, and what cannot be measured."""

import json
from importlib.util import find_spec

import pytest
import tiny_models
import torch

from marlin_convert.bench.batches import Latencies, Latency, table
from marlin_convert.bench.latency import Job, measure


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
    """Before anything is loaded; vLLM takes no GPU but the first it sees."""
    result = cli("bench", "latency", model, "--device", "cpu", "--tensor-parallel-size", 2)
    assert result.exit_code == 1 and "--tensor-parallel-size 2 is vLLM's" in result.output
    assert cli("bench", "latency", model, "--tensor-parallel-size", 0).exit_code == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.skipif(not find_spec("vllm"), reason="needs vLLM")
def test_vllm_has_as_many_gpus_as_are_asked_for(model, cli):
    found = torch.cuda.device_count()
    result = cli("bench", "latency", model, "--tensor-parallel-size", found + 1)
    assert result.exit_code == 1 and f"there are {found} GPUs" in result.output
    if found > 1:
        result = cli("bench", "latency", model, "--device", "cuda:1")
        assert result.exit_code == 1 and "CUDA_VISIBLE_DEVICES=1" in result.output


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
