"""Faults in every stage, many times: what each injected, and what was lost (zero, or the exit code is 1).

``make test-faults``, and by hand: ``python tests/faults/run_faults.py --stages train,ppo --faults kill --kills 5``.
Each stage is killed with SIGKILL at 50 random moments at least, and meets every other fault from 5 seeds. The numbers
behind "seed" draw everything: the same fault can be put in again.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from faults.injection import FAULTS, applies, inject
from faults.stages import STAGES, a_world


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="moments at which each stage is killed, at least")
    parser.add_argument("--others", type=int, default=5, help="seeds of every other fault")
    parser.add_argument("--seed", type=int, default=0, help="the first")
    parser.add_argument("--stages", default=",".join(STAGES))
    parser.add_argument("--faults", default=",".join(FAULTS))
    options = parser.parse_args()
    outcomes = []
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as place, a_world(Path(place)) as world:
        for stage in options.stages.split(","):
            print(f"{stage}: {world.moments(stage)} moments", flush=True)
            for fault in options.faults.split(","):
                kills, seed = 0, options.seed
                while applies(fault, stage) and (
                    kills < options.kills if fault == "kill" else seed < options.seed + options.others
                ):
                    outcomes.append(inject(world, stage, fault, seed))
                    kills += outcomes[-1].kills
                    seed += 1
                    print(outcomes[-1].line(), flush=True)
    bad = sum(bool(outcome.lost) for outcome in outcomes)
    killed = sum(outcome.kills for outcome in outcomes)
    minutes = (time.monotonic() - began) / 60
    print(f"{len(outcomes)} faults, {killed} kills, {minutes:.0f} minutes; something was lost in {bad}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
