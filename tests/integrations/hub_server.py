"""A stand-in for the Hub: its HTTP API on 127.0.0.1, with repositories in memory.

It answers what huggingface_hub asks when it creates a repository, commits to it (small files inside
the commit, weights through Git LFS) and downloads from it.
"""

from __future__ import annotations

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
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_of_the_owner"
LFS_SUFFIXES = (".safetensors", ".bin")


@dataclass
class Repository:
    """Files of every commit, and where branches point."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        parent = self.branches.get(branch) or self.branches.get("main", "")
        content = self.commits.get(parent, {}) | files
        oid = hashlib.sha1(f"{len(self.commits)}{sorted(content)}".encode()).hexdigest()
        self.commits[oid], self.branches[branch] = content, oid
        self.messages.append(message)
        return oid

    def files(self, branch: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches[branch]]


@dataclass
class Hub:
    """What the server holds and what it was asked."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)


class Refused(Exception):
    """An answer that is not a success."""

    def __init__(self, status: int, code: str) -> None:
        super().__init__(code)
        self.status, self.code = status, code


class Handler(BaseHTTPRequestHandler):
    """One request; ``hub`` is set on a subclass per server."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_args: Any) -> None:
        """Stay silent."""

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        url = urlsplit(self.path)
        path, query = unquote(url.path), parse_qs(url.query)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append((self.command, path))
        try:
            for method, pattern, handle in ROUTES:
                found = re.fullmatch(pattern, path)
                if found and method == self.command.replace("HEAD", "GET"):
                    return handle(self, body=body, query=query, **found.groupdict())
            raise Refused(404, "UnknownRoute")
        except Refused as refused:
            self._send(refused.status, b"", {"X-Error-Code": refused.code})

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, content: Any, status: int = 200) -> None:
        self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _is_owner(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _repository(self, repo: str, *, write: bool = False) -> Repository:
        if write and not self._is_owner():
            raise Refused(401, "Unauthorized")
        found = self.hub.repositories.get(repo)
        if found is None or (found.private and not self._is_owner()):
            raise Refused(401 if not self._is_owner() else 404, "RepoNotFound")
        return found

    def create(self, body: bytes, **_: Any) -> None:
        if not self._is_owner():
            raise Refused(401, "Unauthorized")
        asked = json.loads(body)
        repo = f"{asked.get('organization') or 'owner'}/{asked['name']}"
        answer = {"url": f"{self.hub.url}/{repo}"}
        if repo in self.hub.repositories:
            return self._json(answer, 409)
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.repositories[repo] = Repository(private)
        self.hub.repositories[repo].commit("main", {".gitattributes": b""}, "initial commit")
        return self._json(answer)

    def validate(self, body: bytes, **_: Any) -> None:
        import yaml

        content = json.loads(body)["content"]
        head = yaml.safe_load(content.split("---")[1]) if content.startswith("---") else None
        wrong = head is not None and not isinstance(head, dict)
        self._json(
            {"errors": [{"message": "not a mapping"}] if wrong else []}, 400 if wrong else 200
        )

    def preupload(self, repo: str, body: bytes, **_: Any) -> None:
        self._repository(repo, write=True)
        paths = [file["path"] for file in json.loads(body)["files"]]
        modes = ["lfs" if path.endswith(LFS_SUFFIXES) else "regular" for path in paths]
        self._json(
            {
                "files": [
                    {"path": path, "uploadMode": mode, "shouldIgnore": False}
                    for path, mode in zip(paths, modes, strict=True)
                ]
            }
        )

    def lfs_batch(self, repo: str, body: bytes, **_: Any) -> None:
        self._repository(repo, write=True)
        objects = [
            {
                "oid": asked["oid"],
                "size": asked["size"],
                "actions": {"upload": {"href": f"{self.hub.url}/lfs/{asked['oid']}"}},
            }
            for asked in json.loads(body)["objects"]
        ]
        self._json({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str, body: bytes, **_: Any) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refused(400, "WrongContent")
        self.hub.blobs[oid] = body
        self._send(200, b"")

    def commit(self, repo: str, revision: str, body: bytes, query: Any) -> None:
        repository = self._repository(repo, write=True)
        files, message = {}, ""
        for line in body.splitlines():
            key, value = (entry := json.loads(line))["key"], entry["value"]
            if key == "header":
                message = value["summary"]
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                files[value["path"]] = self.hub.blobs[value["oid"]]
        branch = "refs/pr/1" if "create_pr" in query else revision
        oid = repository.commit(branch, files, message)
        answer = {"commitUrl": f"{self.hub.url}/{repo}/commit/{oid}", "commitOid": oid}
        if "create_pr" in query:
            answer["pullRequestUrl"] = f"{self.hub.url}/{repo}/discussions/1"
        self._json(answer)

    def info(self, repo: str, **_: Any) -> None:
        repository = self._repository(repo)
        oid = repository.branches["main"]
        siblings = [{"rfilename": name} for name in repository.commits[oid]]
        self._json({"id": repo, "sha": oid, "siblings": siblings, "private": repository.private})

    def tree(self, repo: str, revision: str, **_: Any) -> None:
        """List no file: what transformers lists are extra templates, of which there are none."""
        self._repository(repo)
        raise Refused(404, "EntryNotFound")

    def resolve(self, repo: str, revision: str, name: str, **_: Any) -> None:
        repository = self._repository(repo)
        oid = repository.branches.get(revision, revision)
        if oid not in repository.commits:
            raise Refused(404, "RevisionNotFound")
        content = repository.commits[oid].get(name)
        if content is None:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": oid})
        etag = hashlib.sha256(content).hexdigest()
        return self._send(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": oid})


_REPO = "(?P<repo>[^/]+/[^/]+)"
ROUTES: list[tuple[str, str, Any]] = [
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate),
    ("POST", f"/api/models/{_REPO}/preupload/(?P<revision>.+)", Handler.preupload),
    ("POST", f"/api/models/{_REPO}/commit/(?P<revision>.+)", Handler.commit),
    ("POST", f"/{_REPO}.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]+)", Handler.lfs_put),
    ("GET", f"/api/models/{_REPO}/tree/(?P<revision>[^/]+).*", Handler.tree),
    ("GET", f"/api/models/{_REPO}(/revision/.+)?", Handler.info),
    ("GET", f"/{_REPO}/resolve/(?P<revision>refs/pr/[0-9]+|[^/]+)/(?P<name>.+)", Handler.resolve),
]


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Serve an empty Hub until the block ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
