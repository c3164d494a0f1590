"""Short forms of calls that the contract tests make in every replica."""

from __future__ import annotations

from typing import Any

import dvkernels as dv


def context() -> dv.ReplicaContext:
    return dv.get_replica_context()


def replica() -> int:
    return context().replica_id_in_sync_group


def variable(strategy: dv.Strategy, initial: Any, **modes: Any) -> dv.Variable:
    with strategy.scope():
        return dv.Variable(initial, **modes)
