"""Top-1 against photos for each action: zero-shot, gda, probe, lora and full, on har15 with the embedded mini.

python benchmarks/training/few_shot.py ../shared/data/har15.tar OUT [TRAINED_SHOTS...]

Writes OUT/few-shot.md and OUT/few-shot.svg. The parts are those that a recipe draws. zero-shot, gda and probe are means
of three draws of photos (of one, where all are taken). lora and full, which take minutes, are one draw and only for
TRAINED_SHOTS (0 for all), at their default rates for at least 60 steps of 32 photos; the best epoch is chosen on as
many validation photos as the few that are trained on, at most 20 of each action.
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from cliphar.training import Surroundings, load_recipe
from cliphar.training._job import TEST, TRAIN, VAL, Job, open_job
from cliphar.training._methods import METHODS
from cliphar.training._package import package

SHOTS, DRAWS = (1, 2, 4, 8, 16), 3
CLOSED, TRAINED = ("zero-shot", "gda", "probe"), ("lora", "full")
STEPS, BATCH, MOST_VAL = 60, 32, 20


@dataclass(frozen=True)
class _Embedded(Job):
    """A job whose photos were embedded before, so that closed forms cost seconds."""

    whole: NDArray[np.float32] = None  # type: ignore[assignment]

    def features(self, part: int) -> NDArray[np.float32]:
        return self.whole[self.rows(part)]


def _recipe(method: str, source: Path, work: Path, photos: int = 1) -> Any:
    tree: dict[str, Any] = {"method": method, "name": "bench", "output": str(work / f"{method}-{photos}")}
    tree["data"] = {"source": str(source)}
    if method in TRAINED:
        tree["train"] = {"epochs": max(2, STEPS // max(1, photos // BATCH)), "batch_size": BATCH, "size": 128}
    if method == "full":
        tree["train"]["freeze"] = ["image.backbone._conv_stem.*", "image.backbone._bn0.*", "image.backbone._blocks.?.*"]
        tree["wise"] = {"shares": [0.5, 1.0]}
    (work / f"{method}.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    return load_recipe(work / f"{method}.yaml")


def _draw(job: _Embedded, shots: int | None, draw: int, val: int | None = None) -> _Embedded:
    """So many photos of each action to train on, and to validate with; None takes all."""
    part = job.part.copy()
    random = np.random.default_rng(draw)
    for kind, most in ((TRAIN, shots), (VAL, val)):
        for target in range(len(job.labels)) if most else ():
            mine = random.permutation(np.flatnonzero((part == kind) & (job.targets == target)))
            part[mine[most:]] = -1
    return replace(job, part=part)


def _top1(job: _Embedded, method: str) -> float:
    outcome = METHODS[method](job)
    if not outcome.files:
        hits = (job.features(TEST) @ outcome.vectors.T).argmax(1) == job.targets[job.rows(TEST)]
        return float(hits.mean())
    _, evaluation = package(job, outcome)
    return evaluation.analysis.report.top1


def measure(source: Path, trained_shots: list[int]) -> tuple[dict[str, dict[int, float]], dict[str, float]]:
    """Top-1 by method and shots (0 for all), and what stands beside it."""

    def log(line: str) -> None:
        print(time.strftime("%H:%M:%S"), line, file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        opened = open_job(_recipe("zero-shot", source, work), Surroundings(log=log))
        whole = np.zeros((len(opened.photos), opened.bundle.info.embedding_dim), np.float32)
        for part in (TRAIN, VAL, TEST) if trained_shots else (TRAIN, TEST):
            whole[opened.rows(part)] = opened.features(part)
        job = _Embedded(**vars(opened), whole=whole)
        found: dict[str, dict[int, float]] = {method: {} for method in (*CLOSED, *TRAINED)}
        for shots in (*SHOTS, 0):
            for method in CLOSED:
                chosen = replace(job, recipe=_recipe(method, source, work))
                draws = DRAWS if shots and method != "zero-shot" else 1
                scores = [_top1(_draw(chosen, shots or None, draw), method) for draw in range(draws)]
                found[method][shots] = float(np.mean(scores))
                log(f"{method} {shots or 'all'}: {found[method][shots]:.3f}")
            for method in TRAINED if shots in trained_shots else ():
                drawn = _draw(job, shots or None, 0, min(shots or MOST_VAL, MOST_VAL))
                chosen = replace(drawn, recipe=_recipe(method, source, work, len(drawn.rows(TRAIN))))
                began = time.monotonic()
                found[method][shots] = _top1(chosen, method)
                log(f"{method} {shots or 'all'}: {found[method][shots]:.3f} in {time.monotonic() - began:.0f} s")
        test = job.features(TEST) @ job.start_vectors().T
        shipped = float((test.argmax(1) == job.targets[job.rows(TEST)]).mean())
        return found, {"shipped": shipped, "test": len(job.rows(TEST)), "train": len(job.rows(TRAIN))}


def write(found: dict[str, dict[int, float]], beside: dict[str, float], out: Path) -> None:
    """The table and the plot."""
    from matplotlib import pyplot

    columns = [*SHOTS, 0]
    lines = [
        "| photos of each action | " + " | ".join(str(shots or "all") for shots in columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    found = {method: scores for method, scores in found.items() if scores}
    for method, scores in found.items():
        cells = [f"{scores[shots]:.3f}" if shots in scores else "" for shots in columns]
        lines.append(f"| `{method}` | " + " | ".join(cells) + " |")
    lines += ["", f"Top-1 on {beside['test']:.0f} test photos; all is {beside['train']:.0f} photos of 15 actions. "
              f"The class vectors that mini is shipped with reach {beside['shipped']:.3f}."]  # fmt: skip
    (out / "few-shot.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    pyplot.rcParams["svg.fonttype"] = "none"
    figure, axes = pyplot.subplots(figsize=(6, 3.8), layout="constrained")
    for method, scores in found.items():
        places = [columns.index(shots) for shots in scores]
        axes.plot(places, list(scores.values()), marker="o", label=method)
    axes.set_xticks(range(len(columns)), [str(shots or "all") for shots in columns])
    axes.set_xlabel("photos of each action")
    axes.set_ylabel("top-1")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=5, frameon=False)
    figure.savefig(out / "few-shot.svg", metadata={"Date": None})


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    target = Path(sys.argv[2])
    target.mkdir(parents=True, exist_ok=True)  # not after an hour of measuring
    write(*measure(Path(sys.argv[1]), [int(shots) for shots in sys.argv[3:]]), target)
    print((target / "few-shot.md").read_text(encoding="utf-8"))
