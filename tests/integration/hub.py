"""A small Hugging Face hub on loopback, for HF_ENDPOINT: repos, metadata, downloads with ranges.

It speaks as much of the protocol as huggingface_hub uses, keeps what it was asked, and can be told
to break off, to wait, to refuse, and to send something else than it promised.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

_INFO = re.compile(r"/api/models/([^/]+/[^/]+)(/revision/[^/]+)?")
_FILE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
_CHUNK = 64 * 1024


@dataclass(frozen=True, slots=True)
class Asked:
    """One request: method, path, and where a download was to begin (0: at the beginning)."""

    method: str
    path: str
    start: int = 0
    token: str = ""


@dataclass
class Hub:
    """What it holds and how it behaves; changed by tests while it runs."""

    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    status: int = 0  # answered to everything
    garbage: bytes = b""  # answered to everything, with status 200
    cut_after: int | None = None  # a download ends after so many bytes
    hold_after: int | None = None  # a download stands still after so many bytes, until `released`
    corrupt: bool = False  # other bytes than promised, of the same size
    size_promised: int | None = None  # in place of the true one
    asked: list[Asked] = field(default_factory=list)
    url: str = ""
    held: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)

    def add(self, repo: str, files: Mapping[str, bytes]) -> None:
        """Put files into a repo, which makes a new commit of it."""
        self.repos.setdefault(repo, {}).update(files)

    def commit(self, repo: str) -> str:
        """The commit of `main`."""
        return hashlib.sha1(repr(sorted(self.repos[repo].items())).encode()).hexdigest()  # noqa: S324

    def downloads(self, name: str) -> list[int]:
        """Where each download of a file began, in order."""
        return [
            one.start for one in self.asked if one.method == "GET" and one.path.endswith(f"/{name}")
        ]

    def environment(self) -> dict[str, str]:
        """With which huggingface_hub comes here, and nowhere else."""
        return {
            "HF_ENDPOINT": self.url, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }  # fmt: skip


@contextlib.contextmanager
def serving() -> Iterator[Hub]:
    """A hub for as long as it is entered."""
    hub = Hub()

    class Handler(_Handler):
        served = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        hub.released.set()
        server.shutdown()
        server.server_close()
        thread.join(10)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    served: Hub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._answer()

    def log_message(self, *_: object) -> None:
        """Nothing is printed."""

    def _answer(self) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        begin = re.fullmatch(r"bytes=(\d+)-.*", self.headers.get("Range", ""))
        start = int(begin[1]) if begin else 0
        token = self.headers.get("Authorization", "")
        self.served.asked.append(Asked(self.command, path, start, token))
        info, file = _INFO.fullmatch(path), _FILE.fullmatch(path)
        found = (info or file or [None, ""])[1]
        if self.served.status:
            self._refuse(self.served.status, "")
        elif self.served.garbage:
            self._send(self.served.garbage)
        elif found not in self.served.repos:
            self._refuse(404, "RepoNotFound")
        elif info:
            self._send_json(self._info(found))
        elif found in self.served.gated:
            self._refuse(403, "GatedRepo")
        elif file and file[3] in self.served.repos[found]:
            self._send_file(found, self.served.repos[found][file[3]], start)
        else:
            self._refuse(404, "EntryNotFound")

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send_json(self, value: object) -> None:
        self._send(json.dumps(value).encode())

    def _send(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _info(self, repo: str) -> dict[str, object]:
        siblings = [
            {
                "rfilename": name, "size": self._size(content),
                "lfs": {
                    "sha256": hashlib.sha256(content).hexdigest(), "size": self._size(content),
                    "pointerSize": 130,
                },
            }
            for name, content in self.served.repos[repo].items()
        ]  # fmt: skip
        return {
            "_id": "1", "id": repo, "modelId": repo, "sha": self.served.commit(repo),
            "private": False, "tags": [], "downloads": 0, "siblings": siblings,
        }  # fmt: skip

    def _size(self, content: bytes) -> int:
        promised = self.served.size_promised
        return len(content) if promised is None else promised

    def _send_file(self, repo: str, content: bytes, start: int) -> None:
        rest = content[start:]
        self.send_response(206 if start else 200)
        digest = hashlib.sha256(content).hexdigest()
        self.send_header("X-Repo-Commit", self.served.commit(repo))
        self.send_header("X-Linked-Etag", f'"{digest}"')
        self.send_header("X-Linked-Size", str(len(content)))
        self.send_header("ETag", f'"{digest}"')
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(rest)))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "GET":
            self._send_content(bytes(reversed(rest)) if self.served.corrupt else rest)

    def _send_content(self, content: bytes) -> None:
        hub, sent = self.served, 0
        stop = hub.cut_after if hub.cut_after is not None else hub.hold_after
        while sent < len(content):
            if stop is not None and sent >= stop:
                if hub.cut_after is not None:
                    self.close_connection = True
                    return
                self.wfile.flush()
                hub.held.set()
                hub.released.wait(60)
                stop = None
            end = sent + _CHUNK if stop is None else min(sent + _CHUNK, stop)
            self.wfile.write(content[sent:end])
            sent = end
