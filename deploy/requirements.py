"""`python requirements.py [EXTRA…]`: what extras in the pyproject.toml beside it require, or what
the client alone does.

The Dockerfiles install a layer of packages from it before they copy the code, so that a change of
code leaves that layer as it is. Standard library alone: it runs before anything is installed.
"""

import sys
import tomllib
from pathlib import Path


def requirements(pyproject: Path, extras: list[str]) -> list[str]:
    """Those of `extras`, without the client's own, or the client's; KeyError for an extra that does
    not exist."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    if not extras:
        return list(project["dependencies"])
    return [one for extra in extras for one in project["optional-dependencies"][extra]]


if __name__ == "__main__":
    print("\n".join(requirements(Path(__file__).with_name("pyproject.toml"), sys.argv[1:])))
