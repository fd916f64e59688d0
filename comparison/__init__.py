"""The comparison of distillation methods: a DVC pipeline of its own, whose cells are runs of the stages' core calls."""
