"""What can keep the service from starting. Each message is one line and says what to change."""


class LaunchError(Exception):
    """The service cannot start."""


class PortUnavailable(LaunchError):
    """A port of the service is taken, forbidden, or named twice."""


class BadSetting(LaunchError):
    """An environment variable holds something that cannot be used."""


class ServerMissing(LaunchError):
    """This Python environment does not have the wheel that carries tritonserver."""


class StubMissing(LaunchError):
    """The wheel has no Python-backend stub for the running Python version."""


class SharedLibraryMissing(LaunchError):
    """A program of the wheel needs a shared library that the machine does not have."""


class ModelMissing(LaunchError):
    """The model repository holds no model that Triton could serve."""


class StartFailed(LaunchError):
    """A child ended, or was not ready in time."""


class ImageIncomplete(LaunchError):
    """A library that the container's image should hold does not load."""
