"""The page of the study: what was run, every arm's row, each claim with its numbers, the losses, the figures."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rrhf.common.errors import UserError
from rrhf.common.files import write_text
from rrhf.common.presentation import NONE, markdown_table, number
from rrhf.recipes.reproduce.arms import BEST_OF
from rrhf.recipes.reproduce.plots import on_white
from rrhf.recipes.reproduce.scale import REWARDS
from rrhf.recipes.study.claims import judged
from rrhf.recipes.study.figures import figures
from rrhf.recipes.study.frontier import DISTANCES, RIVALS, WIDEST, at_equal_kl, rivalries, values_at
from rrhf.recipes.study.losses import compared
from rrhf.recipes.study.results import Study, making
from rrhf.recipes.study.statistics import components, shown
from rrhf.recipes.study.verdicts import MISSING, SEEDS, Claim, Finding, Test


def write_page(studies: Sequence[Study], page: Path) -> None:
    """Write ``page`` (Markdown) and, in a folder of its name beside it, its figures.

    Raises:
        UserError: two studies are of files with one name, by which figures are named.
    """
    names = Counter(study.file.stem for study in studies)
    if twice := [name for name, number in names.items() if number > 1]:
        raise UserError(f"two files of the name {twice[0]}: their figures would be the same ones: rename one")
    parts = [
        "# The study: the paper's claims, tested again",
        "Made from the lines in " + ", ".join(f"`{_beside(study.file, page)}`" for study in studies) + " by "
        "`python -m rrhf.recipes.study`; nothing on this page is written by hand. A line holds an arm from a seed: its "
        "configuration, the code's commit, every prompt's rewards. `rrhf reproduce TASK --check FILE.jsonl:LINE` runs "
        "one again and says whether it comes out within its intervals.",
    ]
    for study in studies:
        parts += _of_study(study, page)
    write_text(page, "\n\n".join(parts) + "\n")


def _of_study(study: Study, page: Path) -> list[str]:
    if study.set_aside:
        return _confirmation(study)
    findings = judged(study)
    tests = sum(len(finding.tests) for _, finding in findings)
    parts = [_heading(study), _size(study), *_resolves(study, max(tests, 1)), "### The claims", _rule(tests)]
    parts += [_claim(claim, finding) for claim, finding in findings if finding.verdict != MISSING]
    missing = [f"({claim.letter}) {claim.text}" for claim, finding in findings if finding.verdict == MISSING]
    if missing:
        parts.append(
            "Not shown here, as arms it needs were not run or the task cannot show it: " + "; ".join(missing) + "."
        )
    parts += ["### Every arm", _arms(study)]
    parts += compared(study)
    parts += _at_equal_kl(study)
    parts.append("### Figures")
    for name, caption, draw, size in figures(study):
        file = page.with_suffix("") / f"{study.file.stem}-{name}.svg"
        write_text(file, on_white(draw, size, name))
        parts.append(f"![{caption}]({_beside(file, page)})\n\n{caption}.")
    return parts


def _confirmation(study: Study) -> list[str]:
    """What a search has found, on the seeds and prompts that it has not seen."""
    tests = rivalries(study)
    rivals = ", ".join(rival for rival in RIVALS if rival in study.names)
    text = (
        f"The other arms against {rivals}, from seeds and on prompts that were set aside before a search "
        "for better ones began: differences in reward at equal KL, paired by seed and prompt; p-values are adjusted "
        f"together by Holm's method ({_count(len(tests), 'test')}). That an arm is better there holds where its "
        "adjusted p is below 0.05."
    )
    rows = [[test.what, str(test.estimate), _p(test), str(test.estimate.seeds), test.verdict] for test in tests]
    return [
        _heading(study) + ": confirmed where no search has looked",
        _size(study), *_resolves(study, max(len(tests), 1)), text,
        markdown_table(["difference", "estimate", "p, adjusted", "seeds", "it is better"], rows),
        "### Every arm", _arms(study), *_at_equal_kl(study),
    ]  # fmt: skip


def _heading(study: Study) -> str:
    """Task and scale, and what the file's name has beside them."""
    scale = Path(study.scale).stem
    more = study.file.stem.removeprefix(f"{study.task}-{scale}").removesuffix("set-aside").strip("-")
    return f"## {study.task} at the scale {scale}" + (f", {more}" if more else "")


def _beside(file: Path, page: Path) -> str:
    """Where a file lies, as seen from the page."""
    return Path(os.path.relpath(Path(file).absolute(), page.absolute().parent)).as_posix()


def _size(study: Study) -> str:
    """What was run, and what that size can resolve."""
    seeds = sorted({len(study.seeds(name)) for name in study.names if study.seeds(name)})
    first = study.lines[0]
    commits = ", ".join(
        sorted({str(at) for line in study.lines for at in (line["commit"], line.get("trained_at")) if at})
    )
    said = [
        f"{len(study.names)} arms, "
        + (f"{seeds[0]} to " if len(seeds) > 1 else "")
        + f"{_count(seeds[-1], 'seed')} an arm, "
        f"{first['n']} held-out prompts with {_responses(study)} each from every seed; code {commits}.",
        "Intervals are of 95 % by a bootstrap over seeds and prompts together (both drawn anew, all seeds share the "
        "prompts), widened for few seeds: their width and the p-values are those of Student's t with the standard "
        "error of Hillis (2007) and the degrees of freedom of the seeds. **Of one seed an interval is over prompts "
        "alone**, and narrower than those of several. Differences are paired by seed and prompt. What is one number a "
        "training (accuracies, correlations, deviations, spreads) has the interval of Student's t over seeds.",
    ]
    asked = Counter(setting for line in study.lines for setting in line["asked"])
    if asked:
        said.append(
            "Laid over the scale's own settings: " + ", ".join(_asked(*each, study) for each in asked.items()) + "."
        )
    return "\n\n".join(said)


def _asked(setting: str, lines: int, study: Study) -> str:
    """A setting, and of how many lines it is where it is not of all."""
    return f"`{setting}`" + (f" (of {lines} of {len(study.lines)} lines)" if lines < len(study.lines) else "")


PILOT = (("RRHF-DP", "start"), ("RRHF-DP", "RRHF-BP"), ("RRHF-DP", "PPO"))  # differences that a size is told by


def _resolves(study: Study, tests: int) -> list[str]:
    """What differences this size, and ten seeds, can be expected to find, by the variances that are seen."""
    known: list[tuple[str, np.ndarray | None]] = []
    reward, least = study.judge, SEEDS if study.set_aside else 2
    if study.set_aside:
        others = [name for name in study.names if name not in (*RIVALS, "start")]
        most = max(others, key=lambda name: len(study.common_of_any_rate(name)), default="")
        known = [
            (f"{most} − {rival} at KL {distance:g}, {reward}", values_at(study, most, distance, reward, rival))
            for rival in RIVALS for distance in DISTANCES if rival in study.names
        ]  # fmt: skip
    else:
        for name, other in PILOT:
            seeds = study.common(name, other)
            values = study.rewards(name, reward, seeds) - study.rewards(other, reward, seeds) if seeds else None
            known.append((f"{name} − {'ρ' if other == 'start' else other}, {reward}", values))
    rows = []
    for what, values in known:
        if values is None or len(values) < least or not np.isfinite(values).all():
            continue
        found, (seeds, prompts) = components(values), values.shape
        sizes = (found.resolvable(count, prompts, at_once) for count in (seeds, 10) for at_once in (1, tests))
        variances = (found.seed, found.prompt, found.rest)
        rows.append([what, str(seeds), *(f"{each:.4f}" for each in variances), *(f"{size:.3f}" for size in sizes)])
    if not rows:
        return []
    header = ["difference", "seeds", "variance of seeds", "of prompts", "of the rest", "found, alone",
              f"first of {tests} tests", "10 seeds, alone", f"10 seeds, first of {tests}"]  # fmt: skip
    text = (
        "What this size can resolve: the difference that 80 of 100 such studies find, by the variances seen here, as "
        "a test alone and as the first of all of this section's in Holm's method."
    )
    return [text, markdown_table(header, rows)]


def _responses(study: Study) -> str:
    """How many responses to each held-out prompt were judged."""
    numbers = sorted({int(line.get("held_out_samples", 1)) for line in study.lines})
    return " or ".join("one response" if number == 1 else f"{number} responses" for number in numbers)


def _rule(tests: int) -> str:
    return (
        f"The section makes {_count(tests, 'test')}; p-values are adjusted together by Holm's method, so that the "
        "chance of any false finding is at most 5 %. A claim holds where each of its tests points its way with an "
        "adjusted p below 0.05, fails where one points the other way, and is not resolved otherwise; claims without "
        "tests say their rule, and are not in those 5 %. "
        f"Fewer than {SEEDS} seeds resolve nothing, whatever the interval over prompts says."
    )


def _claim(claim: Claim, finding: Finding) -> str:
    lines = [f"**({claim.letter}) {claim.text}: {finding.verdict}.** The paper: {claim.paper}."]
    for test in finding.tests:
        lines.append(f"- {test.what}: {test.estimate}, p {_p(test)} ({_count(test.estimate.seeds, 'seed')})")
    if finding.said:
        lines.append(f"- {finding.said}")
    if claim.besides:
        lines.append(f"- What else could explain it: {claim.besides}")
    return "\n".join(lines)


def _p(test: Test) -> str:
    return f"{test.adjusted:.3f}" if test.adjusted >= 0.001 else "< 0.001"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _arms(study: Study) -> str:
    header = ["arm", "seeds", "rate", "gain, proxy", "gain, gold", "KL to ρ", "perplexity", "length", "distinct-2",
              "looping", "accuracy of p_i", "seconds to make it"]  # fmt: skip
    phrases = {name: study.phrase(name) for name in study.names}
    with_phrases = set(phrases.values()) != {NONE}
    rows = []
    for name in study.names:
        lines = study.seeds(name)
        if not lines:
            continue
        seconds = [making(line) for line in lines.values()]
        rows.append([
            name, str(len(lines)), study.shown_rate(name),
            *(shown(study.gain(name, reward)) for reward in REWARDS),
            ("≤ " if study.arm(name).kind == BEST_OF else "") + _mean(study, name, 1, "kl", "mean"),
            *(_mean(study, name, digits, *path) for digits, path in (
                (1, ("perplexity",)), (1, ("length_mean",)), (3, ("distinct_2",)),
                (3, ("looping",)), (3, ("accuracy", "pi", "mean")),
            )),
            number(float(np.median(seconds)), 0),
            *[phrases[name]] * with_phrases,
        ])  # fmt: skip
    said = (
        "Of several learning rates an arm stands at the best by proxy reward on prompts kept for that, the mean over "
        "the seeds that were run at all of them (in brackets how many); ↑ and ↓ mark the highest and the lowest: a "
        "rate beyond may be better.\n\n"
    )
    several = any(len(study.rates(name)) > 1 for name in study.names)
    of_phrases = (
        "A phrase is the 2 to 4 words that stand in more of π's texts than of ρ's by the largest share of all; that is "
        "given, as the mean over the seeds that counted it (0 where no phrase rose by a tenth), with the first one's "
        "phrase. A policy that says one thing whatever was asked has found what its reward pays for. Runs from before "
        "this was counted have none.\n\n"
    )
    table = markdown_table(header + ["phrase"] * with_phrases, rows)
    return said * several + of_phrases * with_phrases + table


def _at_equal_kl(study: Study) -> list[str]:
    """What arms gain at the same distances from ρ."""
    rows = []
    for name in study.names:
        found = [at_equal_kl(study, name, distance, study.judge) for distance in DISTANCES]
        if any(found):
            cells = [f"{shown(one)} ({one.seeds})" if one else NONE for one in found]
            rows.append((-max(one.mean for one in found if one), [name, *cells]))
    if not rows:
        return []
    text = (
        f"Gain in {study.judge} reward where an arm is so many nats a response from ρ: linear in √KL between two runs "
        "of a seed at different rates, one nearer and one further, which is rather too little the wider the two are "
        f"apart; wider than {WIDEST:g} times in √KL they say nothing. Over the seeds that have such two, in brackets "
        "how many. More KL buys more reward, so that the arms' rows above, each at its own rate, do not say this."
    )
    header = ["arm", *(f"KL {distance:g}" for distance in DISTANCES)]
    return [
        f"### {study.judge.capitalize()} reward at equal KL",
        text,
        markdown_table(header, [row for _, row in sorted(rows)]),
    ]


def _mean(study: Study, name: str, digits: int, *path: str) -> str:
    values = study.numbers(name, *path)
    return number(float(values.mean()), digits) if values.size else NONE
