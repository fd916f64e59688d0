"""Training a student: the round of updates, its terms, the networks and optimisers, the loop around it."""
