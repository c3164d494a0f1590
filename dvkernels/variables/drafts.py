"""Drafts of a variable in ``update``: one per copy, written to the copies all together."""

from __future__ import annotations

from collections.abc import Sequence

from dvkernels.communicators.single import Single
from dvkernels.devices.array_spec import Array
from dvkernels.errors import ContextError
from dvkernels.values.placement import Placement
from dvkernels.variables.copies import Copies
from dvkernels.variables.modes import VariableAggregation, VariableSynchronization
from dvkernels.variables.variable import Variable, new_variable, storage_of

__all__: list[str] = []


class Draft(Copies):
    """Copy of a variable in ``update``: its writes go to an array of its own until the commit.

    So a function that fails at the third copy has not changed the first two.
    """

    __slots__ = ("has_ended", "is_written")

    def __init__(self, copies: Copies, rank: int) -> None:
        parent = copies.placement
        device = (parent.copy_devices[rank],)
        self.name = copies.name if rank == 0 else f"{copies.name}/replica_{rank}"
        self.placement = Placement(device, Single(), parent.name, parent=parent)
        self.memory = copies.memory
        self.synchronization = VariableSynchronization.ON_WRITE
        self.aggregation = VariableAggregation.NONE
        self.mode, self.server = self.synchronization, None
        self.arrays = (copies.arrays[rank],)
        self.views = (copies.views[rank],)
        self.has_ended = False
        self.is_written = False
        self._scratch = None
        self._holdings = []  # the end of the update frees its memory
        self.is_slot = copies.is_slot

    def commit(self, values: Sequence[Array]) -> None:
        """Write the draft's own array; the first write allocates it."""
        if self.has_ended:
            raise ContextError(
                f"this copy of variable {self.name!r} belongs to an update that has ended; write "
                f"the variable itself"
            )
        if self.is_written and not self.memory.is_immutable:
            super().commit(values)
        else:
            self.set_arrays([self.memory.copy_to_device_of(values[0], self.arrays[0])])
            self.is_written = True

    def arrays_to_scatter(self) -> Sequence[Array]:
        """Return the draft's own array; the first write allocates it."""
        if not self.is_written or self.has_ended:
            self.commit(self.arrays)
        return self.arrays


def drafts_of(variable: Variable) -> list[Variable]:
    """Return one draft variable per copy; its writes take effect by :func:`commit_drafts`."""
    copies = storage_of(variable)
    drafts = [Draft(copies, rank) for rank in range(len(copies.arrays))]
    return [new_variable(draft, variable.trainable, is_draft=True) for draft in drafts]


def commit_drafts(variable: Variable, drafts: Sequence[Variable]) -> None:
    """Write the contents of the drafts to the copies, all together."""
    drafted = [storage_of(draft) for draft in drafts]
    if any(isinstance(copies, Draft) and copies.is_written for copies in drafted):
        storage_of(variable).commit([copies.arrays[0] for copies in drafted])


def end_drafts(drafts: Sequence[Variable]) -> None:
    """End the drafts: later writes to them raise."""
    for draft in drafts:
        copies = storage_of(draft)
        assert isinstance(copies, Draft)
        copies.has_ended = True
