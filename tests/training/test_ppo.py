"""PPO and NLPO: hand-worked numbers, the padded oracle step by step, kill and resume, masks, refusals."""

from __future__ import annotations

import copy
import json
import math
import random
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from oracles import ppo as oracle
from rrhf.common.errors import UserError
from rrhf.models.adapters import AdapterSettings, peft_config, with_adapter
from rrhf.models.passes import response_hidden, response_logprobs
from rrhf.models.tokenization import EncodedRecord
from rrhf.records.record import Record
from rrhf.rewards.scoring import Rewards
from rrhf.training import ppo_terms as terms
from rrhf.training.ppo import PPO, Models
from rrhf.training.ppo_settings import SCHEDULES, NLPOSettings, PPOConfig
from support import tiny
from support.judge_replies import judging, prompts_to
from support.models import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
ENDS = list(range(4, 60))  # tokens that end a response too, so that some end early
QUERIES = [Record(query=text, id=f"q{i}") for i, text in enumerate(["ab", "abcdefg", "the cat", "x", "hello you"])]
SMALL = PPOConfig(
    learning_rate=1e-3, adam_epsilon=1e-5, rollout_queries=4, num_responses=2, max_new_tokens=7, batch_size=3,
    ppo_epochs=2, per_device_train_batch_size=4, max_steps=6, kl_beta=0.3, gamma=0.9, gae_lambda=0.8, seed=3,
    value_coefficient=0.5,
)  # fmt: skip


def letters(prompts: list[str], completions: list[str]) -> list[float]:
    return [sum(letter in "aeiouAEIOU" for letter in text) / 4 for text in completions]


def length(prompts: list[str], completions: list[str]) -> list[float]:
    return [len(text) / 7 for text in completions]


def halves(prompts: list[str], completions: list[str]) -> list[float | None]:
    return [None if len(text) % 2 else 1.0 for text in completions]


def llama(seed: int = 0) -> Any:
    model = tiny_model("llama", len(TOKENIZER), seed)
    model.generation_config.eos_token_id = ENDS
    return model


def ppo_of(config: PPOConfig = SMALL, nlpo: NLPOSettings | None = None, value: Any = None, **options: Any) -> PPO:
    policy = options.get("policy") or llama()
    reference = options.get("reference", llama(1))
    models = Models(policy, TOKENIZER, reference, value)
    return PPO(models, Rewards([options.get("reward", letters)]), QUERIES, config, nlpo=nlpo)


def weights(ppo: PPO) -> dict[str, Tensor]:
    return {f"{part}.{name}": p.detach().clone() for part, m in ppo.trained.items() for name, p in m.named_parameters()}


# --- numbers worked by hand -------------------------------------------------------------------------------------------


def test_rewards_and_advantages_by_hand() -> None:
    lengths = torch.tensor([2, 1])
    rewards = terms.token_rewards(
        torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-1.5, -1.0, -3.0]), torch.tensor([1.0, 4.0]), lengths, beta=0.2
    )
    assert rewards.tolist() == pytest.approx([-0.1, 1.2, 4.0])  # −0.2 · 0.5;  1 − 0.2 · (−1);  4 − 0
    values = torch.tensor([1.0, 2.0, 3.0])
    # δ = (−0.1 + 0.5 · 2 − 1, 1.2 − 2), 4 − 3;  Â_1 = δ_1 + 0.5 · 0.8 · δ_2
    found = terms.advantages(rewards, values, lengths, gamma=0.5, lam=0.8)
    assert found.tolist() == pytest.approx([-0.1 + 0.4 * -0.8, -0.8, 1.0])


def test_losses_by_hand() -> None:
    change = torch.log(torch.tensor([1.5, 0.5, 1.5, 1.1]))
    loss, held = terms.surrogate(change, torch.zeros(4), torch.tensor([2.0, 2.0, -2.0, 2.0]), clip=0.2)
    assert loss.tolist() == pytest.approx([-2.4, -1.0, 3.0, -2.2]) and held.tolist() == [True, False, False, False]
    values = torch.tensor([1.0, 1.0, 0.1])
    loss = terms.value_loss(values, torch.zeros(3), torch.tensor([1.0, 2.0, 0.0]), clip=0.2)
    assert loss.tolist() == pytest.approx([0.5 * 0.64, 0.5 * 3.24, 0.5 * 0.01])  # the clipped value is the worse one
    assert terms.whitened(torch.tensor([1.0, 3.0])).tolist() == pytest.approx([-1.0, 1.0])
    assert terms.whitened(torch.tensor([1.0, 5.0]), shift=False).tolist() == pytest.approx([2.0, 4.0])
    assert terms.explained_variance(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 2.0])) == pytest.approx(0.75)


def test_the_penalty_adapts() -> None:
    ppo = ppo_of(replace(SMALL, kl_target=0.001))
    first, second = ppo.step(), ppo.step()
    assert first["kl_beta"] == 0.3 and abs(first["kl"]) > 0.0012
    assert second["kl_beta"] == pytest.approx(0.3 * (1.02 if first["kl"] > 0 else 0.98))


# --- against the padded oracle ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value_model", [False, True])
def test_three_rollouts_are_the_oracles(value_model: bool) -> None:
    config = replace(SMALL, whiten_rewards=value_model)
    ppo = ppo_of(config, value=llama(2) if value_model else None)
    policy, head, value = copy.deepcopy((ppo.models.policy, ppo.head, ppo.models.value))
    trained = [p for m in (policy, head, value) if m is not None for p in m.parameters()]
    optimiser = torch.optim.AdamW(trained, lr=1e-3, eps=1e-5, weight_decay=0.0)
    s = oracle.Settings(0.3, 0.9, 0.8, 0.2, 0.2, 0.5, config.whiten_rewards, 1.0)
    begin, lengths = weights(ppo), set()
    for rollout in range(3):
        (records, scores, _), _ = ppo._sampled(0.0)  # the same samples come again in the step itself
        rows = [(list(record.query), list(response)) for record in records for response in record.responses]
        lengths |= {len(response) for _, response in rows}
        with torch.no_grad():
            old, old_values, mask = oracle.forward(policy, head, rows, value)
            reference, _, _ = oracle.forward(ppo.models.reference, head, rows)
            rewards = oracle.token_rewards(old, reference, mask, scores.tolist(), s)
            if rollout == 0:
                head.bias.fill_(oracle.mean_return(rewards, mask, s))
                old_values = old_values + head.bias
            advantages, returns = oracle.experience(rewards, old_values, mask, s)
        inside = mask.bool()
        found = ppo._measured(records, scores, 0)
        assert torch.allclose(found.advantages, advantages[inside], atol=1e-5)
        assert torch.allclose(found.returns, returns[inside], atol=1e-5)
        said = []
        for epoch in range(2):
            logprobs, values, _ = oracle.forward(policy, head, rows, value)
            losses = oracle.losses(logprobs, old, values, old_values, advantages, returns, mask, s)
            optimiser.zero_grad()
            (losses[0] + 0.5 * losses[1]).backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimiser.param_groups[0]["lr"] = 1e-3 * (1 - (2 * rollout + epoch) / 6)
            optimiser.step()
            said.append([float(x.detach()) for x in losses])
        metrics = ppo.step()
        means = torch.tensor(said).mean(dim=0)
        assert metrics["policy_loss"] == pytest.approx(float(means[0]), abs=1e-5)
        assert metrics["value_loss"] == pytest.approx(float(means[1]), abs=1e-5)
        assert metrics["reward_mean"] == pytest.approx(float(scores.mean()))
    assert len(lengths) > 2 and min(lengths) < SMALL.max_new_tokens
    mine, theirs = list(weights(ppo).values()), [p.detach() for p in trained]
    assert len(mine) == len(theirs) and all(torch.allclose(a, b, atol=1e-5) for a, b in zip(mine, theirs, strict=True))
    assert max(float((a - b).abs().max()) for a, b in zip(mine, begin.values(), strict=True)) > 1e-3


def test_at_first_advantages_follow_the_scores_and_not_the_place_in_the_response() -> None:
    """Scores that are all positive, as a classifier's are: what is above the mean is made likelier, at every token."""
    config = replace(SMALL, gamma=1.0, gae_lambda=0.95, kl_beta=0.0, num_responses=8)
    ppo = ppo_of(config, reward=lambda prompts, completions: [1.0 + len(text) / 100 for text in completions])
    records, scores, _ = ppo._sampled(0.0)[0]
    found = ppo._measured(records, scores, 0)
    lengths = [len(response) for record in records for response in record.responses]
    assert len(set(lengths)) > 2 and torch.equal(found.values, torch.full_like(found.values, float(ppo.head.bias)))
    above = torch.repeat_interleave(scores, torch.tensor(lengths)) > ppo.head.bias
    raw = terms.advantages(
        terms.token_rewards(found.logprobs, found.logprobs, scores, torch.tensor(lengths), 0.0), found.values,
        torch.tensor(lengths), 1.0, 0.95,
    )  # fmt: skip
    assert torch.equal(raw > 0, above) and above.any() and not above.all()
    assert torch.allclose(found.advantages, terms.whitened(raw), atol=1e-6)
    assert float(raw.mean().abs()) < 0.2 * float(raw.std())  # so that whitening hardly moves the sign


def test_slices_and_padded_rows_give_the_same_steps() -> None:
    def trained(path: str, budget: int) -> dict[str, Tensor]:
        ppo = ppo_of(replace(SMALL, max_tokens_per_forward=budget), reward=length)
        assert ppo.path == "tree"
        ppo.path = path
        ppo.step()
        return weights(ppo)

    whole = trained("tree", 2048)
    for path, budget in (("tree", 12), ("padded", 40)):
        found = trained(path, budget)
        assert all(torch.allclose(found[name], value, atol=1e-5) for name, value in whole.items())


@pytest.mark.parametrize("path", ["tree", "padded"])
def test_hidden_states_are_those_that_predict_the_tokens(path: str) -> None:
    model = llama()
    records = [
        EncodedRecord("a", [5, 6, 7], [[8, 9], [10]], [None] * 2),
        EncodedRecord("b", [11], [[12, 13, 14]], [None]),
    ]
    found = response_logprobs(model, records, path, keep_hidden=True)
    targets = torch.tensor([8, 9, 10, 12, 13, 14])
    again = torch.log_softmax(model.lm_head(found.hidden), dim=-1).gather(1, targets[:, None])[:, 0]
    assert torch.allclose(again, found.token_logprobs, atol=1e-5)
    assert torch.allclose(response_hidden(model, records, path), found.hidden, atol=1e-6)


# --- what is sampled and scored ---------------------------------------------------------------------------------------


def test_every_query_comes_once_before_one_comes_again() -> None:
    ppo = ppo_of()
    seen: list[str] = []
    for ppo.done in range(5):
        seen += [record.id.split(" ")[0] for record in ppo.rollout_queries()]
    assert all(sorted(seen[i : i + 5]) == [query.id for query in QUERIES] for i in range(0, 20, 5))
    assert len({record.id for record in ppo.rollout_queries()}) == 4


def test_samples_depend_on_the_seed_and_the_rollout_alone() -> None:
    ppo = ppo_of()
    first = ppo._sampled(0.0)[0][0]
    random.seed(0)
    torch.manual_seed(0)
    assert ppo_of(replace(SMALL, batch_size=1))._sampled(0.0)[0][0] == first
    assert ppo_of(replace(SMALL, seed=4))._sampled(0.0)[0][0] != first
    ppo.done = 1
    assert ppo._sampled(0.0)[0][0] != first


def test_responses_without_a_score_are_left_out() -> None:
    ppo = ppo_of(reward=halves)
    metrics = ppo.step()
    assert metrics["unscored"] > 0 and metrics["unscored"] + metrics["responses"] == 8
    assert metrics["reward_mean"] == 1.0
    with pytest.raises(UserError, match="scored no response"):
        ppo_of(reward=lambda prompts, completions: [None] * len(completions)).step()


def test_float16_weights_are_refused() -> None:
    with pytest.raises(UserError, match="weights are float16"):
        ppo_of(policy=llama().half())


def test_with_an_adapter_the_reference_is_the_model_without_it() -> None:
    adapter = peft_config(AdapterSettings(peft="lora", lora_r=4))
    config = replace(SMALL, learning_rate=0.02, max_steps=40)
    ppo = ppo_of(config, policy=with_adapter(llama(), adapter), reference=None, reward=length)
    assert ppo.step()["kl"] == pytest.approx(0.0, abs=1e-5) and ppo.models_resident == 1
    assert abs(ppo.step()["kl"]) > 1e-3
    records = ppo._sampled(0.0)[0][0]
    assert torch.allclose(ppo._reference(records), response_logprobs(llama(), records).token_logprobs, atol=1e-6)


def test_it_learns() -> None:
    config = replace(
        SMALL, learning_rate=1e-2, lr_scheduler_type="constant", num_responses=8, per_device_train_batch_size=2,
        ppo_epochs=4, kl_beta=0.0, gamma=1.0, gae_lambda=0.95,
    )  # fmt: skip
    ppo = ppo_of(config, reward=length)
    found = [ppo.step()["reward_mean"] for _ in range(8)]
    assert found[-1] > 1.5 * found[0]


# --- NLPO -------------------------------------------------------------------------------------------------------------


def test_nlpo_draws_inside_the_lagged_nucleus_and_renormalises_on_it() -> None:
    nlpo = NLPOSettings(nlpo_top_p=0.3, nlpo_refresh_steps=2)
    ppo = ppo_of(replace(SMALL, learning_rate=0.02), nlpo)
    lagged = copy.deepcopy(ppo.models.policy)
    for rollout in range(3):
        if rollout == 2:
            lagged = copy.deepcopy(ppo.models.policy)
        if rollout:  # the policy itself has moved on: its own nucleus is another
            ppo.lagged.load_state_dict(lagged.state_dict())
        records, scores, unscored = ppo._sampled(0.0)[0]
        found = ppo._measured(records, scores, unscored)
        place = outside = 0
        for record in records:
            for response in record.responses:
                for t, token in enumerate(response):
                    ids = torch.tensor([[*record.query, *response[:t]]])
                    with torch.no_grad():
                        masking = torch.softmax(lagged(input_ids=ids).logits[0, -1].double(), dim=-1)
                        policy = torch.softmax(ppo.models.policy(input_ids=ids).logits[0, -1].double(), dim=-1)
                    order = masking.argsort(descending=True)
                    kept = order[: int((masking[order].cumsum(0) < 0.3).sum()) + 1].tolist()
                    assert token in kept
                    expected = math.log(policy[token] / policy[kept].sum())
                    assert float(found.logprobs[place]) == pytest.approx(expected, abs=1e-4)
                    own = policy.argsort(descending=True)
                    outside += token not in own[: int((policy[own].cumsum(0) < 0.3).sum()) + 1].tolist()
                    place += 1
        assert place == len(found.logprobs) and (outside > 0) == (rollout == 1)
        ppo.step()
        same = all(torch.equal(a, b) for a, b in zip(ppo.lagged.parameters(), lagged.parameters(), strict=True))
        assert same and not torch.equal(ppo.models.policy.lm_head.weight, lagged.lm_head.weight)


def test_nlpo_with_all_tokens_is_ppo() -> None:
    plain, masked = ppo_of(), ppo_of(nlpo=NLPOSettings(nlpo_top_p=1.0))
    for _ in range(2):
        assert masked.step()["policy_loss"] == pytest.approx(plain.step()["policy_loss"], abs=1e-6)
    assert masked.models_resident == 3 and plain.models_resident == 2
    found = weights(masked)
    assert all(torch.allclose(found[name], value, atol=1e-6) for name, value in weights(plain).items())


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ppo")
    tiny.write_model(folder / "model", chat=False)
    tiny.write_rewards(folder)
    tiny.write_rows(folder / "data.jsonl", tiny.rows(9, responses=0))
    return folder


def command(name: str, output: str, *more: str) -> tuple[str, ...]:
    return (
        "baseline", name, "--model", "model", "--data", "data.jsonl", "--reward", "tiny_rewards:vowels",
        "--output", output, "--device", "cpu", "--dtype", "float32", "--rollout_queries", "4", "--num_responses", "2",
        "--max_new_tokens", "5", "--per_device_train_batch_size", "2", "--ppo_epochs", "2", "--max_steps", "16",
        "--learning_rate", "0.01", "--save_steps", "4", "--kl_target", "0.5", *more,
    )  # fmt: skip


CASES = {
    "ppo": ("ppo", "--value_model", "model", "--whiten_rewards", "true"),
    "nlpo": ("nlpo", "--nlpo_top_p", "0.7", "--nlpo_refresh_steps", "3"),
    "adapter": ("ppo", "--peft", "lora", "--lora_r", "4"),
}


@pytest.mark.parametrize("case", CASES)
def test_killed_and_run_again_the_weights_are_the_same(case: str, place: Path) -> None:
    name, *more = CASES[case]
    tiny.warm(*command(name, f"{case}-whole", *more), cwd=place).done()
    # in the third rollout, whose lagged policy is the one of the first
    killed = tiny.warm(*command(name, case, *more), cwd=place, faults=[tiny.die("rrhf.training.ppo:PPO._optimise", 11)])
    assert killed.code == -signal.SIGKILL, killed.err[-2000:]
    assert sorted(path.name for path in (place / case).glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-8"]
    resumed = tiny.warm(*command(name, case, *more), cwd=place).done()
    assert "going on from rollout 2" in resumed.err
    whole, again = place / f"{case}-whole", place / case
    assert (again / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert (again / "model.safetensors").read_bytes() != (place / "model" / "model.safetensors").read_bytes()
    assert not list(again.glob("checkpoint-*"))

    def curve(folder: Path) -> list[dict[str, float]]:
        history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        timed = ("seconds", "sampling_share", "scoring_share", "training_share", "tokens_per_second")
        return [{key: value for key, value in line.items() if key not in timed} for line in history]

    assert curve(again) == curve(whole) and [line["step"] for line in curve(whole)] == [4, 8, 12, 16]
    summary = json.loads((again / "training.json").read_text())
    assert summary["models_resident"] == {"ppo": 3, "nlpo": 3, "adapter": 1}[case] and summary["responses"] == 32
    finished = tiny.warm(*command(name, case, *more), cwd=place)
    assert finished.code == 2 and "--overwrite" in finished.err


def test_a_signal_stops_after_the_rollout_and_another_run_is_refused(place: Path) -> None:
    stopped = tiny.warm(
        *command("ppo", "stopped"), cwd=place, faults=[tiny.die("rrhf.training.ppo:PPO._optimise", 5, "TERM")]
    )
    assert stopped.code == 143 and (place / "stopped" / "checkpoint-8").is_dir()
    assert len({file.stat().st_mode for file in (place / "stopped" / "checkpoint-8").iterdir()}) == 1
    other = tiny.warm(*command("ppo", "stopped", "--clip_range", "0.1", "--gamma", "0.9"), cwd=place)
    assert other.code == 2 and "clip_range was 0.2, is 0.1" in other.err and "gamma was 1.0, is 0.9" in other.err
    tiny.write_rows(place / "other.jsonl", tiny.rows(8, responses=0))
    data = tiny.warm(*command("ppo", "stopped", "--data", "other.jsonl"), cwd=place)
    assert data.code == 2 and ", of other.jsonl" in data.err
    masked = tiny.warm(*command("nlpo", "stopped"), cwd=place)
    assert masked.code == 2 and "baseline was 'ppo', is 'nlpo'" in masked.err
    tiny.warm(*command("ppo", "stopped", "--save_steps", "9"), cwd=place).done()


def test_a_judge_has_a_budget_and_is_paid_once(place: Path) -> None:
    """Samples depend on the seed and the rollout: what is done again after a stop is in the judge's journal."""
    pytest.importorskip("openai", reason="the extra `endpoint` is not installed")
    judged = ("--reward", "judge:judge.yaml", "--max_steps", "8", "--save_steps", "100")
    with judging(place) as server:
        stopped = tiny.warm(*command("ppo", "judged", *judged, "--max_requests", "6"), cwd=place)
        assert stopped.code == 2 and "the budget's 6 requests are spent" in stopped.err
        assert len(prompts_to(server)) == 5  # and a check: it ends in the second rollout, of which nothing is saved
        tiny.warm(*command("ppo", "judged", *judged, "--max_requests", "9"), cwd=place).done()
        assert len(prompts_to(server)) == len(set(prompts_to(server))) == 8


def test_what_cannot_be_is_refused(place: Path) -> None:
    with pytest.raises(UserError) as found:
        PPOConfig(clip_range=0.0, gamma=1.5, rollout_queries=0, kl_beta=0.0, kl_target=6.0)
    for fault in ("--clip_range 0.0", "--gamma 1.5", "--rollout_queries 0", "--kl_target 6.0 scales"):
        assert fault in str(found.value)
    with pytest.raises(UserError) as found:
        PPOConfig(lr_scheduler_type="cosin", max_steps=0, num_train_epochs=math.inf)
    for fault in (
        "--lr_scheduler_type cosin: did you mean 'cosine'?",
        "--max_steps 0: nothing",
        "_epochs inf: must be",
    ):
        assert fault in str(found.value)
    for schedule in ("reduce_lr_on_plateau", "warmup_stable_decay"):  # they need more than a number of steps
        with pytest.raises(UserError, match=f"--lr_scheduler_type {schedule}"):
            PPOConfig(lr_scheduler_type=schedule)
    for schedule in SCHEDULES:
        assert ppo_of(replace(SMALL, lr_scheduler_type=schedule)).schedule.get_last_lr()
    with pytest.raises(UserError, match=r"--nlpo_top_p 0[\s\S]*--nlpo_refresh_steps 0"):
        NLPOSettings(nlpo_top_p=0, nlpo_refresh_steps=0)
    provided = tiny.warm(*command("ppo", "no", "--reward", "provided"), cwd=place)
    assert provided.code == 2 and "cannot score new texts" in provided.err
    several = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    launched = tiny.warm(*command("ppo", "no"), cwd=place, env=several)
    assert launched.code == 2 and "one process" in launched.err
    unknown = tiny.warm(*command("ppo", "no", "--nlpo_top_p", "0.9"), cwd=place)
    assert unknown.code == 2 and "unknown flag --nlpo_top_p" in unknown.err
    dropping = tiny.warm(*command("ppo", "no", "--peft", "lora", "--lora_dropout", "0.1"), cwd=place)
    assert dropping.code == 2 and "--lora_dropout 0.1" in dropping.err
    assert not (place / "no").exists()


def test_models_of_another_tokenizer_are_refused(place: Path) -> None:
    """They would be given the policy's ids, which are other texts to them."""
    tiny.write_model(place / "others")
    tiny_tokenizer(eos="<|im_end|>").save_pretrained(place / "others")
    for flag in ("--reference_model", "--value_model"):
        refused = tiny.warm(*command("ppo", f"no{flag}", flag, "others"), cwd=place)
        assert refused.code == 2 and f"{flag} others: its tokenizer is not that of the model" in refused.err


def test_an_adapter_on_an_adapter_is_not_saved_alone(place: Path) -> None:
    """The folder would name the whole model as its base, without the first adapter."""
    lora = ("--peft", "lora", "--lora_r", "2", "--max_steps", "2", "--merge_adapter", "false")
    tiny.warm(*command("ppo", "first", *lora), cwd=place).done()
    refused = tiny.warm(*command("ppo", "second", *lora, "--model", "first"), cwd=place)
    assert refused.code == 2 and "first is an adapter itself" in refused.err and not (place / "second").exists()
