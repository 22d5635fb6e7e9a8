"""A web server for one person at this machine, for commands that show a page.

It listens on 127.0.0.1 and answers those alone who know its address, which has a random token: other users of the
machine can connect, too. The Host of a request has to be this machine's own name, so that no page of another site
reaches it by a name of its own (DNS rebinding).
"""

from __future__ import annotations

import getpass
import platform
import secrets
import sys
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

from nettorrent_mpi.plan.errors import UserError

MOST_BYTES = 8 << 20  # of a request's body
SILENT = 30.0  # seconds until a connection that says nothing is closed
_OWN_NAMES = ("127.0.0.1", "localhost")
_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


class Request(NamedTuple):
    """A Request is what a page asks for: GET or POST, the path behind the token ("" is the page), and the body."""

    method: str
    path: str
    body: bytes


class Response(NamedTuple):
    """A Response is sent back with its media type."""

    body: bytes
    kind: str = "text/html; charset=utf-8"
    status: int = HTTPStatus.OK


TEXT = "text/plain; charset=utf-8"
NOT_FOUND = Response(b"not found\n", TEXT, HTTPStatus.NOT_FOUND)
FORBIDDEN = Response(b"forbidden: use the address that the command has shown\n", TEXT, HTTPStatus.FORBIDDEN)


class LocalServer:
    """A LocalServer answers requests by `answer`, each in a thread of its own. `port` 0 is any free one.

    Raises a UserError where the port is taken.
    """

    def __init__(self, answer: Callable[[Request], Response], port: int = 0):
        self._token = secrets.token_urlsafe(24)
        handler = type("_BoundHandler", (_Handler,), {"answer": staticmethod(answer), "prefix": f"/{self._token}/"})
        try:
            self._server = _Server(("127.0.0.1", port), handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(
                f"--port {port}: cannot be listened on ({reason}); choose another, or leave it out"
            ) from None
        self._server.daemon_threads = True

    @property
    def url(self) -> str:
        """The address of the page, token included."""
        return f"http://127.0.0.1:{self._server.server_port}/{self._token}/"

    @property
    def tunnel(self) -> str:
        """The command on another machine by which its browser can use the same address."""
        port = self._server.server_port
        return f"ssh -N -L {port}:127.0.0.1:{port} {getpass.getuser()}@{platform.node()}"

    def serve(self) -> None:
        """Answer until `close`, or an exception in this thread, such as KeyboardInterrupt."""
        try:
            self._server.serve_forever(poll_interval=0.2)
        finally:
            self._server.server_close()

    def close(self) -> None:
        """End `serve`, which runs in another thread."""
        self._server.shutdown()


class _Server(ThreadingHTTPServer):
    """Says nothing of browsers that leave before they are answered."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    answer: Callable[[Request], Response]
    prefix: str
    timeout = SILENT
    server_version, sys_version = "nettorrent", ""

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        host = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
        path = self.path.partition("?")[0]
        length = self.headers.get("Content-Length", "0")
        known = secrets.compare_digest(path[: len(self.prefix)].encode(), self.prefix.encode())
        if host not in _OWN_NAMES or not known:
            found = FORBIDDEN
        elif not length.isdecimal() or int(length[:12]) > MOST_BYTES:
            found = Response(b"too large\n", TEXT, HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        else:
            body = self.rfile.read(int(length))
            found = type(self).answer(Request(self.command, path[len(self.prefix) :], body))
        self.close_connection = True
        self.send_response(found.status)
        for name, value in (_HEADERS | {"Content-Type": found.kind, "Content-Length": str(len(found.body))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(found.body)

    def log_message(self, *_: Any) -> None:
        """Say nothing: the terminal is the command's."""
