"""The paper's claims, each held against results: the tests or the rule it rests on, and what else could explain it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise, product

import numpy as np

from rrhf.common.imports import of_extra
from rrhf.common.presentation import NONE
from rrhf.recipes.reproduce.work import rate_rewards
from rrhf.recipes.study.losses import SAMPLES, by_gain, gained, hinge, losses
from rrhf.recipes.study.results import Study, making
from rrhf.recipes.study.statistics import MISSING, Estimate, bootstrap
from rrhf.recipes.study.verdicts import FAILS, HOLDS, OPEN, SEEDS, Claim, Finding, Test, settled

AT_LEAST = 0.02  # "at least as good" allows so much less reward
NEAR = 0.05  # two rewards between 0 and 1 are near each other within this; others within so much of ρ's spread
FAR = 0.08  # an accuracy that rises by so much rises far: half of what the paper's does
WATCHED = "RRHF-DP+watched"  # answers held-out prompts while it trains
MAIN = ("RRHF-BP", "RRHF-DP")  # RRHF's arms that rivals are compared with


def judged(study: Study) -> list[tuple[Claim, Finding]]:
    """Every claim with its finding, the p-values of all tests adjusted together."""
    findings = settled(study, [claim.measure(study) for claim in CLAIMS])
    return list(zip(CLAIMS, findings, strict=True))


# -- parts of findings


def differences(
    study: Study, pairs: Sequence[tuple[str, str]], rewards: Sequence[str] = ("proxy",), sign: int = 1
) -> list[Test]:
    tests = []
    for name, other in pairs:
        for reward in rewards:
            found = study.difference(name, other, reward)
            if found is not None:
                tests.append(Test(f"{name} − {'ρ' if other == 'start' else other}, {reward}", found, sign))
    return tests


def mean(values: np.ndarray, digits: int = 2) -> str:
    return f"{values.mean():.{digits}f}" if values.size else "–"


def beside(study: Study, names: Sequence[str]) -> str:
    """KL, perplexity and variety of arms, and their phrase where it was counted."""
    return "; ".join(
        f"{name}: KL {mean(study.numbers(name, 'kl', 'mean'))}, perplexity "
        f"{mean(study.numbers(name, 'perplexity'), 1)}, distinct-2 {mean(study.numbers(name, 'distinct_2'))}"
        + (f", phrase {phrase}" if (phrase := study.phrase(name)) != NONE else "")
        for name in names
        if study.seeds(name)
    )


# -- the claims


def raises_reward(study: Study) -> Finding:
    return Finding(differences(study, [(name, "start") for name in MAIN], ("proxy", "gold")))


def at_least_ppo(study: Study) -> Finding:
    tests = []
    for name in MAIN:
        found = study.difference(name, "PPO", "proxy", allowed=AT_LEAST)
        if found is not None:
            tests.append(Test(f"{name} − PPO, proxy, + {AT_LEAST}", found))
    said = beside(study, [*MAIN, "OP", "PPO", "PPO+KL"])
    online = study.difference("OP", "PPO", "proxy") if tests else None
    if online is not None:
        said += f"; OP − PPO, proxy: {online}, which both train on samples of π"
    for name in MAIN:
        penalised = study.difference(name, "PPO+KL", "proxy")
        if penalised is not None:
            said += f"; {name} − PPO+KL, proxy: {penalised} ({penalised.seeds} seeds)"
    if tests and len(study.rates("PPO")) < 2:
        # A rate that suits RRHF says nothing of a rival that was not tuned: that it trails there resolves nothing.
        return Finding(tests, f"{said}; PPO was run at one rate, which was not chosen for it", OPEN)
    return Finding(tests, said)


def better_than_sft(study: Study) -> Finding:
    return Finding(differences(study, [(name, "SFT") for name in MAIN]))


def worse_without_rank(study: Study) -> Finding:
    without = [("RRHF-BP", "RRHF-BP+no-rank"), ("RRHF-BP", "RRHF-BP-no-rank"), ("RRHF-DP", "RRHF-DP+no-rank")]
    return Finding(differences(study, without, ("proxy", "gold")), balance(study, MAIN))


def balance(study: Study, names: Sequence[str]) -> str:
    """What L_rank with its weight is of the loss and how many pairs are in order, at a training's first and last note.

    Of arms whose cross-entropy has the weight 1.
    """
    said = []
    for name in names:
        ends = [found for line in study.seeds(name).values() if (found := _ends(line)) is not None]
        if ends:
            (share, order), (last_share, last_order) = np.mean(ends, axis=0)
            said.append(
                f"{name}: L_rank is {share:.0%} of the loss at first, {last_share:.0%} at last, pairs in order "
                f"{order:.0%} → {last_order:.0%}"
            )
    return "while training, " + "; ".join(said) if said else ""


def _ends(line: Mapping[str, object]) -> list[tuple[float, float]] | None:
    loss, sft, order = (series(line, key) for key in ("loss", "sft_loss", "rank_accuracy"))
    steps = sorted(loss.keys() & sft.keys() & order.keys())
    return [(1 - sft[step] / loss[step], order[step]) for step in (steps[0], steps[-1])] if steps else None


OFFLINE = ("RRHF-B", "RRHF-BP", "RRHF-SP", "RRHF-D", "RRHF-DP", "RRHF-P", "RRHF-DP+diverse-2", "RRHF-DP+diverse-8")
SOURCES = (*OFFLINE, "IP-2", "IP-3", "OP")


def follows_training_samples(study: Study) -> Finding:
    """Over the arms whose samples are ρ's: samples of π follow π, whatever it learns from them."""
    names = _with_training_scores(study, OFFLINE)
    if len(names) < 4:
        return Finding()
    reward = [float(np.nanmean(study.rewards(name, "proxy"))) for name in names]
    found = {
        which: _rank_correlation([study.numbers(name, "training_scores", which).mean() for name in names], reward)
        for which in ("mean", "max")
    }
    low, high = min(found.values()), max(found.values())
    own = HOLDS if low >= 0.7 else FAILS if high <= 0 else OPEN
    said = ", ".join(f"with their {which} {value:+.2f}" for which, value in found.items())
    each = "; ".join(
        f"{name}: mean {mean(study.numbers(name, 'training_scores', 'mean'), 3)}, maximum "
        f"{mean(study.numbers(name, 'training_scores', 'max'), 3)}, π {np.nanmean(study.rewards(name, 'proxy')):.3f}"
        for name in _with_training_scores(study, SOURCES)
    )
    said = f"rank correlation over {len(names)} arms with samples of ρ: {said} (holds: both ≥ 0.7); {each}"
    return Finding((), said, own, names)


def _with_training_scores(study: Study, names: Sequence[str]) -> list[str]:
    return [name for name in names if study.numbers(name, "training_scores", "mean").size]


def _rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's; equal values share a rank, and where all are equal nothing follows anything."""
    ranks = [of_extra("scipy.stats", MISSING).rankdata(np.round(values, 12)) for values in (first, second)]
    return float(np.corrcoef(ranks)[0, 1]) if all(np.ptp(each) for each in ranks) else 0.0


def _near(study: Study, name: str) -> float:
    """What is near in the reward that trains; HH's has no scale but that of what it says of ρ."""
    return NEAR * (float(study.numbers(name, "proxy", "start_std").mean()) if study.task == "hh" else 1.0)


def near_the_maxima(study: Study) -> Finding:
    said, verdicts = [], []
    names = _with_training_scores(study, MAIN)
    for name in names:
        near = _near(study, name)
        maxima = study.numbers(name, "training_scores", "max")
        found = study.over_seeds(np.nanmean(study.rewards(name, "proxy"), axis=1) - maxima)
        assert found is not None
        said.append(f"{name}: π less the mean maximum {found} (holds: within ±{near:.3g})")
        verdicts.append(_verdict_of_nearness(found, near))
    if not verdicts:
        return Finding()
    own = next(verdict for verdict in (FAILS, OPEN, HOLDS) if verdict in verdicts)
    return Finding((), "; ".join(said), own, names)


def _verdict_of_nearness(found: Estimate, near: float) -> str:
    if found.low >= -near and found.high <= near:
        return HOLDS
    return FAILS if found.low > near or found.high < -near else OPEN


def rounds_help(study: Study) -> Finding:
    one = "IP-1" if study.seeds("IP-1") else "RRHF-DP"  # they are the same run
    return Finding(differences(study, [("IP-2", one), ("IP-3", "IP-2")], ("proxy", "gold")))


def hacks_without_kl(study: Study) -> Finding:
    """A reward is hacked that rises further than the one that judges, which has its price there and in the texts.

    In the paper HH's texts become improbable under ρ, IMDB's all alike.
    """
    seeds = study.common("OP", "OP+KL", "start")
    if not seeds:
        return Finding()
    key, name, sign = ("perplexity", "perplexity", 1) if study.task == "hh" else ("distinct_2", "distinct-2", -1)
    texts = [np.log([float(study.seeds(name)[seed][key]) for seed in seeds]) for name in ("OP", "OP+KL")]
    apart = study.over_seeds(texts[0] - texts[1])
    assert apart is not None
    tests = [Test(f"log {name}: OP − OP+KL", apart, sign)]
    if "gold" not in study.known_rewards:
        return Finding(tests, beside(study, ["OP", "OP+KL"]))

    def gap(name: str) -> np.ndarray:
        proxy, gold = (
            study.rewards(name, reward, seeds) - study.rewards("start", reward, seeds) for reward in ("proxy", "gold")
        )
        return proxy - gold

    tests += [
        Test("OP: gain in proxy − gain in gold", bootstrap(gap("OP"))),
        Test("that of OP − that of OP+KL", bootstrap(gap("OP") - gap("OP+KL"))),
        *differences(study, [("OP+KL", "OP")], ("gold",)),
    ]
    return Finding(tests, beside(study, ["OP", "OP+KL"]))


def accuracy_rises(study: Study) -> Finding:
    tests, said = [], []
    for name in (*MAIN, "PPO", "DPO", "SimPO"):
        gains = study.numbers(name, "accuracy", "gain", "mean")
        found, beyond = study.over_seeds(gains), study.over_seeds(gains - FAR)
        if found is None or beyond is None:
            continue
        rho, pi = (mean(study.numbers(name, "accuracy", model, "mean"), 3) for model in ("rho", "pi"))
        said.append(f"{name} {rho} → {pi}, {found}")
        if name in MAIN:
            tests.append(Test(f"{name}: accuracy of π − of ρ − {FAR}, half of what the paper's rises by", beyond))
    return Finding(tests, "; ".join(said))


def loss_against_reward(study: Study) -> Finding:
    """At every learning rate: a fast one has the reward up before the loss has begun to fall."""
    tests = []
    for rate in study.rates(WATCHED):
        values = []
        for line in study.at_rate(WATCHED, rate).values():
            pairs = over_the_same_steps(series(line, "loss"), series(line, "eval_reward_mean"))
            if len(pairs) > 2:
                values.append(float(np.corrcoef(np.transpose(pairs))[0, 1]))
        found = study.over_seeds(values)
        if found is not None:
            tests.append(Test(f"correlation within a training at the rate {rate:g}", found, -1))
    return Finding(tests)


def over_the_same_steps(losses: Mapping[int, float], rewards: Mapping[int, float]) -> list[tuple[float, float]]:
    """Loss and reward over the steps between two looks at the reward.

    A loss that is noted is the mean of the steps since the last note, so that the reward is that of both ends.
    """
    found = []
    for before, after in pairwise(sorted(rewards)):
        between = [loss for step, loss in losses.items() if before < step <= after]
        if between:
            found.append((float(np.mean(between)), (rewards[before] + rewards[after]) / 2))
    return found


def series(line: Mapping[str, object], key: str) -> dict[int, float]:
    """Step → value in a training's history; nothing where it was not kept."""
    history = line.get("history") or []
    assert isinstance(history, list)
    return {int(entry["step"]): float(entry[key]) for entry in history if entry.get(key) is not None}


def spreads_less(study: Study) -> Finding:
    tests = []
    for name in MAIN:
        pi, rho = (study.numbers(name, "proxy", key) for key in ("std", "start_std"))
        found = study.over_seeds(pi - rho)
        if found is not None:
            tests.append(Test(f"{name}: standard deviation over texts of π − of ρ", found, -1))
    return Finding(tests)


def best_of_n_reaches(study: Study) -> Finding:
    """The best of the largest n against each arm; at which n it comes to the arm's mean is told."""
    curve, largest = best_of_n_curve(study), largest_best_of_n(study)
    names = [name for name in MAIN if study.seeds(name)]
    if not curve or largest is None or not names:
        return Finding()
    said = []
    for name in names:
        goal = float(np.nanmean(study.rewards(name, "proxy")))
        number = next((n for n, value in curve.items() if value >= goal), None)
        said.append(f"{name} {goal:.3f}: " + (f"by n = {number}" if number else f"not by n = {max(curve)}"))
    most = ", ".join(f"{n}: {value:.3f}" for n, value in curve.items() if n in (1, 2, 4, 8, 16))
    tests = differences(study, [(largest, name) for name in names])
    return Finding(tests, f"best-of-n {most}; {'; '.join(said)}")


def best_of_n_curve(study: Study) -> dict[int, float]:
    """n → mean reward of the best of n, over seeds, from the arm with the largest n."""
    largest = largest_best_of_n(study)
    lines = study.seeds(largest).values() if largest else ()
    curves = [{int(point["n"]): float(point["mean"]) for point in _points(line)} for line in lines if _points(line)]
    return {n: float(np.mean([curve[n] for curve in curves])) for n in curves[0]} if curves else {}


def largest_best_of_n(study: Study) -> str | None:
    names = [name for name in study.names if name.startswith("best-of-")]
    return max(names, key=lambda name: study.arm(name).number, default=None)


def _points(line: Mapping[str, object]) -> list[Mapping[str, float]]:
    block = line.get("best_of_n")
    if not isinstance(block, Mapping) or not block:
        return []
    return list(block["score"])


def best_loss(study: Study) -> Finding:
    """Which is best is what is told, for each k; tests say how sure it is.

    The best is chosen by the texts that judge it: p is multiplied by how many others it was chosen from (Bonferroni).
    """
    tests: list[Test] = []
    said, best_of = [], []
    for k in SAMPLES:
        names = by_gain(study, losses(study, k))
        if len(names) < 3:
            continue
        best, second = names[:2]
        best_of.append((f"of {len(names)} losses with {k} samples {best}", second, len(tests)))
        others = dict.fromkeys([second, hinge(k)] if best != hinge(k) else [second])
        for test in differences(study, [(best, other) for other in others], (study.judge,)):
            p = min(1.0, (len(names) - 1) * test.estimate.p)
            tests.append(replace(test, estimate=replace(test.estimate, p=p)))
        levels = {name: gained(study, name) for name in names[:5]}
        most = ", ".join(
            f"{name} {level:+.3f} (KL {mean(study.numbers(name, 'kl', 'mean'), 1)})" for name, level in levels.items()
        )
        said.append(f"{k} samples, gain in {study.judge} reward at each arm's own KL: {most}")

    def order(tested: Sequence[Test]) -> str:
        return "; ".join(
            best if tested[place].verdict == HOLDS else f"{best}, not told from {second}"
            for best, second, place in best_of
        )

    return Finding(tests, "; ".join(said), ranked=order if tests else None)


def heavier_rank_is_worse(study: Study) -> Finding:
    heavier = [("RRHF-DP+rank-weight-10", "RRHF-DP"), ("RRHF-DP+rank-weight-100", "RRHF-DP")]
    said = [
        f"at the rate {rate:g} both, {name} − {other}, {reward}: {found}"
        for name, other in heavier
        for rate in study.rates(other)
        for reward in study.known_rewards
        if (found := study.difference(name, other, reward, rate=rate)) is not None and found.seeds >= SEEDS
    ]
    said.append(balance(study, ["RRHF-DP", *(name for name, _ in heavier)]))
    return Finding(differences(study, heavier, ("proxy", "gold"), -1), "; ".join(filter(None, said)))


def order_of_sources(study: Study) -> Finding:
    """No yes or no: the order that is seen is what is told, ≈ between two that tests do not tell apart."""
    names = [name for name in ("RRHF-DP", "RRHF-BP", "RRHF-SP") if study.seeds(name)]
    if len(names) < 2:
        return Finding()
    order = sorted(names, key=lambda name: -float(np.nanmean(study.rewards(name, "proxy"))))
    tests = differences(study, list(pairwise(order)))

    def told(tested: Sequence[Test]) -> str:
        signs = [" > " if test.verdict == HOLDS else " ≈ " for test in tested]
        return order[0] + "".join(sign + name for sign, name in zip(signs, order[1:], strict=True))

    return Finding(tests, ranked=told)


def less_sensitive(study: Study) -> Finding:
    names = (*MAIN, "PPO", "PPO+KL", "DPO")
    spreads = {name: found for name in names if (found := _spreads(study, name))}
    tests = []
    for name, rival in product(MAIN, ("PPO", "PPO+KL")):
        seeds = sorted(set(spreads.get(name, ())) & set(spreads.get(rival, ())))
        if seeds:
            less = study.over_seeds(spreads[name][seed] - spreads[rival][seed] for seed in seeds)
            assert less is not None
            tests.append(Test(f"{name}: best less worst of the grid's rates − that of {rival}", less, -1))
    said = ", ".join(
        f"{name} {spread:.3f} ({spread / study.numbers(name, 'proxy', 'gain', 'mean').mean():.0%} of its gain)"
        for name, found in spreads.items()
        if (spread := float(np.mean(list(found.values()))))
    )
    return Finding(tests, f"best less worst of the grid's rates: {said}" if tests else "")


def _spreads(study: Study, name: str) -> dict[int, float]:
    """By seed what an arm earns at the best of the grid's rates less what it earns at the worst, on the same prompts.

    Of the seeds that were run at every rate that the first was.
    """
    rates = study.rates(name)
    found = rate_rewards(name, rates, study.results) if len(rates) > 1 else {}
    return {seed: max(each.values()) - min(each.values()) for seed, each in found.items()}


def cheaper_than_ppo(study: Study) -> Finding:
    """Against PPO with its KL penalty where that was run: it is the penalty that ρ has to be in memory for.

    Of memory the least of the seeds: a process may still hold what it needed before.
    """
    rival = "PPO+KL" if study.numbers("PPO+KL", "peak_memory_bytes").size else "PPO"
    if not all(study.numbers(name, "peak_memory_bytes").size for name in ("RRHF-DP", rival)):
        return Finding()

    def cost(name: str) -> tuple[float, float, float]:
        seconds = [making(line) for line in study.seeds(name).values()]
        memory = study.numbers(name, "peak_memory_bytes").min() / 1e9
        return float(study.numbers(name, "models_resident").mean()), float(memory), float(np.median(seconds))

    ours, theirs = cost("RRHF-DP"), cost(rival)
    said = "; ".join(
        f"{name}: {models:.0f} models, {memory:.2f} GB, {seconds:.0f} s to sample, score and train"
        for name, (models, memory, seconds) in (("RRHF-DP", ours), (rival, theirs))
    )
    own = HOLDS if all(a < b for a, b in zip(ours, theirs)) else FAILS if ours[0] >= theirs[0] else OPEN
    return Finding((), said + " (holds: less of all three)", own, ("RRHF-DP", rival))


def starts_end_alike(study: Study) -> Finding:
    found = study.difference("RRHF-P-after-SFT", "RRHF-P", "proxy")
    if found is None:
        return Finding()
    near = _near(study, "RRHF-P")
    said = f"RRHF-P-after-SFT − RRHF-P: {found} (holds: within ±{near:.3g}, {NEAR} of ρ's spread)"
    return Finding((), said, _verdict_of_nearness(found, near), ("RRHF-P-after-SFT", "RRHF-P"))


def beats_sft_on_one_system(study: Study) -> Finding:
    return Finding(differences(study, [("Wombat", "SFT")]))


CLAIMS = [
    Claim("a", "RRHF raises the reward over ρ", "HH, Alpaca: −1.18 → −1.02 (DP); IMDB: SFT 0.539 → 0.861 (BP)",
          "any training on good responses may: see (c)", raises_reward),
    Claim("b", "RRHF's reward is at least PPO's",
          "HH: −1.02 (DP) against −1.03, perplexity 14.75 against 13.84; IMDB: 0.861 (BP) against 0.796",
          "all have the same steps, and stand at the best of the rates that the table of arms shows; PPO's samples are "
          "π's own, as OP's are", at_least_ppo),
    Claim("c", "RRHF is better than SFT", "IMDB: 0.861 (BP) against 0.539; HH: −1.02 (DP) against −1.31 (P)",
          "SFT sees the data set's response alone, RRHF samples too", better_than_sft),
    Claim("d", "RRHF is worse without L_rank", "HH, Table 7 (BP): −1.03 with it, −1.14 without",
          "the rate is chosen for each", worse_without_rank),
    Claim("e", "π's reward follows the mean and the maximum of its training samples", "HH, Table 6",
          "few arms, which differ in more than that; samples of π (IP-n, OP) follow π by themselves",
          follows_training_samples),
    Claim("f", "π's mean reward comes near the mean of the maxima of its training samples",
          "HH: −1.02 (DP) against −0.95, −1.03 (BP) against −1.00", "the number of steps decides how near",
          near_the_maxima),
    Claim("g", "more rounds are better: IP-1 < IP-2 < IP-3, in gold reward too", "HH: −1.02, −0.96, −0.94",
          "here the rounds share the optimiser steps of one; the paper's add steps", rounds_help),
    Claim("h", "OP-k without KL hacks the reward, with KL less",
          "HH: OP-32 0.34 at perplexity 63.78, with KL −0.86 at 19.76; IMDB: OP-128 0.990, all texts one sentence, "
          "with KL 0.635",
          "both rewards are imperfect, on scales of their own; more steps hack more", hacks_without_kl),
    Claim("i", "the accuracy of p_i as a reward rises far above ρ's", "HH, Table 5: 45.13 % → 61.75 % (PPO: 46.03 %)",
          "on IMDB the reward that trains orders ρ's own samples; on HH, as in the paper, people do", accuracy_rises),
    Claim("j", "loss and reward are negatively correlated in training", "HH, Figure 3",
          "both have a trend over steps: this is a correlation of trends; a loss is the mean of the steps between two "
          "looks at the reward, which is taken as the mean of the two", loss_against_reward),
    Claim("k", "π's rewards spread less than ρ's", "HH (the text)",
          "where a reward is bounded, as a classifier's is, a higher mean leaves less room", spreads_less),
    Claim("l", "best-of-n reaches RRHF's reward, at n times its inference cost", "HH: best-of-4 −0.97, RRHF −1.02",
          "the best is chosen by the reward that judges", best_of_n_reaches),
    Claim("m", "which loss is best", "hinge is the only one there",
          "each loss stands at its own KL: see the picture of both; p is multiplied by the number of the other losses, "
          "of which the best was chosen, before Holm's method", best_loss),
    Claim("n", "rank weights of 10 and 100 are worse than 1", "said in the text",
          "each stands at its own best rate; at the same rate a heavier ranking loss stays nearer to ρ",
          heavier_rank_is_worse),
    Claim("o", "with P alone all starts end alike, and SFT first does not help", "HH: −1.31 from all three",
          "one model here, as it is and after SFT on the chosen responses; the paper has LLaMA and Alpaca too",
          starts_end_alike),
    Claim("p", "how the sources order: DP, BP and SP", "HH: −1.02, −1.03, −0.96 (DP, BP, SP)", "", order_of_sources),
    Claim("q", "RRHF is less sensitive to its learning rate than PPO", "said in the text",
          "a grid of three rates, on prompts kept for choosing among them; an arm that gains little has little to lose",
          less_sensitive),
    Claim("r", "RRHF needs less memory, fewer models and less time than PPO", "1 or 2 models against 4",
          "at this size libraries are most of the memory, of which the least of the seeds is told; PPO's value "
          "function is a head on the policy here, and its reward no large model", cheaper_than_ppo),
    Claim("s", "Wombat's recipe beats SFT on one strong system", "Table 9: 612 against 574",
          "a reward judges here, GPT-4 there", beats_sft_on_one_system),
]  # fmt: skip
