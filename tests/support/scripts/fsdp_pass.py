"""One training step with the model's weights sharded over two CPU processes (FSDP2); process 0 saves the gradients."""

from __future__ import annotations

import faulthandler
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import torch

from rrhf.common.launch import end_process_group
from support.models import tiny_model, tiny_tokenizer, toy_records

# name: (family, tokens a forward, the records of process 0 and of process 1). The processes make unequal numbers of
# passes, with and without a graph; in one case process 1 has nothing to do at all.
CASES: dict[str, tuple[str, int, tuple[list[int], list[int]]]] = {
    "tree": ("llama", 512, ([0, 1, 2], [3, 4])),
    "two-pass": ("llama-tied", 24, ([0, 1, 2, 3], [4])),
    "idle": ("llama", 24, ([0, 1, 2], [])),
    "kto": ("llama", 24, ([0, 1, 2, 3], [4])),  # a pass over the whole step comes first
}
REFERENCE = "logprob-sum:made up"
LOSSES: dict[str, dict[str, Any]] = {"kto": {"ranking_loss": "kto", "dpo_beta": 0.02, "sft_weight": 0.5}}


def records() -> list[Any]:
    made = toy_records(5, seed=5, responses=(3, 5))
    for record in made:
        record.rewards[REFERENCE] = [-6.0 * len(text) - 10 for text in record.responses]  # of a worse model
    return made


def as_under_accelerate(trainer: Any) -> None:
    """Let the trainer and its accelerator know that the weights are sharded by FSDP2, as a launch with it does."""
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    state = trainer.accelerator.state
    state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, FullyShardedDataParallelPlugin(fsdp_version=2)
    trainer.is_fsdp_enabled = True
    assert trainer.accelerator.is_fsdp2


def watch_gradients(trainer: Any, model: Any) -> list[set[bool]]:
    """After each backward pass: whether the gradients stand at the sharded parameters, and nowhere as whole ones."""
    from torch.distributed.fsdp import FSDPModule

    seen: list[set[bool]] = []
    backward = trainer.accelerator.backward

    def watched(*args: Any, **kwargs: Any) -> None:
        backward(*args, **kwargs)
        groups = [m._get_fsdp_state()._fsdp_param_group for m in model.modules() if isinstance(m, FSDPModule)]
        whole = [p.unsharded_accumulated_grad for group in groups if group is not None for p in group.fsdp_params]
        sharded = all(parameter.grad is not None for parameter in model.parameters())
        seen.append({sharded and all(gradient is None for gradient in whole)})

    trainer.accelerator.backward = watched
    return seen


def main(folder: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Shard

    from rrhf.models.attention import our_attention
    from rrhf.training.config import RRHFConfig
    from rrhf.training.trainer import RRHFTrainer

    tokenizer = tiny_tokenizer()
    for case, (family, budget, shares) in CASES.items():
        args = RRHFConfig(
            output_dir=str(folder), bf16=False, report_to="none", max_tokens_per_forward=budget, ddp_timeout=240,
            **LOSSES.get(case, {}),
        )  # fmt: skip
        model: Any = tiny_model(family, len(tokenizer))
        trainer = RRHFTrainer(
            model=model, args=args, train_dataset=records(), processing_class=tokenizer, reference_sums=REFERENCE
        )
        assert trainer.path == "tree"
        mesh = init_device_mesh("cpu", (2,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        for name, parameter in model.named_parameters():
            assert isinstance(parameter, DTensor), name
            assert parameter.placements == (Shard(0),), name
            assert parameter.to_local().numel() * 2 == parameter.numel(), name
        mine = [trainer.train_dataset[i] for i in shares[args.process_index]]
        as_under_accelerate(trainer)
        seen = watch_gradients(trainer, model)
        with our_attention(model):
            loss = trainer.training_step(model, mine, num_items_in_batch=sum(map(len, shares)))
        assert len(seen) > 1 or case == "tree"
        assert all(each == {True} for each in seen), seen  # between two forwards no process keeps whole gradients
        mean = float(trainer._over_processes(float(loss)).mean())  # as the trainer logs it
        gradients = {}
        for name, parameter in model.named_parameters():
            assert isinstance(parameter, DTensor), name  # sharded again after the step
            assert isinstance(parameter.grad, DTensor), name
            gradients[name] = parameter.grad.full_tensor()
        evaluated = trainer.evaluate(records()[:1])["eval_loss"]  # process 1 has no record, and takes part
        losses = {"loss": torch.tensor(mean), "eval_loss": torch.tensor(evaluated)}
        if args.process_index == 0:
            torch.save({**losses, **gradients}, folder / f"{case}.pt")


if __name__ == "__main__":
    faulthandler.dump_traceback_later(180, exit=True)  # processes that wait for each other end with the place
    main(Path(sys.argv[1]))
    end_process_group()
