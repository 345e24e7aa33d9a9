"""Error of the launcher."""

from flownet2.errors import Error


class LaunchError(Error):
    """Raised when the service cannot start or continue; the message says what to change."""
