"""How good the answers are, how honest the scores, and the model card that says so."""

from cliphar.evaluation._card import model_card
from cliphar.evaluation._fit import fit_calibration
from cliphar.evaluation._metrics import Report, evaluate, expected_calibration_error, macro_f1

__all__ = ["Report", "evaluate", "expected_calibration_error", "fit_calibration", "macro_f1", "model_card"]
