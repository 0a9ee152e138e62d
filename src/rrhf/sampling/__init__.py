"""Queries → responses."""
