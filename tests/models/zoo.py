"""Small random models of real architecture classes, and what skipc must find in each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

VOCAB = 96


@dataclass(frozen=True)
class Architecture:
    """A model, inputs for one call, and its sites: (name with ``{}`` for the layer, kind) of a layer of each stream."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    streams: tuple[tuple[tuple[str, str], ...], ...]
    layers: int = 2

    def expected(self) -> list[tuple[str, str, int]]:
        """(name, kind, layer) of each site, in any order."""
        return [
            (name.format(i), kind, i) for stream in self.streams for i in range(self.layers) for name, kind in stream
        ]


def _hf(config: str, model: str, **settings: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torch.manual_seed(0)
        built = getattr(transformers, model)(getattr(transformers, config)(**settings)).eval()
        with torch.no_grad():  # zero-initialised biases and unit norms would hide what a skip must keep
            for parameter in built.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        return built

    return build


def ids(batch: int = 2, tokens: int = 7) -> torch.Tensor:
    """Random token ids, int64 [batch, tokens]."""
    return torch.randint(3, VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(1))


def _text() -> dict[str, Any]:
    return {"input_ids": ids(), "use_cache": False}


def _encoder_text() -> dict[str, Any]:
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, 5:] = 0
    return {"input_ids": ids(), "attention_mask": mask}


def _image() -> dict[str, Any]:
    return {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))}


def _pair() -> dict[str, Any]:
    return {"input_ids": ids(), "decoder_input_ids": ids(2, 4), "use_cache": False}


def _audio() -> dict[str, Any]:
    features = torch.randn(2, 8, 20, generator=torch.Generator().manual_seed(1))
    return {"input_features": features, "decoder_input_ids": ids(2, 4), "use_cache": False}


def _hidden() -> dict[str, Any]:
    return {"src": torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(1))}


class HandWritten(nn.Module):
    """A pre-norm transformer without any library, one attention spelled out in functions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, 64)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(64, VOCAB)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Attention(nn.Module):
    """``softmax(q k) v`` in plain operations."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(64, 192)
        self.out = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, _ = x.shape
        q, k, v = (y.view(b, t, 4, 16).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        scores = (q @ k.transpose(-1, -2)) * 0.25
        weights = scores.masked_fill(torch.ones(t, t, dtype=torch.bool).triu(1), float("-inf")).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(b, t, 64))


class Block(nn.Module):
    """Pre-norm attention and MLP with a residual that is added in place."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(64), nn.LayerNorm(64)
        self.attn = Attention()
        self.mlp = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        y = self.mlp(self.norm2(x))
        y += x
        return y


def _torch_encoder(**settings: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, **settings), 2).eval()

    return build


_base = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
         "vocab_size": VOCAB,
         "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
_gqa = {**_base, "num_key_value_heads": 2}
_seq2seq = {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1,
            "eos_token_id": 2, "decoder_start_token_id": 1}  # fmt: skip
_llama_sites = ((("model.layers.{}.self_attn", "attention"), ("model.layers.{}.mlp", "mlp")),)
_moe_sites = ((("model.layers.{}.self_attn", "attention"), ("model.layers.{}.mlp", "moe")),)

ZOO: dict[str, Architecture] = {
    "llama": Architecture(_hf("LlamaConfig", "LlamaForCausalLM", **_gqa), _text, _llama_sites),
    "qwen3": Architecture(_hf("Qwen3Config", "Qwen3ForCausalLM", head_dim=16, **_gqa), _text, _llama_sites),
    "mistral": Architecture(_hf("MistralConfig", "MistralForCausalLM", sliding_window=4, **_gqa), _text, _llama_sites),
    "gemma2": Architecture(
        _hf("Gemma2Config", "Gemma2ForCausalLM", head_dim=16, sliding_window=4, **_gqa), _text, _llama_sites
    ),
    "phi3": Architecture(_hf("Phi3Config", "Phi3ForCausalLM", **_gqa), _text, _llama_sites),
    "gpt2": Architecture(
        _hf("GPT2Config", "GPT2LMHeadModel", n_embd=64, n_layer=2, n_head=4, vocab_size=VOCAB, bos_token_id=1,
            eos_token_id=2),
        _text,
        ((("transformer.h.{}.attn", "attention"), ("transformer.h.{}.mlp", "mlp")),),
    ),
    "gpt_neox": Architecture(
        _hf("GPTNeoXConfig", "GPTNeoXForCausalLM", **_base),
        _text,
        ((("gpt_neox.layers.{}.attention", "attention"), ("gpt_neox.layers.{}.mlp", "mlp")),),
    ),
    "opt": Architecture(
        _hf("OPTConfig", "OPTForCausalLM", hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4,
            vocab_size=VOCAB, word_embed_proj_dim=64, pad_token_id=0, bos_token_id=1, eos_token_id=2),
        _text,
        ((("model.decoder.layers.{}.self_attn", "attention"), ("model.decoder.layers.{}.fc2", "mlp")),),
    ),
    "falcon": Architecture(
        _hf("FalconConfig", "FalconForCausalLM", hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
            vocab_size=VOCAB, bos_token_id=1, eos_token_id=2),
        _text,
        ((("transformer.h.{}.self_attention", "attention"), ("transformer.h.{}.mlp", "mlp")),),
    ),
    "mixtral": Architecture(_hf("MixtralConfig", "MixtralForCausalLM", num_local_experts=4, **_gqa), _text, _moe_sites),
    "bert": Architecture(
        _hf("BertConfig", "BertModel", **_base),
        _encoder_text,
        ((("encoder.layer.{}.attention.output.dense", "attention"), ("encoder.layer.{}.output.dense", "mlp")),),
    ),
    "vit": Architecture(
        _hf("ViTConfig", "ViTModel", hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            image_size=32, patch_size=8),
        _image,
        ((("layers.{}.attention", "attention"), ("layers.{}.mlp", "mlp")),),
    ),
    "t5": Architecture(
        _hf("T5Config", "T5ForConditionalGeneration", d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4,
            vocab_size=VOCAB, decoder_start_token_id=0),
        _pair,
        (
            (
                ("encoder.block.{}.layer.0.SelfAttention", "attention"),
                ("encoder.block.{}.layer.1.DenseReluDense", "mlp"),
            ),
            (
                ("decoder.block.{}.layer.0.SelfAttention", "attention"),
                ("decoder.block.{}.layer.1.EncDecAttention", "cross_attention"),
                ("decoder.block.{}.layer.2.DenseReluDense", "mlp"),
            ),
        ),
    ),
    "bart": Architecture(
        _hf("BartConfig", "BartForConditionalGeneration", **_seq2seq),
        _pair,
        (
            (("model.encoder.layers.{}.self_attn", "attention"), ("model.encoder.layers.{}.fc2", "mlp")),
            (
                ("model.decoder.layers.{}.self_attn", "attention"),
                ("model.decoder.layers.{}.encoder_attn", "cross_attention"),
                ("model.decoder.layers.{}.fc2", "mlp"),
            ),
        ),
    ),
    "whisper": Architecture(
        _hf("WhisperConfig", "WhisperForConditionalGeneration", num_mel_bins=8, max_source_positions=10, **_seq2seq),
        _audio,
        (
            (("model.encoder.layers.{}.self_attn", "attention"), ("model.encoder.layers.{}.fc2", "mlp")),
            (
                ("model.decoder.layers.{}.self_attn", "attention"),
                ("model.decoder.layers.{}.encoder_attn", "cross_attention"),
                ("model.decoder.layers.{}.fc2", "mlp"),
            ),
        ),
    ),
    "torch_encoder": Architecture(
        _torch_encoder(), _hidden, ((("layers.{}.self_attn", "attention"), ("layers.{}.linear2", "mlp")),)
    ),
    "torch_encoder_norm_first": Architecture(
        _torch_encoder(norm_first=True, activation="gelu"),
        _hidden,
        ((("layers.{}.self_attn", "attention"), ("layers.{}.linear2", "mlp")),),
    ),
    "hand_written": Architecture(
        lambda: HandWritten().eval(),
        lambda: {"input_ids": ids()},
        ((("blocks.{}.attn", "attention"), ("blocks.{}.mlp", "mlp")),),
    ),
}  # fmt: skip

# Not on the list of supported architectures, and found all the same.
BEYOND: dict[str, Architecture] = {
    "bloom": Architecture(
        _hf("BloomConfig", "BloomForCausalLM", hidden_size=64, n_layer=2, n_head=4, vocab_size=VOCAB),
        _text,
        ((("transformer.h.{}.self_attention.dense", "attention"), ("transformer.h.{}.mlp.dense_4h_to_h", "mlp")),),
    ),
    "gptj": Architecture(
        _hf("GPTJConfig", "GPTJForCausalLM", n_embd=64, n_layer=2, n_head=4, vocab_size=VOCAB, rotary_dim=8,
            bos_token_id=1, eos_token_id=2),
        _text,
        ((("transformer.h.{}.attn", "attention"), ("transformer.h.{}.mlp", "mlp")),),
    ),
    "cohere": Architecture(_hf("CohereConfig", "CohereForCausalLM", **_gqa), _text, _llama_sites),
    "olmo2": Architecture(_hf("Olmo2Config", "Olmo2ForCausalLM", **_gqa), _text, _llama_sites),
    "granite": Architecture(
        _hf("GraniteConfig", "GraniteForCausalLM", residual_multiplier=0.22, **_gqa), _text, _llama_sites
    ),
    "qwen2_moe": Architecture(
        _hf("Qwen2MoeConfig", "Qwen2MoeForCausalLM", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
            shared_expert_intermediate_size=32, decoder_sparse_step=1, **_gqa),
        _text,
        _moe_sites,
    ),
    "mamba": Architecture(
        _hf("MambaConfig", "MambaForCausalLM", hidden_size=64, num_hidden_layers=2, vocab_size=VOCAB, state_size=8,
            pad_token_id=0, bos_token_id=1, eos_token_id=2),
        _text,
        ((("backbone.layers.{}.mixer", "mixer"),),),
    ),
    "siglip": Architecture(
        _hf("SiglipVisionConfig", "SiglipVisionModel", hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, image_size=32, patch_size=8),
        _image,
        ((("encoder.layers.{}.self_attn", "attention"), ("encoder.layers.{}.mlp", "mlp")),),
    ),
}  # fmt: skip
