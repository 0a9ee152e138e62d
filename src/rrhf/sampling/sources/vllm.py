"""Responses from vLLM in this process (the extra ``rrhf[vllm]``).

Written to vLLM's documented interface and untested: its tests need a machine where vLLM can be installed. A vLLM
server (``vllm serve``) is asked through ``endpoint.py``, which is tested.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rrhf.common.errors import UserError
from rrhf.sampling.settings import SamplingSettings
from rrhf.sampling.sources.server import request_seed

if TYPE_CHECKING:
    from rrhf.models.tokenization import TextSettings
    from rrhf.records.record import Record

QUERIES_A_CALL = 1024  # vLLM batches within a call by itself; what a call yields comes when all of it is done


class VLLM:
    """A model in vLLM, with the shape of a ``Sampler``.

    Args:
        model: a folder or hub id.
        settings: policy top-p, top-k or greedy; vLLM has no diverse beam search.
        text: as everywhere; queries are tokenised here, so they are the same tokens as for a local model.
        engine: further arguments of ``vllm.LLM``, such as ``dtype``, ``max_model_len``, ``gpu_memory_utilization``.

    Raises UserError where vLLM is not installed or has not the policy.
    """

    def __init__(
        self, model: str, settings: SamplingSettings | None = None, text: TextSettings | None = None, **engine: Any
    ) -> None:
        self.settings = settings or SamplingSettings()
        if self.settings.is_beam:
            cure = "use top-p, top-k or greedy, or a local model as the source"
            raise UserError(f"--policy {self.settings.policy}: vLLM has no diverse beam search: {cure}")
        if importlib.util.find_spec("vllm") is None:
            raise UserError("vLLM is not installed: pip install 'rrhf[vllm]', or use a local model")
        self.model, self.text, self.engine = model, text, engine
        self.llm: Any = None

    def check(self) -> None:
        """Nothing can be known without loading the model."""

    def check_query(self, record: Record) -> None:
        pass

    def _load(self) -> None:
        """Load the model when its first queries come: other models have had the device before."""
        from vllm import LLM

        from rrhf.models.tokenization import TextFormat

        self.llm = LLM(model=self.model, seed=self.settings.seed, **self.engine)
        self.format = TextFormat(self.llm.get_tokenizer(), self.text)

    def close(self) -> None:
        """Let go of the model."""
        self.llm = None

    def _params(self, record: Record) -> Any:
        from vllm import SamplingParams

        settings = self.settings
        greedy = settings.policy == "greedy"
        top_k = settings.top_k or (50 if settings.policy == "top-k" else None)
        return SamplingParams(
            n=settings.responses,
            temperature=0.0 if greedy else settings.temperature,
            top_p=1.0 if greedy else settings.top_p or 1.0,
            max_tokens=settings.max_new_tokens,
            stop=list(settings.stop),
            stop_token_ids=[self.format.end_token(record.query)],
            seed=request_seed(settings.seed, record.id, 0),
            **({} if greedy or top_k is None else {"top_k": top_k}),
        )

    def respond(self, records: Sequence[Record]) -> Iterator[tuple[int, list[str], list[str]]]:
        """Yield (index of the record, texts, finish reasons "stop" or "length")."""
        if self.llm is None:
            self._load()
        prompts = [{"prompt_token_ids": self.format.encode_query(record.query)} for record in records]
        params = [self._params(record) for record in records]
        for start in range(0, len(records), QUERIES_A_CALL):
            part = slice(start, start + QUERIES_A_CALL)
            try:
                outputs = self.llm.generate(prompts[part], params[part], use_tqdm=False)
            except ValueError as error:  # a query that is longer than the model's context
                raise UserError(f"vLLM refuses a query: {error}: give --max_query_length") from error
            for i, output in enumerate(outputs, start):
                finish = ["length" if choice.finish_reason == "length" else "stop" for choice in output.outputs]
                yield i, [choice.text for choice in output.outputs], finish
