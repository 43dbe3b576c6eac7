"""A bundle's encoders as torch modules, so that training can go on from any bundle that has their weights."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from cliphar.bundle import Bundle
from cliphar.errors import BundleError, reason_of
from cliphar.models._efficientnet import SCALES
from cliphar.models._image_tower import ImageTower
from cliphar.models._open_clip import OpenClipEncoder, OpenClipImage, OpenClipText, import_open_clip

__all__ = ["WEIGHTS_FILE", "Towers", "load_towers", "open_clip_towers", "save_weights"]

WEIGHTS_FILE = "weights.safetensors"
_ABOUT = "about"  # one key: safetensors writes several in no fixed order


@dataclass(frozen=True)
class Towers:
    """``image`` takes float [N,3,S,S] with values in 0..255 and returns float [N,D], unit length. ``text`` takes
    int64 ids [N,T], as ``tokenize`` gives them, and returns float [N,D], unit length; None where the bundle has its
    text tower as a graph only. ``architecture`` is ``efficientnet-lite0`` to ``2`` or ``open_clip``, whose
    configuration is ``config``; ``logit_scale`` is what training multiplied cosines by.
    """

    architecture: str
    image: ImageTower | OpenClipImage
    text: OpenClipText | None = None
    tokenize: Callable[[Sequence[str]], Tensor] | None = None
    logit_scale: float = 30.0
    config: dict[str, Any] | None = None

    @property
    def is_transformer(self) -> bool:
        """Whether the towers are CLIP's own, which large learning rates destroy."""
        return self.architecture == "open_clip"

    def recompute(self) -> None:
        """Train with less memory and more time: activations are computed again instead of kept."""
        if isinstance(self.image, ImageTower):
            self.image.backbone.recompute = True
        elif isinstance(self.text, OpenClipText):
            self.text.model.set_grad_checkpointing(True)  # type: ignore[operator]


def load_towers(bundle: Bundle) -> Towers:
    """The encoders of a bundle, in float32 on the CPU, in evaluation mode.

    From ``weights.safetensors`` if there is one. Else, if image.onnx is an EfficientNet-Lite of ours, from its
    8-bit weights; batch norms, which the graph has folded away, then stand for their folded bias.

    Raises:
        BundleError: the bundle has neither, or they cannot be read.
    """
    if WEIGHTS_FILE in bundle.info.files:
        return _from_weights(bundle)
    constants = _constants(bundle)
    prefix = "tower.backbone."
    if f"{prefix}_conv_stem.weight" not in constants:
        raise BundleError(
            f"bundle '{bundle.info.name}' has no {WEIGHTS_FILE} to train from; take one that has, such as mini"
        )
    weights = {name.removeprefix("tower."): value for name, value in constants.items() if name.startswith("tower.")}
    scale = _scale_of(weights, bundle)
    tower = ImageTower(scale, bundle.info.embedding_dim)
    tower.load_state_dict(_unfold(tower, weights))
    return Towers(f"efficientnet-{scale}", tower.eval())


def save_weights(towers: Towers) -> bytes:
    """The content of ``weights.safetensors``: ``image.*``, or all of open_clip's model, with its architecture."""
    about = {"architecture": towers.architecture, "logit_scale": towers.logit_scale, "config": towers.config}
    state = {f"image.{name}": tensor for name, tensor in towers.image.state_dict().items()}
    if isinstance(towers.text, OpenClipText):
        state = {f"model.{name}": tensor for name, tensor in towers.text.model.state_dict().items()}
    return save(
        {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, {_ABOUT: json.dumps(about)}
    )


def _from_weights(bundle: Bundle) -> Towers:
    file = bundle.file(WEIGHTS_FILE)
    try:
        with safe_open(file, "pt") as opened:
            about = json.loads((opened.metadata() or {})[_ABOUT])
        state = load_file(file)
        architecture, scale = about["architecture"], float(about["logit_scale"])
        if architecture == "open_clip":
            return _open_clip(bundle, about["config"], state, scale)
        tower = ImageTower(architecture.removeprefix("efficientnet-"), bundle.info.embedding_dim)
        tower.load_state_dict({name.removeprefix("image."): value for name, value in state.items()})
    except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
        raise BundleError(
            f"cannot read {WEIGHTS_FILE} of bundle '{bundle.info.name}': {reason_of(error)}; make it again"
        ) from error
    return Towers(architecture, tower.eval(), logit_scale=scale)


def open_clip_towers(encoder: OpenClipEncoder) -> Towers:
    """The towers of one of open_clip's models, as ``save_weights`` takes them."""
    mean, deviation = ((getattr(encoder.image, name) / 255).flatten().tolist() for name in ("mean", "deviation"))
    config = encoder.config | {"preprocess": {"mean": mean, "std": deviation}}
    return Towers("open_clip", encoder.image, encoder.text, None, encoder.logit_scale, config)


def _open_clip(bundle: Bundle, config: dict[str, Any], state: dict[str, Tensor], scale: float) -> Towers:
    open_clip = import_open_clip()
    settings = dict(config)
    preprocess = settings.pop("preprocess")
    custom = settings.pop("custom_text", False) or "hf_model_name" in settings["text_cfg"]
    model = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**settings)
    model.load_state_dict({name.removeprefix("model."): value for name, value in state.items()})
    model.eval()
    image = OpenClipImage(model.visual, tuple(preprocess["mean"]), tuple(preprocess["std"]))
    return Towers("open_clip", image.eval(), OpenClipText(model).eval(), _tokenizer(bundle), scale, config)


def _tokenizer(bundle: Bundle) -> Callable[[Sequence[str]], Tensor]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(bundle.file("tokenizer.json")))
    tokenizer.enable_truncation(bundle.info.text.context_length)
    tokenizer.enable_padding(**(tokenizer.padding or {}) | {"length": bundle.info.text.context_length})
    return lambda texts: torch.tensor([encoding.ids for encoding in tokenizer.encode_batch(list(texts))])


def _constants(bundle: Bundle) -> dict[str, NDArray[np.generic]]:
    """Initialisers of image.onnx; those kept as int8 with a scale are brought back to float."""
    import onnx

    try:
        graph = onnx.load(bundle.file("image.onnx"), load_external_data=False).graph
    except (OSError, ValueError) as error:
        raise BundleError(f"cannot read image.onnx of bundle '{bundle.info.name}': {error}") from error
    small = [tensor for tensor in graph.initializer if tensor.data_location != onnx.TensorProto.EXTERNAL]
    found = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in small}
    for name in [name for name in found if name.endswith("_int8")]:
        plain = name.removesuffix("_int8")
        found[plain] = found[name].astype(np.float32) * found[f"{plain}_scale"]
    return found


def _scale_of(weights: dict[str, NDArray[np.generic]], bundle: Bundle) -> str:
    blocks = 1 + max(int(found[1]) for name in weights if (found := re.match(r"backbone\._blocks\.(\d+)\.", name)))
    width = weights["backbone._conv_head.weight"].shape[1]
    for scale in SCALES:
        backbone = ImageTower(scale, 8).backbone
        if len(backbone._blocks) == blocks and backbone._conv_head.in_channels == width:
            return scale
    raise BundleError(f"image.onnx of bundle '{bundle.info.name}' is no EfficientNet-Lite that is known here")


def _unfold(tower: ImageTower, weights: dict[str, NDArray[np.generic]]) -> dict[str, Tensor]:
    """A state dict in which each batch norm only adds the bias that was folded into its convolution."""
    state = tower.state_dict()
    for name in state:
        if name in weights:
            state[name] = torch.from_numpy(np.array(weights[name], np.float32))
    norms = {name: module for name, module in tower.named_modules() if isinstance(module, nn.BatchNorm2d)}
    for name, norm in norms.items():
        parent, _, own = name.rpartition(".")
        convolution = {"_bn0": "_expand_conv", "_bn1": "_depthwise_conv", "_bn2": "_project_conv"}[own]
        if parent == "backbone":
            convolution = {"_bn0": "_conv_stem", "_bn1": "_conv_head"}[own]
        state[f"{name}.bias"] = torch.from_numpy(np.array(weights[f"{parent}.{convolution}.weight_bias"], np.float32))
        state[f"{name}.weight"] = torch.ones(norm.num_features)
        state[f"{name}.running_mean"] = torch.zeros(norm.num_features)
        state[f"{name}.running_var"] = torch.full((norm.num_features,), 1 - norm.eps)
    return state
