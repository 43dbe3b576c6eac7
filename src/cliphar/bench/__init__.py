"""How fast each of a bundle's runtimes is on this machine, and what that costs."""

from cliphar.bench._bench import Bench, Row, run_bench
from cliphar.bench._flops import count_flops
from cliphar.bench._plot import plot_bench

__all__ = ["Bench", "Row", "count_flops", "plot_bench", "run_bench"]
