"""The comparison of distillation methods: a DVC pipeline of its own, whose cells are runs of the stages' core calls."""

import stages  # noqa: F401 - as a stage begins, before torch is imported
