"""Main memory of a real teacher at its real size, on a CPU, with random weights: `python -m benchmarks.real_size`."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
"""The repository."""
