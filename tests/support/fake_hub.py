"""A Hugging Face hub on this machine: repositories in memory, as much of the API as is used."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_a_test"


class Repository:
    """Commits of one repository: for each the files."""

    def __init__(self, private: bool) -> None:
        self.private = private
        self.commits: dict[str, dict[str, bytes]] = {}
        self.branches: dict[str, str] = {}
        self.commit("main", {})

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        before = self.commits.get(self.branches.get(branch, ""), {})
        content = {**before, **files}
        digest = hashlib.sha1(repr((len(self.commits), sorted(content))).encode()).hexdigest()
        self.commits[digest] = content
        self.branches[branch] = digest
        return digest

    def find(self, revision: str) -> str | None:
        found = self.branches.get(revision, revision)
        return found if found in self.commits else None


class Hub(ThreadingHTTPServer):
    """The server; `repositories` and `requests` are what tests look at."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.answer()

    def do_HEAD(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.server.requests.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = path.split("/")
        if parts[:2] == ["api", "validate-yaml"]:
            self.send_json({"errors": [], "warnings": []})
        elif parts[:3] == ["api", "repos", "create"]:
            self.create(json.loads(body))
        elif parts[:2] == ["api", "models"]:
            self.api("/".join(parts[2:4]), parts[4:], body)
        elif len(parts) > 4 and parts[2] == "resolve":
            self.resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self.fail(404, "EntryNotFound")

    def create(self, asked: dict[str, Any]) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.fail(401, "Unauthorized")
            return
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        url = f"{self.server.address}/{name}"
        if name in self.server.repositories:
            self.send_json({"url": url}, 409)
            return
        self.server.repositories[name] = Repository(
            bool(asked.get("private")) or asked.get("visibility") == "private"
        )
        self.send_json({"url": url, "id": name})

    def api(self, name: str, rest: list[str], body: bytes) -> None:
        found = self.server.repositories.get(name)
        if found is None:
            self.fail(401, "RepoNotFound")
            return
        kind, revision = (rest[0], "/".join(rest[1:])) if rest else ("revision", "main")
        if kind == "preupload":
            files = json.loads(body)["files"]
            answer = [
                {"path": x["path"], "uploadMode": "regular", "shouldIgnore": False} for x in files
            ]
            self.send_json({"files": answer})
        elif kind == "branch":
            if revision in found.branches:
                self.send_json({}, 409)
                return
            found.branches[revision] = found.branches["main"]
            self.send_json({})
        elif kind == "commit":
            self.commit(name, found, revision, body)
        elif (commit := found.find(revision)) is None:
            self.fail(404, "RevisionNotFound")
        elif kind == "tree":
            rows = [
                {"type": "file", "path": path, "size": len(content), "oid": oid(content)}
                for path, content in found.commits[commit].items()
            ]
            self.send_json(rows)
        else:
            siblings = [{"rfilename": path} for path in found.commits[commit]]
            self.send_json({"id": name, "sha": commit, "siblings": siblings, "private": False})

    def commit(self, name: str, found: Repository, branch: str, body: bytes) -> None:
        lines = [json.loads(line) for line in body.splitlines() if line.strip()]
        files = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"])
            for line in lines
            if line["key"] == "file"
        }
        commit = found.commit(branch, files)
        url = f"{self.server.address}/{name}/commit/{commit}"
        self.send_json({"success": True, "commitUrl": url, "commitOid": commit})

    def resolve(self, name: str, revision: str, path: str) -> None:
        found = self.server.repositories.get(name)
        commit = found.find(revision) if found else None
        if found is None or commit is None:
            self.fail(*((404, "RevisionNotFound") if found else (401, "RepoNotFound")))
            return
        content = found.commits[commit].get(path)
        if content is None:
            self.fail(404, "EntryNotFound", commit)
            return
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{oid(content)}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[start:])

    def send_json(self, value: Any, status: int = 200) -> None:
        text = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    def fail(self, status: int, code: str, commit: str | None = None) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", f"{code} of the fake hub")
        if commit is not None:
            self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", "0")
        self.end_headers()


def oid(content: bytes) -> str:
    """Return git's name of a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Run a hub in a thread while the block runs."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
