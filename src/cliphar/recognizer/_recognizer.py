"""The recogniser: a bundle, an engine, and the labels it has met."""

from __future__ import annotations

import copy
import os
import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Collection, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import TypeAlias, overload

import numpy as np
from numpy.typing import NDArray

from cliphar.bundle import Bundle, Calibration, find_bundle
from cliphar.errors import MediaError, UsageError
from cliphar.labels import clean_label, clean_labels, prompts
from cliphar.media import ImageLike, decode_image, several, to_square
from cliphar.recognizer._scoring import mean_direction, to_predictions
from cliphar.recognizer._taught import TAUGHT_FILE, Lesson, Taught, read_taught, write_taught
from cliphar.recognizer._teaching import Background, gda_vectors, read_background
from cliphar.recognizer._types import Prediction, Score, still
from cliphar.runtime import Runtime, cpu_quota, load_runtime

__all__ = ["Recognizer", "load"]

_CACHED_LABELS = 10_000

# labels, their vectors float32 [C,D], and the calibration that holds for them
_Choice: TypeAlias = tuple[tuple[str, ...], NDArray[np.float32], Calibration]


def load(
    model: str | os.PathLike[str] | None = None,
    *,
    runtime: str | None = None,
    provider: str | None = None,
    threads: int | None = None,
) -> Recognizer:
    """Load a model by name or by its bundle's path.

    Args:
        model: ``mini``, ``clip-b16``, or a directory; None takes MODEL_PATH, else ``mini``.
        runtime: ``onnx``, or one that 'cliphar export' added to the bundle; None takes CLIPHAR_RUNTIME, else the
            fastest that this machine runs, measured once and remembered.
        provider: of an ONNX runtime: ``cpu``, ``cuda``, ``tensorrt`` or ``openvino``; None takes the best present.
        threads: CPU threads; None takes what the container's quota allows.

    Raises:
        BundleError: no such model, or it is damaged.
        UsageError: the runtime or the provider is not present.
    """
    bundle = find_bundle(model)
    return Recognizer(bundle, load_runtime(bundle, runtime, provider=provider, threads=threads))


class Recognizer:
    """Recognises actions in photos, ``batch_size`` at a time at most. Safe to share between threads."""

    def __init__(self, bundle: Bundle, runtime: Runtime, *, batch_size: int = 16) -> None:
        self.bundle, self.runtime, self.batch_size = bundle, runtime, batch_size
        self._known = dict(zip(bundle.info.labels, bundle.class_vectors(), strict=True))
        self._background = read_background(bundle) if bundle.info.text.centred else None
        self._cache: OrderedDict[str, NDArray[np.float32]] = OrderedDict()
        self._lock, self._embedding = threading.Lock(), threading.Lock()
        # never changed, only replaced: who reads it once has a list of labels that fits together
        self._taught: dict[str, Taught] = {}
        if TAUGHT_FILE in bundle.info.files:
            self._taught = read_taught(bundle.file(TAUGHT_FILE), bundle)

    def fork(self, runtime: Runtime | None = None) -> Recognizer:
        """Another one, on another ``runtime`` of the bundle if given, that shares the model and its caches, knows what
        this one was taught, and learns on its own."""
        other = copy.copy(self)  # what was taught is replaced, never changed, so a shallow copy is enough
        if runtime is not None:
            other.runtime = runtime
        return other

    @property
    def labels(self) -> tuple[str, ...]:
        """What is recognised when no labels are given: the actions the bundle was trained on, then those taught."""
        return tuple(dict.fromkeys((*self.bundle.info.labels, *self._taught)))

    @property
    def taught(self) -> dict[str, int]:
        """The actions that were taught, and from how many photos each."""
        return {name: one.photos for name, one in self._taught.items()}

    def embed_labels(self, labels: Sequence[str]) -> NDArray[np.float32]:
        """Label vectors, float32 [C,D], unit length.

        Where every label was trained or taught, their class vectors. Otherwise all of them are those of
        :meth:`embed_words`, as ``compared``, so that trained labels have no advantage over new ones. A taught label
        keeps what its photos taught, in the form that is compared with text.
        """
        return self._look_up(labels, self._taught)[0]

    def _as_learnt(self, labels: Sequence[str], taught: dict[str, Taught]) -> list[str]:
        """Labels that differ in capitals only from what was trained or taught, as they were then."""
        names = dict.fromkeys((*self._known, *taught))
        learnt = {name.casefold(): name for name in names}
        return [label if label in names else learnt.get(label.casefold(), label) for label in labels]

    def _look_up(self, labels: Sequence[str], taught: dict[str, Taught]) -> tuple[NDArray[np.float32], Calibration]:
        labels = self._as_learnt(labels, taught)
        if self._known and all(label in self._known or label in taught for label in labels):
            known = [taught[label].known if label in taught else self._known[label] for label in labels]
            return np.stack(known), self.bundle.info.known
        words = [label for label in labels if label not in taught]
        texts = dict(zip(words, self.embed_words(words), strict=True)) if words else {}
        mixed = [taught[label].open if label in taught else texts[label] for label in labels]
        return self.compared(np.stack(mixed)), self.bundle.info.open

    def compared(self, words: NDArray[np.float32]) -> NDArray[np.float32]:
        """Vectors of words, float32 [C,D], as photos are compared with them: centred if the bundle says so."""
        return words if self._background is None else self._background.centred(words, self.bundle.info.text.centred)

    def embed_words(self, labels: Sequence[str]) -> NDArray[np.float32]:
        """Label vectors, float32 [C,D], unit length, by their words alone, whatever was trained or taught; cached.

        Each is the mean, in equal parts, of its prompts' embeddings and its descriptions', if the glossary has any.
        """
        found = self._cached(labels)
        if len(found) < len(set(labels)):
            with self._embedding:  # whose words are known does not wait for the many new ones of another
                found |= self._cached(labels)
                if missing := [label for label in dict.fromkeys(labels) if label not in found]:
                    found |= self._embed_text(missing)
        return np.stack([found[label] for label in labels])

    def _cached(self, labels: Sequence[str]) -> dict[str, NDArray[np.float32]]:
        with self._lock:
            found = {label: self._cache[label] for label in labels if label in self._cache}
            for label in found:
                self._cache.move_to_end(label)
        return found

    def _embed_text(self, labels: list[str]) -> dict[str, NDArray[np.float32]]:
        templates = self.bundle.info.text.templates
        sentences: list[str] = []
        owners: list[tuple[str, int, int]] = []
        for label in labels:
            named, described = prompts(label, templates)
            sentences += named + described
            owners.append((label, len(named), len(described)))
        vectors = np.concatenate(
            [self.runtime.encode_text(sentences[k : k + 256]) for k in range(0, len(sentences), 256)]
        )
        at, made = 0, dict[str, NDArray[np.float32]]()
        for label, named_count, described_count in owners:
            named_end = at + named_count
            vector = mean_direction(vectors[at:named_end])
            at = named_end + described_count
            if described_count:
                vector = mean_direction(np.stack([vector, mean_direction(vectors[named_end:at])]))
            made[label] = vector
        with self._lock:
            self._cache.update(made)
            while len(self._cache) > _CACHED_LABELS:
                self._cache.popitem(last=False)
        return made

    def teach(self, name: str, photos: Iterable[ImageLike | MediaError]) -> Lesson:
        """Learn an action from a few photos of it, in closed form; taught anew, in any capitals, the old are replaced.

        From then on the label works like a trained one, alone and in any list. One photo helps, 8 to 16 are good.
        Methods: ``_teaching.py``. Nothing is kept of the photos but two vectors. A MediaError is one refused before.

        Raises:
            UsageError: the name cannot be a label, or there are no photos.
            MediaError: none of the photos can be read.
            BundleError: the bundle has no background statistics.
        """
        (label,) = self._as_learnt(clean_labels([name]), self._taught)
        background = read_background(self.bundle)
        found = list(self.embed_images(photos))
        refused = tuple(one for one in found if isinstance(one, MediaError))
        seen = [one for one in found if not isinstance(one, MediaError)]
        if not found:
            raise UsageError(f"no photos to teach '{label}' from; give some, 8 or more are good")
        if not seen:
            raise MediaError(f"cannot teach '{label}': no photo can be read, the first because {refused[0]}")
        embeddings = np.stack(seen)
        recall, confused = self._leave_one_out(label, embeddings, background)
        one = self._learn(label, embeddings, background)
        with self._lock:
            self._taught = self._taught | {label: one}
        return Lesson(label, len(seen), refused, recall, confused)

    def forget(self, name: str) -> None:
        """Forget a taught action; a trained one of that name answers as it was trained again.

        Raises:
            UsageError: it was not taught.
        """
        (label,) = self._as_learnt([clean_label(name)], self._taught)
        with self._lock:
            if label not in self._taught:
                known = ", ".join(self._taught) or "none"
                raise UsageError(f"'{label}' was not taught; taught are: {known}")
            self._taught = {key: one for key, one in self._taught.items() if key != label}

    def save_taught(self, path: str | os.PathLike[str]) -> None:
        """Write the taught actions to one file, whole or not at all."""
        write_taught(Path(path), self.bundle, self._taught)

    def load_taught(self, path: str | os.PathLike[str], *, replace: bool = False) -> None:
        """Add the actions of a file that ``save_taught`` wrote, or let them take the place of all that was taught.

        Raises:
            BundleError: it cannot be read, or was taught to another bundle.
        """
        loaded = read_taught(Path(path), self.bundle)
        with self._lock:
            self._taught = loaded if replace else self._taught | loaded

    def _learn(self, label: str, embeddings: NDArray[np.float32], background: Background) -> Taught:
        mean, count = embeddings.mean(0)[None], np.array([len(embeddings)])
        text = self.embed_words([label])
        open_ = gda_vectors(mean, count, text, background)[0]
        if not self._known:
            return Taught(open_, open_, len(embeddings))
        trained = np.stack(list(self._known.values()))
        prior = self._known[label][None] if label in self._known else text
        return Taught(gda_vectors(mean, count, prior, background, like=trained)[0], open_, len(embeddings))

    def _leave_one_out(
        self, label: str, embeddings: NDArray[np.float32], background: Background
    ) -> tuple[float | None, tuple[Score, ...]]:
        taught = self._taught
        rivals = [other for other in dict.fromkeys((*self._known, *taught)) if other != label]
        count = len(embeddings)
        if count < 2 or not rivals:
            return None, ()
        best = embeddings @ self._look_up(rivals, taught)[0].T
        answers: list[str] = []
        for i, embedding in enumerate(embeddings):
            one = self._learn(label, np.delete(embeddings, i, 0), background)
            own = one.known if self._known else self.compared(one.open[None])[0]
            answers.append(label if embedding @ own > best[i].max() else rivals[int(best[i].argmax())])
        wrong = Counter(answer for answer in answers if answer != label)
        return answers.count(label) / count, tuple(Score(other, n / count) for other, n in wrong.most_common())

    def prepare(self, image: ImageLike) -> NDArray[np.uint8]:
        """Decode and bring to the model's input: uint8 [S,S,3]; MediaError if it cannot be read."""
        spec = self.bundle.info.image
        return to_square(decode_image(image, min_side=spec.size), spec.size, spec.max_aspect)

    def stream(
        self,
        images: Iterable[ImageLike],
        labels: Iterable[str] | None = None,
        *,
        top_k: int = 5,
        coverage: float = 0.9,
    ) -> Generator[Prediction | MediaError, None, None]:
        """Answers in the order of the images, an image that cannot be read yielding its MediaError.

        Images are drawn from the iterable only a few batches ahead, and decoded on threads while the model runs.

        Raises:
            UsageError: at the call, for bad labels, ``top_k`` or ``coverage``.
        """
        return self._run(images, self.choose(labels, top_k=top_k, coverage=coverage), top_k, coverage)

    def score(
        self,
        embeddings: NDArray[np.float32],
        labels: Iterable[str] | None = None,
        *,
        top_k: int = 5,
        coverage: float = 0.9,
    ) -> list[Prediction]:
        """Answers for photos that were embedded: float32 [N,D], unit length. No model is run, but for new words.

        Raises:
            UsageError: bad labels, ``top_k`` or ``coverage``.
        """
        chosen, vectors, calibration = self.choose(labels, top_k=top_k, coverage=coverage)
        return to_predictions(embeddings @ vectors.T, chosen, calibration, top_k, coverage)

    def choose(self, labels: Iterable[str] | None, *, top_k: int = 5, coverage: float = 0.9) -> _Choice:
        """Labels, their vectors float32 [C,D], and the calibration that holds for them, all of one moment.

        It is the bundle's ``known`` if all were trained or taught, else its ``open``.

        Raises:
            UsageError: bad labels, ``top_k`` or ``coverage``.
        """
        taught = self._taught
        chosen = tuple(dict.fromkeys((*self._known, *taught))) if labels is None else clean_labels(labels)
        if not chosen:
            raise UsageError(f"bundle '{self.bundle.info.name}' has no labels of its own; give some")
        if top_k < 1:
            raise UsageError(f"top-k {top_k} is below 1")
        if not 0 < coverage < 1:
            raise UsageError(f"coverage {coverage} is not between 0 and 1; 0.9 is usual")
        return chosen, *self._look_up(chosen, taught)

    def _run(
        self, images: Iterable[ImageLike], choice: _Choice, top_k: int, coverage: float
    ) -> Generator[Prediction | MediaError, None, None]:
        labels, vectors, calibration = choice
        for embeddings in self._batches(images):
            good = [embedding for embedding in embeddings if not isinstance(embedding, MediaError)]
            answers: Iterator[Prediction] = iter(())
            if good:
                answers = iter(to_predictions(np.stack(good) @ vectors.T, labels, calibration, top_k, coverage))
            for embedding in embeddings:
                yield embedding if isinstance(embedding, MediaError) else next(answers)

    def embed_images(self, images: Iterable[ImageLike | MediaError]) -> Iterator[NDArray[np.float32] | MediaError]:
        """Embeddings, float32 [D] of unit length, in order; an image that cannot be read yields its MediaError."""
        for batch in self._batches(images):
            yield from batch

    def _batches(self, images: Iterable[ImageLike | MediaError]) -> Iterator[list[NDArray[np.float32] | MediaError]]:
        def prepare(image: ImageLike | MediaError) -> NDArray[np.uint8] | MediaError:
            try:
                return image if isinstance(image, MediaError) else self.prepare(image)
            except MediaError as error:
                return error

        source = iter(given) if isinstance(given := several(images), Collection) else map(still, given)
        pool = ThreadPoolExecutor(cpu_quota(), thread_name_prefix="decode")
        try:
            pending: deque[Future[NDArray[np.uint8] | MediaError]] = deque(
                pool.submit(prepare, image) for image in islice(source, 2 * self.batch_size)
            )
            while pending:
                squares = [pending.popleft().result() for _ in range(min(self.batch_size, len(pending)))]
                pending.extend(pool.submit(prepare, image) for image in islice(source, len(squares)))
                good = [square for square in squares if not isinstance(square, MediaError)]
                vectors = iter(self.runtime.encode_images(np.stack(good)) if good else ())
                yield [square if isinstance(square, MediaError) else next(vectors) for square in squares]
        finally:
            # the garbage collector may bring us here from inside threading itself, where to join a thread is to hang
            pool.shutdown(wait=False, cancel_futures=True)

    @overload
    def predict(  # type: ignore[overload-overlap]  # str and bytes are collections too, but one photo here
        self, images: ImageLike, labels: Iterable[str] | None = None, *, top_k: int = 5, coverage: float = 0.9
    ) -> Prediction: ...

    @overload
    def predict(
        self,
        images: Collection[ImageLike],
        labels: Iterable[str] | None = None,
        *,
        top_k: int = 5,
        coverage: float = 0.9,
    ) -> list[Prediction]: ...

    @overload
    def predict(
        self, images: Iterator[ImageLike], labels: Iterable[str] | None = None, *, top_k: int = 5, coverage: float = 0.9
    ) -> Iterator[Prediction]: ...

    def predict(
        self,
        images: ImageLike | Collection[ImageLike] | Iterator[ImageLike],
        labels: Iterable[str] | None = None,
        *,
        top_k: int = 5,
        coverage: float = 0.9,
    ) -> Prediction | list[Prediction] | Iterator[Prediction]:
        """What the people in the photos are doing.

        Args:
            images: one photo (path, encoded bytes, PIL image or array), a list or column of them, or a generator.
            labels: any actions in plain words; None takes the bundle's own.
            top_k: how many labels ``top`` holds at most.
            coverage: how often the prediction set should hold the true label, between 0 and 1.

        Returns:
            One Prediction, a list of them, or an iterator that reads no further ahead than a few batches.

        Raises:
            MediaError: a photo cannot be read (``stream`` goes on instead).
            UsageError: bad labels, ``top_k`` or ``coverage``.
        """
        given: Iterable[ImageLike] = [images] if isinstance(images, np.ndarray) else several(images)
        answers = _raising(self.stream(given, labels, top_k=top_k, coverage=coverage))
        if given is not images:
            return next(answers)
        return list(answers) if isinstance(images, Collection) else answers


def _raising(answers: Generator[Prediction | MediaError, None, None]) -> Iterator[Prediction]:
    # the error's traceback holds this frame, which would keep the stream and its threads alive: so it is closed
    with closing(answers):
        for answer in answers:
            if isinstance(answer, MediaError):
                raise answer
            yield answer
