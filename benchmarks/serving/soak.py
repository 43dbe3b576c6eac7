"""An hour of mixed traffic at once: does anything get lost, mixed up, or left behind?

    python benchmarks/serving/soak.py [--requests 18000] [--clients 32]

18,000 requests are five a second for an hour. They come as fast as they are answered: photos in every form, new words,
damaged photos, clips, camera frames, lists put and read, and clients that hang up halfway. Each request that is not
hung up on must get the one right answer; refused for want of room, it is made again when it was told to. Exit status 1
if any did not, if the service failed on any or grew, or if it did not come back to rest.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import IO, Any, cast

import av
import httpx
import numpy as np
import psutil
from load import photos
from websockets.asyncio.client import connect

_WORDS = ["cooking", "riding a horse", "waving", "playing chess", "falling", "reading a book"]
_AT_REST_S = 30
_GROWTH = 1.25


def clip() -> bytes:
    """Two seconds of moving colours as MP4."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 160, 120, "yuv420p"
        for i in range(20):
            picture = np.roll(np.random.default_rng(0).integers(0, 255, (120, 160, 3), np.uint8), 4 * i, 1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


class Traffic:
    """Every kind of request, each with the answer it must get.

    Args:
        url: of the service.
        seed: of the draws.
    """

    def __init__(self, url: str, seed: int) -> None:
        self._url, self._random = url, random.Random(seed)  # noqa: S311 - no secret
        self._http = httpx.AsyncClient(base_url=url, timeout=120, limits=httpx.Limits(max_connections=200))
        self._photos, self._clip = photos(16), clip()
        self._expected: list[str] = []
        self._number = 0
        self.done: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.refused = 0
        kinds: list[tuple[int, Callable[[], Awaitable[None]]]] = [
            (30, self._form), (15, self._raw), (10, self._several), (10, self._damaged), (5, self._words),
            (5, self._embedding), (5, self._open_protocol), (5, self._list), (5, self._look), (4, self._hang_up),
            (4, self._leave), (1, self._video), (1, self._camera),
        ]  # fmt: skip
        self._kinds = [kind for weight, kind in kinds for _ in range(weight)]

    async def learn(self) -> None:
        """What each photo's answer is when nothing else goes on."""
        for photo in self._photos:
            answer = await self._http.post("/v1/predict", content=photo, headers={"Content-Type": "image/jpeg"})
            self._expected.append(answer.json()["predictions"][0]["top"][0]["label"])

    async def run(self, requests: int, clients: int) -> None:
        """So many requests by so many clients."""
        left = iter(range(requests))

        async def client() -> None:
            for _ in left:
                kind = self._random.choice(self._kinds)
                name = kind.__name__.strip("_")
                try:
                    await kind()
                except Exception as error:  # whatever it is, it is a request that was lost
                    self.wrong.append(f"{name}: {type(error).__name__}: {error}")
                self.done[name] += 1

        await asyncio.gather(*(client() for _ in range(clients)))

    def _photo(self) -> tuple[bytes, str]:
        """A photo, half of the time one that was never sent before, and its answer."""
        i = self._random.randrange(len(self._photos))
        self._number += 1
        fresh = b"%d" % self._number if self._random.random() < 0.5 else b""
        return self._photos[i] + fresh, self._expected[i]

    async def _ask(self, method: str, path: str, status: int = 200, **body: Any) -> Any:
        while True:
            answer = await self._http.request(method, path, **body)
            if answer.status_code != 503:
                break
            self.refused += 1
            await asyncio.sleep(float(answer.headers["Retry-After"]) * self._random.uniform(0.5, 1))
        if answer.status_code != status:
            raise AssertionError(f"{path} answered {answer.status_code}, not {status}: {answer.text[:200]}")
        return answer.json() if answer.headers["content-type"] == "application/json" else answer.text

    @staticmethod
    def _same(answer: Any, expected: list[str | None]) -> None:
        found = [one["top"][0]["label"] if "top" in one else None for one in answer["predictions"]]
        if found != expected:
            raise AssertionError(f"answered {found}, not {expected}")

    async def _form(self) -> None:
        photo, label = self._photo()
        self._same(await self._ask("POST", "/v1/predict", files=[("images", photo)]), [label])

    async def _raw(self) -> None:
        photo, label = self._photo()
        head = {"Content-Type": "image/jpeg"}
        self._same(await self._ask("POST", "/v1/predict", content=photo, headers=head), [label])

    async def _several(self) -> None:
        drawn = [self._photo() for _ in range(self._random.randint(2, 8))]
        images = [base64.b64encode(photo).decode() for photo, _ in drawn]
        at = self._random.randrange(len(images))
        images.insert(at, base64.b64encode(b"no photo").decode())
        expected: list[str | None] = [label for _, label in drawn]
        expected.insert(at, None)
        self._same(await self._ask("POST", "/v1/predict", json={"images": images}), expected)

    async def _damaged(self) -> None:
        photo, _ = self._photo()
        broken = photo[: self._random.randrange(20, 400)]
        await self._ask("POST", "/v1/predict", 422, content=broken, headers={"Content-Type": "image/jpeg"})

    async def _words(self) -> None:
        photo, _ = self._photo()
        words = self._random.sample(_WORDS, 3)
        asked = {"images": [base64.b64encode(photo).decode()], "labels": words, "top_k": 3}
        (one,) = (await self._ask("POST", "/v1/predict", json=asked))["predictions"]
        if {top["label"] for top in one["top"]} != set(words):
            raise AssertionError(f"of {words} were scored {one['top']}")

    async def _embedding(self) -> None:
        photo, _ = self._photo()
        (one,) = (await self._ask("POST", "/v1/embed", files=[("images", photo)]))["embeddings"]
        if abs(float(np.linalg.norm(one["embedding"])) - 1) > 1e-3:
            raise AssertionError("an embedding is not of unit length")

    async def _open_protocol(self) -> None:
        photo, label = self._photo()
        images = {"name": "images", "shape": [1], "datatype": "BYTES", "data": [base64.b64encode(photo).decode()]}
        asked = {"inputs": [images], "outputs": [{"name": "labels"}, {"name": "scores"}]}
        outputs = (await self._ask("POST", "/v2/models/mini/infer", json=asked))["outputs"]
        labels, scores = ({one["name"]: one["data"] for one in outputs}[name] for name in ("labels", "scores"))
        if labels[int(np.argmax(scores))] != label:
            raise AssertionError(f"best of {scores} is not {label}")

    async def _list(self) -> None:
        name, words = f"list {self._random.randrange(8)}", self._random.sample(_WORDS, 2)
        await self._ask("PUT", f"/v1/labels/{name}", json=words)
        if len(await self._ask("GET", f"/v1/labels/{name}")) != 2:
            raise AssertionError("a list did not come back whole")

    async def _look(self) -> None:
        for path in ("/readyz", "/v1/models", "/metrics"):
            await self._ask("GET", path)

    async def _video(self) -> None:
        lines = await self._ask("POST", "/v1/video", files={"video": self._clip})
        if "timeline" not in lines.splitlines()[-1]:
            raise AssertionError(f"/v1/video ended with {lines[-200:]}")

    async def _camera(self) -> None:
        async with connect(self._url.replace("http", "ws", 1) + "/v1/stream") as socket:
            for _ in range(3):
                await socket.send(self._photo()[0])
                if "label" not in json.loads(await socket.recv()):
                    raise AssertionError("a frame got no label")

    async def _hang_up(self) -> None:
        """Half a body, and gone."""
        await self._send(0.5)

    async def _leave(self) -> None:
        """A whole question, and gone before the answer."""
        await self._send(1.0)

    async def _send(self, share: float) -> None:
        photo, _ = self._photo()
        host, port = self._url.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        head = f"POST /v1/predict HTTP/1.1\r\nHost: {host}\r\nContent-Type: image/jpeg\r\n"
        writer.write(f"{head}Content-Length: {len(photo)}\r\n\r\n".encode() + photo[: int(share * len(photo))])
        await writer.drain()
        writer.transport.abort()


def metric(text: str, samples: str) -> float:
    """The sum of the samples that a regular expression names."""
    return sum(float(value) for value in re.findall(rf"^{samples} (\S+)$", text, re.MULTILINE))


def main() -> int:
    """Run it, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--requests", type=int, default=18_000)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as state:
        command = [sys.executable, "-m", "cliphar", "serve", "--model", "mini", "--port", "0", "--state", state]
        with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
            log = cast("IO[bytes]", process.stderr)
            url = json.loads(log.readline())["address"]
            threading.Thread(target=log.read, daemon=True).start()  # a full pipe would stop it
            try:
                failures = hold(url, process.pid, given)
            finally:
                process.terminate()
                stopped = process.wait(60)
    if stopped:
        failures.append(f"it ended with {stopped} when told to stop")
    for failure in failures[:20]:
        print(f"FAILED {failure}")
    return 1 if failures else 0


def hold(url: str, pid: int, given: argparse.Namespace) -> list[str]:
    """What went wrong."""
    memory: list[float] = []

    async def all_of_it() -> Traffic:
        traffic = Traffic(url, given.seed)
        await traffic.learn()
        for share in (0.25, 0.75):
            await traffic.run(int(share * given.requests), given.clients)
            memory.append(psutil.Process(pid).memory_info().rss / 2**20)
        return traffic

    started = time.perf_counter()
    traffic = asyncio.run(all_of_it())
    took = time.perf_counter() - started
    until = time.perf_counter() + _AT_REST_S
    while metric(text := httpx.get(f"{url}/metrics").text, "cliphar_queue_images") and time.perf_counter() < until:
        time.sleep(0.1)
    failures = list(traffic.wrong)
    if left := metric(text, "cliphar_queue_images"):
        failures.append(f"{left:g} photos are left in the queue")
    if memory[1] > _GROWTH * memory[0]:
        failures.append(f"memory went from {memory[0]:.0f} to {memory[1]:.0f} MiB")
    if broken := metric(text, r'cliphar_requests_total\{[^}]*status="50[0124]"\}'):
        failures.append(f"the service failed on {broken:g} requests")
    seen = {
        "requests": sum(traffic.done.values()),
        "kinds": dict(traffic.done.most_common()),
        "seconds": round(took, 1),
        "asked_again": traffic.refused,
        "lost_or_wrong": len(traffic.wrong),
        "memory_mib": [round(one) for one in memory],
    }
    print(json.dumps(seen))
    return failures


if __name__ == "__main__":
    sys.exit(main())
