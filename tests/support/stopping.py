"""A training that is stopped in the middle, as by Ctrl-C, and one that goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import pytest

from rrhf.training.callbacks import ShowProgress

T = TypeVar("T")


def stopped_at(step: int, train: Callable[[], object]) -> None:
    """Run ``train`` until it has made so many optimiser steps."""
    shown = ShowProgress.on_step_end

    def stop(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == step:
            raise KeyboardInterrupt
        shown(self, args, state, control, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ShowProgress, "on_step_end", stop)
        train()


def went_on_at(step: int, train: Callable[[], T]) -> T:
    """Run ``train``, of which this must be the first optimiser step that it makes."""
    shown, made = ShowProgress.on_step_end, []

    def note(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        made.append(state.global_step)
        shown(self, args, state, control, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShowProgress, "on_step_end", note)
        result = train()
    assert made[0] == step
    return result
