"""cliphar predict --ray: very many photos on a cluster. Each part is a Parquet file that is whole or absent."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from cliphar.cli._output import Writer, named_error, tell
from cliphar.errors import ClipharError, DataError, MediaError, UsageError, printable

__all__ = ["predict_on_ray"]

_PART = 1000


@dataclass(frozen=True)
class _Task:
    """What every worker must know. ``folder`` is the working directory, where relative paths begin."""

    folder: Path
    out: Path
    model: str
    runtime: str | None
    provider: str | None
    labels: tuple[str, ...] | None
    top_k: int
    coverage: float


class _Worker:
    """One process with a model of its own, kept for all the parts that it is given."""

    def __init__(self, task: _Task) -> None:
        from cliphar.recognizer import load

        os.chdir(task.folder)
        self._task = task
        self._recognizer = load(task.model, runtime=task.runtime, provider=task.provider, threads=1)

    def __call__(self, part: dict[str, Any]) -> dict[str, Any]:
        task, errors, done = self._task, [], 0
        names: list[str] = []

        def photos() -> Iterator[str | bytes]:
            for name, photo in _photos(json.loads(part["paths"])):
                names.append(name)
                yield photo

        answers = self._recognizer.stream(photos(), task.labels, top_k=task.top_k, coverage=task.coverage)
        writer = Writer(task.out / part["name"])
        try:
            for place, answer in enumerate(answers):
                if isinstance(answer, MediaError):
                    errors.append(named_error(printable(names[place]), answer))
                else:
                    writer.add(printable(names[place]), answer)
                    done += 1
            writer.write()  # whatever breaks it off: a part that is there is not done again
        except (DataError, OSError) as error:
            return {"done": 0, "errors": json.dumps([*errors, str(error)])}
        return {"done": done, "errors": json.dumps(errors)}


def _photos(paths: list[str]) -> Iterator[tuple[str, str | bytes]]:
    """Names and photos: files, and what shards (tar files) hold."""
    from cliphar.data import open_tar
    from cliphar.media import is_hidden, is_image_name

    for path in paths:
        if not path.endswith(".tar"):
            yield path, path
            continue
        with open_tar(Path(path)) as shard:
            for member in shard:
                wanted = is_image_name(member.name) and not is_hidden(member.name)
                content = shard.extractfile(member) if wanted else None
                if content is not None:
                    yield f"{path}/{member.name}", content.read()


def predict_on_ray(
    paths: list[str],
    out: Path,
    *,
    model: str | None,
    engine: tuple[str | None, str | None],
    labels: tuple[str, ...] | None,
    top_k: int,
    coverage: float,
) -> None:
    """Answer photos and tar shards on the cluster at RAY_ADDRESS, else on a Ray started here.

    ``out`` is a folder of Parquet files. A part that is there, by the same model and for the same question, is not
    done again, so a run that broke off goes on when it is called again. Files must be at the same place on every node.
    ``engine`` is the runtime and the provider; None leaves that to each worker.
    """
    try:
        import pyarrow  # noqa: F401
        import ray  # noqa: F401
    except ImportError as error:
        raise UsageError("predict --ray needs packages; run: pip install 'cliphar[ray]'") from error
    from cliphar.bundle import find_bundle

    bundle = find_bundle(model)
    task = _Task(Path.cwd(), out.absolute(), str(bundle.path.absolute()), *engine, labels, top_k, coverage)
    question = [bundle.info.model_dump(mode="json")["files"], labels, top_k, coverage]
    files = [path for path in paths if not path.endswith(".tar")]
    groups = [files[at : at + _PART] for at in range(0, len(files), _PART)]
    groups += [[path] for path in paths if path.endswith(".tar")]
    parts = []
    for group in groups:
        digest = hashlib.sha256(json.dumps([question, group]).encode()).hexdigest()
        parts.append({"name": f"part-{digest[:16]}.parquet", "paths": json.dumps(group)})
    out.mkdir(parents=True, exist_ok=True)
    missing = [part for part in parts if not (out / part["name"]).exists()]
    done, errors = _run(missing, task) if missing else (0, [])
    for line in errors:
        tell(line)
    if others := len({*out.glob("part-*.parquet")} - {out / part["name"] for part in parts}):
        tell(f"{out} also holds {others} parts of other photos, labels or models; move what is not to be read too")
    kept = f", {len(parts) - len(missing)} parts were there" if len(missing) < len(parts) else ""
    print(f"{done} photos answered in {len(missing)} parts in {out}{kept}")
    if errors:
        raise typer.Exit(1)


def _run(parts: list[dict[str, str]], task: _Task) -> tuple[int, list[str]]:
    import ray.data

    from cliphar.cli._output import progress

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    started = not ray.is_initialized()
    if started:
        ours = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
            signal.signal(signal.SIGTERM, ours)  # Ray's own prints a trace and ends with another status
        except ConnectionError as error:
            raise ClipharError(
                f"{error}; see that RAY_ADDRESS, RAY_AUTH_MODE and RAY_AUTH_TOKEN are its own"
            ) from error
    try:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        on_gpu = task.provider in ("cuda", "tensorrt")
        units = int(ray.cluster_resources().get("GPU" if on_gpu else "CPU", 1))  # type: ignore[no-untyped-call]
        answered = ray.data.from_items(parts, override_num_blocks=len(parts)).map(
            _Worker,  # type: ignore[arg-type]  # Ray makes one in each process and calls that
            fn_constructor_args=(task,),
            compute=ray.data.ActorPoolStrategy(size=max(1, min(units, len(parts)))),
            num_cpus=1,
            num_gpus=1 if on_gpu else None,
        )
        done, errors = 0, []
        with progress(len(parts), quiet=False) as advance:
            for row in answered.iter_rows():
                advance()
                done += row["done"]
                errors += json.loads(row["errors"])
        return done, errors
    finally:
        if started:
            ray.shutdown()
