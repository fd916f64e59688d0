"""What this repository does on one GPU: times, memory, quality and tests, in tables."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
"""The repository."""
