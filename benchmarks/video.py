"""How good timelines are, and how quick: on videos composed from labelled photos, with known boundaries.

python benchmarks/video.py accuracy ../shared/data [--part val] [-m MODEL]
python benchmarks/video.py speed ../shared/data [-m MODEL]

accuracy: each video has eight stretches of 4 to 15 seconds, one action each, no two alike in a row. A stretch is told
in shots of 2 to 5 seconds, each a photo of its own under a moving camera: it pans, zooms, or is held by hand. Shots
meet in hard cuts; a quarter of the stretches blend into the next for half a second. The photos are those that the
shipped recipes keep from training (test; val is for choosing constants), each is used once, and only those at least as
wide as high, as video is. In the second set a quarter of the stretches show nothing that the model was trained on:
sports held out of training that look like none of the known actions.

speed: 30 seconds of 1280x720 at 30 frames a second, of a photo every 5 seconds with grain, panned over or still; and
the same pan as a live stream, a frame every 1/30 s by the clock, from a frame's arrival to its answer.
"""

from __future__ import annotations

import argparse
import io
import time
from collections import defaultdict
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cliphar import load
from cliphar.evaluation import Span, segment_f1, temporal_map
from cliphar.labels import UNKNOWN
from cliphar.recognizer import Recognizer
from cliphar.timeline import Live, recognize_video
from cliphar.training._corpus import TEST, VAL, Corpus, build_corpus
from cliphar.training._recipe import DataRecipe

VIDEOS, STRETCHES, FPS, SIZE = 16, 8, 15, (320, 240)
OTHER = (
    "air hockey", "billiards", "bull riding", "curling", "fly fishing", "golf", "horse racing", "ice climbing", "luge",
    "rock climbing", "snowmobile racing",
)  # fmt: skip
Photo = NDArray[np.uint8]


class Composer:
    """Composes videos from a part's photos, each used once; ``unknown`` is the share of stretches of other actions."""

    def __init__(self, corpus: Corpus, part: int, unknown: float, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._unknown = unknown
        self._photos: dict[str, list[Photo]] = defaultdict(list)
        numbers = [
            *corpus.select(source="actions", part=part),
            *corpus.select(source="sports", part=part, labels=list(OTHER)),
        ]
        for i in self._random.permutation(np.array(numbers)):
            photo = corpus.photo(int(i))
            if photo.shape[1] >= photo.shape[0]:
                label = str(corpus.labels[i]) if corpus.source[i] == "actions" else UNKNOWN
                self._photos[label].append(photo)

    def compose(self) -> tuple[bytes, list[Span]]:
        """A video in H.264 and its true segments."""
        spans: list[Span] = []
        pictures: list[Photo] = []
        for _ in range(STRETCHES):
            label = self._draw(spans[-1].label if spans else "")
            stretch = self._stretch(label)
            start = len(pictures)
            if spans and self._random.random() < 0.25:
                half = round(0.25 * FPS)
                for k in range(half):  # the boundary is the middle of the blend
                    share = (k + 0.5) / (2 * half)
                    pictures[k - half] = _blend(pictures[k - half], stretch[0], share)
                    stretch[k] = _blend(pictures[-1], stretch[k], share + 0.5)
            pictures += stretch
            spans.append(Span(start / FPS, len(pictures) / FPS, label))
        return _encode(pictures, FPS), spans

    def _draw(self, before: str) -> str:
        if before != UNKNOWN and self._random.random() < self._unknown and len(self._photos[UNKNOWN]) >= 6:
            return UNKNOWN
        # what has most photos left is likelier, so that none runs out early
        ready = sorted(
            label for label, left in self._photos.items() if label not in (before, UNKNOWN) and len(left) >= 6
        )
        weights = np.array([len(self._photos[label]) for label in ready], float)
        return str(self._random.choice(ready, p=weights / weights.sum()))

    def _stretch(self, label: str) -> list[Photo]:
        wanted = round(self._random.uniform(4, 15) * FPS)
        pictures: list[Photo] = []
        while len(pictures) < wanted:
            count = round(self._random.uniform(2, 5) * FPS)
            if wanted - len(pictures) - count < 1.5 * FPS:  # no shot is a flash
                count = wanted - len(pictures)
            pictures += self._shot(self._photos[label].pop(), count)
        return pictures

    def _shot(self, photo: Photo, count: int) -> Iterator[Photo]:
        random, image = self._random, Image.fromarray(photo)
        widest = np.array(SIZE) * min(image.width / SIZE[0], image.height / SIZE[1])
        move = random.choice(["pan", "zoom", "held"])
        scales = np.sort(random.uniform(0.7, 1, 2))[:: random.choice([-1, 1])] if move == "zoom" else [0.85, 0.85]
        ends = random.uniform(0, 1, (2, 2))
        if move != "pan":
            ends[1] = ends[0]
        shake = random.normal(0, 0.3, (count, 2)).cumsum(0) * (move == "held")
        for k in range(count):
            share = k / max(1, count - 1)
            size = widest * (scales[0] + (scales[1] - scales[0]) * share)
            room = np.array(image.size) - size
            left, top = np.clip((ends[0] + (ends[1] - ends[0]) * share) * room + shake[k], 0, room)
            box = (left, top, left + size[0], top + size[1])
            yield np.asarray(image.resize(SIZE, Image.Resampling.BILINEAR, box=box))


def _blend(a: Photo, b: Photo, share: float) -> Photo:
    return (a * (1 - share) + b * share).astype(np.uint8)


def _encode(pictures: list[Photo], fps: int) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        stream = out.add_stream("libx264", rate=fps, options={"preset": "veryfast", "crf": "23"})
        stream.width, stream.height, stream.pix_fmt = pictures[0].shape[1], pictures[0].shape[0], "yuv420p"
        for k, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts, frame.time_base = k, Fraction(1, fps)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return file.getvalue()


def accuracy(corpus: Corpus, part: int, recognizer: Recognizer) -> None:
    """Print a table: segment F1 at three overlaps and mAP, with and without stretches of no known action."""
    print("| videos | true segments | found | F1@0.1 | F1@0.25 | F1@0.5 | mAP@0.3..0.7 |")
    print("|---|---|---|---|---|---|---|")
    for name, unknown in (("known actions only", 0.0), ("a quarter of no known action", 0.25)):
        composer = Composer(corpus, part, unknown, seed=0)
        truth, found = [], []
        for _ in range(VIDEOS):
            film, spans = composer.compose()
            truth.append(spans)
            found.append(recognize_video(recognizer, film).segments)
        figures = [*segment_f1(truth, found).values(), np.mean(list(temporal_map(truth, found).values()))]
        counts = f"{sum(map(len, truth))} | {sum(map(len, found))}"
        print(f"| {name} | {counts} | " + " | ".join(f"{figure:.3f}" for figure in figures) + " |", flush=True)


def scene(corpus: Corpus, part: int, still: bool) -> list[Photo]:
    """30 seconds of 720p30."""
    random = np.random.default_rng(0)
    photos = [i for i in corpus.select(source="actions", part=part) if corpus.photo(int(i)).shape == (160, 240, 3)]
    pictures = []
    for at in range(900):
        if at % 150 == 0 and not (still and at):
            photo = Image.fromarray(corpus.photo(int(photos[at // 150]))).resize((1600, 1067), Image.Resampling.BICUBIC)
            grained = np.asarray(photo) + random.normal(0, 8, (1067, 1600, 3)).astype(np.float32)
            large = grained.clip(0, 255).astype(np.uint8)
        left = 0 if still else 320 * (at % 150) // 150
        pictures.append(large[100:820, left : left + 1280])
    return pictures


def speed(corpus: Corpus, part: int, recognizer: Recognizer) -> None:
    """Print how many times faster than it plays each kind is read, the best of three, and the live delay."""
    for still in (False, True):
        pictures = scene(corpus, part, still)
        film = _encode(pictures, 30)
        took = []
        for _ in range(4):  # the first pays for what is set up once
            started = time.perf_counter()
            timeline = recognize_video(recognizer, film)
            took.append(time.perf_counter() - started)
        rates = [timeline.duration_s / one for one in took[1:]]
        print(
            f"{'still' if still else 'panned over'}: {max(rates):.1f} times real time (of three: {min(rates):.1f} to "
            f"{max(rates):.1f}), {timeline.embedded} of {timeline.frames} frames embedded",
            flush=True,
        )
        if not still:
            delays = _live_delays(recognizer, pictures[:300])
            print(f"live: {1e3 * np.median(delays):.0f} ms, 95 % within {1e3 * np.quantile(delays, 0.95):.0f} ms")


def _live_delays(recognizer: Recognizer, pictures: list[Photo]) -> list[float]:
    live, delays = Live(recognizer), []
    began = time.perf_counter()
    while (at := int((time.perf_counter() - began) * 30)) < len(pictures):
        live.push(pictures[at], at / 30)
        delays.append(time.perf_counter() - began - at / 30)
    return delays


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("accuracy", "speed"))
    parser.add_argument("data", type=Path)
    parser.add_argument("--part", choices=("val", "test"), default="test")
    parser.add_argument("--model", "-m", default="mini")
    parser.add_argument("--cache", type=Path, default=Path("runs/cache"))
    options = parser.parse_args()
    measure = accuracy if options.what == "accuracy" else speed
    photos = build_corpus(DataRecipe(root=options.data, cache=options.cache), print)
    measure(photos, {"val": VAL, "test": TEST}[options.part], load(options.model))
