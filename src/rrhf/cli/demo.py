"""rrhf demo: SmolLM2 continues IMDB reviews, and RRHF makes the continuations more positive."""

from __future__ import annotations

import sys
from pathlib import Path

from rrhf.cli.parser import PlainParser
from rrhf.cli.run import checked, execute

# An adapter takes ten times the learning rate of the weights themselves (docs/adapters.md).
ADAPTER = ["train.learning_rate=5e-4"]


def main(arguments: list[str]) -> int:
    parser = PlainParser("demo", __doc__)
    files = parser.add_argument_group("files")
    files.add_argument("--output", help="the run folder; default: runs/demo, or runs/demo-quick")
    settings = parser.add_argument_group("settings")
    settings.add_argument(
        "overrides", nargs="*", default=[], help="section.key=value, laid over the demo's configuration"
    )
    sizes = parser.add_argument_group("size; default: the largest that ends within ten minutes on this machine")
    choice = sizes.add_mutually_exclusive_group()
    choice.add_argument(
        "--quick", dest="size", action="store_const", const="quick", help="its shape in a minute or two"
    )
    choice.add_argument("--small", dest="size", action="store_const", const="small", help="a third of the whole demo")
    choice.add_argument("--full", dest="size", action="store_const", const="full", help="the whole demo")
    options = parser.parse_intermixed_args(arguments)
    output = Path(options.output or ("runs/demo-quick" if options.size == "quick" else "runs/demo"))
    adapted = any(override.startswith("train.peft=") for override in options.overrides)
    overrides = (ADAPTER if adapted else []) + options.overrides
    if options.size is None and not (output / "config.yaml").exists():  # mistyped keys are not to cost a measurement
        checked("demo", overrides, output)
    return execute(configuration(output, options.size), overrides, output)


def configuration(output: Path, size: str | None) -> str:
    """The configuration of the size asked for; else of the run that stands in ``output``; else what suits this machine.

    A machine is measured once: what was chosen stands in the run's config.yaml, and the run goes on with that.
    """
    from rrhf.recipes.demo.sizes import SIZES, choose_size, estimate_sizes

    if size is not None:
        return SIZES[size]
    begun = output / "config.yaml"
    if begun.exists():
        return str(begun)
    print("measuring this machine for a few seconds …", file=sys.stderr, flush=True)
    estimates = estimate_sizes()
    chosen = choose_size(estimates)
    for name, minutes in estimates.items():
        mark = "  ← runs now" if name == chosen else f"  --{name}"
        print(f"  {name:<6} about {minutes:4.1f} minutes{mark}", file=sys.stderr, flush=True)
    return SIZES[chosen]
