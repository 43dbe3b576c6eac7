"""One runtime in a process of its own, so that its memory and its start are its own; asked through a pipe."""

from __future__ import annotations

import io
import resource
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cliphar.bundle import Bundle, packaged, read_bundle
from cliphar.errors import ClipharError
from cliphar.recognizer import Recognizer
from cliphar.runtime import Runtime, load_runtime

__all__ = ["EAGER", "PYTORCH", "serve"]

EAGER = "pytorch"
PYTORCH = (EAGER, "pytorch-fp16", "pytorch-fp16-compile")  # the last two are for GPUs


class _PyTorch(Runtime):
    """The bundle's architecture in PyTorch, on the GPU that it sees or the CPU; one of ``PYTORCH``.

    Its weights may be random: they do not change its speed.
    """

    def __init__(self, bundle: Bundle, name: str, threads: int) -> None:
        import torch

        from cliphar.models import ImageTower, load_towers, open_clip_encoder

        torch.set_num_threads(threads)
        recipe = bundle.info.provenance.recipe
        match recipe.get("kind"):
            case "mini":
                self._tower: torch.nn.Module = ImageTower(recipe["distill"]["backbone"], bundle.info.embedding_dim)
            case "space":
                self._tower = open_clip_encoder("ViT-B-16-quickgelu").image
            case "open_clip":
                self._tower = open_clip_encoder(recipe["model"]).image
            case _:  # a method of training: its towers can be trained on
                self._tower = load_towers(bundle).image
        self.name = name
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._dtype = torch.float32 if name == EAGER else torch.float16
        self._tower.eval().to(self._device, self._dtype)
        if name.endswith("-compile"):
            self._tower.compile()

    def encode_images(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        import torch

        with torch.inference_mode():
            pixels = torch.from_numpy(images).to(self._device).permute(0, 3, 1, 2).to(self._dtype)
            result: NDArray[np.float32] = self._tower(pixels).float().cpu().numpy()
        return result

    def encode_text(self, texts: Sequence[str]) -> NDArray[np.float32]:
        raise NotImplementedError

    def peak(self) -> float | None:
        """Multiply-and-add operations a second, two each, of 2048 x 2048 float32 matrices; the best of ten.

        None on a GPU: what runs on the processor beside it has another peak.
        """
        import torch

        if self._device != "cpu":
            return None
        left = torch.rand(2048, 2048)
        best = np.inf
        for _ in range(10):
            started = time.perf_counter()
            torch.mm(left, left)
            best = min(best, time.perf_counter() - started)
        return 2 * 2048**3 / best


def serve(pipe: Connection, path: Path, name: str, threads: int) -> None:
    """Load a runtime, then answer requests until None comes or the pipe is closed.

    The first message back is ``{"load_s": seconds}``, or a line that says why the runtime does not run. Requests:
    ``("tensors", batch, seconds)``, answered with the seconds of each call; ``("bytes", batch, seconds)``, photos a
    second from JPEG; ``("embed", uint8 [N,S,S,3], batch)``, a list of float32 [batch,D]; ``("peak",)``, operations a
    second of matrix products, or None if the runtime is not PyTorch; ``("memory",)``, MiB at the most.
    """
    try:
        bundle = read_bundle(path, verify=False)
        started = time.perf_counter()
        if name in PYTORCH:
            runtime: Runtime = _PyTorch(bundle, name, threads)
        else:
            runtime = load_runtime(bundle, name, threads=threads)
        side = bundle.info.image.size
        runtime.encode_images(np.zeros((1, side, side, 3), np.uint8))
        load_s = time.perf_counter() - started
    except (ClipharError, ImportError) as error:
        pipe.send(str(error))
        return
    images = np.random.default_rng(0).integers(0, 256, (256, side, side, 3), dtype=np.uint8)
    pipe.send({"load_s": load_s})
    while (request := _next(pipe)) is not None:
        match request:
            case "tensors", batch, seconds:
                pipe.send(_times(runtime, images[:batch], seconds))
            case "bytes", batch, seconds:
                pipe.send(_from_bytes(bundle, runtime, batch, seconds))
            case "embed", squares, batch:
                pipe.send([runtime.encode_images(squares[at : at + batch]) for at in range(0, len(squares), batch)])
            case ("peak",):
                pipe.send(runtime.peak() if isinstance(runtime, _PyTorch) else None)
            case ("memory",):
                pipe.send(_peak_memory())


def _next(pipe: Connection) -> Any:
    try:
        return pipe.recv()
    except EOFError:  # whoever asked is gone
        return None


def _peak_memory() -> float:
    """MiB of this process at its largest. Linux hands on getrusage's figure from the parent."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**10
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # bytes, where there is no /proc


def _times(runtime: Runtime, images: NDArray[np.uint8], seconds: float) -> list[float]:
    times: list[float] = []
    runtime.encode_images(images)
    end = time.perf_counter() + seconds
    while len(times) < 2 or time.perf_counter() < end:
        started = time.perf_counter()
        runtime.encode_images(images)
        times.append(time.perf_counter() - started)
    return times


def _from_bytes(bundle: Bundle, runtime: Runtime, batch: int, seconds: float) -> float:
    recognizer = Recognizer(bundle, runtime, batch_size=batch)
    photos = [_jpeg(file) for file in sorted(packaged("samples").glob("*.jpg"))]
    end = time.perf_counter() + seconds
    count = 0

    def supply() -> Iterator[bytes]:
        while time.perf_counter() < end:
            yield photos[count % len(photos)]

    started = time.perf_counter()
    for _ in recognizer.embed_images(supply()):
        count += 1
    return count / (time.perf_counter() - started)


def _jpeg(file: Path) -> bytes:
    content = io.BytesIO()
    Image.open(file).convert("RGB").resize((640, 480)).save(content, "JPEG", quality=85)
    return content.getvalue()
