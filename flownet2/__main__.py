"""`python -m flownet2`, the same as `flownet2`."""

import sys

from flownet2.errors import MissingExtra, requires_extra


def main() -> None:
    """Run the command, if its packages are installed."""
    try:
        with requires_extra("cli"):
            from flownet2 import command  # noqa: PLC0415
    except MissingExtra as error:
        sys.exit(f"flownet2: the command needs the extra cli: {error}")
    command.main()


if __name__ == "__main__":
    main()
