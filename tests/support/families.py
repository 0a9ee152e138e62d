"""A tiny random model of every family that docs/families.md names, and what the table there says of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

VOCABULARY = 97
WINDOW = 8  # of sliding windows and chunks

PLAIN: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
SIZES = {**PLAIN, "head_dim": 8}
UNGROUPED = {**PLAIN, "num_key_value_heads": 4}
NEOX = {name: value for name, value in PLAIN.items() if name != "num_key_value_heads"}
SPECIAL = {"bos_token_id": 0, "eos_token_id": 0}
GPT = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, **SPECIAL}
SLIDING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
ROUTED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 16,
}


@dataclass(frozen=True)
class Family:
    """``model`` and ``config`` name transformers' classes, ``options`` are the configuration's.

    ``path`` is the one it takes in training and in sampling, and ``reason`` stands in the warning where that is not the
    tree. ``remark`` is for the table in docs/families.md.
    """

    title: str
    model: str
    config: str
    options: dict[str, Any]
    path: str = "tree"
    reason: str = ""
    remark: str = ""

    def make(self, seed: int = 0, **options: Any) -> Any:
        """A random model in fp32 and evaluation mode, whose next token depends on all that it has read."""
        import torch
        import transformers

        torch.manual_seed(seed)
        config = getattr(transformers, self.config)(**{**self.options, **options})
        model = getattr(transformers, self.model)(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() >= 2 or name.endswith("sinks"):
                    parameter.normal_(0.0, 0.2)
        return model


def _family(title: str, name: str, options: dict[str, Any], remark: str = "", config: str = "", **rest: Any) -> Family:
    return Family(title, f"{name}ForCausalLM", f"{config or name}Config", options, remark=remark, **rest)


def _padded(title: str, name: str, reason: str, options: dict[str, Any], remark: str, config: str = "") -> Family:
    return _family(title, name, options, remark, config, path="padded", reason=reason)


FAMILIES: dict[str, Family] = {
    "llama": _family("Llama 1–3, SmolLM 2", "Llama", SIZES),
    "llama4": _family(
        "Llama 4, text",
        "Llama4",
        {
            **SIZES,
            **EXPERTS,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 64,
            "layer_types": ["chunked_attention", "full_attention"],
            "attention_chunk_size": WINDOW,
            "floor_scale": 4,
        },
        "chunks; queries are scaled by position, which transformers takes to be the column",
        config="Llama4Text",
    ),
    "mistral": _family("Mistral", "Mistral", {**SIZES, "sliding_window": WINDOW}, "window"),
    "ministral": _family("Ministral", "Ministral", {**SIZES, **SLIDING}, "window in some layers"),
    "ministral3": _family("Ministral 3", "Ministral3", SIZES),
    "mixtral": _family(
        "Mixtral",
        "Mixtral",
        {**SIZES, **EXPERTS, "output_router_logits": True, "router_aux_loss_coef": 0.02},
        "experts; their router loss is part of the training loss where the configuration asks for it",
    ),
    "qwen2": _family("Qwen 2, 2.5", "Qwen2", PLAIN),
    "qwen3": _family("Qwen 3", "Qwen3", SIZES),
    "qwen3-moe": _family(
        "Qwen 3 MoE",
        "Qwen3Moe",
        {**SIZES, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        "experts",
    ),
    "qwen2-moe": _padded(
        "Qwen 2 MoE with windows",
        "Qwen2Moe",
        "1 of its 2 layers told a window of 8 tokens by the mask alone",
        {
            **SIZES,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": 2,
        },
        "a window that the mask alone tells; without one, as released, the tree",
    ),
    "phimoe": _padded(
        "Phi-3.5 MoE with a window",
        "Phimoe",
        "2 of its 2 layers told a window of 8 tokens by the mask alone",
        {**SIZES, **EXPERTS, "sliding_window": WINDOW},
        "a window that the mask alone tells",
    ),
    "gemma2": _family("Gemma 2", "Gemma2", {**SIZES, **SLIDING}, "window in some layers; soft caps"),
    "gemma3": _family("Gemma 3, text", "Gemma3", {**SIZES, **SLIDING}, "window in some layers", "Gemma3Text"),
    "gemma4": _family(
        "Gemma 4, text",
        "Gemma4",
        {
            **SIZES,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "sliding_window": WINDOW,
            "num_kv_shared_layers": 2,
            "global_head_dim": 16,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCABULARY,
        },
        "window in some layers; keys shared between layers",
        "Gemma4Text",
    ),
    "phi3": _family("Phi-3, Phi-4", "Phi3", PLAIN),
    "olmo2": _family("OLMo 2", "Olmo2", PLAIN),
    "olmo3": _family("OLMo 3", "Olmo3", {**PLAIN, **SLIDING}, "window in some layers"),
    "cohere2": _family(
        "Cohere 2 (Command R7B)", "Cohere2", {**SIZES, **SLIDING, "logit_scale": 0.5}, "window in some layers"
    ),
    "deepseek-v3": _family("DeepSeek-V3, R1", "DeepseekV3", {**UNGROUPED, **LATENT, **ROUTED}, "MLA; experts"),
    "gpt-oss": _family(
        "GPT-OSS", "GptOss", {**SIZES, **SLIDING, **EXPERTS}, "window in some layers; experts; attention sinks"
    ),
    "afmoe": _family(
        "AFMoE (Trinity)",
        "Afmoe",
        {
            **SIZES,
            **SLIDING,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "num_dense_layers": 1,
        },
        "window in some layers; experts; no router loss",
    ),
    "jetmoe": _family(
        "JetMoE",
        "JetMoe",
        {
            **{name: value for name, value in PLAIN.items() if name != "num_attention_heads"},
            **EXPERTS,
            "kv_channels": 8,
            "output_router_logits": True,
            "aux_loss_coef": 0.02,
        },
        "experts, of attention too; router loss as Mixtral's",
    ),
    "gpt2": Family("GPT-2", "GPT2LMHeadModel", "GPT2Config", GPT),
    "gpt-j": _family("GPT-J", "GPTJ", {**GPT, "rotary_dim": 4}, "the paper's reward model"),
    "gpt-neox": _family("GPT-NeoX, Pythia", "GPTNeoX", NEOX),
    "opt": _family(
        "OPT",
        "OPT",
        {**NEOX, "ffn_dim": 64, "word_embed_proj_dim": 16, "pad_token_id": 1},
    ),
    "gpt-neo": _padded(
        "GPT-Neo",
        "GPTNeo",
        "its attention cannot be exchanged",
        {
            **NEOX,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": WINDOW,
        },
        "its code has an attention of its own",
    ),
    "qwen3.5": _padded(
        "Qwen 3.5",
        "Qwen3_5",
        "1 of its 2 layers attended by the tree once, 1 calls in all",
        {
            **UNGROUPED,
            "head_dim": 8,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "layer_types": ["linear_attention", "full_attention"],
        },
        "linear attention in most layers: a recurrence",
        "Qwen3_5Text",
    ),
    "lfm2": _padded(
        "LFM 2",
        "Lfm2",
        "1 of its 2 layers attended by the tree once, 1 calls in all",
        {**PLAIN, "layer_types": ["conv", "full_attention"]},
        "convolutions in most layers",
    ),
    "mamba2": _padded(
        "Mamba 2",
        "Mamba2",
        "0 of its 2 layers attended by the tree once, 0 calls in all",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_heads": 8,
            "head_dim": 8,
            "state_size": 8,
            "n_groups": 1,
            "chunk_size": 8,
            "pad_token_id": 0,
            **SPECIAL,
        },
        "a recurrence",
    ),
    # With few heads many scores of the index are exactly 0, and which of equal ones it takes depends on the row.
    "deepseek-v3.2": _padded(
        "DeepSeek-V3.2",
        "DeepseekV32",
        "attention option indices",
        {**UNGROUPED, **LATENT, **ROUTED, "index_topk": WINDOW, "index_n_heads": 16, "index_head_dim": 8},
        "an index chooses the keys that are read; where its scores tie, any of them",
    ),
    "bloom": _padded(
        "BLOOM",
        "Bloom",
        "its attention cannot be exchanged",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4, **SPECIAL},
        "ALiBi, which counts columns, in an attention of its own",
    ),
    "stablelm": _padded(
        "StableLM",
        "StableLm",
        "0 of its 2 layers attended by the tree once, 0 calls in all",
        UNGROUPED,
        "its code has an attention of its own",
    ),
}


QUERIES = [[5], list(range(20, 31)), [7, 60, 2, 33]]


def draw(model: Any, path: str, **options: Any) -> list[list[int]]:
    """All responses of QUERIES, 12 tokens or up to one of two end tokens where there are several."""
    import torch

    from rrhf.sampling.decoding import decode
    from rrhf.sampling.settings import POLICIES, SamplingSettings

    settings = SamplingSettings(max_new_tokens=12, **options)
    ends = [set() if settings.policy == "greedy" else {3, 40}] * 3
    policy = POLICIES[settings.policy](settings, ["a", "b", "c"], ends, None, torch.device("cpu"))
    drawn = decode(model, QUERIES, policy, 12, path)
    return [response.tokens for responses in drawn for response in responses]


def table() -> str:
    """The table of docs/families.md."""
    rows = [["family", "class in transformers", "training", "sampling", "test", "remark"]]
    paths = {"tree": ("tree", "shared cache"), "padded": ("padded rows", "transformers' cache")}
    for name, family in FAMILIES.items():
        rows.append([family.title, f"`{family.model}`", *paths[family.path], f"`[{name}]`", family.remark])
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    print(table())
