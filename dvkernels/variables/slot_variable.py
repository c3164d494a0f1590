"""Slot variable: an optimizer's state of one variable, laid out like that variable."""

from __future__ import annotations

from typing import Any

import numpy as np

from dvkernels.variables.initial_value import initial_copies
from dvkernels.variables.synchronization import VariableAggregation, VariableSynchronization
from dvkernels.variables.variable import Variable, new_variable

__all__: list[str] = []


def variable_like(variable: Variable, name: str, content: Any = None) -> Variable:
    """Return an optimizer slot: a variable of the same shape, dtype and devices, zeros at first.

    It is not trainable, and is written in cross-replica context only.
    """
    copies = initial_copies(
        np.zeros(variable.shape, variable.dtype) if content is None else content,
        None,
        VariableSynchronization.ON_WRITE,
        VariableAggregation.NONE,
        f"{variable.name}/{name}",
        variable.owner,
    )
    copies.is_slot = True
    return new_variable(copies, False, VariableSynchronization.ON_WRITE, VariableAggregation.NONE)
