"""cliphar video on a camera: a line whenever what is done changes."""

from __future__ import annotations

import json
import sys
from datetime import datetime

from cliphar.cli._output import tell
from cliphar.errors import one_line
from cliphar.labels import with_score
from cliphar.media import Camera
from cliphar.recognizer import Recognizer
from cliphar.timeline import Live, LiveAnswer, Segment

__all__ = ["watch"]


def watch(
    recognizer: Recognizer,
    address: str,
    labels: tuple[str, ...] | None,
    coverage: float,
    fps: float | None,
    as_json: bool,
) -> None:
    """Answer until Ctrl-C; MediaError if the camera cannot be reached at first."""
    live = Live(recognizer, labels, coverage=coverage, fps=fps)
    closed: list[Segment] = []
    shown: str | None = None
    answer: LiveAnswer | None = None
    with Camera(address, tell) as camera:
        name = one_line(camera.name)
        try:
            for time_s, frame in camera.frames(live.fps):
                answer = live.push(frame.image(min_side=recognizer.bundle.info.image.size), time_s)
                closed += answer.closed
                if answer.prediction.label != shown:
                    shown = answer.prediction.label
                    _show(name, answer, closed, as_json)
                    closed = []
        except KeyboardInterrupt:
            closed += live.close()
            if as_json and answer is not None:  # what was not said of the past yet
                _show(name, answer, closed, as_json)


def _show(name: str, answer: LiveAnswer, closed: list[Segment], as_json: bool) -> None:
    now, said = datetime.now().astimezone(), answer.prediction
    if as_json:
        row = {"path": name, "at": now.isoformat(timespec="milliseconds")} | answer.to_dict()
        print(json.dumps(row | {"closed": [one.to_dict() for one in closed]}, ensure_ascii=False), flush=True)
    elif sys.stdout.isatty():
        print(f"{now:%H:%M:%S}  {with_score(said.label, said.score)}", flush=True)
    else:
        print(f"{name}\t{now.isoformat(timespec='milliseconds')}\t{said.label}\t{said.score:.4f}", flush=True)
