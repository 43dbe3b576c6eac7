"""From what a method made to a finished bundle: calibrated, measured, with where it came from."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save

from cliphar.bundle import (
    Bundle,
    BundleInfo,
    Calibration,
    Provenance,
    Source,
    VideoSpec,
    write_bundle,
)
from cliphar.errors import printable
from cliphar.evaluation import (
    EVALUATION_FILE,
    OPEN_MARGIN,
    Evaluation,
    Mistake,
    analyse,
    compare,
    confident_mistakes,
    fit_calibration,
)
from cliphar.models import WEIGHTS_FILE
from cliphar.recognizer import (
    BACKGROUND_FILE,
    TAUGHT_FILE,
    Prediction,
    Recognizer,
    fit_background,
    to_predictions,
)
from cliphar.runtime import OnnxRuntime
from cliphar.training._finish import BACKGROUND_PHOTOS, measured, provenance
from cliphar.training._job import TEST, TRAIN, VAL, Job, Outcome, embed_rows
from cliphar.training._loop import pick_device
from cliphar.training._method_recipe import GradientRecipe, TemporalRecipe

__all__ = ["package"]


def package(job: Job, outcome: Outcome) -> tuple[Bundle, Evaluation]:
    """Calibrate on VAL, measure on TEST beside the starting model, and write the bundle to the recipe's output.

    The evaluation is of TEST, compared with the starting model; its data is the bundle's ``evaluation.json``.

    Both go through the bundle as it will serve. Where the towers are as they were, ``open`` stays as it was; else it
    is fitted on the same labels by their words, which flatters it: they are not words that training never saw.
    """
    info = job.bundle.info
    same_towers = "image.onnx" not in outcome.files
    kept = ("image.onnx", "text.onnx", "tokenizer.json", WEIGHTS_FILE, BACKGROUND_FILE)
    files: dict[str, Path | bytes] = {
        name: job.bundle.file(name)
        for name in info.files
        if name in kept or (same_towers and name not in ("head.safetensors", TAUGHT_FILE))
    }
    files |= outcome.files | {"head.safetensors": save({"class_vectors": np.ascontiguousarray(outcome.vectors)})}
    draft = _draft(job, files)
    with tempfile.TemporaryDirectory() as work:
        bundle = write_bundle(Path(work) / "bundle", draft, files)
        trained = Recognizer(bundle, OnnxRuntime(bundle))
        val, test = (
            job.features(part) if same_towers else embed_rows(trained, job.photos, job.rows(part))
            for part in (VAL, TEST)
        )
        words = trained.embed_words(job.labels)
        if same_towers and BACKGROUND_FILE in info.files:
            words = trained.compared(words)
        else:
            some = np.random.default_rng(0).permutation(job.rows(TRAIN))[:BACKGROUND_PHOTOS]
            background = fit_background(embed_rows(trained, job.photos, some))
            files[BACKGROUND_FILE] = background.to_bytes()
            words = background.centred(words, info.text.centred)
    truth = {part: job.targets[job.rows(part)] for part in (VAL, TEST)}
    known = fit_calibration(val @ outcome.vectors.T, truth[VAL])
    unseen = info.open if same_towers else fit_calibration(val @ words.T, truth[VAL], margin=OPEN_MARGIN)
    start = job.start_vectors().T
    answers = {
        "known": _answers(job, test @ outcome.vectors.T, known),
        "words": _answers(job, test @ words.T, unseen),
        "start": _answers(job, job.features(TEST) @ start, fit_calibration(job.features(VAL) @ start, truth[VAL])),
    }
    descriptions = {
        "known": "photos never seen",
        "words": "the same photos, labels by their words alone",
        "start": f"the same photos by {info.name}, which training started from",
    }
    named = [job.labels[t] for t in truth[TEST]]
    metrics = {
        kind: measured(answers[kind], named, f"{len(job.labels)} labels, {what}") for kind, what in descriptions.items()
    }
    evaluation = Evaluation(
        model=job.recipe.name,
        data=f"the test part of {Path(job.recipe.data.source).name}",
        analysis=analyse(answers["known"], named, job.labels),
        mistakes=_mistakes(job, answers["known"], named),
        comparison=compare(answers["known"], answers["start"], named, info.name),
    )
    files[EVALUATION_FILE] = json.dumps(evaluation.to_dict(), ensure_ascii=False).encode()
    if same_towers and "open" in info.metrics:
        metrics["open"] = info.metrics["open"]
    for name, figures in metrics.items():
        job.around.log(f"{name}: " + ", ".join(f"{key} {value:.4f}" for key, value in figures.values.items()))
    finished = draft.model_copy(update={"known": known, "open": unseen, "metrics": metrics})
    return write_bundle(job.recipe.output, finished, files, overwrite=True), evaluation


def _draft(job: Job, files: dict[str, Path | bytes]) -> BundleInfo:
    """What bundle.json says before the bundle is calibrated and measured."""
    info = job.bundle.info
    return info.model_copy(
        update={
            "name": job.recipe.name,
            "description": job.recipe.description or f"{info.name}, trained by method {job.recipe.method}",
            "labels": job.labels,
            "video": _video(job),
            "metrics": {},
            "sources": (*info.sources, *_sources(job)),
            "provenance": _provenance(job),
            "files": {
                name: entry.for_other_labels()
                for name, entry in info.files.items()
                if files.get(name) == job.bundle.path / name
            },
        }
    )


def _video(job: Job) -> VideoSpec:
    """A clip's label was learned from the mean of its frames: so long a window is scored when it serves."""
    seconds = job.photos.seconds[job.rows(TRAIN)]
    clips = seconds[seconds > 0] if isinstance(job.recipe, TemporalRecipe) else ()
    return VideoSpec(fps=job.bundle.info.video.fps, window_s=min(60, float(np.median(clips))) if len(clips) else 0)


def _sources(job: Job) -> tuple[Source, ...]:
    given = [(job.recipe.data.source, "photos and labels"), (getattr(job.recipe, "captions", None), "captions")]
    return tuple(
        Source(name=printable(Path(source).name), role=role, licence="not stated in the recipe")
        for source, role in given
        if source
    )


def _answers(job: Job, cosines: NDArray[np.float32], calibration: Calibration) -> list[Prediction]:
    return to_predictions(cosines, job.labels, calibration)


def _mistakes(job: Job, answers: list[Prediction], truth: list[str]) -> list[Mistake]:
    worst = confident_mistakes([Path(str(i)) for i in job.rows(TEST)], answers, truth)  # keys may be there twice
    rows = [int(str(mistake.path)) for mistake in worst]
    return [
        replace(mistake, path=Path(job.photos.keys[i]), image=job.photos.photo(i))
        for mistake, i in zip(worst, rows, strict=True)
    ]


def _provenance(job: Job) -> Provenance:
    settings: dict[str, Any] = job.recipe.model_dump(mode="json", exclude={"output": True, "data": {"cache"}})
    settings["base"] = job.bundle.info.name  # where it lay on the machine that trained is nobody's business
    settings["base_image_sha256"] = job.bundle.info.files["image.onnx"].sha256
    for section, key in ((settings["data"], "source"), (settings, "captions")):
        if section.get(key):
            section[key] = printable(Path(section[key]).name)
    on_gpu = isinstance(job.recipe, GradientRecipe) and pick_device(job.recipe.train).type == "cuda"
    gpus = f", {job.around.ranks.world} x {torch.cuda.get_device_name()}" if on_gpu else ""
    return provenance(settings, job.photos.sha256, job.recipe.seed, gpus)
