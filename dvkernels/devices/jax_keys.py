"""Keys of ``jax.random`` for the replicas, which depend on seed, name, step and replica."""

from __future__ import annotations

import hashlib
from typing import Any

import jax
import numpy as np

__all__: list[str] = []

_OF_ITEM = 2**32 - 1  # in the place of a replica


def replica_key(seed: int, name: str, step: Any, replica_id: Any) -> Any:
    """Return the key of a replica in a step; step and replica may be traced."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    words = np.frombuffer(digest, np.uint32)
    base = jax.random.wrap_key_data(words, impl="threefry2x32")
    return jax.random.fold_in(jax.random.fold_in(base, step), replica_id)


def item_key(seed: int, name: str, index: int) -> Any:
    """Return the key of an item of ``strategy.map``."""
    return replica_key(seed, name, index, _OF_ITEM)
