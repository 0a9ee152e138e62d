"""Train the tiny models of ``CASES`` in this many processes; process 0 writes logs and weights to argv[1]."""

from __future__ import annotations

import faulthandler
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from rrhf.common.launch import end_process_group
from support.models import tiny_model, tiny_tokenizer, toy_records

# (family, options): 9 records, 4 queries a step, so that an epoch's last step has one query and one process has none
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "one-pass": ("llama-tied", {"max_tokens_per_forward": 512}),
    "two-pass": ("llama", {"max_tokens_per_forward": 24}),
    "reference": ("llama", {"max_tokens_per_forward": 24, "ranking_loss": "kto", "sft_weight": 0.1}),
    "padded": ("bloom", {"max_tokens_per_forward": 60}),
}


def train(case: str, folder: Path, queries: int) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """The log and the final weights of a case; ``queries`` a micro-batch and process."""
    from rrhf.training.config import RRHFConfig
    from rrhf.training.trainer import RRHFTrainer

    family, options = CASES[case]
    tokenizer = tiny_tokenizer()
    args = RRHFConfig(
        output_dir=str(folder / case), bf16=False, report_to="none", save_strategy="no", disable_tqdm=True,
        logging_steps=1, learning_rate=1e-2, lr_scheduler_type="linear", num_train_epochs=2,
        per_device_train_batch_size=queries, gradient_accumulation_steps=2, ddp_timeout=240, **options,
    )  # fmt: skip
    model = tiny_model(family, len(tokenizer))
    trainer = RRHFTrainer(model=model, args=args, train_dataset=toy_records(9, seed=3), processing_class=tokenizer)
    trainer.train()
    log = [line for line in trainer.state.log_history if "rank_loss" in line]
    return log, {name: value.detach().clone() for name, value in model.state_dict().items()}


def main(folder: Path) -> None:
    import torch

    for case in CASES:
        log, weights = train(case, folder, queries=1)
        if os.environ["RANK"] == "0":
            (folder / f"{case}.json").write_text(json.dumps(log))
            torch.save(weights, folder / f"{case}.pt")


if __name__ == "__main__":
    faulthandler.dump_traceback_later(180, exit=True)  # processes that wait for each other end with the place
    main(Path(sys.argv[1]))
    end_process_group()
