"""What leaves the project: exported students with their cards, single pictures, ready parameter files."""
