"""Sweeps: where to look, the trials, and Ray Tune."""
