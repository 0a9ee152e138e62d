"""What TRL's own code makes of small numbers: written to trl_losses.json, which the tests compare our losses with.

    make trl-losses        (in an environment of its own, .venv-trl; nothing of rrhf is imported)

DPO, IPO, KTO, CPO, SimPO and ORPO are given log-probabilities drawn here. GRPO and RLOO run two updates on one batch of
a tiny model, so that the second has ratios other than 1; their log-probabilities, advantages and losses are written
down.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer, RLOOConfig, RLOOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

sys.path.insert(0, str(Path(__file__).parent.parent))
from support.models import tiny_model, tiny_tokenizer

PAIRS, LONGEST = 5, 9
BETAS = (0.1, 0.5)


def drawn() -> dict[str, Any]:
    """Log-probabilities of the tokens of chosen and rejected responses, and sums of a reference near them."""
    generator = torch.Generator().manual_seed(0)
    numbers: dict[str, Any] = {}
    for kind in ("chosen", "rejected", "others"):
        lengths = torch.randint(2, LONGEST + 1, (PAIRS,), generator=generator).tolist()
        tokens = [(-3 * torch.rand(n, generator=generator)).tolist() for n in lengths]
        noise = (2 * torch.randn(PAIRS, generator=generator)).tolist()
        numbers[kind] = {"tokens": tokens, "reference": [sum(t) + e for t, e in zip(tokens, noise)]}
    return numbers


def laid_out(rows: list[list[float]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Input ids and masks of a query of one token before each row, and the rows as TRL's models give them."""
    ids = torch.ones(len(rows), LONGEST + 1, dtype=torch.long)
    mask, logprobs = torch.zeros_like(ids), torch.zeros(len(rows), LONGEST)
    for i, row in enumerate(rows):
        mask[i, 1 : len(row) + 1] = 1
        logprobs[i, : len(row)] = torch.tensor(row)
    return ids, mask, logprobs


class Outputs:
    """A model's outputs: these log-probabilities, and zeros for what TRL only logs (entropies, mean logits, …)."""

    def __init__(self, log_probs: torch.Tensor) -> None:
        self.log_probs = log_probs

    def __getattr__(self, name: str) -> torch.Tensor:
        return torch.zeros_like(self.log_probs, dtype=torch.bool if name.startswith("is_") else None)


def giving(*tables: torch.Tensor) -> Any:
    """A model that gives these log-probabilities, one table a call."""
    left = iter(tables)
    return lambda **_: Outputs(next(left))


def common(folder: str) -> dict[str, Any]:
    return {
        "output_dir": folder, "report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True,
        "save_strategy": "no", "logging_steps": 1,
    }  # fmt: skip


def dpo(numbers: dict[str, Any], beta: float, kind: str) -> list[float]:
    """The loss of each pair."""
    rows = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2)
    losses = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = DPOTrainer(
            MODEL, args=DPOConfig(**common(folder), beta=beta, loss_type=[kind]),
            train_dataset=rows, processing_class=TOKENIZER,
        )  # fmt: skip
        trainer.precompute_ref_logps = True
        for i in range(PAIRS):
            ids, mask, table = laid_out([numbers[side]["tokens"][i] for side in ("chosen", "rejected")])
            references = {
                f"ref_{side}_logps": torch.tensor([numbers[side]["reference"][i]]) for side in ("chosen", "rejected")
            }
            inputs = {"input_ids": ids, "attention_mask": mask, "completion_mask": mask, **references}
            losses.append(float(trainer._compute_loss(giving(table), inputs, return_outputs=False)))
    return losses


def kto(numbers: dict[str, Any], beta: float) -> dict[str, Any]:
    """The mean loss over all responses, and the KL that TRL takes from other responses."""
    rows = Dataset.from_list([{"prompt": "a", "completion": text, "label": text == "b"} for text in "bcbc"])
    with tempfile.TemporaryDirectory() as folder:
        trainer = KTOTrainer(
            MODEL, args=KTOConfig(**common(folder), beta=beta), train_dataset=rows,
            processing_class=TOKENIZER,
        )  # fmt: skip
        trainer.precompute_ref_logps = True
        ids, mask, table = laid_out([row for side in ("chosen", "rejected") for row in numbers[side]["tokens"]])
        other_ids, other_mask, other_table = laid_out(numbers["others"]["tokens"] * 2)
        # a KL above 0: the others' reference lies below
        reference = [sum(row) - 0.4 for row in numbers["others"]["tokens"]] * 2
        inputs = {
            "input_ids": ids, "attention_mask": mask, "completion_mask": mask,
            "label": torch.tensor([True] * PAIRS + [False] * PAIRS),
            "ref_logps": torch.tensor(numbers["chosen"]["reference"] + numbers["rejected"]["reference"]),
            "KL_input_ids": other_ids, "KL_attention_mask": other_mask, "KL_completion_mask": other_mask,
            "ref_KL_logps": torch.tensor(reference),
        }  # fmt: skip
        loss = trainer._compute_loss(giving(other_table, table), inputs, return_outputs=False)
        return {"loss": float(loss), "kl": trainer._metrics["eval"]["kl"][-1]}


def without_reference(numbers: dict[str, Any], beta: float) -> dict[str, list[float]]:
    """CPO of sums, SimPO and ORPO of means: the losses of the pairs, ORPO's not yet multiplied by its λ."""
    sums = {side: torch.tensor([sum(row) for row in numbers[side]["tokens"]]) for side in ("chosen", "rejected")}
    means = {
        side: torch.tensor([sum(row) / len(row) for row in numbers[side]["tokens"]]) for side in ("chosen", "rejected")
    }
    plain = {"alpha": 0.0, "label_smoothing": 0.0, "accelerator": SimpleNamespace(device="cpu"), "beta": beta}
    cpo = SimpleNamespace(**plain, loss_type="sigmoid")
    simpo = SimpleNamespace(**plain, loss_type="simpo", simpo_gamma=GAMMA)
    orpo = SimpleNamespace(**plain)
    return {
        "cpo": CPOTrainer.cpo_loss(cpo, sums["chosen"], sums["rejected"])[0].tolist(),
        "simpo": CPOTrainer.cpo_loss(simpo, means["chosen"], means["rejected"])[0].tolist(),
        "orpo": (-ORPOTrainer.odds_ratio_loss(orpo, means["chosen"], means["rejected"])[0] / beta).tolist(),
    }


def policy_gradient(kind: Any, config: Any, **options: Any) -> list[dict[str, Any]]:
    """Two updates on one batch of 2 queries with 4 responses each: what the loss was made of and what it was."""
    rewards: list[float] = []

    def reward(completions: list[str], **_: Any) -> list[float]:
        generator = torch.Generator().manual_seed(3)
        rewards[:] = torch.randn(len(completions), generator=generator).tolist()
        return list(rewards)

    seen: list[dict[str, Any]] = []

    class Recording(kind):  # type: ignore[misc]
        def _get_per_token_logps_and_entropies(self, *args: Any, **arguments: Any) -> Any:
            found = super()._get_per_token_logps_and_entropies(*args, **arguments)
            self.last = found[0].detach()
            return found

        def _compute_loss(self, model: Any, inputs: Any) -> Any:
            loss = super()._compute_loss(model, inputs)
            mask = inputs["completion_mask"].bool()
            tables = {"now": self.last}
            for name, key in (("old", "old_per_token_logps"), ("reference", "ref_per_token_logps")):
                if inputs.get(key) is not None:
                    tables[name] = inputs[key]
            rows = {name: [row[m].tolist() for row, m in zip(table, mask)] for name, table in tables.items()}
            sums = {"old_sums": inputs["old_logps"].tolist()} if "old_logps" in inputs else {}
            step = {"advantages": inputs["advantages"].tolist(), "loss": float(loss), "rewards": list(rewards)}
            seen.append({**rows, **sums, **step})
            return loss

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        Recording(
            MODEL,
            reward_funcs=reward,
            args=config(
                **common(folder), num_generations=4, per_device_train_batch_size=8, gradient_accumulation_steps=1,
                max_completion_length=6, num_iterations=2, max_steps=2, learning_rate=0.6, optim="sgd",
                max_grad_norm=100.0, lr_scheduler_type="constant", temperature=1.0, **options,
            ),
            train_dataset=Dataset.from_list([{"prompt": "ab"}, {"prompt": "cd"}]),
            processing_class=TOKENIZER,
        ).train()  # fmt: skip
    return seen


def saved() -> str:
    """The folder of a tiny model: TRL loads references from where a model came from."""
    folder = tempfile.mkdtemp()
    tiny_model("llama", len(TOKENIZER)).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


TOKENIZER = tiny_tokenizer()
MODEL = saved()
GAMMA = 0.7
# The paper's GRPO: a mean over each response's tokens, and k3 as it is. By default TRL 1.16 takes means over the
# batch's tokens ("dapo") and multiplies k3 by the ratio.
PAPERS = {"loss_type": "grpo", "use_bias_correction_kl": False}


def main() -> None:
    numbers = drawn()
    found = {
        "trl": importlib.metadata.version("trl"),
        "numbers": numbers,
        "simpo_gamma": GAMMA,
        "losses": {
            str(beta): {
                "dpo": dpo(numbers, beta, "sigmoid"),
                "ipo": dpo(numbers, beta, "ipo"),
                "kto": kto(numbers, beta),
                **without_reference(numbers, beta),
            }
            for beta in BETAS
        },
        "grpo": {
            "epsilon": 0.2,
            "beta": 0.3,
            "steps": policy_gradient(GRPOTrainer, GRPOConfig, beta=0.3, epsilon=0.2, **PAPERS),
        },
        "rloo": {"epsilon": 0.2, "steps": policy_gradient(RLOOTrainer, RLOOConfig, beta=0.0, epsilon=0.2)},
    }
    place = Path(__file__).with_name("trl_losses.json")
    place.write_text(json.dumps(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
