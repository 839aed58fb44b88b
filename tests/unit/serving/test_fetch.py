"""Addresses that must never be fetched, with fetching on and every host allowed; and one honest server that may be."""

from __future__ import annotations

import http.server
import re
import socket
import threading
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pipelines
from omni_ray.config.serving import FetchConfig, Limits
from pipelines.serving import fetch as fetching
from pipelines.serving.errors import ApiError
from pipelines.serving.fetch import fetch, is_public
from pipelines.serving.media import image_bytes, video_bytes

OPEN = FetchConfig(enabled=True, hosts=("*",), timeout_s=2.0)
PRIVATE = [
    "127.0.0.1", "127.8.9.10", "0.0.0.0", "10.0.0.1", "10.255.255.255", "172.16.0.1", "172.31.255.254",
    "192.168.0.1", "169.254.169.254", "169.254.0.1", "100.64.0.1", "192.0.0.1", "192.0.2.1", "198.18.0.1",
    "198.51.100.7", "203.0.113.9", "224.0.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.255", "[::1]",
    "[::]", "[fe80::1]", "[fc00::1]", "[fd12::3]", "[ff02::1]", "[::ffff:127.0.0.1]", "[::ffff:10.0.0.1]",
    "[::ffff:169.254.169.254]", "[::ffff:7f00:1]", "[64:ff9b::7f00:1]", "[64:ff9b::a00:1]", "[2002:7f00:1::]",
    "[2002:a9fe:a9fe::]", "[2001:db8::1]", "[100::1]", "[2001:0:4136:e378:8000:63bf:80ff:fffe]",
]  # fmt: skip
HOSTILE = [
    *(f"http://{host}/x.png" for host in PRIVATE),
    "https://127.0.0.1/x.png",
    "http://2130706433/x.png",  # 127.0.0.1 as one number
    "http://0x7f000001/x.png",
    "http://0177.0.0.1/x.png",
    "http://127.1/x.png",
    "http://0/x.png",
    "http://localhost/x.png",
    "http://LOCALHOST./x.png",
    "http://localhost.localdomain/x.png",
    "http://metadata.internal/x.png",
    "http://rebind.example/x.png",
    "http://half.example/x.png",
    "http://user:secret@example.org/x.png",
    "http://example.org@127.0.0.1/x.png",
    "http://127.0.0.1#@example.org/x.png",
    "http://example.org:22/x.png",
    "http://example.org:6379/x.png",
    "http://example.org:99999/x.png",
    "http://example.org\\@127.0.0.1/x.png",
    "http://exa mple.org/x.png",
    "http://example.org/\r\nHost: inner",
    "http:///x.png",
    "http://[::1/x.png",
    "http://[fe80::1%25eth0]/x.png",
    "//127.0.0.1/x.png",
    "file:///etc/passwd",
    "FILE:///etc/passwd",
    "ftp://example.org/x.png",
    "gopher://127.0.0.1:6379/_INFO",
    "dict://127.0.0.1:11211/stats",
    "ldap://127.0.0.1/x",
    "jar:http://example.org!/x.png",
    "unix:///var/run/docker.sock",
    "/etc/passwd",
    "../../etc/passwd",
    "",
    "http://" + "a" * 3000 + ".example/x.png",
    *(
        f"http://{host}/latest/meta-data/"
        for host in (
            "169.254.169.254",
            "[fd00:ec2::254]",
            "100.100.100.200",
            "metadata.google.internal",
            "[::ffff:a9fe:a9fe]",
            "0xA9FEA9FE",
            "2852039166",
            "0251.0376.0251.0376",
            "169.254.43518",
        )
    ),
    "http://0x7f.0x0.0x0.0x1/x.png",
    "http://017700000001/x.png",
    "http://0x7F.1/x.png",
    "http://3232235777/x.png",  # 192.168.1.1
    "http://127.0.0.1:80/x.png",
    "http://[::1]:80/x.png",
    "https://[::1]:443/x.png",
    "http://[0:0:0:0:0:ffff:127.0.0.1]/x.png",
    "http://[::127.0.0.1]/x.png",
    "http://[::ffff:0:127.0.0.1]/x.png",
    "http://127.0.0.1.nip.example/x.png",  # a name for any address
    "http://localtest.example/x.png",
    "http://six.example/x.png",
    "http://mapped.example/x.png",
    "http://127\u30020\u30020\u30021/x.png",  # ideographic full stops
    "http://127\uff0e0\uff0e0\uff0e1/x.png",  # full-width
    "http://\uff11\uff12\uff17.0.0.1/x.png",  # full-width digits
    "http://\u2460\u2461\u2466.0.0.1/x.png",  # circled digits
    "http://\uff4c\uff4f\uff43\uff41\uff4c\uff48\uff4f\uff53\uff54/x.png",
    "http://local\u200bhost/x.png",  # zero width
    "http://loc\u00adalhost/x.png",  # soft hyphen
    "http://\u202e127.0.0.1/x.png",  # right to left
    "http://%31%32%37.0.0.1/x.png",
    "http://127.0.0.1%2f.example.org/x.png",
    "http://example.org%00.localhost/x.png",
    "http://example.org%2f@127.0.0.1/x.png",
    "http://example.org:80@10.0.0.1/x.png",
    "http://:secret@example.org/x.png",
    "http://@127.0.0.1/x.png",
    "http://example.org:0/x.png",
    "http://example.org:8080/x.png",
    "https://example.org:80/x.png",
    "http://example.org:-80/x.png",
    "http:127.0.0.1/x.png",
    "http:/127.0.0.1/x.png",
    "http:///127.0.0.1/x.png",
    "HTTP://127.0.0.1/x.png",
    "http://127.0.0.1/\x00.png",
    "\thttp://127.0.0.1/x.png",
    "sftp://127.0.0.1/x.png",
    "tftp://127.0.0.1/x.png",
    "ws://127.0.0.1/x.png",
    "smb://127.0.0.1/share/x.png",
    "php://filter/resource=/etc/passwd",
    "netdoc:///etc/passwd",
    "javascript:alert(1)",
    "blob:http://127.0.0.1/x.png",
    "data:text/html;base64,aGVsbG8=",
    "file://localhost/etc/passwd",
    "file:/etc/passwd",
    "concat:/etc/passwd|/etc/hosts",  # what film decoders would open
    "subfile,,start,0,end,100,,:/etc/passwd",
]
NAMES = {
    "metadata.google.internal": ["169.254.169.254"],
    "127.0.0.1.nip.example": ["127.0.0.1"],
    "localtest.example": ["127.0.0.1"],
    "six.example": ["::1"],
    "mapped.example": ["::ffff:10.1.2.3"],
    "metadata.internal": ["169.254.169.254"],
    "rebind.example": ["127.0.0.1"],
    "half.example": ["93.184.216.34", "10.0.0.1"],  # one public address does not excuse the other
    "localhost.localdomain": ["127.0.0.1"],
    "localhost": ["127.0.0.1", "::1"],
}


def known(host: str, port: int) -> list[str]:
    """Names of this test; numbers as the system reads them; every other name is a public one, as an attacker's is."""
    if host.lower() in NAMES:
        return NAMES[host.lower()]
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except OSError:
        # What the system makes of look-alike letters and invisible ones.
        spelled = unicodedata.normalize("NFKC", host).replace("\u200b", "").replace("\u00ad", "").lower()
        return NAMES.get(spelled, ["93.184.216.34"])
    return [str(entry[4][0]) for entry in found]


def test_there_are_enough_of_them() -> None:
    assert len(set(HOSTILE)) >= 130


@pytest.mark.parametrize("hosts", [("*",), ("media.example", "*.example.org")], ids=["all allowed", "few allowed"])
@pytest.mark.parametrize("url", list(dict.fromkeys(HOSTILE)), ids=lambda url: ascii(url)[:40])
def test_hostile_addresses_are_refused_on_and_off(
    url: str, hosts: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Off; on for all hosts; on for some, whose names do not help the others."""

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("a connection was made")

    monkeypatch.setattr(fetching.socket, "create_connection", never)
    with pytest.raises(ApiError) as refused:
        fetch(url, "messages[0].content[0]", OPEN.model_copy(update={"hosts": hosts}), known)
    assert refused.value.code == "remote_media_refused"
    assert refused.value.status == 400
    on = Limits(fetch=OPEN.model_copy(update={"hosts": hosts}))
    monkeypatch.setattr(fetching, "_system_addresses", known)
    for door in (image_bytes, video_bytes):
        with pytest.raises(ApiError):
            door(url, "messages[0].content[0]", on)
    with pytest.raises(ApiError):  # and with fetching off, by the door itself
        image_bytes(url, "messages[0].content[0]", Limits())


@pytest.mark.parametrize("private", [address for address in PRIVATE if address.isascii()])
def test_an_allowed_name_that_resolves_to_a_private_address_is_refused(private: str) -> None:
    config = OPEN.model_copy(update={"hosts": ("media.example",)})
    for answer in ([private.strip("[]")], ["93.184.216.34", private.strip("[]")]):
        with pytest.raises(ApiError, match="private network"):
            fetch("http://media.example/x.png", "x", config, lambda host, port, answer=answer: answer)


def test_a_name_that_answers_differently_a_moment_later_is_asked_once(honest: Any, monkeypatch: Any) -> None:
    """Rebinding: the address that was judged is the address that is connected to."""
    answers = iter([["93.184.216.34"], ["127.0.0.1"]])
    reached: list[str] = []
    real = fetching.socket.create_connection

    def noted(address: tuple[str, int], timeout: float) -> Any:
        reached.append(address[0])
        return real(address, timeout)

    monkeypatch.setattr(fetching.socket, "create_connection", noted)
    config = FetchConfig(enabled=True, hosts=("turns.example",), timeout_s=5.0)
    assert fetch("http://turns.example/fine", "x", config, lambda host, port: next(answers)) == b"fine"
    assert reached == ["93.184.216.34"]
    with pytest.raises(ApiError, match="private network"):
        fetch("http://turns.example/fine", "x", config, lambda host, port: next(answers))


REDIRECTS = (
    "http://127.0.0.1/fine", "//127.0.0.1/fine", "http://[::1]/fine", "http://169.254.169.254/latest/meta-data/",
    "http://2130706433/fine", "http://rebind.example/fine", "http://half.example/fine", "https://10.0.0.1/fine",
    "file:///etc/passwd", "ftp://example.org/fine", "gopher://127.0.0.1:6379/_INFO", "http://user:word@example.org/fine",
    "http://example.org:6379/fine", "http://[::ffff:127.0.0.1]/fine", "http://0/fine", "javascript:alert(1)",
)  # fmt: skip


@pytest.mark.parametrize("target", REDIRECTS)
def test_a_redirect_leads_nowhere_that_an_address_may_not(honest: Any, target: str) -> None:
    config = FetchConfig(enabled=True, hosts=("*",), timeout_s=5.0)

    def resolve(host: str, port: int) -> list[str]:
        return honest(host, port) if host == "example.org" else known(host, port)

    with pytest.raises(ApiError) as refused:
        fetch(f"http://example.org/to?{target}", "x", config, resolve)
    assert refused.value.code == "remote_media_refused"


@pytest.mark.parametrize("text", ["93.184.216.34", "2606:2800:220:1::1", "::ffff:93.184.216.34", "64:ff9b::5db8:d822"])
def test_public_addresses(text: str) -> None:
    assert is_public(text)


def test_only_allowed_hosts() -> None:
    for hosts, refused in ((("a.example",), True), (("*.example.org",), True), (("example.org",), False)):
        config = FetchConfig(enabled=True, hosts=hosts)
        if refused:
            with pytest.raises(ApiError, match="does not fetch from"):
                fetching.check_url("http://example.org/x", "x", config)
        else:
            fetching.check_url("http://example.org/x", "x", config)
    fetching.check_url("http://a.example.org/x", "x", FetchConfig(enabled=True, hosts=("*.example.org",)))
    with pytest.raises(ApiError):
        fetching.check_url("http://evilexample.org/x", "x", FetchConfig(enabled=True, hosts=("*.example.org",)))
    with pytest.raises(ApiError):
        fetching.check_url("http://example.org/x", "x", FetchConfig(hosts=("*",)))


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path.startswith("/to?"):
            self.send_response(302)
            self.send_header("location", self.path[4:])
            self.end_headers()
        elif self.path == "/large":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"x" * 3_000_000)
        else:
            self.send_response(200 if self.path == "/fine" else 404)
            self.end_headers()
            self.wfile.write(b"fine")

    def log_message(self, *_: Any) -> None:
        """Quiet."""


@pytest.fixture
def honest(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A server of this machine that the fetcher takes for a public one, at the usual port."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setitem(fetching.PORTS, "http", server.server_port)
    real = fetching.socket.create_connection
    monkeypatch.setattr(
        fetching.socket, "create_connection", lambda _, timeout: real(("127.0.0.1", server.server_port), timeout)
    )
    yield lambda host, port: NAMES.get(host, ["93.184.216.34"])
    server.shutdown()
    server.server_close()
    thread.join(5)


def test_an_allowed_address_is_fetched_and_a_redirect_is_judged_again(honest: Any) -> None:
    config = FetchConfig(enabled=True, hosts=("*",), max_mib=1.0, timeout_s=5.0)
    assert fetch("http://example.org/fine", "x", config, honest) == b"fine"
    assert fetch("http://example.org/to?/fine", "x", config, honest) == b"fine"
    refusals = {
        "http://example.org/to?http://rebind.example/fine": "private network",
        "http://example.org/to?file:///etc/passwd": "neither http nor https",
        "http://example.org/to?http://example.org:22/": "names port 22",
        "http://example.org/to?/to?/to?/to?/to?/fine": "redirected more than 3 times",
        "http://example.org/large": "larger than 1 MiB",
        "http://example.org/missing": "status 404",
    }
    for url, words in refusals.items():
        with pytest.raises(ApiError, match=re.escape(words)):
            fetch(url, "x", config, honest)


def test_nothing_else_in_the_server_opens_connections() -> None:
    """Every way out of the gateway is the one fetcher."""
    folder = Path(pipelines.__file__).parent / "serving"
    openers = re.compile(r"urlopen|import requests|httpx\.|aiohttp|create_connection|http\.client|urllib3")
    found = {path.name for path in folder.rglob("*.py") if openers.search(path.read_text("utf-8"))}
    assert found <= {"fetch.py"}
