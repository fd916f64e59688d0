"""What the training step is checked against: the plain order of operations, an exact Gaussian world, and counters."""
