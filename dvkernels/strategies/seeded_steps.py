"""Seed and step count of a strategy, on which the draws of ``ctx.rng`` depend, and their state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dvkernels import context
from dvkernels.errors import CheckpointError, ContextError
from dvkernels.philox import LARGEST_SEED, StrategyGenerators
from dvkernels.user_errors import brief
from dvkernels.values.placement import Placement
from dvkernels.values.process_bound import ProcessBound

__all__: list[str] = []

_LARGEST = {"seed": LARGEST_SEED, "num_steps": 2**63 - 1}


class SeededSteps(ProcessBound):
    """Base class of strategies: their seed, and the number of their steps."""

    _placement: Placement
    generators: StrategyGenerators

    @property
    def placement(self) -> Placement:
        """The devices, the communicators and the numbering of the replicas, for other rooms."""
        return self._placement

    def state_dict(self) -> dict[str, int]:
        """Return seed and step count: what ``Checkpoint(strategy=strategy)`` saves.

        Returns
        -------
        dict
            ``"seed"``, and ``"num_steps"``, the number of calls of ``run`` that have returned. The
            step around a ``merge_call`` that asks counts as done, since a resumed program goes on
            with the next one.

        Examples
        --------
        >>> import dvkernels as dv
        >>> with dv.MirroredStrategy(["cpu:0", "cpu:1"], seed=3) as strategy:
        ...     results = strategy.run(lambda: None)
        ...     print(strategy.state_dict())
        {'seed': 3, 'num_steps': 1}
        """
        generators = self.generators
        return {
            "seed": generators.seed,
            "num_steps": generators.num_done + self._is_in_step(),
        }

    def load_state_dict(self, state: Any) -> None:
        """Load seed and step count, so that ``ctx.rng`` goes on with the same draws.

        Parameters
        ----------
        state : dict
            What :meth:`state_dict` returned, of a strategy with any number of replicas. The draws
            are the same on as many replicas.

        Raises
        ------
        CheckpointError
            ``state`` is not such a dict. Nothing has changed.
        ContextError
            Called within a step.
        """
        is_valid = isinstance(state, Mapping) and state.keys() == _LARGEST.keys()
        if not is_valid or not all(
            type(state[name]) is int and 0 <= state[name] <= largest
            for name, largest in _LARGEST.items()
        ):
            raise CheckpointError(
                f"load_state_dict: expected the seed and the number of steps of a strategy, "
                f"{self.state_dict()}; got {brief(state)}; pass what state_dict() of a strategy "
                f"returned"
            )
        frame = context.find()
        if self._is_in_step() or (frame is not None and frame.replica is not None):
            raise ContextError(
                f"load_state_dict of {self._placement.name} was called within a step; call it "
                f"between two calls of run"
            )
        context.check_no_step_elsewhere(self._placement, "load_state_dict")
        self.generators.load(state["seed"], state["num_steps"])

    def _is_in_step(self) -> bool:
        """Return whether this is ``merge_call``, which is part of a step of this strategy."""
        frame = context.find()
        return frame is not None and frame.merging and frame.placement is self._placement
