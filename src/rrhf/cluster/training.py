"""Training on a Ray cluster: the same ``train_model``, in as many connected processes as are asked for (Ray Train).

A process, or a node, that dies ends all of them; Ray Train starts as many anew, which go on from the last checkpoint in
the output folder. That folder, and the data, must lie on a disk that all nodes see.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rrhf.cluster.connection import Share, connected, share
from rrhf.cluster.settings import ClusterSettings
from rrhf.common.endpoint_settings import EndpointLimits
from rrhf.common.errors import UserError
from rrhf.common.files import write_text
from rrhf.common.locks import LOCK, hold, only_process, wait_until_free
from rrhf.models.adapters import AdapterSettings
from rrhf.models.load import ModelSettings
from rrhf.training.config import RRHFConfig
from rrhf.training.folder import SCRATCH, TRAINED, claimed, empty, is_trained, refuse_trained
from rrhf.training.online import Online
from rrhf.training.stage import Saved, train_model
from rrhf.training.watch_settings import WatchSettings

log = logging.getLogger("rrhf")

REFUSED = "refused.txt"  # what a process found wrong, in the scratch folder
ABORTING = 30.0  # seconds in which a training that is stopped comes to its end
DYING = 60.0  # seconds in which the processes of a dead node's group come to their end
_SECOND = (
    "{folder}: another command trains into this folder on a cluster: {{who}}. Wait for it, or choose another --output"
)


@dataclass(frozen=True)
class _Job:
    """What each process is sent."""

    place: str  # the folder where the command runs
    scratch: Path
    data: Path
    eval_data: Path | None
    model: ModelSettings
    config: dict[str, Any]
    adapter: AdapterSettings
    watch: WatchSettings | None
    online: Online | None
    saved: Saved | None
    overwrite: bool
    watch_remote: EndpointLimits | None = None


def training_on(settings: ClusterSettings | None) -> Callable[..., dict[str, Any]]:
    """``train_model``, or what does the same on the cluster that ``settings`` name."""
    return train_model if settings is None or settings.cluster is None else partial(train_on_cluster, settings)


def train_on_cluster(
    settings: ClusterSettings,
    data: Path,
    model: ModelSettings,
    config: RRHFConfig,
    adapter: AdapterSettings,
    *,
    eval_data: Path | None = None,
    overwrite: bool = False,
    watch: WatchSettings | None = None,
    watch_remote: EndpointLimits | None = None,
    saved: Saved | None = None,
    online: Online | None = None,
) -> dict[str, Any]:
    """``train_model`` on a cluster: see there for all arguments but ``settings``.

    Raises:
        UserError: as ``train_model``; or the cluster cannot do it, or processes died more often than
            ``cluster_restarts`` allows. What is finished is kept.
    """
    folder = Path(str(config.output_dir)).absolute()
    with connected(settings):
        mine = share(settings, model.device)
        with ExitStack() as held:
            with claimed(folder, config):
                _refuse_second(folder)
                if overwrite and is_trained(folder):  # no restart may remove what is finished
                    empty(folder)
                refuse_trained(folder)
                scratch = held.enter_context(_scratch(folder))
            given = {**config.as_given(), "output_dir": config.output_dir}
            job = _Job(
                str(Path.cwd()), scratch, data, eval_data, model, given, adapter, watch, online, saved, overwrite,
                watch_remote,
            )  # fmt: skip
            log.info(f"train: on the cluster, {mine}")
            _fit(settings, job, mine)
            if (scratch / REFUSED).exists():
                raise UserError((scratch / REFUSED).read_text(encoding="utf-8"))
    summary: dict[str, Any] = json.loads((folder / TRAINED).read_text(encoding="utf-8"))
    return summary


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A folder of this training in its output folder, for what its processes tell each other.

    The command holds it for as long as it lives; the output folder itself is for its processes to hold.
    """
    for old in folder.glob(f"{SCRATCH}*"):  # of a command that was killed
        shutil.rmtree(old, ignore_errors=True)
    scratch = folder / f"{SCRATCH}{uuid.uuid4().hex}"
    with only_process(scratch, _SECOND.format(folder=folder)):
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _refuse_second(folder: Path) -> None:
    for other in folder.glob(f"{SCRATCH}*"):
        with suppress(OSError):  # it came to its end just now
            hold(other / LOCK, _SECOND.format(folder=folder)).close()


def _fit(settings: ClusterSettings, job: _Job, mine: Share) -> None:
    import ray
    from ray.exceptions import RayError
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    resources = {"CPU": mine.cpus, **({"GPU": mine.gpus} if mine.gpus else {})}
    trainer = TorchTrainer(
        _train,
        train_loop_config={"job": job},
        scaling_config=ScalingConfig(num_workers=mine.workers, use_gpu=mine.gpus > 0, resources_per_worker=resources),
        run_config=RunConfig(
            name="ray",
            storage_path=str(job.scratch),
            failure_config=FailureConfig(max_failures=settings.cluster_restarts),
        ),
    )
    controllers: list[Any] = []
    trainer._register_sigint_handler = controllers.append  # Ray's own handler ends the command with exit code 0
    if settings.cluster == "local":
        _without_cleaner(trainer)
    try:
        trainer.fit()
    except (KeyboardInterrupt, SystemExit):
        for controller in controllers:
            with suppress(RayError):  # it ends itself
                ray.get(controller.abort.remote(), timeout=ABORTING)
        raise
    except (TrainingFailedError, RayError) as error:  # the latter: what leads the training died, for want of memory
        if (job.scratch / REFUSED).exists():
            return
        raise UserError(
            f"training on the cluster failed, after {settings.cluster_restarts} restarts at most (--cluster_restarts): "
            f"{_innermost(error)}. What is finished is kept, and the same command goes on from there"
        ) from error


def _without_cleaner(trainer: Any) -> None:
    """Leave out what tidies a cluster up after a training: one of our own ends with it, and lacks what that asks.

    It would warn of that every second.
    """
    every = trainer._create_default_callbacks
    trainer._create_default_callbacks = lambda: [
        callback for callback in every() if type(callback).__name__ != "PlacementGroupCleanerCallback"
    ]


def _innermost(error: BaseException) -> str:
    failures = getattr(error, "worker_failures", {})
    inner = next(iter(failures.values()), error)
    return str(inner).strip().splitlines()[-1]


def _train(settings: dict[str, Any]) -> None:
    """What each process does: it goes on from where the output folder is."""
    from ray.train import get_context
    from ray.train.collective import broadcast_from_rank_zero

    from rrhf.common.logging import set_up_logging

    job: _Job = settings["job"]
    if Path(job.place).is_dir():
        os.chdir(job.place)
    if (job.scratch / REFUSED).exists():  # by a process of the group before this one
        return
    set_up_logging()
    try:
        if not job.scratch.is_dir():
            raise UserError(
                f"{job.scratch.parent} is not the same folder on all nodes of the cluster: training needs an --output "
                "(and data) on a disk that all of them see"
            )
        done = False
        if get_context().get_world_rank() == 0:
            wait_until_free(job.scratch.parent, DYING)
            done = is_trained(job.scratch.parent)  # by the group before this one, which then died
        if not broadcast_from_rank_zero(done):
            _as_here(job)
    except UserError as error:
        if job.scratch.is_dir():
            write_text(job.scratch / REFUSED, str(error))
        raise


def _as_here(job: _Job) -> None:
    train_model(
        job.data,
        job.model,
        RRHFConfig(**job.config),
        job.adapter,
        eval_data=job.eval_data,
        overwrite=job.overwrite and not is_trained(job.scratch.parent),
        watch=job.watch,
        watch_remote=job.watch_remote,
        saved=job.saved,
        online=job.online,
    )
