"""From photos and labels to calibrated answers."""

from cliphar.recognizer._recognizer import Recognizer, load
from cliphar.recognizer._scoring import mean_direction, nonconformity, probabilities, to_predictions
from cliphar.recognizer._taught import TAUGHT_FILE, Lesson, read_taught, taught_key
from cliphar.recognizer._teaching import BACKGROUND_FILE, Background, fit_background, gda_vectors, read_background
from cliphar.recognizer._types import Prediction, Score

__all__ = [
    "BACKGROUND_FILE",
    "TAUGHT_FILE",
    "Background",
    "Lesson",
    "Prediction",
    "Recognizer",
    "Score",
    "fit_background",
    "gda_vectors",
    "load",
    "mean_direction",
    "nonconformity",
    "probabilities",
    "read_background",
    "read_taught",
    "taught_key",
    "to_predictions",
]
