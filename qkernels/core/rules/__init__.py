"""Rules: how a tensor gets onto a grid in training, and which gradients that has. One small file each.

To add one, decorate a subclass of `Rule` with `@rule("name")` and import its file here; recipes then know it by name.
"""

from qkernels.core.rules import bnn, dorefa, learned_range, lsq, lsq_plus, pact, ste  # noqa: F401  (fills the table)
from qkernels.core.rules.base import RULES, Rule, make_rule, rule

__all__ = ["RULES", "Rule", "make_rule", "rule"]
