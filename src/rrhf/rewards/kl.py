"""KL shaping: a reward less what its policy has strayed from the reference. Pure functions of numbers.

With s^π = Σ_t log π(y_t | x, y_<t), and s^ρ likewise, a response's shaped score is (Ziegler et al. 2019, Eq. 2,
arXiv 1909.08593)

    R'(x, y) = R(x, y) − β (s^π − s^ρ)

Over responses that π drew, the mean of s^π − s^ρ estimates KL(π ‖ ρ) in nats a response.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rrhf.common.errors import UserError
from rrhf.records.record import Record


def log_ratios(policy: Sequence[float | None], reference: Sequence[float | None]) -> list[float | None]:
    """s^π − s^ρ of each response, in nats; None where one of them is None.

    Args:
        policy, reference: sums of log-probabilities, one a response.
    """
    pairs = zip(policy, reference, strict=True)
    return [None if pi is None or rho is None else pi - rho for pi, rho in pairs]


def kl_shaped(scores: Sequence[float | None], ratios: Sequence[float | None], beta: float) -> list[float | None]:
    """R − β (s^π − s^ρ) of each response; None where one of them is None.

    Args:
        scores: R, one a response.
        ratios: s^π − s^ρ, one a response (``log_ratios``).
        beta: β ≥ 0, in units of the reward a nat.
    """
    pairs = zip(scores, ratios, strict=True)
    return [None if score is None or ratio is None else score - beta * ratio for score, ratio in pairs]


def adapted_beta(beta: float, kl: float, target: float, gain: float = 0.1, clip: float = 0.2) -> float:
    """The next β of a controller that holds KL near a target: β (1 + K · clip(KL / target − 1, −clip, clip)).

    Section 2.2 of arXiv 1909.08593: the proportional error is clipped, so that β changes by at most K · clip, 2 %,
    an update.

    Args:
        beta: the present β.
        kl: measured KL(π ‖ ρ), in nats a response.
        target: the KL to hold, above 0.
        gain: K, how fast β follows.
        clip: the largest error that counts.
    """
    return beta * (1 + gain * min(max(kl / target - 1, -clip), clip))


@dataclass(frozen=True)
class Shaping:
    """β, and the names under which ``Record.rewards`` has the sums of π and of ρ."""

    beta: float
    policy: str
    reference: str

    def shaped(self, record: Record, scores: Sequence[float | None]) -> list[float | None]:
        """``scores``, one a response of ``record``, shaped (``kl_shaped``).

        Raises:
            UserError: the record lacks the sums of one of the two.
        """
        for name in (self.policy, self.reference):
            if name not in record.rewards:
                raise UserError(
                    f"record {record.id!r} has no {name!r} to shape its scores with (it has "
                    f"{', '.join(record.rewards) or 'none'}): score it with --reference_model and --model"
                )
        return kl_shaped(scores, log_ratios(record.rewards[self.policy], record.rewards[self.reference]), self.beta)
