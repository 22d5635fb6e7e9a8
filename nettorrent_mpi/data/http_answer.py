"""One HTTP answer as a stream of bytes, from a server that may be broken or hostile.

Addresses lead to HTTP and HTTPS alone, redirected ones too; what comes with a redirection is not read; and a server
that is slower than anybody could use is left, wherever it lingers: in a handshake, a header or a body.
"""

from __future__ import annotations

import http.client
import io
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import IO, Any

PATIENCE = 60.0  # seconds in which LEAST bytes have to come
LEAST = 60_000
TIMEOUT = 30.0  # seconds without a byte


class Answer:
    """An Answer is a response that is being read; `status` and `length` (None: not told, or senseless) are the server's
    words."""

    def __init__(self, response: Any, watch: _Pace):
        self._response, self._watch = response, watch
        self.status: int = response.status
        self.length: int | None = response.length  # of what is read: chunks tell their own

    def pieces(self, size: int) -> Iterator[bytes]:
        """Yield the body in pieces of at most `size` bytes."""
        while piece := self._response.read(size):
            self._watch.bytes += len(piece)
            yield piece
        self._watch.check()


@contextmanager
def asked(url: str, headers: dict[str, str]) -> Iterator[Answer]:
    """Ask for `url`. Raises OSError (urllib's HTTPError for an error that the server tells), HTTPException or
    ValueError for answers that make no sense."""
    watch = _Pace()
    try:
        opener = urllib.request.OpenerDirector()
        for handler in (
            urllib.request.ProxyHandler(),
            urllib.request.UnknownHandler(),
            urllib.request.HTTPDefaultErrorHandler(),
            urllib.request.HTTPErrorProcessor(),
            _Redirects(),
            _Web(watch),
        ):
            opener.add_handler(handler)
        with opener.open(urllib.request.Request(url, headers=headers), timeout=TIMEOUT) as response:
            yield Answer(response, watch)
    except (OSError, http.client.HTTPException, ValueError):
        watch.check()  # which tells why
        raise
    finally:
        watch.close()


class _Pace:
    """Ends a transfer that does not advance, by shutting its sockets down."""

    def __init__(self) -> None:
        self.bytes = 0
        self._sockets: list[socket.socket] = []
        self._slow, self._over = False, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        before = 0
        while not self._over.wait(PATIENCE):
            if self.bytes - before < LEAST:
                self._slow = True
                for each in self._sockets:
                    with suppress(OSError):
                        each.shutdown(socket.SHUT_RDWR)
            before = self.bytes

    def connect(self, *arguments: Any) -> socket.socket:
        """Connect as socket.create_connection does."""
        connected = socket.create_connection(*arguments)
        self._sockets.append(connected.dup())  # TLS takes the descriptor of the other
        if self._slow:
            connected.shutdown(socket.SHUT_RDWR)
        return connected

    def check(self) -> None:
        """Raise ConnectionError if the transfer was ended."""
        if self._slow:
            raise ConnectionError(f"the server is too slow: less than {LEAST:,} bytes in {PATIENCE:g} s")

    def close(self) -> None:
        self._over.set()
        self._thread.join()
        for each in self._sockets:
            each.close()


def _connection(
    kind: type[http.client.HTTPConnection], watch: _Pace, host: str, **options: Any
) -> http.client.HTTPConnection:
    connection = kind(host, **options)
    # It is watched from its beginning: a proxy's answer and the handshake of TLS may last for ever.
    connection._create_connection = watch.connect  # type: ignore[attr-defined]
    return connection


class _Web(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    """Asks over connections that are watched."""

    def __init__(self, watch: _Pace):
        super().__init__()
        self._watch = watch

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(partial(_connection, http.client.HTTPConnection, self._watch), req)

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(partial(_connection, http.client.HTTPSConnection, self._watch), req)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirections without reading what comes with them, which may have no end, and never out of TLS."""

    def redirect_request(self, req: Any, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str) -> Any:
        new = super().redirect_request(req, fp, code, msg, headers, newurl)
        if new is not None and req.type == "https" != new.type:
            raise urllib.error.HTTPError(newurl, code, f"{msg}: from https to {new.type}", headers, fp)
        return new

    def http_error_302(self, req: Any, fp: IO[bytes], code: int, msg: str, headers: Any) -> Any:
        fp.close()
        return super().http_error_302(req, io.BytesIO(), code, msg, headers)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302
