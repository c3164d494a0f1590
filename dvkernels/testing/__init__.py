"""Conformance checks for programs, communicators, strategies, array libraries and protocols.

They raise ``AssertionError`` with the difference, and need no test framework.

Imports: checkpoint, communicators, context, data, devices, errors, nest, reduce_op, schedules,
strategies, values, variables.
"""

from dvkernels.testing.array_laws import check_arrays as check_arrays
from dvkernels.testing.communicator_laws import check_communicator as check_communicator
from dvkernels.testing.kills import KilledRun as KilledRun
from dvkernels.testing.kills import run_and_kill as run_and_kill
from dvkernels.testing.protocol_laws import check_protocols as check_protocols
from dvkernels.testing.same_on import assert_same_on as assert_same_on
from dvkernels.testing.strategy_laws import check_strategy as check_strategy
