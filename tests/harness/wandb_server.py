"""A wandb server on loopback: one run, whose history it stores by offset, as the real one does."""

import gzip
import json
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread


class WandbServer(ThreadingHTTPServer):
    """``history``: offset -> row. ``run``: the variables of its creation; None before."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.history = {}
        self.run = None
        self.url = f"http://127.0.0.1:{self.server_port}"

    def steps(self):
        return [self.history[offset]["_step"] for offset in sorted(self.history)]

    def answer(self, query, values):
        """Return the data of a GraphQL answer."""
        if "RunResumeStatus" in query:
            return {"model": self.run and {"id": "p", "name": "masking", "entity": {"id": "e", "name": "team"},
            "bucket": self.resumed()}}  # fmt: skip
        if "upsertBucket" in query:
            new = self.run is None
            self.run = self.run or values
            project = {"id": "p", "name": "masking", "entity": {"id": "e", "name": "team"}}
            bucket = {"id": "b", "name": values["name"], "displayName": "run", "project": project}
            return {"upsertBucket": {"bucket": bucket | {"historyLineCount": len(self.history)}, "inserted": new}}
        if "createRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.url}/put"} for name in values["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        return {}

    def resumed(self):
        tail = [json.dumps(self.history[offset]) for offset in sorted(self.history)[-1:]]
        return {
            "id": "b", "name": self.run["name"], "summaryMetrics": "{}", "displayName": "run", "logLineCount": 0,
            "historyLineCount": len(self.history), "eventsLineCount": 0, "historyTail": json.dumps(tail),
            "eventsTail": "[]", "config": "{}", "tags": [], "notes": "", "wandbConfig": json.dumps({"t": 1}),
        }  # fmt: skip


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: WandbServer

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if body[:2] == b"\x1f\x8b":
            body = gzip.decompress(body)
        answer = {}
        if self.path == "/graphql":
            request = json.loads(body)
            answer = {"data": self.server.answer(request["query"], request.get("variables") or {})}
        elif self.path.endswith("/file_stream"):
            payload = json.loads(body).get("files", {}).get("wandb-history.jsonl", {"offset": 0, "content": []})
            rows = map(json.loads, payload["content"])
            self.server.history |= {payload["offset"] + i: row for i, row in enumerate(rows)}
        answer = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_PUT = do_GET = do_POST

    def log_message(self, *_):
        pass


@contextmanager
def serving():
    server = WandbServer()
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
