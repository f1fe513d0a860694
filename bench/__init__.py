"""Benchmarks of castore beside its peers, on states of real training. Start with `python -m bench --help`."""
