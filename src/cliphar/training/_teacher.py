"""The teacher's embeddings of every photo, computed once and kept."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from PIL import Image

from cliphar.bundle import fetch_teacher, sha256_file, whole_file
from cliphar.export import TEACHER_SIZE, export_teacher_graph
from cliphar.media import to_square
from cliphar.training._corpus import Corpus
from cliphar.training._recipe import TeacherRecipe

__all__ = ["teacher_embeddings", "teacher_weights"]


def teacher_weights(recipe: TeacherRecipe, cache: Path, log: Callable[[str], None]) -> Path:
    """The real CLIP image tower's file: the recipe's own, or pulled into the cache."""
    return fetch_teacher(cache / "clip_encoder.int8.onnx", str(recipe.weights) if recipe.weights else None, say=log)


def teacher_embeddings(
    corpus: Corpus, recipe: TeacherRecipe, cache: Path, log: Callable[[str], None]
) -> NDArray[np.float32]:
    """float32 [N,512], unit length. Saved as it goes, so an interrupted run takes up where it stopped."""
    weights = teacher_weights(recipe, cache, log)
    key = f"teacher-{sha256_file(weights)[:8]}-{recipe.max_aspect:g}"
    file = cache / corpus.sha256[:16] / f"{key}.npy"
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
            to_square(Image.fromarray(corpus.photo(i)), TEACHER_SIZE, recipe.max_aspect)
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
