"""The exact world: a Gaussian mixture in the plane as the teacher, distilled by the training step of large models."""
