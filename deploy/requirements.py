"""`python requirements.py [EXTRA…]`: print the requirements of extras in pyproject.toml.

Without an extra, print those of the client alone. The Dockerfiles install a layer of packages from
this list before they copy the code, so that a change of the code keeps that layer. It uses only the
standard library, since it runs before anything is installed.
"""

import sys
import tomllib
from pathlib import Path


def requirements(pyproject: Path, extras: list[str]) -> list[str]:
    """Return the requirements that `extras` add to the client's, or the client's for no extras.

    Raises:
        KeyError: an extra does not exist.
    """
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    if not extras:
        return list(project["dependencies"])
    return [one for extra in extras for one in project["optional-dependencies"][extra]]


if __name__ == "__main__":
    print("\n".join(requirements(Path(__file__).with_name("pyproject.toml"), sys.argv[1:])))
