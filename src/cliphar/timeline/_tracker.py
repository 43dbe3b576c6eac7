"""From the embeddings of frames to segments: pooling, scores, smoothing."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cliphar.bundle import Calibration
from cliphar.errors import UsageError
from cliphar.labels import UNKNOWN
from cliphar.recognizer import Prediction, Recognizer, mean_direction, to_predictions
from cliphar.timeline._types import Segment
from cliphar.timeline._viterbi import Viterbi

__all__ = ["LIVE_CHANGE", "Choice", "Tracker", "choose"]

# chosen on composed videos: docs/video.md
EVIDENCE = 0.5  # what a second of frames weighs, in photos: frames of a shot are much alike and err together
CHANGE = 6.0  # what a change of action costs within a shot, in nats
CHANGE_AT_CUT = 5.0  # and at a cut; most cuts show the same action from elsewhere
LIVE_CHANGE = 3.0  # of a camera, where one waits for the answer
PRESENT = 0.25  # of several actions at once: the share of the softmax at which one is as likely there as not
_FLOOR = 1e-3  # no single frame may rule a label out
_MAX_LAG_S = 20.0
_LONGEST_GAP_S = 60.0  # between frames of a camera; after a longer one what is done now is another story


@dataclass(frozen=True)
class Choice:
    """The labels asked for, their vectors float32 [C,D], how to score them, and the bundle's own way with video."""

    labels: tuple[str, ...]
    vectors: NDArray[np.float32]
    calibration: Calibration
    coverage: float
    multi_label: bool
    fps: float
    window_s: float


def choose(
    recognizer: Recognizer, labels: Iterable[str] | None, coverage: float, multi_label: bool, fps: float | None
) -> Choice:
    """Check what was asked for; UsageError if it cannot be done."""
    chosen, vectors, calibration = recognizer.choose(labels, coverage=coverage)
    spec = recognizer.bundle.info.video
    rate = spec.fps if fps is None else fps
    if not 0.01 <= rate <= 60:
        raise UsageError(f"{rate:g} frames a second cannot be looked at; give 0.01 to 60, {spec.fps:g} is usual")
    return Choice(chosen, vectors, calibration, coverage, multi_label, rate, spec.window_s)


class _Chain:
    """One Viterbi, and the runs of equal states that it has decided."""

    def __init__(self, states: int, max_lag: int, start: NDArray[np.float64] | None = None) -> None:
        self.viterbi = Viterbi(states, max_lag, start)
        self._waiting: deque[tuple[float, NDArray[np.float32]]] = deque()
        self._state: int | None = None
        self._start_s = 0.0
        self._sum: NDArray[np.float64] = np.zeros(0)
        self._count = 0

    def push(
        self, from_s: float, cosines: NDArray[np.float32], gain: NDArray[np.float64], cost: float
    ) -> list[tuple[int, float, float, NDArray[np.float32]]]:
        """Closed runs as (state, start, end, mean cosines); the observation counts from ``from_s`` on."""
        self._waiting.append((from_s, cosines))
        return self._close(self.viterbi.push(gain, cost))

    def flush(self, end_s: float) -> list[tuple[int, float, float, NDArray[np.float32]]]:
        """The runs that are left."""
        closed = self._close(self.viterbi.flush())
        if self._state is not None and end_s > self._start_s:
            closed.append((self._state, self._start_s, end_s, self._mean()))
        return closed

    def _mean(self) -> NDArray[np.float32]:
        mean: NDArray[np.float32] = (self._sum / self._count).astype(np.float32)
        return mean

    def _close(self, states: list[int]) -> list[tuple[int, float, float, NDArray[np.float32]]]:
        closed = []
        for state in states:
            from_s, cosines = self._waiting.popleft()
            if state != self._state:
                if self._state is not None:
                    closed.append((self._state, self._start_s, from_s, self._mean()))
                self._state, self._start_s, self._count = state, from_s, 0
                self._sum = np.zeros(len(cosines))
            self._sum += cosines
            self._count += 1
        return closed


class Tracker:
    """Takes embeddings in the order of time and gives segments as soon as they are decided.

    With one action at a time the states are the labels and ``unknown``, whose cosine is the bundle's threshold, so
    that a label wins only with evidence that a photo would need too. With several, each label is there or not, on its
    own. The evidence of a frame is its log probability times its share of time.

    Args:
        choice: what was asked for.
        change: what a change of action costs within a shot, in nats; at a cut it is never more than ``CHANGE_AT_CUT``.

    ``began_s`` is where it began, anew after a time that nobody saw.
    """

    def __init__(self, choice: Choice, change: float = CHANGE) -> None:
        self.choice = choice
        self._change = change
        self._lag = max(2, round(_MAX_LAG_S * choice.fps))
        self._chains = self._fresh_chains()
        self._pool: deque[tuple[float, NDArray[np.float32]]] = deque()
        self._last_s: float | None = None
        self.began_s = self._middle_s = 0.0
        self._recent: NDArray[np.float64] = np.zeros(len(choice.labels))

    def _fresh_chains(self) -> dict[int, _Chain]:
        return {} if self.choice.multi_label else {-1: _Chain(len(self.choice.labels) + 1, self._lag)}

    def push(self, time_s: float, embedding: NDArray[np.float32], cut: bool) -> list[Segment]:
        """Segments that this frame's embedding, float32 [D], decides."""
        step = 1 / self.choice.fps
        if self._last_s is None:
            self.began_s = time_s
            return self._push(time_s, embedding, cut, time_s, step)
        if time_s - self._last_s > max(_LONGEST_GAP_S, 2 * step):  # nobody was looking
            segments = self.flush(self._last_s + step)
            self._chains, self._last_s = self._fresh_chains(), None
            self._pool.clear()
            return segments + self.push(time_s, embedding, cut)
        # the change came somewhere between two frames: halfway is the best guess
        from_s = time_s - min((time_s - self._last_s) / 2, step)
        return self._push(time_s, embedding, cut, from_s, min(max(time_s - self._last_s, 0.0), 2 * step))

    def _push(
        self, time_s: float, embedding: NDArray[np.float32], cut: bool, from_s: float, passed: float
    ) -> list[Segment]:
        first, self._last_s = self._last_s is None, time_s
        cosines = self._pooled(time_s, embedding, cut) @ self.choice.vectors.T
        middle_s = (self._pool[0][0] + time_s) / 2 if self._pool else time_s
        if len(self._pool) > 1:  # the mean is of the window's middle, not of its end
            from_s = max((self._middle_s + middle_s) / 2, middle_s - 1 / self.choice.fps)
        self._middle_s = middle_s
        before = None if self.choice.multi_label else self.current
        chances = _chances(cosines, self.choice.calibration)
        weight = EVIDENCE * passed
        cost = min(CHANGE_AT_CUT, self._change) if cut else self._change
        if not self.choice.multi_label:
            closed = self._chains[-1].push(from_s, cosines, weight * np.log(np.maximum(chances, _FLOOR)), cost)
            self._remember(cosines, passed, fresh=first or cut or before != self.current)
            return [self._segment(*run) for run in closed]
        segments = []
        for label, chance in enumerate(chances[:-1]):
            if label not in self._chains and chance > PRESENT:
                self._chains[label] = _Chain(2, self._lag, np.array([0.0, 0.0 if first else -cost]))
            if label in self._chains:
                odds = _log_odds(chance) - _log_odds(PRESENT)
                gain = np.array([-0.5, 0.5]) * weight * odds
                segments += self._present(label, self._chains[label].push(from_s, cosines, gain, cost))
        return segments

    def flush(self, end_s: float) -> list[Segment]:
        """The last segments; nothing may be pushed after."""
        if not self.choice.multi_label:
            return [self._segment(*run) for run in self._chains[-1].flush(end_s)]
        return [
            segment for label, chain in self._chains.items() for segment in self._present(label, chain.flush(end_s))
        ]

    @property
    def current(self) -> int:
        """The likeliest state now: a label's number, or the number of labels for ``unknown``."""
        return self._chains[-1].viterbi.current

    def now(self) -> Prediction:
        """What is done now, scored over the last second or so of it."""
        return self._answer(self.current, self._recent.astype(np.float32))

    def _remember(self, cosines: NDArray[np.float32], passed: float, fresh: bool) -> None:
        share = 1.0 if fresh else 1 - np.exp(-passed)
        self._recent = cosines * share + self._recent * (1 - share)

    def _pooled(self, time_s: float, embedding: NDArray[np.float32], cut: bool) -> NDArray[np.float32]:
        """The direction of the mean over the bundle's window, as it was trained (ViFi-CLIP; Rasheed et al., 2023)."""
        if not self.choice.window_s:
            return embedding
        if cut:
            self._pool.clear()
        self._pool.append((time_s, embedding))
        while self._pool[0][0] <= time_s - self.choice.window_s:
            self._pool.popleft()
        return mean_direction(np.stack([vector for _, vector in self._pool]))

    def _segment(self, state: int, start_s: float, end_s: float, cosines: NDArray[np.float32]) -> Segment:
        answer = self._answer(state, cosines)
        return Segment(start_s, end_s, answer.label, answer.score, answer.set)

    def _answer(self, state: int, cosines: NDArray[np.float32]) -> Prediction:
        choice = self.choice
        (answer,) = to_predictions(
            cosines[None], choice.labels, choice.calibration, len(choice.labels), choice.coverage
        )
        if state == len(choice.labels):
            return replace(answer, label=UNKNOWN)
        label = choice.labels[state]
        # smoothing may prefer a label to the one that is best on average: it belongs to the set all the same
        members = answer.set if label in answer.set else (*answer.set, label)
        return replace(answer, label=label, score=dict(answer.top)[label], set=members)

    def _present(self, label: int, runs: list[tuple[int, float, float, NDArray[np.float32]]]) -> list[Segment]:
        return [self._segment(label, start_s, end_s, cosines) for on, start_s, end_s, cosines in runs if on]


def _chances(cosines: NDArray[np.float32], calibration: Calibration) -> NDArray[np.float64]:
    """Softmax over the labels and ``unknown``, float64 [C+1]."""
    logits = np.append(cosines.astype(np.float64), calibration.unknown_below) * calibration.logit_scale
    shares = np.exp(logits - logits.max())
    result: NDArray[np.float64] = shares / shares.sum()
    return result


def _log_odds(share: float) -> float:
    share = min(max(share, _FLOOR), 1 - _FLOOR)
    return float(np.log(share / (1 - share)))
