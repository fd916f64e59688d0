"""What a training will take, counted before it starts: forward passes, memory, compute, disk."""
