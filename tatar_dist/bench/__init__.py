"""Benchmarks that print the limit beside the measurement: `tatar-dist bench NAME`."""
