"""The paper's claims, each held against results: the tests it rests on, its verdict, and what else could explain it.

A claim with tests holds where each of them points its way with a Holm-adjusted p below 0.05 over all tests of its
section, fails where one points the other way with that certainty, and is not resolved otherwise. The others say their
own rule.
Nothing is resolved by fewer than three seeds: how far trainings differ from each other is not known then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np

from rrhf.recipes.reproduce.scale import REWARDS
from rrhf.recipes.reproduce.work import rate_rewards
from rrhf.recipes.study.frontier import DISTANCES, at_equal_kl
from rrhf.recipes.study.losses import SAMPLES, by_gain, gained, hinge, losses
from rrhf.recipes.study.results import Study, making
from rrhf.recipes.study.statistics import ALPHA, Estimate, bootstrap, holm

HOLDS, FAILS, OPEN, MISSING = "holds", "fails", "not resolved", "not run"
AT_LEAST = 0.02  # "at least as good" allows so much less reward
SEEDS = 3  # fewer resolve nothing
NEAR = 0.05  # two rewards are near each other within this
WATCHED = "RRHF-DP+watched"  # answers held-out prompts while it trains
MAIN = ("RRHF-BP", "RRHF-DP")  # RRHF's arms that rivals are compared with


@dataclass(frozen=True)
class Test:
    """A difference that a claim says is above 0 (``sign`` 1) or below (−1)."""

    what: str
    estimate: Estimate
    sign: int = 1
    adjusted: float = 1.0

    @property
    def verdict(self) -> str:
        if self.adjusted >= ALPHA or self.estimate.seeds < SEEDS:
            return OPEN
        return HOLDS if self.estimate.mean * self.sign > 0 else FAILS


@dataclass(frozen=True)
class Finding:
    """What results say of a claim."""

    tests: Sequence[Test] = ()
    said: str = ""  # numbers beside the tests
    own: str | None = None  # a verdict by the claim's own rule
    arms: Sequence[str] = ()  # that it rests on

    @property
    def verdict(self) -> str:
        if self.own is not None:
            return self.own
        found = {test.verdict for test in self.tests}
        if not found:
            return MISSING
        return FAILS if FAILS in found else OPEN if OPEN in found else HOLDS


@dataclass(frozen=True)
class Claim:
    """A claim of the paper.

    Attributes:
        letter, text: which, and what it says.
        paper: its numbers there.
        besides: what else could explain what is seen.
        measure: holds it against results; a finding without tests and verdict where the arms were not run.
    """

    letter: str
    text: str
    paper: str
    besides: str
    measure: Callable[[Study], Finding] = field(repr=False)


def judged(study: Study) -> list[tuple[Claim, Finding]]:
    """Every claim with its finding, the p-values of all tests adjusted together."""
    found = [_of_enough_seeds(study, claim.measure(study)) for claim in CLAIMS]
    adjusted = iter(holm([test.estimate.p for finding in found for test in finding.tests]))
    return [
        (claim, replace(finding, tests=[replace(test, adjusted=next(adjusted)) for test in finding.tests]))
        for claim, finding in zip(CLAIMS, found, strict=True)
    ]


def _of_enough_seeds(study: Study, finding: Finding) -> Finding:
    """A verdict by a claim's own rule is open where an arm has fewer seeds than resolve anything."""
    few = any(len(study.seeds(name)) < SEEDS for name in finding.arms)
    return replace(finding, own=OPEN) if few and finding.own in (HOLDS, FAILS) else finding


RIVALS = ("RRHF-DP", "OP", "SimPO")  # that a better recipe must beat: hinge on samples of ρ and of π, SimPO for lists


def rivalries(study: Study) -> list[Test]:
    """Every other arm against each rival at equal KL, in both rewards, p-values adjusted together."""
    tests = []
    for name in study.names:
        if name in (*RIVALS, "start"):
            continue
        for rival in RIVALS:
            for distance in DISTANCES:
                for reward in REWARDS:
                    found = at_equal_kl(study, name, distance, reward, rival) if rival in study.names else None
                    if found is not None and found.seeds >= SEEDS:
                        tests.append(Test(f"{name} − {rival} at KL {distance:g}, {reward}", found))
    adjusted = holm([test.estimate.p for test in tests])
    return [replace(test, adjusted=p) for test, p in zip(tests, adjusted, strict=True)]


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
    """KL and perplexity of arms."""
    return "; ".join(
        f"{name}: KL {mean(study.numbers(name, 'kl', 'mean'))}, perplexity {mean(study.numbers(name, 'perplexity'), 1)}"
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


SOURCES = ("RRHF-B", "RRHF-BP", "RRHF-D", "RRHF-DP", "RRHF-DP+diverse-2", "RRHF-DP+diverse-8", "IP-2", "IP-3", "OP")


def follows_training_samples(study: Study) -> Finding:
    names = [name for name in SOURCES if study.numbers(name, "training_scores", "mean").size]
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
    return Finding((), f"rank correlation over {len(names)} arms: {said} (holds: both ≥ 0.7)", own, names)


def _rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    ranks = np.stack([np.argsort(np.argsort(values)) for values in (first, second)])
    return float(np.asarray(np.corrcoef(ranks))[0, 1])


def near_the_maxima(study: Study) -> Finding:
    said, verdicts = [], []
    names = [name for name in MAIN if study.numbers(name, "training_scores", "max").size]
    for name in names:
        maxima = study.numbers(name, "training_scores", "max")
        found = study.over_seeds(np.nanmean(study.rewards(name, "proxy"), axis=1) - maxima)
        assert found is not None
        said.append(f"{name}: π less the mean maximum {found}")
        near = found.low >= -NEAR and found.high <= NEAR
        verdicts.append(HOLDS if near else FAILS if found.low > NEAR or found.high < -NEAR else OPEN)
    if not verdicts:
        return Finding()
    own = next(verdict for verdict in (FAILS, OPEN, HOLDS) if verdict in verdicts)
    return Finding((), "; ".join(said) + f" (holds: within ±{NEAR})", own, names)


def rounds_help(study: Study) -> Finding:
    one = "IP-1" if study.seeds("IP-1") else "RRHF-DP"  # they are the same run
    return Finding(differences(study, [("IP-2", one), ("IP-3", "IP-2")], ("proxy", "gold")))


def hacks_without_kl(study: Study) -> Finding:
    """A reward is hacked that rises further than the one that judges, which has its price there and in perplexity."""
    seeds = study.common("OP", "OP+KL", "start")
    if not seeds:
        return Finding()
    texts = [np.log([float(study.seeds(name)[seed]["perplexity"]) for seed in seeds]) for name in ("OP", "OP+KL")]
    higher = study.over_seeds(texts[0] - texts[1])
    assert higher is not None
    tests = [Test("log perplexity: OP − OP+KL", higher)]
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
    for name in (*MAIN, "PPO", "DPO"):
        found = study.over_seeds(study.numbers(name, "accuracy", "gain", "mean"))
        if found is None:
            continue
        rho, pi = (mean(study.numbers(name, "accuracy", model, "mean"), 3) for model in ("rho", "pi"))
        said.append(f"{name} {rho} → {pi}")
        if name in MAIN:
            tests.append(Test(f"{name}: accuracy of π − of ρ", found))
    return Finding(tests, "; ".join(said))


def loss_against_reward(study: Study) -> Finding:
    """At every learning rate: a fast one has the reward up before the loss has begun to fall."""
    tests = []
    for rate in study.rates(WATCHED):
        values = []
        for line in study.at_rate(WATCHED, rate).values():
            losses, rewards = series(line, "loss"), series(line, "eval_reward_mean")
            both = sorted(set(losses) & set(rewards))
            if len(both) > 2:
                pairs = [[losses[step], rewards[step]] for step in both]
                values.append(float(np.corrcoef(np.transpose(pairs))[0, 1]))
        found = study.over_seeds(values)
        if found is not None:
            tests.append(Test(f"correlation within a training at the rate {rate:g}", found, -1))
    return Finding(tests)


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
    tests, order, said = [], [], []
    for k in SAMPLES:
        names = by_gain(study, losses(study, k))
        if len(names) < 3:
            continue
        best, second = names[:2]
        order.append(f"of {len(names)} losses with {k} samples {best}")
        others = dict.fromkeys([second, hinge(k)] if best != hinge(k) else [second])
        for test in differences(study, [(best, other) for other in others], (study.judge,)):
            p = min(1.0, (len(names) - 1) * test.estimate.p)
            tests.append(replace(test, estimate=replace(test.estimate, p=p)))
        levels = {name: gained(study, name) for name in names[:5]}
        most = ", ".join(
            f"{name} {level:+.3f} (KL {mean(study.numbers(name, 'kl', 'mean'), 1)})" for name, level in levels.items()
        )
        said.append(f"{k} samples, gain in {study.judge} reward at each arm's own KL: {most}")
    return Finding(tests, "; ".join(said), "; ".join(order) or None)


def heavier_rank_is_worse(study: Study) -> Finding:
    heavier = [("RRHF-DP+rank-weight-10", "RRHF-DP"), ("RRHF-DP+rank-weight-100", "RRHF-DP")]
    return Finding(
        differences(study, heavier, ("proxy", "gold"), -1), balance(study, ["RRHF-DP", *(name for name, _ in heavier)])
    )


def order_of_sources(study: Study) -> Finding:
    """No yes or no: the order that is seen is what is told, and tests of pairs say how sure it is."""
    names = [name for name in ("RRHF-DP", "RRHF-BP", "RRHF-SP") if study.seeds(name)]
    if len(names) < 2:
        return Finding()
    order = sorted(names, key=lambda name: -float(np.nanmean(study.rewards(name, "proxy"))))
    tests = differences(study, list(pairwise(order)))
    return Finding(tests, "", " > ".join(order))


def less_sensitive(study: Study) -> Finding:
    names = (*MAIN, "PPO", "PPO+KL", "DPO")
    spreads = {name: found for name in names if (found := _spreads(study, name))}
    tests = []
    for name in MAIN:
        seeds = sorted(set(spreads.get(name, ())) & set(spreads.get("PPO", ())))
        if seeds:
            less = study.over_seeds(spreads[name][seed] - spreads["PPO"][seed] for seed in seeds)
            assert less is not None
            tests.append(Test(f"{name}: best less worst of the grid's rates − that of PPO", less, -1))
    said = ", ".join(f"{name} {np.mean(list(found.values())):.3f}" for name, found in spreads.items())
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
    """Alike is within ±``NEAR`` of ρ's spread, as this reward has no scale of its own."""
    found = study.difference("RRHF-P-after-SFT", "RRHF-P", "proxy")
    if found is None:
        return Finding()
    near = NEAR * float(study.numbers("RRHF-P", "proxy", "start_std").mean())
    alike = HOLDS if found.low >= -near and found.high <= near else OPEN
    own = FAILS if found.low > near or found.high < -near else alike
    said = f"RRHF-P-after-SFT − RRHF-P: {found} (holds: within ±{near:.3f}, {NEAR} of ρ's spread)"
    return Finding((), said, own, ("RRHF-P-after-SFT", "RRHF-P"))


def beats_sft_on_one_system(study: Study) -> Finding:
    return Finding(differences(study, [("Wombat", "SFT")]))


CLAIMS = [
    Claim("a", "RRHF raises the reward over ρ", "HH, Alpaca: −1.18 → −1.02 (DP); IMDB: SFT 0.539 → 0.861 (BP)",
          "any training on good responses may: see (c)", raises_reward),
    Claim("b", "RRHF's reward is at least PPO's",
          "HH: −1.02 (DP) against −1.03, perplexity 14.75 against 13.84; IMDB: 0.861 (BP) against 0.796",
          "all have the same grid of rates and the same steps; PPO's samples are π's own, as OP's are", at_least_ppo),
    Claim("c", "RRHF is better than SFT", "IMDB: 0.861 (BP) against 0.539; HH: −1.02 (DP) against −1.31 (P)",
          "SFT sees the data set's response alone, RRHF samples too", better_than_sft),
    Claim("d", "RRHF is worse without L_rank", "HH, Table 7 (BP): −1.03 with it, −1.14 without",
          "the rate is chosen for each", worse_without_rank),
    Claim("e", "π's reward follows the mean and the maximum of its training samples", "HH, Table 6",
          "few arms, which differ in more than that", follows_training_samples),
    Claim("f", "π's mean reward comes near the mean of the maxima of its training samples",
          "HH: −1.02 (DP) against −0.95, −1.03 (BP) against −1.00", "the number of steps decides how near",
          near_the_maxima),
    Claim("g", "more rounds are better: IP-1 < IP-2 < IP-3, in gold reward too", "HH: −1.02, −0.96, −0.94",
          "here the rounds share the optimiser steps of one; the paper's add steps", rounds_help),
    Claim("h", "OP-k without KL hacks the reward, with KL less",
          "HH: OP-32 0.34 at perplexity 63.78, with KL −0.86 at 19.76",
          "both rewards are imperfect, on scales of their own; more steps hack more",
          hacks_without_kl),
    Claim("i", "the accuracy of p_i as a reward rises far above ρ's", "HH, Table 5: 45.13 % → 61.75 % (PPO: 46.03 %)",
          "on IMDB the reward that trains orders ρ's own samples; on HH, as in the paper, people do", accuracy_rises),
    Claim("j", "loss and reward are negatively correlated in training", "HH, Figure 3",
          "both have a trend over steps: this is a correlation of trends", loss_against_reward),
    Claim("k", "π's rewards spread less than ρ's", "HH (the text)",
          "this reward is bounded: a higher mean leaves less room", spreads_less),
    Claim("l", "best-of-n reaches RRHF's reward, at n times its inference cost", "HH: best-of-4 −0.97, RRHF −1.02",
          "the best is chosen by the reward that judges", best_of_n_reaches),
    Claim("m", "which loss is best", "hinge is the only one there",
          "each loss stands at its own KL: see the picture of both", best_loss),
    Claim("n", "rank weights of 10 and 100 are worse than 1", "said in the text",
          "a heavier ranking loss at the same rate moves further from ρ", heavier_rank_is_worse),
    Claim("o", "with P alone all starts end alike, and SFT first does not help", "HH: −1.31 from all three",
          "one model here, as it is and after SFT on the chosen responses; the paper has LLaMA and Alpaca too",
          starts_end_alike),
    Claim("p", "how the sources order: DP, BP and SP", "HH: −1.02, −1.03, −0.96 (DP, BP, SP)", "", order_of_sources),
    Claim("q", "RRHF is less sensitive to its learning rate than PPO", "said in the text",
          "a grid of three rates, on prompts kept for choosing among them", less_sensitive),
    Claim("r", "RRHF needs less memory, fewer models and less time than PPO", "1 or 2 models against 4",
          "at this size libraries are most of the memory, of which the least of the seeds is told; PPO's value "
          "function is a head on the policy here, and its reward no large model", cheaper_than_ppo),
    Claim("s", "Wombat's recipe beats SFT on one strong system", "Table 9: 612 against 574",
          "a reward judges here, GPT-4 there", beats_sft_on_one_system),
]  # fmt: skip
