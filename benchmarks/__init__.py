"""Ratios of two things measured side by side in one run. Start with ``python -m benchmarks``."""
