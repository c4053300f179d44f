"""Comparing solvers: held-out validation, comparisons with intervals, other metrics, suites, and blind page tests."""
