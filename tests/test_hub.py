"""Models and texts by name, from the real client against a Hub of our own."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_models
from fake_hub import Fault, Hub, fake_hub

from marlin_convert.errors import SourceError
from marlin_convert.hub import Source, resolve

# huggingface_hub reads its settings when it is imported, so every case is a process of its own
RESOLVE = """
import json, sys, time
pause = time.sleep
time.sleep = lambda seconds: pause(seconds / 100)  # the client's, before it asks what has failed again
from marlin_convert.calibration import calibrate
from marlin_convert.errors import ConvertError
from marlin_convert.hub import resolve
from marlin_convert.hub_calls import hub_errors
for words in json.load(sys.stdin):
    try:
        if words[0] == "text":
            from transformers import AutoTokenizer
            tokenizer = AutoTokenizer.from_pretrained(words[2])
            found = calibrate(tokenizer, words[1], samples=2, length=16, seed=0)
            answer = {"digest": found.digest, "source": found.source}
        elif words[0] == "info":
            from huggingface_hub import HfApi
            with hub_errors(words[1]):
                HfApi().model_info(words[1])
        else:
            found = resolve(words[1], words[2], code=words[3])
            answer = {
                "directory": str(found.directory), "name": found.name, "commit": found.commit,
                "files": sorted(path.relative_to(found.directory).as_posix()
                                for path in found.directory.rglob("*") if path.is_file()),
            }
    except ConvertError as error:
        answer = {"error": str(error), "hint": error.hint}
    print(json.dumps(answer))
"""


STATUSES = (400, 401, 402, 403, 404, 409, 413, 422, 429, 500)


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with fake_hub() as hub:
        yield hub


def environment(hub: Hub | SimpleNamespace, home: Path, **changes: str) -> dict[str, str]:
    settings = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_TOKEN": "hf_secret",
    }
    return (
        {name: value for name, value in os.environ.items() if not name.startswith("HF_")} | settings | changes
    )


def ask(hub: Hub | SimpleNamespace, home: Path, *orders: list[object], **changes: str) -> list[dict]:
    done = subprocess.run(
        [sys.executable, "-c", RESOLVE], input=json.dumps(orders), capture_output=True, text=True,
        env=environment(hub, home, **changes),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_directory(tinypy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(str(tinypy)) == Source(tinypy, "tinypy-4m", None)
    # one that exists wins over a Hub id of the same name
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert resolve("org/name") == Source(Path("org/name"), "name", None)
    monkeypatch.chdir(tmp_path / "org")
    assert resolve(".").name == "org"


@pytest.mark.parametrize(
    "name",
    ["", "a b", "org/name/more", "/no/such/place", "../x", "./x", "-x/y", "org/", "é/ü", "https://x.y/z"],
)
def test_a_name_that_is_none(name: str) -> None:
    with pytest.raises(SourceError, match="neither a directory nor a Hub id") as refused:
        resolve(name)
    assert refused.value.hint


@pytest.fixture(scope="module")
def answers(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """What all the names below resolve to, asked by one process."""
    directory = tmp_path_factory.mktemp("model")
    model = tiny_models.save(tiny_models.build("qwen3", tie_word_embeddings=True), directory / "model")
    for name in ("LICENSE", "README.md", "modeling_x.py", "pytorch_model.bin", "tf_model.h5"):
        (model / name).write_text(name)
    hub.add("org/model", model)
    hub.add("org/gated", model).refusal = 403, "GatedRepo"
    hub.add("org/broken", model).refusal = 500, "Broken"
    for status in STATUSES:
        refusing = hub.add(f"org/s{status}", model)
        refusing.refusal, refusing.sentence = (status, ""), f"you (hf_secret) may not: rule {status}."
    empty = tmp_path_factory.mktemp("empty")
    (empty / ".gitattributes").write_text("")
    hub.add("org/empty", empty)
    for name in ("a.gguf", "b.gguf", "c.gguf", "README.md"):
        (empty / name).write_text(name)
    hub.add("org/others", empty)
    texts = tmp_path_factory.mktemp("texts")
    (texts / "data").mkdir()
    for split in ("train", "test"):
        lines = [json.dumps({"text": f"{split} {number}: def f(x): return x"}) for number in range(99)]
        (texts / "data" / f"{split}-0.jsonl").write_text("\n".join(lines))
    (texts / "README.md").write_text("about")
    hub.add("datasets/org/texts", texts)
    commit = hub.repositories["org/model"].commit
    orders: dict[str, list[object]] = {
        "model": ["model", "org/model", None, False],
        "code": ["model", "org/model", None, True],
        "commit": ["model", "org/model", commit, False],
        "revision": ["model", "org/model", "v9", False],
        "gated": ["model", "org/gated", None, False],
        "missing": ["model", "org/nothing", None, False],
        "broken": ["model", "org/broken", None, False],
        "empty": ["model", "org/empty", None, False],
        "others": ["model", "org/others", None, False],
        **{f"info {status}": ["info", f"org/s{status}"] for status in STATUSES},
        **{
            f"model {status}": ["model", f"org/s{status}", None, False] for status in STATUSES if status < 429
        },
        "text": ["text", "hf:org/texts", str(model)],
        "text again": ["text", "hf:org/texts:train", str(model)],
        "other split": ["text", "hf:org/texts:test", str(model)],
        "no split": ["text", "hf:org/texts:validation", str(model)],
        "no dataset": ["text", "hf:org/none", str(model)],
    }
    home = tmp_path_factory.mktemp("home")
    found = dict(zip(orders, ask(hub, home, *orders.values()), strict=True))
    offline = ask(
        hub,
        home,
        ["model", "org/model", None, False],
        ["model", "org/other", None, False],
        HF_HUB_OFFLINE="1",
    )
    with fake_hub() as gone:
        pass
    unreachable = ask(gone, home, ["model", "org/other", None, False])
    quoted = ask(hub, home, ["model", "org/other", None, False], HF_TOKEN="“hf_secret”")
    names = ("cached", "offline", "unreachable", "quoted token")
    return found | dict(zip(names, offline + unreachable + quoted, strict=True))


def test_a_model_of_the_hub(answers: dict[str, dict], hub: Hub) -> None:
    commit = hub.repositories["org/model"].commit
    found = answers["model"]
    assert (found["name"], found["commit"]) == ("org/model", commit)
    assert {"config.json", "model.safetensors", "tokenizer.json", "LICENSE"} <= set(found["files"])
    # never pickles or other frameworks, code only if asked for
    assert not {"pytorch_model.bin", "tf_model.h5", "modeling_x.py"} & set(found["files"])
    assert "modeling_x.py" in answers["code"]["files"]
    assert answers["commit"]["commit"] == commit


def test_what_the_cache_holds_needs_no_network(answers: dict[str, dict], hub: Hub) -> None:
    assert answers["cached"]["commit"] == hub.repositories["org/model"].commit


@pytest.mark.parametrize(
    "name, said, hint",
    [
        ("gated", "'org/gated' is gated and this token has no access", "hf auth login"),
        ("missing", "no Hub repository 'org/nothing'", "HF_TOKEN"),
        ("revision", "'org/model' has no such revision", "branch"),
        (
            "broken",
            "is not in the local cache, and the Hub answered 500 for 'org/broken': no.",
            "again later",
        ),
        ("empty", "'org/empty' is empty: nothing has been pushed to it", "--revision"),
        (
            "others",
            "has no config.json: it holds 4 other files, README.md, a.gguf, b.gguf, ...",
            "--revision",
        ),
        ("offline", "'org/other' is not in the local cache", "HF_HUB_OFFLINE"),
        ("unreachable", "'org/other' is not in the local cache", "network"),
        ("quoted token", "the token has characters that no token has", "set HF_TOKEN"),
        ("no dataset", "no Hub repository 'org/none'", "HF_TOKEN"),
        ("no split", "no .jsonl, .txt or .parquet file of split 'validation'", "hf:org/texts:SPLIT"),
    ],
)
def test_what_cannot_be_had(name: str, said: str, hint: str, answers: dict[str, dict]) -> None:
    assert said in answers[name]["error"]
    assert hint in answers[name]["hint"]
    assert "hf_secret" not in json.dumps(answers[name])


@pytest.mark.parametrize("status", STATUSES)
def test_the_hubs_own_sentence_is_shown(status: int, answers: dict[str, dict]) -> None:
    """Whatever it answers, without the token that it repeats, and with a hint of ours."""
    for asked in ("info", "model") if status < 429 else ("info",):
        answer = answers[f"{asked} {status}"]
        assert f"you (***) may not: rule {status}." in answer["error"]
        assert "hf_secret" not in json.dumps(answer)
        assert answer["hint"] and "uploaded" not in answer["hint"]


@pytest.mark.parametrize("body", [b"null", b'["no"]'])
def test_a_refusal_of_another_shape_is_a_sentence_too(body: bytes, tmp_path: Path) -> None:
    """As what stands in front of a Hub may answer; the client stumbles over it."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(400)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *words: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        (answer,) = ask(SimpleNamespace(url=address), tmp_path, ["info", "org/model"])
        server.shutdown()
    assert "'org/model' that is no answer" in answer["error"] and "HF_ENDPOINT" in answer["hint"]


def test_a_text_of_the_hub(answers: dict[str, dict]) -> None:
    assert answers["text"]["digest"] == answers["text again"]["digest"] != answers["other split"]["digest"]
    assert answers["text"]["source"] == "hf:org/texts"


def test_whoever_ends_a_download_does_not_wait_for_it(hub: Hub, tinypy: Path, tmp_path: Path) -> None:
    """Several files at a time, in threads of the client: of a large model that would be hours."""
    hub.add("org/large", tinypy)
    hub.delay, hub.fault = 12, Fault("delay", "resolve", -1)
    before = hub.endpoints.count("resolve")
    command = [sys.executable, "-m", "marlin_convert", "quantize", "org/large", "-o", str(tmp_path / "out")]
    environ = environment(hub, tmp_path / "home", HF_HUB_DISABLE_PROGRESS_BARS="1")
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environ) as process:
        hub.fault.times = 0  # config.json comes at once, the others do not
        while hub.endpoints.count("resolve") == before:
            assert process.poll() is None
            time.sleep(0.001)
        hub.fault.times = -1
        while hub.endpoints.count("resolve") < before + 3:
            assert process.poll() is None
            time.sleep(0.01)
        process.terminate()
        start = time.monotonic()
        assert process.stderr is not None
        said = process.stderr.read()
    hub.fault = None
    assert time.monotonic() - start < 5
    assert process.returncode == 143 and "--resume org/large" in said, said


def test_a_model_of_the_hub_is_quantized(
    answers: dict[str, dict], hub: Hub, tmp_path: Path, tinypy: Path
) -> None:
    """From the id to a checkpoint that says where it came from, and neither the token nor a local path."""
    output = tmp_path / "out"
    text = tiny_models.text(tmp_path)
    command: list[Callable | str | Path] = [
        sys.executable, "-m", "marlin_convert", "quantize", "org/model", "-o", output, "--calibration", text,
        "--samples", "4", "--sequence-length", "64", "--device", "cpu",
    ]  # fmt: skip
    home = Path(answers["model"]["directory"]).parents[3]
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, env=environment(hub, home)
    )
    assert done.returncode == 0, done.stderr
    manifest = json.loads((output / "marlin_convert.json").read_text())
    assert manifest["source"]["name"] == "org/model"
    assert manifest["source"]["commit"] == hub.repositories["org/model"].commit
    assert "--source org/model" in done.stdout
    assert (output / "LICENSE").read_text() == "LICENSE"
    for path in output.iterdir():
        data = path.read_bytes()
        assert b"hf_secret" not in data and str(home).encode() not in data
        assert path.suffix not in (".py", ".bin", ".h5") and not path.is_symlink()
