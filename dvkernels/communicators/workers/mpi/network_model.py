"""Network parameters of the cost model, from the environment variable DVKERNELS_NETWORK."""

from __future__ import annotations

import math

from dvkernels.cluster.launcher_environment import Environment
from dvkernels.errors import ClusterError
from dvkernels.schedules.cost_model import NETWORK, Network

__all__ = ["VARIABLE", "from_environ", "to_text"]

VARIABLE = "DVKERNELS_NETWORK"


def from_environ(environ: Environment) -> Network:
    """Return the network that the variable describes; parameters it lacks have default values.

    Raises
    ------
    ClusterError
        The variable has an unknown parameter or an impossible value.

    Examples
    --------
    >>> from_environ({"DVKERNELS_NETWORK": "rate=1.2e9, incast=0.6"}).incast
    0.6
    """
    settings: dict[str, float] = {}
    for setting in filter(None, map(str.strip, environ.get(VARIABLE, "").split(","))):
        name, _, text = (part.strip() for part in setting.partition("="))
        value = _number(text)
        if name not in Network._fields or name in settings or not _fits(name, value):
            raise ClusterError(
                f"{VARIABLE}: expected settings such as rate=7e9, separated by commas, each of "
                f"{list(Network._fields)} at most once, seconds not below 0, rates above 0, incast "
                f"above 0 and at most 1; got {setting!r}. python -m dvkernels bench --calibrate, "
                f"on workers of several hosts, prints yours"
            )
        settings[name] = value
    return NETWORK._replace(**settings)


def to_text(network: Network) -> str:
    """Return the value of the variable that describes a network.

    >>> from_environ({VARIABLE: to_text(NETWORK)}) == NETWORK
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
