"""rrhf baseline: RRHF's rivals on the same records, sampler, rewards and report: sft, best-of-n and others."""

from __future__ import annotations

import importlib
from typing import NamedTuple

from rrhf.common.errors import UserError, nearest


class Baseline(NamedTuple):
    """A rival: what the overview says of it, and the module whose ``main(arguments, name)`` is its command."""

    description: str
    module: str


# A new baseline is a line here and a module of rrhf.cli.baselines, which reads flags and calls rrhf.recipes.baselines.
BASELINES = {
    "sft": Baseline("fine-tune on the best or the chosen response of each query", "sft"),
    "best-of-n": Baseline("n samples a prompt at inference, the best kept: reward as a function of n", "best_of_n"),
    "ppo": Baseline("reinforcement learning: clipped surrogate, value function, KL penalty a token", "ppo"),
    "nlpo": Baseline("PPO that draws from the likeliest tokens of a lagged policy alone (RL4LMs)", "ppo"),
}


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "--help-all", "help"):
        print(_overview())
        raise SystemExit(0)
    name, *rest = arguments
    if name not in BASELINES:
        raise UserError(f"unknown baseline {name!r}: {nearest(name, BASELINES)}")
    module = importlib.import_module(f"rrhf.cli.baselines.{BASELINES[name].module}")
    return int(module.main(rest, f"baseline {name}") or 0)


def _overview() -> str:
    width = max(map(len, BASELINES))
    lines = [f"  rrhf baseline {name:<{width}}  {baseline.description}" for name, baseline in BASELINES.items()]
    return "\n".join(
        ["usage: rrhf baseline NAME [flags]", "", str(__doc__), "", *lines, "", "rrhf baseline NAME --help says more."]
    )
