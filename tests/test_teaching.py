from __future__ import annotations

import asyncio
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import save

from cliphar.bundle import Bundle, BundleInfo, find_bundle, read_bundle, write_bundle
from cliphar.errors import BundleError, ClipharError, MediaError, UsageError
from cliphar.recognizer import Background, Recognizer, fit_background, gda_vectors, read_background
from cliphar.serving import Service, Settings
from cliphar.serving._state import State
from conftest import FakeRuntime, unit

DIM, RED = 24, np.full((20, 20, 3), (250, 0, 0), np.uint8)


def cloud(count: int, seed: int) -> NDArray[np.float32]:
    """Embeddings as an image tower makes them: a common direction, a few strong ones, little else."""
    random = np.random.default_rng(seed)
    axes = np.random.default_rng(1).normal(size=(6, DIM))
    return unit(np.r_[5.0, np.zeros(DIM - 1)] + random.normal(size=(count, 6)) @ axes * 0.3)


@pytest.fixture
def background() -> Background:
    return fit_background(cloud(400, 2))


@pytest.fixture
def pupil(tmp_path: Path, make_info: Callable[..., BundleInfo], head: bytes, fake_runtime: FakeRuntime) -> Recognizer:
    """The tiny bundle (a photo is its mean colour) with a background of many colours."""
    colours = unit(np.random.default_rng(0).uniform(0.05, 1, (300, 3)))
    files: dict[str, Path | bytes] = {
        "head.safetensors": head,
        "background.safetensors": fit_background(colours).to_bytes(),
    }
    return Recognizer(write_bundle(tmp_path / "pupil", make_info(), files), fake_runtime)


def tints(colour: tuple[int, int, int], count: int = 8) -> list[NDArray[np.uint8]]:
    random = np.random.default_rng(sum(colour))
    return [np.full((20, 20, 3), np.clip(colour + random.normal(0, 8, 3), 0, 255), np.uint8) for _ in range(count)]


def test_the_background_keeps_its_statistics() -> None:
    photos = unit(cloud(400, 2) + np.random.default_rng(6).normal(0, 0.02, (400, DIM)))
    background, vectors = fit_background(photos), unit(np.random.default_rng(0).normal(size=(5, DIM)))
    assert np.allclose(background.spread(vectors), (photos @ vectors.T).std(0), rtol=0.02)
    assert np.allclose(background.basis @ background.basis.T, np.eye(DIM // 2), atol=1e-5)
    assert len(fit_background(photos[:3]).basis) == 2
    outside = np.eye(DIM) - background.basis.T @ background.basis
    covariance = (background.basis.T * background.variances) @ background.basis + background.rest * outside
    assert np.isclose(np.trace(covariance), photos.var(0, ddof=1).sum())
    assert np.allclose(background.spread(vectors) ** 2, np.diag(vectors @ covariance @ vectors.T))
    ridge = np.trace(covariance) / (4 * DIM // 2)
    assert np.allclose(background.whiten(vectors) @ (covariance + ridge * np.eye(DIM)), vectors, atol=1e-5)


def test_a_taught_vector_finds_its_photos_and_answers_to_others_as_its_prior_does(background: Background) -> None:
    mine = unit(cloud(40, 3) + 0.25 * unit(np.random.default_rng(5).normal(size=(1, DIM))))
    prior = unit(np.random.default_rng(0).normal(size=(1, DIM)) + np.eye(DIM)[:1])
    vector = gda_vectors(mine[:8].mean(0)[None], np.array([8]), prior, background)
    others = cloud(400, 4)
    assert vector.dtype == np.float32
    assert np.isclose(np.linalg.norm(vector), 1, atol=1e-5)
    assert abs((others @ vector.T).mean() - (others @ prior.T).mean()) < 0.02
    assert (others @ vector.T).std() < 1.2 * (others @ prior.T).std()

    def separation(v: NDArray[np.float32]) -> float:
        return float(((mine[8:] @ v.T).mean() - (others @ v.T).mean()) / (others @ v.T).std())

    assert separation(vector) > separation(prior) + 4

    # among vectors that answer less to others than the prior does, it answers as they do
    calm = unit(prior * [[0.3], [0.5]] + np.linalg.svd(others)[2][-1:])
    vector = gda_vectors(mine[:8].mean(0)[None], np.array([8]), prior, background, like=calm)
    centre = unit(background.mean)
    (own, *theirs) = (v - (v @ centre) * centre for v in (*vector, *calm))
    assert np.isclose((others @ vector.T).mean(), (others @ calm.T).mean(), atol=0.005)
    assert np.isclose(background.spread(own[None]), background.spread(np.stack(theirs)).mean(), rtol=0.02)
    assert vector @ prior.T > 0.45


def test_centred_labels_are_no_hubs(background: Background) -> None:
    labels = unit(np.random.default_rng(0).normal(size=(5, DIM)) + [[1], [1], [2], [3], [6]] * background.centre)
    photos = unit(np.repeat(unit(labels - (labels @ background.centre)[:, None] * background.centre), 40, 0))
    photos = unit(photos + 2 * background.centre + np.random.default_rng(1).normal(0, 0.05, photos.shape))

    def right(vectors: NDArray[np.float32]) -> float:
        return float(((photos @ vectors.T).argmax(1) == np.repeat(np.arange(5), 40)).mean())

    assert np.array_equal(background.centred(labels, 0), labels)
    half, whole = background.centred(labels, 0.5), background.centred(labels, 1)
    assert whole.dtype == np.float32
    assert np.allclose(np.linalg.norm(np.r_[half, whole], axis=1), 1, atol=1e-5)
    assert np.allclose(whole @ background.centre, 0, atol=1e-5)
    assert right(labels) < right(half) < right(whole) == 1


def test_words_are_centred_where_the_bundle_says_so_and_trained_labels_never(pupil: Recognizer) -> None:
    info, background = pupil.bundle.info, read_background(pupil.bundle)
    text = info.text.model_copy(update={"centred": 0.5})
    centred = Recognizer(Bundle(pupil.bundle.path, info.model_copy(update={"text": text})), pupil.runtime)
    for one in (pupil, centred):
        one.teach("yellow", tints((240, 230, 10)))
    mixed = ["yellow", "red", "a word"]
    assert np.array_equal(centred.embed_labels(["yellow", "red"]), pupil.embed_labels(["yellow", "red"]))
    assert np.array_equal(centred.embed_labels(mixed), background.centred(pupil.embed_labels(mixed), 0.5))
    assert np.array_equal(centred.embed_words(mixed), pupil.embed_words(mixed))
    centred._known = {}
    assert centred.teach("teal", tints((0, 120, 120))).recall is not None


def test_more_photos_count_for_more_than_the_text(background: Background) -> None:
    prior, mean = unit(np.random.default_rng(0).normal(size=(1, DIM))), cloud(1, 9)
    vectors = [gda_vectors(mean, np.array([n]), prior, background) for n in (1, 8, 1000)]
    nearness = [float((vector @ prior.T)[0, 0]) for vector in vectors]
    assert 0.95 < nearness[0] > nearness[1] > nearness[2]


def test_a_taught_action_joins_trained_ones_and_any_words(pupil: Recognizer) -> None:
    yellow = tints((240, 230, 10))
    before = pupil.predict(RED)
    assert pupil.predict(yellow[0]).label != "yellow"
    lesson = pupil.teach("yellow", yellow)
    assert (lesson.name, lesson.photos, lesson.refused) == ("yellow", 8, ())
    assert lesson.recall is not None
    assert lesson.recall + sum(share for _, share in lesson.confused_with) == pytest.approx(1)
    assert pupil.labels == ("red", "green", "blue", "yellow")
    assert pupil.taught == {"yellow": 8}
    assert pupil.predict(tints((235, 235, 20), 1)[0]).label == "yellow"
    assert pupil.choose(["red", "yellow"])[2] == pupil.bundle.info.known
    assert pupil.choose(["yellow", "a word"])[2] == pupil.bundle.info.open
    known, mixed = pupil.embed_labels(["yellow", "red"]), pupil.embed_labels(["yellow", "a word"])
    assert np.allclose(np.linalg.norm(np.r_[known, mixed], axis=1), 1, atol=1e-5)
    assert not np.allclose(known[0], mixed[0])
    pupil.forget("yellow")
    assert pupil.labels == ("red", "green", "blue")
    assert pupil.predict(RED) == before


def test_a_trained_action_can_be_taught_again_and_forgotten(pupil: Recognizer) -> None:
    trained = pupil.embed_labels(["blue"])
    pupil.teach("blue", tints((10, 220, 240), 1))
    assert pupil.labels == ("red", "green", "blue")
    assert pupil.embed_labels(["blue"]) @ trained.T > 0.98  # one photo moves what was trained a little
    assert not np.allclose(pupil.embed_labels(["blue"]), trained)
    pupil.forget("blue")
    assert np.array_equal(pupil.embed_labels(["blue"]), trained)
    lesson = pupil.teach("red", [RED, *tints((10, 10, 240), 2)])
    assert (lesson.recall, lesson.confused_with) == (1 / 3, (("blue", 2 / 3),))


def test_where_nothing_was_trained_what_is_taught_is_compared_as_words_are(pupil: Recognizer) -> None:
    pupil._known = {}
    assert pupil.teach("yellow", tints((240, 230, 10))).recall is None
    assert pupil.choose(None)[2] == pupil.bundle.info.open
    assert np.array_equal(pupil.embed_labels(["yellow"]), pupil.embed_labels(["yellow", "a word"])[:1])


def test_an_action_taught_in_other_capitals_is_the_one_there_is(pupil: Recognizer) -> None:
    trained = pupil.embed_labels(["red", "green"])
    assert pupil.teach("RED", tints((200, 200, 40))).name == "red"
    assert pupil.teach("Mauve", tints((200, 100, 240))).name == pupil.teach("mauve", [RED]).name == "Mauve"
    assert pupil.labels == ("red", "green", "blue", "Mauve")
    assert np.abs(pupil.embed_labels(["red"])[0] - trained[0]).max() > 0.01
    pupil.forget("Red")
    np.testing.assert_array_equal(pupil.embed_labels(["RED", "green"]), trained)


def test_bad_photos_are_named_and_the_others_teach(pupil: Recognizer, tmp_path: Path) -> None:
    lesson = pupil.teach("yellow", [b"no image", *tints((240, 230, 10), 3), tmp_path / "absent.jpg"])
    assert lesson.photos == 3
    assert "absent.jpg" in str(lesson.refused[1])
    assert len(lesson.to_dict()["refused"]) == 2
    assert pupil.teach("teal", tints((0, 120, 120), 2)).recall is not None
    assert pupil.teach("teal", tints((0, 120, 120), 1)).recall is None
    with pytest.raises(MediaError, match="no photo can be read"):
        pupil.teach("nothing", [b"no image"])
    with pytest.raises(UsageError, match="give some"):
        pupil.teach("nothing", [])
    for name in ("unknown", " ", "x" * 201):
        with pytest.raises(UsageError):
            pupil.teach(name, [RED])
    with pytest.raises(UsageError, match="was not taught"):
        pupil.forget("nothing")
    assert set(pupil.taught) == {"yellow", "teal"}


def test_taught_actions_are_kept_in_one_file_bound_to_the_bundle(
    pupil: Recognizer, tmp_path: Path, make_info: Callable[..., BundleInfo], fake_runtime: FakeRuntime
) -> None:
    kept = tmp_path / "deep" / "mine.safetensors"
    pupil.teach("yellow", tints((240, 230, 10)))
    pupil.save_taught(kept)
    assert list(kept.parent.iterdir()) == [kept]
    again = Recognizer(pupil.bundle, fake_runtime)
    again.load_taught(kept)
    count = len(fake_runtime.sentences)
    for words in (["yellow", "a word"], ["a word", "more"]):
        again.embed_labels(words)
    assert len(fake_runtime.sentences) == count + 4
    again.teach("yellow", [RED])
    again.teach("teal", tints((0, 120, 120), 2))
    again.load_taught(kept)
    assert again.taught == {"yellow": 8, "teal": 2}
    again.load_taught(kept, replace=True)
    assert again.taught == pupil.taught
    assert np.array_equal(again.embed_labels(["yellow", "red"]), pupil.embed_labels(["yellow", "red"]))
    other = write_bundle(
        tmp_path / "other", make_info(), {"head.safetensors": save({"class_vectors": -np.eye(3, dtype=np.float32)})}
    )
    stranger = Recognizer(other, fake_runtime)
    with pytest.raises(BundleError, match="another model"):
        stranger.load_taught(kept)
    with pytest.raises(BundleError, match=r"no background\.safetensors"):
        stranger.teach("yellow", [RED])
    for content in (b"", b"\x10" * 40, save({"known": np.eye(3, dtype=np.float32)})):
        (tmp_path / "bad").write_bytes(content)
        with pytest.raises(BundleError, match="cannot read taught actions"):
            again.load_taught(tmp_path / "bad")


def test_teaching_while_others_ask(pupil: Recognizer) -> None:
    def ask(_: int) -> bool:
        answer = pupil.predict(RED)
        return len(answer.top) in (3, 4) and answer.label != "unknown"

    def teach(i: int) -> bool:
        pupil.teach(f"action {i}", tints((240, 230, 10), 2))
        pupil.forget(f"action {i}")
        return True

    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(teach if i % 4 == 0 else ask, i) for i in range(40)]
        assert all(job.result() for job in jobs)
    assert pupil.taught == {}


@pytest.mark.parametrize("model", ["mini", "clip-b16"])
def test_the_models_carry_a_background(model: str) -> None:
    from cliphar.bundle import packaged

    info = BundleInfo.model_validate_json((packaged(model) / "bundle.json").read_bytes())
    background = read_background(Bundle(packaged(model), info))
    assert background.basis.shape == (64, info.embedding_dim)
    assert 0.4 < np.linalg.norm(background.mean) < 1


def test_teaching_from_the_command_line(tmp_path: Path, clean_env: dict[str, str], photos: list[Path]) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    with Image.open(photos[0]) as photo:
        for i in range(3):
            photo.crop((i * 9, i * 9, photo.width - 9, photo.height - 9)).save(folder / f"{i}.png")

    def cliphar(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "cliphar", *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=clean_env, cwd=tmp_path, check=False)

    done = cliphar("model", "teach", "stroking_a cat", "photos", "--out", "mine", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["photos"] == 3
    answer: dict[str, Any] = json.loads(
        cliphar("predict", str(photos[0]), "--model", "./mine", "--json", "-k", "20").stdout
    )
    assert answer["label"] == "stroking a cat"
    assert len(answer["top"]) == 16
    assert cliphar("model", "teach", "waving", "photos", "--out", "mine").returncode == 2
    (folder / "bad.png").write_bytes(b"no image")
    change = ("--model", "./mine", "--out", "mine")
    with ThreadPoolExecutor() as pool:  # neither loses what the other adds
        more, _ = pool.map(lambda name: cliphar("model", "teach", name, "photos", *change), ("waving", "bowing"))
    assert more.returncode == 1
    assert "bad.png" in more.stderr
    assert "from 3 photos" in more.stdout
    assert cliphar("model", "verify", "./mine").returncode == 0
    assert cliphar("model", "forget", "bowing", *change).returncode == 0
    assert "below: stroking a cat, waving\n" in cliphar("model", "show", "./mine").stdout
    assert cliphar("model", "forget", "sulking", *change).returncode == 2
    assert cliphar("model", "forget", "Waving", *change).stdout.endswith("taught are: stroking a cat\n")
    (tmp_path / "latest").symlink_to("mine")
    linked = ("--model", "latest", "--out", "latest")
    assert cliphar("model", "forget", "stroking_a cat", *linked).returncode == 0
    assert read_bundle(tmp_path / "mine").info == find_bundle("mini").info


def test_a_fork_shares_what_was_taught_and_learns_on_its_own(pupil: Recognizer) -> None:
    pupil.teach("crimson", tints((200, 20, 40)))
    other = pupil.fork()
    other.teach("teal", tints((10, 140, 130)))
    other.forget("crimson")
    assert (set(pupil.taught), set(other.taught)) == ({"crimson"}, {"teal"})
    assert other.runtime is pupil.runtime


def test_workers_that_write_in_the_same_tick_of_the_clock_agree(mini: Recognizer, tmp_path: Path) -> None:
    one, other = State(tmp_path, mini.fork()), State(tmp_path, mini.fork())
    file = tmp_path / "vocabularies.json"
    one.put_vocabulary("a", ("waving",))
    tick = file.stat().st_mtime_ns
    other.put_vocabulary("b", ("waving",))
    os.utime(file, ns=(tick, tick))
    assert one.is_stale()
    one.put_vocabulary("c", ("waving",))
    other.refresh()
    assert {"a", "b", "c"} <= set(other.vocabularies)
    file.unlink()
    os.mkfifo(file)
    with ThreadPoolExecutor() as pool:
        reading = pool.submit(other.refresh)
        with file.open("w") as written:  # open on both sides
            assert other.is_stale()
            written.write('{"d": ["waving"]}')
        reading.result(60)
    assert "d" in other.vocabularies


@pytest.mark.parametrize("content", ["", "[]", '{"a": 5}', '{"a": null}', '{"a": []}', '{"a": ["unknown"]}'])
def test_vocabularies_that_a_hand_made_wrong_are_one_line(mini: Recognizer, tmp_path: Path, content: str) -> None:
    (tmp_path / "vocabularies.json").write_text(content)
    with pytest.raises(ClipharError, match=r"^vocabularies\.json in the state directory cannot be used: .*; mend it"):
        State(tmp_path, mini.fork())


def test_vocabularies_made_wrong_while_they_are_used_are_not_written_over(tmp_path: Path) -> None:
    file = tmp_path / "vocabularies.json"
    service = Service.start(Settings(state=tmp_path))
    service.state.put_vocabulary("mine", ("waving",))
    file.write_text('{"mine": ["sulking",]}')
    asyncio.run(service.refresh())
    assert service.labels("mine\n") == ("waving",)
    with pytest.raises(ClipharError, match="mend it"):
        service.state.put_vocabulary("yours", ("bowing",))
    file.write_text('{"mine": ["sulking"]}')
    service.state.put_vocabulary("yours", ("bowing",))
    assert (service.labels("mine"), service.labels("yours")) == (("sulking",), ("bowing",))
    service.engine.close()


def test_what_cannot_be_kept_is_not_known(mini: Recognizer, photos: list[Path], tmp_path: Path) -> None:
    pupil = mini.fork()
    state = State(tmp_path, pupil)
    state.teach("waving", photos)
    bounds = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, bounds[1]))  # as on a full disk
    try:
        with pytest.raises(ClipharError, match="cannot keep this"):
            state.teach("sulking", photos)
        with pytest.raises(ClipharError, match="cannot keep this"):
            state.forget("waving")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, bounds)
    assert pupil.taught == {"waving": len(photos)}
