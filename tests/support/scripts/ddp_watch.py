"""Train a collapse under watch in two processes, with ``--alarm stop``; each writes what it saw to RANK.json."""

from __future__ import annotations

import faulthandler
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from rrhf.common.launch import end_process_group
from training.test_watching import TOKENIZER, collapsing, share_of_a, tiny_model, trainer_of, watched


def main(folder: Path) -> None:
    model = tiny_model("llama", len(TOKENIZER))
    trainer = trainer_of(model, folder / "model", collapsing(), max_steps=60, learning_rate=2e-2)
    watch = watched(trainer, [share_of_a], watch_steps=5, alarm="stop", alarm_correlation=0.999)
    trainer.train()
    result = {"step": trainer.state.global_step, "stopped": watch.stopped, "measured": [m.step for m in watch.measured]}
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    faulthandler.dump_traceback_later(280, exit=True)  # processes that wait for each other end with the place
    main(Path(sys.argv[1]))
    end_process_group()
