"""A stand-in for the hub's API on this machine: repositories that take commits and give their files back."""

import base64
import json
import threading
from contextlib import contextmanager
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub(ThreadingHTTPServer):
    """``repositories``: files by name, by the repository's name; ``asked``: the paths of all requests."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.asked: list[str] = []
        self.commits = 1

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def newest(self):
        """The newest commit's name; what a client keeps of one it does not ask for again."""
        return f"{self.commits:040x}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, body=b"", status=200, **headers):
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self):
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        hub, path = self.server, self.path.partition("?")[0]
        hub.asked.append(path)
        if path == "/api/repos/create":
            given = json.loads(body)
            name = f"{given.get('organization') or 'me'}/{given['name']}"
            hub.repositories.setdefault(name, {})
            self.answer({"url": f"{hub.address}/{name}", "id": name})
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif path.endswith("/preupload/main"):
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for file in json.loads(body)["files"]
            ]
            self.answer({"files": files})
        elif path.endswith("/commit/main"):
            name = path.removeprefix("/api/models/").removesuffix("/commit/main")
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    hub.repositories[name][line["value"]["path"]] = content
            hub.commits += 1
            url = f"{hub.address}/{name}/commit/{hub.newest}"
            self.answer({"commitUrl": url, "commitOid": hub.newest, "success": True, "hookOutput": ""})
        else:
            self.answer(b"", 404)

    def do_GET(self):
        hub, path = self.server, self.path.partition("?")[0]
        hub.asked.append(path)
        for name, files in hub.repositories.items():
            for revision in ("main", hub.newest):
                file = path.removeprefix(f"/{name}/resolve/{revision}/")
                if file in files:
                    tag = sha1(files[file]).hexdigest()
                    self.answer(files[file], ETag=f'"{tag}"', X_Repo_Commit=hub.newest)
                    return
                if path.startswith(f"/api/models/{name}/tree/{revision}"):
                    self.answer(
                        [
                            {"type": "file", "path": p, "size": len(b), "oid": hub.newest}
                            for p, b in files.items()
                        ]
                    )
                    return
            if path in (f"/api/models/{name}", f"/api/models/{name}/revision/main"):
                siblings = [{"rfilename": file} for file in files]
                self.answer(
                    {"id": name, "sha": hub.newest, "siblings": siblings, "private": False, "tags": []}
                )
                return
        self.answer(b"", 404, X_Error_Code="EntryNotFound")

    do_HEAD = do_GET


@contextmanager
def stand_in():
    """A hub that runs until the block ends."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
