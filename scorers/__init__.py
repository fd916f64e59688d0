"""Adapters of scorers that need an environment of their own; see docs/scorers.md. None imports this project."""
