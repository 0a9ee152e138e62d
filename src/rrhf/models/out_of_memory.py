"""Where a device's memory runs out: the same work in halves, said, and remembered for what comes after.

The numbers of a response do not depend on what is computed beside it (as far as the arithmetic of differently shaped
matrix products agrees), so less at a time is the same work.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import nn

from rrhf.common.errors import UserError
from rrhf.models.batching import Forward, plan_forwards
from rrhf.models.devices import give_back_memory
from rrhf.models.tokenization import EncodedRecord

log = logging.getLogger("rrhf")

T = TypeVar("T")

_LIMIT = "_rrhf_tokens_that_fit"  # the attribute in which a model carries what was found out


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory did not suffice, on whatever device; in a function of the user's too."""
    if isinstance(error, UserError) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    words = ("out of memory", "can't allocate memory", "STATUS_ALLOC_FAILED")  # of MPS; of CPUs; of cuBLAS and cuDNN
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def attempt(work: Callable[[], T]) -> tuple[T | None, str | None]:
    """What ``work`` returns and None, or None and what it said where memory ran out.

    Nothing holds the tensors of the failed attempt when this returns.
    """
    try:
        return work(), None
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        lack = (str(error).splitlines() or [""])[0] or type(error).__name__
    give_back_memory()
    return None, lack


def in_halves(work: Callable[[int], T], size: int, stage: str, what: str, flag: str) -> tuple[T, int]:
    """``work(size)``, with half the size for as long as memory runs out; returns its result and the size that fitted.

    Args:
        stage: which says so.
        what: of what there are ``size``, in the plural.
        flag: the flag that sets it.

    Raises:
        UserError: not even one fits.
    """
    while True:
        done, lack = attempt(partial(work, size))
        if lack is None:
            return done, size  # type: ignore[return-value]
        if size <= 1:
            raise UserError(_nothing_fits(lack, f"even with one of the {what} at a time"))
        size //= 2
        log.warning(f"{stage}: out of memory ({lack}): {size} {what} at a time from here on ({flag})")


def run_forwards(
    model: nn.Module, records: Sequence[EncodedRecord], budget: int, path: str, run: Callable[[Forward], T]
) -> Iterator[tuple[Forward, T]]:
    """Plan the records' forward passes (``plan_forwards``) and ``run`` each; yields it with its result.

    A pass for which memory does not suffice is run again in smaller ones, and so are all later ones of ``model``.

    Raises:
        UserError: a pass over one response does not fit.
    """
    waiting = deque(plan_forwards(records, min(budget, vars(model).get(_LIMIT, budget)), path))
    while waiting:
        forward = waiting.popleft()
        done, lack = attempt(partial(run, forward))
        if lack is None:
            yield forward, done  # type: ignore[misc]
        else:
            limit, smaller = smaller_forwards(forward.records, min(budget, vars(model).get(_LIMIT, budget)), path, lack)
            vars(model)[_LIMIT] = limit
            waiting.extendleft(reversed(smaller))


def smaller_forwards(records: Sequence[EncodedRecord], budget: int, path: str, lack: str) -> tuple[int, list[Forward]]:
    """The largest half, quarter, … of ``budget`` with which the records take more passes, and those; says so.

    Raises:
        UserError: they cannot take more.
    """
    passes = _passes(plan_forwards(records, budget, path))
    limit = budget
    while limit > 1:
        limit //= 2
        smaller = plan_forwards(records, limit, path)
        if _passes(smaller) > passes:
            log.warning(f"out of memory ({lack}): {limit} tokens a forward from here on (--max_tokens_per_forward)")
            return limit, smaller
    raise UserError(_nothing_fits(lack, "even with one response in a forward pass"))


def _passes(forwards: Sequence[Forward]) -> int:
    return sum(len(forward.slices) or 1 for forward in forwards)


def _nothing_fits(lack: str, how: str) -> str:
    return (
        f"out of memory, {how} ({lack}). What is finished is kept: give --dtype bfloat16, a smaller --max_length or "
        "--max_new_tokens, another --device or a smaller model, then run the same command again"
    )
