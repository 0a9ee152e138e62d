"""What training does beside its steps: stop on signals, seal checkpoints, show progress."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from rrhf.common.progress import Progress
from rrhf.training.folder import seal

log = logging.getLogger("rrhf")


class Stopped(Exception):  # noqa: N818 - it is no error
    """A signal stopped the training after a checkpoint was written; ``code`` is the exit code."""

    def __init__(self, code: int) -> None:
        super().__init__("stopped, what is finished is kept; the same command goes on from there")
        self.code = code


def mean_loss(history: Sequence[Mapping[str, Any]], otherwise: float) -> float:
    """The mean loss over the steps that ``history`` has lines of: transformers' own begins anew where a run goes on.

    ``otherwise``: where nothing was logged.
    """
    steps, total, before = 0, 0.0, 0
    for line in history:
        if "loss" in line:
            total += float(line["loss"]) * (int(line["step"]) - before)
            steps, before = steps + int(line["step"]) - before, int(line["step"])
    return total / steps if steps else otherwise


class LogAtSaves(TrainerCallback):
    """Log with every checkpoint, so that the mean loss up to there is known to a run that goes on from it."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_log = control.should_log or control.should_save


class StopOnSignal(TrainerCallback):
    """On SIGINT or SIGTERM: finish the optimiser step, write a checkpoint, stop; all processes at the same step.

    A launcher signals its processes one after another: some may have ended a step that others have not begun.
    """

    def __init__(self) -> None:
        self.signal: int | None = None  # that this process has got
        self.agreed: int | None = None  # that all of them stop for

    def agree(self, args: Any) -> int | None:
        """The signal that any of the processes has got, for which all stop; all of them ask at the same place."""
        self.agreed = self.signal
        if args.world_size > 1:
            signals = torch.tensor([self.signal or 0], device=args.device)
            torch.distributed.all_reduce(signals, torch.distributed.ReduceOp.MAX)
            self.agreed = int(signals) or None
        return self.agreed

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.agree(args) is not None:
            control.should_save = control.should_training_stop = True

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Signals wait for what is within; one that this has brought to its end all the same is sent anew behind it."""

        def remember(number: int, frame: Any) -> None:
            if self.signal is not None:
                raise KeyboardInterrupt  # asked twice: at once, from the last checkpoint
            self.signal = number
            log.info("stopping after this step; a checkpoint is written first (once more to stop at once)")

        if threading.current_thread() is not threading.main_thread():  # signals come to the main thread alone
            yield
            return
        before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if self.signal is not None:
            signal.raise_signal(self.signal)  # in the last step: what comes after the training is not begun


class ShowProgress(TrainerCallback):
    """A bar over the optimiser steps, and the metrics as lines, in place of transformers' dictionaries."""

    bar: Progress | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.bar = Progress("train", state.max_steps, "steps", done=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.count)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if self.bar is not None and logs and "train_runtime" not in logs:
            values = "  ".join(f"{name} {value:.4g}" for name, value in logs.items() if name != "epoch")
            with self.bar.set_aside():
                log.info(f"step {state.global_step}/{state.max_steps}  {values}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.__exit__(None, None, None)
            self.bar = None


class Seal(TrainerCallback):
    """Seals every checkpoint once all processes have written their files."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.world_size > 1:
            torch.distributed.barrier()
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and checkpoint.is_dir():
            seal(checkpoint)
