"""Arrays of the checkpoint benchmark: random, the same in every process.

Runs without dvkernels.
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["arrays"]

_COUNT = 16


def arrays(nbytes: int) -> dict[str, np.ndarray[Any, Any]]:
    """Return 16 float32 arrays of shape (n, 1024), of ``nbytes`` bytes in total."""
    rng = np.random.default_rng(11)
    rows = nbytes // 4 // 1024 // _COUNT
    return {f"layer-{k}": rng.random((rows, 1024), np.float32) for k in range(_COUNT)}
