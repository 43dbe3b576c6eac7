"""All photos that training sees, decoded once, with their parts; and the teacher's embeddings of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cliphar.data import Photo, difference_hash, group_duplicates, read_captioned, read_labelled, split_grouped
from cliphar.errors import MediaError, one_line
from cliphar.media import decode_image
from cliphar.training._recipe import DataRecipe

__all__ = ["TEST", "TRAIN", "VAL", "Corpus", "build_corpus"]

TRAIN, VAL, TEST = 0, 1, 2


@dataclass(frozen=True)
class Corpus:
    """N photos in the order captioned, sports, actions.

    ``labels`` are their labels or None, ``captions`` theirs or (), ``part`` int64 [N] is TRAIN, VAL or TEST, or -1 for
    what is nearly the same as a photo of another source's VAL or TEST; photos of ``held_out`` sports are never TRAIN.
    ``sha256`` digests the sources; ``folder`` keeps what is computed of the photos.
    """

    keys: list[str]
    labels: list[str | None]
    captions: list[tuple[str, ...]]
    source: list[str]
    part: NDArray[np.int64]
    actions: list[str]
    sports: list[str]
    held_out: list[str]
    sha256: str
    folder: Path
    _pixels: NDArray[np.uint8]
    _offsets: NDArray[np.int64]
    _shapes: NDArray[np.int64]

    def photo(self, i: int) -> NDArray[np.uint8]:
        """Photo i as it was decoded: uint8 RGB [H,W,3]."""
        return self._pixels[self._offsets[i] : self._offsets[i + 1]].reshape(self._shapes[i])

    def select(
        self, *, source: str | None = None, part: int | None = None, labels: list[str] | None = None
    ) -> NDArray[np.int64]:
        """Numbers of the photos that fit every condition given."""
        wanted = None if labels is None else set(labels)
        return np.array(
            [
                i
                for i in range(len(self.keys))
                if (source is None or self.source[i] == source)
                and (part is None or self.part[i] == part)
                and (wanted is None or self.labels[i] in wanted)
            ],
            np.int64,
        )

    def targets(self, rows: NDArray[np.int64], labels: Sequence[str]) -> NDArray[np.int64]:
        """Numbers, int64, of the photos' labels in ``labels``; -1 for another or none."""
        number = {label: i for i, label in enumerate(labels)}
        return np.array([number.get(str(self.labels[i]), -1) for i in rows], np.int64)


def build_corpus(recipe: DataRecipe, log: Callable[[str], None]) -> Corpus:
    """Read, decode (once: cached under ``recipe.cache``), find near-duplicates and split."""
    photos: list[Photo] = []
    source: list[str] = []
    for name, read in (("captioned", read_captioned), ("sports", read_labelled), ("actions", read_labelled)):
        found = read(recipe.root / getattr(recipe, name))
        photos += found
        source += [name] * len(found)
    digest = hashlib.sha256()
    for photo in photos:
        digest.update(f"{photo.key}\0{photo.label}\0{json.dumps(photo.captions)}\0".encode())
        digest.update(hashlib.sha256(photo.content).digest())
    sha = digest.hexdigest()
    folder = recipe.cache / sha[:16]
    if not (folder / "index.npz").exists():
        log(f"decoding {len(photos)} photos into {folder}")
        _decode_all(photos, folder, log)
    index = np.load(folder / "index.npz")
    kept = index["kept"]
    photos = [photos[i] for i in kept]
    source = [source[i] for i in kept]
    labels = [photo.label for photo in photos]
    sports = sorted({str(label) for label, s in zip(labels, source, strict=True) if s == "sports"})
    random = np.random.default_rng(recipe.seed)
    held_out = sorted(random.choice(sports, recipe.held_out_sports, replace=False).tolist())
    return Corpus(
        keys=[photo.key for photo in photos],
        labels=labels,
        captions=[photo.captions for photo in photos],
        source=source,
        part=_parts(recipe, labels, source, index["groups"], held_out),
        actions=sorted({str(label) for label, s in zip(labels, source, strict=True) if s == "actions"}),
        sports=sports,
        held_out=held_out,
        sha256=sha,
        folder=folder,
        _pixels=np.load(folder / "pixels.npy", mmap_mode="r"),
        _offsets=index["offsets"],
        _shapes=index["shapes"],
    )


def _parts(
    recipe: DataRecipe, labels: list[str | None], source: list[str], groups: NDArray[np.int64], held_out: list[str]
) -> NDArray[np.int64]:
    part = np.zeros(len(labels), np.int64)
    actions = np.array([i for i, s in enumerate(source) if s == "actions"])
    fractions = (1 - recipe.val - recipe.test, recipe.val, recipe.test)
    part[actions] = split_grouped([labels[i] for i in actions], groups[actions], fractions, recipe.seed)
    captioned = np.array([i for i, s in enumerate(source) if s == "captioned"])
    share = recipe.captioned_val / len(captioned)
    part[captioned] = split_grouped([0] * len(captioned), groups[captioned], (1 - share, share), recipe.seed)
    held = np.array([i for i, label in enumerate(labels) if label in held_out])
    part[held] = VAL + split_grouped([labels[i] for i in held], groups[held], (0.5, 0.5), recipe.seed)
    # each source was split for itself: what is kept in one is not trained on in another
    part[(part == TRAIN) & np.isin(groups, groups[part != TRAIN])] = -1
    return part


def _decode_all(photos: list[Photo], folder: Path, log: Callable[[str], None]) -> None:
    def decode(photo: Photo) -> NDArray[np.uint8] | None:
        try:
            return np.asarray(decode_image(photo.content))
        except MediaError as error:
            log(one_line(f"left out {photo.key}: {error}"))
            return None

    with ThreadPoolExecutor() as pool:
        images = list(pool.map(decode, photos))
    kept = [i for i, image in enumerate(images) if image is not None]
    decoded = [image for image in images if image is not None]
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "pixels.npy", np.concatenate([image.ravel() for image in decoded]))
    groups = group_duplicates([difference_hash(image) for image in decoded])
    log(f"{len(groups) - len(set(groups.tolist()))} near-duplicates kept on one side of the split")
    np.savez(
        folder / "index.npz",
        kept=np.array(kept),
        groups=groups,
        offsets=np.cumsum([0] + [image.size for image in decoded]),
        shapes=np.array([image.shape for image in decoded]),
    )
