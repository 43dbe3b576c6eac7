"""A runtime of a bundle in the folders that model servers read: Triton's repository, and KServe's storage around it."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from cliphar.bundle import Bundle
from cliphar.errors import UsageError

__all__ = ["LAYOUTS", "write_layout"]

LAYOUTS = ("triton", "kserve")
# suffix of a runtime's file -> Triton's backend, and the name it looks for in a version's folder
_BACKENDS = {
    ".onnx": ("onnxruntime", "model.onnx"),
    ".xml": ("openvino", "model.xml"),
    ".plan": ("tensorrt", "model.plan"),
}
_MAX_BATCH = 64
_TRITON = "25.03-py3"  # left to itself KServe takes 23.05, which cannot read graphs as new as ours


def write_layout(bundle: Bundle, layout: str, target: Path, *, runtime: str = "onnx") -> Path:
    """Write the image encoder as a model that Triton Inference Server loads; whole or not at all.

    ``triton``: ``target/NAME/config.pbtxt`` and ``target/NAME/1/``; give ``target`` to ``--model-repository``.
    ``kserve``: the same below ``target/models``, and ``target/inference-service.yaml`` that names it; put ``models``
    where its ``storageUri`` points. The model takes ``images`` uint8 [N,S,S,3] and answers ``embeddings`` float32
    [N,D]; labels and scores are the caller's, from head.safetensors and bundle.json.

    Args:
        bundle: a bundle that was read.
        layout: one of ``LAYOUTS``.
        target: a folder that is made.
        runtime: of ``bundle.runtimes``, an ONNX, OpenVINO or TensorRT one.

    Raises:
        UsageError: ``target`` exists, or there is no such runtime, or no server backend for it.
    """
    if target.exists():
        raise UsageError(f"{target} exists; give another place with --out")
    file = bundle.runtimes.get(runtime)
    if file is None or Path(file).suffix not in _BACKENDS:
        served = ", ".join(name for name, other in bundle.runtimes.items() if Path(other).suffix in _BACKENDS)
        raise UsageError(
            f"runtime '{runtime}' of bundle '{bundle.info.name}' is not one that Triton serves; choose among {served}"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        repository = work / "models" if layout == "kserve" else work
        _triton(bundle, runtime, file, repository / bundle.info.name)
        if layout == "kserve":
            (work / "inference-service.yaml").write_text(_service(bundle.info.name), encoding="utf-8")
        work.chmod(0o755)
        work.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def _triton(bundle: Bundle, runtime: str, file: str, folder: Path) -> None:
    backend, name = _BACKENDS[Path(file).suffix]
    version = folder / "1"
    version.mkdir(parents=True)
    shutil.copyfile(bundle.file(file), version / name)
    if backend == "onnxruntime":
        for other in _weights(bundle.file(file)):
            shutil.copyfile(bundle.file(other), version / other)
    else:
        for other, entry in bundle.info.files.items():
            if other != file and entry.runtime == runtime:
                shutil.copyfile(bundle.file(other), version / f"{Path(name).stem}{Path(other).suffix}")
    size, dim = bundle.info.image.size, bundle.info.embedding_dim
    settings, batch = f"max_batch_size: {_MAX_BATCH}\ndynamic_batching {{ }}\n", ""
    if backend == "openvino":  # with max_batch_size it takes batches of that size and no other
        settings, batch = "instance_group [ { kind: KIND_CPU } ]\n", "-1, "
    elif _one_by_one(bundle, file):  # such a graph has no batch axis to offer
        settings, batch = "", "1, "
    (folder / "config.pbtxt").write_text(
        f'name: "{bundle.info.name}"\nbackend: "{backend}"\n{settings}'
        f'input [ {{ name: "images" data_type: TYPE_UINT8 dims: [ {batch}{size}, {size}, 3 ] }} ]\n'
        f'output [ {{ name: "embeddings" data_type: TYPE_FP32 dims: [ {batch}{dim} ] }} ]\n',
        encoding="utf-8",
    )


def _weights(graph: Path) -> list[str]:
    """Files beside a graph that it takes weights from."""
    import onnx
    from onnx.external_data_helper import ExternalDataInfo, uses_external_data

    tensors = onnx.load(graph, load_external_data=False).graph.initializer
    return sorted({ExternalDataInfo(tensor).location for tensor in tensors if uses_external_data(tensor)})


def _one_by_one(bundle: Bundle, file: str) -> bool:
    if not file.endswith(".onnx"):
        return False
    import onnx

    model = onnx.load(bundle.file(file), load_external_data=False)
    return bool(model.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1)


def _service(name: str) -> str:
    label = name.lower().replace("_", "-").replace(".", "-").strip("-")
    if not label[0].isalpha():  # KServe asks for a letter, and for none of '-' at the end
        label = f"model-{label}"
    return f"""\
apiVersion: serving.kserve.io/v1beta1
kind: InferenceService
metadata:
  name: "{label}"
spec:
  predictor:
    model:
      modelFormat:
        name: triton
      runtimeVersion: {_TRITON}
      protocolVersion: v2
      storageUri: pvc://models/{name}/models
"""
