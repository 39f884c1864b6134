"""A web server on loopback that serves a folder by ranges, and faults that a test plans."""

import contextlib
import hashlib
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class WebServer(ThreadingHTTPServer):
    """Serves ``folder`` at ``address``. ``plan`` holds the faults of the next requests, the first one first.

    Faults: a status (403), "short" (a part, closed early), "whole" (200 for a range), "stall", "other" (another range),
    "redirect" (to the same file), "away" (to a path of another server, ``target``), "packed" (marked as compressed).
    """

    daemon_threads = True

    def __init__(self, folder, etags=True, limit=None):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = Path(folder)
        self.etags = etags
        self.plan = []
        self.target = ""
        self.requests = []
        self.sent = 0
        self.always = None
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def stop(self):
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        """Clients close connections early; that is no fault of the server."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: WebServer

    def log_message(self, *_):
        pass

    def do_GET(self):
        server = self.server
        server.requests.append((self.path, self.headers.get("Range")))
        fault = server.always
        with contextlib.suppress(IndexError):
            fault = server.plan.pop(0)
        if isinstance(fault, int):
            self._reply(fault, b"no")
            return
        if fault in ("redirect", "away"):
            self._reply(302, b"", {"Location": (server.target if fault == "away" else "") + self.path + "?page=2"})
            return
        path = server.folder / self.path.lstrip("/").partition("?")[0]
        if not path.is_file():
            self._reply(404, b"no")
            return
        data = path.read_bytes()
        headers = {"Last-Modified": self.date_time_string(path.stat().st_mtime)}
        if server.etags:
            headers["ETag"] = f'"{hashlib.md5(data).hexdigest()}"'
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if match is None or fault == "whole":
            self._reply(200, data, headers)
            return
        first = int(match[1])
        last = min(int(match[2]), len(data) - 1)
        if fault == "other":
            first += 1
        if first >= len(data):
            self._reply(416, b"", {"Content-Range": f"bytes */{len(data)}"})
            return
        body = data[first : last + 1]
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        if fault == "packed":
            headers["Content-Encoding"] = "gzip"
            body = body[: len(body) // 2]
        self._reply(206, body, headers, fault)

    def _reply(self, status, body, headers=None, fault=None):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if fault in ("short", "stall"):
            body = body[: len(body) // 2]
        self.server.sent += len(body)
        self.wfile.write(body)
        if fault == "stall":
            time.sleep(1.5)
        if fault in ("short", "stall"):
            self.close_connection = True
