"""open_clip's encoders behind the contract of our own: pixels and token ids in, unit-length embeddings out.

Ilharco et al., "OpenCLIP", 2021 (https://doi.org/10.5281/zenodo.5143773).
"""

from __future__ import annotations

import difflib
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cliphar.errors import BundleError, UsageError

__all__ = [
    "OpenClipEncoder",
    "OpenClipImage",
    "OpenClipText",
    "hub_if_reachable",
    "import_open_clip",
    "open_clip_encoder",
]

_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_stand_in: list[torch.library.Library] = []  # an operator lives as long as the library that declared it


class OpenClipImage(nn.Module):
    """Image tower: float [N,3,S,S] with values in 0..255 -> float [N,D], unit length."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, visual: nn.Module, mean: tuple[float, ...], deviation: tuple[float, ...]) -> None:
        super().__init__()
        self.visual = visual
        self.register_buffer("mean", 255 * torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("deviation", 255 * torch.tensor(deviation).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.visual((images - self.mean) / self.deviation)
        return F.normalize(features, dim=-1)


class OpenClipText(nn.Module):
    """Text tower: int64 ids [N,T], T the context length -> float [N,D], unit length."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        features: Tensor = self.model.encode_text(ids, normalize=True)  # type: ignore[operator]
        return features


@dataclass(frozen=True)
class OpenClipEncoder:
    """A CLIP of open_clip: ``image`` and ``text`` share their weights with ``model``.

    ``size`` is the side of the image in pixels, ``squash`` whether it is resized without regard to its aspect
    (SigLIP) instead of cropped, ``logit_scale`` what training multiplied cosines by, and ``config`` the architecture
    as open_clip's own configuration gives it.
    """

    name: str
    model: nn.Module
    image: OpenClipImage
    text: OpenClipText
    size: int
    embedding_dim: int
    context_length: int
    squash: bool
    logit_scale: float
    config: dict[str, Any]


def import_open_clip() -> ModuleType:
    """open_clip; UsageError if it is not installed.

    It imports torchvision, whose Python side does not import beside a torch that its compiled side was not built
    for, because two operators are missing that only detection uses. They are declared then, without a body.
    """
    try:
        try:
            import torchvision  # noqa: F401
        except RuntimeError:
            for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
                del sys.modules[name]
            library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
            for operator in _OPERATORS:
                library.define(operator)  # type: ignore[no-untyped-call]
            _stand_in.append(library)
        import open_clip
    except ImportError as error:
        raise UsageError(f"open_clip is not here ({error}); run: pip install 'cliphar[train]'") from error
    module: ModuleType = open_clip
    return module


@contextmanager
def _quiet() -> Iterator[None]:
    """Without open_clip's and the hub's log lines: each retry is several, and the error says it all again."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


@contextmanager
def hub_if_reachable() -> Iterator[None]:
    """The hub, or, where it does not answer, what its client has kept: by itself it would try for a minute."""
    from huggingface_hub import constants, get_session

    before = constants.HF_HUB_OFFLINE
    try:
        if not before:
            get_session().head(constants.ENDPOINT, timeout=10)
    except Exception:  # the client's transport has its own classes, and which one it is has changed
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def open_clip_encoder(name: str, pretrained: str | Path | None = None, seed: int = 0) -> OpenClipEncoder:
    """Build one of open_clip's models, in evaluation mode, float32, on the CPU.

    Args:
        name: an architecture (``ViT-B-32``), ``hf-hub:OWNER/REPO``, or ``local-dir:FOLDER`` that holds
            open_clip_config.json and weights.
        pretrained: a checkpoint's file or one of open_clip's tags, which is downloaded; None initialises an
            architecture at random (the two other kinds of name bring their own weights).
        seed: of the random initialisation; the caller's generator is left as it was.

    Raises:
        UsageError: open_clip is not installed, or has no such model.
        BundleError: the weights cannot be fetched or do not fit.
    """
    open_clip = import_open_clip()
    if ":" not in name and name not in open_clip.list_models():
        close = difflib.get_close_matches(name, open_clip.list_models(), 3, 0.4)
        raise UsageError(f"open_clip has no model '{name}'; near it are {', '.join(close) or 'none'}")
    there = pretrained is not None and os.path.isfile(pretrained)  # noqa: PTH113 - Path's raises where it may not look
    asks = name.startswith("hf-hub:") or (pretrained is not None and not there)
    try:
        with _quiet(), hub_if_reachable() if asks else nullcontext(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            config = open_clip.get_model_config(name)
            model = open_clip.create_model(name, pretrained=str(pretrained) if pretrained else None)
    except Exception as error:  # the hub's client, safetensors and open_clip raise classes of their own
        # what follows the first sentence is advice to programmers, torch's to unpickle what nobody should
        reason = " ".join(str(error).split()).partition(". ")[0][:300].rstrip(".") or type(error).__name__
        mend = "connect to the network, or give the weights as a local file" if asks else "give weights made for it"
        raise BundleError(f"cannot make open_clip's '{name}': {reason}; {mend}") from error
    if config is None:
        raise BundleError(f"cannot make open_clip's '{name}': it has no open_clip_config.json; give another folder")
    model.eval().requires_grad_(False)
    preprocess = model.visual.preprocess_cfg
    size = preprocess["size"]
    return OpenClipEncoder(
        name=name,
        model=model,
        image=OpenClipImage(model.visual, tuple(preprocess["mean"]), tuple(preprocess["std"])).eval(),
        text=OpenClipText(model).eval(),
        size=int(size if isinstance(size, int) else size[0]),
        embedding_dim=int(config["embed_dim"]),
        context_length=int(config["text_cfg"].get("context_length", 77)),
        squash=preprocess.get("resize_mode") == "squash",
        logit_scale=float(model.logit_scale.exp()),
        config=config,
    )
