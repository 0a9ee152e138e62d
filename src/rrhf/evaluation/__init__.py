"""Measure ρ and π on the same held-out prompts: reward, gain, perplexity, length and variety."""

from __future__ import annotations

from rrhf.evaluation.metrics import TURN_MARKERS, corpus_perplexity, cut_at_turn, distinct_n, paired_bootstrap
from rrhf.evaluation.policies import evaluate, nll_under
from rrhf.evaluation.texts import Perplexity, Text, evaluate_texts, is_dialogue

__all__ = [
    "TURN_MARKERS",
    "Perplexity",
    "Text",
    "corpus_perplexity",
    "cut_at_turn",
    "distinct_n",
    "evaluate",
    "evaluate_texts",
    "is_dialogue",
    "nll_under",
    "paired_bootstrap",
]
