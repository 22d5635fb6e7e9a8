"""Answers of a broken or hostile server: `data fetch` tries the next address, or says in one line what is wrong, after
seconds and not for ever, without much memory, and leaves nothing but the beginning of a download."""

from __future__ import annotations

import hashlib
import itertools
import resource
import socketserver
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nettorrent_mpi.data import http_answer
from nettorrent_mpi.data.fetch import Download, Recipe, fetch
from nettorrent_mpi.plan.errors import DataError

CONTENT = bytes(range(256)) * 20
MOST = 1 << 20  # bytes that the file has at most
OK, FOUND, CLOSE = b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 302 Found\r\n", b"Connection: close\r\n"


def endless(piece: bytes) -> Iterator[bytes]:
    return itertools.repeat(piece * (1 << 16))


def slowly(piece: bytes) -> Iterator[bytes]:
    while True:
        yield piece
        time.sleep(0.05)


def to(address: bytes, more: Iterator[bytes] | tuple[()] = ()) -> Iterator[bytes]:
    return itertools.chain([FOUND + CLOSE + b"Location: " + address + b"\r\n\r\n"], more)


def chunked(text: bytes, more: Iterator[bytes] | tuple[()] = ()) -> Iterator[bytes]:
    return itertools.chain([OK + b"Transfer-Encoding: chunked\r\n\r\n" + text], more)


def length(text: bytes, body: bytes = CONTENT) -> list[bytes]:
    return [OK + CLOSE + b"Content-Length: " + text + b"\r\n\r\n" + body]


def body(*pieces: bytes) -> list[bytes]:
    return [OK + CLOSE + b"\r\n", *pieces]


# What the server sends, and what the error says of it; None: the file itself comes.
ANSWERS: dict[str, tuple[Callable[[], Iterator[bytes] | list[bytes]], str | None]] = {
    # redirections
    "to a file": (lambda: to(b"file:///etc/passwd"), "302"),
    "to a file of a host": (lambda: to(b"file://localhost/etc/passwd"), "302"),
    "to ftp": (lambda: to(b"ftp://127.0.0.1:1/x"), "unknown url type: ftp"),
    "to data": (lambda: to(b"data:text/plain,x"), "302"),
    "to gopher": (lambda: to(b"gopher://127.0.0.1/x"), "302"),
    "to a scheme in capitals": (lambda: to(b"FILE:///etc/passwd"), "302"),
    "to jar": (lambda: to(b"jar:file:///x!/y"), "302"),
    "to itself": (lambda: to(b"/to%20itself"), "infinite loop|302"),
    "to no host": (lambda: to(b"http:///x"), "404"),
    "to half an address": (lambda: to(b"http://[::1/x"), "IPv6|URL"),
    "to a host that is none": (lambda: to(b"http://.\xc3\xa4./x"), ""),
    "to a port that is none": (lambda: to(b"http://127.0.0.1:99999999/x"), ""),
    "to a port of letters": (lambda: to(b"http://127.0.0.1:abc/x"), "nonnumeric port|302"),
    "to spaces and controls": (lambda: to(b"http://127.0.0.1:1/a b\x01\x7f"), ""),
    "to a user's password": (lambda: to(b"http://user:word@127.0.0.1:1/"), ""),
    "to nowhere": (lambda: [FOUND + CLOSE + b"\r\n"], "302"),
    "to an endless address": (lambda: itertools.chain([FOUND + b"Location: http://"], endless(b"a")), "header line"),
    "with an endless body": (lambda: to(b"/missing", endless(b"x")), "404"),
    "with a slow body": (lambda: to(b"/missing", slowly(b"x")), "404"),
    # status lines and headers
    "nothing": (list, "without response|closed"),
    "no HTTP": (lambda: [b"SSH-2.0-OpenSSH_9.6\r\n"], "SSH-2.0"),
    "an empty line": (lambda: [b"\r\n" + CONTENT], ""),
    "HTTP 9": (lambda: [b"HTTP/9.9 200 OK\r\n\r\n" + CONTENT], "HTTP/9.9"),
    "a status of letters": (lambda: [b"HTTP/1.1 abc OK\r\n\r\n"], "abc"),
    "a status too high": (lambda: [b"HTTP/1.1 99999 OK\r\n\r\n"], "99999"),
    "a status below all": (lambda: [b"HTTP/1.1 -200 OK\r\n\r\n"], "-200"),
    "an endless status line": (lambda: itertools.chain([b"HTTP/1.1 200 "], endless(b"a")), "status line"),
    "endless headers": (lambda: itertools.chain([OK], endless(b"a: b\r\n")), "100 headers"),
    "an endless header": (lambda: itertools.chain([OK + b"a: "], endless(b"a")), "header line"),
    "a header without a colon": (lambda: [OK + CLOSE + b"abc\r\n\r\n" + CONTENT], None),
    "headers in other bytes": (lambda: [OK + CLOSE + b"\xff\xfe: \x00\r\n\r\n" + CONTENT], None),
    "continue for ever": (lambda: endless(b"HTTP/1.1 100 Continue\r\n\r\n"), "too slow"),
    "continue slowly": (lambda: slowly(b"HTTP/1.1 100 Continue\r\n\r\n"), "too slow"),
    "a slow status line": (lambda: itertools.chain([b"HTTP/1.1 200 "], slowly(b"a")), "too slow"),
    "slow headers": (lambda: itertools.chain([OK], slowly(b"a: b\r\n")), "too slow|100 headers"),
    "an error with escapes": (lambda: [b"HTTP/1.1 500 \x1b[2J\x1b]0;x\x07\r\n\r\n"], "500"),
    "an error of many words": (lambda: [b"HTTP/1.1 500 " + b"word " * 10_000 + b"\r\n\r\n"], "500"),
    "an error with an endless body": (lambda: itertools.chain([b"HTTP/1.1 500 No\r\n\r\n"], endless(b"x")), "500"),
    "a password is asked for": (lambda: [b"HTTP/1.1 401 No\r\nWWW-Authenticate: Basic realm=x\r\n\r\n"], "401"),
    "no content": (lambda: [b"HTTP/1.1 204 No Content\r\n\r\n"], "SHA-256"),
    "not modified": (lambda: [b"HTTP/1.1 304 Not Modified\r\n\r\n"], "304"),
    "another protocol": (lambda: [b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n"], "101"),
    "a part that nobody wanted": (lambda: [b"HTTP/1.1 206 Partial Content\r\n" + CLOSE + b"\r\n" + CONTENT], None),
    # lengths
    "the right length": (lambda: length(b"%d" % len(CONTENT)), None),
    "no length": (lambda: body(CONTENT), None),
    "a length of letters": (lambda: length(b"abc"), "abc"),
    "a length below zero": (lambda: length(b"-5"), None),
    "a length of a gigabyte": (lambda: length(b"1073741824"), "ended after|bytes read"),
    "a length of 400 digits": (lambda: length(b"9" * 400), ""),
    "a length of 5,000 digits": (lambda: length(b"9" * 5000), "digits"),
    "a length too short": (lambda: length(b"100"), "SHA-256"),
    "a length with a plus": (lambda: length(b"+5120"), None),
    "two lengths": (lambda: length(b"%d\r\nContent-Length: 7" % len(CONTENT)), None),
    "no length where it is empty": (lambda: length(b""), ""),
    # bodies
    "endless": (lambda: itertools.chain(body(), endless(b"x")), "more than"),
    "a byte now and then": (lambda: itertools.chain(body(), slowly(b"x")), "too slow"),
    "other bytes": (lambda: body(CONTENT[::-1]), "SHA-256"),
    "one byte more": (lambda: body(CONTENT, b"x"), "SHA-256"),
    "nothing in it": (body, "SHA-256"),
    "packed": (lambda: [OK + CLOSE + b"Content-Encoding: gzip\r\n\r\n" + CONTENT[::-1]], "SHA-256"),
    # chunks
    "chunks": (lambda: chunked(b"1400\r\n" + CONTENT + b"\r\n0\r\n\r\n"), None),
    "a chunk below zero": (lambda: chunked(b"-5\r\nhello\r\n0\r\n\r\n"), "read length|bytes read|-5"),
    "a chunk of letters": (lambda: chunked(b"xyz\r\n"), "bytes read|xyz"),
    "a chunk too large": (lambda: chunked(b"f" * 30 + b"\r\nabc"), ""),
    "an endless chunk size": (lambda: chunked(b"", endless(b"1")), "chunk size"),
    "endless chunks": (lambda: chunked(b"", endless(b"1\r\nx\r\n")), "too slow|more than"),
    "endless trailers": (lambda: chunked(b"1400\r\n" + CONTENT + b"\r\n0\r\n", endless(b"a: b\r\n")), "too slow"),
    "slow trailers": (lambda: chunked(b"1400\r\n" + CONTENT + b"\r\n0\r\n", slowly(b"a: b\r\n")), "too slow"),
    "chunks that end early": (lambda: chunked(b"1400\r\nabc"), "bytes read"),
}  # fmt: skip


class Handler(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        request = self.rfile.readline(65536).split()
        name = request[1].decode().strip("/").replace("%20", " ") if len(request) > 1 else ""
        while self.rfile.readline(65536).strip():
            pass
        make = ANSWERS[name][0] if name in ANSWERS else lambda: [b"HTTP/1.1 404 Not Found\r\n\r\n"]
        try:
            for piece in body(CONTENT) if name == "mirror" else make():
                self.wfile.write(piece)
        except (OSError, ssl.SSLError):
            return  # the client has left


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    socketserver.ThreadingTCPServer.daemon_threads = True
    listener = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield f"http://127.0.0.1:{listener.server_address[1]}"
    listener.shutdown()
    listener.server_close()


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(name, marks=pytest.mark.slow if "too slow" in (text or "") else ())
        for name, (_, text) in ANSWERS.items()
    ],
)
def test_answers(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
    monkeypatch.setattr(http_answer, "PATIENCE", 0.4)
    monkeypatch.setattr(http_answer, "LEAST", MOST)
    monkeypatch.setattr(http_answer, "TIMEOUT", 5.0)
    hostile, mirror = f"{server}/{answer.replace(' ', '%20')}", f"{server}/mirror"
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    problem = ANSWERS[answer][1]

    def get(folder: str, *urls: str) -> dict[str, bytes]:
        """Fetch a file that is no data set; return what is there then."""
        download = Download("file", urls, hashlib.sha256(CONTENT).hexdigest(), MOST)
        fetch("mnist", tmp_path / folder, recipes={"mnist": Recipe("mnist", (download,))})
        return {path.name: path.read_bytes() for path in (tmp_path / folder / "mnist").iterdir()}

    assert get("both", hostile, mirror) == {"file": CONTENT}
    if problem is None:
        assert get("alone", hostile) == {"file": CONTENT}
    else:
        with pytest.raises(DataError, match=f"(?s)could not be downloaded.*({problem})") as caught:
            get("alone", hostile)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 1500
        assert {path.name for path in (tmp_path / "alone" / "mnist").iterdir()} <= {"file.part"}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 100_000  # kB
