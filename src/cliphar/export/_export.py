"""Add runtimes to a bundle: each is made, proved against the reference, and only then added."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from cliphar.bundle import Bundle, BundleInfo, FileInfo, alone, check_place, packaged, read_bundle, store, write_bundle
from cliphar.errors import BundleError, ClipharError, UsageError, naming
from cliphar.export._float import float_graph, without_room
from cliphar.export._photos import Proof, read_proof
from cliphar.export._targets import TARGETS, Files, Material
from cliphar.export._verify import RefusedError, embed, head_of, measure, refusal
from cliphar.runtime import OnnxRuntime, Runtime, images_per_s, load_runtime

__all__ = ["Added", "export_bundle"]


@dataclass(frozen=True)
class Added:
    """One target's outcome: its parity, or why it was not added."""

    target: str
    parity: dict[str, float]
    failed: str | None = None


def export_bundle(
    bundle: Bundle,
    targets: Sequence[str],
    *,
    out: Path | None = None,
    photos: Path | None = None,
    max_loss: float = 0.005,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[Bundle, list[Added]]:
    """Make, prove and add runtimes. The bundle's directory is at every moment the old bundle or the new one.

    Args:
        bundle: a bundle that was read.
        targets: names of ``TARGETS``.
        out: where the extended bundle goes, with what else export made of it there; None extends it in place, and
            one inside the package in the models' store.
        photos: a folder or tar of photos, see :func:`read_proof`.
        max_loss: how much top-1 accuracy, 0..1, a runtime may lose.
        say: told what is going on.

    Returns:
        The bundle as it now is, and the outcome of each target, in order.

    Raises:
        UsageError: an unknown target, or ``out`` exists and is not this bundle.
        BundleError: image.onnx cannot be brought back to float, or the place cannot be written to.
        DataError: too few photos.
    """
    if "onnx-bf16" in targets:
        raise UsageError(
            "ONNX Runtime has no bfloat16 arithmetic on CPUs; choose openvino-bf16, or onnx-fp16 for a GPU"
        )
    unknown = [target for target in targets if target not in TARGETS]
    if unknown or not targets:
        raise UsageError(f"cannot export to '{', '.join(unknown)}'; choose among {', '.join(TARGETS)}")
    home = out or (store() / bundle.info.name if bundle.path.parent == packaged("mini").parent else bundle.path)
    home = home.resolve() if home.is_symlink() else home  # the link stays, and what it names is extended
    if home.name in ("", ".."):  # said before the work
        raise UsageError(f"{home} cannot be replaced from inside; go out of it and give the folder's name")
    check_place(home)
    # a copy in the store may be damaged or of another version; a bundle in place is what was read, or has changed since
    replace = out is None and not (home.exists() and home.samefile(bundle.path))
    origin, bundle = bundle, _standing(bundle, home, replace=replace)
    proof = read_proof(origin, photos, say)
    if photos is None:
        say("proved on crops of the package's three photos: give --calibration DIR of your own for figures that count")
    elif proof.truth is None and bundle.info.labels:
        say(f"accuracy is not compared, --max-loss does nothing: {photos} has photos outside of the model's labels")
    model = float_graph(origin)
    outcomes: list[Added] = []
    with tempfile.TemporaryDirectory() as work, naming(Path(work)):
        bench = _Bench(origin, proof, model, Path(work), max_loss, say)
        for target in dict.fromkeys(targets):
            try:
                files, parity = bench.make(target)
            except ClipharError as error:
                outcomes.append(Added(target, getattr(error, "parity", {}), str(error)))
                continue
            home.parent.mkdir(parents=True, exist_ok=True)
            with alone(home.parent):
                bundle = _add(_standing(bundle, home, replace=replace), home, target, files, parity)
            outcomes.append(Added(target, parity))
    return bundle, outcomes


def _standing(bundle: Bundle, home: Path, *, replace: bool) -> Bundle:
    """The bundle at ``home`` if it is this one, maybe with more runtimes; ``bundle`` if it may be put there.

    Raises:
        UsageError: there is something else that must not be replaced.
    """
    if not home.exists() or (home.is_dir() and not any(home.iterdir())):
        return bundle
    try:
        there = read_bundle(home)
    except BundleError as error:
        if not replace:
            raise UsageError(f"{home} exists and is not a whole bundle; choose another place") from error
        return bundle
    if _origin(there.info) == _origin(bundle.info):
        return there
    if replace:
        return bundle
    raise UsageError(f"{home} holds another model, '{there.info.name}'; choose another place, or export that one")


def _origin(info: BundleInfo) -> dict[str, str]:
    return {name: file.sha256 for name, file in info.files.items() if file.runtime is None}


def _add(bundle: Bundle, home: Path, target: str, files: Files, parity: dict[str, float]) -> Bundle:
    entries = dict(bundle.info.files)
    content: dict[str, Path | bytes] = {
        name: bundle.path / name for name, file in entries.items() if file.runtime != target
    }
    content |= files
    for number, name in enumerate(files):
        entries[name] = FileInfo(sha256="0" * 64, bytes=0, runtime=target, parity=None if number else parity)
    return write_bundle(home, bundle.info.model_copy(update={"files": entries}), content, overwrite=True)


class _Bench:
    """The reference and its answers, and a folder where candidates are tried."""

    def __init__(
        self,
        bundle: Bundle,
        proof: Proof,
        model: onnx.ModelProto,
        work: Path,
        max_loss: float,
        say: Callable[[str], None],
    ) -> None:
        self.bundle, self.proof, self.work, self.max_loss, self.say = bundle, proof, work, max_loss, say
        for name in ("text.onnx", "tokenizer.json"):
            (work / name).symlink_to(bundle.file(name).resolve())
        shutil.copyfile(bundle.file("image.onnx"), work / "image.onnx")  # ONNX Runtime follows no link for weights
        self.head = head_of(bundle)
        self.shipped: Runtime = OnnxRuntime(bundle)
        reference = self._runtime("reference", {"reference.onnx": model.SerializeToString()})
        self.reference = embed(reference, proof.verification)
        self.rehearsal = embed(reference, proof.calibration)
        self.material = Material(bundle.file("image.onnx"), model, proof.calibration, self._judge, work, say)

    def _runtime(self, target: str, files: Files) -> Runtime:
        entries = {name: self.bundle.info.files[name] for name in ("text.onnx", "tokenizer.json")}
        for number, (name, content) in enumerate(files.items()):
            (self.work / name).parent.mkdir(exist_ok=True)
            (self.work / name).write_bytes(content)
            parity = None if number else {"photos": 0.0}
            digest = hashlib.sha256(content).hexdigest()
            entries[name] = FileInfo(sha256=digest, bytes=len(content), runtime=target, parity=parity)
        return load_runtime(Bundle(self.work, self.bundle.info.model_copy(update={"files": entries})), target)

    def _judge(self, model: onnx.ModelProto) -> str | None:
        """What is wrong with an 8-bit graph on the calibration photos, or None."""
        runtime = self._runtime("rehearsal", {"rehearsal.onnx": model.SerializeToString()})
        answers = embed(runtime, self.proof.calibration)
        return refusal(measure(self.rehearsal, answers, self.head, self.proof.rehearsal), "int8", self.max_loss)

    def make(self, target: str) -> tuple[Files, dict[str, float]]:
        """Files and parity of a target; RefusedError with the numbers if it is outside its tolerance."""
        self.say(f"{target}: making it")
        try:
            files = TARGETS[target].build(self.material)
        except (ClipharError, OSError):
            raise
        except Exception as error:  # each engine raises its own kinds
            raise ClipharError(f"{target} cannot be made: {without_room(error)}") from error
        runtime = self._runtime(target, files)
        answers = embed(runtime, self.proof.verification)
        parity = measure(self.reference, answers, self.head, self.proof.truth)
        wrong = refusal(parity, TARGETS[target].precision, self.max_loss)
        if not np.isfinite(answers).all():
            wrong = "it answers what is no number"
        if wrong:
            refused = RefusedError(
                f"{target} is refused: {wrong} over {len(answers)} views; give more photos with --calibration, "
                "or another precision"
            )
            refused.parity = parity
            raise refused
        speeds = images_per_s({"reference": self.shipped, "this": runtime}, self.proof.verification[:8])
        return files, parity | {"images_per_s": speeds["this"], "reference_images_per_s": speeds["reference"]}
