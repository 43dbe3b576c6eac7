"""A linear probe that starts from the text and is held near it, each class as its text deserves.

Silva-Rodriguez et al., "A Closer Look at the Few-Shot Adaptation of Large Vision-Language Models", CVPR 2024
(https://arxiv.org/abs/2312.12730): CLAP. The pull on a class is the mean probability that its text gives its own
photos: a class whose words already work stays near them.
"""

from __future__ import annotations

import numpy as np

from cliphar.recognizer import probabilities
from cliphar.training._head import train_head
from cliphar.training._job import TRAIN, Job, Outcome
from cliphar.training._method_recipe import ProbeRecipe
from cliphar.training._rates import learning_rate

__all__ = ["probe"]


def probe(job: Job) -> Outcome:
    """Class vectors trained on the starting model's embeddings."""
    section = job.recipe_as(ProbeRecipe).probe
    learning_rate("probe", section.lr, transformer=False, log=job.around.log)
    features, targets, text = job.features(TRAIN), job.targets[job.rows(TRAIN)], job.text_vectors()
    own = probabilities(features @ text.T, section.logit_scale)[np.arange(len(targets)), targets]
    pulls = np.array([own[targets == c].mean() if (targets == c).any() else 1.0 for c in range(len(text))], np.float32)
    return Outcome(train_head(features, targets, text, section, job.recipe.seed, pulls))
