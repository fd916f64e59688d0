"""Export of students with their model cards, drawing of single pictures, and recipes (ready params files)."""
