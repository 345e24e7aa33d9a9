"""The base class of every error that this package raises."""


class Error(Exception):
    """Base class of the package's errors; the message says what is wrong and what to change."""
