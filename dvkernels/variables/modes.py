"""Modes of a variable: when its copies are synchronized, and how values become one."""

from __future__ import annotations

from dvkernels.enumeration import NamedEnum

__all__ = ["VariableAggregation", "VariableSynchronization"]


class VariableSynchronization(NamedEnum):
    """Mode that says when the copies of a variable are synchronized.

    Attributes
    ----------
    AUTO
        Resolves to ON_WRITE.
    NONE
        Never, unless the program calls ``sync``.
    ON_WRITE
        At every write in replica context: the copies are always equal.
    ON_READ
        At every read in cross-replica context, which returns the aggregate of the copies.

    Examples
    --------
    >>> import dvkernels as dv
    >>> with dv.MirroredStrategy(["cpu:0", "cpu:1"]) as strategy, strategy.scope():
    ...     on_read = dv.VariableSynchronization.ON_READ  # or its name, "on_read"
    ...     total = dv.Variable(0, synchronization=on_read, aggregation="sum")
    ...     strategy.run(lambda: total.assign_add(1))
    ...     print(total.read_value())
    2
    """

    AUTO = "auto"
    NONE = "none"
    ON_WRITE = "on_write"
    ON_READ = "on_read"


class VariableAggregation(NamedEnum):
    """Reduction of the replicas' values to one value.

    Attributes
    ----------
    NONE
        There is none; operations that need one raise.
    SUM, MEAN
        The sum or the mean over all replicas.
    ONLY_FIRST_REPLICA
        The value of replica 0.

    Examples
    --------
    >>> import dvkernels as dv
    >>> with dv.MirroredStrategy(["cpu:0", "cpu:1"]) as strategy, strategy.scope():
    ...     mean = dv.Variable(0.0, aggregation=dv.VariableAggregation.MEAN)
    ...     strategy.run(lambda: mean.assign(dv.get_replica_context().replica_id_in_sync_group))
    ...     print(mean.numpy())
    0.5
    """

    NONE = "none"
    SUM = "sum"
    MEAN = "mean"
    ONLY_FIRST_REPLICA = "only_first_replica"


def traceable(synchronization: VariableSynchronization) -> str:
    """Return the mode of a variable that compiled steps of JAX may use, in the table of modes."""
    return f"{synchronization.value}, traceable"
