"""Validation of what a user gives, before anything is trained."""
