"""How well an action is taught from a few photos: sports that no shipped model was trained on, five draws of photos.

python benchmarks/teaching.py ../shared/data/sports70.tar [MODEL]
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from cliphar import load
from cliphar.data import read_labelled
from cliphar.recognizer import gda_vectors, read_background

DRAWS = 5


def main(photos_at: Path, model: str) -> None:
    """Print a table of top-1 against photos for each action."""
    recognizer = load(model)
    photos = read_labelled(photos_at)
    # the sports that the recipes of the shipped models hold out
    sports = sorted({str(photo.label) for photo in photos})
    held_out = sorted(np.random.default_rng(7).choice(sports, 30, replace=False).tolist())
    photos = [photo for photo in photos if photo.label in held_out]
    embedded = list(recognizer.embed_images(photo.content for photo in photos))
    z = np.stack([one for one in embedded if isinstance(one, np.ndarray)])
    y = np.array(
        [held_out.index(str(p.label)) for p, e in zip(photos, embedded, strict=True) if isinstance(e, np.ndarray)]
    )
    background = read_background(recognizer.bundle)
    text, trained = recognizer.embed_words(held_out), recognizer.embed_labels(recognizer.labels)
    print("| photos | by name | all taught | one taught, among the others' names | one taught, among the known |")
    print("|---|---|---|---|---|")
    for shots in (1, 2, 4, 8, 16):
        rows = []
        for draw in range(DRAWS):
            random = np.random.default_rng(draw)
            taught = [random.permutation(np.flatnonzero(y == k))[:shots] for k in range(len(held_out))]
            rest = np.setdiff1d(np.arange(len(y)), np.concatenate(taught))
            means, counts = np.stack([z[i].mean(0) for i in taught]), np.full(len(held_out), shots)
            named = z[rest] @ recognizer.compared(text).T
            among_words = z[rest] @ recognizer.compared(gda_vectors(means, counts, text, background)).T
            among_known = z[rest] @ gda_vectors(means, counts, text, background, like=trained).T
            best_known = (z[rest] @ trained.T).max(1)
            one_word, one_known = [], []
            for k in range(len(held_out)):
                its = y[rest] == k
                others = np.delete(named, k, 1).max(1)
                one_word.append((among_words[:, k] > others)[its].mean())
                one_known.append((among_known[:, k] > best_known)[its].mean())
            by_name, all_taught = (float((s.argmax(1) == y[rest]).mean()) for s in (named, among_words))
            rows.append((by_name, all_taught, np.mean(one_word), np.mean(one_known)))
        print(f"| {shots} | " + " | ".join(f"{value:.3f}" for value in np.mean(rows, 0)) + " |")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "mini")
