"""Timelines: how they are smoothed, and their metrics, on small ones worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from cliphar.evaluation import Span, segment_f1, temporal_map
from cliphar.recognizer import Recognizer
from cliphar.timeline import Segment
from cliphar.timeline._changes import Changes
from cliphar.timeline._tracker import Tracker, choose
from cliphar.timeline._viterbi import Viterbi


def said(start_s: float, end_s: float, label: str, score: float = 0.9) -> Segment:
    return Segment(start_s, end_s, label, score, (label,))


def test_f1_counts_segments_that_overlap_enough() -> None:
    truth = [[Span(0, 4, "running"), Span(4, 8, "eating")]]
    found = [[said(0, 3, "running"), said(3, 4, "sitting"), said(6, 8, "eating")]]
    # running overlaps by 3/4, eating by 2/4; sitting is wrong
    f1 = segment_f1(truth, found, (0.25, 0.5, 0.75, 0.8))
    assert f1 == pytest.approx({0.25: 4 / 5, 0.5: 4 / 5, 0.75: 2 / 5, 0.8: 0.0})
    assert segment_f1(truth, [[said(0, 4, "eating"), said(4, 8, "running")]]) == {0.1: 0, 0.25: 0, 0.5: 0}


def test_a_true_segment_is_found_once_however_often_it_is_said() -> None:
    truth = [[Span(0, 10, "running")]]
    assert segment_f1(truth, [[said(0, 4, "running"), said(4, 10, "running")]], (0.1,)) == {0.1: pytest.approx(2 / 3)}
    # in the order of time the first reaches 0.1 and takes it; in that of scores the better one does
    assert temporal_map(truth, [[said(0, 4, "running", 0.6), said(4, 10, "running", 0.8)]], (0.5,)) == {0.5: 1.0}
    truth = [[Span(0, 10, "running"), Span(20, 30, "running")]]
    assert temporal_map(truth, [[said(0, 9, "running"), said(0, 10, "running", 0.8)]], (0.9,)) == {0.9: 0.5}
    truth = [[Span(0, 5, "running"), Span(5, 10, "running")]]  # whoever comes later takes the free one
    assert temporal_map(truth, [[said(0, 10, "running"), said(0, 10, "running", 0.8)]], (0.5,)) == {0.5: 1.0}


def test_unknown_is_background() -> None:
    truth = [[Span(0, 4, "unknown"), Span(4, 8, "eating")]]
    assert segment_f1(truth, [[said(4, 8, "eating")]], (0.5,)) == {0.5: 1.0}
    assert segment_f1(truth, [[said(0, 4, "unknown"), said(4, 8, "eating")]], (0.5,)) == {0.5: 1.0}
    assert segment_f1(truth, [[said(0, 4, "running"), said(4, 8, "eating")]], (0.5,)) == {0.5: pytest.approx(2 / 3)}


def test_average_precision_follows_the_scores_over_all_videos() -> None:
    truth = [[Span(0, 4, "running")], [Span(0, 4, "running"), Span(5, 9, "eating")]]
    found = [
        [said(0, 4, "running", 0.5)],
        [said(0, 4, "running", 0.9), said(4, 5, "running", 0.7), said(5, 9, "eating", 0.2)],
    ]
    # running: right, wrong, right: 1/2 at precision 1, 1/2 at precision 2/3; eating: 1
    assert temporal_map(truth, found, (0.5,)) == {0.5: pytest.approx((5 / 6 + 1) / 2)}
    # wrong, right, right: the precision at full recall, 2/3, holds at each lower one; eating is missed
    found = [[said(4, 5, "running"), said(0, 4, "running", 0.8)], [said(0, 4, "running", 0.7)]]
    assert temporal_map(truth, found) == pytest.approx(dict.fromkeys((0.3, 0.4, 0.5, 0.6, 0.7), 1 / 3))


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ValueError):
        segment_f1([[]], [[], []])
    with pytest.raises(ValueError, match="2 timelines for 1 videos"):
        temporal_map([[]], [[], []])
    with pytest.raises(ValueError, match="no action"):
        temporal_map([[Span(0, 1, "unknown")]], [[]])
    assert segment_f1([[]], [[]], (0.5,)) == {0.5: 1.0}


def test_a_flicker_is_smoothed_away() -> None:
    viterbi = Viterbi(2, max_lag=100)
    right, wrong = np.log([0.8, 0.2]), np.log([0.3, 0.7])
    decided = [state for gain in [right] * 5 + [wrong] + [right] * 5 for state in viterbi.push(gain, 3.0)]
    assert decided + viterbi.flush() == [0] * 11


def test_a_decision_is_never_put_off_for_ever() -> None:
    viterbi = Viterbi(3, max_lag=10)
    undecided = np.zeros(3)
    assert sum(len(viterbi.push(undecided, 1.0)) for _ in range(100)) >= 90


def test_two_actions_as_likely_as_each_other_do_not_take_turns() -> None:
    viterbi, draw = Viterbi(2, max_lag=80), np.random.default_rng(0)
    gains = 0.125 * np.log(draw.dirichlet([2, 2], 2400))  # ten minutes, four frames a second
    decided = [state for gain in gains for state in viterbi.push(gain, 6.0)] + viterbi.flush()
    assert len(decided) == 2400
    assert np.diff(np.flatnonzero(np.diff(decided)), prepend=0, append=2400).min() > 12  # 3 s


def test_of_several_actions_one_that_flickers_is_none_at_its_first_time_either(fake: Recognizer) -> None:
    tracker = Tracker(choose(fake, None, 0.9, True, None))
    red, green = np.eye(3, dtype=np.float32)[:2]
    segments = [segment for k in range(40) for segment in tracker.push(k / 4, green if k == 20 else red, False)]
    segments += tracker.push(10, green, False) + tracker.flush(10.25)
    assert {segment.label for segment in segments} == {"red"}


def test_a_frame_is_computed_if_it_shows_something_else_and_checked_more_and_more_seldom() -> None:
    def grey(level: int, spot: int = 0) -> NDArray[np.uint8]:
        luma = np.full((32, 32), level, np.uint8)
        luma[3, 5] += spot
        return luma

    keep, compute, check, cut = (False, False, False), (True, False, False), (True, True, False), (True, False, True)
    changes, same = Changes(), np.eye(2, dtype=np.float32)
    assert changes.look(grey(100), 0) == compute
    assert [changes.look(grey(level), 1) for level in (108, 109, 103, 100)] == [keep, compute, keep, compute]
    assert changes.look(grey(100, 9), 1) == compute  # one cell is enough
    assert [changes.look(grey(level), 1) for level in (200, 250, 250, 220)] == [cut, cut, keep, cut]
    asked = []
    for k in range(2, 60):
        if changes.look(grey(220), k) == check:
            changes.checked(same[0], same[0])
            asked.append(k)
    assert asked == [3, 7, 15, 31, 47]  # 2, 4, 8, 16 and 16 s after the last
    assert changes.worst == 0
    changes.checked(same[0], same[1])
    assert changes.look(grey(220), 48) == keep
    assert changes.look(grey(220), 49) == check
    assert [changes.look(grey(level), 50) for level in (224, 225)] == [keep, compute]  # half as much is allowed
    changes.checked(same[0], same[0])
    assert changes.worst == 1
