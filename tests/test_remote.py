"""Models of the Hub that are looked at and not downloaded, and files that come while blocks are quantized."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_models
import torch
from click.testing import Result
from fake_hub import Fault, Hub, fake_hub
from runs import Start, blocks_done, contents, starter
from safetensors.torch import load_file, save_file

from marlin_convert import recipe, room
from marlin_convert.checkpoint.linears import LOOKED_AT
from marlin_convert.commands import quantize as story
from marlin_convert.errors import ConvertError
from marlin_convert.hub import Source
from marlin_convert.remote import BEGINNING, Remote, RemoteFile

FILES = 5


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with fake_hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def start(hub: Hub, home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    words = {
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_TOKEN": "hf_secret",
    }
    with starter(tmp_path_factory.mktemp("log"), HF_ENDPOINT=hub.url, HF_HOME=str(home), **words) as start:
        yield start


@pytest.fixture(scope="module")
def sharded(tinypy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tinypy with a file a block, the last block in the first file, and what is no block's in the last."""
    directory = tmp_path_factory.mktemp("sharded") / "model"
    shutil.copytree(tinypy, directory, ignore=shutil.ignore_patterns("*.safetensors*"))
    weights: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(tinypy / "model.safetensors").items():
        block = re.search(r"layers\.(\d)\.", name)
        weights.setdefault(file_of(int(block[1]) if block else -1), {})[name] = tensor
    for file, tensors in weights.items():
        save_file(tensors, directory / file)
    weight_map = {name: file for file, tensors in weights.items() for name in tensors}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert len(weights) == FILES
    return directory


def file_of(block: int) -> str:
    return f"model-{FILES - 1 - block:05}-of-{FILES:05}.safetensors"


def served(hub: Hub, name: str) -> dict[str, int]:
    """The bytes that went out, by file of a repository."""
    return {
        file.removeprefix(f"{name}/"): count for file, count in hub.served.items() if file.startswith(name)
    }


def cached(home: Path, name: str) -> list[str]:
    """The weight files that are on this disk."""
    place = home / "hub" / f"models--{name.replace('/', '--')}"
    return sorted(path.name for path in place.rglob("*.safetensors"))


def only_headers(hub: Hub, home: Path, name: str) -> None:
    """No more went out than what a plan is made from."""
    for file, count in served(hub, name).items():
        assert count <= BEGINNING if file.endswith(".safetensors") else file.endswith(".json"), file
    assert not {"tokenizer.json", "training.json", "LICENSE"} & served(hub, name).keys()
    assert cached(home, name) == []


SMALL = ("--samples", 4, "--sequence-length", 64, "--device", "cpu")


def test_inspect_reads_headers_alone(
    hub: Hub, home: Path, start: Start, sharded: Path, cli: Callable[..., Result]
) -> None:
    repository = hub.add("org/inspected", sharded)
    status, said = start("inspect", "org/inspected", "--json", "-q")
    assert status == 0, said
    found, local = json.loads(said), json.loads(cli("inspect", sharded, "--json").stdout)
    assert found.pop("commit") == repository.commit and found.pop("name") == "org/inspected"
    del local["commit"], local["name"]
    assert found == local
    wanted = [name for name in repository.files if name.endswith((".json", ".safetensors", "LICENSE"))]
    assert found["bytes"] >= sum(
        len(repository.files[name]) for name in wanted if name.endswith(".safetensors")
    )
    only_headers(hub, home, "org/inspected")
    assert sum(served(hub, "org/inspected").values()) < found["bytes"] / 8


def test_a_plan_reads_headers_alone(
    hub: Hub, home: Path, start: Start, sharded: Path, tmp_path: Path, cli: Callable[..., Result]
) -> None:
    """And it is the plan of the same files on disk."""
    repository = hub.add("org/planned", sharded)
    words = ("-o", tmp_path / "out", "--dry-run", *SMALL)
    status, said = start("quantize", "org/planned", *words, "--json", "-q")
    assert status == 0, said
    plan, local = json.loads(said), json.loads(cli("quantize", sharded, *words, "--json").stdout)
    only_headers(hub, home, "org/planned")
    weights = sum(len(data) for name, data in repository.files.items() if name.endswith(".safetensors"))
    assert weights < plan.pop("download_bytes") < weights + 1_000_000 and local.pop("download_bytes") == 0
    assert plan.pop("seconds") >= 0 and local.pop("seconds") >= 0  # measured on this machine
    assert plan == local
    status, said = start("quantize", "org/planned", *words)
    assert status == 0 and "the model to be downloaded takes" in said, said
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_a_plan_of_a_model_that_is_quantized(
    hub: Hub, home: Path, start: Start, quantized: Callable[[str], Path], tmp_path: Path
) -> None:
    """Zero points are as its config says, until they are read before anything is written."""
    hub.add("org/quantized", quantized("gptq"))
    words = ("quantize", "org/quantized", "-o", tmp_path / "out", *SMALL)
    status, said = start(*words, "--dry-run")
    assert status == 0 and "as its config says until its files are here" in said, said
    only_headers(hub, home, "org/quantized")
    status, said = start(*words)
    assert status == 0 and "as its config says" not in said, said
    assert (
        contents(tmp_path / "out")["model.safetensors"] == contents(quantized("marlin"))["model.safetensors"]
    )


@pytest.mark.parametrize("differs", [False, True])
def test_a_head_that_may_be_the_embedding(
    differs: bool, hub: Hub, home: Path, start: Start, tinypy: Path, tmp_path: Path
) -> None:
    """Whether it is is seen from its first values."""
    model = tmp_path / "model"
    shutil.copytree(tinypy, model)
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + float(differs)
    save_file(tensors, model / "model.safetensors")
    hub.add(f"org/tied-{differs}", model)
    status, said = start("quantize", f"org/tied-{differs}", "-o", tmp_path / "out", "--dry-run", *SMALL)
    assert status == 0, said
    assert ("is not the embedding" in said) == differs
    assert served(hub, f"org/tied-{differs}")["model.safetensors"] < 4 * BEGINNING
    assert cached(home, f"org/tied-{differs}") == []


def test_a_head_that_is_the_embedding_but_for_its_end(
    hub: Hub, start: Start, tinypy: Path, text: Path, tmp_path: Path
) -> None:
    """The plan is made again once all of its values are here."""
    model = tmp_path / "model"
    shutil.copytree(tinypy, model)
    tensors = load_file(model / "model.safetensors")
    head = tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    assert head.numel() > LOOKED_AT
    head[-1] += 1
    save_file(tensors, model / "model.safetensors")
    hub.add("org/nearly", model)
    words = ("-o", tmp_path / "out", "--calibration", text, "--effort", "fast", *SMALL)
    status, said = start("quantize", "org/nearly", *words)
    assert status == 0, said
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"], head)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.text(tmp_path_factory.mktemp("text"))


def weights_of(output: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(output).items() if name != "marlin_convert.json"}


def test_files_come_ahead_of_the_blocks_that_want_them(
    hub: Hub, home: Path, start: Start, sharded: Path, text: Path, tmp_path: Path
) -> None:
    """In their order, while others are solved; and the output is that of the files on disk."""
    repository = hub.add("org/ahead", sharded)
    words = ("--calibration", text, *SMALL)
    status, said = start("quantize", sharded, "-o", tmp_path / "local", *words)
    assert status == 0, said
    before = len(hub.requests)
    hub.delay, hub.fault = 2.0, Fault("delay", "resolve", -1)
    status, said = start("quantize", "org/ahead", "-o", tmp_path / "out", *words)
    hub.fault = None
    assert status == 0, said
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "local")
    whole = [
        line.rpartition("/")[2] for line in hub.requests[before:] if line.startswith("GET org/ahead/res")
    ]
    whole = [file for file in whole if file.endswith(".safetensors")]
    assert len(whole) == 2 * FILES and len(set(whole[:FILES])) == FILES  # headers, then files
    assert [file for file in whole[FILES:] if file != file_of(-1)] == [file_of(block) for block in range(4)]
    lines = said.splitlines()
    first, last = (
        next(i for i, line in enumerate(lines) if words in line) for words in ("block 1 of 4", "5 of 5")
    )
    assert first < last, said
    manifest = json.loads((tmp_path / "out" / "marlin_convert.json").read_text())
    assert manifest["source"]["commit"] == repository.commit
    assert (
        manifest["left_behind"]
        == json.loads((tmp_path / "local" / "marlin_convert.json").read_text())["left_behind"]
    )


def test_a_run_that_was_killed_goes_on_with_the_files_that_came(
    hub: Hub, start: Start, sharded: Path, text: Path, tmp_path: Path
) -> None:
    """Files that are on the Hub at first and on this disk later are the same source."""
    hub.add("org/killed", sharded)
    words = ("quantize", "org/killed", "-o", tmp_path / "out", "--calibration", text, *SMALL)
    status, said = start(*words, kill=("marlin_convert.checkpoint.unfinished:UnfinishedRun.save", 3))
    assert status == -9 and blocks_done(tmp_path / "out") == 2, said
    status, said = start(*words, "--resume")
    assert status == 0 and "resuming at block 2" in said, said
    status, said = start("quantize", sharded, "-o", tmp_path / "local", "--calibration", text, *SMALL)
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "local")


def damaged(sharded: Path, directory: Path, data: Callable[[bytes], bytes]) -> Path:
    """The model with another content of one weight file."""
    model = directory / "model"
    shutil.copytree(sharded, model)
    file = model / file_of(2)
    file.write_bytes(data(file.read_bytes()))
    return model


@pytest.mark.parametrize(
    "name, change, said",
    [
        ("short", lambda data: data[:-100], "is truncated: its header describes"),
        (
            "endless",
            lambda data: (1 << 60).to_bytes(8, "little") + data[8:],
            "is truncated or not safetensors",
        ),
        ("text", lambda data: b"<html>no such thing</html>" * 9, "is truncated or not safetensors"),
        ("broken", lambda data: data[:9] + b"!" + data[10:], "holds invalid JSON"),
        ("empty", lambda data: b"\0" * 4, "is truncated or not safetensors"),
    ],
)
def test_a_damaged_header(
    name: str, change: Callable[[bytes], bytes], said: str, hub: Hub, home: Path, start: Start, sharded: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    hub.add(f"org/{name}", damaged(sharded, tmp_path, change))
    for words in (("inspect",), ("quantize", "-o", tmp_path / "out")):
        status, answer = start(*words, f"org/{name}")
        assert status == 1 and said in answer and file_of(2) in answer, answer
    assert cached(home, f"org/{name}") == [] and not (tmp_path / "out.partial").exists()


def test_what_cannot_be_looked_at(hub: Hub, home: Path, start: Start, sharded: Path, tmp_path: Path) -> None:
    pickled = tmp_path / "pickled"
    shutil.copytree(sharded, pickled, ignore=shutil.ignore_patterns("*.safetensors*"))
    (pickled / "pytorch_model.bin").write_bytes(b"pickle")
    hub.add("org/pickled", pickled)
    (pickled / "pytorch_model.bin").unlink()
    hub.add("org/weightless", pickled)
    hub.add("org/gated", sharded).refusal = 403, "GatedRepo"
    shutil.copytree(sharded, tmp_path / "lacking", ignore=shutil.ignore_patterns(file_of(1)))
    hub.add("org/lacking", tmp_path / "lacking")
    for name, said in {
        "pickled": "pickle files only (pytorch_model.bin, 1 in all)",
        "weightless": "has no weights (*.safetensors)",
        "gated": "is gated and this token has no access",
        "lacking": f"lacks 1 of {FILES} shards: '{file_of(1)}'",
    }.items():
        for words in (("inspect",), ("quantize", "--dry-run", "-o", tmp_path / "out")):
            status, answer = start(*words, f"org/{name}")
            assert status == 1 and said in answer and "Hint: " in answer, answer
        assert not any(file.endswith((".bin", ".safetensors")) for file in served(hub, f"org/{name}"))


def test_a_server_that_knows_no_ranges(hub: Hub, home: Path, start: Start, sharded: Path) -> None:
    """A file of gigabytes is not read for its header."""
    hub.add("org/whole", sharded)
    hub.ranges = False
    status, said = start("inspect", "org/whole")
    hub.ranges = True
    assert status == 1 and "only whole, not bytes 0 to" in said and "hf download org/whole" in said, said
    assert cached(home, "org/whole") == []


def test_a_file_that_does_not_come(hub: Hub, start: Start, sharded: Path, text: Path, tmp_path: Path) -> None:
    """Is an error of the block that wants it, and the same command goes on."""
    repository = hub.add("org/gone", sharded)
    words = ("quantize", "org/gone", "-o", tmp_path / "out", "--calibration", text, *SMALL)
    files = repository.files

    class Losing(dict[str, bytes]):
        asked = 0

        def __contains__(self, path: object) -> bool:
            Losing.asked += path == file_of(2)
            return super().__contains__(path) and (path != file_of(2) or Losing.asked == 1)

    repository.branches["main"][-1].files = Losing(files)  # its header can be had, and then it is gone
    status, said = start(*words)
    assert status == 1 and "'org/gone' has no such file" in said and "Traceback" not in said, said
    assert "block 1 of 4 done" in said
    repository.branches["main"][-1].files = files
    status, said = start(*words, "--resume")
    assert status == 0, said


def test_room_is_asked_for_before_work(tinypy: Path, tmp_path: Path) -> None:
    """For the download as for the output, of every disk; a plan says so and is printed all the same."""
    source = Source(tinypy, "org/huge", "0" * 40, Remote({}, 10**18, 10**18))
    job = story.Job(source, tmp_path / "out", recipe.load("w4a16"), torch.device("cpu"))
    _, plan = story.plan_job(job)
    with pytest.raises(
        ConvertError, match=r"model to be downloaded takes 1,000,000,000,000,000,000 .* are free"
    ):
        room.check_room(job, plan)
    assert not all(one.enough for one in room.rooms(job, plan))
    here = replace(job, source=Source(tinypy, "tinypy", None))
    (one,) = room.rooms(here, plan)
    assert one.enough and one.taken == {"the output takes": plan.output_bytes}


def test_a_part_is_what_was_asked_for() -> None:
    """Whatever the buffer: reads beyond the end give nothing, and the end is known without a request."""
    data = bytes(range(256)) * 4

    asked = []

    class Known(RemoteFile):
        def part(self, start: int, end: int) -> bytes:
            asked.append((start, end))
            return data[start:end]

    file = Known("org/name", "0" * 40, "x", len(data), "")
    with file.open("rb") as whole:
        assert whole.seek(0, 2) == len(data) and not asked
        whole.seek(0)
        assert (whole.read(8), whole.read(100)) == (data[:8], data[8:108])
        assert asked == [(0, len(data))]
    with file.open("rb", buffering=0) as parts:
        parts.seek(1000)
        assert parts.read(100) == data[1000:] and parts.read(1) == b""
