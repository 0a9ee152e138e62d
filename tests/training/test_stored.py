"""Records that lie in a file come back as they were."""

from __future__ import annotations

import pickle
import random
from array import array
from dataclasses import replace

from rrhf.training.stored import StoredRecords, TrainingRecord


def made_up(number: int) -> TrainingRecord:
    draw = random.Random(number)
    k = draw.randint(1, 4)
    responses = [array("i", [draw.randrange(200_000) for _ in range(draw.randint(0, 9))]) for _ in range(k)]
    return TrainingRecord(
        f"é{number}",
        array("i", range(number % 5 + 1)),
        responses,
        [draw.choice([None, 0.1 * number, -1e300]) for _ in range(k)],
        90 + number,
        None if number % 3 else [-0.1] * k,
        None if number % 4 else [array("d", [-1 / 3] * len(response)) for response in responses],
        None,
    )


def test_records_come_back_as_they_were_from_the_file_and_from_memory() -> None:
    records = [made_up(number) for number in range(40)]
    stored = StoredRecords(block=7)
    for record in records:
        stored.append(record)
    assert stored._places and stored._last  # both are looked at
    assert list(stored) == records and len(stored) == 40
    assert stored[-1] == records[-1] and stored[5:16:3] == records[5:16:3]
    order = random.Random(0).sample(range(40), 40)
    assert [stored[i] for i in order] == [records[i] for i in order]
    assert isinstance(stored[0].query, array) and isinstance(stored[0].responses[0], array)
    stored[3] = replace(records[3], reference_sums=[1.0] * len(records[3].responses))
    assert stored[3].reference_sums and stored[4] == records[4]
    assert list(pickle.loads(pickle.dumps(stored))) == list(stored)
