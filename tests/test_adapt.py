"""The real CLIP tower in torch, scaled and shifted, against the 8-bit file it comes from: a small one of that kind."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the train extra: pip install 'cliphar[train]'")

import onnx  # noqa: E402
import onnxruntime  # noqa: E402
from numpy.typing import NDArray  # noqa: E402
from onnxruntime.quantization import QuantType, quantize_dynamic  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from cliphar.bundle import BundleInfo, ImageSpec, write_bundle  # noqa: E402
from cliphar.errors import UsageError  # noqa: E402
from cliphar.export import export_teacher_graph, float_graph, teacher_tensors  # noqa: E402
from cliphar.models import ClipTower  # noqa: E402
from cliphar.training import SpaceRecipe  # noqa: E402
from cliphar.training._adapt import adapt  # noqa: E402
from cliphar.training._corpus import TEST, TRAIN, VAL, Corpus, _parts  # noqa: E402
from cliphar.training._distill import _batches  # noqa: E402
from cliphar.training._gradient import _start  # noqa: E402
from cliphar.training._recipe import DataRecipe  # noqa: E402
from cliphar.training._teacher import look as keep_tokens  # noqa: E402
from cliphar.training._teacher import token_maps  # noqa: E402

WIDTH, HEADS, PATCH, LAYERS, DIM = 128, 2, 56, 3, 16


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            p(x).reshape(x.shape[0], -1, HEADS, WIDTH // HEADS).transpose(1, 2)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        seen = (q @ k.transpose(2, 3) * (WIDTH // HEADS) ** -0.5).softmax(-1) @ v
        return self.out_proj(seen.transpose(1, 2).reshape(x.shape[0], -1, WIDTH))  # type: ignore[no-any-return]


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x))  # type: ignore[no-any-return]


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(), Mlp()
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))  # type: ignore[no-any-return]


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Vision(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Module()
        self.embeddings.class_embedding = nn.Parameter(torch.randn(WIDTH))
        self.embeddings.patch_embedding = nn.Conv2d(3, WIDTH, PATCH, PATCH, bias=False)
        self.embeddings.position_embedding = nn.Embedding((224 // PATCH) ** 2 + 1, WIDTH)
        self.pre_layrnorm, self.post_layernorm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.encoder = Encoder()

    def forward(self, pixels: Tensor) -> Tensor:
        own: Any = self.embeddings
        patches = own.patch_embedding(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([own.class_embedding.expand(pixels.shape[0], 1, -1), patches], 1)
        x = self.encoder(self.pre_layrnorm(x + own.position_embedding(torch.arange(x.shape[1])[None])))
        return self.post_layernorm(x[:, 0])  # type: ignore[no-any-return]


class Clip(nn.Module):
    """transformers' CLIPVisionModelWithProjection, by its names."""

    def __init__(self) -> None:
        super().__init__()
        self.vision_model = Vision()
        self.visual_projection = nn.Linear(WIDTH, DIM, bias=False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.visual_projection(self.vision_model(pixel_values))  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    clip = Clip().eval()
    with torch.no_grad():
        for value in clip.parameters():  # no two alike: they would be stored as one
            value.add_(0.02 * torch.randn_like(value))
    names = {"input_names": ["pixel_values"], "output_names": ["image_embeds"]}
    axes = {"pixel_values": {0: "n"}}
    with warnings.catch_warnings():  # of being superseded; the file that this stands for was made so
        warnings.simplefilter("ignore")
        inputs = (torch.randn(1, 3, 224, 224),)
        torch.onnx.export(clip, inputs, str(folder / "float.onnx"), dynamo=False, dynamic_axes=axes, **names)
    quantize_dynamic(
        folder / "float.onnx",
        folder / "clip.onnx",
        weight_type=QuantType.QInt8,
        per_channel=True,
        op_types_to_quantize=["MatMul"],
    )
    return folder / "clip.onnx"


@pytest.fixture(scope="module")
def photos() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (24, 224, 224, 3), np.uint8)


def run(model: onnx.ModelProto, beside: Path, photos: NDArray[np.uint8]) -> NDArray[np.float32]:
    file = beside.with_name("image.onnx")
    onnx.save(model, file)
    session = onnxruntime.InferenceSession(str(file))
    return np.concatenate([session.run(None, {"images": photo[None]})[0] for photo in photos])


def look(tower: ClipTower, photos: NDArray[np.uint8]) -> NDArray[np.float32]:
    with torch.no_grad():
        return tower(tower.tokens(torch.from_numpy(photos))).numpy()  # type: ignore[no-any-return]


def test_the_tower_answers_as_the_file_does_changed_or_not(
    weights: Path, photos: NDArray[np.uint8], make_info: Callable[..., BundleInfo]
) -> None:
    tower = ClipTower(teacher_tensors(weights), 2)
    before = look(tower, photos[:4])
    assert ((before * run(export_teacher_graph(weights), weights, photos[:4])).sum(1) > 0.99).all()
    torch.manual_seed(1)
    with torch.no_grad():
        for value in tower.parameters():
            if value.requires_grad:
                value.add_(0.3 * torch.randn_like(value))
    changes = tower.changes()
    assert {name.split(".")[2] for name in changes if name.startswith("encoder")} == {"1", "2"}
    assert {name.rpartition(".")[2] for name in changes} == {"weight", "bias", "scale"}
    after = look(tower, photos[:4])
    assert ((before * after).sum(1) < 0.9).all()
    changed = export_teacher_graph(weights, changes)
    assert ((after * run(changed, weights, photos[:4])).sum(1) > 0.99).all()
    other = ClipTower(teacher_tensors(weights), 1)
    other.apply_changes(changes)
    assert ((after * look(other, photos[:4])).sum(1) > 0.999).all()
    assert len(changed.SerializeToString()) < 2 * sum(value.size for value in changes.values()) + 60_000
    info = make_info(name="clip", embedding_dim=DIM, image=ImageSpec(size=224))
    files = {"image.onnx": changed.SerializeToString(), weights.name: weights}
    bundle = write_bundle(weights.with_name("bundle"), info, files | {"text.onnx": b"-", "tokenizer.json": b"-"})
    plain = float_graph(bundle)
    assert "MatMulInteger" not in {node.op_type for node in plain.graph.node}
    onnx.save(plain, weights.with_name("float.onnx"))
    session = onnxruntime.InferenceSession(str(weights.with_name("float.onnx")))
    assert ((after * session.run(None, {"images": photos[:4]})[0]).sum(1) > 0.999).all()


def test_near_duplicates_of_another_source_are_not_trained_on_either(tmp_path: Path) -> None:
    source = ["captioned"] * 40 + ["sports"] * 40 + ["actions"] * 40
    labels = [None] * 40 + ["curling", "golf"] * 20 + ["running", "eating"] * 20
    groups = np.tile(np.arange(40), 3)  # each photo is in all three
    part = _parts(DataRecipe(root=tmp_path, captioned_val=10, val=0.2, test=0.2), labels, source, groups, ["golf"])
    assert set(part.tolist()) == {-1, TRAIN, VAL, TEST}
    assert not set(groups[part == TRAIN]) & set(groups[part > TRAIN])


def test_actions_are_told_apart_better_and_an_interrupted_run_goes_on(
    weights: Path, photos: NDArray[np.uint8], tmp_path: Path
) -> None:
    count = len(photos)
    photos = photos.copy()
    photos[:8, ..., 0] //= 2  # what there is to learn
    pixels = photos.reshape(-1)
    corpus = Corpus(
        keys=[str(number) for number in range(count)],
        labels=["running"] * 8 + ["eating"] * 8 + [None] * 8,
        captions=[()] * count,
        source=["actions"] * 16 + ["captioned"] * 8,
        part=np.array([0, 0, 0, 0, 0, 0, 0, 1] * 2 + [0] * 8),
        actions=["eating", "running"],
        sports=[],
        held_out=[],
        sha256="0" * 64,
        folder=tmp_path,
        _pixels=pixels,
        _offsets=np.arange(count + 1) * photos[0].size,
        _shapes=np.array([photos[0].shape] * count),
    )
    recipe = SpaceRecipe.model_validate(
        {
            "kind": "space",
            "name": "space",
            "description": "",
            "output": tmp_path / "out",
            "data": {"root": tmp_path, "cache": tmp_path},
            "head": {"steps": 5},
            "adapt": {"layers": 1, "epochs": 6, "batch_size": 16, "warmup_steps": 1},
        }
    )
    tensors = teacher_tensors(weights)
    text = np.eye(2, DIM, dtype=np.float32)
    said: list[str] = []
    whole = adapt(tensors, corpus, text, recipe, said.append)
    assert [line.split(":")[1].strip() for line in said[-6:]] == [f"epoch {number}/6" for number in range(1, 7)]
    losses = [float(line.split("loss ")[1].split()[0]) for line in said[-6:]]
    assert losses[-1] < losses[0]
    assert all(float(line.split("cosine ")[1].split()[0]) > 0.9 for line in said[-6:])

    def stop(line: str) -> None:
        if "epoch 4/" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        adapt(tensors, corpus, text, recipe, stop)
    said.clear()
    again = adapt(tensors, corpus, text, recipe, said.append)
    assert said[0] == "adapt: goes on after epoch 3"
    for name, value in whole.items():
        np.testing.assert_allclose(again[name], value, atol=1e-5)
    assert not list(tmp_path.rglob("*.ckpt"))
    tower = ClipTower(tensors, 1)
    tokens, seen = keep_tokens(tower, corpus, np.arange(count), 1.0, "small", said.append)
    assert np.allclose((seen * look(tower, photos)).sum(1), 1, atol=1e-3)
    assert tokens.shape == (count, 17, WIDTH)
    maps = token_maps(tokens)
    assert maps.shape == (count, 16, WIDTH)
    assert maps[..., -1].std() > 2 * maps[..., 0].std()  # the largest component last


def test_other_vectors_of_the_labels_are_another_start() -> None:
    def start(vectors: NDArray[np.float32], *labels: str) -> str:
        info = SimpleNamespace(labels=("a", "b"), files={"text.onnx": SimpleNamespace(sha256="")})
        job: Any = SimpleNamespace(labels=labels, bundle=SimpleNamespace(info=info, class_vectors=lambda: vectors))
        return _start(job)

    before, taught = np.eye(2, dtype=np.float32), np.array([[1, 0], [1, 0]], np.float32)
    assert start(before, "a", "new") == start(taught, "a", "new") != start(before, "b")
    assert start(before, "b") != start(taught, "b")
    assert isinstance(start(before), str)


def test_fewer_photos_than_a_batch_are_told() -> None:
    data: Any = SimpleNamespace(teacher=np.zeros((3, 8), np.float32))
    recipe: Any = SimpleNamespace(batch_size=4)
    with pytest.raises(UsageError, match="batch_size is 4, but there are 3 photos"):
        next(_batches(data, 64, recipe, 0))
