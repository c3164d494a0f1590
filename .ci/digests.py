"""Write the digests by which compiled files notice a change of the files they import.

See dvkernels/kernels/cpu/memory.py for why. Prints the files it has changed.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

CPU = Path(__file__).resolve().parent.parent / "dvkernels" / "kernels" / "cpu"
LINE = re.compile(r'^([A-Z_]+) = "[0-9a-f]{8}"$', re.MULTILINE)


def digest(name: str) -> str:
    """Return the digest of a file of kernels/cpu, or of kernels, named without its suffix."""
    here, above = CPU / f"{name}.py", CPU.parent / f"{name}.py"
    return hashlib.sha256((here if here.exists() else above).read_bytes()).hexdigest()[:8]


def write() -> list[str]:
    """Write until nothing changes: a digest changes the file that it stands in."""
    changed: set[str] = set()
    while True:
        settled = True
        for path in sorted(CPU.glob("*.py")):
            old = path.read_text()
            new = LINE.sub(lambda found: f'{found[1]} = "{digest(found[1].lower())}"', old)
            if new != old:
                path.write_text(new)
                changed.add(path.name)
                settled = False
        if settled:
            return sorted(changed)


if __name__ == "__main__":
    print("\n".join(write()) or "nothing to do")
