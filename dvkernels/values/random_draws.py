"""Random draws of a replica: generators of NumPy and keys of JAX, by name and step."""

from __future__ import annotations

from typing import Any

import numpy as np

from dvkernels.errors import ContextError
from dvkernels.philox import StrategyGenerators
from dvkernels.replicas.rendezvous import Rendezvous
from dvkernels.user_errors import brief
from dvkernels.values.placement import Placement
from dvkernels.values.process_bound import ProcessBound

__all__: list[str] = []


class RandomDraws(ProcessBound):
    """Base class of replicas: their random generators."""

    __slots__ = ()

    placement: Placement
    _rank: int
    _replica_id: int
    _step: Rendezvous
    _strategy: Any

    @property
    def strategy(self) -> Any:
        """The strategy that runs this replica."""
        raise NotImplementedError

    def rng(self, name: str = "") -> np.random.Generator:
        """Return the random generator of this replica for this step.

        Parameters
        ----------
        name : str
            One stream of numbers for each name. A second call with the same name in one step
            returns the same Generator, which goes on where it was.

        Returns
        -------
        numpy.random.Generator
            Of Philox, in host memory. Its stream is a function of the seed of the strategy, the
            name, the step and the replica id. So the draws are the same in every run on the same
            number of replicas, and after a resume with ``Checkpoint(strategy=strategy)``. Functions
            compiled by Numba take it as an argument.

        Raises
        ------
        TypeError
            ``name`` is not a string.
        ContextError
            The run of this context has ended.

        Notes
        -----
        A step is a ``run`` that returned: one that raised is not counted, so that the next try
        makes the same draws. A ``run`` inside ``merge_call`` belongs to the step around it. In
        ``map`` the index of the item takes the place of step and replica. Outside of every scope
        the generator of a name goes on through the whole program.

        A generator that you keep beyond its step goes on with the stream of that step. One that
        you do not keep is used again in the next step, since making one takes as long as many
        draws.

        Examples
        --------
        >>> import dvkernels as dv
        >>> def step():
        ...     return dv.get_replica_context().rng("noise").integers(100, size=3)
        >>> with dv.MirroredStrategy(["cpu:0", "cpu:1"], seed=7) as strategy:
        ...     print(strategy.run(step))
        ...     print(strategy.run(step))
        PerReplica(0: array([11, 78, 30]), 1: array([97, 48,  2]))
        PerReplica(0: array([79, 73, 88]), 1: array([ 6, 91, 47]))
        """
        step = self._step
        if step.closed:
            step.check_alive("rng")
        generators: StrategyGenerators = self.strategy.generators
        if step.item_index is not None:
            return generators.of_item(self._rank, step.item_index, name)
        if self._strategy is None:
            return generators.outside(name)
        return generators.of_replica(self._rank, self._replica_id, name)

    def rng_key(self, name: str = "") -> Any:
        """Return the key of this replica for this step, for the functions of ``jax.random``.

        Parameters
        ----------
        name : str
            One key for each name; a second call with the same name returns the same key, which
            ``jax.random.split`` makes several of.

        Returns
        -------
        jax.Array
            A key of Threefry. It is a function of the seed of the strategy, the name, the step and
            the replica id, as the streams of :meth:`rng` are, and the same in a compiled step.

        Raises
        ------
        TypeError
            ``name`` is not a string.
        ContextError
            The run of this context has ended; the devices of the strategy are not those of JAX.

        Examples
        --------
        >>> import dvkernels as dv
        >>> import jax
        >>> def step():
        ...     return jax.random.bits(dv.get_replica_context().rng_key("noise"))
        >>> with dv.TPUStrategy(["jax:cpu:0"], seed=7) as strategy:
        ...     print(strategy.run(step)[0] == strategy.run(step)[0])
        False
        """
        check_key_name(name)
        step = self._step
        if step.closed:
            step.check_alive("rng_key")
        if not self.placement.memory.is_immutable:
            raise ContextError(
                f"rng_key is for replicas on devices of JAX, and {self.placement.name} has others; "
                f"use rng, a generator of NumPy"
            )
        from dvkernels.devices import jax_keys

        generators: StrategyGenerators = self.strategy.generators
        if step.item_index is not None:
            return jax_keys.item_key(generators.seed, name, step.item_index)
        return jax_keys.replica_key(generators.seed, name, generators.num_done, self._replica_id)


def check_key_name(name: object) -> None:
    """Raise ``TypeError`` unless the name of a key is a string."""
    if not isinstance(name, str):
        raise TypeError(f"rng_key: expected a string as name, got {brief(name)}")
