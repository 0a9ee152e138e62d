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
    try:
        packages = json.loads(said)["dependencies"]
    except (ValueError, KeyError):
        print(f"pip-audit: the source of advisories cannot be reached: {(words.strip().splitlines() or ['?'])[-1]}")
        print("nothing is known of holes in the packages" + (": no release" if os.environ.get("RELEASE") else ""))
        return 1 if os.environ.get("RELEASE") else 0
    holes = [(package, hole) for package in packages for hole in package.get("vulns", ())]
    for package, hole in holes:
        mended = ", ".join(hole["fix_versions"]) or "none yet"
        print(f"{package['name']} {package['version']}: {hole['id']}; mended in: {mended}")
    left_out = [package["name"] for package in packages if "skip_reason" in package]
    rest = ", ".join(left_out) or "none"
    print(f"pip-audit: {len(packages)} packages, {len(holes)} known holes; not asked about: {rest}")
    return 1 if holes else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
