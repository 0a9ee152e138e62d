"""The model card: what a model was made of and what came of it, as README.md beside the weights."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path, PurePath
from typing import Any

from rrhf import __version__
from rrhf.common.files import read_object, write_text
from rrhf.common.presentation import describe_shares, markdown_table
from rrhf.common.yaml_text import read_yaml
from rrhf.models.folders import model_folder
from rrhf.models.identity import model_digest
from rrhf.records.formats import FILE_READERS
from rrhf.records.sources import COUNTED, source_shares
from rrhf.report.tables import evaluation_table, interval_side, model_names, models_of

log = logging.getLogger("rrhf")

CARD = "README.md"
MARK = "<!-- Written by rrhf. Take this line out, and rrhf leaves your changes alone. -->"
TAGS = ["rrhf", "alignment"]
WRITERS = ("ForCausalLM", "LMHeadModel", "WithLMHead", "ForConditionalGeneration")  # how classes that write text end
SCORER = "ForSequenceClassification"

SFT = {"sum": "a sum over tokens (Eq. 4)", "mean": "a mean over tokens"}
CITATION = """```bibtex
@article{yuan2023rrhf,
  title   = {RRHF: Rank Responses to Align Language Models with Human Feedback without tears},
  author  = {Yuan, Zheng and Yuan, Hongyi and Tan, Chuanqi and Wang, Wei and Huang, Songfang and Huang, Fei},
  journal = {arXiv preprint arXiv:2304.05302},
  year    = {2023}
}
```"""


def write_card(
    folder: str | Path,
    evaluation: Mapping[str, Any] | None = None,
    *,
    training: Mapping[str, Any] | None = None,
    name: str | None = None,
    refresh: bool = False,
) -> Path:
    """Write the card of the model in ``folder`` beside its weights.

    Args:
        folder: a model folder, or a run folder.
        evaluation: the content of an evaluation.json; left out, the run's own, where the model lies in a run folder and
            is the one that was evaluated.
        training: the summary that ``train_model`` returns; left out, training.json beside the weights.
        name: the model's name on the hub, where it has one.
        refresh: leave a card alone that rrhf did not write.

    Returns:
        The card's path.

    Raises:
        UserError: there is no model, or a file that belongs to it cannot be read.
    """
    folder = model_folder(folder)
    place = folder / CARD
    if refresh and place.exists() and MARK not in place.read_text(encoding="utf-8"):
        return place
    write_text(place, model_card(folder, evaluation, training=training, name=name))
    return place


def model_card(
    folder: Path,
    evaluation: Mapping[str, Any] | None = None,
    *,
    training: Mapping[str, Any] | None = None,
    name: str | None = None,
) -> str:
    """The text of the card: metadata for the hub, data, settings, results, use, versions, citation.

    It names files without their folders: no path of the machine that trained is in it.
    """
    training = read_object(folder / "training.json") if training is None else training
    run = folder.resolve().parent if folder.resolve().name == "model" else None
    if evaluation is None and run is not None:
        evaluation = _evaluation_of(folder, run)
    settings = training.get("settings") or read_object(folder / "training-settings.json")
    if _other_class(folder) is not None:  # `rrhf reward-model` notes digests in the place of these names
        settings = {key: value for key, value in settings.items() if key not in ("data", "model")}
    data = training.get("data") or source_shares(settings.get("data"))
    title = (name or _name_of(run or folder.resolve())).split("/")[-1]
    paragraphs = [
        _metadata(folder, settings, run),
        MARK,
        f"# {title}",
        _introduction(settings, folder),
        "## Use",
        _use(folder, name, data),
        "## Data",
        _data(settings, training, data),
        "## Settings",
        _settings(settings, training) if settings else "No settings are beside the weights.",
        "## Results",
        _results(evaluation, training),
        "## Versions",
        ", ".join(f"{package} {version}" for package, version in _versions().items()),
        "## Citation",
        CITATION,
    ]
    return "\n\n".join(paragraphs) + "\n"


def hub_id(value: Any, beside: Path | None = None) -> str | None:
    """``value`` where it can be the id of a hub repository and names no file or folder; else ``None``.

    Names are looked up from here and from the folders around ``beside``: the command that made what stands there was
    given from one of them, as a rule, and what it was given may have been relative.
    """
    text = str(value or "")
    fits = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", text) is not None
    if not fits or text.lower().endswith((".gguf", *FILE_READERS)):
        return None
    around = () if beside is None else beside.resolve().parents
    return None if any((place / text).exists() for place in (Path(), *around)) else text


def public_name(value: Any, beside: Path | None = None) -> str:
    """A model's or file's name without the folders it lies in; hub ids (``hub_id``) and package files as they are.

    What Markdown or HTML would read as theirs is left out of it.
    """
    text = str(value)
    shown = text if hub_id(text, beside) or text.startswith("package:") else Path(text).name
    return re.sub(r"[<>\[\]`|\r\n]", "_", shown)


def metadata_block(data: Any) -> str:
    """A card's YAML block of a ``huggingface_hub`` card-data object."""
    return f"---\n{data.to_yaml()}\n---"


def _name_of(folder: Path) -> str:
    """The folder's name, or that of the run whose round it is."""
    return f"{folder.parents[1].name}, round {folder.name}" if folder.parent.name == "rounds" else folder.name


def _other_class(folder: Path) -> str | None:
    """The class of a model that writes no text, such as a reward model; ``None`` of a language model or an adapter."""
    named = read_object(folder / "config.json").get("architectures") or [""]
    name = public_name(named[0])
    return name if name and not name.endswith(WRITERS) else None


def _evaluation_of(folder: Path, run: Path) -> dict[str, Any] | None:
    """The evaluation beside a model, where it is that model's: another may have been trained in its place since."""
    place = run / "evaluation.json"
    evaluation, made_of = read_object(place), read_object(run / "evaluation.pi.made-of.json").get("made_of")
    if not evaluation:
        return None
    weights = made_of.get("weights") if isinstance(made_of, Mapping) else None
    if weights:
        fits = weights == model_digest(str(folder))
    else:  # nobody knows which weights: by name and time
        trained = folder / "training.json"
        named = model_names(evaluation).get("pi")
        fits = isinstance(named, str) and Path(named).resolve() == folder.resolve()
        fits = fits and not (trained.exists() and trained.stat().st_mtime > place.stat().st_mtime)
    if not fits:
        log.warning(f"{place}: is of another model than {folder} holds: the model card leaves it out")
    return evaluation if fits else None


# --- parts -----------------------------------------------------------------------------------------------------------


def _metadata(folder: Path, settings: Mapping[str, Any], run: Path | None) -> str:
    from huggingface_hub import ModelCardData

    adapter = read_object(folder / "adapter_config.json")
    other = _other_class(folder)
    task = "text-generation" if other is None else "text-classification" if other.endswith(SCORER) else None
    sources = []
    if run is not None and (run / "config.yaml").exists():
        config = read_yaml(run / "config.yaml")
        data = config.get("data") if isinstance(config, dict) else None
        sources = [name for key in ("source", "held_out") if (name := hub_id((data or {}).get(key), folder))]
    return metadata_block(
        ModelCardData(
            base_model=hub_id(settings.get("model") or adapter.get("base_model_name_or_path"), folder),
            datasets=sorted(set(sources)) or None,
            library_name="peft" if adapter else "transformers",
            pipeline_tag=task,
            tags=TAGS,
        )
    )


def _introduction(settings: Mapping[str, Any], folder: Path) -> str:
    other = _other_class(folder)
    if other is not None:
        scores = ", which scores texts" if other.endswith(SCORER) else ""
        return (
            f"A reward model (`{other}`): of scored responses to a query it learned to give the better ones more."
            if "center_rewards" in settings
            else f"A model of the class `{other}`{scores}."
        )
    what = "A LoRA adapter" if (folder / "adapter_config.json").exists() else "A language model"
    if not settings:
        return f"{what}."
    base = f" from {public_name(settings['model'], folder)}" if settings.get("model") else ""
    ranking = settings.get("ranking_loss", "hinge")
    if settings.get("baseline"):
        name = public_name(settings["baseline"]).upper()
        how = f"{name}: it learns from the scores of responses that it samples itself."
    elif ranking == "none" or settings.get("rank_weight") == 0:
        how = "supervised fine-tuning: it learns to write the best response to a query (Eq. 4 of RRHF alone)."
    else:
        loss = "" if ranking == "hinge" else f", with the ranking loss `{public_name(ranking)}`"
        writes = "" if settings.get("sft_weight") == 0 else ", and to write the best one"
        how = (
            f"RRHF ([arXiv 2304.05302](https://arxiv.org/abs/2304.05302)){loss}: of several scored responses to a "
            f"query it learns to rate the better ones higher{writes}."
        )
    return f"{what} trained{base} with {how}"


def _use(folder: Path, name: str | None, data: Mapping[str, Any]) -> str:
    other = _other_class(folder)
    if other is not None:
        scoring = f"""As a reward:

```sh
rrhf score --data responses.jsonl --reward {name or "FOLDER"} --output scored.jsonl
```

With `transformers` it is loaded by `AutoModelForSequenceClassification`."""
        return scoring if other.endswith(SCORER) else f"With `transformers` it is loaded by `{other}`."
    template = (folder / "chat_template.jinja").exists() or "chat_template" in read_object(
        folder / "tokenizer_config.json"
    )
    chat = template and data.get("messages", True)
    inputs = (
        'messages = [{"role": "user", "content": "Write a sentence about the sea."}]\n'
        "inputs = tokenizer.apply_chat_template(\n"
        '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"\n'
        ")"
        if chat
        else 'inputs = tokenizer("Write a sentence about the sea.", return_tensors="pt")'
    )
    needs = " and `peft`" if (folder / "adapter_config.json").exists() else ""
    return f"""With `transformers`{needs}:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

name = "{name or "."}"{"" if name else "  # the folder of this file"}
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name)
{inputs}
output = model.generate(**inputs, max_new_tokens=40, do_sample=True, top_p=0.9)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```"""


def _data(settings: Mapping[str, Any], training: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    lines = []
    if settings.get("data"):
        what = "queries" if settings.get("baseline") else "queries with scored responses"
        lines.append(f"- trained on: `{public_name(settings['data'])}`, {what}")
    if "records" in training:
        lines.append(f"- records: {training['records']}")
    lines += [f"- skipped: {count} ({reason})" for reason, count in sorted(training.get("skipped", {}).items())]
    for key, words in (
        ("queries", "queries with a better and a worse response"),
        ("pairs", "pairs of such responses"),
        ("rows_cut", "rows cut to the length limit"),
        ("responses", "responses sampled in training"),
        ("left_out", "scored responses left out by the selection"),
        ("unranked", "records with fewer than two scored responses: fitted, not ranked"),
        ("queries_cut", "queries cut from the left to the length limit"),
        ("responses_cut", "responses cut from the right to the length limit"),
    ):
        if training.get(key):
            lines.append(f"- {words}: {training[key]}")
    if data.get("sources") and not settings.get("baseline"):  # PPO trains on no response that its data bring
        seen = f" (of the first {COUNTED:,} records)" if data["records"] == COUNTED else ""
        lines.append(f"- responses by source{seen}: {describe_shares(data['sources'])}")
    return "\n".join(lines) or "Nothing is known about the data: no training.json is beside the weights."


def _settings(settings: Mapping[str, Any], training: Mapping[str, Any]) -> str:
    queries = settings.get("per_device_train_batch_size", 1) * settings.get("gradient_accumulation_steps", 1)
    if settings.get("baseline"):
        own = _of_ppo(settings, training)
    elif "center_rewards" in settings:
        own = _of_reward_model(settings)
    else:
        own = _of_ranking(settings)
    rows = [
        *own,
        ("learning rate", settings.get("learning_rate")),
        ("schedule", settings.get("lr_scheduler_type")),
        ("optimiser steps", training.get("steps")),
        ("epochs", settings.get("num_train_epochs") if settings.get("max_steps", -1) <= 0 else None),
        ("queries a step and process", queries),
        ("tokens of query and response", settings.get("max_length")),
        ("adapter", _adapter(settings)),
        ("precision", training.get("precision")),
        ("seed", settings.get("seed")),
    ]
    return markdown_table(["setting", "value"], [[name, str(value)] for name, value in rows if value is not None])


def _of_ranking(settings: Mapping[str, Any]) -> list[tuple[str, Any]]:
    ranking = settings.get("ranking_loss")
    return [
        ("loss", "rank weight · ranking loss + SFT weight · cross-entropy on the best response (Eq. 5)"),
        ("ranking loss", None if ranking is None else _ranking(str(ranking))),
        ("rank weight", settings.get("rank_weight")),
        ("margin", settings.get("margin") or None),
        ("responses that train", _selection(str(settings.get("select", "all")))),
        ("equal scores", _ties(str(settings.get("ties", "none")))),
        ("cross-entropy", SFT.get(str(settings.get("sft_reduction")), settings.get("sft_reduction"))),
        ("SFT weight", settings.get("sft_weight")),
        ("reference", settings.get("reference_sums")),
        ("β", settings.get("dpo_beta") if settings.get("reference_sums") else None),
        ("p_i", f"log-probability / length^{settings.get('length_exponent', 1.0):g} (Eq. 1)"),
        ("numbers of the released code", "yes" if settings.get("released_compat") else None),
    ]


def _of_ppo(settings: Mapping[str, Any], training: Mapping[str, Any]) -> list[tuple[str, Any]]:
    rewards, weights = settings.get("reward") or [], settings.get("reward_weights") or []
    named = [f"`{_reward(reward)}`" for reward in rewards]
    if weights:
        named = [f"{weight:g} · {name}" for weight, name in zip(weights, named)]
    reference = settings.get("reference_model")
    return [
        ("reward", " + ".join(named) or None),
        ("clip range", settings.get("clip_range")),
        ("KL β", settings.get("kl_beta")),
        ("KL that β is adapted to", settings.get("kl_target")),
        ("reference ρ", None if reference is None else f"`{public_name(reference)}`"),
        ("rollouts", training.get("rollouts")),
        ("queries a rollout", settings.get("rollout_queries")),
        ("responses a query", settings.get("num_responses")),
        ("tokens of a response", settings.get("max_new_tokens")),
        ("passes over a rollout", settings.get("ppo_epochs")),
        ("top p of NLPO's mask", settings.get("nlpo_top_p")),
        ("rollouts until the mask is renewed", settings.get("nlpo_refresh_steps")),
    ]


def _of_reward_model(settings: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [
        ("loss", "−log σ(difference of the scores), the mean over a query's pairs"),
        ("equal scores", _ties(str(settings.get("ties", "none")))),
        ("weight of the centring term", settings["center_rewards"] or None),
    ]


def _ranking(name: str) -> str:
    """A ranking loss by its name and, where it is one of ours, its description: a card imports no code of others."""
    from rrhf.losses import RANKING_LOSSES, describe  # here: cards of records need no torch

    return f"`{name}`, {describe(RANKING_LOSSES[name])}" if name in RANKING_LOSSES else f"`{name}`"


def _ties(ties: str) -> str | None:
    """What a rule for equal scores does; nothing for Eq. 2's own."""
    from rrhf.losses import describe, tie_rule

    return None if ties == "none" else f"`{ties}`: {describe(tie_rule(ties)[0])}"


def _selection(select: str) -> str | None:
    """Which responses train; nothing where all do."""
    from rrhf.training.selection import describe_selection, find_selection

    return None if select == "all" else f"`{select}`: {describe_selection(find_selection(select)[0])}"


def _adapter(settings: Mapping[str, Any]) -> str | None:
    if not settings.get("peft"):
        return None
    kept = "merged into the weights" if settings.get("merge_adapter") else "saved alone"
    return f"{settings['peft']}, rank {settings.get('lora_r')}, alpha {settings.get('lora_alpha'):g}, {kept}"


def _results(evaluation: Mapping[str, Any] | None, training: Mapping[str, Any]) -> str:
    loss = training.get("train_loss")
    lines = [] if loss is None else [f"Mean training loss: {loss:.4g}."]
    if training.get("held_out"):  # of a reward model
        from rrhf.training.reward_model.stage import sentence  # here: it loads torch

        measured = sentence(training["held_out"])
        return "\n\n".join([*lines, f"{measured[0].upper()}{measured[1:]}."])
    if not evaluation or "pi" not in evaluation:
        return "\n\n".join([*lines, "Not evaluated on held-out prompts."])
    both = len(models_of(evaluation)) == 2
    gains = {reward: values["gain"] for reward, values in evaluation.get("rewards", {}).items()} if both else {}
    rho = model_names(evaluation).get("rho")
    verdicts = [_verdict(reward, gain, rho) for reward, gain in gains.items() if gain["low"] is not None]
    lines.append(markdown_table(*evaluation_table(evaluation, lambda reward: f"`{_reward(reward)}`")))
    judge = evaluation.get("perplexity_model")
    lines.append(
        f"{evaluation['pi'].get('n')} held-out prompts, one sampled response each, seed {evaluation.get('seed')}"
        + (f"; perplexity of the responses under {public_name(judge)}." if judge else ".")
        + (" The intervals are paired bootstraps over prompts." if both else "")
    )
    return "\n\n".join([*lines, *verdicts])


def _reward(reward: str) -> str:
    """A reward's name without the folders of what stands behind its form (``model:``, ``judge:`` …)."""
    form, colon, rest = reward.partition(":")
    return f"{form}:{public_name(rest)}" if colon else public_name(form)


def _verdict(reward: str, gain: Mapping[str, float], rho: Any = None) -> str:
    """What the interval of a gain allows to say; ``rho``: the model that the gain is over, by its name."""
    than = f"ρ (`{public_name(rho)}`)" if rho else "ρ"
    readings = {
        1: f"the model is better than {than}: the interval lies above 0.",
        0: "**no difference is shown**: the interval includes 0.",
        -1: f"the model is **worse** than {than}: the interval lies below 0.",
    }
    return f"By `{_reward(reward)}` {readings[interval_side(gain['low'], gain['high'])]}"


def _versions() -> dict[str, str]:
    """Of the packages that matter, those installed, without importing them."""
    versions = {"rrhf": __version__}
    for package in ("torch", "transformers", "accelerate", "peft", "tokenizers"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


# --- records ---------------------------------------------------------------------------------------------------------


def records_card(file: PurePath, records: int, data: Mapping[str, Any], columns: Mapping[str, str], name: str) -> str:
    """The card of a data set of records: what a row holds and where the responses come from."""
    from huggingface_hub import DatasetCardData

    block = metadata_block(
        DatasetCardData(
            tags=TAGS,
            task_categories=["text-generation"],
            configs=[{"config_name": "default", "data_files": [{"split": "train", "path": file.as_posix()}]}],
        )
    )
    shares = describe_shares(data.get("sources", {}))
    table = markdown_table(["column", "what"], [[f"`{key}`", what] for key, what in columns.items()])
    return f"""{block}

{MARK}

# {name.split("/")[-1]}

{records} queries with {data.get("responses", 0)} responses, for training with RRHF
([arXiv 2304.05302](https://arxiv.org/abs/2304.05302)).{f" Responses by source: {shares}." if shares else ""}

{table}

## Use

```python
from datasets import load_dataset

records = load_dataset("{name}", split="train")
```

or `rrhf train --data {file.name} …` with the file itself, which keeps what is JSON text in a column as an object.

## Citation

{CITATION}
"""


def column_words(names: Sequence[str]) -> dict[str, str]:
    """What the record's columns hold; others are named as they are."""
    words = {
        "id": "of the query",
        "query": "x: text, or a list of messages",
        "responses": "y_i: texts",
        "sources": "where each response came from",
        "finish": "`stop`, or `length` where a token limit cut it",
        "scores": "r_i: what training uses; null is not scored",
        "rewards": "each reward's scores, by name",
    }
    return {name: words.get(name, "carried along") for name in names}
