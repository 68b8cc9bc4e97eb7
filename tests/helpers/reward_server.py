"""Reward servers for tests: one whose answers a test writes, and `idgrpo serve-reward` in its own process."""

import base64
import contextlib
import gzip
import http.server
import io
import json
import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from tests.helpers.paths import ROOT


class Stub:
    """A server that answers POST by `answer(request, number)`, with the number of the request from 0.

    An answer is a reply body as text or bytes, a (status, headers, body), or a function that writes to the connection.
    """

    def __init__(self, answer, frames=b"{}", port=0):
        self.answer, self.frames, self.requests = answer, frames, []
        lock = threading.Lock()
        stub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.reply(stub.frames)

            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(stub.requests)
                    stub.requests.append(request)
                self.reply(stub.answer(request, number))

            def reply(self, found):
                if callable(found):
                    found(self.wfile)
                    return
                status, headers, body = found if isinstance(found, tuple) else (200, {}, found)
                body = body.encode() if isinstance(body, str) else body
                self.send_response(status)
                for name, value in ({"Content-Length": str(len(body))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                with contextlib.suppress(OSError):
                    self.wfile.write(body)

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.server.server_port}/score"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


def pixels_of(request):
    """The pixels of the video of a request."""
    (video,) = request["videos"]
    content = base64.b64decode(video)
    content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    return np.load(io.BytesIO(content), allow_pickle=False)


def level_of(request):
    """The grey level of the video of a request."""
    return float(pixels_of(request).reshape(-1)[0])


@contextlib.contextmanager
def served(*words, config="quickstart"):
    """`idgrpo serve-reward` on a free port; yields its process and its address."""
    pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")
    pytest.importorskip("starlette", reason="the extra `serve` is not installed")
    command = [sys.executable, "-m", "jax_idgrpo", "serve-reward", config, "--port", "0", *words]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process, address_of(process)
    finally:
        process.terminate()  # by which it removes its temporary folder
        process.wait()
        process.stdout.close()


def address_of(process):
    """The address that a server prints once it listens."""
    printed = []
    for line in process.stdout:
        printed.append(line)
        if line.startswith("serving the reward at "):
            return line.split()[-1]
    raise AssertionError(f"the server ended with {process.wait()}: {''.join(printed)}")
