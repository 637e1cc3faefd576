"""Prove in ten minutes that training works on this machine's GPUs: `tatar-dist gpu-check` (README.md)."""
