"""Tiny random reward models in the layouts that are known, written to folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support.models import tiny_model, tiny_tokenizer


def bert_tokenizer() -> Any:
    """One id a byte, with [CLS] and [SEP] around a text or a pair of texts."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[CLS]", "[SEP]"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*special, *letters])}
    plain = Tokenizer(models.BPE(vocabulary, []))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


def write_encoder(folder: Path, labels: dict[int, str] | None = None, context: int = 64, spread: float = 0.4) -> Any:
    """A BERT of two layers for sequence classification; returns the model."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    tokenizer = bert_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=context, num_labels=len(labels or {0: ""}), pad_token_id=0, initializer_range=spread,
    )  # fmt: skip
    if labels:
        config.id2label, config.label2id = labels, {name: number for number, name in labels.items()}
    torch.manual_seed(0)
    model = BertForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def write_roberta(folder: Path, context: int = 64) -> Any:
    """A RoBERTa of two layers with one label; its head has a layer before the last. Returns the model."""
    import torch
    from transformers import RobertaConfig, RobertaForSequenceClassification

    tokenizer = bert_tokenizer()
    config = RobertaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=context, num_labels=1, pad_token_id=0, type_vocab_size=2, initializer_range=0.4,
    )  # fmt: skip
    torch.manual_seed(0)
    model = RobertaForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def write_causal(folder: Path, family: str, head: str, bias: bool = False, **settings: Any) -> tuple[Any, Any]:
    """A causal language model with a scalar head beside it, as trainers save one; returns (the model, the head)."""
    import torch
    from safetensors.torch import load_file, save_file

    tokenizer = tiny_tokenizer()
    model = tiny_model(family, len(tokenizer))
    model.config.update(settings)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    linear = torch.nn.Linear(32, 1, bias=bias)
    tensors = load_file(folder / "model.safetensors")
    tensors.update({f"{head}.{name}": tensor.detach() for name, tensor in linear.named_parameters()})
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return model, linear


def write_gptj(folder: Path) -> tuple[Any, Any]:
    """The layout of Dahoas/gptj-rm-static, tiny and random: a raw checkpoint beside a GPT-J's configuration.

    Returns (the decoder, the head).
    """
    import torch
    from transformers import GPTJConfig, GPTJModel

    tokenizer = tiny_tokenizer(template=None)
    config = GPTJConfig(
        vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=96, rotary_dim=4,
        bos_token_id=0, eos_token_id=0, architectures=["GPTJForCausalLM"],
    )  # fmt: skip
    torch.manual_seed(0)
    decoder, head = GPTJModel(config).eval(), torch.nn.Linear(32, 1, bias=False)
    tensors = {f"transformer.{name}": tensor for name, tensor in decoder.state_dict().items()}
    for layer in range(2):  # what the transformers of its time kept with the weights
        tensors[f"transformer.h.{layer}.attn.bias"] = torch.ones(96, 96).tril().bool()[None, None]
        tensors[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e9)
    tensors["v_head.weight"] = head.weight.detach()
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    torch.save(tensors, folder / "hf_ckpt.pt")
    return decoder, head
