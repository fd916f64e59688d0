"""What this repository does on one GPU: times, memory, quality and tests, in tables."""
