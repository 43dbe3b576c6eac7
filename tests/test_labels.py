from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cliphar.bundle import BundleInfo, packaged, read_bundle
from cliphar.cli._eval import read_labelled
from cliphar.data import open_source
from cliphar.errors import UsageError
from cliphar.evaluation import confusion_svg
from cliphar.labels import (
    MAX_LABEL_LENGTH,
    MAX_LABELS,
    clean_labels,
    describe,
    glossary,
    prompts,
    read_labels_file,
    with_score,
)


@pytest.mark.parametrize(
    ("given_labels", "expected"),
    [
        (["riding_a_bike"], ("riding a bike",)),
        (["  riding \t a   bike\n"], ("riding a bike",)),
        (["cooking", "", "  ", "_", "reading"], ("cooking", "reading")),
        (["b", "a", "b", "c", " a "], ("b", "a", "c")),
        (["riding_a_bike", "riding a bike"], ("riding a bike",)),
        (["Cooking", "cooking"], ("Cooking", "cooking")),
        ("cooking, riding_a_bike,,reading", ("cooking", "riding a bike", "reading")),
        ("cooking", ("cooking",)),
        (["eating, drinking"], ("eating, drinking",)),
        (["faire du vélo", "自転車に乗る", "🚴"], ("faire du vélo", "自転車に乗る", "🚴")),
        (["unknown pleasures"], ("unknown pleasures",)),
        (["a\u00a0b"], ("a b",)),
        (["faire du ve\u0301lo", "faire du v\u00e9lo"], ("faire du v\u00e9lo",)),  # a Mac's spelling, and ours
    ],
)
def test_labels_are_cleaned_in_order(given_labels: list[str] | str, expected: tuple[str, ...]) -> None:
    assert clean_labels(given_labels) == expected


def test_a_generator_of_labels_is_taken() -> None:
    assert clean_labels(label for label in ("a", "b")) == ("a", "b")


@pytest.mark.parametrize("nothing", [[], [""], [" ", "_", "\n"], "", ",,"])
def test_no_labels_is_an_error_with_an_example(nothing: list[str] | str) -> None:
    with pytest.raises(UsageError, match=r"no labels.*--labels"):
        clean_labels(nothing)


@pytest.mark.parametrize("labels", [["a", None], [1, 2], b"abc"])
def test_labels_that_are_no_text(labels: list[str]) -> None:
    with pytest.raises(UsageError, match=r"is no text; labels are actions"):
        clean_labels(labels)


@pytest.mark.parametrize("label", ["red\x1b[31m", "nul\0", "\ud83d"])
def test_labels_that_no_terminal_should_show(label: str) -> None:
    with pytest.raises(UsageError, match="control character"):
        clean_labels([label])
    with pytest.raises(ValueError, match="control characters"):
        BundleInfo.model_validate(read_bundle(packaged("mini")).info.model_dump() | {"labels": (label,)})


def test_too_many_labels() -> None:
    assert len(clean_labels(f"action {i}" for i in range(MAX_LABELS))) == MAX_LABELS
    assert len(clean_labels(["a", "b"] * MAX_LABELS)) == 2
    with pytest.raises(UsageError, match="1,001 labels are too many"):
        clean_labels(f"action {i}" for i in range(MAX_LABELS + 1))


def test_too_long_a_label() -> None:
    assert clean_labels(["x" * MAX_LABEL_LENGTH])
    with pytest.raises(UsageError, match="has 201 characters; at most 200") as caught:
        clean_labels(["x" * (MAX_LABEL_LENGTH + 1)])
    assert len(str(caught.value)) < 120


@pytest.mark.parametrize("word", ["unknown", "Unknown", " UNKNOWN ", "_unknown_"])
def test_the_reserved_word_is_refused(word: str) -> None:
    with pytest.raises(UsageError, match="cannot be a label"):
        clean_labels(["cooking", word])


@given(st.lists(st.text(max_size=30), max_size=20))
def test_cleaning_is_idempotent(labels: list[str]) -> None:
    try:
        once = clean_labels(labels)
    except UsageError:
        return
    assert clean_labels(once) == once
    assert len(set(once)) == len(once)
    assert all(label == label.strip() and "_" not in label and "  " not in label for label in once)


def test_labels_file(tmp_path: Path) -> None:
    file = tmp_path / "labels.txt"
    file.write_bytes(
        "\ufeff# actions\r\nriding_a_bike\r\n\r\n  # more\r\n cooking \r\ncooking\r\neating, a lot".encode()
    )
    assert read_labels_file(file) == ("riding a bike", "cooking", "eating, a lot")


def test_the_samples_labels_file_is_usable(samples: Path) -> None:
    assert len(read_labels_file(samples / "labels.txt")) >= 2


@pytest.mark.parametrize("content", [b"", b"# only a comment\n", b"\n\n"])
def test_labels_file_without_labels(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "labels.txt"
    file.write_bytes(content)
    with pytest.raises(UsageError, match="no labels"):
        read_labels_file(file)


def test_labels_file_that_cannot_be_read(tmp_path: Path) -> None:
    binary = tmp_path / "photo.jpg"
    binary.write_bytes(b"\xff\xd8\xff\xe0\x00\x10")
    for bad in (binary, tmp_path / "missing.txt", tmp_path):
        with pytest.raises(UsageError, match="cannot read labels from") as caught:
            read_labels_file(bad)
        assert str(bad) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_glossary_is_well_formed() -> None:
    entries = glossary()
    assert len(entries) > 100
    for name, descriptions in entries.items():
        assert clean_labels([name]) == (name,), name
        assert name == name.lower(), name
        assert descriptions, name
        assert len(set(descriptions)) == len(descriptions), name
        for text in descriptions:
            assert text == " ".join(text.split()), name
            assert 3 < len(text) <= MAX_LABEL_LENGTH, name


def test_no_two_glossary_entries_differ_only_by_an_article_or_hyphen() -> None:
    for name, descriptions in glossary().items():
        assert describe(name) == descriptions, name


def test_describe_ignores_case_articles_hyphens_and_blanks() -> None:
    spelled = next(name for name in glossary() if len(name.split()) == 2)
    first, second = spelled.split()
    expected = glossary()[spelled]
    variants = (
        spelled.upper(),
        f"The {first} {second}",
        f"{first} a {second}",
        f"{first} an {second}",
        f"{first}-{second}",
        f"  {first}   {second} ",
    )
    for variant in variants:
        assert describe(variant) == expected, variant
    assert describe("an action that nobody wrote down") == ()
    assert describe("") == ()


def test_an_article_inside_a_word_is_kept() -> None:
    assert describe("ar chery") == ()
    assert describe("archery") != ()


def test_prompts_fill_every_template_and_add_descriptions() -> None:
    named, described = prompts("archery", ("{}", "a photo of {}"))
    assert named == ["archery", "a photo of archery"]
    assert tuple(described) == describe("archery")
    named, described = prompts("{} odd %s", ("a photo of {}",))
    assert (named, described) == (["a photo of {} odd %s"], [])


def test_what_is_unknown_is_shown_without_a_score() -> None:
    assert with_score("cooking", 0.874) == "cooking  87%"
    assert with_score("unknown", 0.874) == "unknown"


def test_letters_of_twice_the_width_have_room_in_a_plot() -> None:
    one = np.eye(1, dtype=np.int64)
    assert confusion_svg(["自転車"], one).replace("自転車", "a bike") == confusion_svg(["a bike"], one)


def test_a_matrix_of_hundreds_of_labels_scrolls_and_is_not_shrunk_to_the_page() -> None:
    assert "--least:3" in confusion_svg(["a"] * 400, np.eye(400, dtype=np.int64))


def test_what_eval_leaves_out_and_doubts_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("sit/a.jpg", "run/b.jpg", "run/2024/c.jpg", "run/2024/notes.txt", "d.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert len(read_labelled(tmp_path, None)[0]) == 2
    told = capsys.readouterr().err
    assert f"such as {tmp_path}/run/2024/c.jpg" in told
    assert f"1 files in {tmp_path} lie beside the label folders and are left out, such as {tmp_path}/d.jpg" in told
    (tmp_path / "sit").rename(tmp_path / "7")
    read_labelled(tmp_path, None)
    assert "labels that are numbers: 7;" in capsys.readouterr().err
    assert str(tmp_path / "d.jpg") in open_source(str(tmp_path)).note
