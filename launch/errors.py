"""The error that keeps the service from running."""

from flownet2.errors import Error


class LaunchError(Error):
    """Raised when the service cannot start or go on; the message says what to change."""
