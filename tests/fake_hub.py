"""A Hub on the loopback interface, in memory: creating, committing to, listing and downloading model repositories.

Only what huggingface_hub 1.33 and 2.4 ask for when they upload a folder and transformers loads it again. Files go
through commits as base64 ("regular" upload mode); writing needs a token.
"""

import base64
import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit

NAME = r"(?P<repo>[^/]+/[^/]+)"
TIME = "2026-01-01T00:00:00.000Z"


class FakeHub:
    """
    Use as a context manager.

    Attributes:
        repos (`dict[str, dict]`): By name: `private`, and `branches`: name → file → content.
        requests (`list[tuple[str, str]]`): Method and path of everything asked for.
        messages, cards (`list[str]`): Commit messages, and the cards that were to be validated.
        user, token (`str`): Who writes.
    """

    user, token = "someone", "hf_fake"

    def __init__(self):
        self.repos, self.requests, self.messages, self.cards = {}, [], [], []

    def __enter__(self):
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes] | None:
        """Content by file name; a commit's hash is a revision too."""
        branches = self.repos.get(repo, {}).get("branches", {})
        if revision in branches:
            return branches[revision]
        return next((files for files in branches.values() if _commit(files) == revision), None)

    def create(self, body: dict) -> tuple[int, dict]:
        repo = f"{body.get('organization') or self.user}/{body['name']}"
        if repo in self.repos:
            return 409, {"error": "You already created this model repo", "url": f"{self.url}/{repo}"}
        private = body.get("private") or body.get("visibility") == "private"
        self.repos[repo] = {"private": bool(private), "branches": {"main": {".gitattributes": b""}}}
        return 200, {"url": f"{self.url}/{repo}", "name": repo, "id": "0" * 24}

    def branch(self, repo: str, name: str) -> tuple[int, dict]:
        branches = self.repos[repo]["branches"]
        if name in branches:
            return 409, {"error": "Reference already exists"}
        branches[name] = dict(branches["main"])
        return 200, {}

    def commit(self, repo: str, revision: str, lines: list[dict]) -> tuple[int, dict]:
        files = self.repos[repo]["branches"][revision]
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.messages.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            else:
                return 400, {"error": f"unknown operation {line['key']}"}
        oid = _commit(files)
        return 200, {"success": True, "commitOid": oid, "commitUrl": f"{self.url}/{repo}/commit/{oid}"}

    def info(self, repo: str, revision: str) -> dict:
        files = self.files(repo, revision)
        return {
            "_id": "0" * 24,
            "id": repo,
            "modelId": repo,
            "sha": _commit(files),
            "private": self.repos[repo]["private"],
            "siblings": [{"rfilename": name} for name in files],
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "createdAt": TIME,
            "lastModified": TIME,
        }

    def answer(self, method: str, path: str, body: bytes):
        """Status and JSON for the API; `None` where there is nothing."""
        if path == "/api/whoami-v2":
            access = {"displayName": "fake", "role": "write", "createdAt": TIME}
            return 200, {"type": "user", "name": self.user, "orgs": [], "auth": {"accessToken": access}}
        if path == "/api/validate-yaml":
            self.cards.append(json.loads(body)["content"])
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        match = re.fullmatch(rf"/api/models/{NAME}(?:/(?P<what>[a-z-]+)/(?P<revision>[^/]+)(?P<under>/.+)?)?", path)
        if match is None or match["repo"] not in self.repos:
            return None
        repo, what, revision = match["repo"], match["what"] or "revision", match["revision"] or "main"
        if what == "branch":
            return self.branch(repo, revision)
        if self.files(repo, revision) is None or match["under"]:  # no folder inside any of its repositories
            return None
        if what == "preupload":
            asked = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": name, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for name in asked]
            return 200, {"files": modes}
        if what == "commit":
            return self.commit(repo, revision, [json.loads(line) for line in body.splitlines()])
        if what in ("tree", "paths-info"):
            files = self.files(repo, revision).items()
            return 200, [{"type": "file", "path": n, "size": len(c), "oid": _digest(c)} for n, c in files]
        return (200, self.info(repo, revision)) if what == "revision" else None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *args):
        """Quiet."""

    def do_HEAD(self):
        self.respond()

    def do_GET(self):
        self.respond()

    def do_POST(self):
        self.respond()

    def respond(self):
        path, body = unquote(urlsplit(self.path).path), self.body()
        self.hub.requests.append((self.command, path))
        if self.command == "POST" and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self.send(401, {"error": "a token is needed"})
        match = re.fullmatch(rf"/{NAME}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", path)
        if match is not None:
            return self.resolve(match)
        answer = self.hub.answer(self.command, path, body)
        known = any(f"/{repo}/" in path for repo in self.hub.repos)
        missing = (404, {}, {"X-Error-Code": "EntryNotFound" if known else "RepoNotFound"})
        return self.send(*(answer or missing))

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def resolve(self, match):
        files = self.hub.files(match["repo"], match["revision"])
        if files is None or match["file"] not in files:
            return self.send(404, {}, {"X-Error-Code": "RepoNotFound" if files is None else "EntryNotFound"})
        content = files[match["file"]]
        self.send(200, content, {"X-Repo-Commit": _commit(files), "ETag": f'"{_digest(content)}"'})

    def send(self, status: int, content, headers: dict | None = None):
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def _commit(files: dict[str, bytes]) -> str:
    return _digest(json.dumps(sorted((name, _digest(content)) for name, content in files.items())).encode())
