"""The likeliest sequence of states, decided while it comes in."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["Viterbi"]


class Viterbi:
    """Viterbi's algorithm (1967) over states that all cost the same to enter, with decisions as early as they are sure.

    A state is decided once every path that could still win agrees on it, or, so that memory stays bounded, once
    ``max_lag`` later ones were seen (fixed-lag decoding); a path that has another state there is then given up, so that
    what is decided is one path: of two states that stay as likely, each would be decided whenever it is ahead.
    ``start``, float [S], is how likely each state is at first, in nats; None holds all for alike.
    """

    def __init__(self, states: int, max_lag: int, start: NDArray[np.float64] | None = None) -> None:
        self._scores = np.zeros(states) if start is None else start
        self._seen: list[tuple[NDArray[np.float64], float]] = []  # what is undecided: gains, and the cost before each
        self._back: list[NDArray[np.intp]] = []
        self._max_lag = max_lag

    @property
    def current(self) -> int:
        """The state that is likeliest now; it may still be revised."""
        return int(self._scores.argmax())

    def push(self, gain: NDArray[np.float64], cost: float) -> list[int]:
        """Take one observation: float [S] log-likelihoods and the cost of a change before it; newly decided states."""
        self._seen.append((gain, cost))
        self._advance(gain, cost)
        return self._decide()

    def _advance(self, gain: NDArray[np.float64], cost: float) -> None:
        best = int(self._scores.argmax())
        change = self._scores[best] - cost
        stay = self._scores >= change
        own = np.arange(len(self._scores))
        self._back.append(np.where(stay, own, best))
        self._scores = np.where(stay, self._scores, change) + gain
        self._scores -= self._scores.max()

    def flush(self) -> list[int]:
        """Decide all the rest; nothing may be pushed after."""
        return self._take(len(self._back), self.current) if self._back else []

    def _decide(self) -> list[int]:
        alive = np.arange(len(self._scores))
        # walk back until the paths meet; what lies before that is decided
        for at in range(len(self._back) - 1, 0, -1):
            alive = np.unique(self._back[at][alive])
            if len(alive) == 1:
                return self._take(at, int(alive[0]))
        if len(self._back) > self._max_lag:
            state = self.current
            for back in reversed(self._back[1:]):
                state = int(back[state])
            decided = self._take(1, state)
            self._scores, self._back = np.where(np.arange(len(self._scores)) == state, 0.0, -np.inf), []
            for gain, cost in self._seen:
                self._advance(gain, cost)
            return decided
        return []

    def _take(self, count: int, last: int) -> list[int]:
        """Decide the ``count`` oldest, of which the newest is in state ``last``."""
        path = [last]
        for back in reversed(self._back[1:count]):
            path.append(int(back[path[-1]]))
        del self._back[:count], self._seen[:count]
        return path[::-1]
