from __future__ import annotations

import gc
import io
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageSequence

import cliphar
from cliphar.bundle import Bundle, BundleInfo, write_bundle
from cliphar.errors import MediaError, UsageError
from cliphar.media import ImageLike
from cliphar.recognizer import Prediction, Recognizer, _recognizer, load

WORDS = ["taking a photo", "riding a bike", "smiling for a portrait"]
RED, GREEN, BLUE = (np.full((20, 20, 3), colour, np.uint8) for colour in ((250, 0, 0), (0, 250, 0), (0, 0, 250)))


def changed(recognizer: Recognizer, **changes: Any) -> Recognizer:
    bundle = Bundle(recognizer.bundle.path, recognizer.bundle.info.model_copy(update=changes))
    return Recognizer(bundle, recognizer.runtime)


def near(one: Prediction, other: Prediction) -> bool:
    return one.label == other.label and abs(one.score - other.score) < 1e-5 and one.set == other.set


# --- what may be given


def test_every_way_to_give_a_photo_gives_the_same_answer(mini: Recognizer, photos: list[Path]) -> None:
    photo = photos[0]
    # decoded whole, since a JPEG from a path may be decoded smaller
    buffer = io.BytesIO()
    with Image.open(photo) as opened:
        opened.convert("RGB").save(buffer, "PNG")
    png = buffer.getvalue()
    as_image = Image.open(io.BytesIO(png))
    forms: Any
    for forms in ([png, as_image, np.asarray(as_image)], [photo, str(photo), photo.read_bytes()]):
        first, *rest = [mini.predict(form, WORDS) for form in forms]
        assert all(near(first, other) for other in rest)


def test_one_photo_alone_is_a_list_of_one(fake: Recognizer, tmp_path: Path) -> None:
    Image.fromarray(RED).save(tmp_path / "red.png")
    path = tmp_path / "red.png"
    for alone in (path, str(path), path.read_bytes(), Image.fromarray(RED), RED):
        assert [answer.label for answer in fake.stream(alone)] == ["red"]  # type: ignore[arg-type,union-attr]
    many: Any
    for many in (np.stack([RED, BLUE]), np.array([str(path)] * 2), {path: 1, str(path): 2}):
        assert len(list(fake.stream(many))) == 2


def test_each_frame_of_an_animation_has_its_own_answer(fake: Recognizer) -> None:
    """PIL, and cameras, hand out the one image again, with the next frame in it."""
    buffer = io.BytesIO()
    frames = [Image.fromarray(colour) for colour in (RED, GREEN, BLUE)]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    animation = Image.open(buffer)
    filled = np.zeros((999, 999, 3), np.uint8)
    refilled = (np.add(colour[0, 0], 0, out=filled) for colour in (RED, GREEN, BLUE))

    def closed() -> Iterator[Image.Image]:
        for frame in frames:
            frame.save(file := io.BytesIO(), "PNG")
            with Image.open(file) as image:
                yield image

    iterator = ImageSequence.Iterator
    for given in (iterator(animation), (frame for frame in iterator(animation)), refilled, closed()):
        assert [answer.label for answer in fake.predict(given)] == ["red", "green", "blue"]


def test_a_pil_image_given_twice_is_decoded_on_one_thread(fake: Recognizer, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer, busy = io.BytesIO(), threading.Lock()
    Image.fromarray(RED).save(buffer, "PNG")
    image = Image.open(buffer)
    load_it = image.load

    def load_alone() -> Any:
        assert busy.acquire(blocking=False)
        time.sleep(0.01)
        busy.release()
        return load_it()

    monkeypatch.setattr(image, "load", load_alone)
    assert [answer.label for answer in fake.predict([image] * 8)] == ["red"] * 8


def test_lists_and_generators_keep_the_order(mini: Recognizer, photos: list[Path]) -> None:
    order = photos * 2 + photos[::-1]
    alone = {photo: mini.predict(photo, WORDS) for photo in photos}
    listed = mini.predict(order, WORDS)
    assert isinstance(listed, list)
    assert all(near(answer, alone[photo]) for answer, photo in zip(listed, order, strict=True))
    assert isinstance(mini.predict(set(order), WORDS), list)
    drawn = mini.predict((photo for photo in order), WORDS)
    assert not isinstance(drawn, list)
    assert all(near(answer, alone[photo]) for answer, photo in zip(drawn, order, strict=True))


def test_order_is_kept_over_many_batches(fake: Recognizer) -> None:
    colours, names = (RED, GREEN, BLUE), fake.labels
    picks = np.random.default_rng(0).integers(0, 3, 50)
    assert [answer.label for answer in fake.predict([colours[i] for i in picks])] == [names[i] for i in picks]


def test_nothing_to_do(fake: Recognizer) -> None:
    assert fake.predict([]) == []
    assert list(fake.predict(iter(()))) == []
    assert list(fake.stream([])) == []
    assert list(fake.embed_images([])) == []


def test_a_generator_is_drawn_only_a_few_batches_ahead(fake: Recognizer) -> None:
    drawn = 0

    def endless() -> Iterator[NDArray[np.uint8]]:
        nonlocal drawn
        while True:
            drawn += 1
            yield RED

    answers = fake.predict(endless())
    assert drawn == 0
    for taken in range(1, 31):
        assert next(answers).label == "red"
        assert drawn <= taken + 3 * fake.batch_size
    answers.close()  # type: ignore[attr-defined]
    assert wait_for_no_decoders()


def decoders() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("decode_")]


def wait_for_no_decoders() -> bool:
    deadline = time.monotonic() + 60
    while decoders() and time.monotonic() < deadline:
        time.sleep(0.01)
    return not decoders()


def test_a_failed_photo_leaves_no_threads_to_the_garbage_collector(fake: Recognizer) -> None:
    # the error, its traceback and the frame that raised it form a cycle, which must not keep the stream open
    assert wait_for_no_decoders()
    gc.disable()
    try:
        with pytest.raises(MediaError):
            fake.predict(b"no photo")
        with pytest.raises(MediaError):
            fake.predict([RED, b"no photo"])
        assert wait_for_no_decoders()
    finally:
        gc.enable()


def test_giving_up_a_stream_waits_for_nothing(tiny: Bundle, fake_runtime: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # the garbage collector may do it from inside any thread's start or end, where to join a thread is to hang
    recognizer = Recognizer(tiny, fake_runtime, batch_size=1)
    go_on = threading.Event()
    prepare = recognizer.prepare

    def slow(image: ImageLike) -> NDArray[np.uint8]:
        if image is GREEN:
            go_on.wait(60)
        return prepare(image)

    monkeypatch.setattr(recognizer, "prepare", slow)
    answers = recognizer.stream([RED, GREEN, GREEN])
    next(answers)
    closing = threading.Thread(target=answers.close, daemon=True)
    closing.start()
    closing.join(30)
    waiting = closing.is_alive()
    go_on.set()
    assert not waiting
    assert wait_for_no_decoders()


def test_an_error_of_the_generator_itself_comes_through(fake: Recognizer) -> None:
    def broken() -> Iterator[NDArray[np.uint8]]:
        yield RED
        raise RuntimeError("the camera is gone")

    with pytest.raises(RuntimeError, match="the camera is gone"):
        list(fake.predict(broken()))


# --- photos that cannot be read


def test_stream_yields_an_error_in_place_and_goes_on(fake: Recognizer, tmp_path: Path) -> None:
    missing = tmp_path / "missing.jpg"
    images: list[ImageLike] = [RED, missing, GREEN, b"", b"no photo", BLUE, *[missing] * 5, RED]
    answers = list(fake.stream(images))
    kinds = [answer.label if isinstance(answer, Prediction) else "error" for answer in answers]
    assert kinds == ["red", "error", "green", "error", "error", "blue", *["error"] * 5, "red"]
    assert isinstance(answers[1], MediaError)
    assert str(missing) in str(answers[1])
    embeddings = list(fake.embed_images(images))
    assert [isinstance(e, MediaError) for e in embeddings] == [isinstance(a, MediaError) for a in answers]


def test_stream_of_nothing_but_errors(fake: Recognizer) -> None:
    assert all(isinstance(answer, MediaError) for answer in fake.stream([b"no photo"] * 9))


def test_predict_raises_the_error(fake: Recognizer, tmp_path: Path) -> None:
    with pytest.raises(MediaError):
        fake.predict(tmp_path / "missing.jpg")
    with pytest.raises(MediaError):
        fake.predict([RED, b"no photo"])
    answers = fake.predict(iter([RED, b"no photo"]))
    assert next(answers).label == "red"
    with pytest.raises(MediaError):
        next(answers)


def test_what_is_no_photo_at_all(fake: Recognizer) -> None:
    file = io.BytesIO(b"a\nb"), "BytesIO"  # not lines
    nothing: Any
    for nothing, kind in (([1], "int"), (None, "NoneType"), file, (bytearray(b"x"), "bytearray")):
        with pytest.raises(MediaError, match=f"cannot take {kind} as an image"):
            fake.predict(nothing)


# --- answers


@pytest.mark.parametrize("labels", [None, WORDS, ["cooking"], [f"action {i}" for i in range(60)]])
def test_the_contract_of_an_answer(mini: Recognizer, photos: list[Path], labels: list[str] | None) -> None:
    asked = mini.labels if labels is None else tuple(labels)
    for answer in mini.predict(photos, labels, top_k=1000):
        scores = [score for _, score in answer.top]
        assert [label for label, _ in answer.top] == sorted(asked, key=lambda label: -dict(answer.top)[label])
        assert sum(scores) == pytest.approx(1)
        assert all(0 <= score <= 1 for score in scores)
        assert answer.label in (answer.top[0].label, "unknown")
        assert answer.score == answer.top[0].score
        assert answer.set[0] == answer.top[0].label
        assert answer.set == tuple(label for label, _ in answer.top)[: len(answer.set)]
        assert -1.001 <= answer.evidence <= 1.001


def test_top_k_bounds_top(mini: Recognizer, photos: list[Path]) -> None:
    assert len(mini.predict(photos[0]).top) == 5
    assert len(mini.predict(photos[0], top_k=1).top) == 1
    assert len(mini.predict(photos[0], WORDS, top_k=9).top) == len(WORDS)
    full = mini.predict(photos[0], top_k=1000)
    assert mini.predict(photos[0], top_k=2).top == full.top[:2]


def test_the_set_grows_with_coverage(mini: Recognizer, photos: list[Path]) -> None:
    for labels in (None, WORDS):
        before: set[str] = set()
        for coverage in (0.01, 0.3, 0.5, 0.55, 0.8, 0.9, 0.93, 0.98, 0.99):
            unsure = mini.predict(photos[-1], labels, coverage=coverage)
            assert before <= set(unsure.set)
            assert unsure.set[0] == unsure.top[0].label
            before = set(unsure.set)
        beyond = mini.predict(photos[0], labels, coverage=0.9999)
        assert len(beyond.set) == len(labels or mini.labels)


def test_coverages_between_two_fitted_ones_take_the_upper(fake: Recognizer) -> None:
    mixed = np.concatenate([RED, RED, GREEN])
    sets = {c: fake.predict(mixed, coverage=c).set for c in (0.5, 0.51, 0.9, 0.900000000001, 0.91, 0.95)}
    assert sets[0.51] == sets[0.9] == sets[0.900000000001]
    assert sets[0.91] == sets[0.95]


def test_scores_rest_on_the_calibration(fake: Recognizer) -> None:
    cosines = np.eye(3)[0]
    answer = fake.predict(RED, top_k=3)
    expected = np.exp(5 * cosines) / np.exp(5 * cosines).sum()
    np.testing.assert_allclose([score for _, score in answer.top], sorted(expected)[::-1], atol=1e-4)


def test_unknown_where_the_evidence_is_below_the_bound(fake: Recognizer) -> None:
    info = fake.bundle.info
    strict = changed(fake, known=info.known.model_copy(update={"unknown_below": 1.0}))
    grey = (RED // 2 + GREEN // 3).astype(np.uint8)
    answer, usual = strict.predict(grey), fake.predict(grey)
    assert answer.label == "unknown"
    assert usual.label == "red"
    assert replace(answer, label="red") == usual
    # words have a calibration of their own
    assert strict.predict(grey, ["some words"]).label == "some words"


def test_unknown_with_the_embedded_model(mini: Recognizer, photos: list[Path]) -> None:
    for name, labels in (("known", None), ("open", WORDS)):
        stricter = getattr(mini.bundle.info, name).model_copy(update={"unknown_below": 1.0})
        answer = changed(mini, **{name: stricter}).predict(photos[0], labels)
        assert answer.label == "unknown"
        assert "unknown" not in [label for label, _ in answer.top]


def test_the_json_form(mini: Recognizer, photos: list[Path]) -> None:
    answer = mini.predict(photos[0], top_k=3)
    plain = json.loads(json.dumps(answer.to_dict()))
    assert set(plain) == {"label", "score", "set", "top", "evidence"}
    for told in (plain, {k: plain[k] for k in plain if k != "evidence"}):
        assert Prediction.from_dict(told).to_dict() == told
    assert plain["label"] == answer.label
    assert plain["score"] == pytest.approx(answer.score, abs=1e-6)
    assert plain["set"] == list(answer.set)
    assert plain["top"] == [{"label": label, "score": round(score, 6)} for label, score in answer.top]


# --- wrong calls


@pytest.mark.parametrize(
    "options",
    [
        {"labels": []},
        {"labels": ["", " "]},
        {"labels": ["unknown"]},
        {"labels": ["x" * 201]},
        {"labels": (f"action {i}" for i in range(1001))},
        {"top_k": 0},
        {"top_k": -1},
        *({"coverage": wrong} for wrong in (0, 1, 2, -0.1, float("nan"))),
    ],
)
def test_wrong_options_are_refused_at_the_call(fake: Recognizer, options: dict[str, Any]) -> None:
    def never() -> Iterator[NDArray[np.uint8]]:
        raise AssertionError("a photo was drawn")
        yield RED

    with pytest.raises(UsageError):
        fake.stream(never(), **options)


def test_a_bundle_without_labels_asks_for_some(
    tmp_path: Path, make_info: Callable[..., BundleInfo], fake_runtime: Any
) -> None:
    from safetensors.numpy import save

    head = save({"class_vectors": np.zeros((0, 3), np.float32)})
    bundle = write_bundle(tmp_path / "bare", make_info(labels=()), {"head.safetensors": head})
    bare = Recognizer(bundle, fake_runtime)
    with pytest.raises(UsageError, match="has no labels of its own"):
        bare.predict(RED)
    assert bare.predict(RED, ["cooking"]).top[0].label == "cooking"


def test_a_single_string_of_labels_is_split(fake: Recognizer) -> None:
    assert {label for label, _ in fake.predict(RED, "red, green", top_k=9).top} == {"red", "green"}


# --- labels


def test_known_labels_use_their_class_vectors(fake: Recognizer, fake_runtime: Any) -> None:
    np.testing.assert_array_equal(fake.embed_labels(["blue", "red"]), np.eye(3, dtype=np.float32)[[2, 0]])
    assert fake.predict(RED).label == "red"
    assert fake_runtime.sentences == []
    assert fake.choose(["red", "blue"])[2] == fake.bundle.info.known


def test_capitals_do_not_make_a_known_label_new(fake: Recognizer, fake_runtime: Any) -> None:
    np.testing.assert_array_equal(fake.embed_labels(["Blue", "RED"]), fake.embed_labels(["blue", "red"]))
    assert fake.predict(RED, ["Blue", "RED"]).label == "RED"
    assert fake_runtime.sentences == []


def test_one_new_word_puts_the_whole_list_through_the_text_tower(fake: Recognizer, fake_runtime: Any) -> None:
    vectors = fake.embed_labels(["red", "somersaulting oddly"])
    asked = ["red", "a photo of red", "somersaulting oddly", "a photo of somersaulting oddly"]
    assert fake_runtime.sentences == asked
    mean = fake_runtime.encode_text(["somersaulting oddly", "a photo of somersaulting oddly"]).mean(0)
    np.testing.assert_allclose(vectors[1], mean / np.linalg.norm(mean), atol=1e-6)
    assert not np.array_equal(vectors[0], [1, 0, 0])
    assert fake.choose(["red", "somersaulting oddly"])[2] == fake.bundle.info.open


def test_descriptions_count_as_much_as_the_name(fake: Recognizer, fake_runtime: Any) -> None:
    from cliphar.labels import describe

    vector = fake.embed_labels(["archery"])[0]
    parts = []
    for sentences in (["archery", "a photo of archery"], list(describe("archery"))):
        assert set(sentences) <= set(fake_runtime.sentences)
        mean = fake_runtime.encode_text(sentences).mean(0)
        parts.append(mean / np.linalg.norm(mean))
    expected = (parts[0] + parts[1]) / np.linalg.norm(parts[0] + parts[1])
    np.testing.assert_allclose(vector, expected, atol=1e-6)


def test_label_vectors_of_the_embedded_model(mini: Recognizer) -> None:
    known = mini.embed_labels(mini.labels)
    np.testing.assert_array_equal(known, mini.bundle.class_vectors())
    np.testing.assert_allclose(np.linalg.norm(known, axis=1), 1, atol=1e-4)
    words = mini.embed_labels(WORDS)
    assert words.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(words, axis=1), 1, atol=1e-5)
    # whatever is asked in one breath, a word's vector stays about the same
    alone = np.concatenate([Recognizer(mini.bundle, mini.runtime).embed_labels([word]) for word in WORDS])
    assert ((words * alone).sum(1) > 0.99).all()


def test_a_word_is_embedded_once(fake: Recognizer, fake_runtime: Any) -> None:
    first = fake.embed_labels(["hopping oddly", "hopping oddly"])
    count = len(fake_runtime.sentences)
    np.testing.assert_array_equal(fake.embed_labels(["hopping oddly"]), first[:1])
    assert len(fake_runtime.sentences) == count == 2


def test_the_cache_is_bounded_and_drops_the_oldest(
    fake: Recognizer, fake_runtime: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_recognizer, "_CACHED_LABELS", 3)
    for label in ("w1", "w2", "w3", "w1", "w4"):
        fake.embed_labels([label])
    assert set(fake._cache) == {"w3", "w1", "w4"}
    many = [f"word {i}" for i in range(10)]
    assert fake.embed_labels(many).shape == (10, 3)
    assert len(fake._cache) == 3
    fake_runtime.sentences.clear()
    fake.embed_labels(["word 9"])
    assert fake_runtime.sentences == []


def test_several_threads_share_a_recogniser(fake: Recognizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_recognizer, "_CACHED_LABELS", 5)
    words = [f"word {i}" for i in range(12)]
    alone = {word: fake.embed_labels([word])[0] for word in words}

    def work(seed: int) -> bool:
        random = np.random.default_rng(seed)
        for _ in range(25):
            chosen = [words[i] for i in random.permutation(12)[:4]]
            vectors = fake.embed_labels(chosen)
            if not all(np.array_equal(v, alone[w]) for v, w in zip(vectors, chosen, strict=True)):
                return False
            if fake.predict([RED, BLUE], ["red", "green", "blue"])[1].label != "blue":
                return False
        with fake._lock:  # while another thread adds to it, it may hold more
            return len(fake._cache) <= 5

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(work, range(6)))


def test_several_threads_share_the_embedded_model(mini: Recognizer, photos: list[Path]) -> None:
    alone = [mini.predict(photo, WORDS) for photo in photos]
    with ThreadPoolExecutor(4) as pool:
        for answers in pool.map(lambda _: mini.predict(photos, WORDS), range(4)):
            assert all(near(a, b) for a, b in zip(answers, alone, strict=True))


def test_known_words_do_not_wait_for_new_ones(fake: Recognizer, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on = threading.Event(), threading.Event()
    encode = fake.runtime.encode_text

    def slow(texts: Sequence[str]) -> NDArray[np.float32]:
        begun.set()
        go_on.wait(60)
        return encode(texts)

    fake.embed_labels(["swimming", "diving"])
    monkeypatch.setattr(fake.runtime, "encode_text", slow)
    with ThreadPoolExecutor(3) as pool:
        new = [pool.submit(fake.embed_labels, ["climbing", "diving"]) for _ in range(2)]
        assert begun.wait(60)
        known = pool.submit(fake.embed_labels, ["swimming", "diving"])
        try:
            assert known.result(30).shape == (2, 3)
        finally:
            go_on.set()
        np.testing.assert_array_equal(new[0].result(60), new[1].result(60))


# --- loading


def test_load_by_environment(monkeypatch: pytest.MonkeyPatch, mini: Recognizer) -> None:
    monkeypatch.setenv("MODEL_PATH", str(mini.bundle.path))
    assert load(provider="cpu", threads=1).bundle.info == mini.bundle.info
    assert cliphar.load("mini", provider="cpu", threads=1).labels == mini.labels
