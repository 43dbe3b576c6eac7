"""cliphar data: what is in a data set, what is wrong with it, and how to divide it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cliphar.cli._options import a_path
from cliphar.cli._output import say, tell
from cliphar.errors import DataError, UsageError, one_line

if TYPE_CHECKING:
    from cliphar.data import PhotoSet, PhotoSource

__all__ = ["app"]

app = typer.Typer(help="Check, count and split a data set.", no_args_is_help=True, rich_markup_mode=None)

_Source = Annotated[
    str,
    typer.Argument(
        help="A folder, a tar or zip, WebDataset shards, a .csv/.jsonl/.parquet manifest, or hub:OWNER/NAME."
    ),
]
_Cache = Annotated[Path, typer.Option(parser=a_path, metavar="<path>", help="Where decoded photos are kept.")]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
_CACHE = Path("runs/cache")
_SHOWN = 5


def _read(source: str, cache: Path) -> tuple[PhotoSource, PhotoSet]:
    from cliphar.bundle import find_bundle
    from cliphar.data import load_photos, open_source

    opened, spec = open_source(source), find_bundle("mini", verify=False).info.image
    # as training from mini sees them: it counts the same near-duplicates, and need not decode them again
    try:
        photos = load_photos(
            opened,
            cache,
            side=spec.size,
            max_aspect=spec.max_aspect,
            frames=1,
            log=lambda line: say(one_line(line)),
        )
    except OSError as error:
        place, kept = Path(error.filename or cache).absolute(), cache.absolute()
        if not (place.is_relative_to(kept) or kept.is_relative_to(place)):  # of the source
            raise
        why = f"cannot keep decoded photos in {cache}: {error.strerror}"
        raise DataError(f"{why}; choose another folder with --cache") from error
    return opened, photos


@app.command()
def check(source: _Source, as_json: _Json = False, cache: _Cache = _CACHE) -> None:
    """Find unreadable files, near-duplicates and imbalance.

    Near-duplicates across parts or with different labels are counted too. The exit status is 1 if a file cannot be
    read.
    """
    from cliphar.data import check_photos

    _, photos = _read(source, cache)
    report = check_photos(photos)
    if as_json:
        print(json.dumps(report.to_dict(), ensure_ascii=False))
    else:
        print(f"{report.photos:,} photos can be read, {len(report.refused)} cannot")
        for key, reason in report.refused[:_SHOWN]:
            print(one_line(f"  {key}: {reason}"))
        extra = sum(map(len, report.duplicates)) - len(report.duplicates)
        where = "; --json names them" if extra else ""
        print(f"{len(report.duplicates)} groups of near-duplicates ({extra} photos too many){where}")
        for name, groups in (("in more than one part", report.across), ("with different labels", report.conflicts)):
            print(f"  {len(groups)} {name}")
            for keys in groups[:_SHOWN]:
                print(one_line(f"    {', '.join(keys[:4])}{', ...' if len(keys) > 4 else ''}"))
        if report.unlabelled:
            print(f"{report.unlabelled:,} photos have no label")
        for doubt in report.doubts:
            print(one_line(doubt))
        if report.photos > report.unlabelled:
            print(f"the commonest label has {report.imbalance:g} times the photos of the rarest")
        if report.rare:
            few = one_line(", ".join(report.rare))
            print(f"  few photos: {few}; 'train.balanced: true' draws all labels equally often")
    if report.refused:
        raise typer.Exit(1)


@app.command()
def stats(source: _Source, as_json: _Json = False, cache: _Cache = _CACHE) -> None:
    """Count photos by label and part."""
    from cliphar.data import photo_stats

    _, photos = _read(source, cache)
    found = photo_stats(photos)
    if as_json:
        print(json.dumps(found, ensure_ascii=False))
        return
    for key, value in found.items():
        if isinstance(value, dict):
            print(key)
            for name, count in value.items():
                print(one_line(f"  {name}  {count}"))
        else:
            print(f"{key}  {value}")


@app.command()
def split(
    source: _Source,
    out: Annotated[Path, typer.Option("--out", "-o", help="The new folder, with train/LABEL/PHOTO and so on.")],
    val: Annotated[float, typer.Option(help="Share of each label kept for calibration.")] = 0.08,
    test: Annotated[float, typer.Option(help="Share of each label kept for the reported figures.")] = 0.08,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the split; recipes use 7.")] = 7,
    cache: _Cache = _CACHE,
) -> None:
    """Copy labelled photos into train, val and test.

    Every label is split in the same shares, and near-duplicates stay on one side. Parts that the source itself names
    are kept. 'cliphar train' and 'cliphar eval' then use the parts as they are.
    """
    from cliphar.data import assign_parts, copy_parts

    if not (val > 0 and test > 0 and val + test < 1):
        raise UsageError(f"val {val:g} and test {test:g} must be above 0 and together below 1")
    if out.exists():
        raise UsageError(f"{out} exists; choose another folder")
    opened, photos = _read(source, cache)
    if not any(photos.labels):
        raise DataError(f"no photo in {source} has a label; there is nothing to split by")
    counts = copy_parts(opened, photos, assign_parts(photos, val, test, seed), out)
    print(f"{out}: " + ", ".join(f"{name} {count:,}" for name, count in counts.items()))
    if left := len(photos) - sum(counts.values()):
        tell(f"{left} photos have no label, or no part where others have one, and are left out")
    if lacking := [name for name, count in counts.items() if not count]:
        why = "there are too few, or too many are near-duplicates, which stay together"
        tell(f"{' and '.join(lacking)} got no photos: {why}; add more")
    if photos.refused:
        raise typer.Exit(1)
