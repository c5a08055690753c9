"""Validation of user inputs before training."""
