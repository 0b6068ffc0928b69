"""A request as a table of numbers: one `Step` per network evaluation, decided before the loop."""

from stepforge.runtime.plan.plan import Plan
from stepforge.runtime.plan.step import Step, expand, rows_of

__all__ = ["Plan", "Step", "expand", "rows_of"]
