"""A real S3 server in a process of its own, and a proxy in front of it that counts requests and can fail."""

import contextlib
import http.client
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SERVE = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(*server.get_host_and_port(), flush=True)
sys.stdin.read()
"""
BUCKET = "bucket"
#: What makes a request fail: no answer at all, or that the server is busy.
CLOSE, BUSY = "close", "busy"


class _Forwards(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "Proxy"

    def _forward(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length // 2)
        self.server.half_way(self.command)
        body += self.rfile.read(length - len(body))
        if len(body) < length:
            return
        fault = self.server.next_fault(self.command, self.path)
        if fault == CLOSE:
            self.close_connection = True
            return
        if fault == BUSY:
            answer = b"<Error><Code>ServiceUnavailable</Code><Message>on purpose</Message></Error>"
            self._answer(503, [("Content-Type", "application/xml")], answer)
            return
        server = http.client.HTTPConnection(*self.server.behind)
        server.request(self.command, self.path, body, dict(self.headers.items()))
        reply = server.getresponse()
        content = reply.read()
        headers = [(k, v) for k, v in reply.getheaders() if k.lower() not in _HOP]
        self._answer(reply.status, headers, content, reply.getheader("Content-Length"))
        server.close()

    def _answer(self, status: int, headers: list[tuple[str, str]], content: bytes, length: str | None = None) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", length or str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _forward  # noqa: N815

    def log_message(self, *_: Any) -> None:
        """Nothing is logged."""


_HOP = ("content-length", "transfer-encoding", "connection", "date", "server")


class Proxy(ThreadingHTTPServer):
    """Forwards requests to a server, and lets some fail.

    Attributes:
        url: Its address.
        requests: How many of each method there were.
        half_way: Called with the method of a request of which half is read.
        fault: Given the number of a request, its method and its path, what befalls it: CLOSE, BUSY or nothing.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, behind: tuple[str, int]) -> None:
        super().__init__(("127.0.0.1", 0), _Forwards)
        self.behind = behind
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self._lock = threading.Lock()
        self._away_until = 0.0
        self.heal()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def heal(self) -> None:
        """Count from zero, and let nothing fail."""
        self.requests: Counter[str] = Counter()
        self.half_way: Callable[[str], None] = lambda method: None
        self.fault: Callable[[int, str, str], str | None] = lambda number, method, path: None

    def go_away(self, seconds: float) -> None:
        """Answer nothing for a while."""
        self._away_until = time.monotonic() + seconds

    def next_fault(self, method: str, path: str) -> str | None:
        with self._lock:
            self.requests[method] += 1
            number = self.requests.total()
        return CLOSE if time.monotonic() < self._away_until else self.fault(number, method, path)

    def handle_error(self, *_: Any) -> None:
        """A client that goes away is no matter."""


@contextlib.contextmanager
def object_store() -> Iterator[Proxy]:
    """Start the server and the proxy, and give the environment its address and credentials."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, "-c", SERVE], **pipes) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        host, port = process.stdout.readline().split()
        with Proxy((host.decode(), int(port))) as proxy:
            before = dict(os.environ)
            os.environ |= {
                "AWS_ENDPOINT_URL": proxy.url,
                "AWS_ACCESS_KEY_ID": "user",
                "AWS_SECRET_ACCESS_KEY": "secret",
            }
            os.environ |= {
                "AWS_DEFAULT_REGION": "us-east-1",
                "AWS_MAX_ATTEMPTS": "1",
                "AWS_EC2_METADATA_DISABLED": "true",
            }
            try:
                bucket = http.client.HTTPConnection(*proxy.behind)
                bucket.request("PUT", f"/{BUCKET}")
                assert bucket.getresponse().status == 200
                bucket.close()
                yield proxy
            finally:
                os.environ.clear()
                os.environ |= before
                proxy.shutdown()
                process.stdin.close()
                process.wait(10)
