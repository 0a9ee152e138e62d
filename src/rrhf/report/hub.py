"""Models and records on the Hugging Face hub. The token comes from `hf auth login` or HF_TOKEN, and is never shown."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from rrhf.common.errors import UserError
from rrhf.common.files import read_object
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
    with _hub_client(repo_id) as api:
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
    with _hub_client(repo_id) as api:
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
    with tempfile.TemporaryDirectory() as scratch, _hub_client(repo_id) as api:
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


@contextmanager
def _hub_client(repo_id: str) -> Iterator[Any]:
    """The hub's client; what it raises becomes a message that names the cure, without the token."""
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
    from huggingface_hub.utils.tqdm import disable_progress_bars

    token = get_token()
    if token is None:
        raise UserError(
            "no token for the hub: run `hf auth login`, or set HF_TOKEN to one with the right to write "
            "(huggingface.co/settings/tokens)"
        )
    disable_progress_bars()
    transport: Any = HfHubHTTPError.__mro__[1]  # what the HTTP library of this huggingface_hub raises
    try:
        yield HfApi(token=token)
    except HFValidationError as error:
        raise UserError(f"--repo {repo_id}: {error}: give USER/NAME or ORGANISATION/NAME") from error
    except OfflineModeIsEnabled as error:
        raise UserError("HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) is set: unset it to publish") from error
    except HfHubHTTPError as error:
        reason = (error.server_message or str(error).splitlines()[0]).replace(token, "…")
        raise UserError(f"{repo_id}: the hub refused ({error.response.status_code}): {reason}{_cure(error)}") from error
    except (transport, ConnectionError, TimeoutError) as error:
        reason = str(error).replace(token, "…")
        raise UserError(
            f"{repo_id}: cannot reach {constants.ENDPOINT}: {reason}. Check the connection "
            f"{'and HF_ENDPOINT ' if os.environ.get('HF_ENDPOINT') else ''}and run the same command again"
        ) from error


def _cure(error: Any) -> str:
    cures = {
        401: "the token is not valid (any more): run `hf auth login` again, or renew HF_TOKEN",
        403: "the token may not write there: use one with the right to write, or another --repo",
        404: "the repository or its owner does not exist, or the token may not see it: check --repo",
    }
    cure = cures.get(error.response.status_code)
    return f"; {cure}" if cure else ""
