"""The loop's parts, without a model: order, views, accumulation, averages, patience, freezing, rates, recipes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch", reason="training needs the [train] extra")

from torch import Tensor, nn  # noqa: E402

from cliphar.bundle import find_bundle  # noqa: E402
from cliphar.data import PhotoSet  # noqa: E402
from cliphar.errors import DataError, UsageError  # noqa: E402
from cliphar.models import ImageTower  # noqa: E402
from cliphar.training import load_recipe, train  # noqa: E402
from cliphar.training._augment import random_frames  # noqa: E402
from cliphar.training._batches import Batch, Batches, TrainItems  # noqa: E402
from cliphar.training._contrast import ContrastObjective, Losses  # noqa: E402
from cliphar.training._gradient import freeze  # noqa: E402
from cliphar.training._loop import Run, Surroundings, fit, pick_device  # noqa: E402
from cliphar.training._method_recipe import LoopRecipe, LoraSection  # noqa: E402
from cliphar.training._methods._lora import adapt, merge  # noqa: E402
from cliphar.training._package import _provenance  # noqa: E402
from cliphar.training._rates import learning_rate  # noqa: E402
from cliphar.training._train import _only  # noqa: E402

RECIPES = Path(__file__).parent.parent / "recipes"


class Tower(nn.Module):
    """A photo's embedding is a linear map of its mean colours in four corners."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(12, 8)

    def forward(self, images: Tensor) -> Tensor:
        corners = nn.functional.adaptive_avg_pool2d(images / 255, 2).flatten(1)
        return nn.functional.normalize(self.project(corners), dim=-1)


@pytest.fixture
def items() -> TrainItems:
    """Twelve photos of three labels, of which the first has eight."""
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (12, 1, 20, 24, 3), np.uint8)
    targets = np.array([0] * 8 + [1, 1, 2, 2])
    photos = PhotoSet(
        keys=[str(i) for i in range(12)],
        labels=[str(t) for t in targets],
        captions=[()] * 12,
        splits=[None] * 12,
        seconds=np.zeros(12),
        groups=np.arange(12),
        refused=[],
        sha256="0" * 64,
        _pixels=pixels.ravel(),
        _offsets=np.arange(13) * pixels[0].size,
        _shapes=np.array([pixels[0].shape] * 12),
    )
    return TrainItems(photos, np.arange(12), targets, [[int(t)] for t in targets])


def objective(contrastive: float = 0.0, mixup: float = 0.0) -> ContrastObjective:
    torch.manual_seed(0)
    texts = nn.functional.normalize(torch.randn(3, 8), dim=-1)
    return ContrastObjective(Tower(), texts, texts, None, 10.0, Losses(contrastive, 1.0, 0.1, mixup))


def run(tmp_path: Path, **changes: object) -> Run:
    return Run(tmp_path / "checkpoint", "same", 0, 0.05, torch.device("cpu"), Surroundings(**changes))  # type: ignore[arg-type]


def flat(module: nn.Module) -> Tensor:
    whole: Tensor = torch.cat([p.detach().flatten() for p in module.parameters()])
    return whole


def trained(items: TrainItems, tmp_path: Path, contrastive: float = 0.0, **settings: object) -> Tensor:
    recipe = LoopRecipe.model_validate({"epochs": 2, "batch_size": 4, "ema": 0} | settings)
    model = objective(contrastive, recipe.mixup)
    fit(model, Batches([items], recipe, 16, 0), recipe, run(tmp_path), lambda: {"score": 1.0})
    return flat(model)


def test_batches_depend_on_seed_and_epoch_alone(items: TrainItems) -> None:
    batches = Batches([items], LoopRecipe(batch_size=4), 16, 3)
    whole = list(batches.epoch(1))
    again = list(batches.epoch(1, first_step=1))
    assert len(whole) == 3
    assert torch.equal(whole[1].images, again[0].images)
    assert not np.array_equal(batches.order(0), batches.order(1))
    assert sorted(batches.order(0).ravel()) == list(range(12))
    parts = [list(Batches([items], LoopRecipe(batch_size=4), 16, 3, rank, 2).epoch(1)) for rank in (0, 1)]
    assert torch.equal(torch.cat([part[0].images for part in parts]), whole[0].images)


def test_a_balanced_order_draws_labels_alike(items: TrainItems) -> None:
    batches = Batches([items], LoopRecipe(batch_size=12, balanced=True), 16, 0)
    drawn = items.targets[np.concatenate([batches.order(epoch).ravel() for epoch in range(100)])]
    assert np.abs(np.bincount(drawn) / len(drawn) - 1 / 3).max() < 0.05


def test_views_are_of_their_seed(items: TrainItems) -> None:
    def view(seed: int, operations: int) -> np.ndarray:
        random = np.random.default_rng(seed)
        return random_frames(
            np.repeat(items.photos.frames(0), 2, 0), 16, min_area=0.3, operations=operations, magnitude=9, random=random
        )

    for seed in range(20):  # over all operations
        first = view(seed, 3)
        assert first.shape == (2, 16, 16, 3)
        assert np.array_equal(first[0], first[1])  # a clip's frames alike
        assert np.array_equal(first, view(seed, 3))
    assert not np.array_equal(view(0, 0), view(1, 0))


def test_accumulated_parts_are_one_batch(items: TrainItems, tmp_path: Path) -> None:
    items.targets[::5] = -1  # captions alone
    whole = trained(items, tmp_path, label_smoothing=0)
    parts = trained(items, tmp_path / "b", label_smoothing=0, accumulate=2)
    assert torch.allclose(whole, parts, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        *({"ema": 0.9}, {"mixup": 0.4}, {"precision": "bf16"}, {"balanced": True}, {"randaugment": 2}),
        {"precision": "fp16", "contrastive": 1.0},
    ],
)
def test_each_setting_changes_what_is_learned(items: TrainItems, tmp_path: Path, settings: dict[str, Any]) -> None:
    changed = trained(items, tmp_path, **settings)
    assert torch.isfinite(changed).all()
    assert not torch.equal(trained(items, tmp_path / "a"), changed)


def test_what_fp16_left_out_is_told(items: TrainItems, tmp_path: Path) -> None:
    said: list[str] = []
    recipe = LoopRecipe(epochs=1, batch_size=4, precision="fp16")
    fit(objective(), Batches([items], recipe, 16, 0), recipe, run(tmp_path, log=said.append), lambda: {"score": 1.0})
    assert "fp16 left out " in said[-1]


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
@pytest.mark.filterwarnings("ignore::UserWarning")  # the compiler looks at gradients of what is no leaf
def test_a_compiled_run_learns_the_same(items: TrainItems, tmp_path: Path) -> None:
    plain, compiled = trained(items, tmp_path / "a", epochs=1), trained(items, tmp_path / "b", epochs=1, compile=True)
    assert torch.allclose(plain, compiled, atol=1e-4)


def test_a_run_that_cannot_be_compiled_says_why(
    items: TrainItems, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    torch._dynamo.reset()
    with pytest.raises(UsageError, match=r"train.compile: nothing is compiled here \(.*\); install g\+\+"):
        trained(items, tmp_path, epochs=1, compile=True)


def test_activations_computed_again_give_the_same_gradients() -> None:
    torch.manual_seed(0)
    tower = ImageTower("lite0", 8).train()
    for module in tower.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    images, gradients = torch.rand(2, 3, 32, 32) * 255, []
    for again in (False, True):
        tower.backbone.recompute = again
        tower.zero_grad()
        tower(images).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in tower.parameters() if p.grad is not None]))
    assert torch.allclose(*gradients, atol=1e-5)


def test_patience_ends_a_run_and_the_best_epoch_is_kept(items: TrainItems, tmp_path: Path) -> None:
    model, scores, kept = objective(), iter([0.5, 0.9, 0.8, 0.7, 0.6]), []

    def validate() -> dict[str, float]:
        kept.append(flat(model))
        return {"score": next(scores)}

    recipe = LoopRecipe(epochs=5, batch_size=4, patience=2, ema=0)
    measured = fit(model, Batches([items], recipe, 16, 0), recipe, run(tmp_path), validate)
    assert measured == {"score": 0.9}
    assert len(kept) == 4
    assert torch.equal(flat(model), kept[1])


def test_a_loss_that_is_no_number_is_told(items: TrainItems, tmp_path: Path) -> None:
    model = objective()
    with torch.no_grad():
        model.class_vectors.fill_(float("nan"))
    recipe = LoopRecipe(batch_size=4)
    with pytest.raises(UsageError, match=r"lower train\.lr"):
        fit(model, Batches([items], recipe, 16, 0), recipe, run(tmp_path), lambda: {"score": 0.0})


def test_frozen_weights_stay(items: TrainItems, tmp_path: Path) -> None:
    model = objective()
    freeze(model, ["image.project.w*"])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    recipe = LoopRecipe(epochs=1, batch_size=4)
    fit(model, Batches([items], recipe, 16, 0), recipe, run(tmp_path), lambda: {"score": 0.0})
    changed = {name for name, p in model.named_parameters() if not torch.equal(before[name], p)}
    assert changed == {"image.project.bias", "class_vectors"}
    with pytest.raises(UsageError, match="fits no weight"):
        freeze(model, ["text.*"])
    with pytest.raises(UsageError, match="nothing to train"):
        freeze(model, ["*"])


def test_photos_of_one_label_are_not_each_others_negatives() -> None:
    model = objective(contrastive=1.0)
    images = torch.randint(0, 256, (4, 1, 3, 16, 16), dtype=torch.uint8)
    targets = torch.tensor([0, 0, 1, -1])
    wanted = torch.tensor([[0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    for half in (False, True):  # the tower, not the loss
        with torch.autocast("cpu", enabled=half):
            alike = model(Batch(images, targets, torch.tensor([0, 0, 1, 2]), torch.ones(4)))["contrastive"]
            z, texts = model.embed(images).float(), model.sentences[[0, 0, 1, 2]]
        logits = 10 * z @ texts.T
        rows = -(wanted * (logits.log_softmax(-1) + logits.T.log_softmax(-1))).sum(1)
        assert torch.allclose(alike, rows.mean() / 2, atol=1e-5)
    silent = Batch(images, targets, torch.full((4,), -1), torch.ones(4))
    assert model(silent)["contrastive"] == 0


def test_low_rank_changes_merge_into_the_weights() -> None:
    torch.manual_seed(0)
    tower = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2), "project": nn.Linear(8, 8)})
    before = {name: p.detach().clone() for name, p in tower.named_parameters()}
    assert adapt(tower, LoraSection(targets=("attn.in_proj_weight",))) == 1
    trainable = [name for name, p in tower.named_parameters() if p.requires_grad]
    assert all("parametrizations" in name for name in trainable)
    assert torch.equal(tower["attn"].in_proj_weight, before["attn.in_proj_weight"])  # as it was
    with torch.no_grad():
        dict(tower.named_parameters())[next(name for name in trainable if name.endswith("up"))].normal_()
    attention: Any = tower["attn"]
    changed = attention.in_proj_weight.detach().clone()
    merge(tower)
    assert set(dict(tower.named_parameters())) == set(before)
    assert torch.equal(tower["attn"].in_proj_weight, changed)
    difference = (changed - before["attn.in_proj_weight"]).view(3, 8, 8)
    assert torch.linalg.matrix_rank(difference).tolist() == [2, 2, 2]
    with pytest.raises(UsageError, match="fit no weight"):
        adapt(tower, LoraSection(targets=("nothing",)))


@pytest.mark.parametrize("method", ["lora", "full", "temporal"])
def test_rates_that_destroy_are_warned_of(method: str) -> None:
    said: list[str] = []
    for transformer in (True, False):
        default = learning_rate(method, None, transformer=transformer, log=said.append)
        assert not said
        assert learning_rate(method, default * 100, transformer=transformer, log=said.append) == default * 100
        assert "destroy" in said.pop()
    assert learning_rate("full", None, transformer=True) <= 1e-5


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_ready_recipe_loads(file: Path) -> None:
    load_recipe(file)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.learning_rate=1", "unknown key train.learning_rate"),
        ("train.epoch=1", "did you mean epochs?"),
        ("method=ful", "did you mean full?"),
        ("method=[full]", "unknown method"),
        ("train.accumulate=3", "not a multiple"),
        ("train.lr=inf", "finite"),
        ("data.val=0.9", "data.val"),
        ("data.seed=-1", "data.seed"),
        ("track=[mlflow", "is not YAML"),
        ("contrastive=0 classes=0", "no loss"),
    ],
)
def test_wrong_settings_are_refused_by_name(override: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_recipe(RECIPES / "full.yaml", tuple(override.split()))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_gpu_is_taken_where_each_process_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert str(pick_device(LoopRecipe())) == "cuda:1"
    assert str(pick_device(LoopRecipe(device="cpu"))) == "cpu"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert str(pick_device(LoopRecipe())) == "cpu"
    with pytest.raises(UsageError, match="torch sees 2 for 3 processes here; use auto or cpu"):
        pick_device(LoopRecipe(device="cuda"))


def test_a_gpu_that_took_no_part_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H200")

    def hardware(recipe: str, *overrides: str) -> str:
        loaded: Any = load_recipe(RECIPES / recipe, overrides)
        photos: Any = SimpleNamespace(sha256="0" * 64)
        job: Any = SimpleNamespace(recipe=loaded, bundle=find_bundle("mini"), photos=photos, around=Surroundings())
        return _provenance(job).hardware

    assert hardware("full.yaml").endswith(", 1 x H200")
    assert "H200" not in hardware("full.yaml", "train.device=cpu")
    assert "H200" not in hardware("probe.yaml")


def test_a_terminal_that_is_closed_stops_a_training_as_a_signal_does_unless_nohup_has_it_ignored(
    run_python: Callable[[str], str],
) -> None:
    said = run_python("""
import signal
from cliphar.training._loop import stop_on_signals
signal.signal(signal.SIGHUP, signal.default_int_handler)
stop = [0]
with stop_on_signals(stop):
    for _ in range(2):  # the terminal's and its shell's
        signal.raise_signal(signal.SIGHUP)
    print(stop[0] == signal.SIGHUP)
print(signal.getsignal(signal.SIGHUP) is signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_IGN)
with stop_on_signals(stop):
    print(signal.getsignal(signal.SIGHUP) is signal.SIG_IGN)
""")
    assert said.split() == ["True"] * 3


def test_a_method_without_a_loop_leaves_what_a_stopped_training_left(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for i in range(16):
        photo = tmp_path / "data" / ("jumping", "running")[i % 2] / f"{i}.png"
        photo.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 255, (64, 64, 3), np.uint8)).save(photo)
    left = [tmp_path / f"out.checkpoint{suffix}" for suffix in ("", ".runs")]
    for file in left:
        file.write_bytes(b"hours of work")
    places = (f"output={tmp_path}/out", f"data.source={tmp_path}/data", f"data.cache={tmp_path}/cache")
    train(load_recipe(RECIPES / "few-shot.yaml", (*places, "data.val=0.3", "data.test=0.3")))
    assert [file.read_bytes() for file in left] == [b"hours of work"] * 2
    with _only(tmp_path / "out"), pytest.raises(UsageError, match="another training is at"):
        train(load_recipe(RECIPES / "full.yaml", places))
    with pytest.raises(DataError, match=r"^cannot keep decoded photos in .*; choose another folder with data\.cache=$"):
        train(load_recipe(RECIPES / "few-shot.yaml", (*places, f"data.cache={left[0]}")))
