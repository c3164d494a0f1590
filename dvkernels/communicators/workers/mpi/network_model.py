"""The network between hosts as the user describes it, for the cost model to choose by."""

from __future__ import annotations

import math

from dvkernels.cluster.launcher_environment import Environment
from dvkernels.errors import ClusterError
from dvkernels.schedules.cost_model import NETWORK, Network

__all__ = ["VARIABLE", "of", "written"]

VARIABLE = "DVKERNELS_NETWORK"


def of(environ: Environment) -> Network:
    """Return the network that the variable describes; what it does not name is as measured here.

    Raises
    ------
    ClusterError
        It names something else, or a value that cannot be.

    Examples
    --------
    >>> of({"DVKERNELS_NETWORK": "rate=1.2e9, incast=0.6"}).incast
    0.6
    """
    given: dict[str, float] = {}
    for word in filter(None, map(str.strip, environ.get(VARIABLE, "").split(","))):
        name, _, text = (part.strip() for part in word.partition("="))
        value = _number(text)
        if name not in Network._fields or name in given or not _fits(name, value):
            raise ClusterError(
                f"{VARIABLE}: expected words such as rate=7e9, separated by commas, each of "
                f"{list(Network._fields)} at most once, seconds not below 0, rates above 0, incast "
                f"above 0 and at most 1; got {word!r}. python -m dvkernels bench --calibrate, on "
                f"workers of several hosts, prints those of yours"
            )
        given[name] = value
    return NETWORK._replace(**given)


def written(network: Network) -> str:
    """Return what sets the variable to a network.

    >>> of({VARIABLE: written(NETWORK)}) == NETWORK
    True
    """
    return ",".join(f"{name}={value:.4g}" for name, value in network._asdict().items())


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _fits(name: str, value: float) -> bool:
    if name.endswith("_seconds"):
        return 0 <= value < math.inf
    return 0 < value <= 1 if name == "incast" else 0 < value < math.inf
