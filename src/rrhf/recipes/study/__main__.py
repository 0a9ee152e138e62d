"""python -m rrhf.recipes.study RESULTS.jsonl … --output PAGE.md: the page of claims from exported results."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rrhf.common.errors import UserError
from rrhf.recipes.study.page import write_page
from rrhf.recipes.study.results import read_study


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m rrhf.recipes.study", description=__doc__)
    parser.add_argument("results", nargs="+", type=Path, help="files that `rrhf reproduce --export` wrote")
    parser.add_argument("--output", type=Path, required=True, help="the page, a Markdown file above those files")
    options = parser.parse_args()
    try:
        write_page([read_study(file) for file in options.results], options.output)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"page: {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
