"""Recipes of the methods: what to train from, on what, and how."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = [
    "FullRecipe",
    "GdaRecipe",
    "GradientRecipe",
    "HeadRecipe",
    "LoopRecipe",
    "LoraRecipe",
    "MethodRecipe",
    "ProbeRecipe",
    "Section",
    "SetRecipe",
    "TemporalRecipe",
    "WiseRecipe",
    "ZeroShotRecipe",
]


class Section(BaseModel):
    """Settings, frozen; unknown keys and numbers without end are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


Seed = Annotated[int, Field(ge=0, lt=2**63)]  # what NumPy's and torch's generators both take


class HeadRecipe(Section):
    """Class vectors: a linear probe that starts from the text and is pulled back to it."""

    steps: int = Field(default=600, ge=1)
    lr: float = Field(default=2e-3, gt=0, le=0.5)
    pull: float = Field(default=0.1, ge=0)
    mixup: float = Field(default=0.4, ge=0)
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    logit_scale: float = Field(default=30.0, gt=0)


class SetRecipe(Section):
    """The photos: ``source`` is any that ``cliphar data check`` takes.

    Where the source names parts (train, val, test), they hold. Else ``val`` and ``test`` are the fractions of every
    label kept for calibration and for the reported figures, near-duplicates together. ``shots`` is how many
    photos of each label are trained on; None takes all. ``seed`` draws parts and shots.
    """

    source: str
    val: float = Field(default=0.08, gt=0, lt=0.5)
    test: float = Field(default=0.08, gt=0, lt=0.5)
    shots: int | None = Field(default=None, ge=1)
    seed: Seed = 7
    cache: Path = Path("runs/cache")


class LoopRecipe(Section):
    """The training loop. A batch of ``batch_size`` is one step of the optimiser, taken in ``accumulate`` parts.

    ``lr`` None takes what is safe for the method and the model; above a bound it is warned of. ``size`` None trains
    at the model's own size in pixels. ``ema`` keeps a moving average of the weights, and it is what is validated and
    kept; 0 keeps none. ``patience`` stops after so many epochs without a better validation; 0 never. ``freeze`` holds
    patterns of parameter names, as ``image.backbone._blocks.[0-6].*``, that stay as they are. ``balanced`` draws every
    label equally often. ``mixup`` is the beta distribution's parameter, ``randaugment`` the number of operations a
    photo, of ``magnitude`` 0..10; ``min_area`` is the least share of a photo that a crop is drawn for: of another
    shape than the photo, it is then cut at the edges, so that at 1 something is cut off too. ``checkpointing`` computes
    activations again instead of keeping them. ``deterministic`` asks the same of a GPU. ``distributed`` says
    how several processes share the model, where torchrun or Ray starts them.
    """

    epochs: int = Field(default=3, ge=1)
    batch_size: int = Field(default=64, ge=2)
    accumulate: int = Field(default=1, ge=1)
    lr: float | None = Field(default=None, gt=0)
    weight_decay: float = Field(default=0.05, ge=0)
    warmup: float = Field(default=0.1, ge=0, lt=1)
    clip_norm: float = Field(default=1.0, gt=0)
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    ema: float = Field(default=0.99, ge=0, lt=1)
    patience: int = Field(default=0, ge=0)
    size: int | None = Field(default=None, ge=32)
    freeze: tuple[str, ...] = ()
    balanced: bool = False
    mixup: float = Field(default=0.0, ge=0)
    randaugment: int = Field(default=0, ge=0, le=4)
    magnitude: float = Field(default=5.0, ge=0, le=10)
    min_area: float = Field(default=0.5, gt=0, le=1)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    compile: bool = False
    checkpointing: bool = False
    checkpoint_minutes: float = Field(default=5.0, ge=0)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    deterministic: bool = False
    distributed: Literal["ddp", "fsdp"] = "ddp"

    @model_validator(mode="after")
    def _parts_are_even(self) -> LoopRecipe:
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of accumulate {self.accumulate}")
        return self


class MethodRecipe(Section):
    """What all methods share: ``base`` is the bundle to start from, by name or path, ``track`` who records the run."""

    method: str
    name: str = Field(max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    description: str = ""
    base: str = "mini"
    seed: Seed = 0
    output: Path
    data: SetRecipe
    track: tuple[Literal["mlflow", "wandb"], ...] = ()


class ZeroShotRecipe(MethodRecipe):
    """``method: zero-shot``: the labels' words only, calibrated on these photos."""

    method: Literal["zero-shot"]


class GdaSection(Section):
    """``text_photos``: how many photos the label's words count as."""

    text_photos: float = Field(default=4.0, ge=0)


class GdaRecipe(MethodRecipe):
    """``method: gda``: closed form, for a few photos of each label."""

    method: Literal["gda"]
    gda: GdaSection = GdaSection()


class ProbeRecipe(MethodRecipe):
    """``method: probe``: class vectors only; the towers stay as they are."""

    method: Literal["probe"]
    probe: HeadRecipe = HeadRecipe()


class GradientRecipe(MethodRecipe):
    """What the methods that train towers share.

    ``captions`` is a second source, of photos with captions, for the contrastive loss alone. ``contrastive`` and
    ``classes`` are the weights of the losses: photos against sentences, and photos against class vectors.
    """

    train: LoopRecipe = LoopRecipe()
    captions: str | None = None
    contrastive: float = Field(default=0.5, ge=0)
    classes: float = Field(default=1.0, ge=0)

    @model_validator(mode="after")
    def _has_a_loss(self) -> GradientRecipe:
        if not self.contrastive + self.classes:
            raise ValueError("contrastive and classes are both 0, which leaves no loss")
        return self


class LoraSection(Section):
    """``targets`` are patterns of the names of the adapted weights; none takes what the method's paper adapts."""

    rank: int = Field(default=2, ge=1)
    alpha: float = Field(default=1.0, gt=0)
    targets: tuple[str, ...] = ()


class LoraRecipe(GradientRecipe):
    """``method: lora``: low-rank changes of the towers' weights, merged into them at the end."""

    method: Literal["lora"]
    lora: LoraSection = LoraSection()


class WiseSection(Section):
    """``shares`` of the trained weights that are tried on the validation part; (1.0,) keeps them as trained."""

    shares: tuple[Annotated[float, Field(ge=0, le=1)], ...] = Field(default=(0.0, 0.25, 0.5, 0.75, 1.0), min_length=1)


class WiseRecipe(GradientRecipe):
    """All weights, then interpolation with those that training started from."""

    wise: WiseSection = WiseSection()


class FullRecipe(WiseRecipe):
    """``method: full``: photos."""

    method: Literal["full"]


class TemporalRecipe(WiseRecipe):
    """``method: temporal``: clips of ``frames`` frames, whose embeddings are averaged."""

    method: Literal["temporal"]
    frames: int = Field(default=8, ge=1, le=64)
