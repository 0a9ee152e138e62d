"""rrhf demo: SmolLM2 continues IMDB reviews, and RRHF makes the continuations more positive."""

from __future__ import annotations

from pathlib import Path

from rrhf.cli.parser import PlainParser
from rrhf.cli.run import execute

# The shape of it in two minutes: too small for the figures to mean much.
QUICK = ["data.limit=32", "data.held_out_limit=32", "train.num_train_epochs=1"]

# An adapter takes ten times the learning rate of the weights themselves (docs/adapters.md).
ADAPTER = ["train.learning_rate=5e-4"]


def main(arguments: list[str]) -> int:
    parser = PlainParser("demo", __doc__)
    files = parser.add_argument_group("files")
    files.add_argument("--output", help="the run folder; default: runs/demo, or runs/demo-quick")
    settings = parser.add_argument_group("settings")
    settings.add_argument("overrides", nargs="*", help="section.key=value, laid over the demo's configuration")
    settings.add_argument("--quick", action="store_true", help="the shape of it in 2 minutes")
    options = parser.parse_intermixed_args(arguments)
    output = options.output or ("runs/demo-quick" if options.quick else "runs/demo")
    adapted = any(override.startswith("train.peft=") for override in options.overrides)
    overrides = (QUICK if options.quick else []) + (ADAPTER if adapted else []) + options.overrides
    return execute("demo", overrides, Path(output))
