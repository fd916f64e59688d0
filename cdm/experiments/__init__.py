"""Experiments side by side: what DVC is told of each, how they differ, and a page with their curves and pictures."""
