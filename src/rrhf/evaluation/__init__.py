"""Measure ρ and π on the same held-out prompts: reward, gain, perplexity, length and variety."""
