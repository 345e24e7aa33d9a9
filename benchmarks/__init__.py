"""Benchmarks, which `make bench` runs: they measure the README's figures on this machine."""
