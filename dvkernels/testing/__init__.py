"""Conformance checks for programs, communicators, strategies and array libraries.

They raise ``AssertionError`` with the difference, and need no test framework.

Imports: communicators, context, data, devices, errors, pytree, reduce_op, replica_context,
strategies, values, variables.
"""

from dvkernels.testing.array_laws import check_arrays as check_arrays
from dvkernels.testing.communicator_laws import check_communicator as check_communicator
from dvkernels.testing.same_on import assert_same_on as assert_same_on
from dvkernels.testing.strategy_laws import check_strategy as check_strategy
