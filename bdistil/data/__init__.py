"""Data modules of the shipped recipes, and the index that travels with each sample."""
