"""The policy that is in memory: consecutive stages often share it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rrhf.models.adapters import load_policy_or_adapter
from rrhf.models.load import ModelSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger("rrhf")


@dataclass
class Loaded:
    """Loads policies on demand and keeps the last one, since consecutive stages often share it."""

    settings: ModelSettings | None = None
    policy: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None

    def get(self, settings: ModelSettings) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        if self.settings != settings or self.policy is None:
            self.policy = None  # free the one before
            self.policy, self.settings = load_policy_or_adapter(settings), settings
            model = self.policy[0]
            log.info(
                f"{settings.model}: {model.num_parameters() / 1e6:.0f} M parameters, {model.dtype}, on {model.device}"
            )
        return self.policy
