"""The policy that is in memory: consecutive stages often share it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from rrhf.models.adapters import load_policy_or_adapter
from rrhf.models.devices import give_back_memory
from rrhf.models.load import ModelSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger("rrhf")


class PolicyCache:
    """Loads policies on demand and keeps the last one. At most one is in memory."""

    def __init__(self) -> None:
        self._settings: ModelSettings | None = None
        self._policy: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None

    def get(self, settings: ModelSettings) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model and tokenizer of ``settings``; the one before is released first."""
        if self._policy is None or self._settings != settings:
            self.release()
            self._policy, self._settings = load_policy_or_adapter(settings), settings
            model = self._policy[0]
            log.info(
                f"{settings.model}: {model.num_parameters() / 1e6:.0f} M parameters, {model.dtype}, on {model.device}"
            )
        return self._policy

    def release(self) -> None:
        """Release the policy, so that something else, another process too, can have its memory."""
        if self._policy is not None:
            self._policy = self._settings = None
            give_back_memory()
