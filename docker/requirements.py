"""Print what pyproject.toml says the server needs, one requirement a line; for the Dockerfile.

The image then has these in a layer of their own, which a change of the code does not rebuild.
"""

from __future__ import annotations

from pathlib import Path

import tomllib

project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
print(*project["dependencies"], *project["optional-dependencies"]["server"], sep="\n")
