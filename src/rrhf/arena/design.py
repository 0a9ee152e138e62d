"""Which rater sees what: Appendix D's design as pure functions of the systems, the settings and the seed.

Per comparison 110 pairs; 30 of all pairs are common and seen by every rater, the others are spread evenly; a rater gets
min(130, what there is), and attention checks on top.
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rrhf.arena.settings import StudySettings
from rrhf.arena.systems import Systems
from rrhf.common.errors import UserError

log = logging.getLogger("rrhf")

SPOILABLE = 12  # words that a response must have so that shuffling them is seen at once
LONGEST_WORD = 15  # characters of a word, on average; where there are more, spaces part something else than words
FEWEST = 5  # different words or characters that make an order


@dataclass(frozen=True)
class Task:
    """What a rater is shown at once: a query and the responses of two systems, or of k.

    Attributes:
        id: unlike the place in the design, says nothing of the systems.
        query: the record's id.
        systems: whose responses.
        common: whether every rater sees it; never so of an attention check, which says nothing of the systems.
        spoilt, spoilt_text: of an attention check, the index of the system whose response is spoilt, and what is shown.
    """

    id: str
    query: str
    systems: tuple[str, ...]
    common: bool = False
    spoilt: int | None = None
    spoilt_text: str = ""


def design_tasks(
    systems: Systems, comparisons: Sequence[tuple[str, str]], settings: StudySettings, ids: random.Random
) -> list[Task]:
    """The tasks of a study. ``ids`` draws what tasks are called; all else depends on the seed.

    Raises:
        UserError: the systems have no query in common.
    """
    rng = random.Random(f"{settings.seed}/tasks")
    order = list(systems.queries)
    rng.shuffle(order)
    if settings.mode == "ranking":
        chosen = [(query, tuple(systems.of(query))) for query in order if len(systems.of(query)) > 1]
        picked = [chosen[: settings.per_comparison]]
    else:
        picked = _pairs(systems, comparisons, order, settings.per_comparison)
    if not any(picked):
        raise UserError("--data: no query was answered by two systems: the files must be answers to the same queries")
    shares = _shares(settings.common, [len(group) for group in picked])
    tasks = [
        Task(_name(ids), query, names, common=place < shares[number])
        for number, group in enumerate(picked)
        for place, (query, names) in enumerate(group)
    ]
    return tasks if settings.mode == "ranking" else [*tasks, *_checks(systems, tasks, settings, rng, ids)]


def _name(ids: random.Random) -> str:
    return f"{ids.getrandbits(64):016x}"


def _pairs(
    systems: Systems, comparisons: Sequence[tuple[str, str]], order: Sequence[str], count: int
) -> list[list[tuple[str, tuple[str, ...]]]]:
    """Of each comparison the pairs: queries of no other comparison come first, so raters read few of them twice."""
    used: Counter[str] = Counter()
    picked = []
    for pair in comparisons:
        answered = [query for query in order if all(query in systems.responses[name] for name in pair)]
        queries = sorted(answered, key=used.__getitem__)[:count]
        used.update(queries)
        picked.append([(query, tuple(pair)) for query in queries])
    return picked


def _shares(total: int, sizes: Sequence[int]) -> list[int]:
    """``total`` spread over groups as evenly as their sizes allow."""
    shares = [0] * len(sizes)
    for _ in range(min(total, sum(sizes))):
        group = min((i for i, size in enumerate(sizes) if shares[i] < size), key=lambda i: (shares[i], i))
        shares[group] += 1
    return shares


def _checks(
    systems: Systems, tasks: Sequence[Task], settings: StudySettings, rng: random.Random, ids: random.Random
) -> list[Task]:
    """Attention checks: pairs of the study anew, one response spoilt. Responses of many words come first.

    What is too short to be spoilt makes none: the log says where there are fewer than asked for.
    """

    def words(task: Task) -> int:
        return min(len(systems.responses[name][task.query].split()) for name in task.systems)

    shuffled = sorted(tasks, key=lambda task: rng.random())
    checks: list[Task] = []
    for task in sorted(shuffled, key=lambda task: words(task) < SPOILABLE):
        if len(checks) == settings.checks:
            break
        side = rng.randrange(2)
        text = spoil(systems.responses[task.systems[side]][task.query], rng)
        if text is not None:
            checks.append(Task(_name(ids), task.query, task.systems, spoilt=side, spoilt_text=text))
    if len(checks) < settings.checks:
        log.warning(
            f"{len(checks)} attention checks in place of {settings.checks}: the other responses are too short to be "
            "spoilt so that anybody sees it"
        )
    return checks


def spoil(text: str, rng: random.Random) -> str | None:
    """A response that anybody who reads sees to be the worse: its words in another order, or its characters.

    Characters are mixed where there are few words, or long ones, as where a language puts no spaces between them. None
    where there are too few characters for that too, or all but a few are the same.
    """
    words = text.split()
    letters = sum(map(len, words))
    by_words = len(words) >= SPOILABLE and len(set(words)) >= FEWEST and letters <= LONGEST_WORD * len(words)
    pieces = words if by_words else [char for char in text if not char.isspace()]
    if len(set(pieces)) < FEWEST:
        return None
    mixed = list(pieces)
    for _ in range(20):
        rng.shuffle(mixed)
        if sum(one == other for one, other in zip(mixed, pieces)) <= len(pieces) / 2:
            return (" " if by_words else "").join(mixed)
    return None


def assign(tasks: Sequence[Task], rater: str, covered: Mapping[str, int], settings: StudySettings) -> list[str]:
    """The ids of a rater's tasks, in the order in which they are shown.

    All common ones and all checks; of the others those that the fewest raters see, the comparisons in turn.

    Args:
        covered: task → how many raters see it already.
    """
    rng = random.Random(f"{settings.seed}/rater/{rater}")
    common = [task for task in tasks if task.common]
    rest = [task for task in tasks if not task.common and task.spoilt is None]
    rng.shuffle(rest)
    mine: list[Task] = []
    taken: Counter[tuple[str, ...]] = Counter(task.systems for task in common)
    queues: dict[tuple[int, tuple[str, ...]], list[Task]] = {}
    for task in rest:
        queues.setdefault((covered.get(task.id, 0), task.systems), []).append(task)
    while len(common) + len(mine) < settings.per_rater and queues:
        key = min(queues, key=lambda key: (key[0], taken[key[1]], -len(queues[key]), key[1]))
        mine.append(queues[key].pop())
        taken[key[1]] += 1
        if not queues[key]:
            del queues[key]
    shown = [*common, *mine, *(task for task in tasks if task.spoilt is not None)]
    rng.shuffle(shown)
    return [task.id for task in shown]
