"""What `make bench` runs: every figure of the README, measured on the machine at hand."""
