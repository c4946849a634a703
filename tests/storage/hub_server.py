"""The few endpoints of a hub that a push uses, over HTTP on 127.0.0.1; commits land in a folder."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

TOKEN = "hf_test"


class Hub(ThreadingHTTPServer):
    """Datasets by name; `files` holds each branch's folder, `requests` what was asked with which token."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.private: dict[str, bool] = {}
        self.requests: list[tuple[str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def files(self, name: str, revision: str = "main") -> list[str]:
        root = self.folder / name / revision
        return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._answer("POST", body)

    def do_GET(self) -> None:
        self._answer("GET", b"")

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self, method: str, body: bytes) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((method, path))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._send(401, {"error": "Invalid username or password."})
        parts = path.strip("/").split("/")
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return self._send(200, {"errors": [], "warnings": []})
        if parts[:2] != ["api", "datasets"] or "/".join(parts[2:4]) not in self.server.private:
            return self._send(404, {"error": f"nothing at {path}"})
        return self._dataset("/".join(parts[2:4]), parts[4:], body)

    def _create(self, asked: dict[str, object]) -> None:
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        url = f"{self.server.url}/datasets/{name}"
        if name in self.server.private:
            return self._send(409, {"error": "You already created this dataset repo", "url": url})
        self.server.private[name] = bool(asked.get("private") or asked.get("visibility") == "private")
        (self.server.folder / name / "main").mkdir(parents=True)
        return self._send(200, {"url": url, "name": name, "id": name})

    def _dataset(self, name: str, rest: list[str], body: bytes) -> None:
        root = self.server.folder / name
        if not rest or rest[0] == "revision":
            if rest and not (root / rest[1]).is_dir():
                return self._send(404, {"error": "no such revision"}, {"X-Error-Code": "RevisionNotFound"})
            siblings = [{"rfilename": file} for file in self.server.files(name, rest[1] if rest else "main")]
            return self._send(
                200, {"id": name, "sha": "0" * 40, "private": self.server.private[name], "siblings": siblings}
            )
        if rest[0] == "branch":
            (root / rest[1]).mkdir()
            return self._send(200, {})
        if rest[0] == "tree":
            return self._send(200, self._tree(root / rest[1]))
        if rest[0] == "preupload":
            asked = json.loads(body)["files"]
            chosen = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]
            return self._send(200, {"files": chosen})
        assert rest[0] == "commit", rest
        self._commit(root / rest[1], [json.loads(line) for line in body.splitlines()])
        address = f"{self.server.url}/datasets/{name}/commit/{'1' * 40}"
        return self._send(200, {"success": True, "commitOid": "1" * 40, "commitUrl": address})

    def _tree(self, root: Path) -> list[dict[str, object]]:
        files = [path for path in sorted(root.rglob("*")) if path.is_file()]
        return [
            {"type": "file", "path": f.relative_to(root).as_posix(), "size": f.stat().st_size, "oid": "2" * 40}
            for f in files
        ]

    def _commit(self, root: Path, lines: list[dict[str, dict[str, str]]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":  # type: ignore[comparison-overlap]
                target = root / value["path"]
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(base64.b64decode(value["content"]))
            elif line["key"] == "deletedFile":  # type: ignore[comparison-overlap]
                (root / value["path"]).unlink()

    def _send(self, status: int, content: object, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def running_hub(folder: Path) -> Iterator[Hub]:
    """A hub that answers until the block ends."""
    hub = Hub(folder)
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()
