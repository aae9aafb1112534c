"""Media behind addresses, for servers that have been allowed some hosts: what is asked for is what has been looked at.

An address is parsed once; its host must be one of those that were named; every address that the host resolves to must
be public, and it is that very address that is connected to, so that nothing can be resolved a second time otherwise.
Each redirect goes through all of it again. Whatever goes wrong, a client reads one sentence.
"""

from __future__ import annotations

import http.client
import ipaddress
import logging
import socket
import ssl
import string
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from typing import Any
from urllib.parse import SplitResult, urljoin, urlsplit

from plume.serving.errors import wrong

_log = logging.getLogger("plume.serving")

MOST_REDIRECTS = 3
CONNECT_S, WHOLE_S = 3.0, 10.0
_REDIRECTS = (301, 302, 303, 307, 308)
_HOST = set(string.ascii_lowercase + string.digits + ".-")
# They count as public and hold an address of the old kind, which may be none.
_EMBEDDING = (ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("2002::/16"))

Resolve = Callable[[str, int], Iterable[str]]
"""Addresses of a host."""


class RefusedError(Exception):
    """Why an address is not fetched; for the log alone."""


class Fetcher:
    """Fetches media from hosts that were named, and from no others."""

    def __init__(
        self,
        hosts: Sequence[str],
        *,
        resolve: Resolve | None = None,
        is_allowed: Callable[[str], bool] | None = None,
        whole_seconds: float = WHOLE_S,
    ):
        """Set up.

        Args:
            hosts: names, exactly as they stand in addresses; none: nothing is fetched.
            resolve: gives the addresses of a host; None asks the system.
            is_allowed: which addresses may be connected to; None: public ones.
            whole_seconds: for an answer, redirects included.
        """
        self.hosts = frozenset(host.lower() for host in hosts)
        self._resolve = resolve or _resolved
        self._is_allowed = is_allowed or is_public
        self._whole_seconds = whole_seconds
        self._tls = ssl.create_default_context()

    def fetch(self, url: str, most: int, param: str) -> bytes:
        """What an address holds.

        Args:
            url: the address.
            most: bytes at most.
            param: how errors call it.

        Raises:
            RequestError: it is not fetched, in a sentence that tells nothing of what was found there.
        """
        if not self.hosts:
            raise wrong("this server opens no address; send the file as data:<type>;base64,<content>", param)
        try:
            return self._fetch(url, most)
        except RefusedError as error:
            _log.info("an address was refused: %s", error)
        except (OSError, http.client.HTTPException, ValueError) as error:
            _log.info("an address could not be fetched: %s", type(error).__name__)
        raise wrong("an address cannot be fetched, or is not allowed here", param)

    def _fetch(self, url: str, most: int) -> bytes:
        deadline = time.monotonic() + self._whole_seconds
        for _ in range(MOST_REDIRECTS + 1):
            parts = self._checked(url)
            status, location, content = self._asked(parts, most, deadline)
            if status == 200:
                return content
            if status not in _REDIRECTS or not location:
                raise RefusedError(f"status {status}")
            target = urljoin(url, location)
            if parts.scheme == "https" and not target.startswith("https://"):
                raise RefusedError("a redirect to plain http")
            url = target
        raise RefusedError("too many redirects")

    def _checked(self, url: str) -> SplitResult:
        """The address in parts, if it is one that may be asked.

        Raises:
            RefusedError: it is not.
        """
        if len(url) > 2_048 or any(not 32 < ord(character) < 127 or character == "\\" for character in url):
            raise RefusedError("characters that no address holds")
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https"):
            raise RefusedError("neither http nor https")
        if "@" in parts.netloc or parts.port not in (None, 80, 443):
            raise RefusedError("a user, or another port")
        host = (parts.hostname or "").lower()
        if not host or set(host) - _HOST or host not in self.hosts:
            raise RefusedError("a host that is not allowed")
        return parts

    def _asked(self, parts: SplitResult, most: int, deadline: float) -> tuple[int, str | None, bytes]:
        host = (parts.hostname or "").lower()
        port = parts.port or (443 if parts.scheme == "https" else 80)
        addresses = list(self._resolve(host, port))
        if not addresses or not all(map(self._is_allowed, addresses)):
            raise RefusedError("a host that resolves to an address of a private network")
        left = deadline - time.monotonic()
        if left <= 0:
            raise RefusedError("too slow")
        with ExitStack() as stack:
            used = socket.create_connection((addresses[0], port), timeout=min(CONNECT_S, left))
            stack.callback(used.close)
            if parts.scheme == "https":
                used = self._tls.wrap_socket(used, server_hostname=host, do_handshake_on_connect=False)
                stack.callback(used.close)
            used.settimeout(left)
            # A server that sends a byte now and then would else never end.
            is_late = threading.Event()
            end = threading.Timer(max(deadline - time.monotonic(), 0), _shut, [used, is_late])
            end.start()
            try:
                if isinstance(used, ssl.SSLSocket):
                    used.do_handshake()
                connection = http.client.HTTPConnection(host, port)
                connection.default_port = port  # so that no host is asked for by its port
                connection.sock = used
                target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
                connection.putrequest("GET", target, skip_accept_encoding=True)
                for name, value in (("Accept-Encoding", "identity"), ("User-Agent", "plume"), ("Connection", "close")):
                    connection.putheader(name, value)
                connection.endheaders()
                answer = connection.getresponse()
                if answer.status != 200:
                    return answer.status, answer.getheader("Location"), b""
                if answer.getheader("Content-Encoding", "identity").lower() != "identity":
                    raise RefusedError("compressed")
                content = answer.read(most + 1)
                if len(content) > most:
                    raise RefusedError("too large")
                if answer.length or is_late.is_set():
                    raise RefusedError("cut off")
                return 200, None, content
            finally:
                end.cancel()


def is_public(address: str) -> bool:
    """Whether an address is one of the public network, whatever way it is written.

    Example:
        >>> [is_public(one) for one in ("8.8.8.8", "10.0.0.1", "::ffff:127.0.0.1", "100.64.0.1", "64:ff9b::7f00:1")]
        [True, False, False, False, False]
    """
    found: Any = ipaddress.ip_address(address.partition("%")[0])
    found = getattr(found, "ipv4_mapped", None) or found
    if any(found.version == network.version and found in network for network in _EMBEDDING):
        return False
    return found.is_global and not found.is_multicast and not found.is_reserved


def _resolved(host: str, port: int) -> list[str]:
    return [str(place[4][0]) for place in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


def _shut(connection: socket.socket, is_late: threading.Event) -> None:
    is_late.set()
    with suppress(OSError):
        socket.socket.shutdown(connection, socket.SHUT_RDWR)  # of TLS the connection beneath
