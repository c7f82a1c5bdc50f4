"""A server on this machine that answers as the Hugging Face hub does, for models in directories."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

_INFO = re.compile(r"/api/models/([^/]+/[^/]+?)(?:/revision/([^/?]+))?(?:\?.*)?")
_TREE = re.compile(r"/api/models/([^/]+/[^/]+)/tree/([^/?]+)(?:\?.*)?")
_FILE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/([^?]+)(?:\?.*)?")


@dataclass
class Hub:
    """What the server has, and what it was asked for.

    Attributes:
        address: its URL.
        models: for each model the directory of each revision; commits are revisions, too.
        gated: the models that nobody may read.
        asked: the method, the file and the part of each request for a file.
        before: called with the name of a file before it is sent.
    """

    address: str = ""
    models: dict[str, dict[str, Path]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)
    before: Callable[[str], object] = lambda file: None

    def put(self, name: str, directory: str | Path, revision: str = "main") -> str:
        """Let a revision of a model be what a directory holds; return its commit."""
        directory, commit = Path(directory), _commit(directory)
        self.models.setdefault(name, {}).update({revision: directory, commit: directory})
        return commit


def _commit(directory: str | Path) -> str:
    return hashlib.sha1(str(directory).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # which delays each answer by 40 ms

    def do_GET(self) -> None:
        for pattern, answer in ((_FILE, self._file), (_INFO, self._info), (_TREE, self._tree)):
            if found := pattern.fullmatch(self.path):
                revisions = self.hub.models.get(found[1])
                if found[1] in self.hub.gated:
                    return self._fail("GatedRepo", 403)
                if revisions is None:
                    return self._fail("RepoNotFound")
                directory = revisions.get(found[2] or "main")
                if directory is None:
                    return self._fail("RevisionNotFound")
                return answer(found[1], directory, *found.groups()[2:])
        return self._fail("EntryNotFound")

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *words: object) -> None:
        pass

    def _info(self, model: str, directory: Path) -> None:
        files = [{"rfilename": it.name, "size": it.stat().st_size} for it in directory.iterdir()]
        self._json({"id": model, "sha": _commit(directory), "siblings": files, "tags": []})

    def _tree(self, model: str, directory: Path) -> None:
        entry = {"type": "file", "oid": "0" * 40}
        self._json(
            [{**entry, "path": it.name, "size": it.stat().st_size} for it in directory.iterdir()]
        )

    def _file(self, model: str, directory: Path, name: str) -> None:
        part = self.headers.get("Range")
        self.hub.asked.append((self.command, name, part))
        self.hub.before(name)
        path = directory / name
        if not path.is_file():
            return self._fail("EntryNotFound")
        data, status = path.read_bytes(), 200
        headers = {
            "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
            "X-Repo-Commit": _commit(directory),
            "Accept-Ranges": "bytes",
        }
        if part:
            first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", part).groups()
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            data, status = data[int(first) : int(last) + 1 if last else None], 206
        return self._send(status, headers, data)

    def _json(self, value: object) -> None:
        self._send(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def _fail(self, code: str, status: int = 404) -> None:
        self._send(status, {"X-Error-Code": code}, b"")

    def _send(self, status: int, headers: dict[str, str], data: bytes) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@contextmanager
def serving() -> Iterator[Hub]:
    """Run the server while the context lasts."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.address = f"http://127.0.0.1:{server.server_port}"
        Thread(target=server.serve_forever, args=[0.05], daemon=True).start()
        yield hub
        server.shutdown()
