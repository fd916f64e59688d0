"""Adapters of scorers that need an environment of their own; see docs/evaluation.md. None imports this project."""
