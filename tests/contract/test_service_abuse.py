"""What the service does with clients that mean no good, or mean well and are broken: it refuses, cuts, and goes on.

All traffic stays on 127.0.0.1, and every loop is bounded.
"""

from __future__ import annotations

import contextlib
import resource
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from pagemgr.service import Server
from pagemgr.service import server as serving
from tests.serving import TOKEN, ask, make_cache, read, say, use

CONNECTIONS = 2_000
SHORT = 0.3


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    cache = make_cache(token=TOKEN)
    use(cache)
    with cache.serve() as server:
        yield server
        cache.manager.check()


@pytest.fixture(autouse=True)
def _still_there(server: Server) -> Iterator[None]:
    """Whatever was done to it, it answers the next."""
    yield
    assert ask(server, "/healthz")[::2] == (200, "ok\n")


def status(answer: bytes) -> int:
    head, _, _ = answer.partition(b"\r\n")
    return int(head.split()[1]) if head.startswith(b"HTTP/1.1 ") else 0


def get(path: bytes, *headers: bytes, host: bytes = b"127.0.0.1") -> bytes:
    return b"\r\n".join([b"GET " + path + b" HTTP/1.1", b"Host: " + host, b"Connection: close", *headers, b"", b""])


# Time ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "said", [b"", b"GET /healthz HT", b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: ", get(b"/ui")[:-2]]
)
def test_a_client_that_does_not_finish_is_cut(server: Server, monkeypatch: pytest.MonkeyPatch, said: bytes) -> None:
    monkeypatch.setattr(serving, "CONNECTION_SECONDS", SHORT)
    started = time.monotonic()
    assert say(server, said) == b""
    assert SHORT / 2 < time.monotonic() - started < 5


def test_a_byte_now_and_then_buys_no_time(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "CONNECTION_SECONDS", SHORT)
    started = time.monotonic()
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as client:
        client.sendall(b"GET /healthz HTTP/1.1\r\n")
        with contextlib.suppress(ConnectionError):
            while time.monotonic() - started < 5:
                client.sendall(b"X: y\r\n")
                time.sleep(SHORT / 10)
    assert time.monotonic() - started < 4


def test_a_client_that_does_not_read_is_cut(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "CONNECTION_SECONDS", SHORT)
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.settimeout(5)
    with client:
        client.connect(("127.0.0.1", server.port))
        client.sendall(get(b"/ui").replace(b"Connection: close\r\n", b"") * 100)
        time.sleep(2 * SHORT)
        assert len(read(client)) < 100 * len(ask(server, "/ui")[2]) / 2  # what was under way, and no more


def test_idle_connections_are_cut_too_but_serve_several_requests_before(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "CONNECTION_SECONDS", SHORT)
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as client:
        for _ in range(5):
            client.sendall(b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            answer = b""
            while not answer.endswith(b"ok\n"):
                answer += client.recv(4096)
            time.sleep(SHORT / 2)
        assert read(client) == b""


# Size ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [b"GET", b"POST", b"PUT"])
@pytest.mark.parametrize(
    "length", [b"Content-Length: 1", b"Content-Length: 1000000000000", b"Transfer-Encoding: chunked"]
)
def test_a_body_is_refused_before_it_is_read(server: Server, method: bytes, length: bytes) -> None:
    started = time.monotonic()
    request = method + b" /api/v1/check HTTP/1.1\r\nHost: 127.0.0.1\r\n" + length + b"\r\n\r\n"
    answer = say(server, request)
    assert status(answer) == 413
    assert b"connection: close" in answer
    assert time.monotonic() - started < 2


def test_a_body_that_comes_all_the_same_is_not_kept(server: Server) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    part, sent = b"x" * (1 << 20), 0
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as client:
        client.sendall(b"POST /api/v1/dump HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1073741824\r\n\r\n")
        try:
            for _ in range(1024):
                client.sendall(part)
                sent += len(part)
        except OSError:
            pass  # cut, as it should be
    assert sent < 64 << 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB


@pytest.mark.parametrize(
    "said",
    [
        get(b"/" + b"a" * 20_000),
        get(b"/ui", b"X-Long: " + b"a" * 20_000),
        get(b"/ui", *(b"X-%d: y" % i for i in range(5_000))),
    ],
    ids=["line", "header", "headers"],
)
def test_long_heads_are_refused(server: Server, said: bytes) -> None:
    answer = say(server, said)
    assert status(answer) in (0, 400, 431)  # cut while it still sends, or told
    assert b"<title>" not in answer


# Connections --------------------------------------------------------------------------------------------------------


def test_thousands_of_connections_leave_the_process_its_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a server of its own: what the kernel still has of them arrives for seconds after they are closed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < CONNECTIONS + 512:
        pytest.skip(f"needs {CONNECTIONS + 512} file descriptors, the limit is {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, CONNECTIONS + 512), hard))
    monkeypatch.setattr(serving, "CONNECTION_SECONDS", 60.0)
    clients, counts, server = [], [0], make_cache().serve()
    connections = server._server.server_state.connections
    try:
        for _ in range(CONNECTIONS):
            client = socket.socket()
            client.setblocking(False)  # more than may wait are tried again by the kernel, and not waited for here
            client.connect_ex(("127.0.0.1", server.port))
            clients.append(client)
            counts.append(len(connections))
        deadline = time.monotonic() + 20
        while (counts[-1] > serving.MOST_CONNECTIONS or len(counts) < CONNECTIONS + 50) and time.monotonic() < deadline:
            time.sleep(0.02)
            counts.append(len(connections))
        assert 0 < counts[-1] <= serving.MOST_CONNECTIONS  # while all are still open at the other end
        assert max(counts) <= serving.MOST_CONNECTIONS + 2 * serving.BACKLOG
    finally:
        for client in clients:
            client.close()
        server.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_many_requests_at_once_are_all_answered(server: Server) -> None:
    answers = []

    def client() -> None:
        answers.extend(ask(server, path)[0] for path in ("/api/v1/stats", "/metrics", "/api/v1/blocks"))

    crowd = [threading.Thread(target=client) for _ in range(30)]
    for one in crowd:
        one.start()
    for one in crowd:
        one.join()
    assert answers == [200] * 90


# Nonsense -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        b"/../etc/passwd",
        b"/ui/../../etc/passwd",
        b"/%2e%2e/%2e%2e/etc/passwd",
        b"/ui/..%2f..%2fetc/passwd",
        b"//etc/passwd",
        b"//127.0.0.1:1/ui",
        b"/ui/",
        b"/ui%00.html",
        b"/page.css",
        b"/service/page/page.html",
        b"/api/v1/",
        b"/api/v1/../../ui",
        b"/api/v1/take",
        b"/api/v1/__class__",
        b"/%ff%fe",
        b"/\\..\\..\\windows",
        b"/ui;a=b",
    ],
)
def test_paths_lead_nowhere_else(server: Server, path: bytes) -> None:
    answer = say(server, get(path))
    assert status(answer) == 404, answer[:200]
    assert b"location:" not in answer
    assert b"root:" not in answer


@pytest.mark.parametrize(
    "said",
    [
        b"\xff\xfe\xfd\r\n\r\n",
        get(b"/\xc3\x28"),
        get(b"/ui", b"X-\xff: y"),
        b"GET /ui\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64) + b"\r\n\r\n",
        b"GET /ui HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"GET /ui HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: -1\r\n\r\n",
        b"GET /ui HTTP/1.1\r\n\r\n",
    ],
    ids=["bytes", "path", "name", "old", "tls", "lengths", "negative", "no host"],
)
def test_what_is_not_http_is_refused(server: Server, said: bytes) -> None:
    assert status(say(server, said, seconds=3)) == 400


@pytest.mark.parametrize(
    ("said", "code"),
    [
        (get(b"/api/v1/blocks?cells=%ff"), 400),
        (get(b"/api/v1/blocks?%ff%fe=%00&cells=4"), 200),
        (get(b"/metrics?name[]=%ff"), 200),
        (get(b"/metrics", b"Accept: \xff\xfe, text/plain; version=\xff"), 200),
        (get(b"/metrics", b"Accept: application/openmetrics-text; version=nonsense"), 200),
        (get(b"/ui", b"X-Name: \xff\xfe"), 200),
        (get(b"/ui", b"Upgrade: websocket", b"Connection: Upgrade"), 200),
    ],
)
def test_bad_text_in_good_requests_does_no_harm(server: Server, said: bytes, code: int) -> None:
    assert status(say(server, said)) == code


def test_a_token_of_bad_text_is_a_wrong_token(server: Server) -> None:
    request = get(b"/api/v1/check", b"Authorization: Bearer \xff\xfe\x80").replace(b"GET", b"POST", 1)
    assert status(say(server, request)) == 401


# A page on the web that points its name at this machine -----------------------------------------------------------


@pytest.mark.parametrize(
    "host", [b"evil.example", b"evil.example:8620", b"127.0.0.1.evil.example", b"", b"[::1", b"a@127.0.0.1"]
)
def test_other_names_are_not_answered(server: Server, host: bytes) -> None:
    assert status(say(server, get(b"/api/v1/stats", host=host))) == 400


@pytest.mark.parametrize("host", [b"127.0.0.1", b"localhost:8620", b"LOCALHOST", b"[::1]:8620"])
def test_names_of_this_machine_are(server: Server, host: bytes) -> None:
    assert status(say(server, get(b"/api/v1/stats", host=host))) == 200


def test_every_answer_forbids_what_it_does_not_need(server: Server) -> None:
    for path in ("/ui", "/", "/metrics", "/healthz", "/readyz", "/api/v1/stats", "/api/v1/blocks?cells=x", "/nothing"):
        _, headers, _ = ask(server, path)
        assert headers["content-security-policy"].startswith("default-src 'none'")
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"
        assert "access-control-allow-origin" not in headers
        assert "server" not in headers
    policy = ask(server, "/ui")[1]["content-security-policy"]
    assert "unsafe" not in policy
    assert "http" not in policy


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
def test_what_is_read_cannot_be_written(server: Server, method: str) -> None:
    for path in ("/api/v1/stats", "/api/v1/config", "/ui", "/metrics"):
        assert ask(server, path, method)[0] == 405
