"""Records as token ids, ready to be trained on."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch.utils.data import Dataset

from rrhf.common.errors import UserError
from rrhf.common.scores import score_levels
from rrhf.models.tokenization import EncodedRecord, TextFormat
from rrhf.records.record import TOKEN_COLUMNS, Record, record_from_row
from rrhf.training.selection import selected
from rrhf.training.stored import StoredRecords, TrainingRecord

__all__ = ["EncodedRecords", "TrainingRecord"]


class EncodedRecords(Dataset):
    """Records as token ids, without those that cannot be trained on, which ``skipped`` counts by reason.

    Responses that no loss reads are not kept, so nothing computes them: those without a score, those that ``select``
    (see ``rrhf.training.selection``) leaves out, counted in ``left_out``, and, with ``only_best``, all but the best one
    (Eq. 3).

    Args:
        reference_sums: the name in ``Record.rewards`` of the reference's sums; None: records bring none.
    """

    def __init__(
        self,
        rows: Iterable[Record | Mapping[str, Any]],
        format: TextFormat,
        max_length: int,
        only_best: bool = False,
        reference_sums: str | None = None,
        select: str = "all",
    ) -> None:
        self.records = StoredRecords()
        self.skipped: Counter[str] = Counter()
        self.unranked = 0
        self.left_out = 0
        for number, row in enumerate(rows):
            given = row if isinstance(row, Record) else _as_record(dict(row), f"row {number}")
            record = selected(given, select)
            self.left_out += sum(s is not None for s in given.scores) - sum(s is not None for s in record.scores)
            encoded = format.encode_record(record, max_length)
            reason = _unusable(encoded, max_length)
            if reason is not None:
                self.skipped[reason] += 1
                continue
            self.unranked += sum(score is not None for score in encoded.scores) < 2
            self.records.append(_as_trained(encoded, record, only_best, reference_sums))
        self.queries_cut, self.responses_cut = format.queries_cut, format.responses_cut

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> TrainingRecord:
        record: TrainingRecord = self.records[index]
        return record

    def summary(self) -> str:
        """What became of the records, in one line."""
        parts = [f"{len(self)} records to train on"]
        parts += [f"{count} skipped: {reason}" for reason, count in sorted(self.skipped.items())]
        if self.unranked:
            parts.append(f"{self.unranked} with fewer than two scored responses (fitted, not ranked)")
        if self.left_out:
            parts.append(f"{self.left_out} responses left out by --select")
        parts += [f"{self.queries_cut} queries cut"] * bool(self.queries_cut)
        parts += [f"{self.responses_cut} responses cut"] * bool(self.responses_cut)
        return "; ".join(parts)


def _as_record(row: dict[str, Any], where: str) -> Record:
    if "chosen" in row and "rejected" in row:
        from rrhf.records.foreign.pairs import preference
        from rrhf.records.foreign.rows import SkipRowError

        try:
            converted = preference(row)
        except SkipRowError as error:
            raise UserError(f"{where}: {error}") from error
        if converted is None:
            raise UserError(f"{where}: no record can be made of this preference row")
        row = converted
    return record_from_row(row, where, require="scores")


def _as_trained(encoded: EncodedRecord, record: Record, only_best: bool, reference: str | None) -> TrainingRecord:
    read = [i for i, score in enumerate(encoded.scores) if score is not None]
    if only_best:
        levels = score_levels(score for score in encoded.scores if score is not None)
        read = [read[levels.index(max(levels))]]  # the first of equals
    responses: list[Sequence[int]] = [array("i", encoded.responses[i]) for i in read]
    padded = len(encoded.query) + max(map(len, encoded.responses))
    scores = [encoded.scores[i] for i in read]
    sums = None if reference is None else record.rewards.get(reference)
    return TrainingRecord(
        encoded.id,
        array("i", encoded.query),
        responses,
        scores,
        padded,
        None if sums is None else _reference_sums(responses, [sums[i] for i in read]),
        *(_token_logprobs(record, name, read, responses) for name in TOKEN_COLUMNS),
    )


def _reference_sums(responses: Sequence[Sequence[int]], sums: Sequence[float | None]) -> list[float] | None:
    """The sums as numbers; a response without tokens, which has none, has the log-probability 0."""
    values = [0.0 if value is None and not ids else value for value, ids in zip(sums, responses, strict=True)]
    return None if None in values else [float(value) for value in values if value is not None]


def _token_logprobs(
    record: Record, name: str, read: Sequence[int], responses: Sequence[Sequence[int]]
) -> list[Sequence[float]] | None:
    """The column ``name`` of the responses that are read.

    Raises:
        UserError: it has not one number a token.
    """
    column = record.extra.get(name)
    if column is None:
        return None
    lengths = list(map(len, responses))
    try:
        values: list[Sequence[float]] = [array("d", column[i]) for i in read]
    except (TypeError, KeyError, IndexError):
        values = []
    if list(map(len, values)) != lengths:
        raise UserError(
            f"record {record.id!r}: {name} must have one number for each of the {lengths} tokens of its responses "
            "that training sees: was it made with another model or other length limits? Make it anew, or drop it"
        )
    return values


def _unusable(record: EncodedRecord, max_length: int) -> str | None:
    if len(record.query) >= max_length:
        return f"the query leaves no room for a response (--max_length {max_length}; cut it with --max_query_length)"
    if all(score is None for score in record.scores):
        return "no response is scored"
    return None
