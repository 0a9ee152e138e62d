"""Policies: loading, tokenization, log-probabilities of responses."""
