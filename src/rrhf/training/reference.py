"""The reference model's log-probability sums: computed once before training, kept beside the data, then looked up.

A loss that reads ``reference_sums`` compares the policy with a reference ρ, ``--reference_model`` or the model that
training starts from. ρ is in memory before the policy is, never beside it. Its sums of the responses in ``DATA.jsonl``
stand in ``DATA.reference-DIGEST.jsonl``, the same records with one more of ``rewards``, so that the next training on
the same data, with whatever loss, computes none.

Their name, ``logprob-sum:NAME#DIGEST``, covers ρ's weights and tokenizer and all settings that decide which token ids
training sees (``--max_length``, ``--max_query_length``, ``--system_prompt``, ``--chat_template_kwargs``): ρ scores just
those ids. A reference that cuts texts into other tokens is refused.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object

from rrhf.common.errors import UserError
from rrhf.losses import needed_by, ranking_loss
from rrhf.models.adapters import load_policy_or_adapter
from rrhf.models.load import ModelSettings, tokenizer_and_config
from rrhf.models.locate import locate
from rrhf.models.path_check import usable_path
from rrhf.records.checksums import checksum_of_file
from rrhf.records.files import count_records, read_records
from rrhf.records.parts import in_parts
from rrhf.records.record import Record
from rrhf.rewards.logprob import LogprobModel, fill_sums, reference_sums_name
from rrhf.training.config import RRHFConfig
from rrhf.training.dataset import EncodedRecords
from rrhf.training.forward import Compute, accept_records, forward_records, measure

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("rrhf")

PART = 256  # records whose sums are written at once


@dataclass(frozen=True)
class Reference:
    """Where the reference's sums are: ``column`` of ``Record.rewards``, in ``files`` (data → the file that has it)."""

    column: str
    files: dict[Path, Path]


def reference_column(model: ModelSettings, config: RRHFConfig) -> str | None:
    """The name of the reference's sums for this training; None where its loss needs none.

    Raises:
        UserError: there is no such model.
    """
    if "reference_sums" not in needed_by(ranking_loss(config.ranking_loss), config):
        return None
    return reference_sums_name(config.reference_model or model.model, config.text, config.max_length)


def with_reference_sums(
    data: Sequence[Path], model: ModelSettings, config: RRHFConfig, spare: Path
) -> Reference | None:
    """Compute the reference's sums for files of records where they are not known; None where the loss needs none.

    A stopped call goes on where it was. Files are written beside the data or, where that is not allowed, in ``spare``.

    Raises:
        UserError: the reference cannot be loaded, or cuts texts into other tokens than ``model`` does.
    """
    column = reference_column(model, config)
    if column is None:
        return None
    settings = replace(model, model=config.reference_model or model.model)
    files = {file: file if _has(file, column) else _beside(file, column, spare) for file in data}
    missing = {file: place for file, place in files.items() if not place.exists()}
    if missing and settings.model != model.model:
        _refuse_other_tokens(settings.model, model.model, data)
    asked = LogprobModel(
        settings, config.text, max_length=config.max_length, max_tokens_per_forward=config.max_tokens_per_forward
    )
    try:
        for file, place in missing.items():
            log.info(f"train: the log-probabilities of {file.name} under the reference {settings.model}")
            _write(file, place, column, asked, settings.dtype)
    finally:
        asked.close()
    return Reference(column, files)


def _records(file: Path) -> Iterator[Record]:
    return read_records(file, require="scores", empty_responses="drop")


def _has(file: Path, column: str) -> bool:
    return all(column in record.rewards and None not in record.rewards[column] for record in _records(file))


def _beside(file: Path, column: str, spare: Path) -> Path:
    digest = hashlib.sha256(f"{column}\n{checksum_of_file(file)}".encode()).hexdigest()[:16]
    folder = file.parent if os.access(file.parent, os.W_OK) else spare
    return folder / f"{file.name.partition('.')[0]}.reference-{digest}.jsonl"


def _write(file: Path, place: Path, column: str, model: LogprobModel, dtype: str) -> None:
    def work(block: list[Record], done: Callable[[int], None]) -> list[Record]:
        filled = fill_sums(block, column, model)
        done(len(block))
        return filled

    settings = {"column": column, "dtype": dtype}
    try:
        in_parts(
            lambda: _records(file), place, {"reference": work}, settings, part_size=PART, total=count_records(file)
        )
    except UserError:
        if not place.exists():  # else another training on the same data was quicker
            raise


def _refuse_other_tokens(reference: str, model: str, data: Iterable[Path]) -> None:
    """Refuse a reference that cuts these texts into other tokens than the policy: it would score other ids."""
    try:
        theirs, _ = tokenizer_and_config(locate(reference), reference)
    except UserError as error:
        raise UserError(
            f"--reference_model {reference}: {str(error).removeprefix(f'--model {reference}: ')}"
        ) from error
    ours, _ = tokenizer_and_config(locate(model), model)
    refuse_other_tokenizer(theirs, ours, reference)
    chats = any(not isinstance(record.query, str) for file in data for record in _records(file))
    if chats and theirs.chat_template != ours.chat_template:
        raise UserError(
            f"--reference_model {reference}: its chat template is not that of the model that is trained, and queries "
            "are messages here: it would read other tokens. Give it the model's chat template, or leave it out"
        )


def refuse_other_tokenizer(
    theirs: PreTrainedTokenizerBase,
    ours: PreTrainedTokenizerBase,
    name: str,
    flag: str = "--reference_model",
    otherwise: str = ", or leave it out: the reference is then the model as it is before training",
) -> None:
    """Refuse a reference, or what ``flag`` names, whose tokenizer makes other ids of a text than the policy's does.

    ``otherwise``: what can be done without it, for the message.

    Raises:
        UserError: vocabularies, rules or end tokens differ.
    """

    def kind(tokenizer: PreTrainedTokenizerBase) -> tuple[Any, ...]:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        rules = tokenizer.get_vocab() if backend is None else json.loads(backend.to_str())
        for passing in ("padding", "truncation"):  # what the last call left behind
            rules.pop(passing, None)
        return rules, tokenizer.eos_token_id, tokenizer.bos_token_id

    if kind(theirs) != kind(ours):
        raise UserError(
            f"{flag} {name}: its tokenizer is not that of the model that is trained, so it would score other tokens: "
            f"name a model of the same family{otherwise}"
        )


# --- records that are in memory already ------------------------------------------------------------------------------


def fill_in_memory(
    data: EncodedRecords, reference: tuple[Any, Compute], budget: int, path: str, rank: int, world: int
) -> None:
    """Give the records that have no ``reference_sums`` those that ρ, and a pass of it, find.

    The processes share them out; it is a collective operation.
    """
    missing = [index for index, record in enumerate(data.records) if record.reference_sums is None]
    mine = missing[rank::world]
    model, compute = reference
    outputs = measure(model, [data.records[index] for index in mine], compute, budget, path)
    found = [(index, output.sums.tolist()) for index, output in zip(mine, outputs, strict=True)]
    for index, sums in gather_object(found) if world > 1 else found:
        data.records[index] = replace(data.records[index], reference_sums=sums)


@contextmanager
def reference_pass(
    model: Any, config: RRHFConfig, tokenizer: PreTrainedTokenizerBase, own: Compute
) -> Iterator[tuple[Any, Compute]]:
    """ρ and a pass of it: of ``--reference_model``, loaded for as long as this lasts, or ``own`` of the model as it is.

    An adapter that is trained is switched off, and dropout too.

    Raises:
        UserError: the reference cannot be loaded, or has another tokenizer.
    """
    if config.reference_model is not None:
        same = "bfloat16" if model.dtype == torch.bfloat16 else "float32"
        settings = ModelSettings(config.reference_model, device=str(model.device), dtype=same)
        reference, theirs = load_policy_or_adapter(settings)
        refuse_other_tokenizer(theirs, tokenizer, config.reference_model)
        accept_records(reference)
        yield reference, partial(forward_records, reference, path=usable_path(reference))
        return
    was_training = model.training
    model.eval()
    with model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext():
        yield model, own
    model.train(was_training)
