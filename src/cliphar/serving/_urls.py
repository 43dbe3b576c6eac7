"""A photo by its address: only when switched on, only from public addresses, no redirects, bounded."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from urllib.parse import urlsplit

import httpx

from cliphar.serving._problems import ProblemError
from cliphar.serving._settings import Settings

__all__ = ["fetch_image"]


async def fetch_image(url: str, settings: Settings) -> bytes:
    """The bytes at an http(s) address.

    The host's name is resolved once and the connection made to the address that was checked, so a name that resolves
    differently the second time gains nothing.

    Raises:
        ProblemError: 403 when switched off or not public, 422 when it cannot be had, 413 when too large.
    """
    if not settings.image_urls:
        raise ProblemError(403, "images by address are switched off here; send the image itself")
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
        raise ProblemError(422, "image_url must be a plain http or https address")
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        found = await asyncio.get_running_loop().getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
    except (OSError, ValueError) as error:
        raise ProblemError(422, f"cannot find {parts.hostname}") from error
    address = str(found[0][4][0])
    if not all(ipaddress.ip_address(str(one[4][0])).is_global for one in found):
        raise ProblemError(403, f"{parts.hostname} is not a public address")
    target = httpx.URL(url).copy_with(host=address)
    host = parts.hostname if parts.port is None else f"{parts.hostname}:{parts.port}"
    limit = settings.max_body_mb * 2**20
    try:
        async with (
            httpx.AsyncClient(timeout=10, trust_env=False, follow_redirects=False) as client,
            client.stream(
                "GET", target, headers={"Host": host}, extensions={"sni_hostname": parts.hostname}
            ) as response,
        ):
            if response.status_code != 200:
                raise ProblemError(422, f"{parts.hostname} answered {response.status_code}, not an image")
            content = bytearray()
            async for chunk in response.aiter_bytes():
                content += chunk
                if len(content) > limit:
                    raise ProblemError(413, f"the image has over {settings.max_body_mb} MB")
    except httpx.HTTPError as error:
        raise ProblemError(422, f"cannot get the image from {parts.hostname}: {type(error).__name__}") from error
    return bytes(content)
