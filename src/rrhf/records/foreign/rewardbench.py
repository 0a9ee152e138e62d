"""RewardBench's rows: a prompt, the responses that are right, and those that are not."""

from __future__ import annotations

from typing import Any

USED = ("prompt", "chosen", "rejected", "chosen_model", "rejected_model", "models")


def rewardbench(row: dict[str, Any]) -> dict[str, Any] | None:
    """RewardBench (``chosen``, ``rejected``) and RewardBench 2 (lists of them): scores 1 and 0; ``subset`` stays."""
    prompt, chosen, rejected = row.get("prompt"), _texts(row.get("chosen")), _texts(row.get("rejected"))
    if not chosen or not rejected or set(chosen) & set(rejected) or not isinstance(prompt, (str, list)):
        return None
    models = row.get("models") or [row.get("chosen_model"), row.get("rejected_model")]
    if not isinstance(models, list) or len(models) != len(chosen) + len(rejected):
        models = []
    kinds = ["human/chosen"] * len(chosen) + ["human/rejected"] * len(rejected)
    made = {
        **{name: value for name, value in row.items() if name not in USED},
        "query": [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt,
        "responses": [*chosen, *rejected],
        "sources": [f"system/{model}" if model else kind for model, kind in zip(models or [None] * len(kinds), kinds)],
        "scores": [1.0] * len(chosen) + [0.0] * len(rejected),
    }
    return {**made, "id": str(row["id"])} if row.get("id") is not None else made


def _texts(value: Any) -> list[str]:
    """One text or several; none where something else stands there."""
    values = value if isinstance(value, list) else [value]
    return list(values) if all(isinstance(text, str) for text in values) else []
