"""Prove that training works on this machine's GPUs: `tatar-dist gpu-check` (README.md)."""
