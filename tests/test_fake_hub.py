"""The Hub of our own: that the real client takes it for one, and that its faults are those it was told."""

import hashlib
import http.client
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from fake_hub import Fault, Hub, User, fake_hub
from test_hub import environment

CLIENT = """
import hashlib, os, sys
from pathlib import Path
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

home = Path(sys.argv[1])
api, reader, stranger, nobody = (HfApi(token=token) for token in ("hf_secret", "hf_read", "hf_other", False))
files = {
    "large.safetensors": os.urandom(250_000), "small.safetensors": os.urandom(70_000), "empty.txt": b"",
    "config.json": b"{}", "README.md": b"---\\nlicense: mit\\n---\\n", "sub/notes.txt": b"notes",
}
for path, data in files.items():
    (home / "model" / path).parent.mkdir(parents=True, exist_ok=True)
    (home / "model" / path).write_bytes(data)

def adds(*paths):
    return [CommitOperationAdd(path, home / "model" / path) for path in paths]

def refused(status, call, *words, kind=HfHubHTTPError, **more):
    try:
        call(*words, **more)
    except kind as error:
        assert error.response.status_code == status, error
    else:
        raise AssertionError(f"not refused: {call}")

# accounts
assert (api.whoami()["name"], [org["name"] for org in api.whoami()["orgs"]]) == ("alice", ["team"])
assert reader.whoami()["auth"]["accessToken"]["role"] == "read"
refused(401, HfApi(token="hf_wrong").whoami)

# a private repository, and who may do what with it
m = "alice/m"
assert api.create_repo(m, private=True).repo_id == m
refused(409, api.create_repo, m)
assert api.create_repo(m, exist_ok=True).repo_id == m
refused(403, api.create_repo, "other/m")
assert api.create_repo("team/m").repo_id == "team/m"
first = api.model_info(m).sha
assert api.model_info(m).private and not nobody.model_info("team/m").private
for call in (nobody.model_info, stranger.model_info, stranger.auth_check):
    refused(404, call, m, kind=RepositoryNotFoundError)
refused(404, api.model_info, m, revision="v9", kind=RevisionNotFoundError)
api.auth_check(m, write=True)
reader.auth_check(m)
refused(403, reader.auth_check, m, write=True)
refused(403, reader.create_branch, m, branch="b")
refused(403, reader.create_commit, m, adds("config.json"), commit_message="x")

# LFS in one piece and in parts, and regular files, in one commit
uploads = adds("large.safetensors", "small.safetensors")
api.preupload_lfs_files(m, uploads, free_memory=False)
assert api.list_repo_files(m) == [".gitattributes"]
uploads += adds("config.json", "README.md", "empty.txt", "sub/notes.txt")
pushed = api.create_commit(m, uploads, commit_message="push", commit_description="all", parent_commit=first)
assert api.model_info(m).sha == pushed.oid
stale = [CommitOperationDelete("config.json")]
refused(412, api.create_commit, m, stale, commit_message="x", parent_commit=first)

# the same again is no commit
assert api.create_commit(m, adds(*files), commit_message="again").oid == pushed.oid
assert [commit.title for commit in api.list_repo_commits(m)] == ["push", "initial commit"]

# what is there is what was sent
remote = {entry.path: entry for entry in api.list_repo_tree(m, recursive=True)}
assert set(remote) == {*files, ".gitattributes", "sub"}
assert "sub/notes.txt" not in [entry.path for entry in api.list_repo_tree(m)]
assert [entry.path for entry in api.list_repo_tree(m, "sub")] == ["sub/notes.txt"]
for path, data in files.items():
    assert remote[path].size == len(data)
    if path.endswith(".safetensors"):
        assert remote[path].lfs.sha256 == hashlib.sha256(data).hexdigest()
        assert remote[path].lfs.pointer_size == 125 + len(str(len(data)))
    else:
        assert remote[path].lfs is None
        assert remote[path].blob_id == hashlib.sha1(b"blob %d\\0" % len(data) + data).hexdigest()
assert [entry.path for entry in api.get_paths_info(m, ["sub", "README.md", "x"])] == ["sub", "README.md"]
checked = api.verify_repo_checksums(m, local_dir=home / "model")
assert not checked.mismatches and checked.missing_paths == [".gitattributes"], checked
copy = Path(api.snapshot_download(m, local_dir=home / "copy"))
assert {path: (copy / path).read_bytes() for path in files} == files
part = api.hf_hub_download(m, "small.safetensors", revision=pushed.oid, cache_dir=home / "cache")
assert Path(part).read_bytes() == files["small.safetensors"]

# branches and pull requests, one of them from someone who may not write
api.create_branch(m, branch="v/1", revision=first)
refused(409, api.create_branch, m, branch="v/1")
api.create_commit(m, adds("config.json"), commit_message="on a branch", revision="v/1")
assert api.list_repo_files(m, revision="v/1") == [".gitattributes", "config.json"]
asked = api.create_commit(m, [CommitOperationDelete("sub/")], commit_message="less", create_pr=True)
assert asked.pr_revision == "refs/pr/1"
assert set(files) - set(api.list_repo_files(m, revision="refs/pr/1")) == {"sub/notes.txt"}
[pull] = api.get_repo_discussions(m, author="alice", discussion_type="pull_request", discussion_status="open")
assert (pull.num, pull.author, pull.status, pull.is_pull_request) == (1, "alice", "open", True)
assert not list(api.get_repo_discussions(m, author="bob"))
details = api.get_discussion_details(m, 1)
assert (details.git_reference, [event.oid for event in details.events]) == ("refs/pr/1", [asked.oid])
refs = api.list_repo_refs(m, include_pull_requests=True)
assert [ref.name for ref in refs.branches] == ["main", "v/1"]
assert [ref.ref for ref in refs.pull_requests] == ["refs/pr/1"]
refused(403, stranger.create_commit, "team/m", adds("small.safetensors"), commit_message="x")
asked = stranger.create_commit("team/m", adds("small.safetensors"), commit_message="please", create_pr=True)
assert asked.pr_url.endswith("/team/m/discussions/1")
assert next(nobody.get_repo_discussions("team/m")).author == "other"
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with fake_hub() as hub:
        yield hub


def test_the_real_client(hub: Hub, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    hub.part_size = 100_000
    hub.users = {
        "hf_secret": User("alice", ("team",)),
        "hf_read": User("alice", ("team",), "read"),
        "hf_other": User("other", (), "fineGrained"),
    }
    script = tmp_path / "client.py"
    script.write_text(CLIENT)
    done = subprocess.run(
        [sys.executable, script, tmp_path], capture_output=True, text=True, env=environment(hub, tmp_path)
    )
    assert done.returncode == 0, done.stderr
    assert hub.repositories["alice/m"].private and list(hub.repositories["alice/m"].files) == [
        ".gitattributes", "large.safetensors", "small.safetensors",
        "config.json", "README.md", "empty.txt", "sub/notes.txt",
    ]  # fmt: skip
    # 250 kB in three parts, uploaded once; 70 kB in one piece, for two repositories
    assert (hub.endpoints.count("lfs part"), hub.endpoints.count("lfs put")) == (3, 2)
    assert "unknown" not in hub.endpoints
    assert capfd.readouterr().err == ""


def ask(hub: Hub, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(urlsplit(hub.url).netloc)
    connection.request(method, path, body, {"Authorization": "Bearer hf_secret"} | headers)
    answer = connection.getresponse()
    return answer.status, answer.read()


CREATE = "POST", "/api/repos/create", b'{"name": "m", "organization": null}'


@pytest.mark.parametrize("kind", ["401", "403", "429", "500", "503", "garbage", "drop"])
def test_a_fault_without_effect(kind: str, hub: Hub) -> None:
    hub.fault = Fault(kind, "create")
    assert ask(hub, "GET", "/api/whoami-v2")[0] == 200
    if kind == "drop":
        with pytest.raises(http.client.RemoteDisconnected):
            ask(hub, *CREATE)
    elif kind == "garbage":
        assert ask(hub, *CREATE) == (200, b"<html>not the Hub</html>")
    else:
        status, body = ask(hub, *CREATE)
        assert status == int(kind) and json.loads(body)["error"]
    assert not hub.repositories
    assert ask(hub, *CREATE)[0] == 200
    assert hub.endpoints == ["whoami", "create", "create"]


def test_a_fault_with_effect(hub: Hub) -> None:
    hub.fault = Fault("drop after", "create")
    with pytest.raises(http.client.RemoteDisconnected):
        ask(hub, *CREATE)
    assert "alice/m" in hub.repositories
    hub.fault, hub.delay = Fault("delay", "info", -1), 0.1
    for _ in range(2):
        start = time.monotonic()
        assert ask(hub, "GET", "/api/models/alice/m")[0] == 200
        assert time.monotonic() - start >= 0.1
    hub.fault = Fault("truncated", "resolve")
    with pytest.raises(http.client.IncompleteRead):
        ask(hub, "GET", "/alice/m/resolve/main/.gitattributes")
    data = hub.repositories["alice/m"].files[".gitattributes"]
    assert ask(hub, "GET", "/alice/m/resolve/main/.gitattributes", Range="bytes=9-") == (206, data[9:])


def test_uploads_that_are_not_what_was_announced(hub: Hub) -> None:
    ask(hub, *CREATE)
    order = {"ref": {"name": "main"}, "objects": [{"oid": "a" * 64, "size": 5}]}
    assert ask(hub, "POST", "/alice/m.git/info/lfs/objects/batch", json.dumps(order).encode())[0] == 200
    assert ask(hub, "PUT", "/lfs/0", b"other")[0] == 400
    assert ask(hub, "PUT", "/lfs/0", b"longer")[0] == 422
    assert ask(hub, "POST", "/lfs/0/verify", json.dumps(order["objects"][0]).encode())[0] == 422
    lines = [{"key": "header", "value": {"summary": "x", "description": ""}}]
    lines += [{"key": "lfsFile", "value": {"path": "x", "oid": "a" * 64, "size": 5}}]
    commit = "\n".join(map(json.dumps, lines)).encode()
    assert ask(hub, "POST", "/api/models/alice/m/commit/main", commit)[0] == 400
    assert list(hub.repositories["alice/m"].files) == [".gitattributes"]


@pytest.mark.parametrize("sent", [1, 9])
def test_an_upload_that_is_cut_off(sent: int, hub: Hub, capfd: pytest.CaptureFixture[str]) -> None:
    """Also one that the kernel has got, and the Hub is still reading when the client goes away."""
    ask(hub, *CREATE)
    data = b"all of it"
    order = {"ref": {"name": "main"}, "objects": [{"oid": hashlib.sha256(data).hexdigest(), "size": 9}]}
    ask(hub, "POST", "/alice/m.git/info/lfs/objects/batch", json.dumps(order).encode())
    hub.delay_put = 0.1
    connection = http.client.HTTPConnection(urlsplit(hub.url).netloc)
    connection.putrequest("PUT", "/lfs/0")
    connection.putheader("Content-Length", "9")
    connection.endheaders(data[:sent])
    connection.close()
    time.sleep(0.3)
    assert not hub.repositories["alice/m"].stored
    assert capfd.readouterr().err == ""
    assert ask(hub, "PUT", "/lfs/0", data)[0] == 200
    assert list(hub.repositories["alice/m"].stored.values()) == [data]
