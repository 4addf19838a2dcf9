"""A Hub on this machine, which the real client of the Hub talks to."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants

from pixel_level_contrastive_learning.backbones.hub import hub_config

COMMIT = "a" * 40
"""The one revision of every repository."""
PUBLIC = "public"
"""A file of this name makes a repository a public one that was there before."""


class Handler(BaseHTTPRequestHandler):
    """Answers for repositories that are folders ``OWNER/NAME``."""

    root: Path

    def do_HEAD(self) -> None:
        owner, name, *rest = self.path.partition("?")[0].removeprefix("/api/models").split("/")[1:]
        repo = self.root / owner / name
        if not repo.is_dir():
            return self.answer(401, b"", "RepoNotFound")
        if rest[1] not in ("main", COMMIT):
            return self.answer(404, b"", "RevisionNotFound")
        if rest[0] == "tree":
            files = [path for path in sorted(repo.rglob("*")) if path.is_file()]
            listed = [{"type": "file", "path": str(f.relative_to(repo))} for f in files]
            stats = [{"size": f.stat().st_size, "oid": COMMIT} for f in files]
            entries = [one | two for one, two in zip(listed, stats, strict=True)]
            return self.answer(200, json.dumps(entries).encode())
        file = repo.joinpath(*rest[2:])
        if not file.is_file():
            return self.answer(404, b"", "EntryNotFound")
        return self.answer(200, file.read_bytes())

    do_GET = do_HEAD  # noqa: N815

    def answer(self, status: int, body: bytes, error: str = "") -> None:
        self.send_response(status)
        headers = {"Content-Length": len(body), "X-Repo-Commit": COMMIT}
        headers |= {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Error-Code": error}
        for name, value in headers.items():
            if value:
                self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class WritingApi(huggingface_hub.HfApi):
    """Writes what is pushed into a folder, as the Hub lays it out."""

    root: Path
    private: bool | None = None

    def model_info(self, repo_id: str) -> SimpleNamespace:
        return SimpleNamespace(private=self.private and not (self.root / repo_id / PUBLIC).exists())

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        assert exist_ok
        type(self).private = private
        (self.root / repo_id).mkdir(parents=True, exist_ok=True)

    def create_commit(self, repo_id: str, operations: list, *, commit_message: str) -> None:
        for operation in operations:
            path = self.root / repo_id / operation.path_in_repo
            path.parent.mkdir(parents=True, exist_ok=True)
            with operation.as_file() as file:
                path.write_bytes(file.read())


@contextmanager
def serving(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A Hub whose repositories are the folders ``OWNER/NAME`` in ``root``; its cache is beside."""
    root.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Own", (Handler,), {"root": root}))
    Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root.parent / "cache"))
    monkeypatch.setattr(huggingface_hub, "HfApi", type("Api", (WritingApi,), {"root": root}))
    hub_config.cache_clear()
    try:
        yield root
    finally:
        server.shutdown()
        server.server_close()
        hub_config.cache_clear()
