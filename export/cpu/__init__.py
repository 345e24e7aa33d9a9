"""The Triton model for the CPU: its modules are copied into each model folder."""
