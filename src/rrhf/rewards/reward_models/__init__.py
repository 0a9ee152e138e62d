"""Rewards that are models: sequence classification, and causal models with a scalar head."""
