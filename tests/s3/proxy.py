"""A proxy that injects faults between a client and an S3 server by a seeded plan, and counts them.

It speaks HTTP/1.1 as S3 clients do. It disturbs ranged GETs, and writes on request; it passes other requests on.
"""

import asyncio
import collections
import contextlib
import itertools
import random
import re
import threading

FAULTS = ("slowdown", "server", "throttle", "expired", "refuse", "reset", "short", "flip", "stall", "silence")
COUNTED_AS = {
    "slowdown": "slowdown", "throttle": "slowdown", "server": "server", "expired": "expired", "denied": "denied",
    "refuse": "connection", "reset": "connection", "short": "short", "flip": "checksum",
    "stall": "stall", "silence": "stall",
}  # fmt: skip
"""What the proxy does -> what the reader counts."""
_ERRORS = {
    "slowdown": (503, "SlowDown"), "server": (500, "InternalError"), "throttle": (429, "AsSomeServersSay"),
    "denied": (403, "AccessDenied"), "expired": (400, "ExpiredToken"), "down": (503, "ServiceUnavailable"),
}  # fmt: skip


class Proxy:
    """``faults``: names of faults. A GET of an object suffers a fault with probability ``share``, except the first
    ``after`` GETs, and at most ``limit`` GETs do. With ``writes``, PUT and POST suffer the faults that are answers.
    ``server`` has a ``port``, which a restart may change.

    The proxy draws faults in rounds that contain each fault once, so that each fault occurs equally often. It also
    counts ``gets``, ``heads``, ``rot`` (replies with a wrong byte) and ``away``: requests while the server is away,
    without those on reused connections, which aiohttp sends again before it reports an error.
    """

    def __init__(self, server):
        self.server = server
        self.port = 0
        self.counts = collections.Counter()
        self.rotten = b"", 0
        """The path of an object, and the byte of it that is wrong in every reply, as if it lay there so."""
        self.lost = b""
        """Head of a request, as an expression: the server's answer to one that it fits is lost, once."""
        self.redirect = None
        """(status, code, region) of the answer to every request, as of a server that does not have the bucket."""
        self.weak = False
        """Whether ETags of replies are weak, as behind proxies that compress."""
        self.ignores = ""
        """What of a Range header is ignored: "range" (200 and the object), "start" (206 from its first byte), or
        "length" (200 and as many bytes from its first), or "chunked" (as "range", without a length)."""
        self.away = False
        """Whether every request finds its connection closed, as if the server were gone."""
        self.pace = 0.0
        self._turn = 0.0
        """Seconds from one GET of a shard to the next: the storage is as slow as that."""
        self.latency = lambda head: 0.0
        """Seconds before the reply to a request, from its head."""
        self.plan((), 0)

    def plan(self, faults, share, seed=0, limit=10**9, after=0, writes=False):
        self.faults = tuple(faults)
        self.share = share
        self.limit = limit
        self.after = after
        self.writes = writes
        self.random = random.Random(seed)
        self.round = []
        self.counts = collections.Counter()

    @property
    def address(self):
        return f"http://127.0.0.1:{self.port}"

    def start(self):
        self._loop = asyncio.new_event_loop()
        ready = threading.Event()

        async def serve():
            self._server = await asyncio.start_server(self._client, "127.0.0.1", 0)
            self.port = self._server.sockets[0].getsockname()[1]
            ready.set()

        def run():
            self._loop.create_task(serve())
            self._loop.run_forever()

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()
        assert ready.wait(10)
        return self

    def stop(self):
        async def end():
            self._server.close()
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()
            self._loop.call_soon(self._loop.stop)

        asyncio.run_coroutine_threadsafe(end(), self._loop)
        self._thread.join(10)

    def _draw(self, head):
        self.counts["heads"] += head.startswith(b"HEAD /")
        if head.startswith(b"GET /") and b"\r\nrange:" in head.lower():
            self.counts["gets"] += 1
        elif not (self.writes and head.startswith((b"PUT /", b"POST /"))):
            return ""
        done = sum(self.counts[name] for name in self.faults)
        if (
            not self.faults
            or (self.after and self.counts["gets"] <= self.after)
            or done >= self.limit
            or self.random.random() >= self.share
        ):
            return ""
        if not self.round:
            self.round = self.random.sample(self.faults, len(self.faults))
        fault = self.round.pop()
        self.counts[fault] += 1
        return fault

    async def _client(self, reader, writer):
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            for reused in itertools.chain([False], itertools.repeat(True)):
                head = await reader.readuntil(b"\r\n\r\n")
                if self.away:
                    self.counts["away"] += not reused
                    break
                await self._wait(head)
                await asyncio.sleep(self.latency(head))
                head = _answer_expectation(head, writer)
                fault = self._draw(head)
                if fault == "refuse":
                    break
                if self.redirect:
                    await reader.readexactly(_length(head))
                    writer.write(_redirection(*self.redirect, head))
                    await writer.drain()
                    continue
                if fault in _ERRORS:
                    await reader.readexactly(_length(head))
                    status, code = _ERRORS[fault]
                    body = f"<Error><Code>{code}</Code><Message>by the plan</Message></Error>".encode()
                    writer.write(b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n%s" % (status, len(body), body))
                elif fault == "silence":
                    await asyncio.sleep(3600)
                elif not await self._pass_on(head, reader, writer, fault, reused):
                    break
                await writer.drain()
        writer.close()

    async def _wait(self, head):
        """Wait until it is this request's turn."""
        if self.pace and head.startswith(b"GET /") and head.split(b" ")[1].partition(b"?")[0].endswith(b".tar"):
            now = asyncio.get_running_loop().time()
            self._turn = max(now, self._turn + self.pace)
            await asyncio.sleep(self._turn - now)

    async def _pass_on(self, head, reader, writer, fault, reused):
        """Exchange a request and its reply with the server. Return whether the client's connection stays open."""
        try:
            upstream, down = await asyncio.open_connection("127.0.0.1", self.server.port)
        except OSError:
            self.counts["away"] += not reused
            raise
        try:
            down.write(head + await reader.readexactly(_length(head)))
            reply = await upstream.readuntil(b"\r\n\r\n")
            body = b""
            if not head.startswith(b"HEAD"):
                body = await upstream.readexactly(_length(reply))
        finally:
            down.close()
        if self.lost and re.match(self.lost, head):
            self.lost = b""
            writer.transport.abort()
            return False
        if self.ignores and b"\r\ncontent-range:" in reply.lower():
            reply, body = _first_bytes(reply, body, self.ignores)
        if self.weak:
            reply = re.sub(rb'(?i)(\r\netag: *)"', rb'\1W/"', reply)
        half = len(body) // 2
        if fault == "short":
            body = body[:half]
            lines = [x for x in reply.split(b"\r\n") if not x.lower().startswith(b"content-length:")]
            reply = b"\r\n".join([lines[0], b"content-length: %d" % half, *lines[1:]])
        if fault == "flip":
            body = _flip(body, self.random.randrange(len(body)), self.random.randrange(8))
        path, offset = self.rotten
        if (
            path
            and head.startswith(b"GET %s " % path)
            and (range_start := _range_start(head)) <= offset < range_start + len(body)
        ):
            body = _flip(body, offset - range_start, 4)
            self.counts["rot"] += 1
        writer.write(reply + (body[:half] if fault in ("reset", "stall") else body))
        if fault == "stall":
            await writer.drain()
            await asyncio.sleep(3600)
        if fault == "reset":
            await writer.drain()
            await asyncio.sleep(0.05)  # else the half that was sent is lost with the connection
            writer.transport.abort()
        return fault != "reset"


def _redirection(status, code, region, head):
    body = f"<Error><Code>{code}</Code><Message>by the plan</Message></Error>".encode()
    headers = ""
    if region:
        headers = f"x-amz-bucket-region: {region}\r\n"
    body = b"" if head.startswith(b"HEAD") else body
    return f"HTTP/1.1 {status} X\r\n{headers}content-length: {len(body)}\r\n\r\n".encode() + body


def _first_bytes(reply, body, ignored):
    """The reply of a server that ignores a part of the Range header, from the right reply. Its bytes are zeros."""
    size = int(re.search(rb"(?i)\r\ncontent-range: *bytes \d+-\d+/(\d+)", reply)[1])
    lines = reply.split(b"\r\n")
    body = bytes(size if ignored == "range" else len(body))
    others = [line for line in lines[1:-2] if not line.lower().startswith((b"content-length:", b"content-range:"))]
    if ignored == "chunked":
        body = b"%x\r\n%s\r\n0\r\n\r\n" % (size, bytes(size))
        others.append(b"transfer-encoding: chunked")
    else:
        others.append(b"content-length: %d" % len(body))
    first = b"HTTP/1.1 200 OK"
    if ignored == "start":
        first = b"HTTP/1.1 206 Partial Content"
        others.append(b"content-range: bytes 0-%d/%d" % (len(body) - 1, size))
    return b"\r\n".join([first, *others, b"", b""]), body


def _answer_expectation(head, writer):
    """Answer a client that asks whether it may send its body. Return the head without that question."""
    lines = head.split(b"\r\n")
    remaining = [line for line in lines if not line.lower().startswith(b"expect:")]
    if remaining != lines:
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    return b"\r\n".join(remaining)


def _flip(body, offset, bit):
    return body[:offset] + bytes([body[offset] ^ 1 << bit]) + body[offset + 1 :]


def _range_start(head):
    match = re.search(rb"\r\nrange: *bytes=(\d+)", head.lower())
    return int(match[1]) if match else 0


def _length(head):
    headers = [x for x in head.lower().split(b"\r\n") if x.startswith(b"content-length:")]
    if headers:
        return int(headers[0].split(b":")[1])
    return 0
