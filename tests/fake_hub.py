"""A small Hugging Face Hub on 127.0.0.1: what the real client needs to make, fill and read repositories.

Tests look into `Hub.repositories`, and tell the Hub what to do: users, limits, delays and faults.
"""

import base64
import hashlib
import json
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, parse_qsl, unquote, urlsplit

Answer = tuple[int, dict[str, str], bytes]

_DATE = "2026-01-01T00:00:00.000Z"
_FIRST_FILES = {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}


def _json(value: object, status: int = 200, **headers: str) -> Answer:
    return status, {"Content-Type": "application/json", **headers}, json.dumps(value).encode()


class _Refused(Exception):
    """An answer that is an error, in the body and the headers where the client looks for it."""

    def __init__(self, status: int, message: str, code: str = "", **more: str) -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.answer = _json({"error": message, **more}, status, **headers)


def _blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class LFS(bytes):
    """The content of a file that Git holds as a pointer."""


def _etag(data: bytes) -> str:
    return _sha256(data) if isinstance(data, LFS) else _blob(data)


def _entry(path: str, data: bytes | None) -> dict[str, Any]:
    """A file, or a folder if there is no data, as the tree lists it."""
    if data is None:
        return {"type": "directory", "path": path, "size": 0, "oid": _blob(path.encode())}
    entry = {"type": "file", "path": path, "size": len(data), "oid": _blob(data)}
    if not isinstance(data, LFS):
        return entry
    sha256 = _sha256(data)
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(data)}\n".encode()
    lfs = {"oid": sha256, "size": len(data), "pointerSize": len(pointer)}
    return entry | {"oid": _blob(pointer), "lfs": lfs}


@dataclass(frozen=True)
class User:
    """Who has a token. `role` is 'write', 'read', or 'fineGrained', which here writes too."""

    name: str
    orgs: tuple[str, ...] = ()
    role: str = "write"

    def belongs_to(self, repo: str) -> bool:
        return repo.split("/")[-2] in (self.name, *self.orgs)


@dataclass
class Fault:
    """What happens to the next `times` requests (-1: to all) of an endpoint.

    'drop' closes the connection without an answer, 'drop after' does so when the request has had its effect,
    'truncated' has it and sends half of the body, and 'delay' answers after Hub.delay seconds. An HTTP status
    ('401', '403', '429', '500', '503') and 'garbage' (200, but not JSON) have no effect. `said` is what the
    Hub says with the status, by default what the status is called.
    """

    kind: str
    endpoint: str
    times: int = 1
    said: str = ""


@dataclass
class Commit:
    """All the files of a commit, those in LFS as `LFS`."""

    title: str
    files: dict[str, bytes]
    parent: str = ""
    description: str = ""
    author: str = ""
    oid: str = field(init=False)

    def __post_init__(self) -> None:
        tree = {path: _etag(data) for path, data in sorted(self.files.items())}
        self.oid = hashlib.sha1(json.dumps([self.parent, tree, self.title]).encode()).hexdigest()

    def listing(self) -> dict[str, bytes | None]:
        """The files, and the folders as None."""
        folders = {str(folder): None for path in self.files for folder in PurePosixPath(path).parents}
        return {path: data for path, data in sorted((folders | self.files).items()) if path != "."}

    def after(self, changes: list[dict[str, Any]], stored: dict[str, LFS]) -> dict[str, bytes]:
        """The files after the changes of another commit."""
        files = dict(self.files)
        for change in changes:
            key, value, path = change["key"], change["value"], change["value"]["path"]
            if key == "file":
                files[path] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if value["oid"] not in stored:
                    raise _Refused(400, f"the LFS object of {path} is not stored")
                files[path] = stored[value["oid"]]
            elif key in ("deletedFile", "deletedFolder"):
                gone = [name for name in files if f"{name}/".startswith(path.rstrip("/") + "/")]
                if not gone:
                    raise _Refused(404, "A file with this name doesn't exist", "EntryNotFound")
                files = {name: data for name, data in files.items() if name not in gone}
            else:
                raise _Refused(400, f"unknown change {key}")
        return files


@dataclass
class Repository:
    """Branches of commits, oldest first; pull request N is the branch 'refs/pr/N'.

    `refusal` is (status, X-Error-Code) for everything of it, and `sentence` what is said then; `stored` is
    its LFS storage by sha256, `pulls` are its pull requests as the Hub lists them.
    """

    branches: dict[str, list[Commit]]
    private: bool = False
    refusal: tuple[int, str] | None = None
    sentence: str = "no"
    stored: dict[str, LFS] = field(default_factory=dict)
    pulls: list[dict[str, Any]] = field(default_factory=list)

    @property
    def files(self) -> dict[str, bytes]:
        return self.branches["main"][-1].files

    @property
    def commit(self) -> str:
        return self.branches["main"][-1].oid

    def history(self, revision: str) -> list[Commit]:
        """The commits up to a branch or a commit."""
        if revision in self.branches:
            return self.branches[revision]
        for commits in self.branches.values():
            for count, commit in enumerate(commits, 1):
                if commit.oid == revision:
                    return commits[:count]
        raise _Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")


@dataclass
class _Upload:
    """An LFS object that was announced; whoever knows its address may send it, as on the real Hub."""

    repository: Repository
    oid: str
    size: int
    parts: dict[int, bytes] = field(default_factory=dict)

    def finish(self, data: bytes) -> Answer:
        if len(data) != self.size:
            raise _Refused(422, f"{self.oid} was announced with another size")
        if _sha256(data) != self.oid:
            raise _Refused(400, f"{self.oid} is not the sha256 of what was sent")
        self.repository.stored[self.oid] = LFS(data)
        return _json({})


@dataclass
class Hub:
    """Repositories by path: 'org/name' for models, 'datasets/org/name' for datasets.

    `requests` and `endpoints` are what was asked, in order: 'METHOD path', and the short name of the route;
    `served` are the bytes of every file that went out. Without `ranges` a file is given whole or not at all.
    """

    repositories: dict[str, Repository] = field(default_factory=dict)
    users: dict[str, User] = field(default_factory=lambda: {"hf_secret": User("alice")})
    requests: list[str] = field(default_factory=list)
    endpoints: list[str] = field(default_factory=list)
    served: dict[str, int] = field(default_factory=dict)
    ranges: bool = True
    url: str = ""
    lfs_threshold: int = 10 << 20
    part_size: int | None = None  # larger LFS files are sent in parts of this size
    card_error: str | None = None  # why validate-yaml refuses every card
    fault: Fault | None = None
    delay: float = 1.0
    delay_put: float = 0.0  # seconds after every 64 KiB of an LFS upload
    uploads: list[_Upload] = field(default_factory=list)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def add(self, name: str, directory: Path) -> Repository:
        """A public repository of the files of a directory."""
        files = {}
        for path in filter(Path.is_file, directory.rglob("*")):
            file, data = path.relative_to(directory).as_posix(), path.read_bytes()
            files[file] = LFS(data) if self.is_lfs(file, len(data)) else data
        stored = {_sha256(data): data for data in files.values() if isinstance(data, LFS)}
        self.repositories[name] = Repository({"main": [Commit("initial commit", files)]}, stored=stored)
        return self.repositories[name]

    def is_lfs(self, path: str, size: int) -> bool:
        return size > 0 and (path.endswith(".safetensors") or size >= self.lfs_threshold)


_WORDS = {
    "{repo}": r"(?P<repo>(?:datasets/)?[^/]+/[^/]+)",
    "{revision}": r"(?P<revision>[^/]+)",
    "{path}": r"(?P<path>.+)",
    "{upload}": r"(?P<upload>\d+)",
    "{number}": r"(?P<number>\d+)",
}
_ROUTES: list[tuple[str, str, re.Pattern[str], Callable[..., Answer]]] = []


def _route(name: str, method: str, pattern: str) -> Callable:
    """Make a method of the handler answer an endpoint; the 'models/' of its path is left out."""
    for word, expression in _WORDS.items():
        pattern = pattern.replace(word, expression)

    def register(answer: Callable[..., Answer]) -> Callable[..., Answer]:
        _ROUTES.append((name, method, re.compile(pattern), answer))
        return answer

    return register


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: ThreadingHTTPServer
    hub: Hub
    user: User | None
    repo: str
    repository: Repository

    def log_message(self, *_: object) -> None:
        pass

    def serve(self) -> None:
        if self.server.socket.fileno() < 0:
            raise ConnectionAbortedError  # the Hub is gone, and the connection was left over
        url = urlsplit(self.path)
        self.query = dict(parse_qsl(url.query))
        name, route, words = self._find(re.sub("^api/models/", "api/", url.path.strip("/")))
        kind = ""
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {unquote(url.path).strip('/')}")
            self.hub.endpoints.append(name)
            fault = self.hub.fault
            if fault and fault.endpoint == name and fault.times:
                fault.times -= 1
                kind = fault.kind
        # always all of it: the next request comes on the same connection
        self.body = self._read(self.hub.delay_put if name in ("lfs put", "lfs part") else 0)
        if kind == "delay":
            time.sleep(self.hub.delay)
        answer = self._answer(kind, route, words) if kind != "drop" else None
        if answer is None or kind == "drop after":
            self.close_connection = True
            return
        status, headers, data = answer
        self.send_response(status)
        for header, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(header, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if kind == "truncated":
            data, self.close_connection = data[: len(data) // 2], True
        self.wfile.write(data)

    do_GET = do_HEAD = do_POST = do_PUT = serve

    def _find(self, path: str) -> tuple[str, Callable[..., Answer] | None, dict[str, str]]:
        for name, method, pattern, route in _ROUTES:
            if self.command == method and (match := pattern.fullmatch(path)):
                # unquoted only now: a quoted slash is part of a revision or a path
                return name, route, {word: unquote(text) for word, text in match.groupdict("").items()}
        return "unknown", None, {}

    def _read(self, delay: float) -> bytes:
        size, body = int(self.headers.get("Content-Length", 0)), bytearray()
        while len(body) < size:
            chunk = self.rfile.read(min(1 << 16, size - len(body)))
            if not chunk:
                raise ConnectionAbortedError
            body += chunk
            time.sleep(delay)
        if delay:
            # the kernel took in megabytes before the client was killed: that is an upload cut off, too
            with suppress(BlockingIOError):
                if not self.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
                    raise ConnectionAbortedError
        return bytes(body)

    def _answer(self, kind: str, route: Callable[..., Answer] | None, words: dict[str, str]) -> Answer:
        if kind == "garbage":
            return 200, {"Content-Type": "text/html"}, b"<html>not the Hub</html>"
        if kind.isdigit():
            headers = {"Retry-After": "0"} if kind == "429" else {}
            said = (self.hub.fault and self.hub.fault.said) or HTTPStatus(int(kind)).phrase
            return _json({"error": said}, int(kind), **headers)
        with self.hub.lock:
            try:
                if route is None:
                    raise _Refused(404, "Not Found")
                self._see(words.pop("repo", ""))
                return route(self, **words)
            except _Refused as refused:
                return refused.answer

    def _see(self, repo: str) -> None:
        """Who asks, and for which repository, if they may see it."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.users:
            raise _Refused(401, "Invalid credentials in Authorization header")
        self.user, self.repo = self.hub.users.get(token), repo
        if not repo:
            return
        found = self.hub.repositories.get(repo)
        if found is None or (found.private and not (self.user and self.user.belongs_to(repo))):
            raise _Refused(404, "Repository not found", "RepoNotFound")
        if found.refusal:
            raise _Refused(found.refusal[0], found.sentence, found.refusal[1])
        self.repository = found

    def _known(self) -> User:
        if self.user is None:
            raise _Refused(401, "Invalid username or password.")
        return self.user

    def _writer(self, repo: str, pull: bool = False) -> str:
        """Who writes, if they may; a pull request is open to whoever has a write token."""
        user = self._known()
        if user.role == "read" or not (pull or user.belongs_to(repo)):
            raise _Refused(403, f"You don't have the rights to write to {repo} with this token.")
        return user.name

    # -- accounts and repositories --

    @_route("whoami", "GET", "api/whoami-v2")
    def whoami(self) -> Answer:
        user = self._known()
        auth = {"type": "access_token", "accessToken": {"displayName": "x", "role": user.role}}
        orgs = [{"name": org} for org in user.orgs]
        return _json({"type": "user", "name": user.name, "orgs": orgs, "auth": auth})

    @_route("auth-check", "GET", "api/{repo}/auth-check(?P<write>/write)?")
    def auth_check(self, write: str) -> Answer:
        if write:
            self._writer(self.repo)
        return _json({})

    @_route("create", "POST", "api/repos/create")
    def create(self) -> Answer:
        order = json.loads(self.body)
        repo = f"{order['organization'] or self._known().name}/{order['name']}"
        author, url = self._writer(repo), f"{self.hub.url}/{repo}"
        if repo in self.hub.repositories:
            raise _Refused(409, "You already created this model repo", url=url)
        commit = Commit("initial commit", dict(_FIRST_FILES), author=author)
        private = bool(order.get("private")) or order.get("visibility") == "private"
        self.hub.repositories[repo] = Repository({"main": [commit]}, private)
        return _json({"url": url})

    @_route("validate-yaml", "POST", "api/validate-yaml")
    def validate_yaml(self) -> Answer:
        errors = [{"message": self.hub.card_error}] if self.hub.card_error else []
        return _json({"errors": errors, "warnings": []}, 400 if errors else 200)

    # -- reading --

    @_route("info", "GET", "api/{repo}(?:/revision/{revision})?")
    def info(self, revision: str) -> Answer:
        commit = self.repository.history(revision or "main")[-1]
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        known = {"id": self.repo, "modelId": self.repo, "private": self.repository.private, "tags": []}
        return _json(known | {"sha": commit.oid, "siblings": siblings})

    @_route("tree", "GET", "api/{repo}/tree/{revision}(?:/{path})?")
    def tree(self, revision: str, path: str) -> Answer:
        found = self.repository.history(revision)[-1].listing()
        if path and found.get(path, b"") is not None:
            raise _Refused(404, f"{path} does not exist on {revision}", "EntryNotFound")
        start, recursive = f"{path}/" if path else "", self.query.get("recursive") == "true"
        names = [name for name in found if name.startswith(start)]
        names = [name for name in names if recursive or "/" not in name.removeprefix(start)]
        return _json([_entry(name, found[name]) for name in names])

    @_route("paths-info", "POST", "api/{repo}/paths-info/{revision}")
    def paths_info(self, revision: str) -> Answer:
        found = self.repository.history(revision)[-1].listing()
        paths = parse_qs(self.body.decode())["paths"]
        return _json([_entry(path, found[path]) for path in paths if path in found])

    @_route("commits", "GET", "api/{repo}/commits/{revision}")
    def commits(self, revision: str) -> Answer:
        found = []
        for commit in reversed(self.repository.history(revision)):
            text = {"title": commit.title, "message": commit.description}
            found.append({"id": commit.oid, "authors": [{"user": commit.author}], "date": _DATE} | text)
        return _json(found)

    @_route("refs", "GET", "api/{repo}/refs")
    def refs(self) -> Answer:
        found: dict[str, list] = {"branches": [], "converts": [], "tags": [], "pullRequests": []}
        for name, commits in self.repository.branches.items():
            pull = name.startswith("refs/")
            ref = {"name": name, "ref": name if pull else f"refs/heads/{name}"}
            found["pullRequests" if pull else "branches"].append(ref | {"targetCommit": commits[-1].oid})
        return _json(found)

    @_route("resolve", "GET", "{repo}/resolve/{revision}/{path}")
    @_route("head", "HEAD", "{repo}/resolve/{revision}/{path}")
    def resolve(self, revision: str, path: str) -> Answer:
        commit = self.repository.history(revision)[-1]
        headers = {"X-Repo-Commit": commit.oid}
        if path not in commit.files:
            return _json({"error": "Entry not found"}, 404, **headers, **{"X-Error-Code": "EntryNotFound"})
        data = commit.files[path]
        headers |= {"ETag": f'"{_etag(data)}"', "Accept-Ranges": "bytes"}
        if isinstance(data, LFS):
            headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(data))}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None or not self.hub.ranges:
            self._count(path, data)
            return 200, headers, data
        first, last = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
        if first > last:
            return 416, headers | {"Content-Range": f"bytes */{len(data)}"}, b""
        part = data[first : last + 1]
        self._count(path, part)
        return 206, headers | {"Content-Range": f"bytes {first}-{last}/{len(data)}"}, part

    def _count(self, path: str, data: bytes) -> None:
        if self.command == "GET":
            name = f"{self.repo}/{path}"
            self.hub.served[name] = self.hub.served.get(name, 0) + len(data)

    # -- writing --

    @_route("preupload", "POST", "api/{repo}/preupload/{revision}")
    def preupload(self, revision: str) -> Answer:
        self._writer(self.repo, "create_pr" in self.query)
        known, files = self.repository.history(revision)[-1].files, []
        for file in json.loads(self.body)["files"]:
            path, mode = file["path"], "lfs" if self.hub.is_lfs(file["path"], file["size"]) else "regular"
            oid = _etag(known[path]) if path in known else None
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return _json({"files": files})

    @_route("lfs batch", "POST", r"{repo}\.git/info/lfs/objects/batch")
    def lfs_batch(self) -> Answer:
        order, step = json.loads(self.body), self.hub.part_size
        # for a pull request the client names no branch
        self._writer(self.repo, pull="ref" not in order)
        for found in order["objects"]:
            if found["oid"] in self.repository.stored:
                continue
            href, header = f"{self.hub.url}/lfs/{len(self.hub.uploads)}", {}
            self.hub.uploads.append(_Upload(self.repository, found["oid"], found["size"]))
            if step and found["size"] > step:
                parts = range(1, -(-found["size"] // step) + 1)
                header = {"chunk_size": str(step)} | {f"{part:05}": f"{href}/{part}" for part in parts}
            upload = {"href": href, "header": header}
            found["actions"] = {"upload": upload, "verify": {"href": f"{href}/verify"}}
        return _json({"transfer": "basic", "objects": order["objects"]})

    @_route("lfs put", "PUT", "lfs/{upload}")
    def lfs_put(self, upload: str) -> Answer:
        return self.hub.uploads[int(upload)].finish(self.body)

    @_route("lfs part", "PUT", "lfs/{upload}/{number}")
    def lfs_part(self, upload: str, number: str) -> Answer:
        self.hub.uploads[int(upload)].parts[int(number)] = self.body
        return _json({}, ETag=_sha256(self.body))

    @_route("lfs complete", "POST", "lfs/{upload}")
    def lfs_complete(self, upload: str) -> Answer:
        found, parts = self.hub.uploads[int(upload)], json.loads(self.body)["parts"]
        chunks = [found.parts.get(part["partNumber"], b"") for part in parts]
        if [_sha256(chunk) for chunk in chunks] != [part["etag"] for part in parts]:
            raise _Refused(400, f"the parts of {found.oid} are not those that were sent")
        return found.finish(b"".join(chunks))

    @_route("lfs verify", "POST", "lfs/{upload}/verify")
    def lfs_verify(self, upload: str) -> Answer:
        order, found = json.loads(self.body), self.hub.uploads[int(upload)]
        if len(found.repository.stored.get(order["oid"], b"")) != order["size"]:
            raise _Refused(422, f"{order['oid']} is not stored")
        return _json({})

    @_route("commit", "POST", "api/{repo}/commit/{revision}")
    def commit(self, revision: str) -> Answer:
        repository, pull, url = self.repository, "create_pr" in self.query, f"{self.hub.url}/{self.repo}"
        author, history = self._writer(self.repo, pull), repository.history(revision)
        header, *changes = [json.loads(line) for line in self.body.splitlines()]
        title, parent = header["value"]["summary"], header["value"].get("parentCommit")
        number = len(repository.pulls) + 1
        if pull:
            revision, history = f"refs/pr/{number}", repository.history(parent or revision)
        elif revision not in repository.branches:
            raise _Refused(400, f"{revision} is not a branch")
        elif parent not in (None, history[-1].oid):
            raise _Refused(412, "A commit has happened since. Please refresh and try again.")
        files = history[-1].after(changes, repository.stored)
        commit = Commit(title, files, history[-1].oid, header["value"]["description"], author)
        repository.branches[revision] = [*history, commit]
        answer = {"commitOid": commit.oid, "commitUrl": f"{url}/commit/{commit.oid}"}
        if pull:
            answer["pullRequestUrl"] = f"{url}/discussions/{number}"
            request = {"num": number, "title": title, "author": {"name": author}, "createdAt": _DATE}
            request |= {"repo": {"name": self.repo, "type": "model"}, "status": "open", "isPullRequest": True}
            repository.pulls.append(request)
        return _json(answer)

    @_route("branch", "POST", "api/{repo}/branch/{revision}")
    def branch(self, revision: str) -> Answer:
        self._writer(self.repo)
        if revision in self.repository.branches:
            raise _Refused(409, f"Reference already exists: {revision}")
        start = json.loads(self.body).get("startingPoint", "main")
        self.repository.branches[revision] = list(self.repository.history(start))
        return _json({})

    # -- pull requests --

    @_route("discussions", "GET", "api/{repo}/discussions")
    def discussions(self) -> Answer:
        found = self.repository.pulls[::-1]
        if author := self.query.get("author"):
            found = [pull for pull in found if pull["author"]["name"] == author]
        if self.query.get("type") == "discussion" or self.query.get("status") == "closed":
            found = []
        return _json({"discussions": found, "count": len(found), "start": 0})

    @_route("discussion", "GET", "api/{repo}/discussions/{number}")
    def discussion(self, number: str) -> Answer:
        if not 0 < int(number) <= len(self.repository.pulls):
            raise _Refused(404, "Discussion not found")
        pull = self.repository.pulls[int(number) - 1]
        commit = self.repository.branches[f"refs/pr/{number}"][-1]
        event = {"id": commit.oid, "type": "commit", "createdAt": _DATE, "author": pull["author"]}
        event["data"] = {"subject": commit.title, "oid": commit.oid}
        changes = {"base": "refs/heads/main"}
        return _json(pull | {"events": [event], "changes": changes, "filesWithConflicts": False, "diff": ""})


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        # a client that goes away is no error of ours
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


@contextmanager
def fake_hub() -> Iterator[Hub]:
    """A Hub that answers at `url` until the context is left."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with _Server(("127.0.0.1", 0), handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
