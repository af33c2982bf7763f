"""An HTTP server with faults, and a package index of made-up wheels behind it."""

from __future__ import annotations

import hashlib
import io
import re
import threading
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Files:
    """What is served, and how badly. Paths begin with "/"."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self.files = dict(files)
        self.ranges = True
        self.cut_after: dict[str, int] = {}  # close the connection once, after so many bytes
        self.requests: list[tuple[str, str | None]] = []  # (path, Range)
        self.url = ""


@contextmanager
def serve(files: Files) -> Iterator[Files]:
    """Serve until the block ends; `files.url` is the root without a slash at the end."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.0"

        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            files.requests.append((self.path, wanted))
            data = files.files.get(self.path)
            if data is None:
                self.send_error(404)
                return
            start = 0
            match = re.fullmatch(r"bytes=(\d+)-", wanted or "")
            if match and files.ranges:
                start = int(match[1])
                if start >= len(data):
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{len(data)}")
                    self.end_headers()
                    return
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            else:
                self.send_response(200)
            kind = "text/html" if self.path.endswith("/") else "application/octet-stream"
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data) - start))
            self.end_headers()
            self.wfile.write(data[start : files.cut_after.pop(self.path, len(data))])

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    files.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield files
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def wheel(members: Mapping[str, bytes]) -> bytes:
    """A zip file; nothing here ever installs it, so it needs no metadata."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def index(wheels: Mapping[str, bytes]) -> Files:
    """A package index (PEP 503) that offers these wheels, by file name."""
    files: dict[str, bytes] = {}
    pages: dict[str, list[str]] = {}
    for name, data in wheels.items():
        files[f"/files/{name}"] = data
        project = re.sub(r"[-_.]+", "-", name.split("-")[0]).lower()
        digest = hashlib.sha256(data).hexdigest()
        pages.setdefault(project, []).append(f'<a href="/files/{name}#sha256={digest}">{name}</a>')
    for project, links in pages.items():
        files[f"/simple/{project}/"] = f"<!DOCTYPE html><html><body>{''.join(links)}</body></html>".encode()
    return Files(files)
