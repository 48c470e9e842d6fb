"""Ratios of two things measured side by side in one run. Start with ``python -m benchmarks``."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does
