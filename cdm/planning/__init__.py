"""Planning a training before it starts: its forward passes, memory, compute and disk space."""
