"""The HTTP service in front of Triton: images in, optical flow out."""
