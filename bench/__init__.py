"""Every figure that docs/benchmarks.md claims, and the command that makes it again. Each prints one JSON line last."""
