"""Judging: any models on any prompts, a cell each; one table with intervals and paired differences, and a page."""
