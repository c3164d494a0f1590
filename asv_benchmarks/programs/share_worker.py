"""Process that computes one share of a program: NUMBER OF PROCESSES, RANK."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])
    from programs.all_cores import serve

    serve(rank=int(sys.argv[2]), count=int(sys.argv[1]))
