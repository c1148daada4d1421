"""Families of models, as tiny random ones of the real configuration classes."""

from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from tests.helpers import TINY, make_tiny_model, make_tokenizer

WINDOW = {"sliding_window": 8}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
SHARED_MOE = MOE | {"shared_expert_intermediate_size": 32}
UNTIED = {"tie_word_embeddings": False}
LOCAL_MOE = UNTIED | {"num_local_experts": 4, "num_experts_per_tok": 2}
JITTER = LOCAL_MOE | {"router_jitter_noise": 0.1, "output_router_logits": True}
LATENT = {"kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 32}
LATENT |= {"num_key_value_heads": 2, "q_lora_rank": 16}
GROUPS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
GROUPS |= UNTIED | {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
DEEPSEEK = LATENT | GROUPS | {"head_dim": 64, "kv_lora_rank": 512, "qk_rope_head_dim": 64}
DEEPSEEK |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 16}
LINEAR |= {"linear_value_head_dim": 16, "layer_types": ["linear_attention", "full_attention"]}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_n_groups": 1, "mamba_d_state": 16}
GPT = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 512}
MIXED = {"layer_types": ["sliding_attention", "full_attention"]}
GEMMA = WINDOW | MIXED | {"query_pre_attn_scalar": 32, "final_logit_softcapping": 2.0}
PER_LAYER = {"vocab_size_per_layer_input": 110, "hidden_size_per_layer_input": 16}
GEMMA_4 = GEMMA | PER_LAYER | {"num_kv_shared_layers": 0, "global_head_dim": 32}
GEMMA_3N = PER_LAYER | {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "laurel_rank": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "activation_sparsity_pattern": [0.0] * 4,
    "intermediate_size": [96] * 4,
}
DBRX_EXPERTS = {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64}
DBRX_EXPERTS |= {"moe_jitter_eps": 0.1, "ffn_act_fn": {"name": "silu"}}
DBRX = {"d_model": 64, "n_heads": 2, "n_layers": 2, "max_seq_len": 512, "ffn_config": DBRX_EXPERTS}
DBRX |= {"attn_config": {"kv_n_heads": 1, "rope_theta": 1e4, "clip_qkv": 8.0}}
VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "patch_size": 14}
VISION |= {"num_attention_heads": 2, "image_size": 28}
SCALED = {"logits_scaling": 4.0, "attention_multiplier": 0.1, "residual_multiplier": 0.5}


def with_images(text: dict[str, Any], **overrides: Any) -> dict[str, Any]:
    """The configuration of a model whose decoder has these overrides."""
    return {"text_config": TINY | text, "vision_config": VISION} | overrides


FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen2": ("Qwen2", {}),
    "Qwen2, windows": (
        "Qwen2",
        WINDOW | {"use_sliding_window": True, "max_window_layers": 0},
    ),
    "Qwen3": ("Qwen3", {}),
    "Llama": ("Llama", {}),
    "Mistral": ("Mistral", WINDOW),
    "Ministral": ("Ministral", WINDOW | MIXED),
    "Phi-3": ("Phi3", {}),
    "OLMo": ("Olmo", {}),
    "OLMo 2": ("Olmo2", {}),
    "OLMo 3": ("Olmo3", WINDOW),
    "SmolLM3": ("SmolLM3", {}),
    "GLM-4": ("Glm4", {"partial_rotary_factor": 0.5}),
    "GPT-2": ("GPT2", GPT),
    "Gemma": ("Gemma", {}),
    "Gemma 2": ("Gemma2", GEMMA | {"attn_logit_softcapping": 2.0}),
    "Gemma 3, text": ("Gemma3Text", WINDOW | MIXED),
    "Gemma 3": ("Gemma3", with_images(WINDOW | MIXED, mm_tokens_per_image=4)),
    "Gemma 3n, text": ("Gemma3nText", WINDOW | GEMMA_3N),
    "Gemma 4, text": ("Gemma4Text", GEMMA_4),
    "Gemma 4": ("Gemma4", with_images(GEMMA_4)),
    "VaultGemma": ("VaultGemma", GEMMA),
    "Granite": ("Granite", SCALED),
    "Cohere": ("Cohere", {"logit_scale": 0.25}),
    "Cohere 2": ("Cohere2", WINDOW | {"logit_scale": 0.25}),
    "MiniCPM3": ("MiniCPM3", LATENT | {"dim_model_base": 32}),
    "Apertus": ("Apertus", {}),
    "GPT-OSS": ("GptOss", WINDOW | LOCAL_MOE),
    "Qwen2-MoE": ("Qwen2Moe", SHARED_MOE),
    "Qwen2-MoE, windows": ("Qwen2Moe", SHARED_MOE | WINDOW | MIXED | {"use_sliding_window": True}),
    "Qwen3-MoE": ("Qwen3Moe", MOE),
    "OLMoE": ("Olmoe", UNTIED | {"num_experts": 4, "num_experts_per_tok": 2}),
    "GLM-4 MoE": ("Glm4Moe", GROUPS | {"partial_rotary_factor": 0.5, "n_shared_experts": 1}),
    "Mixtral": ("Mixtral", JITTER),
    "MiniMax-M2": ("MiniMaxM2", JITTER | {"rotary_dim": 16}),
    "PhiMoE": ("Phimoe", JITTER),
    "DBRX": ("Dbrx", DBRX | UNTIED),
    "DeepSeek-V2": ("DeepseekV2", DEEPSEEK),
    "DeepSeek-V3": ("DeepseekV3", DEEPSEEK | {"topk_method": "noaux_tc"}),
    "Qwen3-Next": ("Qwen3Next", SHARED_MOE | LINEAR),
    "Qwen3.5, text": ("Qwen3_5Text", LINEAR),
    "LFM2": ("Lfm2", {"layer_types": ["conv", "full_attention"]}),
    "Jamba": (
        "Jamba",
        {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "mamba_d_state": 8}
        | {"num_experts_per_tok": 1, "use_mamba_kernels": False, "mamba_dt_rank": 8},
    ),
    "Granite hybrid": (
        "GraniteMoeHybrid",
        MAMBA
        | {"num_local_experts": 0, "num_experts_per_tok": 0, "shared_intermediate_size": 96}
        | {"layer_types": ["mamba", "attention"], "position_embedding_type": "rope"},
    ),
    "Falcon-H1": ("FalconH1", MAMBA | {"mamba_d_ssm": 128}),
    "Doge": ("Doge", {"keep_window_size": 8}),
    "StableLM": ("StableLm", {}),
    "Nemotron": ("Nemotron", {}),
    "Falcon": ("Falcon", {"head_dim": None}),
    "BLOOM": ("Bloom", {"n_layer": 2, "n_head": 2}),
    "GPT-J": ("GPTJ", GPT | UNTIED | {"rotary_dim": 16}),
    "GPT-Neo": (
        "GPTNeo",
        {"num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]}
        | {"window_size": 8},
    ),
    "MPT": ("Mpt", {"d_model": 64, "n_heads": 2, "n_layers": 2, "max_seq_len": 512}),
    "XGLM": ("XGLM", {"d_model": 64, "ffn_dim": 96, "num_layers": 2, "attention_heads": 2}),
    "Mamba": ("Mamba", {"state_size": 8}),
    "Mamba 2": ("Mamba2", {"state_size": 16, "num_heads": 4, "head_dim": 32, "n_groups": 1}),
    "RWKV": ("Rwkv", {"attention_hidden_size": 64}),
    "Llama 4": ("Llama4", with_images({})),
    "Qwen2.5-VL": ("Qwen2_5_VL", with_images({})),
    "Qwen3-VL": ("Qwen3VL", with_images({})),
    "LLaVA": ("Llava", {"text_config": TINY | {"model_type": "llama"}}),
}
"""Name → the configuration's class, without its ending, and what isn't as in `TINY`."""


def make_family(name: str, folder: Path) -> Path:
    """Saves a tiny model of this family and a tokenizer; without weights one that can't be made."""
    import transformers

    kind, overrides = FAMILIES[name]
    config = getattr(transformers, f"{kind}Config")
    if config in transformers.AutoModelForCausalLM._model_mapping:
        return make_tiny_model(folder, kind, **overrides)
    folder.mkdir(exist_ok=True)
    config(**{**overrides, "eos_token_id": 0}).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    save_file({}, folder / "model.safetensors")
    return folder
