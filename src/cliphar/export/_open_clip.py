"""A bundle of one of open_clip's models: fetched, exported, proved, put into the store."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import numpy as np
import onnx
import torch
from safetensors.numpy import save

from cliphar.bundle import (
    PULLS,
    Bundle,
    BundleInfo,
    Calibration,
    ImageSpec,
    Provenance,
    Source,
    TextSpec,
    read_bundle,
    store,
    write_bundle,
)
from cliphar.errors import BundleError, UsageError
from cliphar.export._clip_tokenizer import clip_tokenizer
from cliphar.export._image import export_image_tower
from cliphar.export._torch_onnx import export
from cliphar.models import OpenClipEncoder, OpenClipText, open_clip_encoder
from cliphar.runtime import OnnxRuntime

__all__ = ["export_clip_text", "open_clip_bundle", "open_clip_name", "pull_open_clip"]

# our name -> open_clip's architecture and tag
_NAMES = {
    "clip-vit-b32": ("ViT-B-32-quickgelu", "openai"),
    "siglip2-b16": ("ViT-B-16-SigLIP2", "webli"),
    "mobileclip2-s0": ("MobileCLIP2-S0", "dfndr2b"),
}
_PREFIX = "open_clip:"
_TEMPLATES = ("{}", "a photo of {}", "a photo of a person {}", "a photo of people {}")


def open_clip_name(name: str) -> tuple[str, str] | None:
    """Architecture and tag of ``open_clip:ARCHITECTURE/TAG`` or of a name of ours for one; None for another name."""
    if not name.startswith(_PREFIX):
        return _NAMES.get(name)
    architecture, _, tag = name.removeprefix(_PREFIX).partition("/")
    return architecture, tag


def pull_open_clip(name: str, source: str | None = None, *, say: Callable[[str], None] = lambda _: None) -> Bundle:
    """Put a bundle of an open_clip model into the store; one that is there and whole is left as it is.

    Args:
        name: as :func:`open_clip_name` takes it.
        source: a checkpoint's file, or a folder with open_clip_config.json and weights; None asks the hub. SigLIP's
            tokenizer.json and tokenizer_config.json lie beside them.
        say: told what is going on.

    Raises:
        UsageError: open_clip has no such model, or no tag was given.
        BundleError: another name, the weights cannot be had, do not fit, or an export differs from the model.
    """
    if (known := open_clip_name(name)) is None:
        names = ", ".join((*PULLS, *_NAMES))
        raise BundleError(f"nothing to pull for '{name}'; can be pulled: {names} and {_PREFIX}ARCHITECTURE/TAG")
    architecture, tag = known
    if not tag and source is None:
        raise UsageError(f"'{name}' names no weights; write {_PREFIX}{architecture}/TAG or give a file")
    stored = re.sub(r"[^A-Za-z0-9._-]", "-", name.removeprefix(_PREFIX))
    target = store() / stored
    if target.is_dir():
        try:
            there = read_bundle(target)
        except BundleError:
            say(f"{target} is damaged or older; making it again")
        else:
            if source is not None:  # and export may have added to it
                say(f"{target} is there already and stays as it is; remove it first to have it made of {source}")
            return there
    if source is None:
        say(f"asking the hub for {architecture} {tag}")
        encoder = open_clip_encoder(architecture, tag)
    elif Path(source).is_dir():
        encoder = open_clip_encoder(f"local-dir:{source}")
    elif Path(source).is_file():
        encoder = open_clip_encoder(architecture, source)
    else:
        raise BundleError(f"cannot pull '{name}': {source} is neither a file nor a folder; check the path")
    say("exporting both towers")
    beside = None if source is None else Path(source) if Path(source).is_dir() else Path(source).parent
    return open_clip_bundle(encoder, target, name=stored, weights=tag or "a local file", tokenizer=beside)


def open_clip_bundle(
    encoder: OpenClipEncoder, target: Path, *, name: str, weights: str, tokenizer: Path | None = None
) -> Bundle:
    """Export both towers, prove them against torch, and write a bundle without labels of its own.

    Nothing is calibrated, as no photos are at hand: scores are a softmax at the model's own scale, a prediction set
    holds every label, and no answer is ``unknown``. ``tokenizer``: see :func:`clip_tokenizer`.
    """
    size, length = encoder.size, encoder.context_length
    words = clip_tokenizer(encoder, tokenizer)  # first, as it is what may be missing
    unfitted = Calibration.unfitted(encoder.logit_scale)
    info = BundleInfo(
        name=name,
        description=f"open_clip's {encoder.name}, weights {weights}. Not calibrated; any labels in plain words.",
        labels=(),
        embedding_dim=encoder.embedding_dim,
        image=ImageSpec(size=size, max_aspect=4.0 if encoder.squash else 1.0),
        text=TextSpec(templates=_TEMPLATES, context_length=length),
        known=unfitted,
        open=unfitted,
        sources=(Source(name=f"open_clip {encoder.name}, {weights}", role="both towers", licence="see its publisher"),),
        limits=("not calibrated: prediction sets hold every label, and nothing is answered unknown",),
        provenance=Provenance(
            recipe={"kind": "open_clip", "model": encoder.name.rsplit(":", 1)[0], "weights": weights},
            data_sha256="none",
            git_revision="none",
            seed=0,
            versions={package: metadata.version(package) for package in ("torch", "open_clip_torch", "onnx")},
            hardware="none",
            created=datetime.now(UTC).strftime("%Y-%m-%d"),
        ),
    )
    files: dict[str, Path | bytes] = {
        "image.onnx": export_image_tower(encoder.image, size).SerializeToString(),
        "text.onnx": export_clip_text(encoder.text, length).SerializeToString(),
        "tokenizer.json": words,
        "head.safetensors": save({"class_vectors": np.zeros((0, encoder.embedding_dim), np.float32)}),
    }
    with tempfile.TemporaryDirectory() as work:
        _prove(encoder, write_bundle(Path(work) / "bundle", info, files))
    return write_bundle(target, info, files, overwrite=True)


def export_clip_text(text: OpenClipText, context_length: int) -> onnx.ModelProto:
    """``ids`` int64 [N,context_length] -> ``embeddings`` float32 [N,D], unit length."""
    example = torch.zeros(2, context_length, dtype=torch.int64)
    example[:, 1] = 1  # an end of text for the pooling to find
    return export(text, example, "ids", "embeddings", {0: torch.export.Dim("texts")})


def _prove(encoder: OpenClipEncoder, bundle: Bundle) -> None:
    from tokenizers import Tokenizer

    runtime = OnnxRuntime(bundle, provider="cpu")
    images = np.random.default_rng(0).integers(0, 256, (3, encoder.size, encoder.size, 3), dtype=np.uint8)
    texts = ["a person riding a bike", "cooking"]
    tokenizer = Tokenizer.from_file(str(bundle.file("tokenizer.json")))
    ids = torch.tensor([encoding.ids for encoding in tokenizer.encode_batch(texts)])
    with torch.inference_mode():
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float()
        expected = encoder.image(pixels).numpy(), encoder.text(ids).numpy()
    answers = runtime.encode_images(images), runtime.encode_text(texts)
    off = max(float(np.abs(ours - theirs).max()) for ours, theirs in zip(answers, expected, strict=True))
    if not off < 1e-3:
        raise BundleError(f"the export of '{encoder.name}' differs from torch by {off:.2g}; use another version")
