"""Diffusion models on this disk or on a hub: the teacher, and the students made from it."""
