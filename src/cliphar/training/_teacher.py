"""What the teacher sees in every photo, computed once and kept."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
import torch.nn.functional as F
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from PIL import Image

from cliphar.bundle import fetch_teacher, sha256_file, whole_file
from cliphar.export import TEACHER_SIZE, export_teacher_graph
from cliphar.media import to_square
from cliphar.models import ClipTower
from cliphar.training._corpus import Corpus
from cliphar.training._recipe import TeacherRecipe

__all__ = ["look", "teacher_embeddings", "teacher_weights", "token_maps"]

_CHUNK = 32
_COMPONENTS, _SAMPLE = 128, 3000


def teacher_weights(recipe: TeacherRecipe, cache: Path, log: Callable[[str], None]) -> Path:
    """The real CLIP image tower's file: the recipe's own, or pulled into the cache."""
    return fetch_teacher(cache / "clip_encoder.int8.onnx", str(recipe.weights) if recipe.weights else None, say=log)


def teacher_embeddings(
    corpus: Corpus, weights: Path, max_aspect: float, log: Callable[[str], None]
) -> NDArray[np.float32]:
    """float32 [N,512], unit length. Saved as it goes, so an interrupted run takes up where it stopped."""
    file = corpus.folder / f"teacher-{sha256_file(weights)[:8]}-{max_aspect:g}.npy"
    count = len(corpus.keys)
    done = np.load(file) if file.exists() else np.zeros((0, 512), np.float32)
    if len(done) >= count:
        return np.asarray(done, np.float32)
    with tempfile.TemporaryDirectory(dir=weights.parent) as work:
        onnx.save(export_teacher_graph(weights), Path(work) / "image.onnx")
        (Path(work) / weights.name).hardlink_to(weights)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(str(Path(work) / "image.onnx"), options)
    parts, started, first = [done], time.perf_counter(), len(done)
    for at in range(first, count, 16):
        squares = [
            to_square(Image.fromarray(corpus.photo(i)), TEACHER_SIZE, max_aspect)
            for i in range(at, min(at + 16, count))
        ]
        parts += [session.run(["embeddings"], {"images": square[None]})[0] for square in squares]
        end = at + len(squares)
        if end == count or (at - first) // 16 % 32 == 31:
            with whole_file(file) as partial:
                np.save(partial, np.concatenate(parts))
            rate = (end - first) / (time.perf_counter() - started)
            log(f"teacher: {end}/{count} photos, {rate:.1f} a second")
    return np.concatenate(parts)


def look(
    tower: ClipTower,
    corpus: Corpus,
    rows: NDArray[np.int64],
    max_aspect: float,
    which: int | str,
    log: Callable[[str], None],
) -> tuple[NDArray[np.int16], NDArray[np.float32]]:
    """What the tower's lower layers make of each photo, bfloat16's bits [N,T,W], and embeddings, float32 [N,D].

    Both are kept, by the photos and by ``which`` tower it is, and taken from there if they are there.
    """
    decides = json.dumps([rows.tolist(), max_aspect, which])
    file = corpus.folder / f"tokens-{hashlib.sha256(decides.encode()).hexdigest()[:16]}.npy"
    embeddings = file.with_suffix(".z.npy")
    if not embeddings.exists():
        started = time.perf_counter()
        parts = []
        with whole_file(file) as partial:
            for at in range(0, len(rows), _CHUNK):
                photos = (Image.fromarray(corpus.photo(int(row))) for row in rows[at : at + _CHUNK])
                squares = np.stack([to_square(photo, TEACHER_SIZE, max_aspect) for photo in photos])
                seen = tower.tokens(torch.from_numpy(squares))
                if not at:
                    kept = open_memmap(partial, "w+", np.int16, (len(rows), *seen.shape[1:]))
                    with partial.open("r+b") as opened:  # a disk that is full ends a write to mapped pages by SIGBUS
                        os.posix_fallocate(opened.fileno(), 0, partial.stat().st_size)
                kept[at : at + _CHUNK] = seen.view(torch.int16).numpy()
                with torch.no_grad():
                    parts.append(tower(seen).numpy())
                done = min(at + _CHUNK, len(rows))
                if done == len(rows) or at // _CHUNK % 32 == 31:
                    log(f"teacher: {done}/{len(rows)} photos, {done / (time.perf_counter() - started):.1f} a second")
            kept.flush()
        with whole_file(embeddings) as partial:
            np.save(partial, np.concatenate(parts))
    return np.load(file, mmap_mode="r"), np.load(embeddings)


def token_maps(tokens: NDArray[np.int16]) -> NDArray[np.float16]:
    """Of what ``look`` gave, the places' tokens, normalised, in their first principal components: [N,T-1,128]."""

    def places(rows: NDArray[np.int64] | slice) -> torch.Tensor:
        seen = torch.from_numpy(np.ascontiguousarray(tokens[rows, 1:])).view(torch.bfloat16).float()
        return F.layer_norm(seen, seen.shape[-1:])

    some = np.random.default_rng(0).choice(len(tokens), min(len(tokens), _SAMPLE), replace=False)
    sample = torch.cat(
        [places(part)[:, ::12].flatten(0, 1) for part in np.array_split(np.sort(some), 100) if len(part)]
    )
    mean = sample.mean(0)
    _, basis = torch.linalg.eigh((sample - mean).T @ (sample - mean) / len(sample))
    basis = basis[:, -_COMPONENTS:]
    maps = np.empty((len(tokens), tokens.shape[1] - 1, basis.shape[1]), np.float16)
    for at in range(0, len(tokens), _CHUNK):
        maps[at : at + _CHUNK] = ((places(slice(at, at + _CHUNK)) - mean) @ basis).numpy()
    return maps
