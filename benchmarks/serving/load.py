"""A small load generator: keep-alive connections that each ask, wait, and ask again, or ask at a given rate."""

from __future__ import annotations

import asyncio
import io
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageFilter


def photos(count: int = 64) -> list[bytes]:
    """JPEGs of 640x480 that are about as hard to decode as photos: smoothed noise with grain."""
    random = np.random.default_rng(1)
    made = []
    for _ in range(count):
        coarse = Image.fromarray(random.integers(0, 255, (30, 40, 3), np.uint8)).resize((640, 480))
        grain = Image.fromarray(random.integers(0, 255, (480, 640, 3), np.uint8)).filter(ImageFilter.BoxBlur(2))
        file = io.BytesIO()
        Image.blend(coarse, grain, 0.3).save(file, "JPEG", quality=85)
        made.append(file.getvalue())
    return made


@dataclass
class Outcome:
    """What came of a run: latencies of good answers in seconds, and how many were refused or failed."""

    latencies: list[float] = field(default_factory=list)
    refused: int = 0
    failed: int = 0
    seconds: float = 0.0
    cpu_s: float = 0.0

    @property
    def per_s(self) -> float:
        """Good answers a second."""
        return len(self.latencies) / self.seconds

    def quantile_ms(self, q: float) -> float:
        """Latency of good answers in ms."""
        return 1e3 * float(np.quantile(self.latencies, q)) if self.latencies else float("nan")


class Load:
    """Load on one address.

    Args:
        port: on this machine.
        path: what is asked.
        contents: photos; each is sent with a number at its end, so that no two requests are alike.
    """

    def __init__(self, port: int, path: str, contents: list[bytes]) -> None:
        self._port, self._path = port, path
        self._contents, self._number = contents, itertools.count()

    def _request(self) -> bytes:
        number = next(self._number)
        photo = self._contents[number % len(self._contents)] + b"%d" % number
        head = b'--xX\r\nContent-Disposition: form-data; name="images"; filename="a.jpg"\r\n'
        body = head + b"Content-Type: image/jpeg\r\n\r\n" + photo + b"\r\n--xX--\r\n"
        kind = b"Content-Type: multipart/form-data; boundary=xX\r\n"
        return b"POST %s HTTP/1.1\r\nHost: 127.0.0.1\r\n%sContent-Length: %d\r\n\r\n%s" % (
            self._path.encode(), kind, len(body), body,
        )  # fmt: skip

    async def _client(self, until: float, outcome: Outcome, ready: Callable[[], bool]) -> None:
        reader = writer = None
        while time.perf_counter() < until:
            if not ready():
                await asyncio.sleep(0.002)
                continue
            try:
                if writer is None or reader is None:
                    reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
                started = time.perf_counter()
                writer.write(self._request())
                head = await reader.readuntil(b"\r\n\r\n")
                lower = head.lower()
                length = int(lower.split(b"content-length:")[1].split(b"\r\n")[0])
                await reader.readexactly(length)
            except (OSError, asyncio.IncompleteReadError, IndexError):
                outcome.failed += 1
                writer = None
                await asyncio.sleep(0.01)
                continue
            status = head[9:12]
            if status == b"200":
                outcome.latencies.append(time.perf_counter() - started)
            elif status in (b"503", b"429"):
                outcome.refused += 1
            else:
                outcome.failed += 1
            if b"connection: close" in lower:
                writer = None
        if writer is not None:
            writer.close()

    async def _run(self, clients: int, seconds: float, rate: float | None) -> Outcome:
        outcome = Outcome()
        started = time.perf_counter()
        sent = 0

        def ready() -> bool:
            nonlocal sent
            if rate is not None and sent >= rate * (time.perf_counter() - started):
                return False
            sent += 1
            return True

        until = started + seconds
        await asyncio.gather(*(self._client(until, outcome, ready) for _ in range(clients)))
        outcome.seconds = time.perf_counter() - started
        return outcome

    def run(self, clients: int, seconds: float, rate: float | None = None) -> Outcome:
        """Ask for so long with so many connections; ``rate`` in requests a second, else as fast as answers come."""
        return asyncio.run(self._run(clients, seconds, rate))
