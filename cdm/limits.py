"""The most that params files, prompt lists and commands take: more is a typing error, or would fill memory or disk."""

from __future__ import annotations

STEPS = 1_000
"""Steps of a sampler or of a rollout."""
ITERATIONS = 100_000_000
"""Iterations of a training, and between two of anything."""
BATCH = 65_536
"""Samples at once, or of an iteration."""
SAMPLES = 100_000
"""Samples of a prompt, of a probe, or resamples of the prompts."""
PROMPTS = 10_000_000
"""Prompts that are counted: for an evaluation, for pairs."""
NEIGHBOURS = 1_000
PIXELS = 16_384
"""On a side of a picture."""
TOKENS = 8_192
"""Text tokens of a prompt."""
RANK = 8_192
"""Of an adapter."""
THREADS = 1_024
MINUTES = 10_080
"""A week."""
HOURS = 168
"""A week."""
SEED = 2**63 - 1
"""Of random numbers: torch takes no more than 64 bits."""
GUIDANCE = 1_000.0
"""Strength of guidance."""
WEIGHT = 1e6
"""Factor of a term, or of an adapter."""
POWER = 100.0
"""Of a noise level; also AdamW's weight decay."""
NORM = 1e9
"""Of a gradient, or of a difference of latents."""
LIST = 1_000
"""Entries of a list of numbers or names."""
FILES = 100_000
"""Entries of a list of prompt files."""
PARAMS_BYTES = 32_768
"""Of a params file: the reader of YAML takes about a second for so much."""
DEPTH = 100
"""Of brackets in a params file: the reader's time grows with their square."""
PROMPT = 10_000
"""Characters of a prompt: no text encoder reads a tenth of it, and a tokenizer takes minutes for a million."""
ZOOM = 64
"""Pixels on a side of the square that a pixel becomes."""
NAME = 60
"""Characters of the name of a judged model or a prompt set, which is that of a file too."""
