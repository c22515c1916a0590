"""Benchmarks for asv; `README.md` in this folder says how to run them and how to read the results."""
