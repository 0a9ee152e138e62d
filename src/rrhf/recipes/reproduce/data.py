"""The prompts that all arms share: to train on, held out, and those on which learning rates are chosen."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from rrhf.common.files import read_object, write_text
from rrhf.common.flags import Flags, as_arguments
from rrhf.common.settings import refuse_other_settings
from rrhf.recipes.config import DataSettings
from rrhf.recipes.data import set_aside_records, write_queries
from rrhf.recipes.reproduce.scale import Scale
from rrhf.records.files import read_records, write_records
from rrhf.records.record import Record

MICRO = "micro"  # names the language model of film reviews, and its prompts


@dataclass(frozen=True)
class Prompts:
    """The files of prompts in a folder."""

    folder: Path

    @property
    def queries(self) -> Path:
        return self.folder / "queries.jsonl"

    @property
    def held_out(self) -> Path:
        return self.folder / "held_out.jsonl"

    @property
    def rates(self) -> Path:
        return self.folder / "rates.jsonl"


def with_model(scale: Scale) -> dict[str, Any]:
    """The scale's configuration with the folder of its model, which is trained now where it has to be.

    So is the gold reward of that model's scale, which would else be trained by several processes at a time.
    """
    if scale.config["model"] != MICRO:
        return dict(scale.config)
    from rrhf.recipes.micro.gold import gold_folder
    from rrhf.recipes.micro.language_model import language_model

    gold_folder()
    return {**scale.config, "model": str(language_model())}


def write_prompts(scale: Scale, prompts: Prompts) -> dict[str, Any]:
    """Write the files of prompts where they are not there yet; no query stands in two of them.

    Returns:
        The scale's configuration, its data being those files.

    Raises:
        UserError: the data cannot be read, or the files were made of other data.
    """
    wanted = {"model": scale.config["model"], "data": scale.config["data"], "rate_queries": scale.rate_queries}
    wanted |= {"set_aside": True} if scale.set_aside else {}
    wanted |= {"held_out_samples": scale.held_out_samples} if scale.held_out_samples > 1 else {}
    note = prompts.folder / "made-of.json"
    noted = read_object(note)
    if noted:
        cure = "go on with those, or choose another --output"
        refuse_other_settings(noted, json.loads(json.dumps(wanted)), f"{prompts.folder} holds other prompts", cure)
    else:
        prompts.folder.mkdir(parents=True, exist_ok=True)
        _write(scale, prompts)
        write_text(note, json.dumps(wanted, indent=1) + "\n")  # last: without it they are written again
    data = {"source": str(prompts.queries), "held_out": str(prompts.held_out)}
    return {**scale.config, "data": {**data, "held_out_limit": _held_out(scale) * scale.held_out_samples}}


def _held_out(scale: Scale) -> int:
    """How many prompts are held out; without a word of it, or at null, as many as a run holds out."""
    limit = scale.config["data"].get("held_out_limit")
    return DataSettings("").held_out_limit if limit is None else int(limit)


def _write(scale: Scale, prompts: Prompts) -> None:
    _write_each(scale, prompts)
    if scale.held_out_samples > 1:
        copies = list(_copies(read_records(prompts.held_out), scale.held_out_samples))
        write_records(prompts.held_out, copies, overwrite=True)


def _copies(records: Iterable[Record], number: int) -> Iterator[Record]:
    """Each record so often, one after another; their ids, of which their samples' randomness comes, differ."""
    for record in records:
        yield record
        yield from (replace(record, id=f"{record.id}/{copy}") for copy in range(1, number))


def _write_each(scale: Scale, prompts: Prompts) -> None:
    given = scale.config["data"]
    if given["source"] == MICRO:
        limits = {"queries": given.get("limit"), "held_out": _held_out(scale), "rates": scale.rate_queries}
        for name, records in _micro_records(str(scale.config["model"])).items():
            limit = limits[name]  # None: all
            start = _held_out(scale) if scale.set_aside and name == "held_out" else 0
            chosen = islice(records, start, None if limit is None else start + limit)
            write_records(prompts.folder / f"{name}.jsonl", chosen, overwrite=True)
        return
    (settings,) = Flags([DataSettings], "reproduce").parse(as_arguments(_more(given, scale.rate_queries), "data"))
    both = prompts.folder / "both.jsonl"
    write_queries(settings, both, prompts.held_out)
    if scale.set_aside:
        write_records(prompts.held_out, set_aside_records(settings), overwrite=True)
    write_records(prompts.rates, islice(read_records(both), scale.rate_queries), overwrite=True)
    write_records(prompts.queries, islice(read_records(both), scale.rate_queries, None), overwrite=True)
    both.unlink()


def _more(given: Mapping[str, Any], queries: int) -> dict[str, Any]:
    limit = given.get("limit")
    return dict(given) if limit is None else {**given, "limit": limit + queries}


def _micro_records(model: str) -> dict[str, Iterator[Record]]:
    from transformers import AutoTokenizer

    from rrhf.recipes.demo.data import prompt_records
    from rrhf.recipes.micro.prompts import PROMPT_TOKENS, RESPONSE_TOKENS
    from rrhf.recipes.micro.reviews import split_micro

    reviews, tokenizer = split_micro(), AutoTokenizer.from_pretrained(model)
    sets = {"queries": reviews.training, "held_out": reviews.held_out, "rates": reviews.rates}
    return {name: prompt_records(chosen, tokenizer, PROMPT_TOKENS, RESPONSE_TOKENS) for name, chosen in sets.items()}
