"""A Hub on loopback for tests: it serves one folder under every id `test/...` and can fail in the ways a Hub fails."""

import hashlib
import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789" * 4


class StandInHub:
    """Serves `folder` until closed; `fault` (path -> what to do) may be set at any time, `paths` are those asked for.

    A fault is "" for none, "hang" (accept and never answer), "cut" (half of the body, then silence) or a status code.
    """

    def __init__(self, folder: Path) -> None:
        self.files = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
        self.fault: Callable[[str], str] = lambda path: ""
        self.paths: list[str] = []
        self.closing = threading.Event()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    def entry(self, name: str) -> dict[str, Any]:
        oid = hashlib.sha1(self.files[name]).hexdigest()
        return {"type": "file", "path": name, "size": len(self.files[name]), "oid": oid}


class _Handler(BaseHTTPRequestHandler):
    hub: StandInHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def reply(self, body: Any, status: int = 200, cut: bool = False, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if cut else data)
            if cut:
                self.hub.closing.wait()

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.hub.paths.append(f"{self.command} {path}")
        fault = self.hub.fault(f"{self.command} {path}")
        if fault == "hang":
            self.hub.closing.wait()
        elif fault.isdigit():
            self.reply({"error": "fault"}, int(fault))
        elif not path.removeprefix("/api").startswith("/datasets/test/"):
            self.reply({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        elif path.startswith("/api/"):
            self.answer_api(path, body)
        else:
            self.answer_file(path.split("/", 6)[-1], cut=fault == "cut")

    def answer_api(self, path: str, body: bytes) -> None:
        _, _, _, owner, name, *rest = path.split("/")
        files = self.hub.files
        if rest[:1] == ["tree"]:
            folder = "/".join(rest[2:])
            inside = [self.hub.entry(name) for name in files if str(Path(name).parent) == (folder or ".")]
            folders = {str(Path(name).parent) for name in files} - {"."}
            below = [{"type": "directory", "path": f, "size": 0, "oid": COMMIT} for f in folders if not folder]
            found = inside + below
            self.reply(found) if found else self.reply({"error": "none"}, 404, X_Error_Code="EntryNotFound")
        elif rest[:1] == ["paths-info"]:
            self.reply([self.hub.entry(name) for name in json.loads(body)["paths"] if name in files])
        else:
            siblings = [{"rfilename": name} for name in files]
            self.reply({"id": f"{owner}/{name}", "sha": COMMIT, "private": False, "tags": [], "siblings": siblings})

    def answer_file(self, name: str, cut: bool) -> None:
        if name not in self.hub.files:
            return self.reply({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
        oid, data = self.hub.entry(name)["oid"], self.hub.files[name]
        if wanted := self.headers.get("Range"):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            end = min(int(last or len(data) - 1), len(data) - 1)
            whole = f"bytes {first}-{end}/{len(data)}"
            return self.reply(data[int(first) : end + 1], 206, cut, ETag=f'"{oid}"', Content_Range=whole)
        self.reply(data, 200, cut, ETag=f'"{oid}"', Accept_Ranges="bytes")

    do_GET = do_HEAD = do_POST = answer
