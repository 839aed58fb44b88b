"""Who may ask: API keys, addresses, ports, and the limits on a request's size.

The rule holds for every scope that an ASGI server knows, so that a WebSocket is checked like a request.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import ipaddress
import json
import socket
import ssl
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from pathlib import Path
from typing import Any

from omni_ray.observability.events import emit
from omni_ray.types.errors import ConfigError, ResourceError
from pipelines.serving.errors import ApiError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Asgi = Callable[[Scope, Receive, Send], Awaitable[None]]

MIN_KEY_CHARACTERS = 16
BACKLOG = 512
"""Connections that wait to be taken."""
KEY_PROTOCOL = "openai-insecure-api-key."
"""Browsers cannot set headers on a WebSocket: the key may come as a subprotocol with this prefix."""
OPEN_PATHS = frozenset({"/healthz"})
_BEARER, _BASIC = 'Bearer realm="omni-ray"', 'Basic realm="omni-ray", charset="UTF-8"'


def read_api_keys(path: Path) -> tuple[bytes, ...]:
    """Hashes of the keys of a file, one key a line; blank lines and lines that begin with # are left out.

    Raises:
        ConfigError: the file cannot be read, has no key, or a key is too short to be one.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise ConfigError(
            f"API key file {path} cannot be read ({reason}); name a text file with one key a line"
        ) from None
    keys = [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
    if not keys:
        raise ConfigError(
            f"API key file {path} holds no key; write one, for instance with: openssl rand -hex 32 > FILE"
        )
    for number, key in enumerate(keys, start=1):
        if len(key) < MIN_KEY_CHARACTERS:
            raise ConfigError(
                f"key {number} of API key file {path} has {len(key)} characters; use at least {MIN_KEY_CHARACTERS}, "
                "for instance from: openssl rand -hex 32"
            )
    return tuple(_hash(key.encode()) for key in keys)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches ``host``."""
    if host.lower() == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)


def check_address(host: str, api_key_file: Path | None) -> None:
    """Refuse to be reachable by others without a key.

    Raises:
        ConfigError: names the host and the mend.
    """
    if api_key_file is not None:
        read_api_keys(api_key_file)
    elif not is_loopback(host):
        raise ConfigError(
            f"host {host} is reachable by other machines, so it needs --api-key-file FILE (one key a line, "
            "for instance from: openssl rand -hex 32 > FILE); without a key only 127.0.0.1 is served"
        )


def check_tls(host: str, cert: Path | None, key: Path | None) -> dict[str, str]:
    """Options of the listener's TLS, none without files; warns where keys and voices would travel in the clear.

    Raises:
        ConfigError: one of the two files is missing, or they do not belong together.
    """
    if cert is None and key is None:
        if not is_loopback(host):
            emit(
                "no_tls",
                host=host,
                meaning="keys and voices travel in the clear, and browsers give no microphone",
                mend="--tls-cert FILE --tls-key FILE",
            )
        return {}
    if cert is None or key is None:
        raise ConfigError("--tls-cert and --tls-key belong together; give both")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"{cert} and {key} are no certificate with its key ({error}); give PEM files") from None
    return {"ssl_certfile": str(cert.resolve()), "ssl_keyfile": str(key.resolve())}


def check_port(host: str, port: int) -> int:
    """Make sure that ``port`` is free on ``host``; 0 finds a free one, which is returned.

    Raises:
        ResourceError: see :func:`listening_socket`.
    """
    with listening_socket(host, port) as probe:
        return int(probe.getsockname()[1])


def listening_socket(host: str, port: int) -> socket.socket:
    """A socket that listens there.

    Raises:
        ResourceError: the port is taken, or the host or port cannot be bound.
    """
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host.strip("[]"), port))
        listening.listen(BACKLOG)
    except (OSError, OverflowError) as error:
        listening.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise ResourceError(
            f"port {port} on {host} cannot be used ({reason}); stop what listens there, or choose another port"
        ) from None
    return listening


class Guard:
    """ASGI middleware: address, origin, key and body size, in that order, before anything else sees the request."""

    def __init__(self, app: Asgi, keys: tuple[bytes, ...], max_body_bytes: int) -> None:
        self.app, self.keys, self.max_body_bytes = app, keys, max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer it with the reason."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        refused = self.refusal(scope, headers)
        if refused is not None:
            await _refuse(scope, send, refused)
            return
        if scope["type"] == "http":
            receive = _Capped(receive, self.max_body_bytes)
        await self.app(scope, receive, send)

    def refusal(self, scope: Scope, headers: Mapping[str, str]) -> ApiError | None:
        """Why this request is not let in, or None."""
        path = scope.get("path", "")
        if path in OPEN_PATHS:
            return None
        host = headers.get("host", "")
        if not self.keys and not (_is_local(scope.get("client")) and is_loopback(_name(host))):
            return ApiError(403, "without an API key file this server answers only on its own machine, as localhost")
        origin = headers.get("origin")
        if origin is not None and origin.split("://", 1)[-1].lower() != host.lower():
            return ApiError(403, f"pages from {origin[:80]} may not use this server; open its own page")
        key = self.which(headers) if self.keys else 0
        scope["omni_ray.key"] = key
        if key is None:
            # A browser that opens the page is asked for a password, which is the key; browsers read one challenge only.
            challenge = _BASIC if "text/html" in headers.get("accept", "") else _BEARER
            return ApiError(
                401,
                "this server needs an API key; send the header Authorization: Bearer KEY, or give the key as password",
                code="invalid_api_key",
                headers={"www-authenticate": challenge},
            )
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > self.max_body_bytes:
            return too_large(self.max_body_bytes)
        return None

    def which(self, headers: Mapping[str, str]) -> int | None:
        """Number of the key that a request carries: in its header, or, as browsers must, in a subprotocol."""
        for name in headers.get("sec-websocket-protocol", "").split(","):
            if name.strip().startswith(KEY_PROTOCOL):
                return self._number(name.strip()[len(KEY_PROTOCOL) :].encode("utf-8", "replace"))
        given = self._given(headers.get("authorization", ""))
        return None if given is None else self._number(given)

    def _number(self, given: bytes) -> int | None:
        """Every key is compared, in constant time."""
        seen = _hash(given)
        same = [hmac.compare_digest(seen, key) for key in self.keys]
        return same.index(True) if any(same) else None

    @staticmethod
    def _given(authorization: str) -> bytes | None:
        scheme, _, credentials = authorization.partition(" ")
        given = credentials.strip().encode("utf-8", "replace")
        if scheme.lower() == "basic":  # what a browser sends for the page; any user name, the key as password
            try:
                given = base64.b64decode(given, validate=True).partition(b":")[2]
            except (binascii.Error, ValueError):
                return None
        elif scheme.lower() != "bearer":
            return None
        return given


class _Capped:
    """Counts a body as it arrives; a header may lie or be missing."""

    def __init__(self, receive: Receive, most: int) -> None:
        self.receive, self.most, self.seen = receive, most, 0

    async def __call__(self) -> MutableMapping[str, Any]:
        message = await self.receive()
        self.seen += len(message.get("body", b"") or b"")
        if self.seen > self.most:
            raise too_large(self.most)
        return message


def too_large(most: int) -> ApiError:
    """The 413 of a body above the cap."""
    return ApiError(413, f"the body is larger than {most / 2**20:g} MiB; send smaller media", code="request_too_large")


async def _refuse(scope: Scope, send: Send, error: ApiError) -> None:
    if scope["type"] == "websocket":  # a close before the accept is answered 403 on the handshake
        await send({"type": "websocket.close", "code": 1008, "reason": str(error)[:120]})
        return
    body = json.dumps(error.body).encode()
    fields = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
    headers = [(name.encode(), value.encode()) for name, value in fields.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _hash(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _is_local(client: Any) -> bool:
    return client is None or is_loopback(str(client[0]))


def _name(host: str) -> str:
    """Host header without its port."""
    return host[: host.rindex("]") + 1] if host.startswith("[") and "]" in host else host.partition(":")[0]
