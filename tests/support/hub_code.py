"""Model folders that bring Python of their own, in the styles that repositories of the hub have.

All code is written for these tests. Every modeling file first writes the file that the environment
variable LMINF_TEST_MARKER names, so that a test sees whether it ran.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from lminf_export.checkpoint.source import open_source
from lminf_export.models.remote_code import new_model

MARKER = "LMINF_TEST_MARKER"
_HEAD = f'''
import os

if os.environ.get("{MARKER}"):
    open(os.environ["{MARKER}"], "a").write(__name__ + "\\n")
'''
_CONFIG = """
from transformers import PretrainedConfig


class HubConfig(PretrainedConfig):
    model_type = "hub_style"

    def __init__(self, vocab_size=97, hidden_size=48, intermediate_size=64, num_hidden_layers=3,
                 num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
                 rms_norm_eps=1e-6, rope_theta=1000.0, scale_emb=1.0, scale_depth=1.0,
                 dim_model_base=48, attn_implementation="eager", **kwargs):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta = rope_theta
        self.scale_emb = scale_emb
        self.scale_depth = scale_depth
        self.dim_model_base = dim_model_base
        super().__init__(**kwargs)
"""
_COMMON = """
import math
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel, GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_hub import HubConfig


class HubRMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


class HubMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def rotate_half(x):
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def repeat_kv(x, n):
    if n == 1:
        return x
    batch, heads, length, dim = x.shape
    x = x[:, :, None, :, :].expand(batch, heads, n, length, dim)
    return x.reshape(batch, heads * n, length, dim)
"""
_MODEL = """
class HubDecoderLayer(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.attention = HubAttention(config, layer_idx)
        self.feed_forward = HubMLP(config)
        self.attention_norm = HubRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ffn_norm = HubRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.factor = config.scale_depth / math.sqrt(config.num_hidden_layers)
        if config.scale_depth == 1.0:
            self.factor = 1.0

    def forward(self, hidden_states, attention_mask=None, position_ids=None, **kwargs):
        part = self.attention(
            self.attention_norm(hidden_states),
            attention_mask=attention_mask,
            position_ids=position_ids,
            **kwargs,
        )[0]
        hidden_states = hidden_states + part * self.factor
        return hidden_states + self.feed_forward(self.ffn_norm(hidden_states)) * self.factor


class HubPreTrainedModel(PreTrainedModel):
    config_class = HubConfig
    base_model_prefix = "model"
    _no_split_modules = ["HubDecoderLayer"]
    SUPPORTS

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight.data.normal_(0.0, 0.2)


class HubModel(HubPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            [HubDecoderLayer(config, i) for i in range(config.num_hidden_layers)]
        )
        self.norm = HubRMSNorm(config.hidden_size, config.rms_norm_eps)
        PREPARE
        self.post_init()

    def get_input_embeddings(self):
        return self.tok_embeddings

    def set_input_embeddings(self, value):
        self.tok_embeddings = value

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, use_cache=None,
                inputs_embeds=None, past_key_values=None, return_dict=None, **kwargs):
        hidden_states = self.tok_embeddings(input_ids) * self.config.scale_emb
        batch, length = input_ids.shape
        if position_ids is None:
            position_ids = torch.arange(length, device=input_ids.device)[None]
        MASK
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask=mask, position_ids=position_ids
                                  ARGUMENTS)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states))


class HubForCausalLM(HubPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {}

    def __init__(self, config):
        super().__init__(config)
        self.model = HubModel(config)
        self.output = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.tok_embeddings

    def get_output_embeddings(self):
        return self.output

    def set_output_embeddings(self, value):
        self.output = value

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, use_cache=None,
                labels=None, return_dict=None, **kwargs):
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask,
                            position_ids=position_ids, use_cache=use_cache, **kwargs)[0]
        scale = self.config.hidden_size / self.config.dim_model_base
        logits = self.output(hidden / scale)
        return CausalLMOutputWithPast(logits=logits.float())
"""
# Through the attention interface of transformers.
_INTERFACE = """
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


class HubRotaryEmbedding(nn.Module):
    def __init__(self, dim, base):
        super().__init__()
        inv_freq = 1.0 / (base ** (torch.arange(0, dim, 2).float() / dim))
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def forward(self, x, position_ids):
        angle = position_ids[..., None].float() * self.inv_freq
        angle = torch.cat((angle, angle), dim=-1)
        return angle.cos().to(x.dtype), angle.sin().to(x.dtype)


def apply_rotary_pos_emb(q, k, cos, sin):
    cos, sin = cos[:, None], sin[:, None]
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


def eager_attention_forward(module, query, key, value, attention_mask, scaling, **kwargs):
    key, value = (repeat_kv(x, module.num_key_value_groups) for x in (key, value))
    weights = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class HubAttention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        size, kv = config.hidden_size, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(size, size, bias=True)
        self.k_proj = nn.Linear(size, kv, bias=True)
        self.v_proj = nn.Linear(size, kv, bias=True)
        self.o_proj = nn.Linear(size, size, bias=False)
        self.is_causal = True

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, **kwargs):
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(shape).transpose(1, 2)
        key = self.k_proj(hidden_states).view(shape).transpose(1, 2)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        attend = eager_attention_forward
        if self.config._attn_implementation != "eager":
            attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        found, weights = attend(self, query, key, value, attention_mask, dropout=0.0,
                                scaling=self.head_dim ** -0.5)
        return self.o_proj(found.reshape(*shape[:-2], -1)), weights
"""
# Written out: a rotary module in each layer that is asked for a length, and no interface.
_OWN_ROTATION = """
class HubRotaryEmbedding(nn.Module):
    def __init__(self, dim, max_position_embeddings=2048, base=10000, device=None):
        super().__init__()
        self.inv_freq = 1.0 / (base ** (torch.arange(0, dim, 2).float().to(device) / dim))
        self.max_seq_len_cached = max_position_embeddings
        self._cache(max_position_embeddings)

    def _cache(self, length):
        t = torch.arange(length, device=self.inv_freq.device, dtype=torch.float32)
        angle = torch.outer(t, self.inv_freq)
        angle = torch.cat((angle, angle), dim=-1)
        self.cos_cached, self.sin_cached = angle.cos(), angle.sin()

    def forward(self, x, seq_len=None):
        if seq_len > self.max_seq_len_cached:
            self.max_seq_len_cached = seq_len
            self._cache(seq_len)
        cos, sin = self.cos_cached[:seq_len], self.sin_cached[:seq_len]
        return cos.to(x.dtype).to(x.device), sin.to(x.dtype).to(x.device)


def apply_rotary_pos_emb(q, k, cos, sin, position_ids):
    cos, sin = cos[position_ids].unsqueeze(1), sin[position_ids].unsqueeze(1)
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin
"""
_WRITTEN_OUT = (
    _OWN_ROTATION
    + """
class HubAttention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.num_heads, self.num_kv = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.hidden_size // self.num_heads
        self.groups = self.num_heads // self.num_kv
        self.wqkv = nn.Linear(
            config.hidden_size, (self.num_heads + 2 * self.num_kv) * self.head_dim, bias=False
        )
        self.wo = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.rotary_emb = HubRotaryEmbedding(
            self.head_dim, config.max_position_embeddings, config.rope_theta
        )

    def forward(self, hidden_states, attention_mask=None, position_ids=None, **kwargs):
        batch, length, _ = hidden_states.shape
        mixed = self.wqkv(hidden_states)
        mixed = mixed.view(batch, length, self.num_kv, 2 + self.groups, self.head_dim)
        query = mixed[..., : self.groups, :].flatten(2, 3).transpose(1, 2)
        key = mixed[..., -2, :].transpose(1, 2)
        value = mixed[..., -1, :].transpose(1, 2)
        cos, sin = self.rotary_emb(value, seq_len=key.shape[-2])
        query, key = apply_rotary_pos_emb(query, key, cos, sin, position_ids)
        key, value = repeat_kv(key, self.groups), repeat_kv(value, self.groups)
        weights = torch.matmul(query, key.transpose(2, 3)) / math.sqrt(self.head_dim)
        if weights.size() != (batch, self.num_heads, length, length):
            raise ValueError(f"attention weights of {weights.size()}")
        if attention_mask is not None:
            weights = weights + attention_mask
        weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
        found = torch.matmul(weights, value)
        if found.size() != (batch, self.num_heads, length, self.head_dim):
            raise ValueError(f"attention of {found.size()}")
        found = found.transpose(1, 2).contiguous().reshape(batch, length, -1)
        return self.wo(found), None
"""
)
# Through torch's own function, with a matrix for query, key and value together.
_BY_TORCH = (
    _OWN_ROTATION
    + """
class HubAttention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.num_heads, self.layer_idx = config.num_attention_heads, layer_idx
        self.head_dim = config.hidden_size // self.num_heads
        self.W_pack = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.rotary_emb = HubRotaryEmbedding(
            self.head_dim, config.max_position_embeddings, config.rope_theta
        )

    def forward(self, hidden_states, attention_mask=None, position_ids=None, **kwargs):
        batch, length, size = hidden_states.shape
        mixed = self.W_pack(hidden_states).unflatten(-1, (3, size)).unsqueeze(0)
        query, key, value = (
            x.view(batch, length, self.num_heads, self.head_dim).transpose(1, 2)
            for x in mixed.transpose(0, -2).squeeze(-2)
        )
        cos, sin = self.rotary_emb(value, seq_len=key.shape[-2])
        query, key = apply_rotary_pos_emb(query, key, cos, sin, position_ids)
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        found = found.transpose(1, 2).reshape(batch, length, size)
        return self.o_proj(found), None
"""
)
_INTERFACE_MODEL = (
    _MODEL.replace("SUPPORTS", "_supports_sdpa = True\n    _supports_attention_backend = True")
    .replace(
        "PREPARE",
        "self.rotary_emb = HubRotaryEmbedding("
        "config.hidden_size // config.num_attention_heads, config.rope_theta)",
    )
    .replace(
        "        MASK",
        """
        mask = create_causal_mask(
            config=self.config, inputs_embeds=hidden_states, attention_mask=attention_mask,
            past_key_values=None, position_ids=position_ids)
        angles = self.rotary_emb(hidden_states, position_ids)""",
    )
    .replace("ARGUMENTS", ", position_embeddings=angles")
)
_PLAIN_MODEL = (
    _MODEL.replace("SUPPORTS", "_supports_sdpa = False")
    .replace("        PREPARE\n", "")
    .replace(
        "        MASK",
        """
        mask = torch.full((length, length), torch.finfo(hidden_states.dtype).min)
        mask = torch.triu(mask, diagonal=1).to(hidden_states)[None, None]""",
    )
    .replace("ARGUMENTS", "")
)
# A class of transformers with layers for several tokens at once beside it, as MiMo has them.
_SUBCLASS_CONFIG = """
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config


class HubConfig(Qwen2Config):
    model_type = "hub_style"

    def __init__(self, num_nextn_predict_layers=1, **kwargs):
        super().__init__(**kwargs)
        self.num_nextn_predict_layers = num_nextn_predict_layers
"""
_SUBCLASS = """
import torch
from torch import nn
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2Attention, Qwen2ForCausalLM, Qwen2MLP, Qwen2Model, Qwen2RMSNorm)

from .configuration_hub import HubConfig


class HubMTPLayers(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = Qwen2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.input_proj = nn.Linear(config.hidden_size * 2, config.hidden_size, bias=False)
        self.self_attn = Qwen2Attention(config, layer_idx=0)
        self.mlp = Qwen2MLP(config)


class HubModel(Qwen2Model):
    config_class = HubConfig

    def __init__(self, config):
        super().__init__(config)
        count = config.num_nextn_predict_layers
        self.mtp_layers = nn.ModuleList([HubMTPLayers(config) for _ in range(count)])


class HubForCausalLM(Qwen2ForCausalLM):
    config_class = HubConfig

    def __init__(self, config):
        super(Qwen2ForCausalLM, self).__init__(config)
        self.model = HubModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
"""
STYLES = {
    "interface": (_CONFIG, _COMMON + _INTERFACE + _INTERFACE_MODEL, {}),
    "written_out": (_CONFIG, _COMMON + _WRITTEN_OUT + _PLAIN_MODEL, {}),
    "by_torch": (_CONFIG, _COMMON + _BY_TORCH + _PLAIN_MODEL, {"num_key_value_heads": 4}),
    "scaled": (
        _CONFIG,
        _COMMON + _WRITTEN_OUT + _PLAIN_MODEL,
        {"scale_emb": 1.5, "scale_depth": 1.4, "dim_model_base": 24},
    ),
    "subclass": (
        _SUBCLASS_CONFIG,
        _SUBCLASS,
        {
            "vocab_size": 97,
            "hidden_size": 48,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "initializer_range": 0.2,
            "tie_word_embeddings": False,
        },
    ),
}


def save_hub_model(folder: Path, style: str, seed: int = 0, **changes: object) -> Path:
    """Write a random model in one of the STYLES, as a repository has it; return its folder.

    The code runs once, here, in this process.
    """
    configuration, modeling, settings = STYLES[style]
    folder.mkdir(parents=True)
    (folder / "configuration_hub.py").write_text(configuration)
    (folder / "modeling_hub.py").write_text(_HEAD + modeling)
    content = {
        "model_type": "hub_style",
        "architectures": ["HubForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_hub.HubConfig",
            "AutoModelForCausalLM": "modeling_hub.HubForCausalLM",
        },
        **settings,
        **changes,
    }
    (folder / "config.json").write_text(json.dumps(content))
    config = open_source(folder, trust_remote_code=True).config
    torch.manual_seed(seed)
    model = new_model(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


def edit_modeling(folder: Path, old: str, new: str) -> None:
    """Replace a part of a model's code."""
    path = folder / "modeling_hub.py"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
