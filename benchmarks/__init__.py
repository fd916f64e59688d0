"""What an iteration costs, against the plain order of operations."""
