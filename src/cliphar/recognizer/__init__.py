"""From photos and labels to calibrated answers."""

from cliphar.recognizer._recognizer import Recognizer, load
from cliphar.recognizer._scoring import probabilities, to_predictions
from cliphar.recognizer._types import Prediction, Score

__all__ = ["Prediction", "Recognizer", "Score", "load", "probabilities", "to_predictions"]
