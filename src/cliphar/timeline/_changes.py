"""Frames that show what was seen already, and cuts: told from thumbnails of the brightness, before any model runs."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["Changes"]

_SAME = 8.0  # of 255: the cell that changed most may differ by so much (a cell is 1/1024 of the picture)
_CUT = 24.0  # of 255: the mean difference that is taken for a cut
_CHECK_S = 2.0  # an embedding is kept so long; then it is computed anew and the two are compared
_LONGEST_S = 16.0  # a check that finds no more than is allowed doubles that, up to here
_ALLOWED = 0.02  # 1 - cosine: a check that finds more halves what counts as the same, and the times begin anew


class Changes:
    """Says of each frame whether the last embedding still holds, and whether a new shot begins.

    A frame is compared with the one that was embedded last, so that slow changes add up and are not missed.
    """

    def __init__(self) -> None:
        self.worst: float | None = None
        self._same, self._check_s = _SAME, _CHECK_S
        self._kept: NDArray[np.int16] | None = None
        self._before: NDArray[np.int16] | None = None
        self._at_s = 0.0

    def look(self, luma: NDArray[np.uint8], time_s: float) -> tuple[bool, bool, bool]:
        """(embed it, only to check what would have been kept, a cut lies before it) for a frame's uint8 [h,w] luma."""
        now = luma.astype(np.int16)
        cut = self._before is not None and float(np.abs(now - self._before).mean()) > _CUT
        self._before = now
        same = self._kept is not None and not cut and float(np.abs(now - self._kept).max()) <= self._same
        check = same and time_s - self._at_s >= self._check_s
        if not same or check:
            self._kept, self._at_s = now, time_s
        return not same or check, check, cut

    def checked(self, old: NDArray[np.float32], new: NDArray[np.float32]) -> None:
        """Compare a kept embedding with a fresh one, float32 [D] of unit length each."""
        error = max(0.0, 1 - float(old @ new))
        self.worst = max(error, self.worst or 0.0)
        if error > _ALLOWED:
            self._same, self._check_s = max(1.0, self._same / 2), _CHECK_S
        else:
            self._check_s = min(2 * self._check_s, _LONGEST_S)
