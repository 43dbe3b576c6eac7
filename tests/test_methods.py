"""Training methods, from recipe to bundle, on a tiny model and a few photos of coloured shapes."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image, ImageDraw

torch = pytest.importorskip("torch", reason="training needs the [train] extra")


from safetensors.numpy import save  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from cliphar.bundle import Bundle, ImageSpec, TextSpec, packaged, read_bundle, write_bundle  # noqa: E402
from cliphar.errors import DataError, UsageError  # noqa: E402
from cliphar.export import compress_weights, export_clip_text, export_image_tower  # noqa: E402
from cliphar.models import (  # noqa: E402
    ImageTower,
    OpenClipImage,
    OpenClipText,
    Towers,
    import_open_clip,
    load_towers,
    save_weights,
)
from cliphar.recognizer import load  # noqa: E402
from cliphar.training import Surroundings, load_recipe, train  # noqa: E402
from cliphar.training._base import find_base  # noqa: E402
from cliphar.training._distributed import ManyProcesses  # noqa: E402
from cliphar.training._method_recipe import GdaSection  # noqa: E402
from cliphar.training._methods._gda import gda  # noqa: E402

COLOURS = {"jumping": (220, 40, 40), "running": (40, 200, 60), "sleeping_late": (50, 60, 220)}
PHOTOS = 14


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """What is trained here is too small to share; the workers below do the same, as bits hang on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LABEL/PHOTO: 14 photos of each of three labels, told by colour."""
    root = tmp_path_factory.mktemp("data") / "shapes"
    random = np.random.default_rng(0)
    for label, colour in COLOURS.items():
        (root / label).mkdir(parents=True)
        for i in range(PHOTOS):
            noise = random.integers(0, 255, (6, 8, 3), np.uint8)
            image = Image.fromarray(noise).resize((96, 72))
            left, top = (int(v) for v in random.integers(2, 20, 2))
            ImageDraw.Draw(image).ellipse((left, top, left + 70, top + 45), fill=colour)
            image.save(root / label / f"{i}.png")
    return root


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """mini at 64 pixels: all as it is shipped but its input."""
    mini = read_bundle(packaged("mini"))
    towers = load_towers(mini)
    assert isinstance(towers.image, ImageTower)
    files: dict[str, Path | bytes] = {name: mini.file(name) for name in mini.info.files}
    graph = compress_weights(export_image_tower(towers.image, 64), np.zeros((1, 64, 64, 3), np.uint8))
    files["image.onnx"] = graph.SerializeToString()
    info = mini.info.model_copy(update={"image": ImageSpec(size=64, max_aspect=1.25)})
    return write_bundle(tmp_path_factory.mktemp("base") / "small", info, files).path


@pytest.fixture
def recipe(tmp_path: Path, shapes: Path, base: Path) -> Callable[..., Path]:
    """A recipe's file for a method, with sections changed."""

    def make(method: str, output: str = "out", **sections: Any) -> Path:
        tree: dict[str, Any] = {
            "method": method,
            "name": "shapes",
            "base": str(base),
            "output": str(tmp_path / output),
            "data": {"source": str(shapes), "val": 0.2, "test": 0.2, "cache": str(shapes.parent / "cache")},
        }
        if method in ("full", "lora", "temporal"):
            tree["train"] = {"epochs": 2, "batch_size": 8, "size": 64} | sections.pop("train", {})
        file = tmp_path / f"{output}.yaml"
        file.write_text(yaml.safe_dump(tree | sections))
        return file

    return make


def run(file: Path, *overrides: str, **around: Any) -> Bundle:
    return train(load_recipe(file, overrides), Surroundings(**around))


@pytest.mark.parametrize("method", ["zero-shot", "gda", "probe", "lora", "full"])
def test_every_method_makes_a_bundle_that_serves(recipe: Callable[..., Path], shapes: Path, method: str) -> None:
    bundle = run(recipe(method, **({"probe": {"steps": 100}} if method == "probe" else {})))
    assert bundle.info.labels == ("jumping", "running", "sleeping late")
    assert bundle.info.metrics["known"].n == bundle.info.metrics["start"].n
    recognizer = load(bundle.path)
    answers = recognizer.predict(sorted((shapes / "jumping").iterdir()))
    assert isinstance(answers, list)
    if method in ("gda", "probe"):
        assert sum(answer.top[0].label == "jumping" for answer in answers) > PHOTOS * 0.6
    assert recognizer.teach("falling", [shapes / "running" / "0.png"]).photos == 1
    assert ("weights.safetensors" in bundle.info.files) == (method in ("full", "lora"))
    about = bundle.info.provenance
    assert about.recipe["method"] == method
    assert about.recipe["data"]["source"] == "shapes"
    assert "torch" in about.versions


def test_gda_of_many_photos_is_as_good_as_linear_discriminant_analysis() -> None:
    random, count, targets = np.random.default_rng(0), 12, np.arange(1200) % 12
    angle = np.arange(count) * 2 * np.pi / count
    centres = np.c_[np.ones(count), 0.3 * np.cos(angle), 0.3 * np.sin(angle), random.normal(0, 0.09, (count, 21))]
    noise = 0.03 * np.r_[0.2, 1, 1, np.full(21, 3)]

    def photos() -> Any:
        drawn = centres[targets] + random.normal(size=(1200, 24)) * noise
        return (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)

    seen, others, text = photos(), photos(), np.eye(24, dtype=np.float32)[:count]
    material = {"features": lambda _: seen, "targets": targets, "rows": lambda _: np.arange(1200)}
    words = {"text_vectors": text.copy, "recipe_as": lambda _: SimpleNamespace(gda=GdaSection(text_photos=0))}
    bundle = SimpleNamespace(info=SimpleNamespace(files={}))
    found = gda(SimpleNamespace(**material, **words, bundle=bundle))  # type: ignore[arg-type]
    means = np.stack([seen[targets == c].mean(0) for c in range(count)])
    weights = np.linalg.solve(np.cov((seen - means[targets]).T) + 1e-6 * np.eye(24), means.T)
    best = ((others @ weights - (means * weights.T).sum(1) / 2).argmax(1) == targets).mean()
    assert ((others @ found.vectors.T).argmax(1) == targets).mean() > best - 0.01


def test_the_towers_of_the_shipped_model_come_back(base: Path) -> None:
    bundle = read_bundle(base)
    random = np.random.default_rng(0)
    photos = np.stack([np.asarray(Image.fromarray(random.integers(0, 255, (4, 4, 3), np.uint8)).resize((64, 64)))] * 2)
    with torch.inference_mode():
        restored = load_towers(bundle).image(torch.from_numpy(photos).permute(0, 3, 1, 2).float()).numpy()
    assert np.allclose(restored, load(base).runtime.encode_images(photos), atol=1e-4)


@pytest.fixture(scope="session")
def clip_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of open_clip's code, tiny and with random weights, as a bundle."""
    config = {
        "embed_dim": 48,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8},
        "text_cfg": {"context_length": 16, "vocab_size": 8000, "width": 32, "heads": 2, "layers": 2},
        "init_logit_bias": -10,
    }
    torch.manual_seed(0)
    model = import_open_clip().CLIP(**config).eval()
    image = OpenClipImage(model.visual, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    about = config | {"preprocess": {"mean": [0.5] * 3, "std": [0.25] * 3}}
    towers = Towers("open_clip", image, OpenClipText(model), None, 30.0, about)
    mini = read_bundle(packaged("mini"))
    tokenizer = json.loads(mini.file("tokenizer.json").read_text())
    tokenizer["padding"] = {
        "strategy": {"Fixed": 16},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "[PAD]",
    }
    vectors = np.eye(48, dtype=np.float32)[: len(mini.info.labels)]
    files: dict[str, Path | bytes] = {
        "image.onnx": export_image_tower(image, 32).SerializeToString(),
        "text.onnx": export_clip_text(OpenClipText(model), 16).SerializeToString(),
        "tokenizer.json": json.dumps(tokenizer).encode(),
        "head.safetensors": save({"class_vectors": vectors}),
        "weights.safetensors": save_weights(towers),
    }
    info = mini.info.model_copy(
        update={
            "image": ImageSpec(size=32),
            "embedding_dim": 48,
            "text": TextSpec(templates=("{}", "a photo of {}"), context_length=16),
            "files": {},
        }
    )
    return write_bundle(tmp_path_factory.mktemp("clip") / "clip", info, files).path


def changed_weights(before: Path, after: Bundle) -> set[str]:
    start, end = load_file(before / "weights.safetensors"), load_file(after.file("weights.safetensors"))
    assert set(start) == set(end)
    return {name for name in start if not torch.equal(start[name], end[name])}


@pytest.fixture
def ddp(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One process alone, which yet asks that all that is trained gets a gradient."""
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    monkeypatch.setattr("cliphar.training._train.open_ranks", lambda kind, _: ManyProcesses(kind))
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("ddp")
@pytest.mark.parametrize("method", ["lora", "full"])
def test_clips_own_towers_are_both_trained(recipe: Callable[..., Path], clip_base: Path, method: str) -> None:
    sections = {"wise": {"shares": [1.0]}} if method == "full" else {}
    bundle = run(recipe(method, **sections), f"base={clip_base}", "train.size=32", "train.checkpointing=true")
    with pytest.raises(UsageError, match=r"takes 32 pixels only; give train\.size=null"):
        run(recipe(method, "other", **sections), f"base={clip_base}", "train.size=64")
    changed = changed_weights(clip_base, bundle)
    attention = {
        f"model.{tower}transformer.resblocks.{i}.attn.in_proj_weight" for tower in ("", "visual.") for i in (0, 1)
    }
    if method == "lora":
        assert changed == attention
    else:
        assert attention < changed
        assert "model.logit_scale" not in changed
    assert len(load(bundle.path).predict([np.zeros((32, 32, 3), np.uint8)], ["a new word", "jumping"])) == 1


def test_any_model_of_open_clip_can_be_the_base(recipe: Callable[..., Path], tmp_path: Path) -> None:
    open_clip = import_open_clip()
    config = {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {"width": 64, "heads": 1, "layers": 1},
    }
    (tmp_path / "cliphar-test.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "cliphar-test.json")
    torch.manual_seed(1)
    weights = tmp_path / "weights.pt"
    torch.save(open_clip.create_model("cliphar-test").state_dict(), weights)
    sections = {"base": f"open_clip:cliphar-test/{weights}", "train": {"epochs": 1, "size": 32, "freeze": ["image.*"]}}
    said: list[str] = []
    bundle = run(recipe("full", wise={"shares": [1.0]}, **sections), log=said.append)
    assert sum(line.startswith("making a bundle") for line in said) == 1
    end = load_file(bundle.file("weights.safetensors"))
    start = torch.load(weights, weights_only=True)
    changed = {name for name, tensor in start.items() if not torch.equal(tensor, end[f"model.{name}"])}
    assert changed
    assert not [name for name in changed if name.startswith("visual.")]
    torch.save(start | {"visual.proj": -start["visual.proj"]}, weights)  # trained on, in the same place
    other = find_base(str(sections["base"]), tmp_path / "cache", said.append)
    assert torch.equal(load_file(other.file("weights.safetensors"))["model.visual.proj"], -start["visual.proj"])
    with pytest.raises(UsageError, match="names no weights"):
        run(recipe("full", base="open_clip:cliphar-test"))


def test_a_photo_may_be_named_twice_in_a_file_whose_name_is_no_utf8(
    recipe: Callable[..., Path], shapes: Path, tmp_path: Path
) -> None:
    files = [file.relative_to(shapes) for file in sorted(shapes.rglob("*.png"))]
    rows = [f"{file},{file.parent}" for file in [*files, *files[::2]]]
    listing = shapes / "r\udcff.csv"
    listing.write_text("\n".join(["file,label", *rows]))
    data = {"source": "", "val": 0.2, "test": 0.2, "cache": str(tmp_path / "cache")}
    bundle = run(recipe("gda", data=data), f"data.source={listing}")
    assert bundle.info.metrics["known"].n >= 6
    assert bundle.info.provenance.recipe["data"]["source"] == r"r\udcff.csv"


def test_clips_are_trained_on_and_measured_alike_afterwards(
    recipe: Callable[..., Path], clip_base: Path, tmp_path: Path, clean_env: dict[str, str]
) -> None:
    av = pytest.importorskip("av")
    random = np.random.default_rng(0)
    for label, colour in (("waving", (220, 30, 30)), ("falling", (30, 30, 220))):
        for i in range(12):
            folder = tmp_path / "clips" / ("train", "val", "test")[i % 3] / label
            folder.mkdir(parents=True, exist_ok=True)
            scene = Image.fromarray(random.integers(0, 255, (6, 8, 3), np.uint8)).resize((64, 48))
            with av.open(str(folder / f"{i}.mp4"), "w") as file:
                stream = file.add_stream("mpeg4", rate=5)
                stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
                for k in range(5):
                    ImageDraw.Draw(scene).rectangle((k, 5, k + 30, 40), fill=colour if i % 2 else (90, 90, 90))
                    file.mux(stream.encode(av.VideoFrame.from_ndarray(np.asarray(scene), format="rgb24")))
                file.mux(stream.encode())
        scene.save(tmp_path / "clips" / "test" / label / "still.png")  # is a clip that stands still
    data = {"source": str(tmp_path / "clips"), "cache": str(tmp_path / "cache")}
    loop = {"epochs": 1, "batch_size": 4, "size": 32}
    sections = {"base": str(clip_base), "frames": 3, "data": data, "wise": {"shares": [1.0]}}
    bundle = run(recipe("temporal", train=loop, **sections))
    assert bundle.info.labels == ("falling", "waving")
    assert bundle.info.metrics["known"].n == 10
    assert bundle.info.video.window_s == pytest.approx(1)
    assert changed_weights(clip_base, bundle)
    done = subprocess.run(
        [sys.executable, "-m", "cliphar", "eval", "--json", "-m", bundle.path, "--data", tmp_path / "clips" / "test"],
        capture_output=True,
        text=True,
        env=clean_env,
        timeout=300,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    figures = json.loads(done.stdout)
    assert figures["n"] == 10
    for name, value in bundle.info.metrics["known"].values.items():
        assert figures[name] == pytest.approx(value, abs=2e-3), name


# --- stopping, being killed, and going on

_WORKER = """
import os, sys
from pathlib import Path
import torch
from cliphar.training import Surroundings, Stopped, load_recipe, train

torch.set_num_threads(1)

def on_step(report):
    print("step", report.step, flush=True)
    if report.step == int(sys.argv[2]):
        os.kill(os.getpid(), int(sys.argv[3]))

try:
    train(load_recipe(Path(sys.argv[1])), Surroundings(resume=True, on_step=on_step))
except Stopped as stopped:
    print(stopped, flush=True)
    sys.exit(stopped.status)
"""


def interrupt(file: Path, step: int, number: signal.Signals) -> tuple[int, list[str]]:
    """Run it in a process that sends itself a signal at a step: the exit status, and what was printed."""
    command = [sys.executable, "-c", _WORKER, str(file), str(step), str(int(number))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=600, check=False)
    return done.returncode, done.stdout.splitlines()


def test_a_place_that_cannot_be_written_is_said_first(recipe: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "taken").write_bytes(b"")
    with pytest.raises(UsageError, match="taken is not a folder that can be written to"):
        run(recipe("full"), f"output={tmp_path}/taken/mine", "data.source=nowhere")
    for other in (tmp_path, tmp_path / "taken"):
        with pytest.raises(UsageError, match="it exists and is not a bundle"):
            run(recipe("full"), f"output={other}", "data.source=nowhere")


def test_labels_without_photos_to_train_on_are_told_and_one_alone_is_refused(
    recipe: Callable[..., Path], shapes: Path, tmp_path: Path
) -> None:
    for part, labels in (("train", ("jumping", "running")), ("val", COLOURS), ("test", COLOURS)):
        for label in labels:
            shutil.copytree(shapes / label, tmp_path / "set" / part / label)
    said: list[str] = []
    bundle = run(recipe("gda"), f"data.source={tmp_path / 'set'}", log=said.append)
    assert "no photo to train on, only words: sleeping late" in said
    assert "near-duplicates" in str(said)
    assert len(bundle.info.labels) == 3
    shutil.rmtree(tmp_path / "set" / "train" / "running")
    with pytest.raises(DataError, match="are all of 'jumping'"):
        run(recipe("gda"), f"data.source={tmp_path / 'set'}")


def test_a_label_that_no_model_can_be_asked_about_is_refused(recipe: Callable[..., Path], tmp_path: Path) -> None:
    for label in ("Unknown", "circle"):
        (tmp_path / "set" / label).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / "set" / label / "1.png")
    with pytest.raises(UsageError, match="cannot be a label"):
        run(recipe("gda"), f"data.source={tmp_path / 'set'}")


def test_a_killed_run_ends_where_a_whole_one_does(recipe: Callable[..., Path], clip_base: Path) -> None:
    loop = {"epochs": 3, "size": 32, "checkpoint_minutes": 0, "mixup": 0.2, "randaugment": 1, "balanced": True}
    sections = {"base": str(clip_base), "train": loop, "wise": {"shares": [0.5, 1.0]}}
    whole = run(recipe("full", "whole", **sections))
    file = recipe("full", "cut", **sections)
    killed, lines = interrupt(file, 2, signal.SIGKILL)
    assert killed == -signal.SIGKILL
    assert "step 2" in lines
    stopped, lines = interrupt(file, 5, signal.SIGTERM)
    assert stopped == 128 + signal.SIGTERM
    assert "step 1" not in lines
    assert "--resume" in lines[-1]
    with pytest.raises(UsageError, match="--resume"):
        run(file, "data.source=nowhere")
    with pytest.raises(UsageError, match="another recipe"):
        run(file, "train.ema=0.5", resume=True)
    said: list[str] = []
    bundle = run(file, resume=True, log=said.append)
    assert "resumed after step 5" in said
    for name in ("weights.safetensors", "head.safetensors", "image.onnx", "text.onnx"):
        assert bundle.file(name).read_bytes() == whole.file(name).read_bytes(), name
    assert not list(file.parent.glob("*.checkpoint*"))


def test_the_same_seed_gives_the_same_bits_and_another_does_not(recipe: Callable[..., Path], clip_base: Path) -> None:
    sections = {"base": str(clip_base), "train": {"epochs": 1, "size": 32}, "wise": {"shares": [1.0]}}
    one, same, other = (
        run(recipe("full", name, **sections), f"seed={seed}").file("weights.safetensors").read_bytes()
        for name, seed in (("one", 3), ("same", 3), ("other", 4))
    )
    assert one == same
    assert one != other


def test_other_captions_are_another_training(recipe: Callable[..., Path], shapes: Path, tmp_path: Path) -> None:
    source = tmp_path / "captioned"
    shutil.copytree(shapes / "jumping", source)

    def caption(text: str) -> None:
        lines = (json.dumps({"file": f"{i}.png", "captions": [f"{text} {i}"]}) for i in range(PHOTOS))
        (source / "captions.jsonl").write_text("\n".join(lines))

    caption("one jumps")
    file = recipe("full", captions=str(source), classes=0.0)
    assert interrupt(file, 1, signal.SIGTERM)[0] == 128 + signal.SIGTERM
    caption("none moves")
    with pytest.raises(UsageError, match="another recipe"):
        run(file, resume=True)
    caption("one jumps")
    said: list[str] = []
    run(file, resume=True, log=said.append)
    assert "resumed after step 1" in said
    assert "captions: left out 6 photos of val and test" in said
