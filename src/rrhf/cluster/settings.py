"""Whether and how a stage's work is done on a Ray cluster."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from rrhf.common.errors import UserError, too_small


@dataclass(frozen=True)
class ClusterSettings:
    """Where ``cluster`` is None, all is done in this process and Ray is not imported."""

    cluster: str | None = field(
        default=None,
        metadata={"help": "work on a Ray cluster: auto (the one that runs on this machine), local (one of this "
                  "machine, for this command alone), or HOST:PORT; default: in this process"},
    )  # fmt: skip
    cluster_workers: int | None = field(
        default=None, metadata={"help": "processes there that work; default: as many as there is room for"}
    )
    cluster_cpus: float = field(default=1.0, metadata={"help": "CPUs of each process, and its threads"})
    cluster_gpus: float | None = field(
        default=None,
        metadata={"help": "GPUs of each process, 0.5 for two on one; default: 1 where there are GPUs, but for "
                  "--device cpu"},
    )  # fmt: skip
    cluster_failures: int = field(
        default=100,
        metadata={"help": "sampling and scoring: most responses or records that may fail again and again, each tried "
                  "by itself at last: they are left null, or without a response, and counted; one more stops the work"},
    )  # fmt: skip
    cluster_restarts: int = field(
        default=10, metadata={"help": "training: how often it goes on from its last checkpoint after a process died"}
    )

    def __post_init__(self) -> None:
        faults = too_small(self, cluster_workers=1, cluster_failures=0, cluster_restarts=0)
        if not 0 < self.cluster_cpus < math.inf:
            faults.append(f"--cluster_cpus {self.cluster_cpus}: must be a number above 0")
        gpus = self.cluster_gpus
        if gpus is not None and not (0 <= gpus < 1 or (gpus < math.inf and gpus == int(gpus))):
            faults.append(f"--cluster_gpus {gpus}: must be a share of one GPU, or a whole number of them")
        if self.cluster is not None and self.cluster.startswith("ray://"):
            faults.append(
                f"--cluster {self.cluster}: Ray's client cannot do this: run the command on a node of the cluster "
                "(ray job submit) with --cluster auto"
            )
        elif self.cluster not in (None, "auto", "local") and not str(self.cluster).rpartition(":")[2].isdecimal():
            faults.append(f"--cluster {self.cluster}: give auto, local or HOST:PORT")
        if faults:
            raise UserError("\n".join(faults))
