"""Responses from OpenVINO GenAI in this process (the extra ``rrhf[openvino]``), for Intel's processors.

Its models are folders that optimum-intel has converted: docs/sources.md says how.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from rrhf.common.errors import UserError
from rrhf.models.locate import Location
from rrhf.models.tokenization import TextSettings
from rrhf.sampling.settings import SamplingSettings
from rrhf.sampling.sources.engine import Request
from rrhf.sampling.sources.prompts import Prompts

WEIGHTS = "openvino_model.xml"
# --dtype → what it multiplies in and keeps keys and values in; auto is OpenVINO's own choice, 8 bits for the latter.
PRECISIONS = {
    "auto": {},
    "float32": {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"},
    "bfloat16": {"INFERENCE_PRECISION_HINT": "bf16", "KV_CACHE_PRECISION": "bf16"},
}
QUERIES = 32  # decoded together where --batch_size does not say


class OpenVINO:
    """A converted model in OpenVINO's continuous batching, on the CPU.

    A draw is a request of its own with its own seed, so it depends on no other; the beams of a query are one request.

    Args:
        model: a folder with openvino_model.xml, a tokenizer and config.json.
        settings: all policies; beams neither with ``stop`` nor with a temperature, which its search has not.
        text: as everywhere.
        dtype: float32, bfloat16, or auto (see ``PRECISIONS``); the weights' own type was chosen when it was converted.

    Raises:
        UserError: OpenVINO GenAI is not installed, or the settings are not to be had.
    """

    def __init__(
        self, model: str, settings: SamplingSettings, text: TextSettings | None = None, dtype: str = "auto"
    ) -> None:
        self.settings, self.text = settings, text or TextSettings()
        policy = self.settings.policy
        if self.settings.how.outside:
            raise UserError(f"--policy {policy}: OpenVINO has policies of its own alone: use a local model")
        if self.settings.is_beam and self.settings.stop:
            raise UserError(f"--policy {policy}: OpenVINO's beams cannot end at --stop strings: use a local model")
        if self.settings.is_beam and self.settings.temperature != 1.0:
            raise UserError(f"--policy {policy}: OpenVINO's beams have no --temperature: use a local model, or 1.0")
        if importlib.util.find_spec("openvino_genai") is None:
            raise UserError("OpenVINO GenAI is not installed: pip install 'rrhf[openvino]', or use a local model")
        self.model, self.dtype = model, dtype
        self.pipeline: Any = None

    @cached_property
    def prompts(self) -> Prompts:
        """The model's tokenizer and limits.

        Raises:
            UserError: the folder is not there or not converted, or the lengths do not fit the model's context.
        """
        if not (Path(self.model) / WEIGHTS).is_file():
            raise UserError(
                f"{self.model}: the folder has no {WEIGHTS}; convert a model first: optimum-cli export openvino "
                "--model MODEL --task text-generation-with-past --weight-format fp32 FOLDER (see docs/sources.md)"
            )
        return Prompts(Location(self.model, self.model), self.model, self.settings, self.text)

    def _load(self) -> None:
        import openvino_genai

        scheduler = openvino_genai.SchedulerConfig()
        # Whole prompts, at the most as many sequences at once as asked for: with parts of prompts, and keys taken over
        # from other requests, the numbers in a cache of 8 bits would depend on what is decoded beside.
        scheduler.dynamic_split_fuse = False
        scheduler.enable_prefix_caching = False
        scheduler.max_num_seqs = (self.settings.batch_size or QUERIES) * self.settings.width
        longest = self.text.max_query_length or self.prompts.context
        scheduler.max_num_batched_tokens = max(longest + self.settings.max_new_tokens, scheduler.max_num_seqs, 2048)
        try:
            self.pipeline = openvino_genai.ContinuousBatchingPipeline(
                self.model, scheduler, "CPU", PRECISIONS[self.dtype]
            )
        except RuntimeError as error:
            raise UserError(f"OpenVINO cannot load {self.model}: {error}") from error

    def close(self) -> None:
        """Free the model and its cache."""
        self.pipeline = None

    def _config(self, ends: set[int]) -> Any:
        import openvino_genai

        settings = self.settings
        config = openvino_genai.GenerationConfig(max_new_tokens=settings.max_new_tokens, apply_chat_template=False)
        config.stop_token_ids = ends
        if settings.is_beam:
            early = openvino_genai.StopCriteria.EARLY
            config.num_beams, config.num_beam_groups = settings.num_beams, settings.groups
            config.num_return_sequences = settings.responses
            config.diversity_penalty = settings.diversity_penalty if settings.groups > 1 else 0.0
            config.length_penalty = settings.length_penalty
            config.stop_criteria = early if settings.early_stopping else openvino_genai.StopCriteria.HEURISTIC
        elif settings.policy != "greedy":
            config.do_sample = True
            config.temperature, config.top_p = settings.temperature, settings.top_p or 1.0
            if top_k := settings.tokens_kept:
                config.top_k = top_k
        return config

    def _submit(self, requests: Sequence[Request]) -> list[list[Any]]:
        """The handles of each request: one a draw, or one for all beams."""
        import numpy as np
        import openvino

        handles: list[list[Any]] = []
        number = 0
        for request in requests:
            tokens = openvino.Tensor(np.array([request.tokens], dtype=np.int64))
            config = self._config(request.ends)
            handles.append([])
            for seed in request.seeds[:1] if self.settings.is_beam else request.seeds:
                config.rng_seed = seed
                handles[-1].append(self.pipeline.add_request(number, tokens, config))
                number += 1
        return handles

    def generate(self, requests: Sequence[Request]) -> Iterator[tuple[int, list[list[int]]]]:
        """Yield (index of the request, token ids of its responses), a request as soon as it is done."""
        import openvino_genai

        if self.pipeline is None:
            self._load()
        handles = self._submit(requests)
        waiting = dict(enumerate(handles))
        running = openvino_genai.GenerationStatus.RUNNING
        try:
            while waiting:
                self.pipeline.step()
                for i in [i for i, some in waiting.items() if all(one.get_status() != running for one in some)]:
                    yield i, [tokens for handle in waiting.pop(i) for tokens in self._read(handle)]
        finally:
            for some in waiting.values():  # left unread: stopped from outside, or by an error
                for handle in some:
                    handle.stop()

    def _read(self, handle: Any) -> list[list[int]]:
        import openvino_genai

        if handle.get_status() == openvino_genai.GenerationStatus.IGNORED:
            raise UserError("OpenVINO has no memory left for its cache: lower --batch_size or --num_responses")
        outputs = list(handle.read_all())
        if self.settings.is_beam:
            outputs.sort(key=lambda output: -output.score)
        return [list(output.generated_ids) for output in outputs[: self.settings.responses]]
