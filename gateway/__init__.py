"""The HTTP service in front of Triton: images in, optical flow out."""

__version__ = "1.0.0"
