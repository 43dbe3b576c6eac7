"""SmoothQuant: what is hard to round in the inputs of matrix products moves into their weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from cliphar.export._quantize import tapped_session, weight_axes

__all__ = ["smooth_inputs"]

_SHARE = 0.7  # of its range that an input gives away: better for CLIP ViT-B/16 than 0.5, or 0.8 to 1
_LEAST = 1e-5


def smooth_inputs(model: onnx.ModelProto, images: NDArray[np.uint8]) -> onnx.ModelProto:
    """A transformer that computes the same, whose matrix products lose less when their inputs are rounded to 8 bits.

    A few of its channels are many times as large as the others, which one scale for all rounds away. So each channel is
    divided by ``max |x| ** 0.7 / max |w| ** 0.3``, where x is what it is over ``images``, uint8 [N,S,S,3], and w are
    the weights it meets, which are multiplied by that (Xiao et al., 2022, https://arxiv.org/abs/2211.10438). A graph
    without attention is returned as it is: convolutions have no such channels.
    """
    if all(node.op_type != "Softmax" for node in model.graph.node):
        return model
    result = onnx.ModelProto()
    result.CopyFrom(model)
    uses = Counter(name for node in result.graph.node for name in node.input)
    axes = weight_axes(result)
    weights = {
        tensor.name: tensor
        for tensor in result.graph.initializer
        if len(tensor.dims) == 2 and tensor.name in axes and uses[tensor.name] == 1
    }
    met: dict[str, list[onnx.TensorProto]] = {}
    for node in result.graph.node:
        if len(node.input) > 1 and node.input[1] in weights:
            met.setdefault(node.input[0], []).append(weights[node.input[1]])
    shares = {}
    for name, largest in _largest(model, sorted(met), images).items():
        heaviest = np.max([np.abs(numpy_helper.to_array(tensor)).max(axes[tensor.name]) for tensor in met[name]], 0)
        factor = np.maximum(largest, _LEAST) ** _SHARE / np.maximum(heaviest, _LEAST) ** (1 - _SHARE)
        shares[name] = numpy_helper.from_array(1 / factor, f"{name}_share")
        for tensor in met[name]:
            weighed = numpy_helper.to_array(tensor) * np.expand_dims(factor, axes[tensor.name])
            tensor.CopyFrom(numpy_helper.from_array(weighed, tensor.name))
    _share(result.graph, shares, weights)
    return result


def _share(graph: onnx.GraphProto, shares: Mapping[str, onnx.TensorProto], weights: Mapping[str, object]) -> None:
    """Let the products of ``weights`` take their inputs multiplied by ``shares``, in place."""
    nodes: list[onnx.NodeProto] = []
    ready = set[str]()
    for node in graph.node:
        if len(node.input) > 1 and node.input[1] in weights:
            name = node.input[0]
            if name not in ready:
                made = [name, shares[name].name], [f"{name}_smooth"], f"Smooth_{len(ready)}"
                nodes.append(helper.make_node("Mul", *made))
            ready.add(name)
            node.input[0] = f"{name}_smooth"
        nodes.append(node)
    graph.initializer.extend(shares.values())
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]  # the graph's go with its list
    del graph.node[:]
    graph.node.extend(copies)


def _largest(model: onnx.ModelProto, names: list[str], images: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
    """Of values [...,C] within the graph the largest magnitude of each channel, float32 [C], over ``images``."""
    found = {name: np.zeros(1, np.float32) for name in names}
    if not names:
        return found
    session = tapped_session(model, names)
    for at in range(0, len(images), 4):
        for name, values in zip(names, session.run(names, {"images": images[at : at + 4]}), strict=True):
            found[name] = np.maximum(found[name], np.abs(values).reshape(-1, values.shape[-1]).max(0))
    return found
