"""An HTTP proxy between a client and an S3 server that breaks what passes through it, as told."""

import http.client
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import urlsplit

# drop: the connection is reset before the server has seen the request. lose: after it has answered.
# truncate: half of the answer's body, then a reset. slow: the answer trickles. error: an S3 error instead.
Kind = Literal["drop", "lose", "truncate", "slow", "error"]
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade", "content-length"}


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens to one request."""

    kind: Kind
    status: int = 500
    code: str = "InternalError"


@dataclass(slots=True)
class Proxy:
    """`decide` is asked for every request (method, path with query) and names its fault, or None."""

    url: str
    decide: Callable[[str, str], Fault | None] = lambda method, path: None
    requests: list[tuple[str, str, Fault | None]] = field(default_factory=list)


@contextmanager
def proxy(upstream: str, port: int = 0) -> Iterator[Proxy]:
    """A running proxy in front of an address; without a fault it passes everything on."""
    address = urlsplit(upstream)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            """Quiet."""

        def _serve(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length)
            fault = found.decide(self.command, self.path)
            found.requests.append((self.command, self.path, fault))
            if fault and fault.kind == "drop":
                return self._reset()
            if fault and fault.kind == "error":
                return self._refuse(fault)
            status, headers, answer = self._forward(body)
            if fault and fault.kind == "lose":
                return self._reset()
            return self._answer(status, headers, answer, fault)

        def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
            connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=60)
            try:
                # Signatures cover the Host header, which stays the client's.
                connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for name, value in self.headers.items():
                    if name.lower() not in (HOP_BY_HOP | {"expect"}) - {"content-length"}:
                        connection.putheader(name, value)
                connection.endheaders(body)
                response = connection.getresponse()
                return response.status, response.getheaders(), response.read()
            finally:
                connection.close()

        def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes, fault: Fault | None) -> None:
            self.send_response_only(status)
            lengths = [value for name, value in headers if name.lower() == "content-length"]
            for name, value in headers:
                if name.lower() not in HOP_BY_HOP:
                    self.send_header(name, value)
            self.send_header("Content-Length", lengths[0] if self.command == "HEAD" and lengths else str(len(body)))
            self.end_headers()
            if fault and fault.kind == "truncate":
                self.wfile.write(body[: len(body) // 2])
                return self._reset()
            if fault and fault.kind == "slow":
                for start in range(0, len(body), max(1, len(body) // 8)):
                    self.wfile.write(body[start : start + max(1, len(body) // 8)])
                    self.wfile.flush()
                    time.sleep(0.05)
                return None
            self.wfile.write(body)
            return None

        def _refuse(self, fault: Fault) -> None:
            xml = f"<Error><Code>{fault.code}</Code><Message>made by the proxy</Message></Error>".encode()
            body = b"" if self.command == "HEAD" else xml
            self.send_response_only(fault.status)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _reset(self) -> None:
            self.wfile.flush()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _serve

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            """A client that went away is what these tests are about."""

    server = Server(("127.0.0.1", port), Handler)
    found = Proxy(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        with suppress(OSError):
            server.shutdown()
        server.server_close()
        thread.join()
