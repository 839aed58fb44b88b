"""Who is let in: keys, addresses, origins, sizes, for requests and WebSockets from one table."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
from pathlib import Path
from typing import Any

import pytest

from omni_ray.types.errors import ConfigError, ResourceError
from pipelines.serving.errors import ApiError
from pipelines.serving.guard import Guard, check_address, check_port, check_tls, is_loopback, read_api_keys

KEY = "a-key-of-enough-characters"
LOCAL = {"host": "127.0.0.1:8000"}


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(f"# team a\n{KEY}\n\nanother-key-of-enough-characters\n")
    return path


def visit(
    keys: tuple[bytes, ...],
    headers: dict[str, str],
    path: str = "/v1/models",
    client: str = "127.0.0.1",
    kind: str = "http",
    body: bytes = b"",
) -> tuple[bool, list[dict[str, Any]]]:
    """Whether the application behind the guard was reached, and what was sent."""
    sent: list[dict[str, Any]] = []
    reached: list[bytes] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        reached.append(message.get("body", b""))

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        sent.append(dict(message))

    scope = {
        "type": kind,
        "path": path,
        "client": (client, 5),
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
    }
    asyncio.run(Guard(app, keys, max_body_bytes=10)(scope, receive, send))
    return bool(reached), sent


def basic(text: str) -> str:
    return "Basic " + base64.b64encode(text.encode()).decode()


@pytest.mark.parametrize("kind", ["http", "websocket"])
@pytest.mark.parametrize(
    ("authorization", "path", "let_in"),
    [
        (f"Bearer {KEY}", "/v1/models", True),
        (f"bearer {KEY}", "/", True),
        ("Bearer another-key-of-enough-characters", "/v1/chat/completions", True),
        (basic(f"me:{KEY}"), "/", True),
        (f"Bearer {KEY[:-1]}", "/v1/models", False),
        (f"Bearer {KEY}x", "/v1/models", False),
        ("Bearer ", "/v1/models", False),
        ("Bearer # team a", "/v1/models", False),
        (KEY, "/v1/models", False),
        (basic("me:wrong"), "/", False),
        ("Basic !!!", "/", False),
        (None, "/v1/models", False),
        (None, "/", False),
        (None, "/readyz", False),
        (None, "/openapi.json", False),
        (None, "/v1/realtime", False),
        (None, "/healthz/../v1/models", False),
        (None, "/healthz", True),
    ],
)
def test_a_key_opens_every_path(key_file: Path, kind: str, authorization: str | None, path: str, let_in: bool) -> None:
    headers = {"host": "example.org"} | ({"authorization": authorization} if authorization is not None else {})
    reached, sent = visit(read_api_keys(key_file), headers, path, client="10.0.0.9", kind=kind)
    assert reached == let_in
    if not let_in and kind == "websocket":
        assert sent[0] == {"type": "websocket.close", "code": 1008, "reason": sent[0]["reason"]}
    elif not let_in:
        assert sent[0]["status"] == 401
        assert (b"www-authenticate", b'Bearer realm="omni-ray"') in sent[0]["headers"]
        assert json.loads(sent[1]["body"])["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize(
    ("offered", "let_in"),
    [
        (f"realtime, openai-insecure-api-key.{KEY}", True),
        (f"openai-insecure-api-key.{KEY}, openai-beta.realtime-v1", True),
        ("realtime, openai-insecure-api-key.wrong-wrong-wrong", False),
        ("realtime", False),
    ],
)
def test_a_browser_may_send_the_key_as_a_subprotocol(key_file: Path, offered: str, let_in: bool) -> None:
    headers = {"host": "example.org", "sec-websocket-protocol": offered}
    assert visit(read_api_keys(key_file), headers, "/v1/realtime", client="10.0.0.9", kind="websocket")[0] == let_in


def test_tls_files_belong_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    some = tmp_path / "some.pem"
    some.write_text("no certificate")
    with pytest.raises(ConfigError, match=r"^--tls-cert and --tls-key belong together; give both$"):
        check_tls("0.0.0.0", some, None)
    with pytest.raises(ConfigError, match="are no certificate with its key"):
        check_tls("0.0.0.0", some, some)
    assert check_tls("127.0.0.1", None, None) == {}
    assert "no_tls" not in capsys.readouterr().err
    assert check_tls("0.0.0.0", None, None) == {}
    assert "no_tls" in capsys.readouterr().err


def test_a_browser_is_asked_for_a_password(key_file: Path) -> None:
    _, sent = visit(read_api_keys(key_file), {"accept": "text/html,*/*"}, "/")
    assert (b"www-authenticate", b'Basic realm="omni-ray", charset="UTF-8"') in sent[0]["headers"]


@pytest.mark.parametrize(
    ("headers", "client", "let_in"),
    [
        (LOCAL, "127.0.0.1", True),
        ({"host": "localhost"}, "::1", True),
        ({"host": "[::1]:8000"}, "::ffff:127.0.0.1", True),
        (LOCAL, "10.0.0.9", False),
        ({"host": "evil.example:8000"}, "127.0.0.1", False),
        ({}, "127.0.0.1", False),
        (LOCAL | {"origin": "http://127.0.0.1:8000"}, "127.0.0.1", True),
        (LOCAL | {"origin": "http://127.0.0.1:9999"}, "127.0.0.1", False),
        (LOCAL | {"origin": "https://evil.example"}, "127.0.0.1", False),
        (LOCAL | {"origin": "null"}, "127.0.0.1", False),
    ],
)
def test_without_a_key_only_this_machine_is_answered(headers: dict[str, str], client: str, let_in: bool) -> None:
    reached, sent = visit((), headers, client=client)
    assert reached == let_in
    if not let_in:
        assert sent[0]["status"] == 403


def test_a_body_above_the_cap_is_refused_by_its_header_and_by_its_bytes() -> None:
    reached, sent = visit((), LOCAL | {"content-length": "11"})
    assert not reached
    assert sent[0]["status"] == 413
    with pytest.raises(ApiError, match=r"^the body is larger than"):
        visit((), LOCAL | {"content-length": "5"}, body=b"x" * 11)
    assert visit((), LOCAL, body=b"x" * 10)[0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no key; write one, for instance with: openssl rand -hex 32"),
        ("# only a remark\n", "holds no key"),
        ("short\n", "key 1 of API key file .* has 5 characters; use at least 16"),
    ],
)
def test_key_files_that_are_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_api_keys(path)
    with pytest.raises(ConfigError, match=r"missing cannot be read \(No such file or directory\)"):
        read_api_keys(tmp_path / "missing")


def test_another_host_needs_a_key(key_file: Path) -> None:
    for host in ("127.0.0.1", "localhost", "::1", "127.8.8.8"):
        check_address(host, None)
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org"):
        assert not is_loopback(host)
        with pytest.raises(ConfigError, match=rf"^host {host} is reachable by other machines, so it needs --api-key"):
            check_address(host, None)
        check_address(host, key_file)


def test_a_port_in_use_is_one_clear_sentence() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        port = taken.getsockname()[1]
        with pytest.raises(
            ResourceError, match=rf"^port {port} on 127.0.0.1 cannot be used \(Address already in use\)"
        ):
            check_port("127.0.0.1", port)
    assert check_port("127.0.0.1", 0) > 0
    with pytest.raises(ResourceError, match=r"^port 70000 on 127.0.0.1 cannot be used"):
        check_port("127.0.0.1", 70000)
