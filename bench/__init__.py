"""One command for each figure in docs/benchmarks.md. Each command prints one JSON line last."""
