"""Data modules of the shipped recipes; each is imported from its own file."""
