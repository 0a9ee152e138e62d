"""Models and records on the Hugging Face hub."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from rrhf.common.errors import UserError
from rrhf.common.files import read_object
from rrhf.common.hub import hub_client
from rrhf.models.folders import MODEL_FILES, model_folder
from rrhf.records.files import read_records, write_records
from rrhf.records.record import Record
from rrhf.records.sources import source_shares
from rrhf.report.card import CARD, column_words, hub_id, records_card, write_card

log = logging.getLogger("rrhf")

RECORDS = PurePosixPath("data/train.parquet")  # where `datasets` finds the split train


def push_model(source: str | Path, repo_id: str, *, private: bool = False, message: str | None = None) -> str:
    """Upload the model in ``source`` (a model folder or a run folder) in one commit; make the repository if need be.

    A card that rrhf wrote is written anew with the repository's name.

    Returns:
        The address of the repository.

    Raises:
        UserError: no model, no token, no permission, or no connection; the message names the cure.
    """
    folder = model_folder(source)
    base = read_object(folder / "adapter_config.json").get("base_model_name_or_path")
    if base and not hub_id(base, folder):
        log.warning(f"{repo_id}: an adapter needs its base model, and {base!r} is no hub id: others cannot load it")
    with hub_client(repo_id) as api:
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        write_card(folder, name=address.repo_id, refresh=True)
        api.upload_folder(
            repo_id=address.repo_id,
            folder_path=folder,
            allow_patterns=MODEL_FILES,
            ignore_patterns=["*/*"],
            commit_message=message or "Upload model with rrhf",
        )
    return str(address)


def card_of_training(folder: Path, training: dict[str, Any], repository: str | None) -> None:
    """Write the card of a model that was trained just now, also over one that stands in the repository."""
    card = write_card(folder, training=training, name=repository)
    if repository is not None:
        push_card(card, repository)


def push_card(card: Path, repo_id: str) -> None:
    """Upload the card alone, beside a model that ``--push_to_hub`` has uploaded."""
    with hub_client(repo_id) as api:
        api.upload_file(path_or_fileobj=card, path_in_repo=CARD, repo_id=repo_id, commit_message="Model card of rrhf")


def push_records(file: str | Path, repo_id: str, *, private: bool = False, message: str | None = None) -> str:
    """Upload a file of records as a data set: one Parquet file and a card, in one commit.

    Returns:
        The address of the repository.

    Raises:
        UserError: no records, queries that `datasets` would not read as what they are, no token, no permission, or no
            connection; the message names the cure.
    """
    from huggingface_hub import CommitOperationAdd

    file = Path(file)
    with tempfile.TemporaryDirectory() as scratch, hub_client(repo_id) as api:
        table = Path(scratch) / RECORDS.name
        count = write_records(table, _of_one_kind(read_records(file), file))
        address = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
        card = records_card(RECORDS, count, source_shares(table, None), column_words(_columns(table)), address.repo_id)
        api.create_commit(
            repo_id=address.repo_id,
            repo_type="dataset",
            operations=[CommitOperationAdd(str(RECORDS), str(table)), CommitOperationAdd(CARD, card.encode())],
            commit_message=message or f"Upload {count} records with rrhf",
        )
    return str(address)


def _of_one_kind(records: Iterable[Record], file: Path) -> Iterator[Record]:
    """Pass on records whose queries are a column of texts, or of messages; any other becomes JSON text in Parquet."""
    first = None
    for record in records:
        kind = "text" if isinstance(record.query, str) else "messages"
        first = first or kind
        if kind != first:
            raise UserError(
                f"{file}, id {record.id!r}: its query is {kind}, those before are {first}: `datasets` would read "
                "all as JSON text: publish the two kinds apart"
            )
        messages = [] if isinstance(record.query, str) else record.query
        more = sorted({key for message in messages for key in message} - {"role", "content"})
        if more:
            raise UserError(
                f"{file}, id {record.id!r}: its messages have {', '.join(more)} beside role and content: `datasets` "
                "would read the queries as JSON text: take these keys out"
            )
        yield record


def _columns(table: Path) -> list[str]:
    import pyarrow.parquet as pq

    names: list[str] = pq.read_schema(table).names
    return names
