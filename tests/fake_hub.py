"""A small Hugging Face Hub on 127.0.0.1: just what the real client asks for to download a repository."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass
class Repository:
    """One commit of files, on the branch main; `refusal` is (status, X-Error-Code) for everything of it."""

    files: dict[str, bytes]
    refusal: tuple[int, str] | None = None

    @property
    def commit(self) -> str:
        digest = hashlib.sha1()
        for name, data in sorted(self.files.items()):
            digest.update(f"{name}\0{len(data)}\0".encode() + data)
        return digest.hexdigest()


@dataclass
class Hub:
    """Repositories by path: 'org/name' for models, 'datasets/org/name' for datasets."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    url: str = ""

    def add(self, name: str, directory: Path) -> Repository:
        """A repository of the files of a directory."""
        files = {
            path.relative_to(directory).as_posix(): path.read_bytes()
            for path in directory.rglob("*")
            if path.is_file()
        }
        self.repositories[name] = Repository(files)
        return self.repositories[name]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, body: bool) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.hub.requests.append(f"{self.command} {path}")
        status, headers, data = self._route(path)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def _route(self, path: str) -> tuple[int, dict[str, str], bytes]:
        api = path.startswith("api/")
        parts = path.removeprefix("api/").removeprefix("models/").split("/")
        length = 3 if parts[0] == "datasets" else 2
        name, rest = "/".join(parts[:length]), parts[length:]
        repository = self.hub.repositories.get(name)
        if repository is None:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        if repository.refusal:
            status, code = repository.refusal
            return status, {"X-Error-Code": code}, b'{"error": "no"}'
        revision = rest[1] if len(rest) > 1 else "main"
        if revision not in ("main", repository.commit):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        if not api and rest[:1] == ["resolve"]:
            return self._file(repository, "/".join(rest[2:]))
        if rest[:1] == ["tree"]:
            return self._json([self._entry(repository, file) for file in sorted(repository.files)])
        return self._json(
            {
                "id": name,
                "modelId": name,
                "sha": repository.commit,
                "private": False,
                "tags": [],
                "siblings": [{"rfilename": file} for file in sorted(repository.files)],
            }
        )

    def _file(self, repository: Repository, file: str) -> tuple[int, dict[str, str], bytes]:
        headers = {"X-Repo-Commit": repository.commit}
        if file not in repository.files:
            return 404, {**headers, "X-Error-Code": "EntryNotFound"}, b""
        data = repository.files[file]
        return 200, {**headers, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}, data

    def _entry(self, repository: Repository, file: str) -> dict[str, object]:
        data = repository.files[file]
        return {"type": "file", "path": file, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}

    def _json(self, value: object) -> tuple[int, dict[str, str], bytes]:
        return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


@contextmanager
def fake_hub() -> Iterator[Hub]:
    """A Hub that answers at `url` until the context is left."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield hub
        server.shutdown()
        thread.join()
