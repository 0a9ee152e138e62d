"""The policy that is in memory: consecutive stages often share it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from rrhf.common.recent import Recent
from rrhf.models.adapters import load_policy_or_adapter
from rrhf.models.devices import give_back_memory
from rrhf.models.identity import model_digest
from rrhf.models.load import ModelSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger("rrhf")


TextKey = tuple[str, str, str]
Said = dict[tuple[str, str], Recent[TextKey, tuple[float, int]]]
REMEMBERED = 20_000  # texts of a model


class PolicyCache:
    """Loads policies on demand and keeps the last one. At most one is in memory."""

    def __init__(self, said: Said | None = None) -> None:
        """``said``: what models have said of texts, to be remembered for longer than this cache lives.

        Of models in one type that read texts in one way.
        """
        self._said = {} if said is None else said
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

    def said(self, model: str) -> Recent[TextKey, tuple[float, int]]:
        """What the model of this name has said of texts: evaluations against one ρ ask it of the same again and again.

        Key and value are those of ``rrhf.evaluation.perplexity``. Of other weights under the name nothing is known.
        """
        return self._said.setdefault((model, model_digest(model)), Recent(REMEMBERED))

    def release(self) -> None:
        """Release the policy, so that something else, another process too, can have its memory."""
        if self._policy is not None:
            self._policy = self._settings = None
            give_back_memory()
