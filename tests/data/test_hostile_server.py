"""Answers of a broken or hostile server: `data fetch` tries the next address, or says in one line what is wrong, after
seconds and not for ever, without much memory, and leaves nothing but the beginning of a download."""

from __future__ import annotations

import contextlib
import email.message
import hashlib
import io
import itertools
import resource
import socketserver
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nettorrent_mpi.data import http_answer
from nettorrent_mpi.data.fetch import fetch
from nettorrent_mpi.data.recipes import Download, Recipe
from nettorrent_mpi.plan.errors import DataError

CONTENT = bytes(range(256)) * 20
LONG = CONTENT * 50
MOST = 1 << 20  # bytes that the file has at most
NUMBERS = itertools.count()
OK, FOUND, CLOSE = b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 302 Found\r\n", b"Connection: close\r\n"


def endless(piece: bytes) -> Iterator[bytes]:
    return itertools.repeat(piece * (1 << 16))


def slowly(piece: bytes) -> Iterator[bytes]:
    while True:
        yield piece
        time.sleep(0.05)


def to(address: bytes, more: Iterator[bytes] | tuple[()] = ()) -> Iterator[bytes]:
    return itertools.chain([FOUND + CLOSE + b"Location: " + address + b"\r\n\r\n"], more)


def chunked(text: bytes, more: Iterator[bytes] | tuple[()] = (), length: bytes = b"") -> Iterator[bytes]:
    told = b"Content-Length: " + length + b"\r\n" if length else b""
    return itertools.chain([OK + told + b"Transfer-Encoding: chunked\r\n\r\n" + text], more)


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
    "to ever other addresses": (lambda: to(b"/to%%20ever%%20other%%20addresses?%d" % next(NUMBERS)), "infinite loop"),
    "to no IPv6 address": (lambda: to(b"http://[:::::1]/"), "IPv4 or IPv6"),
    "to a host with a null": (lambda: to(b"http://127.0.0.1%00.x/"), "control characters"),
    "to a host of 60,000 letters": (lambda: to(b"http://" + b"a" * 60_000 + b"/"), "idna"),
    "to nowhere": (lambda: [FOUND + CLOSE + b"\r\n"], "302"),
    "to an endless address": (lambda: itertools.chain([FOUND + b"Location: http://"], endless(b"a")), "header line"),
    "with an endless body": (lambda: to(b"/missing", endless(b"x")), "404"),
    "with a slow body": (lambda: to(b"/missing", slowly(b"x")), "404"),
    # status lines and headers
    "nothing": (list, "without response|closed"),
    "the file alone, as HTTP 0.9": (lambda: [CONTENT], ""),
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
    "a length of letters": (lambda: length(b"abc"), None),
    "a length below zero": (lambda: length(b"-5"), None),
    "a length of a megabyte": (lambda: length(b"1048576"), "ended after"),
    "a length of a gigabyte": (lambda: length(b"1073741824"), "more than"),
    "a length of 400 digits": (lambda: length(b"9" * 400), "more than"),
    "a length of 5,000 digits": (lambda: length(b"9" * 5000), None),
    "a length too short": (lambda: length(b"100"), "SHA-256"),
    "a length with a plus": (lambda: length(b"+5120"), None),
    "two lengths": (lambda: length(b"%d\r\nContent-Length: 7" % len(CONTENT)), None),
    "no length where it is empty": (lambda: length(b""), None),
    # bodies
    "endless": (lambda: itertools.chain(body(), endless(b"x")), "more than"),
    "a byte now and then": (lambda: itertools.chain(body(), slowly(b"x")), "too slow"),
    "other bytes": (lambda: body(CONTENT[::-1]), "SHA-256"),
    "one byte more": (lambda: body(CONTENT, b"x"), "SHA-256"),
    "nothing in it": (body, "SHA-256"),
    "the beginning of another file": (lambda: length(b"5120", CONTENT[::-1][:100]), "ended after"),
    "packed": (lambda: [OK + CLOSE + b"Content-Encoding: gzip\r\n\r\n" + CONTENT[::-1]], "SHA-256"),
    # chunks
    "chunks": (lambda: chunked(b"1400\r\n" + CONTENT + b"\r\n0\r\n\r\n"), None),
    "chunks and no length": (lambda: chunked(b"1400\r\n" + CONTENT + b"\r\n0\r\n\r\n", length=b"0"), None),
    "chunks and a length": (lambda: chunked(b"1400\r\n" + CONTENT + b"\r\n0\r\n\r\n", length=b"9" * 400), None),
    "a chunk with many words": (
        lambda: chunked(b"1400;" + b"x" * 60_000 + b"\r\n" + CONTENT + b"\r\n0\r\n\r\n"), None),
    "a chunk below zero": (lambda: chunked(b"-5\r\nhello\r\n0\r\n\r\n"), "read length|bytes read|-5"),
    "a chunk of letters": (lambda: chunked(b"xyz\r\n"), "bytes read|xyz"),
    "a chunk too large": (lambda: chunked(b"f" * 30 + b"\r\nabc"), ""),
    "an endless chunk size": (lambda: chunked(b"", endless(b"1")), "chunk size"),
    "endless chunks": (lambda: chunked(b"", endless(b"1\r\nx\r\n")), "too slow|more than"),
    "endless trailers": (lambda: chunked(b"1400\r\n" + CONTENT + b"\r\n0\r\n", endless(b"a: b\r\n")), "too slow"),
    "slow trailers": (lambda: chunked(b"1400\r\n" + CONTENT + b"\r\n0\r\n", slowly(b"a: b\r\n")), "too slow"),
    "chunks that end early": (lambda: chunked(b"1400\r\nabc"), "bytes read"),
}  # fmt: skip


def mirrored(start: int) -> list[bytes]:
    """Answer as a good server does, which knows ranges."""
    if start >= len(CONTENT):
        return [b"HTTP/1.1 416 Range Not Satisfiable\r\n\r\n"]
    head = b"HTTP/1.1 206 Partial Content\r\n" if start else OK
    return [head + CLOSE + b"Content-Length: %d\r\n\r\n" % (len(CONTENT) - start) + CONTENT[start:]]


def steadily() -> Iterator[bytes]:
    yield from length(b"%d" % len(LONG), b"")
    for at in range(0, len(LONG), 2000):
        yield LONG[at : at + 2000]
        time.sleep(0.02)


class Handler(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        request = self.rfile.readline(65536).split()
        name = request[1].decode().strip("/").partition("?")[0].replace("%20", " ") if len(request) > 1 else ""
        start = 0
        while line := self.rfile.readline(65536).strip():
            if line.startswith(b"Range: bytes="):
                start = int(line[13:-1])
        make = ANSWERS[name][0] if name in ANSWERS else lambda: [b"HTTP/1.1 404 Not Found\r\n\r\n"]
        try:
            for piece in mirrored(start) if name == "mirror" else steadily() if name == "steady" else make():
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


def shown(name: str, done: int, total: int | None) -> None:
    """Progress is told of what can be: whoever shows it divides by these numbers."""
    assert 0 < done <= MOST
    assert total is None or done <= total <= MOST


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
        fetch("mnist", tmp_path / folder, shown, recipes={"mnist": Recipe("mnist", (download,))})
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


@pytest.mark.slow
def test_a_slow_server_that_advances_is_not_left(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_answer, "PATIENCE", 1.0)  # in which about 100,000 bytes come
    monkeypatch.setattr(http_answer, "LEAST", 5_000)
    download = Download("file", (f"{server}/steady",), hashlib.sha256(LONG).hexdigest(), MOST)
    fetch("mnist", tmp_path, recipes={"mnist": Recipe("mnist", (download,))})
    assert (tmp_path / "mnist" / "file").read_bytes() == LONG


def test_no_redirection_leads_out_of_tls() -> None:
    request = urllib.request.Request("https://example.org/x")
    for url, follows in (("https://example.com/y", True), ("http://example.org/x", False)):
        headers = email.message.Message()
        arguments = (request, io.BytesIO(), 302, "Found", headers, url)
        if follows:
            assert http_answer._Redirects().redirect_request(*arguments).full_url == url
        else:
            with pytest.raises(urllib.error.HTTPError, match="from https to http"):
                http_answer._Redirects().redirect_request(*arguments)


class Proxy(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        while self.rfile.readline(65536).strip():
            pass
        with contextlib.suppress(OSError):
            for piece in itertools.chain([OK], endless(b"a: b\r\n")):
                self.wfile.write(piece)


def test_a_proxy_may_be_slow_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its answer comes before the server's, and before TLS."""
    monkeypatch.setattr(http_answer, "PATIENCE", 0.4)
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Proxy) as listener:
        threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{listener.server_address[1]}")
        download = Download("file", ("https://example.org/x",), "0" * 64, MOST)
        with pytest.raises(DataError, match="the server is too slow"):
            fetch("mnist", tmp_path, recipes={"mnist": Recipe("mnist", (download,))})
        listener.shutdown()
