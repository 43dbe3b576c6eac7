"""How good the answers are, how honest the scores, and the model card and report that say so."""

from cliphar.evaluation._analysis import Analysis, ClassReport, Mistake, analyse, confident_mistakes
from cliphar.evaluation._card import model_card
from cliphar.evaluation._compare import Comparison, compare, harmonic_mean, mcnemar, paired_interval
from cliphar.evaluation._fit import OPEN_MARGIN, fit_calibration
from cliphar.evaluation._metrics import Bin, Report, evaluate, expected_calibration_error, macro_f1, reliability
from cliphar.evaluation._plots import confusion_svg, reliability_svg
from cliphar.evaluation._report import EVALUATION_FILE, Evaluation, bundled_evaluation, write_report
from cliphar.evaluation._timelines import Span, segment_f1, temporal_map

__all__ = [
    "EVALUATION_FILE",
    "OPEN_MARGIN",
    "Analysis",
    "Bin",
    "ClassReport",
    "Comparison",
    "Evaluation",
    "Mistake",
    "Report",
    "Span",
    "analyse",
    "bundled_evaluation",
    "compare",
    "confident_mistakes",
    "confusion_svg",
    "evaluate",
    "expected_calibration_error",
    "fit_calibration",
    "harmonic_mean",
    "macro_f1",
    "mcnemar",
    "model_card",
    "paired_interval",
    "reliability",
    "reliability_svg",
    "segment_f1",
    "temporal_map",
    "write_report",
]
