"""What every recipe's bundle is finished with: what it was measured at, what it came from, what it is not good for."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cliphar.bundle import Metrics, Provenance, Source
from cliphar.evaluation import evaluate
from cliphar.recognizer import Prediction

__all__ = ["BACKGROUND_PHOTOS", "LIMITS", "MINI_SOURCES", "SPACE_SOURCES", "bias_photos", "measured", "provenance"]

BACKGROUND_PHOTOS = 1200
_BIAS_PHOTOS = 64

_PHOTOS = (
    Source(
        name="Human Action Recognition, 15 classes",
        role="photos and labels of the known actions",
        licence="none stated; photos from the web",
    ),
    Source(
        name="100 Sports (70 of them)", role="photos and labels of sports", licence="none stated; photos from the web"
    ),
    Source(name="Flickr8k", role="photos and captions", licence="research use; photos belong to their Flickr authors"),
)
_CLIP = Source(name="OpenAI CLIP ViT-B/16, image tower in int8", role="the space; teacher", licence="MIT")
_TEXT = Source(name="all-MiniLM-L6-v2", role="sentence encoder, 4-bit, vocabulary cut", licence="Apache-2.0")
_GLOSSARY = Source(name="cliphar's glossary", role="descriptions of actions", licence="Apache-2.0")

SPACE_SOURCES = (_CLIP, _TEXT, *_PHOTOS, _GLOSSARY)
MINI_SOURCES = (
    Source(name="EfficientNet-Lite1, ImageNet weights", role="start of the image tower", licence="Apache-2.0"),
    *SPACE_SOURCES,
)
LIMITS = (
    "decisions about people: it names what a picture looks like, and is wrong for some groups more than for others",
    "surveillance, emergencies and safety without a person who checks: a fight or a fall can be missed",
    "actions that need time to tell apart, such as sitting down from standing up: it sees single photos",
    "several people doing different things: it answers for the photo as a whole",
    "words far from everyday English; known actions are trained, others are understood by their words alone",
    "the words of the known actions overlap (calling, texting; laughing, hugging), and so did their labels",
)


def bias_photos(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Of the photos that were trained on, those that ``compress_weights`` is given, spread evenly; 64 at most."""
    return rows[:: -(-len(rows) // _BIAS_PHOTOS)]


def measured(answers: Sequence[Prediction], truth: Sequence[str], description: str) -> Metrics:
    """The figures of answers to photos whose labels are known."""
    values = evaluate(answers, truth).to_dict()
    return Metrics(description=description, n=int(values.pop("n")), values=dict(values))


def provenance(settings: dict[str, Any], data_sha256: str, seed: int, gpus: str = "") -> Provenance:
    """Of what is made here and now by a recipe's ``settings``; ``gpus`` is what stands behind the CPU's cores."""
    packages = ("torch", "onnx", "onnxruntime", "numpy", "tokenizers", "pillow")
    return Provenance(
        recipe=settings,
        data_sha256=data_sha256,
        git_revision=_code_revision(),
        seed=seed,
        versions={name: metadata.version(name) for name in packages},
        hardware=f"{platform.machine()}, {torch.get_num_threads()} CPU cores{gpus}",
        created=datetime.now(UTC).strftime("%Y-%m-%d"),
    )


def _code_revision() -> str:
    """CLIPHAR_REVISION, which an image is built with; else the working directory's git commit; else ``unknown``."""
    told = os.environ.get("CLIPHAR_REVISION")
    if told:
        return told
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    except OSError:  # there is no git here
        return "unknown"
    return done.stdout.strip() or "unknown"
