"""Benchmarks for asv; `README.md` in this folder says how to run and how to read them."""
