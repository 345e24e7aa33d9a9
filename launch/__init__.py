"""Runs the service on one machine: a real tritonserver and the gateway, as child processes."""
