"""Optical flow with FlowNet 2.0: the service's contract, file formats, measures and client."""
