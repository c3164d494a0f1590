"""Parser of Slurm's lists of nodes and counts: ``n[01-03,7],m5`` and ``3(x2),2,1``."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

from dvkernels.errors import ClusterError

__all__ = ["expand_counts", "expand_nodes"]

# Slurm supports at most 65536 nodes. The limit keeps a typing error from filling the memory.
_MOST_NODES = 1 << 17

# Compiled at first use, because most programs do not run under Slurm.
# A name is a sequence of texts and brackets: rack[0-1]node[00-15]-ib.
_NAME = r"(?:[^\[\],\s]|\[[0-9,-]+\])+"
_PART = r"\[(?P<ranges>[0-9,-]+)\]|(?P<text>[^\[\]]+)"
_RANGE = r"(?P<low>[0-9]+)(?:-(?P<high>[0-9]+))?"
_COUNT = r"(?P<count>[1-9][0-9]*)(?:\(x(?P<times>[1-9][0-9]*)\))?"


def expand_nodes(variable: str, text: str) -> list[str]:
    """Expand a list of nodes to their names.

    Parameters
    ----------
    variable : str
        The environment variable that holds the text, for messages.
    text : str
        Names separated by commas. Brackets contain numbers and ranges; leading zeros are kept. Of
        several brackets in a name the last one varies fastest.

    Raises
    ------
    ClusterError
        The text is not such a list, or names too many nodes.

    Examples
    --------
    >>> expand_nodes("SLURM_STEP_NODELIST", "n[1-2],m5,o[08-10]")
    ['n1', 'n2', 'm5', 'o08', 'o09', 'o10']
    """
    nodes: list[str] = []
    position = 0
    while True:
        name = re.compile(_NAME).match(text, position)
        if name is None:
            raise _malformed(variable, text, position)
        alternatives = [
            list(_numbers(variable, text, part["ranges"])) if part["ranges"] else [part["text"]]
            for part in re.finditer(_PART, name[0])
        ]
        nodes.extend(
            "".join(parts)
            for parts in itertools.islice(itertools.product(*alternatives), _MOST_NODES + 1)
        )
        if len(nodes) > _MOST_NODES:
            raise ClusterError(f"{variable}: {text!r} names more than {_MOST_NODES} nodes")
        position = name.end()
        if position == len(text):
            return nodes
        if text[position] != ",":
            raise _malformed(variable, text, position)
        position += 1


def expand_counts(variable: str, text: str) -> list[int]:
    """Expand a list of counts such as ``3(x2),2,1``; raise ``ClusterError`` if it is malformed.

    Examples
    --------
    >>> expand_counts("SLURM_STEP_TASKS_PER_NODE", "3(x2),2,1")
    [3, 3, 2, 1]
    """
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(_COUNT, part)
        if match is None:
            raise ClusterError(
                f"{variable}: expected numbers such as 3(x2),2,1; {part!r} in {text!r} is not one"
            )
        times = int(match["times"] or 1)
        if len(counts) + times > _MOST_NODES:
            raise ClusterError(f"{variable}: {text!r} is for more than {_MOST_NODES} nodes")
        counts.extend([int(match["count"])] * times)
    return counts


def _numbers(variable: str, text: str, ranges: str) -> Iterator[str]:
    """Yield the numbers of one pair of brackets, zero-padded to the width of the range's start."""
    for part in ranges.split(","):
        match = re.fullmatch(_RANGE, part)
        if match is None or int(match["high"] or match["low"]) < int(match["low"]):
            raise ClusterError(
                f"{variable}: expected numbers and ascending ranges in brackets; {part!r} in "
                f"{text!r} is neither"
            )
        low, high = int(match["low"]), int(match["high"] or match["low"])
        if high - low >= _MOST_NODES:
            raise ClusterError(f"{variable}: {text!r} names more than {_MOST_NODES} nodes")
        for number in range(low, high + 1):
            yield f"{number:0{len(match['low'])}d}"


def _malformed(variable: str, text: str, position: int) -> ClusterError:
    return ClusterError(
        f"{variable}: expected names of nodes such as n[01-03,7],m5; got {text!r}, "
        f"malformed at character {position + 1}"
    )
