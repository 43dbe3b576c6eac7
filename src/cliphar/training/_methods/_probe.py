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
    # a label without a photo keeps its words: each photo of another would only push it away
    present, own = np.unique(targets, return_inverse=True)
    chances = probabilities(features @ text[present].T, section.logit_scale)[np.arange(len(own)), own]
    pulls = np.array([chances[own == c].mean() for c in range(len(present))], np.float32)
    text[present] = train_head(features, own, text[present], section, job.recipe.seed, pulls)
    return Outcome(text)
