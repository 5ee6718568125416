"""A hub on this machine: as much of its HTTP interface as uploads and downloads of files use, over files in memory."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

COMMIT = "0" * 39 + "1"
TOKEN = "hf_aVerySecretTokenOfATest"


@dataclass
class FakeRepository:
    """Files by path, and who sees them."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)


@dataclass
class FakeHub:
    """What a hub knows, and what it was asked."""

    endpoint: str = ""
    repositories: dict[str, FakeRepository] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)  # by SHA-256
    requests: list[str] = field(default_factory=list)
    readers: set[str] = field(default_factory=set)  # tokens that may only read
    failures: int = 0  # of commits that come next
    slowness: threading.Event = field(default_factory=threading.Event)  # commits wait until it is set

    def __post_init__(self) -> None:
        self.slowness.set()


@contextmanager
def running_hub() -> Iterator[FakeHub]:
    """A hub that listens on a port of this machine."""
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub

    def do_GET(self) -> None:
        self._route({
            r"/api/models/(?P<repo>[^/]+/[^/]+)/auth-check/write": self._auth_check,
            r"/api/models/(?P<repo>[^/]+/[^/]+)(/revision/\w+)?": self._info,
            r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/\w+/?(?P<path>.*)": self._tree,
            r"/(?P<repo>[^/]+/[^/]+)/resolve/\w+/(?P<path>.*)": self._file,
        })  # fmt: skip

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self._route({
            r"/api/repos/create": self._create,
            r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/main": self._modes,
            r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/main": self._commit,
            r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch": self._batch,
        })  # fmt: skip

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.hub.large[hashlib.sha256(content).hexdigest()] = content
        self._answer(200, {})

    def _route(self, routes: dict[str, Any]) -> None:
        path = unquote(self.path.partition("?")[0])
        self.hub.requests.append(f"{self.command} {path}")
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length)
        for pattern, answer in routes.items():
            match = re.fullmatch(pattern, path)
            if match and (repo := match.groupdict().get("repo")) is not None and repo not in self.hub.repositories:
                return self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            if match:
                return answer(**match.groupdict())
        return self._answer(404, {"error": f"no such page: {path}"})

    def _auth_check(self, repo: str) -> None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token in self.hub.readers:
            self._answer(403, {"error": f"the token {token} may only read"})
        else:
            self._answer(200, {})

    def _info(self, repo: str) -> None:
        repository = self.hub.repositories[repo]
        siblings = [{"rfilename": name} for name in repository.files]
        self._answer(200, {"id": repo, "private": repository.private, "sha": COMMIT, "siblings": siblings})

    def _tree(self, repo: str, path: str) -> None:
        files = self.hub.repositories[repo].files
        below = {name: content for name, content in files.items() if not path or name.startswith(f"{path}/")}
        if path and not below:
            return self._answer(404, {"error": "no such folder"}, {"X-Error-Code": "EntryNotFound"})
        entries = [{"type": "file", "path": name, "size": len(content), "oid": _oid(content)} for name, content in below.items()]
        return self._answer(200, entries)

    def _file(self, repo: str, path: str) -> None:
        content = self.hub.repositories[repo].files.get(path)
        if content is None:
            return self._answer(404, {"error": "no such file"}, {"X-Error-Code": "EntryNotFound"})
        return self._send(200, content, {"ETag": f'"{_oid(content)}"', "X-Repo-Commit": COMMIT})

    def _create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        self.hub.repositories[name] = FakeRepository(private=asked.get("visibility") == "private")
        self._answer(200, {"url": f"{self.hub.endpoint}/{name}"})

    def _modes(self, repo: str) -> None:
        files = [file["path"] for file in json.loads(self.body)["files"]]
        modes = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in files}
        self._answer(200, {"files": [{"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in modes.items()]})

    def _batch(self, repo: str) -> None:
        objects = json.loads(self.body)["objects"]
        actions = {"upload": {"href": f"{self.hub.endpoint}/large?signature=secret"}}
        self._answer(200, {"objects": [{**entry, "actions": actions} for entry in objects]})

    def _commit(self, repo: str) -> None:
        assert self.hub.slowness.wait(30)
        if self.hub.failures:
            self.hub.failures -= 1
            return self._answer(400, {"error": f"the hub has a bad day ({self.headers['Authorization']})"})
        files = self.hub.repositories[repo].files
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        return self._answer(200, {"commitUrl": f"{self.hub.endpoint}/{repo}/commit/{COMMIT}", "commitOid": COMMIT})

    def _answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: tests ask `requests`."""


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
