"""cliphar eval: how good a model is on a folder of labelled photos or clips, and whether it is better than another."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cliphar.cli._options import Coverage, Labels, LabelsFile, Model, Provider, Runtime, Threads, a_path, chosen_labels
from cliphar.cli._output import check_target, progress, tell, while_read
from cliphar.errors import DataError, MediaError, UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from cliphar.evaluation import Comparison, Evaluation, Mistake
    from cliphar.media import ImageLike
    from cliphar.recognizer import Prediction, Recognizer

__all__ = ["answer_all", "compare_with", "evaluate", "read_labelled"]

_FRAMES = 8  # of a clip, for a model that was trained on photos; what training takes too
_Listed = list[tuple[Path, str]]


def evaluate(
    data: Annotated[
        Path,
        typer.Option(
            "--data",
            "-d",
            parser=a_path,
            metavar="<path>",
            help="A folder of LABEL/PHOTO or LABEL/CLIP; _ in LABEL stands for a space.",
        ),
    ],
    model: Model = None,
    labels: Labels = None,
    labels_file: LabelsFile = None,
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Another model to compare with on the same photos.")
    ] = None,
    novel: Annotated[
        Path | None,
        typer.Option(
            parser=a_path,
            metavar="DIR",
            help="Also measure on this folder of labels that the model was not trained on.",
        ),
    ] = None,
    report: Annotated[
        list[Path] | None,
        typer.Option("--report", "-r", help="Also write a report, .html or .json, with plots and the worst mistakes."),
    ] = None,
    coverage: Coverage = 0.9,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    runtime: Runtime = None,
    provider: Provider = None,
    threads: Threads = None,
) -> None:
    """Measure a model on labelled photos or clips. Without --labels, it chooses among the folders' names."""
    from cliphar.evaluation import Evaluation, analyse, confident_mistakes, write_report
    from cliphar.evaluation import evaluate as figures_of
    from cliphar.recognizer import load

    for path in report or ():
        check_target(path, ".html", ".json")
    listed, chosen = read_labelled(data, chosen_labels(labels, labels_file))
    recognizer = load(model, runtime=runtime, provider=provider, threads=threads)
    other = None if against is None else load(against, provider=provider, threads=threads)
    new, new_labels = ([], ()) if novel is None else read_labelled(novel, None)
    learnt = {label.casefold() for label in recognizer.labels}  # as the recogniser compares them
    trained = [label for label in new_labels if label.casefold() in learnt]
    if trained:
        raise UsageError(f"{novel} has labels that the model was trained on: {', '.join(trained[:5])}; remove them")
    read, answers, rate = answer_all(recognizer, listed, chosen, coverage, data)
    paths, truth = [path for path, _ in read], [label for _, label in read]
    failed = len(listed) - len(read)
    comparison = novel_report = None
    if other is not None:
        comparison, lost = compare_with(other, read, answers, chosen, coverage, data)
        failed += lost
    if novel is not None:
        new_read, new_answers, _ = answer_all(recognizer, new, new_labels, coverage, novel)
        novel_report = figures_of(new_answers, [label for _, label in new_read])
        failed += len(new) - len(new_read)
    done = Evaluation(
        model=recognizer.bundle.info.name,
        data=str(data),
        analysis=analyse(answers, truth, chosen),
        images_per_s=rate,
        mistakes=[_seen(mistake) if report else mistake for mistake in confident_mistakes(paths, answers, truth)],
        comparison=comparison,
        novel=novel_report,
    )
    with while_read(go_on=bool(report)):
        if as_json:
            print(json.dumps(done.figures()))
        else:
            _show(done)
    for path in report or ():  # last: a full disk does not take the figures
        write_report(path, done)
    if failed:
        raise typer.Exit(1)


def read_labelled(data: Path, labels: tuple[str, ...] | None) -> tuple[_Listed, tuple[str, ...]]:
    """The photos and clips with their labels, and the labels to choose from."""
    from cliphar.data import doubtful_labels, list_labelled
    from cliphar.media import files_in, is_media

    listed = list_labelled(data)
    inside = [file for file in files_in(data) if is_media(file.name)]
    deeper = [file for file in inside if len(file.relative_to(data).parts) > 2]
    beside = [file for file in inside if file.parent == data]
    for where, left in (("deeper than LABEL/PHOTO", deeper), ("beside the label folders", beside)):
        if left:
            tell(f"{len(left)} files in {data} lie {where} and are left out, such as {left[0]}")
    chosen = labels or tuple(sorted({label for _, label in listed}))
    for doubt in () if labels else doubtful_labels(chosen):
        tell(doubt)
    stray = sorted({label for _, label in listed} - set(chosen))
    if stray:
        raise UsageError(f"{data} has folders that are not among the labels: {', '.join(stray[:5])}; add or move them")
    if len(chosen) < 2:
        raise UsageError(
            f"'{chosen[0]}' is the only label of {data}, and every answer would be right; "
            "add folders of other labels, or name more with eval's --labels"
        )
    return listed, chosen


def answer_all(
    recognizer: Recognizer, listed: _Listed, labels: Sequence[str], coverage: float, data: Path
) -> tuple[_Listed, list[Prediction], float]:
    """The photos and clips that could be read, their answers, and how many a second.

    A clip is answered as a whole, as training measures it: by the direction of its frames' mean.
    """
    import numpy as np

    from cliphar.data import embed_clips

    paths = [path for path, _ in listed]
    nothing = np.empty((0, recognizer.bundle.info.embedding_dim), np.float32)
    recognizer.score(nothing, labels, coverage=coverage)  # what cannot be asked is said before hours of work
    for _ in embed_clips(recognizer, _views(recognizer, paths[:1])):
        pass  # the first call pays for allocations that the rate should not
    read: _Listed = []
    embedded: list[NDArray[np.float32]] = []
    started = time.perf_counter()
    with progress(len(listed), quiet=False) as advance:
        for one, vector in zip(listed, embed_clips(recognizer, _views(recognizer, paths)), strict=True):
            advance()
            if isinstance(vector, MediaError):
                tell(str(vector))
            else:
                read.append(one)
                embedded.append(vector)
    if not read:
        raise DataError(f"none of the {len(listed)} photos in {data} could be read")
    answers = recognizer.score(np.stack(embedded), labels, coverage=coverage)
    return read, answers, len(answers) / (time.perf_counter() - started)


def compare_with(
    other: Recognizer, read: _Listed, answers: list[Prediction], labels: Sequence[str], coverage: float, data: Path
) -> tuple[Comparison, int]:
    """The answers to the photos and clips that were read beside another model's, and how many could not be read again.

    Those are left out: whatever went away in the hours between, the rest was answered by both.
    """
    from cliphar.evaluation import compare

    both, others, _ = answer_all(other, read, labels, coverage, data)
    there = set(both)
    ours = [answer for one, answer in zip(read, answers, strict=True) if one in there]
    found = compare(ours, others, [label for _, label in both], other.bundle.info.name)
    return found, len(read) - len(both)


def _views(recognizer: Recognizer, paths: Iterable[Path]) -> Iterator[Sequence[ImageLike] | MediaError]:
    """What the model looks at of each: a photo, or as many frames of a clip as it was trained on."""
    from cliphar.data import clip_frames
    from cliphar.media import is_clip_name

    info = recognizer.bundle.info
    recipe = info.provenance.recipe
    count = recipe["frames"] if recipe.get("method") == "temporal" else _FRAMES
    for path in paths:
        try:
            yield clip_frames(path, count, info.image.size)[0] if is_clip_name(path.name) else [path]
        except MediaError as error:
            yield error


def _seen(mistake: Mistake) -> Mistake:
    """The mistake with the picture that a report shows; of a clip, its middle frame."""
    from cliphar.data import clip_frames
    from cliphar.media import is_clip_name

    if not is_clip_name(mistake.path.name):
        return mistake
    with suppress(MediaError):  # it went away since it was measured
        return replace(mistake, image=clip_frames(mistake.path, 1)[0][0])
    return mistake


def _show(done: Evaluation) -> None:
    from rich.cells import cell_len

    figures = done.figures()
    intervals = figures.pop("ci95")
    novel, against = figures.pop("novel", {}), figures.pop("against", {})
    for key, value in figures.items():
        ends = intervals.get(key)
        print(f"{key:<12}  {value:<9}" + (f"  {ends[0]:.3f} to {ends[1]:.3f}" if ends else ""))
    width = max(5, *(cell_len(one.label) for one in done.analysis.classes))
    print(f"\n{'label':<{width}}  photos  precision  recall     f1")
    for one in sorted(done.analysis.classes, key=lambda one: one.f1):
        name = one.label + " " * (width - cell_len(one.label))
        print(f"{name}  {one.n:>6}  {one.precision:>9.3f}  {one.recall:>6.3f}  {one.f1:>5.3f}")
    if novel:
        print(
            f"\nnew labels: top1 {novel['top1']:.3f} on {novel['n']} photos, harmonic mean {novel['harmonic_mean']:.3f}"
        )
    if against:
        low, high = against["difference_ci95"]
        print(
            f"\nagainst {against['other']}: top1 {against['difference']:+.3f} ({low:+.3f} to {high:+.3f}); "
            f"{against['only_this']} photos right here only, {against['only_other']} there only, "
            f"p = {against['p_value']:.2g}"
        )
