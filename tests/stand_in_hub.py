"""A server on this machine that speaks the part of a hub's API that pushing and loading a model needs."""

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

WRITER, READER = "hf_writer", "hf_reader"
"""Tokens: of somebody who may write to `org`, and of somebody who may not."""


@dataclass
class Repository:
    private: bool = False
    commits: list[dict[str, bytes]] = field(default_factory=list)
    """What each commit wrote, the first one first."""

    @property
    def files(self) -> dict[str, bytes]:
        return {name: content for commit in self.commits for name, content in commit.items()}

    @property
    def sha(self) -> str:
        return hashlib.sha1(str(len(self.commits)).encode()).hexdigest()


class Hub:
    """The state of the hub; `address` is its HF_ENDPOINT."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.files: dict[str, bytes] = {}
        """Files that are published at an address of their own, `/files/NAME`."""
        self.breaks_off: int | None = None
        """Bytes of such a file after which the connection ends, once."""
        self.refuses: dict[str, int] = {}
        """Statuses with which requests are answered whose path has this in it."""
        self.requests: list[str] = []
        self.address = ""

    @contextmanager
    def running(self) -> Iterator[Hub]:
        hub = self

        class Handler(_Handler):
            state = hub

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            thread.join()
            server.server_close()


class _Handler(BaseHTTPRequestHandler):
    state: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name is http.server's
        pass

    def answer(self, status: int, content: Any = b"", **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle_one(self) -> None:
        length = self.headers.get("Content-Length")
        body = self.rfile.read(int(length)) if length is not None else self._chunks()
        path = self.path.split("?")[0]
        self.state.requests.append(f"{self.command} {path}")
        for part, status in self.state.refuses.items():
            if part in path:
                return self.answer(status, {"error": f"refused with {status}"})
        for pattern, method in ROUTES.items():
            found = re.fullmatch(pattern, f"{self.command} {path}")
            if found:
                return method(self, body, *found.groups())
        return self.answer(404, {"error": f"no such page: {path}"})

    do_GET = do_HEAD = do_POST = do_PUT = handle_one  # noqa: N815 - the names are http.server's

    def _chunks(self) -> bytes:
        """A body that is sent in pieces."""
        parts = []
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
        return b"".join(parts)

    @property
    def token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        if self.token not in (WRITER, READER):
            return self.answer(401, {"error": "Invalid username or password."})
        if self.token == READER or asked["organization"] != "org":
            return self.answer(403, {"error": "You don't have the rights to create a model under it"})
        url = {"url": f"{self.state.address}/{name}"}
        if name in self.state.repositories:
            return self.answer(409, {"error": "You already created this model repo", **url})
        self.state.repositories[name] = Repository(private=asked.get("visibility") == "private")
        return self.answer(200, url)

    def info(self, body: bytes, name: str) -> None:
        repository = self.state.repositories.get(name)
        if repository is None or (repository.private and self.token != WRITER):
            return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        siblings = [{"rfilename": each} for each in sorted(repository.files)]
        return self.answer(
            200,
            {
                "id": name,
                "sha": repository.sha,
                "private": repository.private,
                "siblings": siblings,
                "tags": [],
            },
        )

    def tree(self, body: bytes, name: str) -> None:
        files = self.state.repositories[name].files
        self.answer(
            200,
            [
                {"type": "file", "path": each, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for each, content in sorted(files.items())
            ],
        )

    def check_card(self, body: bytes) -> None:
        front = json.loads(body)["content"].startswith("---\n")
        self.answer(200 if front else 400, {"errors": [] if front else [{"message": "no front matter"}]})

    def preupload(self, body: bytes, name: str) -> None:
        files = [
            {
                "path": each["path"],
                "uploadMode": "lfs" if each["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for each in json.loads(body)["files"]
        ]
        self.answer(200, {"files": files})

    def batch(self, body: bytes, name: str) -> None:
        objects = [
            {**each, "actions": {"upload": {"href": f"{self.state.address}/blobs/{each['oid']}"}}}
            for each in json.loads(body)["objects"]
        ]
        self.answer(200, {"transfer": "basic", "objects": objects})

    def upload(self, body: bytes, oid: str) -> None:
        self.state.blobs[oid] = body
        self.answer(200 if hashlib.sha256(body).hexdigest() == oid else 400)

    def commit(self, body: bytes, name: str) -> None:
        if self.token != WRITER:
            return self.answer(403, {"error": "read only"})
        lines = [json.loads(line) for line in body.splitlines()]
        files = {
            each["value"]["path"]: base64.b64decode(each["value"]["content"])
            if each["key"] == "file"
            else self.state.blobs[each["value"]["oid"]]
            for each in lines
            if each["key"] in ("file", "lfsFile")
        }
        repository = self.state.repositories[name]
        repository.commits.append(files)
        url = f"{self.state.address}/{name}/commit/{repository.sha}"
        return self.answer(200, {"commitOid": repository.sha, "commitUrl": url, "hookOutput": ""})

    def resolve(self, body: bytes, name: str, path: str) -> None:
        repository = self.state.repositories[name]
        content = repository.files.get(path)
        if content is None:
            return self.answer(404, {"error": "no such file"}, X_Error_Code="EntryNotFound")
        etag = hashlib.sha256(content).hexdigest()
        return self.answer(200, content, ETag=f'"{etag}"', X_Repo_Commit=repository.sha)

    def file(self, body: bytes, name: str) -> None:
        """A file at an address, from where a `Range` begins."""
        content = self.state.files[name]
        begin = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        if begin >= len(content):
            return self.answer(416)
        if self.state.breaks_off is not None:
            self.send_response(206 if begin else 200)
            self.send_header("Content-Length", str(len(content) - begin))
            self.end_headers()
            self.wfile.write(content[begin : begin + self.state.breaks_off])
            self.state.breaks_off = None
            self.close_connection = True
            return None
        return self.answer(206 if begin else 200, content[begin:])


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES = {
    r"POST /api/repos/create": _Handler.create,
    r"POST /api/validate-yaml": _Handler.check_card,
    rf"POST /api/models/{NAME}/preupload/main": _Handler.preupload,
    rf"POST /{NAME}\.git/info/lfs/objects/batch": _Handler.batch,
    r"PUT /blobs/(\w+)": _Handler.upload,
    rf"POST /api/models/{NAME}/commit/main": _Handler.commit,
    rf"GET /api/models/{NAME}(?:/revision/\w+)?": _Handler.info,
    rf"GET /api/models/{NAME}/tree/\w+": _Handler.tree,
    r"GET /files/(.+)": _Handler.file,
    rf"(?:GET|HEAD) /{NAME}/resolve/\w+/(.+)": _Handler.resolve,
}
