"""How good the model is on photos that the visitor brings, in folders named as their labels."""

from __future__ import annotations

import hashlib
import lzma
import tarfile
import tempfile
import time
import zipfile
import zlib
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import streamlit as st

from cliphar.errors import ClipharError, DataError, MediaError
from cliphar.evaluation import Evaluation, Mistake, analyse, write_report
from cliphar.labels import clean_labels
from cliphar.media import is_image_name
from cliphar.recognizer import Prediction
from cliphar.ui._backend import Backend, Photo
from cliphar.ui._session import answerer

if TYPE_CHECKING:
    from streamlit.runtime.uploaded_file_manager import UploadedFile

__all__ = ["evaluate_photos"]

_MAX_MB = 500
_MAX_PHOTO_MB = 50
_AT_ONCE = 16
_MISTAKES = 24
_COVERAGE = 0.9


def evaluate_photos(backend: Backend, model: str, done: Evaluation | None) -> None:
    """The form that takes a zip or tar of labelled photos and measures; the downloads of what was measured."""
    upload = st.file_uploader(
        "A zip or tar file of folders named as the actions, with photos of each",
        type=["zip", "tar", "gz", "tgz", "xz"],
        max_upload_size=_MAX_MB,
        key="labelled",
        help="cooking/1.jpg, cooking/2.jpg, mowing_the_lawn/1.jpg: any actions, whether the model was trained on "
        "them or not. Twenty photos of each say something, a hundred say it well.",
    )
    with st.container(horizontal=True):
        if st.button("Measure on these photos", type="primary", disabled=upload is None) and upload is not None:
            try:
                st.session_state.evaluations[answerer()] = _evaluate(backend, model, upload)
            except ClipharError as error:
                st.error(f"{error}.", icon=":material/error:")
            else:
                st.rerun()
        if done is not None:
            for kind in ("html", "json"):
                st.download_button(
                    f"Report ({kind.upper()})", partial(_report, done, kind), f"report.{kind}", on_click="ignore"
                )


def _report(done: Evaluation, kind: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / f"report.{kind}"
        write_report(target, done)
        return target.read_bytes()


def _evaluate(backend: Backend, model: str, upload: UploadedFile) -> Evaluation:
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / Path(upload.name).name
        archive.write_bytes(upload.getbuffer())
        try:
            return _measure(backend, model, archive)
        except DataError as error:
            raise DataError(str(error).replace(f"{folder}/", "")) from error


def _measure(backend: Backend, model: str, archive: Path) -> Evaluation:
    _check_sizes(archive)
    total, labels = 0, set()
    for _, label in _labelled(archive):
        total += 1
        labels.add(label)
    if len(labels) < 2:
        raise DataError(f"{archive.name} has photos of {len(labels)} actions; put those of two or more into folders")
    chosen = clean_labels(sorted(labels))
    answers: list[Prediction] = []
    truth: list[str] = []
    mistakes: list[Mistake] = []
    refused = 0
    bar = st.progress(0.0, "Measuring")
    since = time.monotonic()
    photos = _labelled(archive)
    while some := list(islice(photos, _AT_ONCE)):
        found = backend.answer([photo for photo, _ in some], chosen, _COVERAGE)
        for (photo, label), answer in zip(some, found, strict=True):
            if isinstance(answer, MediaError):
                refused += 1
                continue
            answers.append(answer)
            truth.append(label)
            best = answer.top[0].label
            if best != label:
                mistakes.append(Mistake(Path(photo.name), label, best, answer.score, photo.data))
        mistakes = sorted(mistakes, key=lambda mistake: -mistake.score)[:_MISTAKES]
        share = (len(answers) + refused) / total
        left = (time.monotonic() - since) * (1 - share) / share
        bar.progress(min(1.0, share), f"{len(answers) + refused} of {total} photos, about {left:.0f} s left")
    bar.empty()
    if not answers:
        raise DataError(f"none of the {total} photos in {archive.name} could be read")
    if refused:
        count = "1 photo" if refused == 1 else f"{refused} photos"
        st.toast(f"{count} could not be read, and so left out.", icon=":material/info:")
    return Evaluation(model=model, data=archive.name, analysis=analyse(answers, truth, chosen), mistakes=mistakes)


def _check_sizes(archive: Path) -> None:
    """What is packed small may be large, and each photo is read whole.

    Raises:
        DataError: a file in the archive is larger than a photo may be, or it is no whole zip or tar file.
    """
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as opened:
                sizes = {member.filename: member.file_size for member in opened.infolist()}
        else:
            with tarfile.open(archive) as tar:
                sizes = {member.name: member.size for member in tar}
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise DataError(
            f"{archive.name} is damaged, or neither a zip nor a tar file; pack the folders again"
        ) from error
    for name, size in sizes.items():
        if size > _MAX_PHOTO_MB * 2**20:
            raise DataError(f"{name} in {archive.name} has {size >> 20} MB; a photo may have {_MAX_PHOTO_MB}")


def _labelled(archive: Path) -> Iterator[tuple[Photo, str]]:
    from cliphar.data import open_source  # not above: it is no part of the first page

    for photo in open_source(str(archive)).read():
        if photo.label and is_image_name(photo.key):
            digest = hashlib.sha256(photo.content).hexdigest()
            yield Photo(photo.key, photo.content, digest, b""), photo.label
