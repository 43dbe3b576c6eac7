"""Labels by their words alone: an ensemble of prompts and descriptions.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021
(https://arxiv.org/abs/2103.00020), section 3.1.4. Nothing is trained; the bundle is calibrated on the photos.
"""

from __future__ import annotations

from cliphar.training._job import Job, Outcome

__all__ = ["zero_shot"]


def zero_shot(job: Job) -> Outcome:
    """The labels' text vectors."""
    return Outcome(job.text_vectors())
