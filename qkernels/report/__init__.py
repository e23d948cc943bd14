"""How an integer network differs from its float one: numbers, tables, pictures."""

from qkernels.report.comparison import Comparison, LayerComparison, compare

__all__ = ["Comparison", "LayerComparison", "compare"]
