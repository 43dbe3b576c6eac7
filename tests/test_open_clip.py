from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest

torch = pytest.importorskip("torch")
if find_spec("open_clip") is None:  # to import it plainly is what may fail
    pytest.skip("needs open_clip", allow_module_level=True)

from safetensors.torch import save_file  # noqa: E402
from tokenizers import Tokenizer, models, normalizers, trainers  # noqa: E402

from cliphar.errors import BundleError, UsageError  # noqa: E402
from cliphar.export import export_bundle, pull_open_clip  # noqa: E402
from cliphar.models import (  # noqa: E402
    OpenClipEncoder,
    OpenClipImage,
    OpenClipText,
    import_open_clip,
    open_clip_encoder,
)
from cliphar.recognizer import load  # noqa: E402
from cliphar.training._contrast import ContrastObjective, Losses  # noqa: E402
from cliphar.training._method_recipe import HeadRecipe, LoraSection  # noqa: E402
from cliphar.training._methods._lora import adapt  # noqa: E402
from cliphar.training._methods._probe import probe  # noqa: E402


@pytest.fixture(scope="module")
def encoder() -> OpenClipEncoder:
    return open_clip_encoder("ViT-B-32", seed=3)


def test_both_towers_give_unit_vectors_of_one_size(encoder: OpenClipEncoder) -> None:
    with torch.no_grad():
        images = encoder.image(torch.rand(2, 3, encoder.size, encoder.size) * 255)
        texts = encoder.text(torch.zeros(3, encoder.context_length, dtype=torch.long))
    assert images.shape == (2, encoder.embedding_dim)
    assert texts.shape == (3, encoder.embedding_dim)
    torch.testing.assert_close(images.norm(dim=1), torch.ones(2))


def test_pixels_are_normalised_as_open_clip_does(encoder: OpenClipEncoder) -> None:
    pixels = torch.randint(0, 256, (1, 3, 224, 224)).float()
    model: Any = encoder.model
    mean, deviation = (torch.tensor(model.visual.preprocess_cfg[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
    with torch.no_grad():
        expected = model.encode_image((pixels / 255 - mean) / deviation, normalize=True)
        torch.testing.assert_close(encoder.image(pixels), expected, atol=1e-5, rtol=0)


def test_the_seed_decides_and_leaves_the_callers_generator_alone(encoder: OpenClipEncoder) -> None:
    torch.manual_seed(11)
    expected = torch.rand(1)
    torch.manual_seed(11)
    again: Any = open_clip_encoder("ViT-B-32", seed=3)
    assert torch.equal(torch.rand(1), expected)
    first: Any = encoder
    assert torch.equal(again.model.visual.conv1.weight, first.model.visual.conv1.weight)


def test_a_name_that_open_clip_lacks() -> None:
    with pytest.raises(UsageError, match=r"near it are .*ViT-B-32"):
        open_clip_encoder("ViT-B-33")


def test_a_folder_that_is_none() -> None:
    with pytest.raises(BundleError, match="cannot make open_clip's 'local-dir:/nowhere'") as caught:
        open_clip_encoder("local-dir:/nowhere")
    assert "\n" not in str(caught.value)


def test_low_rank_changes_are_of_both_towers_where_only_the_text_has_attention() -> None:
    vision = {"timm_model_name": "convnext_atto", "timm_proj": "linear", "timm_pool": "", "image_size": 64}
    model = import_open_clip().CLIP(32, vision, {"width": 64, "heads": 1, "layers": 1, "vocab_size": 99})
    image = OpenClipImage(model.visual, (0.5,) * 3, (0.5,) * 3)
    towers = torch.nn.ModuleDict({"image": image, "text": OpenClipText(model)})
    adapt(towers, LoraSection())
    trained = {name.partition(".")[0] for name, p in towers.named_parameters() if p.requires_grad}
    assert trained == {"image", "text"}


@pytest.mark.parametrize("classes", [0.0, 1.0])
def test_labels_that_no_loss_trains_are_what_the_trained_text_tower_says(classes: float) -> None:
    text = torch.nn.EmbeddingBag(9, 4)
    ids, start = torch.tensor([[1, 2], [3, 4], [5, 6]]), torch.eye(2, 4)
    model = ContrastObjective(torch.nn.Identity(), start, ids, text, 1.0, Losses(1.0, classes, 0, 0), [[0, 1], [2]])
    told = torch.stack([text(ids[:2]).mean(0), text(ids)[2]])
    expected = start if classes else torch.nn.functional.normalize(told, dim=-1)
    torch.testing.assert_close(model.label_vectors(), expected.detach())


def test_a_label_without_a_photo_keeps_its_words_in_a_probe() -> None:
    text, rows = np.eye(3, 8, dtype=np.float32), np.arange(2)
    job: Any = MagicMock(targets=rows, features=lambda _: text[[1, 0]], rows=lambda _: rows, text_vectors=text.copy)
    job.recipe_as().probe, job.recipe.seed = HeadRecipe(steps=20), 0
    kept = (probe(job).vectors * text).sum(1)
    assert (kept[:2] < 0.9999).all()
    assert kept[2] == 1  # all photos would only push it away


def test_it_imports_in_a_fresh_process() -> None:
    code = "from cliphar.models import import_open_clip; print(len(import_open_clip().list_models()))"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 50


# --- bundles


def test_a_name_that_is_nearly_one_of_open_clips_is_told_what_there_is(clean_env: dict[str, str]) -> None:
    command = [sys.executable, "-m", "cliphar", "model", "pull", "clip-vit-b23"]
    done = subprocess.run(command, capture_output=True, text=True, env=clean_env, check=False)
    assert done.returncode == 1
    assert "can be pulled: clip-b16, clip-vit-b32," in done.stderr
    assert done.stderr.count("\n") == 1


TINY = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16, "head_width": 32},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A hub's snapshot of a tiny CLIP, initialised at random."""
    from cliphar.models import import_open_clip

    open_clip = import_open_clip()
    model = open_clip.CLIP(TINY["embed_dim"], TINY["vision_cfg"], TINY["text_cfg"])
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    (snapshot / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY, "preprocess_cfg": {}}))
    save_file(model.state_dict(), snapshot / "open_clip_model.safetensors")
    return snapshot


def test_a_folder_becomes_a_bundle_that_answers(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, photos: list[Path]
) -> None:
    monkeypatch.setenv("CLIPHAR_HOME", str(tmp_path / "home"))
    bundle = pull_open_clip("open_clip:tiny", str(folder))
    assert bundle.path == tmp_path / "home" / "tiny"
    recognizer = load("tiny")
    encoder = open_clip_encoder(f"local-dir:{folder}")
    square = recognizer.prepare(photos[0])
    with torch.no_grad():
        expected = encoder.image(torch.from_numpy(square.copy()).permute(2, 0, 1)[None].float())[0].numpy()
    np.testing.assert_allclose(recognizer.runtime.encode_images(square[None])[0], expected, atol=1e-4)
    answer = recognizer.predict(photos[0], ["cooking", "a very long description " * 8])
    assert answer.set == tuple(score.label for score in answer.top)
    said: list[str] = []
    assert pull_open_clip("open_clip:tiny", "/other", say=said.append).path == bundle.path  # it is there and whole
    assert said == [f"{bundle.path} is there already and stays as it is; remove it first to have it made of /other"]


def test_half_precision_of_a_transformer_is_made_or_refused_and_what_follows_is_made(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLIPHAR_HOME", str(tmp_path / "home"))
    bundle = pull_open_clip("open_clip:tiny", str(folder))
    bundle, (half, weights) = export_bundle(bundle, ["onnx-fp16", "onnx-w8"])
    assert half.failed is None or "this ONNX Runtime crashes" in half.failed
    assert weights.failed is None
    assert "onnx-w8" in bundle.runtimes


@pytest.fixture
def siglip(tmp_path: Path) -> Path:
    """A hub's snapshot of a tiny SigLIP 2, initialised at random, with a tokenizer of its own kind learnt here."""
    from cliphar.models import import_open_clip

    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    text = ["a photo of a person riding a bike", "cooking naïve café 自転車", "two people dancing, laughing"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))  # noqa: S106
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    special = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(text, trainers.BpeTrainer(vocab_size=360, special_tokens=special))
    tokenizer.save(str(snapshot / "tokenizer.json"))
    told = {"pad_token": "<pad>", "eos_token": {"content": "<eos>"}, "add_bos_token": False, "add_eos_token": True}
    (snapshot / "tokenizer_config.json").write_text(json.dumps(told))
    config = json.loads(json.dumps(import_open_clip().get_model_config("ViT-B-16-SigLIP2")))
    config["embed_dim"] = 64
    config["vision_cfg"] |= {"timm_model_name": "test_vit", "image_size": 160}
    config["text_cfg"] |= {"vocab_size": 360, "width": 64, "heads": 2, "layers": 2}
    settings = {key: value for key, value in config.items() if key != "custom_text"}
    model = import_open_clip().CustomTextCLIP(**settings)
    (snapshot / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": {"resize_mode": "squash"}})
    )
    save_file(model.state_dict(), snapshot / "open_clip_model.safetensors")
    return snapshot


def test_a_siglip_with_its_own_tokenizer_answers_as_torch(
    siglip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, photos: list[Path]
) -> None:
    monkeypatch.setenv("CLIPHAR_HOME", str(tmp_path / "home"))
    bundle = pull_open_clip("open_clip:siglip", str(siglip))
    assert bundle.info.image.max_aspect == 4.0
    recognizer = load("siglip")
    ids = (
        Tokenizer.from_file(str(siglip / "tokenizer.json")).encode("two people dancing_laughing".replace("_", " ")).ids
    )
    assert 1 not in ids
    padded = torch.tensor([[*ids, 1, *[0] * (64 - len(ids) - 1)]])
    with torch.no_grad():
        expected = open_clip_encoder(f"local-dir:{siglip}").text(padded).numpy()
    answer = recognizer.runtime.encode_text(["  Two people:  dancing_laughing!"])
    np.testing.assert_allclose(answer, expected, atol=1e-4)
    assert recognizer.predict(photos[0], ["cooking", "a very long description " * 8]).label


def test_a_siglip_without_its_tokenizer(siglip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPHAR_HOME", str(tmp_path / "home"))
    (siglip / "tokenizer_config.json").unlink()
    with pytest.raises(BundleError, match=r"put tokenizer.json and tokenizer_config.json beside the weights"):
        pull_open_clip("open_clip:siglip", str(siglip))


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    asked: list[bool] = []
    monkeypatch.setattr("time.sleep", lambda _: asked.append(True))  # between the client's tries
    with pytest.raises(BundleError, match="connect to the network, or give the weights as a local file"):
        open_clip_encoder("ViT-B-32-quickgelu", "openai")
    assert not asked
    assert constants.HF_HUB_OFFLINE is False


def test_what_cannot_be_pulled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPHAR_HOME", str(tmp_path))
    with pytest.raises(UsageError, match="names no weights; write open_clip:ViT-B-32/TAG"):
        pull_open_clip("open_clip:ViT-B-32")
    with pytest.raises(BundleError, match="neither a file nor a folder"):
        pull_open_clip("clip-vit-b32", str(tmp_path / "none"))
    (tmp_path / "weights.bin").write_bytes(b"none")
    with pytest.raises(BundleError, match=r"cannot make open_clip's .*; give weights made for it$") as caught:
        pull_open_clip("clip-vit-b32", str(tmp_path / "weights.bin"))
    assert "weights_only" not in str(caught.value)  # torch's advice to unpickle what it is given
