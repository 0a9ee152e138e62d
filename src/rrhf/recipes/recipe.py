"""Which recipe a configuration asks for: offline, in rounds (``iterations``), or online (``train.resample_steps``)."""

from __future__ import annotations

from typing import Any

from rrhf.common.errors import UserError
from rrhf.models.cache import PolicyCache
from rrhf.recipes.config import RunConfig
from rrhf.recipes.iterate import run_iterated
from rrhf.recipes.offline import check_loss, run_offline
from rrhf.recipes.online import run_online
from rrhf.recipes.run_folder import RunFolder


def run_recipe(run: RunFolder, config: RunConfig, policies: PolicyCache | None = None) -> dict[str, Any]:
    """Bring a run to its end; returns the content of its ``evaluation.json``.

    Args:
        policies: where models are kept between stages, and what they have said; default: its own.

    Raises:
        UserError: the configuration asks for what does not go together, or a stage cannot be done.
    """
    policies = policies or PolicyCache()
    if config.train.resample_steps:
        if config.rounds.iterations > 1:
            raise UserError("iterations and train.resample_steps: either rounds or sampling while training, not both")
        return run_online(run, config, policies)
    check_loss(config)
    if config.rounds.iterations > 1:
        return run_iterated(run, config, policies)
    return run_offline(run, config, policies)
