import os
import pty
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import numpy_helper
from PIL import Image

torch = pytest.importorskip("torch", reason="training needs the [train] extra")

from cliphar.bundle import Bundle, packaged, read_bundle  # noqa: E402
from cliphar.cli import _train  # noqa: E402
from cliphar.errors import UsageError  # noqa: E402
from cliphar.export import compress_weights, export_image_tower  # noqa: E402
from cliphar.export._quantize import correct_biases, quantize  # noqa: E402
from cliphar.media import to_square  # noqa: E402
from cliphar.models import ImageTower, SentenceEncoder, TextProjection, load_towers  # noqa: E402
from cliphar.recognizer import Recognizer  # noqa: E402
from cliphar.runtime import OnnxRuntime  # noqa: E402
from cliphar.training import MiniRecipe, SpaceRecipe, StepReport, load_recipe, train  # noqa: E402
from cliphar.training._augment import Crop  # noqa: E402
from cliphar.training._checkpoint import load_checkpoint, save_checkpoint  # noqa: E402
from cliphar.training._corpus import TRAIN, VAL, Corpus  # noqa: E402
from cliphar.training._distill import DistillData, _Batch, _cutmix, _places, distill, soft_labels  # noqa: E402
from cliphar.training._head import train_head  # noqa: E402
from cliphar.training._method_recipe import FullRecipe, HeadRecipe  # noqa: E402
from cliphar.training._recipe import DistillRecipe  # noqa: E402
from cliphar.training._run import _finish_mini  # noqa: E402
from cliphar.training._text import prune_tokenizer  # noqa: E402
from serving_process import read_terminal  # noqa: E402

RECIPES = Path(__file__).parent.parent / "recipes"
TOKENIZER = Path(__file__).parent.parent / "src/cliphar/assets/mini/tokenizer.json"
TINY = DistillRecipe(cycles=(((64, 1),),), batch_size=4, replicas=2, warmup_steps=1, frozen_blocks=2, drop_path=0.0)


def _unit(rows: int, seed: int = 0, dim: int = 32) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(rows, dim)).astype(np.float32)
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


@pytest.fixture
def data() -> DistillData:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 70, 80, 3), np.uint8)
    labels = soft_labels(np.array([0, 1, 2, -1] * 3), _unit(12, 3, 3), TINY)
    maps = np.random.default_rng(4).normal(size=(12, 9, 8)).astype(np.float16)
    return DistillData(lambda i: pixels[i], _unit(12), maps, 1.0, labels, _unit(3, 1), _unit(20, 2))


def _distilled(
    data: DistillData, checkpoint: Path, recipe: DistillRecipe = TINY, *, drop_path: float = 0.0, **options: Any
) -> Any:
    """The projection's weight at the end."""
    options = {"identity": "", "log": lambda _: None, **options}
    torch.manual_seed(0)
    tower = ImageTower("lite0", 32, drop_path=drop_path)
    distill(tower, data, recipe, checkpoint=checkpoint, seed=0, **options)
    return tower.project.weight.detach()


@pytest.mark.parametrize(("name", "kind"), [("mini", MiniRecipe), ("clip-b16", SpaceRecipe)])
def test_the_ready_recipes_load(name: str, kind: type) -> None:
    loaded = load_recipe(RECIPES / f"{name}.yaml", ("seed=3", "data.root=/photos"))
    assert isinstance(loaded, kind)
    recipe: Any = loaded
    assert recipe.seed == 3
    assert recipe.data.root == Path("/photos")


@pytest.mark.parametrize(
    ("given", "source"),
    [("2024", "2024"), ("my photos #1", "my photos #1"), ("a: b", "a: b"), ("'[x]'", "[x]"), ("~/a", "/home/me/a")],
)
def test_a_setting_may_be_any_folder(monkeypatch: pytest.MonkeyPatch, given: str, source: str) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    recipe = load_recipe(RECIPES / "full.yaml", (f"data.source={given}", "train.size=null", "train.lr=2e-5"))
    assert isinstance(recipe, FullRecipe)
    assert (recipe.data.source, recipe.train.size, recipe.train.lr) == (source, None, 2e-5)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("distill.learning_rate=1", "unknown key"),
        ("distill.cycle=[]", "did you mean cycles?"),
        ("distill.lr=0.5", "distill.lr"),
        ("distill.cycles=[]", "distill.cycles: Tuple should have at least 1 item"),
        ("distill.cycles=[[]]", "distill.cycles.0: Tuple should have at least 1 item"),
        ("distill.cycles=[[[224, 0]]]", "distill.cycles.0.0.1"),
        ("seed=-1", "seed"),
        ("data.seed=-1", "data.seed"),
        ("distill.replicas=9", "not a multiple of replicas 9"),
        ("distill.backbone=resnet", "lite0"),
        ("nonsense", "key=value"),
        ("seed.deep=1", "not a section"),
    ],
)
def test_wrong_settings_are_refused_by_name(override: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_recipe(RECIPES / "mini.yaml", (override,))
    assert said in str(caught.value)


def test_a_folder_is_not_replaced_from_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(RECIPES / "full.yaml", ("output=.",))
    with pytest.raises(UsageError, match=r"^cannot write \.: a folder is replaced from outside"):
        train(recipe)


def test_a_section_that_is_written_twice_is_refused(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text((RECIPES / "full.yaml").read_text() + "data: {source: others}\n")
    with pytest.raises(UsageError, match="data is written twice"):
        load_recipe(recipe)


def test_distilling_changes_only_what_is_not_frozen(data: DistillData, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tower = ImageTower("lite0", 32)
    before = {name: value.clone() for name, value in tower.state_dict().items()}
    average = distill(tower, data, TINY, checkpoint=tmp_path / "state", identity="", seed=0, log=lambda _: None)
    changed = {name for name, value in tower.state_dict().items() if not torch.equal(before[name], value)}
    frozen = ("backbone._conv_stem", "backbone._bn0", "backbone._blocks.0.", "backbone._blocks.1.")
    assert not [name for name in changed if name.startswith(frozen)]
    trainable = {name for name, p in tower.named_parameters() if not name.startswith(frozen)}
    assert trainable <= changed
    assert torch.isfinite(average(torch.zeros(1, 3, 64, 64))).all()


def test_each_place_of_a_view_is_told_what_the_teacher_saw_there() -> None:
    side = (np.arange(20) + 0.5) / 10 - 1  # of the teacher's view, the middle square of a wide photo
    across = np.stack(np.broadcast_arrays(side, side[:, None]), -1).reshape(1, 400, 2).astype(np.float16)
    photo, vectors = np.zeros((100, 200, 3), np.uint8), _unit(1)
    data = DistillData(lambda _: photo, vectors, across, 1.0, vectors, vectors, vectors)
    for crop, x in (
        (Crop(50, 0, 150, 100, flipped=False), [-0.75, -0.25, 0.25, 0.75]),
        (Crop(50, 0, 150, 100, flipped=True), [0.75, 0.25, -0.25, -0.75]),
        (Crop(0, 0, 100, 100, flipped=False), [None, None, -0.75, -0.25]),
    ):
        places, looked = _places(data, np.array([0]), [crop], 4)
        assert looked[0, 0].tolist() == [float(one is not None) for one in x]
        for column, wanted in enumerate(x):
            if wanted is not None:
                assert torch.allclose(places[0, 0, :, column], torch.tensor(wanted), atol=0.02)
        assert torch.allclose(places[0, 1, :, 3], torch.tensor([-0.75, -0.25, 0.25, 0.75]), atol=0.02)


def test_replicas_sum_to_the_whole_batch(data: DistillData, tmp_path: Path) -> None:
    recipe = TINY.model_copy(update={"frozen_blocks": 20, "lr": 1e-4})
    first, again, halves = (
        _distilled(data, tmp_path / f"{run}", recipe.model_copy(update={"replicas": replicas}))
        for run, replicas in enumerate((1, 1, 2))
    )
    assert torch.equal(first, again)  # one thread: the same bits
    assert torch.allclose(first, halves, atol=2e-3)  # batch statistics of the last layer are of half a batch


def test_replicas_draw_the_same_whichever_is_first(data: DistillData, tmp_path: Path) -> None:
    first, *others = (_distilled(data, tmp_path / f"{run}", drop_path=0.5) for run in range(3))
    assert all(torch.equal(first, other) for other in others)


def test_the_mean_of_the_towers_at_the_ends_of_the_cycles_is_kept(data: DistillData, tmp_path: Path) -> None:
    recipe = TINY.model_copy(update={"cycles": (((64, 1),),) * 2, "batch_size": 12, "ema": 0.0, "weight_decay": 0.0})
    seen: list[Any] = []

    def validate(tower: ImageTower, _: object) -> str:
        seen.append(tower.project.weight.detach().clone())
        return ""

    kept = _distilled(data, tmp_path / "state", recipe, validate=validate)
    assert torch.equal(kept, seen[1])
    # a cycle of one step, which for Adam's first is the rate itself (twice recipe.lr there): half of it is left
    assert (kept - seen[0]).abs().median().item() == pytest.approx(recipe.lr, rel=0.05)


def test_what_cutmix_pastes_is_its_share_of_the_labels_and_keeps_its_places() -> None:
    number = torch.arange(4.0)
    places = number.view(4, 1, 1, 1).expand(4, 1, 5, 5)
    batch = _Batch(number.view(4, 1, 1, 1).expand(4, 3, 150, 150), torch.eye(4), torch.eye(4), places, places[:, 0])
    other = torch.tensor([1, 2, 3, 0])
    for seed in range(50):
        mixed = _cutmix(batch, other, np.random.default_rng(seed))
        pasted = mixed.looked != batch.looked
        assert torch.equal(mixed.looked[pasted], batch.looked[other][pasted])
        assert torch.equal(mixed.images[:, 0, 15::30, 15::30], mixed.looked)
        assert torch.equal(mixed.places[:, 0], mixed.looked)
        assert torch.allclose(mixed.targets[0, 1], pasted[0].float().mean())
        assert 0.5 < mixed.targets[0, 0] < 1


def test_a_checkpoint_of_another_training_is_refused(data: DistillData, tmp_path: Path) -> None:
    _distilled(data, tmp_path / "state", identity="one")
    with pytest.raises(UsageError, match="of another recipe"):
        _distilled(data, tmp_path / "state", identity="other")


def test_an_interrupted_training_ends_where_a_whole_one_does(data: DistillData, tmp_path: Path) -> None:
    recipe = TINY.model_copy(update={"cycles": (((64, 2),), ((64, 1),)), "replicas": 1})
    lines: list[str] = []

    def log(line: str) -> None:
        lines.append(line)
        if line.startswith("epoch 2"):
            raise KeyboardInterrupt

    whole = _distilled(data, tmp_path / "whole", recipe)
    with pytest.raises(KeyboardInterrupt):
        _distilled(data, tmp_path / "cut", recipe, log=log)
    assert torch.equal(whole, _distilled(data, tmp_path / "cut", recipe, log=lines.append))
    assert "resumed after epoch 1" in lines


def test_checkpoints_are_whole_or_absent(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "state"
    assert load_checkpoint(file) is None
    save_checkpoint(file, {"step": 3, "weights": torch.ones(2)})
    (file.parent / "state.partial").write_bytes(b"cut off")
    state = load_checkpoint(file)
    assert state is not None
    assert state["step"] == 3


def test_a_full_disk_and_a_damaged_checkpoint_are_named(tmp_path: Path) -> None:
    file = tmp_path / "state"
    bounds = resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in (0, 100_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, bounds[1]))  # as on a disk that is full
        try:
            with pytest.raises(OSError, match=f"File too large: '{file}'"):
                save_checkpoint(file, {"weights": torch.ones(1_000_000)})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, bounds)
    assert not list(tmp_path.iterdir())  # it is full enough
    for content in (b"", b"PK\3\4", b"no checkpoint"):
        file.write_bytes(content)
        with pytest.raises(UsageError, match="state is damaged"):
            load_checkpoint(file)


def test_a_head_separates_what_its_text_does_not() -> None:
    centres = _unit(3, 5)
    targets = np.arange(300) % 3
    features = centres[targets] + 0.1 * _unit(300, 6)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    text = _unit(3, 9)
    vectors = train_head(features.astype(np.float32), targets, text, HeadRecipe(steps=100, lr=0.02), seed=0)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert ((features @ text.T).argmax(1) == targets).mean() < 0.9
    assert ((features @ vectors.T).argmax(1) == targets).mean() > 0.95


def test_mini_ends_with_class_vectors_from_what_its_own_tower_sees(photos: list[Path], tmp_path: Path) -> None:
    mini = read_bundle(packaged("mini"))
    changes = (f"output={tmp_path / 'made'}", f"distill.size={mini.info.image.size}", "data.root=.", "head.steps=60")
    recipe: Any = load_recipe(RECIPES / "mini.yaml", changes)
    corpus = _corpus(photos, ["drinking", "sleeping", "curling"])
    space = Bundle(mini.path, mini.info.model_copy(update={"labels": tuple(corpus.actions)}))
    made = _finish_mini(recipe, corpus, mini.file("image.onnx").read_bytes(), space, lambda _: None)
    assert made.info.provenance.recipe["head"]["pull"] == 2
    assert set(made.info.metrics) == {"known", "open", "retrieval"}
    towers = Recognizer(mini, OnnxRuntime(mini))
    train = corpus.select(source="actions", part=TRAIN)
    seen = np.stack([z for z in towers.embed_images(corpus.photo(i) for i in train) if isinstance(z, np.ndarray)])
    targets = np.array([corpus.actions.index(str(corpus.labels[i])) for i in train])
    expected = train_head(seen, targets, towers.embed_words(corpus.actions), recipe.head, recipe.seed)
    assert np.allclose(made.class_vectors(), expected, atol=1e-4)


def _corpus(photos: list[Path], labels: list[str]) -> Corpus:
    """Of each photo twelve crops, one label; the last label is held out."""
    random, crops, rows = np.random.default_rng(0), list[Any](), list[Any]()
    for photo, label in zip(photos, labels, strict=True):
        whole = np.asarray(Image.open(photo).convert("RGB").resize((120, 120)))
        for k in range(12):
            left, top = random.integers(0, 40, 2)
            crops.append(whole[top : top + 80, left : left + 80])
            rows.append((label, *(("sports", VAL + k % 2) if label == labels[-1] else ("actions", k % 3))))
    rows += [(None, "captioned", VAL)] * 12
    named, source, part = zip(*rows, strict=True)
    crops += crops[:12]
    return Corpus(
        keys=[""] * len(crops),
        labels=list(named),
        captions=[("somebody drinks",) if s == "captioned" else () for s in source],
        source=list(source),
        part=np.array(part),
        actions=labels[:-1],
        sports=labels[-1:],
        held_out=labels[-1:],
        sha256="",
        folder=Path(),
        _pixels=np.stack(crops).ravel(),
        _offsets=np.arange(len(crops) + 1) * 80 * 80 * 3,
        _shapes=np.array([(80, 80, 3)] * len(crops)),
    )


def test_compressed_weights_answer_alike_at_any_batch_size() -> None:
    torch.manual_seed(1)
    tower = ImageTower("lite0", 32).eval()
    for module in tower.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    photos = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), np.uint8)
    plain = export_image_tower(tower, 64)
    before = plain.SerializeToString()
    content = compress_weights(plain, photos).SerializeToString()
    assert plain.SerializeToString() == before
    assert len(content) < 4_500_000  # lite0's 3.4 M weights and the projection, a byte each
    assert b"weight_scale" in content and b"weight_cast" not in content  # of names only weights' are kept
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    answers = session.run(["embeddings"], {"images": photos})[0]
    with torch.inference_mode():
        expected = tower(torch.from_numpy(photos).permute(0, 3, 1, 2).float()).numpy()
    assert ((answers * expected).sum(1) > 0.99).all()
    one = session.run(["embeddings"], {"images": photos[2:3]})[0]
    assert np.allclose(one, answers[2:3], atol=1e-4)


def test_biases_make_up_for_the_rounding_of_weights() -> None:
    tower = load_towers(read_bundle(packaged("mini"))).image
    torch.manual_seed(0)
    with torch.no_grad():
        for weights in tower.parameters():  # it was read back from 8 bits, and would be rounded to itself
            weights.mul_(1 + 0.02 * torch.rand_like(weights))
    size = 96
    photos = np.stack([to_square(Image.open(path), size, 1.25) for path in sorted(packaged("samples").glob("*.jpg"))])
    exact = export_image_tower(tower, size)

    def error(like: np.ndarray) -> float:
        found, expected = (
            onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"images": photos})[0]
            for model in (compress_weights(exact, like), exact)
        )
        return float(np.linalg.norm(found - expected))

    assert error(photos) < 0.75 * error(np.zeros_like(photos))
    corrected, arithmetic = (
        {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        for model in (correct_biases(exact, photos), quantize(exact, photos))
    )
    first, *others = [node.input[2] for node in exact.graph.node if node.op_type == "Conv"]
    assert all(np.array_equal(corrected[name], arithmetic[name]) for name in others)
    plain = {tensor.name: tensor for tensor in exact.graph.initializer}
    assert np.array_equal(numpy_helper.to_array(plain[first]), arithmetic[first])  # its weights stay float


def test_a_pruned_tokenizer_keeps_what_is_used_and_spells_the_rest() -> None:
    tokenizer, kept = prune_tokenizer(TOKENIZER, 600, ["a person juggling", "rock climbing"])
    assert kept[0] == 0
    assert len(kept) == tokenizer.get_vocab_size() == 600
    assert tokenizer.encode("climbing").tokens == ["[CLS]", "climbing", "[SEP]"]
    rare = tokenizer.encode("zymurgy 42!").tokens
    assert "[UNK]" not in rare


def test_sentences_ignore_padding_and_reach_unit_length() -> None:
    torch.manual_seed(0)
    encoder = SentenceEncoder(50, layers=1).eval()
    project = TextProjection(16, 8).eval()
    with torch.inference_mode():
        short = project(encoder(torch.tensor([[3, 4, 5]])))
        padded = project(encoder(torch.tensor([[3, 4, 5, 0, 0]])))
    assert torch.allclose(short, padded, atol=1e-5)
    assert torch.allclose(short.norm(dim=-1), torch.ones(1), atol=1e-5)


def test_merged_projections_average_their_members() -> None:
    torch.manual_seed(0)
    members = [TextProjection(16, 8).eval() for _ in range(3)]
    sentences = torch.randn(4, 384)
    with torch.inference_mode():
        outputs = [m.linear(sentences) + m.outer(torch.nn.functional.gelu(m.inner(sentences))) for m in members]
        expected = torch.nn.functional.normalize(sum(outputs) / 3, dim=-1)
        assert torch.allclose(TextProjection.merged(members)(sentences), expected, atol=1e-5)


FOLLOWED = """
from cliphar.cli._train import _following
from cliphar.training import StepReport
with _following() as (log, on_step):
    log("begun [bold]")
    for step in range(1, 41):
        on_step(StepReport(step, 40, 0, 1.5, 1e-4, 320.0, 0.1))
    log("ended")
"""


def test_lines_in_a_log(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("cliphar.cli._train.time.monotonic", lambda: now[0])
    with _train._following() as (log, on_step):
        log("begun")
        for step in range(1, 41):
            now[0] += 1.0
            on_step(StepReport(step, 100, 0, 1.5, 1e-4, 32.0, 1.0))
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" ")[2] for line in lines] == [
        "begun",
        "step 15/100: loss 1.5000, 32.0 photos/s, 0:01:25 left",
        "step 30/100: loss 1.5000, 32.0 photos/s, 0:01:10 left",
    ]

    def nobody(_line: str) -> None:
        raise OSError("full")  # or BrokenPipeError

    monkeypatch.setattr(sys.stderr, "write", nobody)
    log("goes on")


def test_a_bar_on_a_terminal() -> None:
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen([sys.executable, "-c", FOLLOWED], stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    text = read_terminal(ours)
    assert process.wait(60) == 0
    assert "begun [bold]" in text
    assert "40/40" in text
    assert "320.0 photos/s" in text
    assert "ended" in text
