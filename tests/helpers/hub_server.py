"""A model hub on loopback that answers the requests of huggingface_hub for one model."""

import contextlib
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextlib.contextmanager
def serving(folder: Path, name: str, broken: str = "") -> Iterator[str]:
    """Serve a folder as the model `name`, and yield the address.

    Args:
      folder: files of the model.
      name: ORG/NAME.
      broken: a file of which only the first half is sent.
    """
    files = {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            path = self.path.partition("?")[0]
            if path.startswith(f"/api/models/{name}"):
                listed = [
                    {"type": "file", "path": file, "size": len(content), "oid": "0"}
                    for file, content in files.items()
                ]
                siblings = [{"rfilename": file} for file in files]
                model = {"id": name, "sha": COMMIT, "siblings": siblings}
                reply = json.dumps(listed if "/tree/" in path else model).encode()
                self.send(reply, body, {"Content-Type": "application/json"})
                return
            file = path.removeprefix(f"/{name}/resolve/").partition("/")[2]
            if file not in files:
                self.send(b"", body, {"X-Error-Code": "EntryNotFound"}, 404)
                return
            etag = hashlib.sha256(files[file]).hexdigest()
            self.send(files[file], body, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}, 200, file)

        def send(
            self,
            content: bytes,
            body: bool,
            headers: dict[str, str],
            status: int = 200,
            file: str | None = None,
        ) -> None:
            start = 0
            if file and (wanted := self.headers.get("Range")):
                start = int(wanted.removeprefix("bytes=").partition("-")[0])
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
                status = 206
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            if body:
                stop = len(content) // 2 if file == broken else len(content)
                self.wfile.write(content[start:stop])
                if file == broken:
                    self.close_connection = True

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
