"""The one place that fetches media from elsewhere; off unless a host is allowed, and then never into a private network.

The name is resolved once, every address it has must be public, and the connection is made to that very address, so that
a name cannot answer differently a moment later.  Redirects are followed by the same rules, a few times.
"""

from __future__ import annotations

import http.client
import ipaddress
import re
import socket
import ssl
import time
from collections.abc import Callable
from urllib.parse import SplitResult, urljoin, urlsplit

from omni_ray.config.serving import FetchConfig
from pipelines.serving.errors import ApiError, bad_request

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str, int], list[str]]
PORTS = {"http": 80, "https": 443}
MOST_REDIRECTS = 3
MOST_URL = 2048
_HOST = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*|[0-9a-f:.]*:[0-9a-f:.]*")
"""A name in ASCII (others as ``xn--...``) or an address."""
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def fetch(url: str, where: str, config: FetchConfig, resolve: Resolve | None = None) -> bytes:
    """The bytes behind an address.

    Args:
        url: http or https.  where: The part, for the error.  config: What is allowed.
        resolve: (host, port) to addresses; the system's by default.
    Raises:
        ApiError: 400, names the part: an address that may not be fetched, or one that gives nothing usable in time.
    """
    end = time.monotonic() + config.timeout_s
    for _ in range(MOST_REDIRECTS + 1):
        parts = check_url(url, where, config)
        address = public_address(parts, where, resolve or _system_addresses)
        try:
            body, target = _get(parts, address, where, config, end)
        except (OSError, http.client.HTTPException, ssl.SSLError) as error:
            raise _refused(where, f"cannot be fetched ({type(error).__name__})") from None
        if target is None:
            return body
        url = urljoin(url, target)
    raise _refused(where, f"is redirected more than {MOST_REDIRECTS} times")


def check_url(url: str, where: str, config: FetchConfig) -> SplitResult:
    """Refuse what no resolution could make safe: schemes, ports, credentials, hosts that are not allowed.

    Raises:
        ApiError: 400, names the part.
    """
    if len(url) > MOST_URL or any(ord(c) <= 32 or ord(c) == 127 or c == "\\" for c in url):
        raise _refused(where, "is no address that can be read")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise _refused(where, "is no address that can be read") from None
    host = (parts.hostname or "").rstrip(".").lower()
    if parts.scheme not in PORTS or not host:
        raise _refused(where, "is neither http nor https")
    if not _HOST.fullmatch(host):  # escapes, zones and look-alike letters are read differently by every reader
        raise _refused(where, "has a host that is neither a plain name nor an address")
    if parts.username is not None or parts.password is not None or "@" in parts.netloc:
        raise _refused(where, "holds credentials")
    if port not in (None, PORTS[parts.scheme]):
        raise _refused(where, f"names port {port}; only the usual ones are fetched from")
    if not config.enabled or not _allowed(host, config.hosts):
        raise _refused(where, f"lies on {host[:60]}, which this server does not fetch from")
    return parts


def public_address(parts: SplitResult, where: str, resolve: Resolve) -> str:
    """The address to connect to; every address of the name must be public.

    Raises:
        ApiError: 400, names the part.
    """
    host = (parts.hostname or "").rstrip(".")
    try:
        found = resolve(host, PORTS[parts.scheme])
    except (OSError, UnicodeError):
        raise _refused(where, "has a name that is not known") from None
    if not found or not all(is_public(address) for address in found):
        raise _refused(where, "lies in a private network")
    return found[0]


def is_public(text: str) -> bool:
    """Whether an address belongs to the open network, however it is wrapped."""
    try:
        address: Address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return False
    inner = _inside(address)
    if inner is not None:
        return is_public(str(inner))
    return address.is_global and not (address.is_multicast or address.is_reserved or address.is_unspecified)


def _inside(address: Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address that an IPv6 one carries."""
    if not isinstance(address, ipaddress.IPv6Address):
        return None
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    teredo = address.teredo
    return address.ipv4_mapped or address.sixtofour or (teredo[1] if teredo else None)


def _allowed(host: str, hosts: tuple[str, ...]) -> bool:
    """``example.org`` allows itself, ``*.example.org`` what is under it, ``*`` everything public."""
    return any(
        allowed == "*" or host == allowed.lower() or (allowed.startswith("*.") and host.endswith(allowed[1:].lower()))
        for allowed in hosts
    )


def _system_addresses(host: str, port: int) -> list[str]:
    return [str(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


def _get(parts: SplitResult, address: str, where: str, config: FetchConfig, end: float) -> tuple[bytes, str | None]:
    """Body, or the target of a redirect."""
    left = end - time.monotonic()
    if left <= 0:
        raise _refused(where, f"took longer than {config.timeout_s:g} s")
    host = parts.hostname or ""
    raw = socket.create_connection((address, PORTS[parts.scheme]), timeout=left)
    if parts.scheme == "https":
        raw = ssl.create_default_context().wrap_socket(raw, server_hostname=host)
    connection = http.client.HTTPConnection(host, PORTS[parts.scheme])
    connection.sock = raw
    try:
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("GET", path, headers={"User-Agent": "omni_ray", "Accept-Encoding": "identity"})
        reply = connection.getresponse()
        if reply.status in (301, 302, 303, 307, 308):
            return b"", reply.getheader("location") or ""
        if reply.status != 200:
            raise _refused(where, f"answers with status {reply.status}")
        most, body = int(config.max_mib * 2**20), b""
        while True:
            piece = reply.read1(1 << 16)
            body += piece
            if len(body) > most:
                raise _refused(where, f"is larger than {config.max_mib:g} MiB")
            if time.monotonic() > end:
                raise _refused(where, f"took longer than {config.timeout_s:g} s")
            if not piece:
                return body, None
    finally:
        connection.close()


def _refused(where: str, why: str) -> ApiError:
    return bad_request(f"{where} {why}; send the bytes as a data URI", param=where, code="remote_media_refused")
