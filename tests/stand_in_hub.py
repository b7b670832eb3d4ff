"""A Hub on loopback for tests: it serves data sets and models, takes uploads, and can fail in the ways a Hub fails."""

import base64
import hashlib
import json
import threading
from collections.abc import Callable
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]
NONE = "0" * 40


def read_files(folder: Path) -> Files:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def use_hub(endpoint: str, cache: str) -> None:
    """Point huggingface_hub here; it has read its environment when it was imported."""
    from huggingface_hub import constants

    constants.ENDPOINT = endpoint
    constants.HUGGINGFACE_CO_URL_TEMPLATE = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    constants.HF_HUB_CACHE = cache
    constants.HF_HUB_DISABLE_XET = True  # which is not stood in for


class StandInHub:
    """Serves until closed; `fault` (request -> what to do) may be set at any time, `paths` are the requests so far.

    A fault is "" for none, "hang" (accept and never answer), "cut" (half of the body, then silence), "gated" (the
    repository's terms are not accepted) or a status code.

    Attributes:
        dataset: the folder's files, served as every data set whose id matches the pattern.
        models: the files of each model repository by its id; uploads, which need any token, change them.
    """

    def __init__(self, folder: Path | None = None, pattern: str = "test/*") -> None:
        self.dataset, self.pattern = read_files(folder) if folder else {}, pattern
        self.models: dict[str, Files] = {}
        self.large_files: Files = {}  # by their SHA-256, uploaded and not yet part of a commit
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

    def repository(self, kind: str, hub_id: str) -> Files | None:
        if kind == "datasets":
            return self.dataset if fnmatch(hub_id, self.pattern) else None
        return self.models.get(hub_id)


def commit_of(files: Files) -> str:
    return hashlib.sha1(b"".join(name.encode() + data for name, data in sorted(files.items()))).hexdigest()


def entry(files: Files, name: str) -> dict[str, Any]:
    return {"type": "file", "path": name, "size": len(files[name]), "oid": hashlib.sha1(files[name]).hexdigest()}


class _Handler(BaseHTTPRequestHandler):
    hub: StandInHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def reply(self, body: Any, status: int = 200, cut: bool = False, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **headers}.items():
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
        elif fault == "gated":
            self.reply({"error": "Access is restricted"}, 403, X_Error_Code="GatedRepo")
        elif path.startswith(("/api/repos/", "/api/validate-yaml", "/large-files/")):
            self.answer_upload(path, body)
        else:
            # /api/models/OWNER/NAME/..., /OWNER/NAME/resolve/REVISION/FILE, and /datasets/... before the latter
            parts = path.removeprefix("/api").strip("/").split("/")
            kind = parts.pop(0) if parts[0] in ("datasets", "models") else "models"
            hub_id, rest = "/".join(parts[:2]).removesuffix(".git"), parts[2:]
            files = self.hub.repository(kind, hub_id)
            if files is None:
                self.reply({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
            elif rest[:1] == ["resolve"]:
                self.answer_file(files, "/".join(rest[2:]), cut=fault == "cut")
            elif rest[:1] in (["preupload"], ["info"], ["commit"]):
                self.answer_commit(hub_id, files, rest[0], body)
            else:
                self.answer_api(hub_id, files, rest, body)

    def answer_api(self, hub_id: str, files: Files, rest: list[str], body: bytes) -> None:
        if rest[:1] == ["tree"]:
            folder = "/".join(rest[2:])
            everything = "recursive=true" in self.path.lower() and not folder
            inside = [entry(files, name) for name in files if everything or str(Path(name).parent) == (folder or ".")]
            folders = {str(Path(name).parent) for name in files} - {"."}
            below = [{"type": "directory", "path": f, "size": 0, "oid": NONE} for f in folders if not folder]
            found = inside + below
            self.reply(found) if found else self.reply({"error": "none"}, 404, X_Error_Code="EntryNotFound")
        elif rest[:1] == ["paths-info"]:
            self.reply([entry(files, name) for name in json.loads(body)["paths"] if name in files])
        else:
            siblings = [{"rfilename": name} for name in files]
            self.reply({"id": hub_id, "sha": commit_of(files), "private": False, "tags": [], "siblings": siblings})

    def answer_file(self, files: Files, name: str, cut: bool) -> None:
        if name not in files:
            return self.reply({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
        data = files[name]
        headers = {"ETag": f'"{entry(files, name)["oid"]}"', "X_Repo_Commit": commit_of(files)}
        if wanted := self.headers.get("Range"):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            end = min(int(last or len(data) - 1), len(data) - 1)
            whole = f"bytes {first}-{end}/{len(data)}"
            return self.reply(data[int(first) : end + 1], 206, cut, Content_Range=whole, **headers)
        self.reply(data, 200, cut, Accept_Ranges="bytes", **headers)

    # Uploads

    def answer_upload(self, path: str, body: bytes) -> None:
        if path.startswith("/large-files/"):
            self.hub.large_files[path.rpartition("/")[2]] = body
            self.reply({})
        elif path == "/api/validate-yaml":
            self.reply({"errors": [], "warnings": []})
        elif not self.headers.get("Authorization"):
            self.reply({"error": "Invalid username or password."}, 401)
        else:
            wanted = json.loads(body)
            hub_id = f"{wanted['organization']}/{wanted['name']}"
            self.hub.models.setdefault(hub_id, {})
            self.reply({"url": f"{self.hub.endpoint}/{hub_id}"})

    def answer_commit(self, hub_id: str, files: Files, what: str, body: bytes) -> None:
        if what == "preupload":  # large files go elsewhere first, as the Hub wants it for safetensors
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in names}
            self.reply({"files": [{"path": n, "uploadMode": modes[n], "shouldIgnore": False} for n in names]})
        elif what == "info":  # .git/info/lfs/objects/batch
            objects = json.loads(body)["objects"]
            for wanted in objects:
                wanted["actions"] = {"upload": {"href": f"{self.hub.endpoint}/large-files/{wanted['oid']}"}}
            self.reply({"transfer": "basic", "objects": objects}, Content_Type="application/vnd.git-lfs+json")
        else:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "lfsFile":
                    files[line["value"]["path"]] = self.hub.large_files.pop(line["value"]["oid"])
            oid = commit_of(files)
            self.reply({"commitOid": oid, "commitUrl": f"{self.hub.endpoint}/{hub_id}/commit/{oid}"})

    do_GET = do_HEAD = do_POST = do_PUT = answer
