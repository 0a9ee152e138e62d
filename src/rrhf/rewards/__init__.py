"""Responses → scores."""
