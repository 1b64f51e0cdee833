"""One command for each figure in docs/performance.md. Each command prints one JSON line last."""
