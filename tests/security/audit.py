"""Ask the source of advisories about what is locked: ``make audit``.

0 where nothing is known, or nobody answers and this is no release (RELEASE unset); 1 otherwise.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

PATIENCE = 300  # seconds


def main(locked: str) -> int:
    command = [
        str(Path(sys.executable).with_name("pip-audit")),
        "-r",
        locked,
        "--no-deps",
        "--disable-pip",
        "-f",
        "json",
    ]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE)
        said, words = asked.stdout, asked.stderr
    except subprocess.TimeoutExpired:
        said, words = "", f"no answer in {PATIENCE} seconds"
    return verdict(said, words, bool(os.environ.get("RELEASE")))


def verdict(said: str, words: str, release: bool) -> int:
    """Print what pip-audit ``said``, in JSON, and return the exit code; ``words``: what it wrote beside that."""
    try:
        packages = json.loads(said)["dependencies"]
    except (ValueError, KeyError):
        return _unreached((words.strip().splitlines() or ["?"])[-1], release)
    left_out = [package for package in packages if "skip_reason" in package]
    if len(left_out) == len(packages):  # what answers is no source of advisories: a mirror of packages alone
        return _unreached(left_out[0]["skip_reason"] if left_out else "no package was asked about", release)
    holes = [(package, hole) for package in packages for hole in package.get("vulns", ())]
    for package, hole in holes:
        mended = ", ".join(hole["fix_versions"]) or "none yet"
        print(f"{package['name']} {package['version']}: {hole['id']}; mended in: {mended}")
    asked = len(packages) - len(left_out)
    rest = ", ".join(package["name"] for package in left_out) or "none"
    print(f"pip-audit: {asked} packages asked about, {len(holes)} known holes; not asked about: {rest}")
    return 1 if holes else 0


def _unreached(why: str, release: bool) -> int:
    print(f"pip-audit: the source of advisories cannot be reached: {why}")
    print("nothing is known of holes in the packages" + (": no release" if release else ""))
    return 1 if release else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
