"""The judging: a DVC pipeline of its own, of models x prompt sets x measures; docs/judging.md says how to use it."""

import stages  # noqa: F401 - as a stage begins, before torch is imported
