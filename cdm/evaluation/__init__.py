"""Evaluation of samples: distances, scores, intervals over prompts, tables, plots and the report."""
