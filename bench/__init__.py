"""Benchmarks that reproduce the figures in the README. Each prints one JSON line last."""
