"""Benchmarks as pure functions, generation, grounding metrics, and the runner that joins them."""
