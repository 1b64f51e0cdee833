"""Estimates memory, time and cost of a run or a service before it starts."""
