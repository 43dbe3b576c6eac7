"""The methods of training, by the name that a recipe gives."""

from __future__ import annotations

from collections.abc import Callable

from cliphar.training._gradient import train_towers
from cliphar.training._job import Job, Outcome
from cliphar.training._method_recipe import WiseRecipe
from cliphar.training._methods._gda import gda
from cliphar.training._methods._lora import lora
from cliphar.training._methods._probe import probe

__all__ = ["METHODS"]


def _zero_shot(job: Job) -> Outcome:
    """Labels by their words alone: an ensemble of prompts and descriptions.

    Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021
    (https://arxiv.org/abs/2103.00020), section 3.1.4. Nothing is trained; the bundle is calibrated on the photos.
    """
    return Outcome(job.base.compared(job.text_vectors()))


def _full(job: Job) -> Outcome:
    """All weights, by labels and the contrastive loss of pre-training, then mixed with those that they started from.

    Goyal et al., "Finetune like you pretrain", CVPR 2023 (https://arxiv.org/abs/2212.00638): FLYP. Wortsman et al.,
    "Robust fine-tuning of zero-shot models", CVPR 2022 (https://arxiv.org/abs/2109.01903): WiSE-FT; the share of the
    trained weights is the one that is best on the validation part. Of clips, the frames' embeddings are averaged:
    Rasheed et al., "Fine-tuned CLIP Models are Efficient Video Learners", CVPR 2023
    (https://arxiv.org/abs/2212.03640): ViFi-CLIP.
    """
    recipe = job.recipe_as(WiseRecipe)
    return train_towers(job, recipe, shares=recipe.wise.shares)


METHODS: dict[str, Callable[[Job], Outcome]] = {
    "zero-shot": _zero_shot,
    "gda": gda,
    "probe": probe,
    "lora": lora,
    "full": _full,
    "temporal": _full,
}
