"""The responses that are evaluated, in a file that is taken up again only where it was made of the same."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rrhf.common.files import read_object, write_text
from rrhf.common.settings import differences
from rrhf.evaluation.texts import Text
from rrhf.models.cache import PolicyCache
from rrhf.models.identity import model_digest
from rrhf.models.load import ModelSettings
from rrhf.models.tokenization import TextSettings
from rrhf.records.checksums import checksum_of_file, checksum_of_records
from rrhf.records.files import read_records
from rrhf.records.record import Record
from rrhf.sampling.settings import SamplingSettings

log = logging.getLogger("rrhf")


def draw_to_file(
    place: Path,
    prompts: Sequence[Record],
    model: ModelSettings,
    sampling: SamplingSettings,
    text: TextSettings,
    name: str,
    *,
    policies: PolicyCache,
    overwrite: bool = False,
) -> list[Text]:
    """Draw one response a prompt into ``place``, or read them there, and return them with their finish.

    Beside ``place`` stands ``….made-of.json``: the file's checksum and all that it depends on (model with the digest
    of its weights, settings, prompts). Where any of it differs, the responses are drawn anew and a message says why.

    Args:
        place: the record file of the responses.
        prompts: records without responses.
        name: what messages call the model.
        overwrite: draw anew in any case.

    Raises:
        UserError: the model cannot be loaded or take the prompts, or unfinished work of other settings stands there.
    """
    from rrhf.sampling.stage import sample_file

    weights = model_digest(model.model)
    made_of = {
        "model": None if weights else model.model,  # the same weights elsewhere are the same model
        "weights": weights,
        "dtype": model.dtype,
        "attn_implementation": model.attn_implementation,
        **asdict(sampling),
        **sampling.how.code(),
        **asdict(text),
        "prompts": checksum_of_records(prompts),
    }
    stale = overwrite
    if place.exists() and not overwrite:
        reasons = made_of_else(place, made_of)
        stale = bool(reasons)
        if stale:
            log.warning(f"{place}: the responses of {name} are drawn anew: {'; '.join(reasons)}")
    if stale or not place.exists():
        sample_file(
            prompts,
            place,
            model,
            sampling,
            text,
            policies=policies,
            description=f"responses of {name}",
            merge=False,
            overwrite=stale,
        )
        note_made_of(place, made_of)
    return [(record.responses[0], record.finish[0]) for record in read_records(place)]


def note_made_of(place: Path, made_of: dict[str, Any]) -> None:
    """Write down beside ``place`` what it was made of, with its checksum."""
    note = {"made_of": made_of, "sha256": checksum_of_file(place)}
    write_text(_note_of(place), json.dumps(note, indent=1) + "\n")


def _note_of(place: Path) -> Path:
    return place.with_name(f"{place.stem}.made-of.json")


def made_of_else(place: Path, made_of: dict[str, Any]) -> list[str]:
    """Why the file at ``place`` is not what comes of ``made_of``; no reason where it is."""
    note = _note_of(place)
    noted = read_object(note)
    if not noted:
        return [f"no {note.name} says what they were made of"]
    reasons = list(differences(noted.get("made_of", {}), made_of).values())
    if noted.get("sha256") != checksum_of_file(place):
        reasons.append("the file was changed since")
    return reasons
