"""Which records go into which forward: full budgets, nothing lost, nothing twice."""

from __future__ import annotations

import itertools
from array import array
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rrhf.models.batching import SIZES, Forward, padded_tokens, plan_forwards, slice_record, tree_tokens
from rrhf.models.shared_prefix import lay_out
from rrhf.models.tokenization import EncodedRecord
from rrhf.training.batching import StepSampler, shares


def make(name: str, query: int, responses: list[int]) -> EncodedRecord:
    """A record whose token ids and scores tell which response they come from."""
    texts = [[100 * i + t for t in range(length)] for i, length in enumerate(responses)]
    return EncodedRecord(name, list(range(query)), texts, [float(i) for i in range(len(responses))])


@st.composite
def batches(draw: st.DrawFn) -> list[EncodedRecord]:
    shapes = st.tuples(st.integers(1, 30), st.lists(st.integers(0, 25), min_size=1, max_size=8))
    return [make(f"r{i}", *shape) for i, shape in enumerate(draw(st.lists(shapes, max_size=12)))]


def rows_of(forward: Forward | tuple[EncodedRecord, ...], path: str) -> int:
    """What a pass over the records costs, counted anew: nodes of the trees, or cells of the padded rectangle."""
    records = forward.records if isinstance(forward, Forward) else forward
    if path == "tree":
        return int(lay_out(records).input_ids.shape[1])
    rows = [len(r.query) + len(y) for r in records for y in r.responses]
    return len(rows) * max(rows)


@pytest.mark.parametrize("path", SIZES)
@settings(max_examples=100, deadline=None)
@given(records=batches(), budget=st.integers(1, 300))
def test_no_record_is_lost_or_twice_and_budgets_hold(path: str, records: list[EncodedRecord], budget: int) -> None:
    forwards = plan_forwards(records, budget, path)
    assert Counter(r.id for f in forwards for r in f.records) == Counter(r.id for r in records)
    for forward in forwards:
        if not forward.slices:
            alone = [len(record.responses) for record in forward.records] == [1]
            assert rows_of(forward, path) <= budget or alone
            continue
        assert len(forward.slices) > 1
        (record,) = forward.records
        assert rows_of((record,), path) > budget
        assert [y for part in forward.slices for y in part.responses] == record.responses
        assert [s for part in forward.slices for s in part.scores] == record.scores
        for part in forward.slices:
            assert (part.id, part.query) == (record.id, record.query)
            assert rows_of((part,), path) <= budget or len(part.responses) == 1
    assert forwards == plan_forwards(records, budget, path)


@pytest.mark.parametrize("path", SIZES)
@settings(max_examples=100, deadline=None)
@given(records=batches(), budget=st.integers(1, 300))
def test_budgets_are_filled(path: str, records: list[EncodedRecord], budget: int) -> None:
    """A forward is closed only where the next record would not have fitted."""
    whole = [f for f in plan_forwards(records, budget, path) if not f.slices]
    for this, following in pairwise(whole):
        assert rows_of((*this.records, following.records[0]), path) > budget


@pytest.mark.parametrize("path", SIZES)
@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 30), st.lists(st.integers(0, 25), min_size=1, max_size=8)),
    budget=st.integers(1, 200),
)
def test_slices_are_few_and_the_largest_is_as_small_as_can_be(
    path: str, shape: tuple[int, list[int]], budget: int
) -> None:
    """Against all ways to cut the row of responses."""
    record = make("r", *shape)
    k = len(record.responses)
    ways = []
    for cuts in itertools.product([False, True], repeat=k - 1):
        edges = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), k]
        parts = [record.responses[start:stop] for start, stop in pairwise(edges)]
        rows = [rows_of((EncodedRecord("r", record.query, part, [None] * len(part)),), path) for part in parts]
        if all(size <= budget or len(part) == 1 for size, part in zip(rows, parts, strict=True)):
            ways.append((len(rows), max(rows)))
    slices = slice_record(record, budget, path)
    assert (len(slices), max(rows_of((part,), path) for part in slices)) == min(ways)


def test_similar_sizes_stand_together() -> None:
    records = [make(f"r{n}", n, [5]) for n in (3, 30, 4, 29, 5, 28)]
    sizes = [[tree_tokens(r) for r in forward.records] for forward in plan_forwards(records, 100)]
    assert sizes == [[34, 33, 32], [9, 8, 7]]


def test_sizes_by_hand() -> None:
    record = make("r", 10, [4, 1, 0])
    assert tree_tokens(record) == 10 + 3 + 0 + 0  # the last token of a response predicts nothing
    assert padded_tokens(record) == 3 * (10 + 4)


def test_slices_by_hand() -> None:
    # query 10, responses of 5 (4 rows each as a tree): 10 + 4 + 4 = 18 fit into 20, a third would need 22
    parts = slice_record(make("r", 10, [5, 5, 5, 5, 5]), 20)
    assert [len(part.responses) for part in parts] == [2, 2, 1]
    # nothing fits: a response is never cut in two
    assert [len(part.responses) for part in slice_record(make("r", 10, [5, 5]), 3)] == [1, 1]
    # and what cannot be cut is one forward, not two passes over the same
    (forward,) = plan_forwards([make("r", 10, [5])], 3)
    assert forward.slices == () and len(forward.parts()) == 1
    # 10 + 4 · 4 = 26 fit into 29, which would leave a fifth response alone
    assert [len(part.responses) for part in slice_record(make("r", 10, [5, 5, 5, 5, 5]), 29)] == [3, 2]


def test_records_of_arrays_are_planned_too() -> None:
    record = EncodedRecord("r", array("i", [1, 2]), [array("i", [3, 4, 5]), array("i", [6])], [1.0, None])  # type: ignore[arg-type, list-item]
    (forward,) = plan_forwards([record], 2)
    assert [part.scores for part in forward.slices] == [[1.0], [None]]


# --- steps ------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    tokens=st.lists(st.integers(1, 300), max_size=40),
    per_device=st.integers(1, 5),
    accumulation=st.integers(1, 3),
    world=st.integers(1, 4),
    seed=st.integers(0, 9),
    epoch=st.integers(0, 3),
)
def test_processes_share_the_steps_of_one(
    tokens: list[int], per_device: int, accumulation: int, world: int, seed: int, epoch: int
) -> None:
    def steps(world: int, rank: int, per_device: int) -> list[list[list[int]]]:
        sampler = StepSampler(tokens, per_device, accumulation, world=world, rank=rank, seed=seed)
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(sampler) == len(batches)
        return [batches[start : start + accumulation] for start in range(0, len(batches), accumulation)]

    alone = steps(1, 0, per_device * world)
    assert all(len(batch) == per_device * world for step in alone[:-1] for batch in step)
    together = [steps(world, rank, per_device) for rank in range(world)]
    for number, whole in enumerate(alone):
        parts = [share[number] for share in together]
        assert all(len(part) == len(whole) for part in parts)  # every process takes part in every micro-batch
        mine = [[index for batch in part for index in batch] for part in parts]
        step = [index for batch in whole for index in batch]
        assert sorted(index for part in mine for index in part) == sorted(step)
        for part in mine:
            assert part == [index for index in step if index in part]  # in the order of the step
        sums = [sum(tokens[index] for index in part) for part in mine]
        assert max(sums) - min(sums) <= max(tokens[index] for index in step)
    assert sorted(index for step in alone for batch in step for index in batch) == list(range(len(tokens)))


def test_shares_are_balanced_by_tokens() -> None:
    assert shares([100, 1, 1, 1, 99, 2], 2) == [[0, 1, 2], [3, 4, 5]]  # 102 tokens each
    assert shares([10, 9, 8, 1], 3) == [[0], [1], [2, 3]]
    assert shares([5], 2) == [[0], []]


def test_the_last_share_may_be_empty() -> None:
    parts = [list(StepSampler([1] * 9, 2, world=2, rank=rank)) for rank in range(2)]
    assert [len(batch) for batch in parts[0]] == [2, 2, 1]
    assert [len(batch) for batch in parts[1]] == [2, 2, 0]


def test_order_depends_on_seed_and_epoch_alone() -> None:
    def order(seed: int, epoch: int) -> list[list[int]]:
        sampler = StepSampler([1] * 50, 4, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)
    assert order(0, 0) != [list(range(start, min(start + 4, 50))) for start in range(0, 50, 4)]
    flat = [[i for batch in list(StepSampler([1] * 50, n, seed=0)) for i in batch] for n in (1, 4, 7)]
    assert flat[0] == flat[1] == flat[2]  # the same queries in the same order, however they are batched
