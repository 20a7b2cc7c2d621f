"""A hub on 127.0.0.1 with the endpoints that huggingface_hub asks for the files of a model."""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants
import pytest

API = re.compile(r"/api/models/(?P<name>.+?)/(?P<what>revision|tree)/(?P<revision>[^/]+)")
FILE = re.compile(r"/(?P<name>.+?)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")


@dataclass
class Hub:
    """Models by name and commit, and what was asked for.

    Attributes:
        models: name -> revision -> files by path. A revision that is no commit has one made of it.
        refused: name -> HTTP status and X-Error-Code of every answer.
        token: what must be sent; None: anything.
        breaks: path -> bytes after which the connection is dropped, once.
        requests: (method, path without query, Range header or None) of each request.
    """

    url: str = ""
    models: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    refused: dict[str, tuple[int, str]] = field(default_factory=dict)
    token: str | None = None
    breaks: dict[str, int] = field(default_factory=dict)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)

    def add(self, name: str, folder: Path, revision: str = "main", **more: bytes) -> None:
        """A model with the files of a folder, and others."""
        paths = (path for path in folder.rglob("*") if path.is_file())
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
        self.models.setdefault(name, {})[revision] = files | more

    def downloaded(self) -> set[str]:
        """The paths of the files that were fetched."""
        return {m["path"] for method, path, _ in self.requests
                if method == "GET" and (m := FILE.fullmatch(path))}  # fmt: skip


def commit_of(revision: str) -> str:
    return revision if re.fullmatch("[0-9a-f]{40}", revision) else hashlib.sha1(
        revision.encode()).hexdigest()  # fmt: skip


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, self.headers.get("Range")))
        match = API.fullmatch(path) or FILE.fullmatch(path)
        assert match, path
        name = match["name"]
        if name in self.hub.refused:
            return self._refuse(*self.hub.refused[name])
        if self.hub.token and self.headers.get("authorization") != f"Bearer {self.hub.token}":
            return self._refuse(401, "RepoNotFound")
        if name not in self.hub.models:
            return self._refuse(404, "RepoNotFound")
        revisions = {commit_of(r): f for r, f in self.hub.models[name].items()}
        commit = commit_of(match["revision"])
        if commit not in revisions:
            return self._refuse(404, "RevisionNotFound")
        files = revisions[commit]
        if match.re is FILE:
            return self._file(files, match["path"], commit)
        if match["what"] == "revision":
            siblings = [{"rfilename": file} for file in files]
            return self._json({"id": name, "sha": commit, "siblings": siblings})
        return self._json([
            {"type": "file", "path": file, "size": len(content), "oid": _etag(content)}
            for file, content in files.items()
        ])  # fmt: skip

    def _json(self, value: object) -> None:
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _file(self, files: dict[str, bytes], path: str, commit: str) -> None:
        if path not in files:
            return self._refuse(404, "EntryNotFound")
        content = files[path]
        given = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        start = int(given[1]) if given else 0
        self.send_response(206 if given else 200)
        self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{_etag(content)}"')
        self.send_header("Content-Length", str(len(content) - start))
        if given:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        end = self.hub.breaks.pop(path, len(content))
        self.wfile.write(content[start:end])
        self.close_connection = end < len(content)


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@contextmanager
def running_hub(cache: Path) -> Iterator[Hub]:
    """A hub that huggingface_hub asks, with a cache of its own and no token."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with (
        ThreadingHTTPServer(("127.0.0.1", 0), handler) as server,
        pytest.MonkeyPatch.context() as m,
    ):
        hub.url = f"http://127.0.0.1:{server.server_port}"
        constants = huggingface_hub.constants
        m.setattr(constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        m.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        m.setattr(constants, "HF_HUB_CACHE", str(cache))
        m.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
        m.setattr(constants, "HF_HUB_OFFLINE", False)
        m.setattr(constants, "HF_HUB_DISABLE_XET", True)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "NANOVLLM_DOWNLOAD"):
            m.delenv(name, raising=False)
        thread = Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield hub
        server.shutdown()
        thread.join()
