"""Whole networks in one native call: `compile` makes a plan of a converted model, `load_plan` reads a saved one.

The plan's bytes (csrc/plan/format.h) are the only thing that the executor sees.
"""

from qkernels.plan.compiler import compile
from qkernels.plan.plan import Plan, PlanWithIslands, load_plan
from qkernels.plan.profile import Profile, StepTime

__all__ = ["Plan", "PlanWithIslands", "Profile", "StepTime", "compile", "load_plan"]
