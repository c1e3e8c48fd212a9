"""Conversions that torchrun shares among processes: the same codes as one makes, and none goes on alone."""

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diverse_models
import pytest
import tiny_models
import torch
from fake_hub import Fault, Hub, fake_hub
from runs import Start, blocks_done, contents, partial, starter
from safetensors.torch import load_file, save_file
from several_ranks import StartRanks, ranks_starter, torchrun

from marlin_convert.checkpoint.manifest import VERIFIED
from marlin_convert.cli.torchrun import advise
from marlin_convert.ranks import Ranks, Share, _Parcel
from marlin_convert.together import collected

MIXTURE_IN_PIECES: dict[str, Any] = {
    "marlin_convert.chunks:AT_ONCE": {"cpu": 6 << 20},  # an expert at once
    "marlin_convert.models.hidden:TOKENS": {"cpu": 192},
    "marlin_convert.models.divided:TOKENS": {"cpu": 100},
}


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with fake_hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, hub: Hub) -> Iterator[StartRanks]:
    home = str(tmp_path_factory.mktemp("home"))
    settings = {"HF_HUB_DISABLE_XET": "1", "HF_ENDPOINT": hub.url, "HF_HOME": home}
    with ranks_starter(tmp_path_factory.mktemp("log"), **settings) as start:
        yield start


@pytest.fixture(scope="module")
def start_alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    with starter(tmp_path_factory.mktemp("log")) as start:
        yield start


@pytest.fixture(scope="module")
def words(tinypy: Path, tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """A dense model, whose text makes shares of three and two samples."""
    text = tiny_models.text(tmp_path_factory.mktemp("text"))
    return [
        "quantize", tinypy, "--calibration", text, "--samples", 5, "--sequence-length", 128,
        "--device", "cpu", "--format", "gptq", "-v",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def whole(start: StartRanks, words: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks have made of it that nothing interrupted."""
    output = tmp_path_factory.mktemp("whole") / "out"
    status, log = start(2, *words, "-o", output)
    assert status == 0, log
    assert log.count("block 4 of 4 done") == log.count("Next:") == log.count("planning") == 1
    return output


def check_near(output: Path, alone: Path, same_codes: float = 0.998, later_codes: float = 0.6) -> None:
    """The first linears have the same codes; later ones differ as with any other order of the sums."""
    ours, theirs = (json.loads((path / "marlin_convert.json").read_text()) for path in (output, alone))
    assert ours.pop("ranks") > 1 and "ranks" not in theirs
    assert ours.pop("divergence") == pytest.approx(theirs.pop("divergence"), rel=0.03)
    if "tuning" in ours:
        held_out, others = (one["tuning"].pop("held_out_divergence") for one in (ours, theirs))
        assert held_out == pytest.approx(others, rel=0.03)
        assert held_out["tuned"] < held_out["solved"]
    errors = []
    for one, other in zip(ours["matrices"], theirs["matrices"], strict=True):
        if "error" in one:  # what is left dense has none
            errors.append((one.pop("error"), other.pop("error")))
            assert errors[-1][0] == pytest.approx(errors[-1][1], rel=0.1), one["name"]
        if ".layers.0." not in one["name"]:  # in a later block tokens may go to other experts
            assert one.pop("tokens", 0) == pytest.approx(other.pop("tokens", 0), rel=0.1)
        assert one == other
    assert sum(one for one, _ in errors) == pytest.approx(sum(other for _, other in errors), rel=0.01)
    del ours["files"], theirs["files"]
    assert ours == theirs
    tensors, others = (load_file(path / "model.safetensors") for path in (output, alone))
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        if name.endswith("qweight"):
            shifts = torch.arange(0, 32, 4)
            codes, codes_alone = (x[..., None] >> shifts & 15 for x in (tensor, others[name]))
            same = (codes == codes_alone).float().mean()
            assert same > (same_codes if ".layers.0.self_attn.q" in name else later_codes), name
        elif name.endswith("_proj.weight"):  # pruned
            same = ((tensor == 0) == (others[name] == 0)).float().mean()
            assert same > (same_codes if ".layers.0.self_attn.q" in name else 0.9), name


def test_codes_are_those_of_one_process(
    words: list[object], whole: Path, start: StartRanks, start_alone: Start, tmp_path: Path
) -> None:
    status, log = start_alone(*words, "-o", tmp_path / "alone")
    assert status == 0, log
    check_near(whole, tmp_path / "alone")
    # shares of one, two and two
    status, log = start(3, *words, "-o", tmp_path / "three")
    assert status == 0, log
    check_near(tmp_path / "three", tmp_path / "alone")


def test_so_are_those_of_a_mixture_and_they_are_the_same_twice(
    start: StartRanks, start_alone: Start, words: list[object], tmp_path: Path
) -> None:
    """Of its five experts two ranks have two and three, and solve one after the other."""
    model = diverse_models.build("qwen3_moe", vocab_size=4096, num_hidden_layers=2, num_experts=5)
    source = tiny_models.save(model, tmp_path / "source")
    command = [words[0], source, *words[2:]]
    status, log = start_alone(*command, "-o", tmp_path / "alone", constants=MIXTURE_IN_PIECES)
    assert status == 0, log
    for output in ("one", "other"):
        status, log = start(2, *command, "-o", tmp_path / output, constants=MIXTURE_IN_PIECES)
        assert status == 0, log
    assert contents(tmp_path / "one") == contents(tmp_path / "other")
    check_near(tmp_path / "one", tmp_path / "alone", same_codes=0.98)  # 0.9913: products in 16 bits
    status, log = start(4, *command, "-o", tmp_path / "four", constants=MIXTURE_IN_PIECES)
    assert status == 0, log
    check_near(tmp_path / "four", tmp_path / "alone", same_codes=0.98)


def test_more_ranks_than_experts_and_a_mixture_that_goes_on(
    start: StartRanks, words: list[object], tmp_path: Path
) -> None:
    """Of two experts one of three ranks has none, the first, which is killed after a block."""
    model = diverse_models.build("qwen3_moe", vocab_size=4096, num_hidden_layers=3, num_experts=2)
    command = [words[0], tiny_models.save(model, tmp_path / "source"), *words[2:]]
    status, log = start(3, *command, "-o", tmp_path / "whole")
    assert status == 0, log
    stop = (0, "marlin_convert.models.hidden:HiddenStates.divergence", 2, "kill")
    status, log = start(3, *command, "-o", tmp_path / "out", stop=stop)
    assert status == 1 and "has ended without a word" in log, log
    assert blocks_done(tmp_path / "out") in (1, 2)
    status, log = start(3, *command, "-o", tmp_path / "out", "--resume")
    assert status == 0 and log.count("resuming at block") == 1, log
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("model_type", "more"),
    [
        ("gpt_oss", ["--effort", "fast"]),
        ("llama4_text", ["--format", "compressed-tensors"]),
        ("qwen3_moe", ["--skip", "experts"]),
    ],
    ids=["biases", "scores on inputs", "left dense"],
)
def test_other_experts(
    model_type: str,
    more: list[object],
    start: StartRanks,
    start_alone: Start,
    words: list[object],
    tmp_path: Path,
) -> None:
    model = diverse_models.build(model_type, vocab_size=4096)
    command = [words[0], tiny_models.save(model, tmp_path / "source"), *words[2:], *more]
    status, log = start(2, *command, "-o", tmp_path / "out")
    assert status == 0, log
    status, log = start_alone(*command, "-o", tmp_path / "alone")
    assert status == 0, log
    check_near(tmp_path / "out", tmp_path / "alone", same_codes=0.98)


def test_fewer_outputs_than_ranks(
    start: StartRanks, start_alone: Start, words: list[object], tmp_path: Path
) -> None:
    """Of keys and of values two of four ranks solve nothing; keys, not pruned, are solved for themselves."""
    model = tiny_models.build(
        "qwen2", hidden_size=64, intermediate_size=128, head_dim=2, num_attention_heads=32,
        num_key_value_heads=1,
    )  # fmt: skip
    source = tiny_models.save(model, tmp_path / "source")
    command = [words[0], source, *words[2:], "--format", "compressed-tensors"]
    command += ["--sparsity", "2:4", "--unpruned", "*k_proj"]
    narrow = {"marlin_convert.models.discover:NARROW": 1}
    status, log = start(4, *command, "-o", tmp_path / "four", constants=narrow)
    assert status == 0, log
    status, log = start_alone(*command, "-o", tmp_path / "alone", constants=narrow)
    assert status == 0 and "14 linears" in log, log
    check_near(tmp_path / "four", tmp_path / "alone")


@pytest.mark.parametrize("ranks", [2, 4])
def test_two_of_four_weights(
    ranks: int, start: StartRanks, start_alone: Start, words: list[object], tmp_path: Path
) -> None:
    """Pruned by four; pruned and quantized by two."""
    source = tiny_models.save(tiny_models.build("llama", torch.bfloat16), tmp_path / "source")
    command = [words[0], source, *words[2:], "--sparsity", "2:4"]
    if ranks == 4:
        command = ["sparsify", source, *(word for word in words[2:] if word not in ("--format", "gptq"))]
    status, log = start(ranks, *command, "-o", tmp_path / "together")
    assert status == 0, log
    status, log = start_alone(*command, "-o", tmp_path / "alone")
    assert status == 0, log
    check_near(tmp_path / "together", tmp_path / "alone", same_codes=0.998)


@pytest.mark.parametrize("lost", [pytest.param(0, marks=pytest.mark.faults), 1])
def test_a_rank_that_is_killed_stops_the_others(
    lost: int, start: StartRanks, words: list[object], whole: Path, tmp_path: Path
) -> None:
    """And the same command with --resume goes on to the same bytes."""
    output = tmp_path / "out"
    began = time.monotonic()
    stop = (lost, "marlin_convert.models.hidden:HiddenStates.divergence", 3, "kill")
    status, log = start(2, *words, "-o", output, stop=stop)
    assert status == 1 and time.monotonic() - began < 30
    assert f"Error: rank {lost} has ended without a word: killed, or out of memory." in log, log
    assert log.count("Error:") == 1 and "Interrupted" not in log
    assert not output.exists() and blocks_done(output) in (1, 2)
    if lost:
        status, log = start(3, *words, "-o", output, "--resume")
        assert status == 1 and "continue with torchrun and 2 processes" in log
    status, log = start(2, *words, "-o", output, "--resume")
    assert status == 0 and log.count("resuming at block") == 1, log
    assert contents(output) == contents(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.faults  # torchrun gives it 30 seconds to end
def test_a_rank_that_hangs_stops_the_others(start: StartRanks, words: list[object], tmp_path: Path) -> None:
    """As does one whose machine is lost: its connections stay, and nothing comes from it."""
    output = tmp_path / "out"
    stop = (1, "marlin_convert.models.hidden:HiddenStates.divergence", 3, "freeze")
    quick = {"marlin_convert.pulse:BEAT": 0.2, "marlin_convert.pulse:SILENCE": 3.0}
    status, log = start(2, *words, "-o", output, stop=stop, constants=quick)
    assert status == 1
    assert "Error: rank 1 has not been heard of for 3 seconds: stopped, or its machine is lost." in log, log
    assert log.count("Error:") == 1
    assert not output.exists() and blocks_done(output) in (1, 2)


def test_a_rank_that_fails_says_why_and_nobody_else_does(
    start: StartRanks, words: list[object], tmp_path: Path
) -> None:
    stop = (1, "marlin_convert.models.hidden:HiddenStates.divergence", 1, "fail")
    status, log = start(2, *words, "-o", tmp_path / "out", stop=stop)
    assert status == 1
    assert log.count("\nMemoryError: no memory is left") == 1, log
    assert log.count("\nError: ") == 1
    assert "Error: rank 1: no memory is left" in log
    assert not any(tmp_path.iterdir())


def test_tuning_is_shared_and_goes_on_where_a_rank_was_killed(
    start: StartRanks, start_alone: Start, words: list[object], tmp_path: Path
) -> None:
    """Steps of three samples; a rank is killed as it solves, the first as it tunes."""
    # of eight samples, four a rank, sums come out as one process adds them up
    command = [*words, "--effort", "high", "--samples", 8]
    constants = {"marlin_convert.tune:STEP": 384, "marlin_convert.tune:KEEP_AFTER": 0.0}
    status, log = start_alone(*command, "-o", tmp_path / "alone", constants=constants)
    assert status == 0, log
    status, log = start(2, *command, "-o", tmp_path / "whole", constants=constants)
    assert status == 0 and log.count("steps, held-out divergence") == 1, log
    check_near(tmp_path / "whole", tmp_path / "alone", later_codes=0.9)
    source, one, two = (
        load_file(path / "model.safetensors") for path in (words[1], tmp_path / "alone", tmp_path / "whole")
    )
    for name in (name for name in one if "norm" in name):  # the gradients were those of all samples
        moved, apart = (one[name] - source[name]).float().norm(), (one[name] - two[name]).float().norm()
        assert moved > 0 and apart < 0.05 * moved, (name, apart / moved)
    resumed: list[object] = []
    for stop in (
        (1, "marlin_convert.models.hidden:HiddenStates.divergence", 2, "kill"),
        (0, "marlin_convert.student:Student.learn", 2, "kill"),
    ):
        status, log = start(2, *command, "-o", tmp_path / "out", *resumed, stop=stop, constants=constants)
        assert status == 1 and "has ended without a word" in log, log
        resumed = ["--resume"]
    status, log = start(2, *command, "-o", tmp_path / "out", "--resume", constants=constants)
    assert status == 0 and "resuming at step" in log, log
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_full_disk_stops_all(start: StartRanks, words: list[object], tmp_path: Path) -> None:
    """Only the first rank writes."""
    output = tmp_path / "out"
    stop = (0, "marlin_convert.checkpoint.writer:ShardWriter._put", 40, "full")
    status, log = start(2, *words, "-o", output, stop=stop)
    assert status == 1
    assert log.count("Error: ") == 1 and f"no space left for '{output}'" in log, log
    assert not output.exists() and blocks_done(output) in (1, 2)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--samples", 1), "1 samples of text cannot be shared by 2 processes."),
        (("--effort", "high"), "1 samples of 128 tokens a step, which cannot be shared by 2 processes"),
        (("--device", "cuda:0"), "is one device, torchrun started 2 processes"),
        (("--nonsense",), "No such option"),
    ],
)
def test_what_is_not_shared_is_refused_once(
    more: tuple[object, ...], said: str, start: StartRanks, words: list[object], tmp_path: Path
) -> None:
    constants = {"marlin_convert.tune:STEP": 255}
    status, log = start(2, *words, "-o", tmp_path / "out", *more, constants=constants)
    assert status == 1
    assert log.count(said) == 1 and log.count("Error: ") == 1, log
    assert partial(tmp_path / "out").exists() is False


def test_a_model_of_the_hub_comes_once(
    hub: Hub, start: StartRanks, words: list[object], verification: list[object], whole: Path, tmp_path: Path
) -> None:
    """All ranks look at it; of those that want a file one fetches it. The same for a verification."""
    tinypy = Path(str(words[1]))
    hub.add("org/tinypy", tinypy)
    hub.add("org/source", tinypy)
    hub.delay, hub.fault = 0.2, Fault("delay", "resolve", -1)
    status, log = start(2, words[0], "org/tinypy", *words[2:], "-o", tmp_path / "out")
    assert status == 0, log
    size = (tinypy / "model.safetensors").stat().st_size
    status, log = start(2, *verification, "--source", "org/source")
    assert status == 0, log
    for name in ("tinypy", "source"):
        assert size <= hub.served[f"org/{name}/model.safetensors"] < 1.5 * size
    ours, theirs = (load_file(path / "model.safetensors") for path in (tmp_path / "out", whole))
    assert all(torch.equal(ours.pop(name), tensor) for name, tensor in theirs.items()) and not ours


def test_torchrun_itself(words: list[object], whole: Path, tmp_path: Path) -> None:
    done = torchrun(2, *words, "-o", tmp_path / "out", "--json", "-q")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["manifest"]["ranks"] == 2
    assert contents(tmp_path / "out") == contents(whole)


@pytest.fixture
def verification(words: list[object], whole: Path, tmp_path: Path) -> list[object]:
    """The verification of a copy of that output, beside its source on a text of five samples."""
    copy = shutil.copytree(whole, tmp_path / "copy")
    return ["verify", copy, "--source", words[1], "--text", *words[3:10], "-v"]


def report_of(directory: Path) -> dict[str, Any]:
    """The report of verify; sums over the tokens of a text apart from all else, which is exact."""
    report = json.loads((directory / VERIFIED).read_text())
    text = report["checks"]["numbers"]["details"].pop("text", {})
    sums = ("source_perplexity", "perplexity", "divergence", "hidden") if text else ()
    summed = {name: text.pop(name) for name in sums}
    return {"rest": [report, text], "summed": summed}


def test_verify_reports_what_one_process_does(
    start: StartRanks, start_alone: Start, verification: list[object]
) -> None:
    copy = Path(str(verification[1]))
    reports = []
    for status, log in (start_alone(*verification), start(2, *verification)):
        assert status == 0, log
        reports.append(report_of(copy))
    assert log.count("Next:") == log.count("checking numbers") == log.count("block 4 of 4 done") == 1
    alone, shared = reports
    assert shared["rest"] == alone["rest"] and shared["rest"][1]["tokens"] == 5 * 127
    for name, value in alone["summed"].items():
        assert shared["summed"][name] == pytest.approx(value, rel=1e-4), name


def test_verify_finds_what_one_process_does(
    start: StartRanks, start_alone: Start, verification: list[object]
) -> None:
    """In linears of the first block and of the last, which ranks share, and in files, which they do not."""
    copy = Path(str(verification[1]))
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.qweight"].fill_(0)
    tensors["model.layers.3.mlp.up_proj.qzeros"].fill_(-0x77777778)
    save_file(tensors, copy / "model.safetensors")
    status, log = start_alone(*verification)
    assert status == 3, log
    alone = report_of(copy)
    (copy / VERIFIED).unlink()
    status, log = start(2, *verification)
    assert status and log.count("exitcode: 3") >= 1, log  # torchrun's own is another
    assert log.count("layout   fail") == 1
    assert report_of(copy)["rest"] == alone["rest"]
    checks = alone["rest"][0]["checks"]
    assert [checks[name]["status"] for name in ("files", "layout", "numbers")] == ["fail"] * 3


@pytest.mark.parametrize(
    ("how", "said"),
    [
        pytest.param("kill", "rank 1 has ended without a word: killed, or ", marks=pytest.mark.faults),
        ("fail", "rank 1: no memory is left"),
    ],
)
def test_a_rank_that_is_lost_ends_the_verification(
    how: str, said: str, start: StartRanks, verification: list[object]
) -> None:
    stop = (1, "marlin_convert.models.hidden:HiddenStates.divergence", 2, how)
    status, log = start(2, *verification, stop=stop)
    assert status == 1
    assert f"\nError: {said}" in log and log.count("\nError: ") == 1, log
    assert "--resume" not in log and not (Path(str(verification[1])) / VERIFIED).exists()


def test_what_ranks_do_not_verify_together(start: StartRanks, verification: list[object]) -> None:
    copy = Path(str(verification[1]))
    of_rank = f"{copy}-{{rank}}"
    shutil.copytree(copy, of_rank.format(rank=0))

    def refused(said: str, *command: object) -> None:
        status, log = start(2, *command)
        assert status == 1
        assert log.count(said) == 1 and log.count("Error: ") == 1, log

    refused("1 samples of text cannot be shared by 2 processes.", *verification, "--samples", 1)
    refused("--checks files,kernel is the work of one process", *verification, "--checks", "kernel,files")
    refused("copy-1' is neither a directory nor a Hub id.", "verify", of_rank)
    with (copy / "marlin_convert.json").open("a") as manifest:
        manifest.write(" ")
    shutil.copytree(copy, of_rank.format(rank=1))
    refused("Error: rank 1 has manifest", "verify", of_rank)
    assert not list(copy.parent.rglob(VERIFIED))


@pytest.mark.parametrize("words", [("inspect", "model"), ("bench", "kernel", "-o", "out")])
def test_other_commands_are_of_one_process(words: tuple[object, ...], start: StartRanks) -> None:
    status, log = start(2, *words)
    assert status == 1
    assert log.count(f"{words[0]} is the work of one process, torchrun started 2.") == 1


def test_shares_are_in_order_and_differ_by_one() -> None:
    shares = [Share(number, 3).range(8) for number in range(3)]
    assert [number for share in shares for number in share] == list(range(8))
    assert sorted(map(len, shares)) == [2, 3, 3]


def test_what_is_written_last_does_not_keep_what_it_came_with() -> None:
    """A tensor of odd size waits for the end of the model, and others of its rank need not."""
    packed = [({"a": torch.ones(512), "b": torch.full((33,), 2.0)}, {"name": "one"})]

    class Two(Ranks):
        def exchange(self, said: Any, tensors: Any, device: torch.device) -> Any:
            parcel = _Parcel([(one.shape, one.dtype) for one in tensors], device)
            parcel.put(tensors)
            return [(said, parcel), (said, parcel)]

    found = collected(Two(0, 2), packed, torch.device("cpu"))
    assert [row for _, row in found] == [{"name": "one"}] * 2
    for tensors, _ in found:
        assert all(torch.equal(tensors[name], one) for name, one in packed[0][0].items())
        assert tensors["b"].untyped_storage().nbytes() == 33 * 4
        assert tensors["a"].untyped_storage().nbytes() > 512 * 4
    assert collected(Two(1, 2), packed, torch.device("cpu")) == []


@pytest.mark.parametrize(
    ("device", "gpus", "ranks", "told"),
    [("auto", 4, 1, True), ("cuda", 4, 1, True), ("cuda:1", 4, 1, False), ("auto", 1, 1, False),
     ("cpu", 4, 1, False), ("auto", 4, 4, False)],
)  # fmt: skip
def test_one_gpu_of_several_says_how_to_use_all(
    device: str, gpus: int, ranks: int, told: bool, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr("sys.argv", ["marlin-convert", "quantize", "MODEL", "-o", "my model"])
    if ranks > 1:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
        monkeypatch.setenv("WORLD_SIZE", str(ranks))
    with caplog.at_level("INFO", "marlin_convert"):
        for most in (None, 2):
            advise(device, torch.device("cpu" if device == "cpu" else "cuda:0"), most)
    command = "-m marlin_convert quantize MODEL -o 'my model'"
    every = f"one of 4 GPUs is used; all of them: torchrun --nproc-per-node 4 {command}"
    some = f"one of 4 GPUs is used; 2 of them: torchrun --nproc-per-node 2 {command}"
    assert caplog.messages == [every, some] * told


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("kind", ["dense", "mixture", "sparse", "tuned"])
def test_two_gpus(kind: str, words: list[object], tmp_path: Path) -> None:
    """As on a CPU: the same bytes twice, near to those of one; each process takes its own."""
    more = {"sparse": ("--sparsity", "2:4"), "tuned": ("--effort", "high")}
    command = [*words, "--device", "cuda", *more.get(kind, ())]
    if kind == "mixture":
        model = diverse_models.build("qwen3_moe", vocab_size=4096, num_hidden_layers=2)
        command[1] = tiny_models.save(model, tmp_path / "source")
    for ranks, output in ((1, "alone"), (2, "one"), (2, "other")):
        done = torchrun(ranks, *command, "-o", tmp_path / output)
        assert done.returncode == 0, done.stderr
        assert ("torchrun --nproc-per-node" in done.stderr) == (ranks == 1)
    assert contents(tmp_path / "one") == contents(tmp_path / "other")
    # 0.9913: products in 16 bits; 0.58 where another mask changes all codes after it
    later = 0.5 if kind == "sparse" else 0.6
    if kind != "tuned":  # five samples are few: what is held out differs by a tenth on a CPU already
        check_near(tmp_path / "one", tmp_path / "alone", same_codes=0.98, later_codes=later)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_rank_killed_beside_another_gpu(start: StartRanks, words: list[object], tmp_path: Path) -> None:
    """NCCL's sums end with it too: as a rank solves, and as it tunes."""
    command = [*words, "--device", "cuda", "--effort", "high", "--samples", 8]
    constants = {"marlin_convert.tune:STEP": 384, "marlin_convert.tune:KEEP_AFTER": 0.0}
    status, log = start(2, *command, "-o", tmp_path / "whole", constants=constants)
    assert status == 0, log
    resumed: list[object] = []
    for stop in (
        (1, "marlin_convert.models.hidden:HiddenStates.divergence", 2, "kill"),
        (1, "marlin_convert.student:Student.learn", 2, "kill"),
    ):
        began = time.monotonic()
        status, log = start(2, *command, "-o", tmp_path / "out", *resumed, stop=stop, constants=constants)
        assert status == 1 and "has ended without a word" in log, log
        assert time.monotonic() - began < 60
        resumed = ["--resume"]
    status, log = start(2, *command, "-o", tmp_path / "out", "--resume", constants=constants)
    assert status == 0, log
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
