"""What keeps the service from running."""


class LaunchError(Exception):
    """The service cannot start or go on; the message is one line and says what to change."""
