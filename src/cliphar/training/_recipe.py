"""Recipes: one YAML file, typed and frozen; unknown keys are refused with the nearest known one."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import yaml
from pydantic import Field, PositiveInt, ValidationError, model_validator

from cliphar.errors import UsageError
from cliphar.training._method_recipe import (
    FullRecipe,
    GdaRecipe,
    HeadRecipe,
    LoraRecipe,
    MethodRecipe,
    ProbeRecipe,
    Section,
    Seed,
    TemporalRecipe,
    ZeroShotRecipe,
)

__all__ = [
    "AdaptRecipe",
    "DataRecipe",
    "DistillRecipe",
    "MiniRecipe",
    "Recipe",
    "SpaceRecipe",
    "TextRecipe",
    "load_recipe",
]


class DataRecipe(Section):
    """Where the photos are.

    Of each action, ``val`` and ``test`` are the fractions kept for calibration and for the reported figures.
    ``held_out_sports`` sports, drawn by ``seed``, are kept out whole: half of their photos calibrate words never
    trained on, the other half are reported on. ``captioned_val`` captioned photos are kept for retrieval.
    """

    root: Path
    actions: str = "har15.tar"
    sports: str = "sports70.tar"
    captioned: str = "people-captions.tar"
    val: float = Field(default=0.08, gt=0, lt=0.5)
    test: float = Field(default=0.08, gt=0, lt=0.5)
    held_out_sports: int = Field(default=30, ge=2)
    captioned_val: int = Field(default=500, ge=10)
    seed: Seed = 7
    cache: Path = Path("runs/cache")


class TeacherRecipe(Section):
    """The real CLIP image tower: an ONNX file, found as 'cliphar model pull' finds it, and its view of a photo."""

    weights: Path | None = None
    max_aspect: float = Field(default=1.25, ge=1)


class TextRecipe(Section):
    """The text tower: the sentence encoder's source and size, and how its projection learns CLIP's space.

    ``average`` projections of ``hidden`` units, from different seeds, are merged into one.
    """

    encoder: Path | None = None
    vocabulary: int = Field(default=8000, ge=1000)
    block: int = Field(default=64, ge=16)
    context_length: int = Field(default=32, ge=8, le=64)
    hidden: int = Field(default=512, ge=64)
    dropout: float = Field(default=0.4, ge=0, lt=1)
    steps: int = Field(default=500, ge=1)
    batch_size: int = Field(default=1024, ge=8)
    lr: float = Field(default=1e-3, gt=0, le=1e-2)
    weight_decay: float = Field(default=0.05, ge=0)
    noise: float = Field(default=0.3, ge=0)
    label_weight: float = Field(default=0.5, ge=0)
    average: int = Field(default=3, ge=1)


class AdaptRecipe(Section):
    """How the last ``layers`` of the real CLIP tower are scaled and shifted for the known actions.

    ``others`` is the share of a batch that are photos without a known action; ``keep`` is the weight of each
    embedding's distance from what it was; every other batch is mixed.
    """

    layers: int = Field(default=4, ge=1, le=11)
    epochs: int = Field(default=4, ge=1)
    batch_size: int = Field(default=64, ge=8)
    others: float = Field(default=0.25, ge=0, lt=1)
    lr: float = Field(default=1e-3, gt=0, le=1e-2)
    warmup_steps: int = Field(default=50, ge=1)
    ema: float = Field(default=0.98, ge=0, lt=1)
    mixup: float = Field(default=0.3, ge=0)
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    logit_scale: float = Field(default=40.0, gt=0)
    keep: float = Field(default=3.0, ge=0)


_Cycle = Annotated[tuple[tuple[PositiveInt, PositiveInt], ...], Field(min_length=1)]


class DistillRecipe(Section):
    """mini's image tower.

    ``cycles`` are pairs of pixels and epochs. In each the learning rate rises and falls once; the next one starts from
    the mean of the towers at the ends of those before, and the mean of all is the finished tower. It takes photos of
    ``size`` pixels, a little more than it was trained on (Touvron et al., "Fixing the train-test resolution
    discrepancy", 2019). ``cutmix`` is the share of batches in which a part of each view is of another photo; the others
    have ``mixup``. The weights are of the four losses; ``soft`` is the share of a label that is what the teacher takes
    the photo for.
    """

    backbone: Literal["lite0", "lite1", "lite2"] = "lite1"
    weights: Path | None = None
    frozen_blocks: int = Field(default=7, ge=0)
    drop_path: float = Field(default=0.1, ge=0, lt=1)
    size: int = Field(default=240, ge=64)
    cycles: Annotated[tuple[_Cycle, ...], Field(min_length=1)] = (
        ((128, 8), (160, 7), (192, 3)),
        ((192, 4), (224, 12)),
        ((224, 12),),
    )
    batch_size: int = Field(default=64, ge=2)
    replicas: int = Field(default=2, ge=1)
    lr: float = Field(default=6e-4, gt=0, le=5e-3)
    weight_decay: float = Field(default=0.05, ge=0)
    warmup_steps: int = Field(default=200, ge=1)
    ema: float = Field(default=0.998, ge=0, lt=1)
    mixup: float = Field(default=0.4, ge=0)
    cutmix: float = Field(default=0.5, ge=0, le=1)
    min_area: float = Field(default=0.3, gt=0, le=1)
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    logit_scale: float = Field(default=30.0, gt=0)
    feature_weight: float = Field(default=3.0, ge=0)
    place_weight: float = Field(default=4.0, ge=0)
    rank_weight: float = Field(default=1.0, ge=0)
    label_weight: float = Field(default=1.0, ge=0)
    soft: float = Field(default=0.5, ge=0, le=1)

    @model_validator(mode="after")
    def _shares_are_even(self) -> DistillRecipe:
        if self.batch_size % self.replicas:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of replicas {self.replicas}")
        return self


class _TowerRecipe(Section):
    kind: str  # first, as a checkpoint's identity depends on the order
    name: str
    description: str
    seed: Seed = 0
    output: Path
    data: DataRecipe
    teacher: TeacherRecipe = TeacherRecipe()
    head: HeadRecipe = HeadRecipe()


class SpaceRecipe(_TowerRecipe):
    """``kind: space``: a text tower for the real CLIP image tower, whose last layers are tuned, and class vectors."""

    kind: Literal["space"]
    text: TextRecipe = TextRecipe()
    adapt: AdaptRecipe = AdaptRecipe()


class MiniRecipe(_TowerRecipe):
    """``kind: mini``: a small image tower taught by the teacher, in the space of ``space`` (a bundle's path)."""

    kind: Literal["mini"]
    space: Path
    distill: DistillRecipe = DistillRecipe()


Recipe: TypeAlias = SpaceRecipe | MiniRecipe | MethodRecipe
_KINDS: dict[str, type[Recipe]] = {"space": SpaceRecipe, "mini": MiniRecipe}
_METHODS: dict[str, type[Recipe]] = {
    "zero-shot": ZeroShotRecipe,
    "gda": GdaRecipe,
    "probe": ProbeRecipe,
    "lora": LoraRecipe,
    "full": FullRecipe,
    "temporal": TemporalRecipe,
}


def _set(tree: dict[str, Any], assignment: str) -> None:
    key, equals, value = assignment.partition("=")
    if not equals or not key:
        raise UsageError(f"cannot read {assignment!r}; write key=value, as in data.source=photos")
    *parents, last = key.split(".")
    for parent in parents:
        below = tree.setdefault(parent, {})
        if not isinstance(below, dict):
            raise UsageError(f"{assignment!r}: {parent} is not a section")
        tree = below
    if value.startswith("~"):  # no shell replaces it behind the equals sign
        value = os.path.expanduser(value)  # noqa: PTH111 - leaves a ~user that is not known
    if value not in ("", "null") and value[0] not in "[{'\"":
        tree[last] = value  # as it is: YAML would cut 'photos #1', and 2024 is a name
        return
    try:
        tree[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UsageError(f"{assignment!r} is not YAML; quote the value") from error


def _known_keys(model: type[Section]) -> list[str]:
    keys = [*model.model_fields]
    for field in model.model_fields.values():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            keys += _known_keys(field.annotation)
    return keys


def _schema(tree: dict[str, Any], path: Path) -> type[Recipe]:
    key, known = ("kind", _KINDS) if "kind" in tree else ("method", _METHODS)
    chosen = str(tree.get(key) or "")
    if chosen in known:
        return known[chosen]
    close = difflib.get_close_matches(chosen, known, 1)
    hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
    what = f"unknown {key} {chosen}" if chosen else "it says no method"
    raise UsageError(f"recipe {path}: {what}; {hint}")


class _Loader(yaml.SafeLoader):
    """SafeLoader keeps the last of a key's values, and so drops a section that is written twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set[str]()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.YAMLError(f"{key.value} is written twice, again in line {key.start_mark.line + 1}")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def load_recipe(path: Path, overrides: tuple[str, ...] = ()) -> Recipe:
    """Read a recipe; apply ``key=value`` overrides: dots reach into sections, brackets and quotes are YAML.

    Raises:
        UsageError: unreadable, an unknown key, or a value out of its range; the message names the key.
    """
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506 - a SafeLoader
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"cannot read recipe {path}: {reason}") from error
    if not isinstance(tree, dict):
        raise UsageError(f"recipe {path} is not a mapping of settings")
    for assignment in overrides:
        _set(tree, assignment)
    schema = _schema(tree, path)
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or str(path)
        if first["type"] == "extra_forbidden":
            close = difflib.get_close_matches(str(first["loc"][-1]), _known_keys(schema), 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise UsageError(f"recipe {path}: unknown key {where}{hint}") from error
        raise UsageError(f"recipe {path}: {where}: {first['msg']}") from error
