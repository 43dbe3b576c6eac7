"""A recipe's material: the model it starts from, its photos in parts, their labels, features and texts."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from cliphar.bundle import Bundle, whole_file
from cliphar.data import SPLITS, PhotoSet, assign_parts, doubtful_labels, embed_clips, load_photos, open_source
from cliphar.errors import DataError
from cliphar.labels import clean_labels
from cliphar.recognizer import Recognizer
from cliphar.runtime import OnnxRuntime
from cliphar.training._base import find_base
from cliphar.training._loop import Surroundings
from cliphar.training._method_recipe import MethodRecipe, SetRecipe

__all__ = ["TEST", "TRAIN", "VAL", "Job", "Outcome", "embed_rows", "open_job"]

TRAIN, VAL, TEST = range(len(SPLITS))
R = TypeVar("R", bound=MethodRecipe)


@dataclass(frozen=True)
class Job:
    """``part`` int64 [N] is TRAIN, VAL, TEST or, for what is not used, -1; ``targets`` int64 [N] numbers ``labels``,
    -1 for none."""

    recipe: MethodRecipe
    base: Recognizer
    photos: PhotoSet
    part: NDArray[np.int64]
    labels: tuple[str, ...]
    targets: NDArray[np.int64]
    around: Surroundings

    def recipe_as(self, kind: type[R]) -> R:
        """The recipe, as its method knows it."""
        if not isinstance(self.recipe, kind):
            raise TypeError(f"{type(self.recipe).__name__} is no {kind.__name__}")
        return self.recipe

    @property
    def bundle(self) -> Bundle:
        """The bundle that training starts from."""
        return self.base.bundle

    @property
    def identity(self) -> str:
        """A digest of what decides the weights: the recipe, the data and the starting bundle."""
        recipe = self.recipe.model_dump(mode="json", exclude={"output", "description", "base", "track"})
        recipe.get("train", {}).pop("distributed", None)  # a checkpoint of either kind is taken up by the other
        recipe["data"] = {key: value for key, value in recipe["data"].items() if key not in ("source", "cache")}
        if "wise" in recipe:
            recipe["wise"] = recipe.pop("wise")  # last, as in the checkpoints that are there
        image = self.bundle.info.files["image.onnx"].sha256
        return hashlib.sha256(json.dumps([recipe, self.photos.sha256, image]).encode()).hexdigest()

    def rows(self, part: int) -> NDArray[np.int64]:
        """Numbers of the part's labelled photos."""
        return np.flatnonzero((self.part == part) & (self.targets >= 0))

    def text_vectors(self) -> NDArray[np.float32]:
        """The labels' vectors by their words alone, float32 [C,D]."""
        return self.base.embed_words(self.labels)

    def start_vectors(self) -> NDArray[np.float32]:
        """The labels' vectors as the starting model has them: trained ones where it has, else by their words."""
        vectors = self.base.compared(self.text_vectors())
        known = {label: i for i, label in enumerate(self.bundle.info.labels)}
        trained = self.bundle.class_vectors()
        for i, label in enumerate(self.labels):
            if label in known:
                vectors[i] = trained[known[label]]
        return vectors

    def features(self, part: int) -> NDArray[np.float32]:
        """Embeddings of the part's labelled photos by the starting model, float32 [N,D], unit length; kept on disk."""
        frames = getattr(self.recipe, "frames", 1)
        model = self.bundle.info.files["image.onnx"].sha256
        digest = hashlib.sha256(f"{self.photos.sha256} {frames} {model}".encode() + self.rows(part).tobytes())
        file = self.recipe.data.cache / f"features-{digest.hexdigest()[:16]}.npy"
        if file.is_file():
            return np.asarray(np.load(file), np.float32)
        self.around.log(f"embedding {len(self.rows(part))} photos")
        found = embed_rows(self.base, self.photos, self.rows(part))
        with whole_file(file) as partial:  # another training may be at the same
            np.save(partial, found)
        return found


@dataclass(frozen=True)
class Outcome:
    """What a method made: the labels' vectors, float32 [C,D], and the files of the towers that it changed."""

    vectors: NDArray[np.float32]
    files: dict[str, Path | bytes] = field(default_factory=dict)


def embed_rows(recognizer: Recognizer, photos: PhotoSet, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """Embeddings, float32 [N,D] of unit length; a clip's is the direction of its frames' mean."""
    found = embed_clips(recognizer, (list(photos.frames(int(i))) for i in rows))
    return np.stack([vector for vector in found if isinstance(vector, np.ndarray)])


def open_job(recipe: MethodRecipe, around: Surroundings) -> Job:
    """Load the starting model and the photos, and divide them.

    Raises:
        BundleError, DataError: the model or the photos cannot be read.
        DataError: fewer than two labels, or a part that would be empty.
        UsageError: a label is one that the finished model could not be asked about.
    """
    data = recipe.data
    bundle = find_base(recipe.base, data.cache, around.log)
    spec = bundle.info.image
    source = open_source(data.source)
    frames = getattr(recipe, "frames", 1)
    try:
        photos = load_photos(
            source, data.cache, side=spec.size, max_aspect=spec.max_aspect, frames=frames, log=around.log
        )
    except OSError as error:  # those of the source are DataErrors
        why = f"cannot keep decoded photos in {data.cache}: {error.strerror}"
        raise DataError(f"{why}; choose another folder with data.cache=") from error
    labels = tuple(sorted({label for label in photos.labels if label is not None}))
    if len(labels) < 2:
        only = f"'{labels[0]}' as its only label" if labels else "no labels"
        raise DataError(f"{data.source} has {only}; give photos of at least two, as LABEL/PHOTO")
    for label in labels:
        clean_labels([label])
    for doubt in doubtful_labels(labels):
        around.log(doubt)
    number = {label: i for i, label in enumerate(labels)}
    targets = np.array([-1 if label is None else number[label] for label in photos.labels], np.int64)
    part = _divide(photos, labels, targets, data, around)
    return Job(recipe, Recognizer(bundle, OnnxRuntime(bundle)), photos, part, labels, targets, around)


def _divide(
    photos: PhotoSet, labels: tuple[str, ...], targets: NDArray[np.int64], data: SetRecipe, around: Surroundings
) -> NDArray[np.int64]:
    """``Job.part``; DataError where it is of no use."""
    part = assign_parts(photos, data.val, data.test, data.seed)
    if alike := int(((part > TRAIN) & np.isin(photos.groups, photos.groups[part == TRAIN])).sum()):  # in named parts
        around.log(
            f"WARNING: {alike:,} photos of val and test are near-duplicates of photos to train on, which flatters "
            "figures; see 'cliphar data check'"
        )
    if data.shots is not None:
        random = np.random.default_rng(data.seed)
        for target in range(len(labels)):
            mine = random.permutation(np.flatnonzero((part == TRAIN) & (targets == target)))
            part[mine[data.shots :]] = -1
    used = {name: int(((part == which) & (targets >= 0)).sum()) for which, name in enumerate(SPLITS)}
    for name, count in used.items():
        if not count:
            raise DataError(f"{data.source} leaves no photo for {name}; give more photos or other fractions")
    trained = set(targets[part == TRAIN].tolist()) - {-1}
    if len(trained) < 2:
        raise DataError(
            f"the photos of {data.source} to train on are all of '{labels[trained.pop()]}'; "
            "give those of at least two labels, or smaller data.val and data.test"
        )
    if untrained := [label for number, label in enumerate(labels) if number not in trained]:
        around.log(f"no photo to train on, only words: {', '.join(untrained)}")
    counts = ", ".join(f"{name} {count:,}" for name, count in used.items())
    around.log(f"{len(photos):,} photos of {len(labels)} labels: {counts}")
    return part
