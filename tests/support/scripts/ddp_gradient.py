"""Train with the loss argv[2], which is not finite, or whose gradient is not, on one process's record.

Each process writes what it was told to RANK.txt.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from rrhf.common.errors import UserError
from rrhf.common.launch import end_process_group
from support.models import tiny_model, tiny_tokenizer, toy_records


def records() -> list[Any]:
    made = toy_records(4, seed=1, responses=(2, 3))
    return [dataclasses.replace(made[0], scores=[9.0, *made[0].scores[1:]]), *made[1:]]


def main(folder: Path, loss: str) -> None:
    from rrhf.training.config import RRHFConfig
    from rrhf.training.trainer import RRHFTrainer

    sys.path.insert(0, str(folder))  # the loss lies there
    tokenizer = tiny_tokenizer()
    args = RRHFConfig(
        output_dir=str(folder), bf16=False, report_to="none", save_strategy="no", disable_tqdm=True, max_steps=2,
        max_tokens_per_forward=40,
        gradient_accumulation_steps=2, ranking_loss=f"rooted_losses:{loss}", ddp_timeout=240,
    )  # fmt: skip
    model = tiny_model("llama", len(tokenizer))
    trainer = RRHFTrainer(model=model, args=args, train_dataset=records(), processing_class=tokenizer)
    try:
        trainer.train()
    except UserError as error:
        (folder / f"{os.environ['RANK']}.txt").write_text(str(error))


if __name__ == "__main__":
    faulthandler.dump_traceback_later(180, exit=True)  # processes that wait for each other end with the place
    main(Path(sys.argv[1]), sys.argv[2])
    end_process_group()
