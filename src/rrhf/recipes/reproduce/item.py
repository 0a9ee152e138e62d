"""One arm from one seed at one learning rate: where it stands and all that is needed to carry it out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from rrhf.common.errors import UserError
from rrhf.common.flags import Flags, as_arguments
from rrhf.models.cache import PolicyCache
from rrhf.models.load import ModelSettings
from rrhf.recipes.config import RunConfig, parse_config
from rrhf.recipes.offline import Pass
from rrhf.recipes.reproduce.arms import BEST_OF, START
from rrhf.recipes.reproduce.place import Item, Place
from rrhf.recipes.reproduce.scale import Scale
from rrhf.recipes.run_folder import RunFolder
from rrhf.training.ppo_settings import PPOConfig


@dataclass(frozen=True)
class Work:
    """An item with all that is needed to carry it out."""

    place: Place
    scale: Scale  # its configuration's data are the files of prompts
    item: Item
    values: dict[str, Any]
    config: RunConfig
    run: RunFolder

    @property
    def best_of_n(self) -> RunFolder:
        """Where best-of-n has its samples."""
        return RunFolder(self.run.folder / "best-of-n")

    @property
    def noted(self) -> dict[str, Any]:
        """All that the arm is made of: the run's configuration, and PPO's settings where it is PPO."""
        return self.scale.noted(self.item.arm, self.item.seed, self.item.rate)

    @property
    def last(self) -> RunFolder:
        """The folder of the last round, which is the run's where there is one round."""
        rounds = self.config.rounds.iterations
        return self.run.round(rounds) if rounds > 1 else self.run

    @property
    def whole(self) -> Pass:
        """The run as one pass; its held-out prompts are the shared ones."""
        inner = RunFolder(self.run.folder)
        inner.held_out = self.place.prompts.held_out
        return Pass(inner, self.config, self.config.model, PolicyCache(self.place.said))

    @property
    def trained(self) -> ModelSettings:
        """π."""
        model = self.config.model
        return model if self.item.arm.kind in (START, BEST_OF) else replace(model, model=str(self.run.model))


def plan(place: Place, scale: Scale, item: Item) -> Work:
    """The work of an item, all its settings checked.

    Raises:
        UserError: the arm's configuration has faults.
    """
    values = scale.configuration(item.arm, item.seed, item.rate)
    run = RunFolder(place.run(item))
    config, samples = parse_config(values, run.model), scale.held_out_samples
    sampling = config.evaluate_sampling
    if samples > 1 and (sampling.policy == "greedy" or sampling.is_beam):
        raise UserError(
            f"reproduce.held_out_samples {samples}: {sampling.policy} writes the same to a prompt each time: leave it "
            "out, or sample: evaluate.policy=top-p"
        )
    work = Work(place, scale, item, values, config, run)
    if "ppo" in work.noted:
        try:
            Flags([PPOConfig], "reproduce, ppo").parse(as_arguments(work.noted["ppo"], "reproduce"))
        except (UserError, ValueError) as error:
            raise UserError(f"reproduce.ppo: {str(error).partition('; `rrhf')[0]}") from error
    return work
