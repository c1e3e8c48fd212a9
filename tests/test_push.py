"""`push`, by the real client in processes of its own, to a Hub of our own."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path

import pytest
import yaml
from fake_hub import LFS, Commit, Fault, Hub, Repository, User, fake_hub
from runs import Begin, beginner

from marlin_convert.checkpoint.linears import Weights
from marlin_convert.checkpoint.manifest import MANIFEST, VERIFIED
from marlin_convert.checkpoint.reader import Checkpoint
from marlin_convert.release import PIECE, SMALL

TOKEN = "hf_secret"
REPO = "alice/tiny-marlin"
WEIGHTS = "model.safetensors"

Push = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def hub() -> Iterator[Hub]:
    with fake_hub() as hub:
        yield hub


def environment(hub: Hub, home: Path, **changes: str | None) -> dict[str, str]:
    settings = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_TOKEN": TOKEN,
        "TMPDIR": str(home),
    }
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    merged = inherited | settings | changes
    return {name: value for name, value in merged.items() if value is not None}


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "marlin_convert", *map(str, words)]


@pytest.fixture(scope="module")
def begin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Begin]:
    with beginner(tmp_path_factory.mktemp("said")) as begin:
        yield begin


@pytest.fixture
def run(hub: Hub, begin: Begin, tmp_path: Path) -> Push:
    """Runs a command line in a process, and looks for the token in all that it says and leaves."""
    home = tmp_path / "home"
    home.mkdir()

    def run(*words: object, **changes: str | None) -> subprocess.CompletedProcess[str]:
        done = begin(*words, directory=tmp_path, environment=environment(hub, home, **changes))
        said = done.stdout + done.stderr
        token = changes.get("HF_TOKEN", TOKEN)
        assert token is None or token not in said
        assert "Traceback" not in said, said
        for path in filter(Path.is_file, home.rglob("*")):
            assert TOKEN.encode() not in path.read_bytes(), path
        for repository in hub.repositories.values():
            for commits in repository.branches.values():
                for commit in commits:
                    text = [commit.title.encode(), commit.description.encode(), *commit.files.values()]
                    assert not any(TOKEN.encode() in one or str(tmp_path).encode() in one for one in text)
        return done

    return run


@pytest.fixture
def push(run: Push) -> Push:
    def push(*words: object, **changes: str | None) -> subprocess.CompletedProcess[str]:
        return run("push", *words, **changes)

    return push


@pytest.fixture(scope="module")
def checkpoints(
    tinypy: Path, quantized: Callable[[str], Path], begin: Begin, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """Two verified checkpoints of the same model that differ in every linear; not to be changed."""
    directory = tmp_path_factory.mktemp("verified")
    one, other = directory / "one", directory / "other"
    shutil.copytree(quantized("marlin"), one)
    quick = ("--samples", 8, "--sequence-length", 256, "--seed", 7, "-q")
    text = ("--source", tinypy, "--samples", 1, "--sequence-length", 256, "-q")
    for words in (
        ("quantize", tinypy, "-o", other, *quick),
        ("verify", one, *text),
        ("verify", other, *text),
    ):
        done = begin(*words, directory=directory, environment=dict(os.environ))
        assert done.returncode == 0, done.stderr
    return one, other


@pytest.fixture
def checkpoint(checkpoints: tuple[Path, Path], tmp_path: Path) -> Path:
    """A verified checkpoint that a test may spoil."""
    shutil.copytree(checkpoints[0], tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def edit(path: Path, change: Callable[[dict], object]) -> None:
    """Change a JSON file."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content, indent=2) + "\n")


def list_file(checkpoint: Path, name: str, content: bytes = b"content") -> None:
    """Put a file into the manifest, and the report of verify on that manifest."""
    entry = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    edit(checkpoint / MANIFEST, lambda manifest: manifest["files"].update({name: entry}))
    vouch(checkpoint)


def vouch(checkpoint: Path) -> None:
    """Let the report of verify be about the manifest as it is now."""
    digest = hashlib.sha256((checkpoint / MANIFEST).read_bytes()).hexdigest()
    edit(checkpoint / VERIFIED, lambda report: report.update(manifest_sha256=digest))


def on_disk(checkpoint: Path) -> dict[str, bytes]:
    """The files that should go up, but for the card."""
    names = [*json.loads((checkpoint / MANIFEST).read_text())["files"], MANIFEST, VERIFIED]
    return {name: (checkpoint / name).read_bytes() for name in names}


def published(repository: Repository, branch: str = "main") -> dict[str, bytes]:
    """The files of a branch, but for the card and what the Hub itself puts there."""
    files = repository.branches[branch][-1].files
    return {name: data for name, data in files.items() if name not in ("README.md", ".gitattributes")}


def card(repository: Repository, branch: str = "main") -> tuple[dict, str]:
    """The metadata and the text of a model card."""
    _, metadata, text = repository.branches[branch][-1].files["README.md"].decode().split("---\n", 2)
    return yaml.safe_load(metadata), text


# what goes up


def test_exactly_the_verified_files_in_one_commit(hub: Hub, push: Push, checkpoint: Path) -> None:
    for name in (".env", "notes.txt", "README.md", "pytorch_model.bin"):
        (checkpoint / name).write_text("not for others")
    (checkpoint / "link").symlink_to("/etc/hostname")
    done = push(checkpoint, REPO)
    assert done.returncode == 0, done.stderr
    repository = hub.repositories[REPO]
    assert repository.private
    assert [commit.title for commit in repository.branches["main"]] == [
        "initial commit",
        "marlin checkpoint made by marlin-convert 0.1.0",
    ]
    assert published(repository) == on_disk(checkpoint)
    assert isinstance(repository.files[WEIGHTS], LFS)
    assert "not for others" not in repository.files["README.md"].decode()
    for name in (".env", "notes.txt", "README.md", "pytorch_model.bin", "link"):
        assert f"not pushed: {name}" in done.stderr
    assert f"{hub.url}/{REPO}/commit/{repository.commit}" in done.stdout
    assert done.stdout.splitlines()[-1] == f"Next: marlin-convert verify {REPO}"


def test_a_dry_run_asks_the_hub_nothing(hub: Hub, push: Push, checkpoint: Path) -> None:
    done = push(checkpoint, REPO, "--dry-run", HF_TOKEN=None, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert not hub.requests
    digest = hashlib.sha256((checkpoint / WEIGHTS).read_bytes()).hexdigest()
    assert digest in done.stdout and "library_name: marlin-convert" in done.stdout
    assert "the license is not known" in done.stderr
    assert done.stdout.splitlines()[-1] == "Nothing was uploaded."


def test_json(hub: Hub, push: Push, checkpoint: Path) -> None:
    planned = json.loads(push(checkpoint, REPO, "--dry-run", "--json", "-q").stdout)
    done = json.loads(push(checkpoint, REPO, "--json", "-q").stdout)
    pushed = done["branches"][0].pop("pushed")
    assert planned["branches"][0].pop("pushed") is None
    assert done == planned
    assert set(done["branches"][0]["files"]) == {*on_disk(checkpoint), "README.md"}
    assert pushed["commit"] == hub.repositories[REPO].commit and pushed["changed"]


def test_the_same_again_makes_no_commit(hub: Hub, push: Push, checkpoint: Path) -> None:
    done = push(checkpoint, REPO)
    assert done.returncode == 0, done.stderr
    first = hub.repositories[REPO].commit
    done = push(checkpoint, REPO)
    assert done.returncode == 0 and "(unchanged)" in done.stdout
    assert hub.repositories[REPO].commit == first


def test_another_checkpoint_replaces_an_earlier_one(
    hub: Hub, push: Push, checkpoint: Path, checkpoints: tuple[Path, Path]
) -> None:
    (checkpoint / "NOTICE").write_bytes(b"content")
    list_file(checkpoint, "NOTICE")
    assert push(checkpoint, REPO).returncode == 0
    done = push(checkpoints[1], REPO, "--message", "Better")
    assert done.returncode == 0, done.stderr
    assert "removed: NOTICE" in done.stdout
    repository = hub.repositories[REPO]
    assert published(repository) == on_disk(checkpoints[1])
    assert [commit.title for commit in repository.branches["main"]][2:] == ["Better"]


def test_code_goes_up_only_if_it_came_with_trust(hub: Hub, push: Push, checkpoint: Path) -> None:
    (checkpoint / "tokenization_x.py").write_bytes(b"content")
    list_file(checkpoint, "tokenization_x.py")
    done = push(checkpoint, REPO)
    assert done.returncode == 1 and "'tokenization_x.py' is code" in done.stderr
    edit(checkpoint / MANIFEST, lambda manifest: manifest.update(trust_remote_code=True))
    vouch(checkpoint)
    assert push(checkpoint, REPO).returncode == 0
    assert "tokenization_x.py" in hub.repositories[REPO].files


# the gate


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


UNVERIFIED: dict[str, tuple[Callable[[Path], object], str]] = {
    "never": (lambda path: (path / VERIFIED).unlink(), "verify has not been run on it"),
    "other manifest": (
        lambda path: edit(path / MANIFEST, lambda manifest: manifest.update(more=1)),
        "it has been changed since it was verified",
    ),
    "failed": (
        lambda path: edit(path / VERIFIED, lambda report: report["checks"]["layout"].update(status="fail")),
        "layout did not pass",
    ),
    "numbers skipped": (
        lambda path: edit(
            path / VERIFIED, lambda report: report["checks"]["numbers"].update(status="skipped")
        ),
        "numbers did not pass",
    ),
    "kernel failed": (
        lambda path: edit(path / VERIFIED, lambda report: report["checks"]["kernel"].update(status="fail")),
        "kernel did not pass",
    ),
    "not passed": (
        lambda path: edit(path / VERIFIED, lambda report: report.update(passed=False)),
        "did not pass",
    ),
    "not all that is needed": (
        lambda path: edit(path / VERIFIED, lambda report: report.update(verified=False)),
        "did not pass",
    ),
    "no report": (lambda path: (path / VERIFIED).write_text("[1]"), "is no report of verify"),
}


@pytest.mark.parametrize("case", UNVERIFIED)
def test_what_is_not_verified_is_refused(case: str, hub: Hub, push: Push, checkpoint: Path) -> None:
    spoil, reason = UNVERIFIED[case]
    spoil(checkpoint)
    done = push(checkpoint, REPO)
    assert done.returncode == 1
    assert f"is not verified: {reason}" in done.stderr or reason in done.stderr
    assert "marlin-convert verify" in done.stderr
    assert not hub.requests


def test_unverified_if_it_must_be(hub: Hub, push: Push, checkpoint: Path) -> None:
    (checkpoint / VERIFIED).unlink()
    done = push(checkpoint, REPO, "--allow-unverified")
    assert done.returncode == 0 and "published without verification" in done.stderr
    repository = hub.repositories[REPO]
    assert VERIFIED not in repository.files
    assert "**Not verified.**" in card(repository)[1] and "Not measured." in card(repository)[1]


def replace_by_link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def hide_behind_link(checkpoint: Path) -> None:
    (checkpoint / "real").mkdir()
    (checkpoint / "real" / "x.jinja").write_bytes(b"content")
    (checkpoint / "additional_chat_templates").symlink_to("real")
    list_file(checkpoint, "additional_chat_templates/x.jinja")


def put_fifo(checkpoint: Path) -> None:
    os.mkfifo(checkpoint / "x.json")
    list_file(checkpoint, "x.json")


HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a byte": (lambda path: flip(path / WEIGHTS), "sha256"),
    "a shorter file": (lambda path: os.truncate(path / "tokenizer.json", 99), "99 bytes"),
    "config": (
        lambda path: edit(path / "config.json", lambda config: config.update(x=1)),
        "'config.json' has",
    ),
    "missing": (lambda path: (path / "config.json").unlink(), "'config.json' cannot be read"),
    "a link": (lambda path: replace_by_link(path / WEIGHTS), f"'{WEIGHTS}' is a link"),
    "a report that is a link": (lambda path: replace_by_link(path / VERIFIED), f"'{VERIFIED}' is a link"),
    "a folder that is a link": (hide_behind_link, "is a link"),
    "a folder": (
        lambda path: ((path / "config.json").unlink(), (path / "config.json").mkdir()),
        "no regular file",
    ),
    "a pipe": (put_fifo, "no regular file"),
    "pickle": (lambda path: list_file(path, "pytorch_model.bin"), "a pickle"),
    "hidden": (lambda path: list_file(path, ".env"), "'.env' is hidden"),
    "hidden folder": (lambda path: list_file(path, ".git/config"), "is hidden"),
    "outside": (lambda path: list_file(path, "../secret"), "no path inside"),
    "absolute": (lambda path: list_file(path, "/etc/hostname"), "no path inside"),
    "not normal": (lambda path: list_file(path, "x//y"), "no path inside"),
    "newline": (lambda path: list_file(path, "x\ny"), "no path inside"),
    "card": (lambda path: list_file(path, "README.md"), "for push itself"),
    "no manifest": (lambda path: (path / MANIFEST).unlink(), "marlin-convert did not write it"),
    "no object": (lambda path: (path / MANIFEST).write_text("[]"), "JSON that is not an object"),
    "no format": (
        lambda path: (edit(path / MANIFEST, lambda manifest: manifest.pop("recipe")), vouch(path)),
        "lacks what the card says",
    ),
    "a token": (
        lambda path: (
            (path / "NOTICE").write_text(f"my {TOKEN}!"),
            list_file(path, "NOTICE", f"my {TOKEN}!".encode()),
        ),
        "'NOTICE' holds your Hub token",
    ),
}


def test_a_token_in_a_large_file_is_found_wherever_it_is(hub: Hub, push: Push, checkpoint: Path) -> None:
    """The first half of it is the end of a piece that is read, in a file that is not kept in memory."""
    content = b"x" * (SMALL + PIECE - SMALL % PIECE)
    half = len(TOKEN) // 2
    content = content[:-half] + TOKEN.encode() + b"x" * PIECE
    (checkpoint / "merges.txt").write_bytes(content)
    list_file(checkpoint, "merges.txt", content)
    done = push(checkpoint, REPO)
    assert done.returncode == 1 and "'merges.txt' holds your Hub token" in done.stderr, done.stderr
    assert not hub.requests


@pytest.mark.parametrize("case", HOSTILE)
def test_what_may_not_go_up_is_refused_before_the_hub_is_asked(
    case: str, hub: Hub, push: Push, checkpoint: Path
) -> None:
    spoil, reason = HOSTILE[case]
    spoil(checkpoint)
    for words in ((), ("--allow-unverified",)):
        done = push(checkpoint, REPO, *words)
        assert done.returncode == 1 and reason in done.stderr, done.stderr
        assert not hub.requests


# what is asked


@pytest.mark.parametrize(
    "words, said",
    [
        (("checkpoint", "tiny"), "'tiny' is not the name of a repository"),
        (("checkpoint", "a/b/c"), "'a/b/c' is not the name of a repository"),
        (("checkpoint", "https://huggingface.co/a/b"), "is not the name of a repository"),
        (("alice/tiny", "checkpoint"), "swap them: marlin-convert push checkpoint alice/tiny"),
        (("absent", "alice/tiny"), "'absent' is not a directory"),
        (("checkpoint", "alice/tiny", "--base-model", "/home/x/model"), "--base-model"),
        (("checkpoint", "alice/tiny", "--license", "Mine, all mine"), "--license"),
        (("checkpoint", "alice/tiny", "--revision", "../x"), "--revision"),
        (("checkpoint", "alice/tiny", "--revision", "refs/pr/1"), "--revision"),
        (("checkpoint", "alice/tiny", "--revision", "gptq", "--also", "gptq"), "--also gptq"),
        (("checkpoint", "alice/tiny", "--also", "marlin"), "'marlin' is not one of gptq, compressed-tensors"),
    ],
)
def test_a_wrong_command_line(
    words: tuple[str, ...], said: str, hub: Hub, push: Push, checkpoint: Path
) -> None:
    done = push(*words)
    assert done.returncode in (1, 2) and said in done.stderr, done.stderr
    assert not hub.requests


def test_also_in_its_own_format(hub: Hub, push: Push, quantized: Callable[[str], Path]) -> None:
    done = push(quantized("gptq"), REPO, "--also", "gptq", "--allow-unverified")
    assert done.returncode == 1 and "--also names the format of the checkpoint itself" in done.stderr


# what the Hub refuses


def change_visibility(hub: Hub) -> None:
    hub.repositories[REPO] = Repository({"main": [Commit("initial commit", {})]})


def foreign(hub: Hub) -> None:
    files = {".gitattributes": b"", "README.md": b"", "pytorch_model.bin": b"x", "a": b"", "b": b"", "c": b""}
    hub.repositories[REPO] = Repository({"main": [Commit("initial commit", files)]}, private=True)


def hidden_from_us(hub: Hub) -> None:
    hub.repositories["bob/tiny"] = Repository({"main": [Commit("initial commit", {})]}, private=True)


Refusal = tuple[Callable[[Hub], object] | None, tuple[str, ...], dict[str, str | None], list[str]]
REFUSALS: dict[str, Refusal] = {
    "no token": (None, (REPO,), {"HF_TOKEN": None}, ["there is no token", "hf auth login"]),
    "wrong token": (None, (REPO,), {"HF_TOKEN": "hf_wrong"}, ["answered 401", "hf auth login"]),
    "read token": (
        lambda hub: hub.users.update({TOKEN: User("alice", role="read")}),
        (REPO,), {}, ["token of 'alice' can only read", "write access"],
    ),
    "not ours": (None, ("bob/tiny",), {}, ["answered 403 for 'bob/tiny'", "write access"]),
    "not to be seen": (hidden_from_us, ("bob/tiny",), {}, ["answered 403 for 'bob/tiny'"]),
    "gated": (
        lambda hub: (foreign(hub), setattr(hub.repositories[REPO], "refusal", (403, "GatedRepo"))),
        (REPO,), {}, ["is gated"],
    ),
    "offline": (None, (REPO,), {"HF_HUB_OFFLINE": "1"}, ["HF_HUB_OFFLINE"]),
    "public": (change_visibility, (REPO, "--private"), {}, ["exists and is public"]),
    "other content": (foreign, (REPO,), {}, ["holds 4 files that marlin-convert did not put", "--revision"]),
    "card": (
        lambda hub: setattr(hub, "card_error", '"license" must be one of'),
        (REPO, "--license", "mine"), {}, ["the Hub rejects the card: \"license\" must be one of"],
    ),
    "no base model": (None, (REPO, "--base-model", "org/nothing"), {}, ["no Hub repository 'org/nothing'"]),
    "no xet": (None, (REPO,), {"HF_HUB_DISABLE_XET": "0"}, ["through Xet failed", "HF_HUB_DISABLE_XET=1"]),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_what_the_hub_refuses(case: str, hub: Hub, push: Push, checkpoint: Path) -> None:
    prepare, words, changes, said = REFUSALS[case]
    if prepare:
        prepare(hub)
    before = {name: repository.commit for name, repository in hub.repositories.items()}
    done = push(checkpoint, *words, **changes)
    assert done.returncode == 1, done.stdout
    for one in said:
        assert one in done.stderr
    assert {
        name: repository.commit for name, repository in hub.repositories.items() if name in before
    } == before
    assert all(
        set(one.files) == {".gitattributes"} for name, one in hub.repositories.items() if name not in before
    )


@pytest.mark.parametrize(
    ("status", "hint"), [(400, "mend what"), (403, "write access"), (413, "--max-shard-size")]
)
def test_what_the_hub_says_is_shown(status: int, hint: str, hub: Hub, push: Push, checkpoint: Path) -> None:
    """With a hint of ours, and without the token, which the Hub repeats here."""
    hub.fault = Fault(str(status), "commit", -1, f"Rule {status} is broken by {TOKEN}, see the page")
    done = push(checkpoint, REPO)
    assert done.returncode == 1
    assert f"answered {status} for {REPO!r}: Rule {status} is broken by ***, see the page." in done.stderr
    assert re.search(f"^Hint: .*{hint}", done.stderr, re.MULTILINE)


def test_an_unreachable_hub(push: Push, checkpoint: Path) -> None:
    done = push(checkpoint, REPO, HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 1 and "the connection to the Hub broke" in done.stderr


def test_an_organisation_of_ours(hub: Hub, push: Push, checkpoint: Path) -> None:
    hub.users[TOKEN] = User("alice", orgs=("acme",), role="fineGrained")
    assert push(checkpoint, "acme/tiny", "--public").returncode == 0
    assert not hub.repositories["acme/tiny"].private


def in_the_middle(hub: Hub, endpoint: str, act: Callable[[], object]) -> threading.Thread:
    """Act as soon as an endpoint has been asked."""

    def wait() -> None:
        while endpoint not in hub.endpoints:
            time.sleep(0.001)
        act()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_somebody_else_pushes_meanwhile(
    hub: Hub, push: Push, checkpoint: Path, checkpoints: tuple[Path, Path]
) -> None:
    assert push(checkpoints[1], REPO).returncode == 0
    history = hub.repositories[REPO].branches["main"]
    hub.endpoints.clear()
    hub.delay_put = 0.005
    theirs = Commit("theirs", history[-1].files | {"README.md": b"theirs"}, history[-1].oid)
    thread = in_the_middle(hub, "lfs put", lambda: history.append(theirs))
    done = push(checkpoint, REPO)
    thread.join()
    assert (
        done.returncode == 1 and "answered 412" in done.stderr and "run the same command again" in done.stderr
    )
    assert hub.repositories[REPO].commit == theirs.oid
    hub.delay_put = 0
    assert push(checkpoint, REPO).returncode == 0
    assert published(hub.repositories[REPO]) == on_disk(checkpoint)


def test_a_file_that_changes_while_it_goes_up(
    hub: Hub, push: Push, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small files are sent as they were read; a large one the Hub does not take."""
    hub.delay_put = 0.005
    thread = in_the_middle(hub, "lfs batch", lambda: flip(checkpoint / "tokenizer.json"))
    assert push(checkpoint, REPO).returncode == 0
    thread.join()
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    tokenizer = hub.repositories[REPO].files["tokenizer.json"]
    assert hashlib.sha256(tokenizer).hexdigest() == manifest["files"]["tokenizer.json"]["sha256"]


# branches, pull requests, other formats


def test_a_branch(hub: Hub, push: Push, checkpoint: Path, checkpoints: tuple[Path, Path]) -> None:
    assert push(checkpoints[1], REPO).returncode == 0
    main = hub.repositories[REPO].commit
    done = push(checkpoint, REPO, "--revision", "v2")
    assert done.returncode == 0, done.stderr
    repository = hub.repositories[REPO]
    assert repository.commit == main
    assert published(repository, "v2") == on_disk(checkpoint)
    # made from the first commit, which holds nothing: at no time did it hold what is on main
    assert repository.branches["v2"][0].title == "initial commit"
    assert len(repository.branches["v2"]) == 2
    assert f"verify {REPO} --revision v2" in card(repository, "v2")[1]
    assert done.stdout.splitlines()[-1] == f"Next: marlin-convert verify {REPO} --revision v2"


def test_a_pull_request_and_not_a_second_one(
    hub: Hub, push: Push, checkpoint: Path, checkpoints: tuple[Path, Path]
) -> None:
    assert push(checkpoints[1], REPO).returncode == 0
    main = hub.repositories[REPO].commit
    for _ in range(2):
        done = push(checkpoint, REPO, "--create-pr")
        assert done.returncode == 0, done.stderr
        assert f"{hub.url}/{REPO}/discussions/1" in done.stdout
    repository = hub.repositories[REPO]
    assert repository.commit == main and len(repository.pulls) == 1
    assert published(repository, "refs/pr/1") == on_disk(checkpoint)


def test_also_for_stock_engines(
    hub: Hub,
    push: Push,
    run: Push,
    checkpoint: Path,
    checkpoints: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    done = push(checkpoint, REPO, "--also", "gptq,compressed-tensors")
    assert done.returncode == 0, done.stderr
    repository = hub.repositories[REPO]
    assert set(repository.branches) == {"main", "gptq", "compressed-tensors"}
    assert "`--revision gptq` and `--revision compressed-tensors`" in card(repository)[1]
    ours = Weights(Checkpoint.open(checkpoint))
    for branch in ("gptq", "compressed-tensors"):
        assert f"vllm serve {REPO} --revision {branch}" in card(repository, branch)[1]
        assert "compared one by one" in card(repository, branch)[1]
        copy = tmp_path / branch
        copy.mkdir()
        for name, data in published(repository, branch).items():
            (copy / name).write_bytes(data)
        assert json.loads((copy / VERIFIED).read_text())["passed"]
        theirs = Weights(Checkpoint.open(copy))
        for linear in ours.packed_linears():
            assert (ours.quantized(linear).codes == theirs.quantized(linear).codes).all()
        assert run("verify", REPO, "--revision", branch, "-q").returncode == 0
    # the same again, and without --also: no commit on any branch, and nothing left in the temporary directory
    before = {name: len(commits) for name, commits in repository.branches.items()}
    for words in (("--also", "compressed-tensors,gptq"), ()):
        done = push(checkpoint, REPO, *words)
        assert done.returncode == 0 and "(unchanged)" in done.stdout, done.stderr
    assert {name: len(commits) for name, commits in repository.branches.items()} == before
    assert not list((tmp_path / "home").glob("marlin-convert-*"))
    # other codes: what is there of the earlier ones is named as that
    done = push(checkpoints[1], REPO)
    assert done.returncode == 0 and "named as older: the branches gptq and compressed-tensors" in done.stderr
    text = card(repository)[1]
    assert "not made from these files: the branches `gptq`, `compressed-tensors`" in text
    assert "The same codes are in layouts" not in text
    done = push(checkpoints[1], REPO, "--also", "gptq")
    assert done.returncode == 0, done.stderr
    text = card(repository)[1]
    assert "stock engines load: `--revision gptq`." in text
    assert "not made from these files: the branches `compressed-tensors`" in text


def test_what_was_pruned_goes_up_once_it_is_verified(
    hub: Hub, push: Push, run: Push, tinypy: Path, tmp_path: Path
) -> None:
    """Dense: there is no layout to check and no layout to repack."""
    pruned = tmp_path / "pruned"
    short = ("--samples", 4, "--sequence-length", 128)
    assert run("sparsify", tinypy, "-o", pruned, "--method", "magnitude", *short, "-q").returncode == 0
    done = run("verify", pruned)
    assert done.returncode == 0 and done.stdout.splitlines()[-1].endswith(f"verify {pruned} --source MODEL")
    done = push(pruned, REPO)
    assert done.returncode == 1 and "numbers did not pass" in done.stderr
    # of pruning without making up for it, the text is not what is looked at here
    source = tmp_path / "source"
    shutil.copytree(pruned, source)
    done = run("verify", pruned, "--source", source, *short)
    assert done.returncode == 0, done.stdout
    assert f"Next: marlin-convert push {pruned} you/pruned" in done.stdout
    requests = len(hub.requests)
    done = push(pruned, REPO, "--also", "gptq")
    assert done.returncode == 1 and "is dense: it has no codes" in done.stderr
    assert f"quantize {pruned} -o DIR --format gptq" in done.stderr
    assert len(hub.requests) == requests and "verifying" not in done.stderr
    done = push(pruned, REPO)
    assert done.returncode == 0, done.stderr
    metadata, text = card(hub.repositories[REPO])
    assert "sparse-24" in metadata["tags"] and "4-bit" not in metadata["tags"]
    assert "28 pruned, 0 of the blocks left dense" in text and "2:4 in 28 of the pruned linears" in text
    assert "marlin-convert sparsify MODEL -o DIR --recipe recipe.yaml" in text
    done = run("verify", REPO, "--source", source, *short)
    assert done.returncode == 0, done.stdout
    # a check that it needs, taken out
    edit(pruned / VERIFIED, lambda report: report["checks"]["sparsity"].update(status="skipped"))
    assert "sparsity did not pass" in push(pruned, REPO).stderr


def test_what_was_pushed_is_verified_and_quantized_by_its_name(
    hub: Hub, push: Push, run: Push, checkpoint: Path, tmp_path: Path
) -> None:
    push(checkpoint, REPO, "--license", "mit")
    done = run("verify", REPO)
    assert done.returncode == 0 and "files    pass" in done.stdout, done.stdout + done.stderr
    assert "Fetching" not in done.stderr
    done = run("quantize", REPO, "-o", tmp_path / "gptq", "--format", "gptq", "-q")
    assert done.returncode == 0, done.stderr
    source = json.loads((tmp_path / "gptq" / MANIFEST).read_text())["source"]
    assert (source["name"], source["commit"]) == (REPO, hub.repositories[REPO].commit)
    assert source["card"]["license"] == "mit"
    # a file that somebody exchanged on the Hub
    history = hub.repositories[REPO].branches["main"]
    config = history[-1].files["config.json"].replace(b'"hidden_act"', b'"hidden_Act"')
    history.append(Commit("theirs", history[-1].files | {"config.json": config}, history[-1].oid))
    done = run("verify", REPO)
    assert done.returncode == 3 and "'config.json' has sha256" in done.stdout


def test_what_was_added_to_a_repository_is_found(
    hub: Hub, push: Push, run: Push, checkpoint: Path, tmp_path: Path
) -> None:
    """Also what nobody here would download."""
    (checkpoint / "tokenization_x.py").write_bytes(b"content")
    list_file(checkpoint, "tokenization_x.py")
    edit(checkpoint / MANIFEST, lambda manifest: manifest.update(trust_remote_code=True))
    vouch(checkpoint)
    assert push(checkpoint, REPO).returncode == 0
    done = run("verify", REPO)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not list((tmp_path / "home").rglob("*.pyc"))
    history = hub.repositories[REPO].branches["main"]
    before = history[-1]
    more = {"pytorch_model.bin": b"a pickle", "onnx/model.onnx": b"other weights"}
    history.append(Commit("theirs", before.files | more, before.oid))
    done = run("verify", REPO)
    assert done.returncode == 3, done.stdout + done.stderr
    for name in more:
        assert f"'{name}' is in the repository and not in the manifest" in done.stdout
    assert not list((tmp_path / "home").rglob("pytorch_model.bin"))
    # a commit that is as it was pushed; and where the Hub cannot be asked, that is said
    assert run("verify", REPO, "--revision", before.oid).returncode == 0
    done = run("verify", REPO, "--revision", before.oid, HF_HUB_OFFLINE="1")
    assert done.returncode == 0 and "was not looked at" in done.stdout, done.stdout + done.stderr


# interruptions


def test_large_files_go_up_in_parts(hub: Hub, push: Push, checkpoint: Path) -> None:
    hub.part_size = 1_000_000
    assert push(checkpoint, REPO).returncode == 0
    assert hub.endpoints.count("lfs part") == 4 and hub.endpoints.count("lfs complete") == 1
    assert published(hub.repositories[REPO]) == on_disk(checkpoint)


def test_ended_by_sigterm_it_leaves_no_repack_behind(hub: Hub, checkpoint: Path, tmp_path: Path) -> None:
    """What --also repacks is in the temporary directory: of a large model, hundreds of gigabytes."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    words = command("push", checkpoint, REPO, "--also", "gptq", "--dry-run")
    with subprocess.Popen(
        words, stderr=subprocess.PIPE, text=True, env=environment(hub, tmp_path, TMPDIR=str(scratch))
    ) as process:
        while not list(scratch.rglob("*.safetensors")):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        said = process.stderr.read()
    assert process.returncode == 143 and "Hint: run the same command again" in said, said
    assert not list(scratch.glob("marlin-convert-*"))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_whoever_ends_it_does_not_wait_for_what_is_being_uploaded(
    number: int, status: int, hub: Hub, quantized: Callable[[str], Path], tmp_path: Path
) -> None:
    """Several files at a time, in threads of the client: of a large model that would be hours."""
    shards = tmp_path / "shards"
    words = command("quantize", quantized("marlin"), "-o", shards, "--max-shard-size", "600KB", "-q")
    subprocess.run([*words, "--format", "marlin"], check=True)
    hub.delay_put = 2
    words = command("push", shards, REPO, "--allow-unverified")
    with subprocess.Popen(
        words, stderr=subprocess.PIPE, text=True, env=environment(hub, tmp_path),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:  # fmt: skip
        while hub.endpoints.count("lfs put") < 3:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        start = time.monotonic()
        assert process.stderr is not None
        said = process.stderr.read()
    assert time.monotonic() - start < 5, "a file takes twenty seconds"
    assert process.returncode == status and "Interrupted." in said and "Traceback" not in said, said


def test_killed_while_uploading_it_goes_on_where_it_was(
    hub: Hub, push: Push, checkpoints: tuple[Path, Path], tmp_path: Path
) -> None:
    checkpoint = tmp_path / "shards"
    shards = ("--max-shard-size", "1500KB", "--format", "marlin", "-q")
    subprocess.run(command("quantize", checkpoints[0], "-o", checkpoint, *shards), check=True)
    subprocess.run(command("verify", checkpoint, "-q"), check=True)
    hub.delay_put = 0.02
    process = subprocess.Popen(
        command("push", checkpoint, REPO), env=environment(hub, tmp_path / "home"), stderr=subprocess.DEVNULL
    )
    while not (REPO in hub.repositories and hub.repositories[REPO].stored):
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    repository = hub.repositories[REPO]
    assert set(repository.files) == {".gitattributes"}
    there = len(repository.stored)
    hub.endpoints.clear()
    hub.delay_put = 0
    done = push(checkpoint, REPO)
    assert done.returncode == 0, done.stderr
    assert published(repository) == on_disk(checkpoint)
    large = sum(isinstance(data, LFS) for data in repository.files.values())
    assert hub.endpoints.count("lfs put") <= large - there < large
    assert len(repository.branches["main"]) == 2


# what may go wrong on the way, and where
KINDS = ("drop", "drop after", "delay", "429", "500", "503", "truncated", "garbage", "401", "403")
ENDPOINTS = (
    "whoami", "validate-yaml", "info", "auth-check", "tree", "head", "resolve", "preupload", "lfs batch",
    "lfs put", "lfs verify", "commit",
)  # fmt: skip
# in the quick run every endpoint fails in one way and every way is seen at some endpoint
QUICK = {(endpoint, KINDS[number % len(KINDS)]) for number, endpoint in enumerate(ENDPOINTS)} | {
    ("commit", kind) for kind in ("drop", "drop after", "truncated")
}


@pytest.fixture(scope="module")
def earlier(checkpoints: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """A repository that holds the other checkpoint."""
    home = tmp_path_factory.mktemp("home")
    with fake_hub() as hub:
        subprocess.run(command("push", checkpoints[1], REPO, "-q"), check=True, env=environment(hub, home))
        return hub.repositories[REPO]


@pytest.mark.parametrize(
    "endpoint, kind",
    [
        pytest.param(endpoint, kind, marks=[] if (endpoint, kind) in QUICK else pytest.mark.faults)
        for endpoint in ENDPOINTS
        for kind in KINDS
    ],
)
def test_after_any_fault_there_is_the_old_commit_or_the_new_one(
    endpoint: str, kind: str, hub: Hub, push: Push, checkpoints: tuple[Path, Path], earlier: Repository
) -> None:
    new, old = map(on_disk, checkpoints)
    repository = hub.repositories[REPO] = deepcopy(earlier)
    hub.delay = 0.2
    hub.fault = fault = Fault(kind, endpoint)
    done = push(checkpoints[0], REPO)
    assert fault.times == 0, "the fault never happened"
    assert done.returncode in (0, 1), done.stderr
    assert published(repository) == (old if done.returncode else new)
    if done.returncode:
        assert "Error: " in done.stderr and "Hint: " in done.stderr
    done = push(checkpoints[0], REPO)
    assert done.returncode == 0, done.stderr
    assert published(repository) == new
    assert len(repository.branches["main"]) == len(earlier.branches["main"]) + 1


def test_a_hub_that_falls_silent(hub: Hub, checkpoint: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from marlin_convert.commands import push; from marlin_convert.cli.main import main;"
        f"push.PATIENCE = 0.5; main(['push', {str(checkpoint)!r}, {REPO!r}])"
    )
    hub.delay, hub.fault = 3, Fault("delay", "commit", -1)
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=environment(hub, tmp_path / "home"),
    )
    assert done.returncode == 1 and "the connection to the Hub broke" in done.stderr, done.stderr
    assert "ReadTimeout" in done.stderr


@pytest.mark.parametrize("kind", ["429", "500", "drop"])
def test_a_hub_that_keeps_failing_in_the_middle(
    kind: str, hub: Hub, push: Push, checkpoints: tuple[Path, Path], earlier: Repository
) -> None:
    repository = hub.repositories[REPO] = deepcopy(earlier)
    hub.fault = Fault(kind, "commit", -1)
    done = push(checkpoints[0], REPO)
    assert done.returncode == 1 and "Hint: " in done.stderr
    assert repository.commit == earlier.commit
