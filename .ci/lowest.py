"""Print the lowest versions that pyproject.toml allows, as a constraints file of pip."""

import pathlib
import re
import sys
import tomllib

NAME = r"(?P<name>[\w.-]+)(?P<extras>\[[\w,]+\])?"

project = pathlib.Path(__file__).resolve().parent.parent / "pyproject.toml"
table = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
extras = table["optional-dependencies"]
for text in [*table["dependencies"], *extras["demo"], *extras["test"]]:
    found = re.fullmatch(rf"{NAME}(>=(?P<lowest>[\w.]+))?", text)
    if found is None:
        sys.exit(f"expected a requirement such as name>=1.2; got {text!r}")
    if found["lowest"]:
        print(f"{found['name']}=={found['lowest']}")
