"""Record registers and shared memory of each kernel as the budget of test_machine_code.py."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import toolchain
from catalogue import kernels

from dvkernels.kernels.cuda.engine import compiler


def main() -> None:
    """Compile everything, and write budget.json."""
    budget = {}
    for name, kernel in kernels().items():
        ptx = compiler.compile_to_ptx(kernel, (7, 5)).ptx
        with tempfile.TemporaryDirectory() as folder:
            made = [
                toolchain.assemble(ptx, architecture, Path(folder))
                for architecture in toolchain.architectures()
            ]
        budget[name] = {
            "registers": max(one.registers for one in made),
            "shared": max(one.shared for one in made),
        }
        print(name, budget[name], flush=True)
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(budget[name])}" for name in budget)
    Path(__file__).with_name("budget.json").write_text("{\n" + lines + "\n}\n")


if __name__ == "__main__":
    main()
