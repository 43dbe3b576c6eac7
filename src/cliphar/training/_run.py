"""Run a recipe from photos to a bundle."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import load_file, save

from cliphar.bundle import (
    Bundle,
    BundleInfo,
    Calibration,
    ImageSpec,
    Metrics,
    Provenance,
    TextSpec,
    find_bundle,
    write_bundle,
)
from cliphar.evaluation import OPEN_MARGIN, fit_calibration
from cliphar.export import (
    TEACHER_SIZE,
    compress_weights,
    export_image_tower,
    export_teacher_graph,
    export_text_tower,
    teacher_tensors,
)
from cliphar.labels import glossary
from cliphar.media import to_square
from cliphar.models import ClipTower, ImageTower
from cliphar.recognizer import BACKGROUND_FILE, Recognizer, fit_background, to_predictions
from cliphar.runtime import OnnxRuntime
from cliphar.training._adapt import adapt
from cliphar.training._corpus import TEST, TRAIN, VAL, Corpus, build_corpus
from cliphar.training._distill import DistillData, distill, embed, soft_labels
from cliphar.training._fetch import fetch_imagenet, fetch_sentence_encoder
from cliphar.training._finish import (
    BACKGROUND_PHOTOS,
    LIMITS,
    MINI_SOURCES,
    SPACE_SOURCES,
    bias_photos,
    measured,
    provenance,
)
from cliphar.training._head import train_head
from cliphar.training._recipe import MiniRecipe, SpaceRecipe
from cliphar.training._teacher import look, teacher_embeddings, teacher_weights, token_maps
from cliphar.training._text import Sentences, build_sentences, train_projection

__all__ = ["run"]

TEMPLATES = (
    "{}",
    "a photo of {}",
    "a photo of a person doing {}",
    "a photo of people {}",
    "an action photo of {}",
    "a person {}",
)
_CHANGES = "changes.safetensors"  # of a space's tower: what a student's teacher is made of
_UNFITTED = Calibration.unfitted(50.0)
_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
Log = Callable[[str], None]


def run(recipe: SpaceRecipe | MiniRecipe, log: Log) -> Bundle:
    """Train by ``recipe`` and write its bundle to ``recipe.output``."""
    corpus = build_corpus(recipe.data, log)
    return _space(recipe, corpus, log) if isinstance(recipe, SpaceRecipe) else _mini(recipe, corpus, log)


def _space(recipe: SpaceRecipe, corpus: Corpus, log: Log) -> Bundle:
    weights = teacher_weights(recipe.teacher, recipe.data.cache, log)
    teacher = teacher_embeddings(corpus, weights, recipe.teacher.max_aspect, log)
    encoder = fetch_sentence_encoder(recipe.text.encoder, recipe.data.cache, log)
    sentence_graph, tokenizer = build_sentences(recipe.text, encoder, corpus)
    sentences = Sentences(sentence_graph, tokenizer, recipe.text.context_length)
    trained = [label for label in corpus.sports if label not in corpus.held_out] + corpus.actions
    projection = train_projection(corpus, teacher, sentences, recipe.text, trained, recipe.seed, log)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    files: dict[str, Path | bytes] = {
        "image.onnx": export_teacher_graph(weights).SerializeToString(),
        weights.name: weights,
        "text.onnx": export_text_tower(sentence_graph, projection, recipe.text.block).SerializeToString(),
        "tokenizer.json": tokenizer.to_str().encode(),
    }
    info = BundleInfo(
        name=recipe.name,
        description=recipe.description,
        labels=tuple(corpus.actions),
        embedding_dim=teacher.shape[1],
        image=ImageSpec(size=TEACHER_SIZE, max_aspect=recipe.teacher.max_aspect),
        text=TextSpec(templates=TEMPLATES, context_length=recipe.text.context_length),
        known=_UNFITTED,
        open=_UNFITTED,
        sources=SPACE_SOURCES,
        limits=LIMITS,
        provenance=_provenance(recipe, corpus),
    )
    with _without_head(info, files) as towers:
        words = towers.embed_words(corpus.actions)
    changes = adapt(teacher_tensors(weights), corpus, words, recipe, log)
    files["image.onnx"] = export_teacher_graph(weights, changes).SerializeToString()
    files[_CHANGES] = save(changes)
    return _finish(recipe, corpus, info, files, log)


def _mini(recipe: MiniRecipe, corpus: Corpus, log: Log) -> Bundle:
    space = find_bundle(recipe.space)
    texts = Recognizer(space, OnnxRuntime(space))
    rows = corpus.select(part=TRAIN)
    large = ClipTower(teacher_tensors(teacher_weights(recipe.teacher, recipe.data.cache, log)), 1)
    large.apply_changes(load_file(space.file(_CHANGES)))
    which = space.info.files[_CHANGES].sha256
    tokens, teacher = look(large, corpus, rows, recipe.teacher.max_aspect, which, log)
    met = [label for label in corpus.sports if label not in corpus.held_out]
    trained = corpus.actions + met
    vectors = np.concatenate([texts.embed_labels(corpus.actions), texts.embed_words(met)])  # the actions' as trained
    captions = [corpus.captions[i][0] for i in corpus.select(source="captioned", part=TRAIN)[:600]]
    others = [name for name in glossary() if name not in corpus.held_out]
    data = DistillData(
        photos=lambda i: corpus.photo(int(rows[i])),
        teacher=teacher,
        maps=token_maps(tokens),
        max_aspect=recipe.teacher.max_aspect,
        targets=soft_labels(corpus.targets(rows, trained), teacher @ vectors.T, recipe.distill),
        class_vectors=texts.embed_words(trained),
        bank=np.concatenate([texts.runtime.encode_text(captions), texts.embed_words(others)]),
    )
    torch.manual_seed(recipe.seed)
    tower = ImageTower(recipe.distill.backbone, teacher.shape[1], recipe.distill.drop_path)
    tower.load_backbone(fetch_imagenet(recipe.distill.backbone, recipe.distill.weights, recipe.data.cache, log))
    val = np.concatenate([corpus.select(source="actions", part=VAL), corpus.select(labels=corpus.held_out, part=VAL)])
    held_vectors = texts.embed_words(corpus.held_out)

    def validate(average: ImageTower, vectors: torch.Tensor) -> str:
        photos = (Image.fromarray(corpus.photo(int(i))) for i in val)
        z = embed(average, (to_square(photo, recipe.distill.size, recipe.teacher.max_aspect) for photo in photos))
        known = np.array([corpus.labels[i] in corpus.actions for i in val])
        actions = (z[known] @ vectors[: len(corpus.actions)].numpy().T).argmax(1)
        sports = (z[~known] @ held_vectors.T).argmax(1)
        hits = (actions == corpus.targets(val[known], corpus.actions)).mean()
        unseen = (sports == corpus.targets(val[~known], corpus.held_out)).mean()
        return f"actions {hits:.3f} unseen sports {unseen:.3f}"

    checkpoint = corpus.folder / f"{recipe.name}.ckpt"
    settings = recipe.model_dump(mode="json", exclude={"output", "description", "space", "data", "head"})
    space_files = [space.info.files[name].sha256 for name in ("text.onnx", "head.safetensors", _CHANGES)]
    decides = json.dumps([settings, corpus.sha256, corpus.part.tolist(), space_files])
    tower = distill(
        tower,
        data,
        recipe.distill,
        checkpoint=checkpoint,
        identity=hashlib.sha256(decides.encode()).hexdigest(),
        seed=recipe.seed,
        log=log,
        validate=validate,
    )
    photos = (Image.fromarray(corpus.photo(int(i))) for i in bias_photos(rows))
    squares = np.stack([to_square(photo, recipe.distill.size, recipe.teacher.max_aspect) for photo in photos])
    graph = compress_weights(export_image_tower(tower, recipe.distill.size), squares).SerializeToString()
    bundle = _finish_mini(recipe, corpus, graph, space, log)
    checkpoint.unlink()
    return bundle


def _finish_mini(recipe: MiniRecipe, corpus: Corpus, graph: bytes, space: Bundle, log: Log) -> Bundle:
    """A bundle of the finished tower's graph."""
    files: dict[str, Path | bytes] = {
        "image.onnx": graph,
        "text.onnx": space.file("text.onnx"),
        "tokenizer.json": space.file("tokenizer.json"),
    }
    info = space.info.model_copy(
        update={
            "name": recipe.name,
            "description": recipe.description,
            "image": ImageSpec(size=recipe.distill.size, max_aspect=recipe.teacher.max_aspect),
            "sources": MINI_SOURCES,
            "provenance": _provenance(recipe, corpus),
            "metrics": {},
            "files": {},
        }
    )
    return _finish(recipe, corpus, info, files, log)


def _embed(recognizer: Recognizer, corpus: Corpus, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    found = list(recognizer.embed_images(corpus.photo(int(i)) for i in rows))
    return np.stack([vector for vector in found if isinstance(vector, np.ndarray)])


@contextmanager
def _without_head(info: BundleInfo, files: dict[str, Path | bytes]) -> Iterator[Recognizer]:
    """The towers before there are class vectors."""
    none = save({"class_vectors": np.zeros((len(info.labels), info.embedding_dim), np.float32)})
    with tempfile.TemporaryDirectory() as work:
        bundle = write_bundle(Path(work) / "untrained", info, files | {"head.safetensors": none})
        yield Recognizer(bundle, OnnxRuntime(bundle))


def _finish(
    recipe: SpaceRecipe | MiniRecipe,
    corpus: Corpus,
    info: BundleInfo,
    files: dict[str, Path | bytes],
    log: Log,
) -> Bundle:
    """Fit class vectors on TRAIN, then calibrate on VAL and measure on TEST, as the bundle will serve, and write it.

    Label vectors are centred as far as most of VAL's sports that training never saw are right.
    """

    def centred(share: float) -> BundleInfo:
        return info.model_copy(update={"text": info.text.model_copy(update={"centred": share})})

    rows = corpus.select(source="actions", part=TRAIN)
    unseen = corpus.select(part=VAL, labels=corpus.held_out)
    with _without_head(centred(0), files) as towers:
        features, text = _embed(towers, corpus, rows), towers.embed_words(corpus.actions)
        background = fit_background(_embed(towers, corpus, corpus.select(source="captioned")[:BACKGROUND_PHOTOS]))
        seen, words = _embed(towers, corpus, unseen), towers.embed_words(corpus.held_out)
    truth = corpus.targets(unseen, corpus.held_out)
    right = {share: ((seen @ background.centred(words, share).T).argmax(1) == truth).sum() for share in _SHARES}
    info = centred(max(_SHARES, key=right.__getitem__))
    head = train_head(features, corpus.targets(rows, corpus.actions), text, recipe.head, recipe.seed)
    files = files | {"head.safetensors": save({"class_vectors": head}), BACKGROUND_FILE: background.to_bytes()}
    with tempfile.TemporaryDirectory() as work:
        bundle = write_bundle(Path(work) / "bundle", info, files)
        recognizer = Recognizer(bundle, OnnxRuntime(bundle))
        fitted: dict[str, Calibration] = {}
        metrics: dict[str, Metrics] = {}
        for kind, labels, description in (
            ("known", corpus.actions, f"the {len(corpus.actions)} known actions, photos never seen"),
            ("open", corpus.held_out, f"{len(corpus.held_out)} sports never seen, from their names"),
        ):
            vectors = recognizer.embed_labels(labels)
            (val, val_truth), (test, test_truth) = (
                (_embed(recognizer, corpus, rows) @ vectors.T, corpus.targets(rows, labels))
                for rows in (corpus.select(part=part, labels=labels) for part in (VAL, TEST))
            )
            fitted[kind] = fit_calibration(val, val_truth, margin=OPEN_MARGIN if kind == "open" else None)
            answers = to_predictions(test, tuple(labels), fitted[kind])
            metrics[kind] = measured(answers, [labels[i] for i in test_truth], description)
            log(f"{kind}: {metrics[kind].values}")
        captioned = corpus.select(source="captioned", part=VAL)
        sentences = recognizer.runtime.encode_text([corpus.captions[i][0] for i in captioned])
        hits = (sentences @ _embed(recognizer, corpus, captioned).T).argmax(1) == np.arange(len(captioned))
    metrics["retrieval"] = Metrics(
        description="a photo found by its caption", n=len(captioned), values={"top1": round(float(hits.mean()), 6)}
    )
    log(f"retrieval: {metrics['retrieval'].values}")
    info = info.model_copy(update=fitted | {"metrics": metrics})
    return write_bundle(recipe.output, info, files, overwrite=True)


def _provenance(recipe: SpaceRecipe | MiniRecipe, corpus: Corpus) -> Provenance:
    settings: dict[str, Any] = recipe.model_dump(mode="json")
    for section, key in (("data", "root"), ("data", "cache"), ("teacher", "weights")):
        settings[section].pop(key)  # where things lay on the machine that trained is nobody's business
    for key in ("output", "space"):
        settings.pop(key, None)
    return provenance(settings, corpus.sha256, recipe.seed)
