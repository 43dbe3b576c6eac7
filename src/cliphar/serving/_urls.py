"""A photo by its address: only when switched on, only from public addresses, no redirects, bounded."""

from __future__ import annotations

import asyncio
import ipaddress
from functools import cache
from urllib.parse import urlsplit

import httpx

from cliphar.serving._problems import ProblemError
from cliphar.serving._settings import Settings

__all__ = ["Budget", "fetch_image", "is_public"]

_TIMEOUT_S = 10.0
_AT_ONCE = 8
_tls = cache(httpx.create_ssl_context)  # 15 ms


def is_public(address: str) -> bool:
    """Whether an IP address is of the public internet, and an IPv4 one in it."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if ip in ipaddress.ip_network("64:ff9b::/96"):  # NAT64 (RFC 6052)
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    return ip.is_global and not ip.is_multicast


class Budget:
    """Bytes that a request's images may have in all; few are on their way at a time."""

    def __init__(self, limit_mb: int) -> None:
        self.limit_mb, self.left = limit_mb, limit_mb * 2**20
        self.turns = asyncio.Semaphore(_AT_ONCE)

    def take(self, size: int) -> None:
        """ProblemError 413 if they are too many."""
        self.left -= size
        if self.left < 0:
            raise ProblemError(413, f"the images by address have over {self.limit_mb} MB in all")


async def fetch_image(url: str, settings: Settings, budget: Budget) -> bytes:
    """The bytes at an http(s) address, within the request's budget.

    Its name is resolved once, and the address that was checked is used: another answer later gains nothing.

    Raises:
        ProblemError: 403 when switched off or not public, 422 when it cannot be had, 413 when too large.
    """
    if not settings.image_urls:
        raise ProblemError(403, "images by address are switched off here; send the image itself")
    try:
        user, target = urlsplit(url).username, httpx.URL(url)  # the first is the stricter
    except (ValueError, httpx.InvalidURL) as error:
        raise ProblemError(422, f"{url[:100]!r} is not an address") from error
    host = target.raw_host.decode()  # a name in other letters than ASCII is written as DNS knows it
    if target.scheme not in ("http", "https") or not host or user is not None:
        raise ProblemError(422, f"{url[:100]!r} is not a plain http or https address")
    try:
        async with asyncio.timeout(_TIMEOUT_S), budget.turns:
            return await _get(target, host, budget)
    except TimeoutError as error:
        raise ProblemError(422, f"{host} did not give the image within {_TIMEOUT_S:g} s") from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ProblemError(422, f"cannot get the image from {host}: {type(error).__name__}") from error


async def _get(url: httpx.URL, host: str, budget: Budget) -> bytes:
    port = url.port or (443 if url.scheme == "https" else 80)
    try:
        found = [str(one[4][0]) for one in await asyncio.get_running_loop().getaddrinfo(host, port)]
    except (OSError, ValueError) as error:
        raise ProblemError(422, f"cannot find {host}") from error
    if not all(map(is_public, found)):
        raise ProblemError(403, f"{host} is not a public address")
    target = url.copy_with(host=found[0])
    headers = {"Host": url.netloc.decode(), "Accept-Encoding": "identity"}
    async with (
        httpx.AsyncClient(timeout=_TIMEOUT_S, trust_env=False, verify=_tls(trust_env=False)) as client,
        client.stream("GET", target, headers=headers, extensions={"sni_hostname": host}) as response,
    ):
        if response.status_code != 200:
            raise ProblemError(422, f"{host} answered {response.status_code}, not an image")
        content = bytearray()
        async for chunk in response.aiter_raw():
            budget.take(len(chunk))
            content += chunk
    return bytes(content)
