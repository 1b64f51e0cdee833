"""Proof on a GPU: `python -m bench.gpu`. Needs torch alone, no Ray and no MLflow."""
