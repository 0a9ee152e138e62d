"""Sampling and scoring on a Ray cluster: parts stream through actors that hold a model (Ray Data).

This process reads the input and writes the parts, so the nodes need not share a disk. Ray Data hands the parts out as
there is room for them and holds the reading back meanwhile. A process that dies, or a node, takes along only the parts
in its hands: Ray starts the process anew, the others go on, and those parts are made again (``ladder.py``). Ray itself
repeats nothing: a part that kills whoever touches it would go round for ever, and one whose node is gone would wait for
another like it.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rrhf.cluster.connection import Share, connected, share, this_node
from rrhf.cluster.hand import Hand, outcome_in, unit_of, unit_table
from rrhf.cluster.ladder import Ladder, Outcome, Unit
from rrhf.cluster.settings import ClusterSettings
from rrhf.common.errors import UserError
from rrhf.records.elsewhere import Answer, Away, Read
from rrhf.records.record import Record

if TYPE_CHECKING:
    import pyarrow as pa

log = logging.getLogger("rrhf")

IDLE_PASSES = 3  # passes in a row that the cluster broke off before anything came


def open_pool(settings: ClusterSettings, device: str = "auto") -> RayPool | None:
    """The pool that ``settings`` ask for; None where the work is to be done in this process."""
    return None if settings.cluster is None else RayPool(settings, device)


@dataclass(frozen=True)
class RayPool:
    """The actors of a cluster as a ``Pool``. ``device``: where models are to be; ``cpu`` takes no GPU."""

    settings: ClusterSettings
    device: str = "auto"

    def make(
        self, step: str, away: Away, numbers: Sequence[int], read: Read
    ) -> Iterator[tuple[int, list[Record], Counter[str]]]:
        ladder = Ladder(step, away, numbers, read, self.settings.cluster_failures)
        with connected(self.settings):
            idle = 0
            while units := ladder.next_pass():
                mine, came = share(self.settings, self.device), 0
                log.info(f"{step}: {len(units)} {UNITS[units[0].rung]} on the cluster, {mine}")
                one = _Pass(units, ladder, mine)
                for unit, outcome in one:
                    came += 1
                    yield from ladder.took(unit, outcome)
                if one.error is None:  # it ended by itself: what is missing goes down the ladder, which ends
                    yield from ladder.missed(units)
                    idle = 0
                    continue
                log.warning(f"{step}: the cluster lost work, which is done again: {_short(one.error)}")
                idle = 0 if came else idle + 1
                if idle == IDLE_PASSES and ladder.next_pass():
                    raise UserError(f"{step}: nothing came of {idle} tries on the cluster: {_short(one.error)}")


UNITS = ("parts", "records by themselves", "responses or records in a process each")


class _Pass:
    """One pass of units through the cluster; ``error`` says what ended it early, if anything did."""

    def __init__(self, units: list[Unit], ladder: Ladder, mine: Share) -> None:
        self.units, self.ladder, self.share = units, ladder, mine
        self.error: Exception | None = None

    def __iter__(self) -> Iterator[tuple[Unit, Outcome]]:
        rung = self.units[0].rung
        with _streaming():
            rows = iter(_through(self._source(rung), self.ladder.away.open, self.share, alone=rung == 2).iter_rows())
            while True:
                try:
                    row = next(rows, None)
                except UserError:
                    raise
                except Exception as error:  # whatever Ray wraps the loss of a node or of an object in
                    self.error = error
                    return
                if row is None:
                    return
                yield unit_of(row), outcome_in(row)

    def _source(self, rung: int) -> Any:
        """The units as a data set, a block each: parts are read as they are wanted, by this machine."""
        import ray.data

        if rung:
            return ray.data.from_arrow([unit_table(unit, self.ladder.records(unit)) for unit in self.units])
        numbers, read = [unit.number for unit in self.units], self.ladder.read

        def tables() -> Iterator[pa.Table]:
            for number, records in read(numbers):
                yield unit_table(Unit(number), records)

        here = {"ray.io/node-id": this_node()}
        return ray.data.read_datasource(_stream(tables), override_num_blocks=1, num_cpus=0, label_selector=here)


def _through(source: Any, opened: Callable[[], Answer], mine: Share, alone: bool) -> Any:
    """The data set with every unit answered: by actors, or ``alone`` by a process of its own each."""
    from ray.data import ActorPoolStrategy, TaskPoolStrategy

    folder = str(Path.cwd())
    common = {"batch_size": 1, "batch_format": "pyarrow", "num_cpus": mine.cpus, "num_gpus": mine.gpus or None}
    if alone:
        return source.map_batches(
            lambda batch: Hand(opened, folder)(batch),
            compute=TaskPoolStrategy(mine.workers),
            max_calls=1,
            max_retries=0,
            **common,
        )
    return source.map_batches(
        Hand,
        fn_constructor_args=(opened, folder),
        compute=ActorPoolStrategy(size=mine.workers, max_tasks_in_flight_per_actor=1),
        max_restarts=-1,
        max_task_retries=0,
        **common,
    )


@contextmanager
def _streaming() -> Iterator[None]:
    """Ray Data as it is needed here: a block a unit, and a block that fails ends nothing."""
    from ray.data import DataContext

    context = DataContext.get_current()
    wanted = {
        "target_max_block_size": 1,
        "max_errored_blocks": -1,
        "enable_progress_bars": False,
        "print_on_execution_start": False,
    }
    before = {name: getattr(context, name) for name in wanted}
    loggers = [logging.getLogger(name) for name in ("ray.data", "ray.data._internal")]
    levels = [logger.level for logger in loggers]
    for name, value in wanted.items():
        setattr(context, name, value)
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)  # the ladder says what failed
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def _stream(tables: Callable[[], Iterator[pa.Table]]) -> Any:
    """A data source of one task, which gives one block after another as they are wanted."""
    from ray.data import Datasource, ReadTask
    from ray.data.block import BlockMetadata

    class Stream(Datasource):
        def estimate_inmemory_data_size(self) -> int | None:
            return None

        def get_read_tasks(self, parallelism: int, *unused: Any, **also_unused: Any) -> list[Any]:
            return [ReadTask(tables, BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None))]

    return Stream()


def _short(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
