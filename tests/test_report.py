from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save
from scipy.stats import binomtest  # type: ignore[import-untyped]

from cliphar.bundle import Bundle, find_bundle, packaged, read_bundle, write_bundle
from cliphar.cli._eval import answer_all, compare_with, read_labelled
from cliphar.evaluation import (
    Evaluation,
    analyse,
    compare,
    confident_mistakes,
    evaluate,
    expected_calibration_error,
    harmonic_mean,
    macro_f1,
    mcnemar,
    model_card,
    paired_interval,
    reliability,
    write_report,
)
from cliphar.recognizer import Prediction, Recognizer, Score

LABELS = ("a", "b", "c")
Cli = Callable[..., "subprocess.CompletedProcess[str]"]


def answer(label: str, score: float) -> Prediction:
    rest = [Score(other, (1 - score) / 2) for other in LABELS if other != label]
    return Prediction(label, score, (label,), (Score(label, score), *rest), 0.5)


def answers(best: list[str], score: float = 0.9) -> list[Prediction]:
    return [answer(label, score) for label in best]


# --- analysis


def test_analysis_by_hand() -> None:
    truth = list("aaabbc")
    found = analyse(answers(list("aabbba")), truth, LABELS)
    assert found.confusion.tolist() == [[2, 1, 0], [0, 2, 0], [1, 0, 0]]
    a, b, c = found.classes
    assert (a.n, a.precision, a.recall, a.f1) == (3, pytest.approx(2 / 3), pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert (b.n, b.precision, b.recall, b.f1) == (2, pytest.approx(2 / 3), 1, pytest.approx(0.8))
    assert (c.n, c.precision, c.recall, c.f1) == (1, 0, 0, 0)
    assert found.report.macro_f1 == pytest.approx(np.mean([one.f1 for one in found.classes]))
    assert json.loads(json.dumps(found.to_dict())) == found.to_dict()


def test_a_label_without_photos_counts_in_no_mean() -> None:
    found = analyse(answers(list("ab")), list("ab"), LABELS)
    assert found.classes[2].n == 0
    assert found.ci95["macro_f1"] == (1.0, 1.0)


def test_reliability_adds_up_to_the_error() -> None:
    random = np.random.default_rng(0)
    confidence, correct = random.uniform(0, 1, 500), random.uniform(0, 1, 500) < 0.6
    bins = reliability(confidence, correct, bins=7)
    assert sum(one.n for one in bins) == 500
    assert all(one.low <= one.confidence <= one.high for one in bins)
    error = sum(one.n / 500 * abs(one.accuracy - one.confidence) for one in bins)
    assert error == pytest.approx(expected_calibration_error(confidence, correct, bins=7))


@pytest.mark.parametrize("right", [0, 9, 10, 20])
def test_few_photos_prove_little(right: int) -> None:
    best = ["a"] * right + ["b"] * (20 - right)
    found = analyse(answers(best), ["a"] * 20, LABELS).ci95
    true = binomtest(right, 20).proportion_ci(method="wilson")
    assert found["top1"] == found["coverage"] == pytest.approx((true.low, true.high), abs=1e-4)
    assert "-" not in f"{found}"
    assert found["top5"] == pytest.approx((0.8389, 1), abs=1e-4)


def test_the_interval_of_macro_f1_is_that_of_resampled_photos() -> None:
    random = np.random.default_rng(2)
    truth = random.choice(LABELS, 200).tolist()
    best = [t if random.uniform() < 0.8 else str(random.choice(LABELS)) for t in truth]
    low, high = analyse(answers(best), truth, LABELS).ci95["macro_f1"]
    drawn = []
    for _ in range(300):
        rows = random.integers(0, 200, 200)
        drawn.append(macro_f1([truth[i] for i in rows], [best[i] for i in rows]))
    assert (low, high) == pytest.approx(np.quantile(drawn, (0.025, 0.975)), abs=0.02)


def test_mistakes_come_most_confident_first() -> None:
    predictions = [answer("a", 0.5), answer("a", 0.7), answer("a", 0.9), answer("a", 1.0)]
    mistakes = confident_mistakes([Path(n) for n in "wxyz"], predictions, list("bbba"), count=2)
    assert [(m.path.name, m.truth, m.answer, m.score) for m in mistakes] == [("y", "b", "a", 0.9), ("x", "b", "a", 0.7)]


# --- comparison


@pytest.mark.parametrize(("first", "second"), [(0, 0), (1, 0), (5, 5), (12, 3), (3, 12), (0, 40), (400, 330)])
def test_mcnemar_is_the_exact_binomial_test(first: int, second: int) -> None:
    expected = binomtest(first, first + second).pvalue if first + second else 1.0
    assert mcnemar(first, second) == pytest.approx(expected, rel=1e-9)
    assert mcnemar(20_000 + first, 20_000 + second) > 0  # and in no time


def test_comparison_by_hand() -> None:
    truth = list("aaaaaaaaaa")
    found = compare(answers(list("aaaaaaaabb")), answers(list("aaaaabbbab")), truth, "old")
    assert (found.only_this, found.only_other, found.other) == (3, 1, "old")
    assert (found.other_top1, found.difference) == (pytest.approx(0.6), pytest.approx(0.2))
    assert found.difference_ci95[0] < 0.2 < found.difference_ci95[1]
    assert found.p_value == pytest.approx(binomtest(3, 4).pvalue)
    same = compare(answers(truth), answers(truth), truth, "same")
    assert (same.difference, same.p_value) == (0, 1)
    assert same.difference_ci95 == pytest.approx((-0.23, 0.23), abs=0.01)  # of ten photos


def test_an_interval_holds_the_difference_and_agrees_with_the_test() -> None:
    random = np.random.default_rng(0)
    for photos, gain, loss in ((20, 0.1, 0.02), (30, 0.05, 0.0), (100, 0.02, 0.0), (675, 0.05, 0.03)):
        drawn = random.multinomial(photos, (gain, loss, 1 - gain - loss), 400)
        ends = [paired_interval(int(a), int(b), photos) for a, b, _ in drawn]
        assert np.mean([low <= gain - loss <= high for low, high in ends]) > 0.93
    for won in range(1, 13):
        assert (paired_interval(won, 0, 675)[0] > 0) == (mcnemar(won, 0) <= 0.05)
    assert paired_interval(5, 0, 5)[1] == 1


def test_harmonic_mean() -> None:
    assert harmonic_mean(0.8, 0.4) == pytest.approx(2 / (1 / 0.8 + 1 / 0.4))
    assert harmonic_mean(0, 0.9) == harmonic_mean(0, 0) == 0


# --- the report


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_needs_nothing_else_and_takes_any_name(photos: list[Path], tmp_path: Path) -> None:
    labels = ("<script>alert(1)</script>", "b & c", "größe")
    hostile = tmp_path / "a<b>\udcff&.jpg"
    shutil.copy(photos[0], hostile)
    gone = tmp_path / "gone.jpg"
    predictions = [Prediction(labels[0], 0.9, labels[:1], (Score(labels[0], 0.9), Score(labels[1], 0.1)), 0.5)] * 3
    truth = [labels[0], labels[1], labels[2]]
    done = Evaluation(
        model="mini",
        data=str(tmp_path),
        analysis=analyse(predictions, truth, labels),
        images_per_s=1.0,
        mistakes=confident_mistakes([hostile, hostile, gone], predictions, truth),
        comparison=compare(predictions, predictions, truth, "<b>"),
        novel=evaluate(predictions, truth),
    )
    write_report(tmp_path / "report.html", done)
    raw = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = _Page()
    page.feed(raw)
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "b>")]
    sources = [attrs["src"] for tag, attrs in page.tags if tag == "img"]
    assert [str(source)[:22] for source in sources] == ["data:image/jpeg;base64"]  # the photo that is gone is left out
    assert "http" not in raw
    regions = [attrs for tag, attrs in page.tags if attrs.get("role") == "region"]
    assert [one["tabindex"] for one in regions] == ["0", "0"]  # what scrolls on a phone is reached by keys
    assert "b & c" in page.text
    write_report(tmp_path / "report.json", done)
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report["labels"] == list(labels)
    assert report["confusion"] == [[1, 0, 0]] * 3
    assert len(report["mistakes"]) == 2
    assert not list(tmp_path.glob("*.partial"))


@pytest.fixture
def cli(clean_env: dict[str, str], tmp_path: Path) -> Cli:
    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "cliphar", *map(str, arguments)]
        return subprocess.run(
            command, capture_output=True, text=True, env=clean_env, cwd=tmp_path, timeout=120, check=False
        )

    return run


@pytest.fixture
def labelled(photos: list[Path], tmp_path: Path) -> Path:
    for label, photo in zip(("calling", "cycling", "eating"), photos, strict=False):
        (place := tmp_path / "data" / label).mkdir(parents=True)
        shutil.copy(photo, place)
    return tmp_path / "data"


def test_eval_against_another_model_and_on_new_labels(cli: Cli, labelled: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    shutil.copytree(labelled, new)
    for folder, name in (("calling", "juggling"), ("cycling", "knitting"), ("eating", "rowing")):
        (new / folder).rename(new / name)
    reports = ("-r", "out.html", "-r", "out.json")
    done = cli("eval", "--data", labelled, "--against", "mini", "--novel", "new", *reports, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    figures = json.loads(done.stdout)
    assert figures["against"] | {"p_value": 1.0, "difference": 0.0, "only_this": 0} == figures["against"]
    assert set(figures["novel"]) >= {"n", "top1", "harmonic_mean"}
    assert set(figures["ci95"]) == {"top1", "top5", "macro_f1", "coverage", "set_size"}
    report = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert report["figures"]["top1"] == figures["top1"]
    assert np.sum(report["confusion"]) == 3
    assert "McNemar" in (tmp_path / "out.html").read_text(encoding="utf-8")
    plain = cli("eval", "--data", labelled, "--against", "mini")
    assert plain.returncode == 0
    assert "p = 1" in plain.stdout


def test_a_photo_that_went_away_is_compared_of_neither(mini: Recognizer, labelled: Path) -> None:
    listed, labels = read_labelled(labelled, None)
    read, found, _ = answer_all(mini, listed, labels, 0.9, labelled)
    read[0][0].unlink()
    comparison, lost = compare_with(mini, read, found, labels, 0.9, labelled)
    assert (comparison.difference, lost) == (0, 1)


def test_eval_of_clips_among_photos(cli: Cli, labelled: Path, photos: list[Path], tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    clip = labelled / "eating" / "clip.mkv"
    with av.open(str(clip), "w") as file:
        stream = file.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
        for photo in photos * 10:
            with Image.open(photo) as opened:
                frame = av.VideoFrame.from_image(opened.convert("RGB").resize((320, 240)))
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    (labelled / "eating" / "other.png").symlink_to(photos[0])
    done = cli("eval", "--data", labelled, "--against", "mini", "--json", "-r", "out.html")
    assert (done.returncode, done.stderr) == (0, "")
    figures = json.loads(done.stdout)
    assert (figures["n"], figures["against"]["difference"]) == (5, 0)
    page = (tmp_path / "out.html").read_text(encoding="utf-8")
    assert page.count("<figure>") == page.count("data:image/jpeg") == round(5 * (1 - figures["top1"])) > 0
    assert "clip.mkv" in page
    (labelled / "eating" / "cut.mkv").write_bytes(clip.read_bytes()[: clip.stat().st_size // 2])
    (labelled / "eating" / "no.avi").write_bytes(b"no clip")
    for command in (("eval",), ("model", "promote", "mini", "--over", tmp_path / "place")):
        done = cli(*command, "--data", labelled, "--json")
        assert (done.returncode, json.loads(done.stdout)["n"]) == (1, 5)
        cut, no_clip = done.stderr.splitlines()
        assert "cut.mkv is not whole: stops at" in cut
        assert "no.avi is not a video" in no_clip
    assert not (tmp_path / "place").exists()


def test_wrong_calls_of_eval(cli: Cli, labelled: Path) -> None:
    (labelled / "calling").rename(labelled / "Calling")  # the recogniser takes it for the same
    for arguments, said in (
        (("--report", "out.pdf"), ".html or .json"),
        (("--report", "nowhere/out.html"), "nowhere"),
        (("--novel", ""), "it is empty"),
        (("--novel", labelled), "was trained on: Calling, cycling, eating"),
    ):
        done = cli("eval", "--data", labelled, *arguments)
        assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
        assert said in done.stderr
    assert cli("eval", "--data", labelled, "--against", "minni").returncode == 1


# --- promote


@pytest.fixture
def drinks(samples: Path, tmp_path: Path) -> Path:
    """Ten photos that mini knows are of drinking, and one of something else."""
    for label, count in (("drinking", 10), ("cycling", 1)):
        (place := tmp_path / "test" / label).mkdir(parents=True)
        for i in range(count):
            shutil.copy(samples / "photographer.jpg", place / f"{i}.jpg")
    return tmp_path / "test"


@pytest.fixture
def worse(tmp_path: Path) -> Path:
    """A bundle that takes drinking for cycling, and the other way about."""
    mini = read_bundle(packaged("mini"))
    vectors = mini.class_vectors()
    a, b = mini.info.labels.index("drinking"), mini.info.labels.index("cycling")
    vectors[[a, b]] = vectors[[b, a]]
    files = {name: mini.file(name) for name in mini.info.files}
    info = mini.info.model_copy(update={"name": "worse"})
    return write_bundle(tmp_path / "worse", info, files | {"head.safetensors": save({"class_vectors": vectors})}).path


def test_only_a_better_model_is_promoted(cli: Cli, drinks: Path, worse: Path, tmp_path: Path) -> None:
    place = tmp_path / "production"

    def promote(candidate: object, *more: object) -> tuple[bool, Any]:
        done = cli("model", "promote", candidate, "--over", place, "--data", drinks, "--json", *more)
        assert (done.returncode, done.stderr) == (0, "")
        said = json.loads(done.stdout)
        return said["promoted"], said["against"]

    assert promote(worse) == (True, None)  # nothing was there
    assert read_bundle(place).info.name == "worse"
    assert promote(worse)[0] is False  # as good is not better
    assert promote("mini", "--level", 0.001)[0] is False  # better, but not surely enough
    promoted, against = promote("mini")
    assert (promoted, against["only_this"], against["only_other"]) == (True, 10, 1)
    assert against["p_value"] == pytest.approx(mcnemar(10, 1), rel=1e-5)
    assert read_bundle(place).info.name == "mini"
    plain = cli("model", "promote", worse, "--over", place, "--data", drinks)
    assert plain.stdout.startswith(f"{place} stays as it is: top1 -0.818, p = 0.012")
    assert read_bundle(place).info.name == "mini"


def test_photos_that_cannot_be_read_promote_nothing(cli: Cli, drinks: Path, worse: Path) -> None:
    (drinks / "drinking" / "cut.jpg").write_bytes(b"no photo")
    done = cli("model", "promote", "mini", "--over", worse, "--data", drinks)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert read_bundle(worse).info.name == "worse"


def test_wrong_places_to_promote_to(cli: Cli, drinks: Path) -> None:
    for place in (drinks, drinks / "cycling" / "0.jpg"):  # neither is a bundle
        done = cli("model", "promote", "mini", "--over", place, "--data", drinks)
        assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert (drinks / "cycling" / "0.jpg").is_file()


def test_other_labels_do_not_inherit_what_a_runtime_answered() -> None:
    mini = find_bundle(packaged("mini"))
    files = {name: file.for_other_labels() for name, file in mini.info.files.items()}
    bundle = Bundle(mini.path, mini.info.model_copy(update={"files": files}))
    assert bundle.runtimes == mini.runtimes
    parity = files["image.int8.onnx"].parity
    assert parity is not None
    assert {"cosine_mean", "cosine_min", "photos"} <= set(parity)
    assert not {"agreement", "accuracy", "difference_low"} & set(parity)
    row = next(line for line in model_card(bundle).split("\n") if line.startswith("| `onnx-int8`"))
    assert row.endswith("|  |  |")
