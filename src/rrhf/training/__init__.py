"""Scores → policy."""
