"""torch's attention and transformer modules in a form that has a graph, with their projections as Linear layers.

torch computes them in fused functions on the parameters of their parts, and branches on the data, so that neither a
graph nor an integer layer can take the place of a part. The forms here compute the same; masks are arguments.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def open_attention(model: nn.Module) -> nn.Module:
    """Puts the forms of this file in the places of torch's modules in `model`, in place; returns it."""
    opened = {m: Attention(m) for m in model.modules() if _can_open(m)}
    for module in list(model.modules()):
        for name, child in module._modules.items():
            module._modules[name] = opened.get(child, child)
        module.__class__ = _FORMS.get(type(module), type(module))
    return opened.get(model, model)


def _can_open(module: nn.Module) -> bool:
    return type(module) is nn.MultiheadAttention and module.bias_k is None and not module.add_zero_attn


class DotProductAttention(nn.Module):
    """softmax(q k^T / sqrt(D) + masks) v for q [..., H, L, D], k and v [..., H, S, D]; one node of a graph."""

    traced_as_leaf = True

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.dropout = dropout

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        padding: Tensor | None = None,
        need_weights: bool = False,
    ) -> Any:
        """Masks as of nn.MultiheadAttention: true or -inf is left out. With `need_weights` also [..., H, L, S]."""
        dropout, bias = self.dropout if self.training else 0.0, _bias(q, mask, padding)
        if not need_weights:
            return F.scaled_dot_product_attention(q, k, v, bias, dropout)
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        weights = F.dropout(torch.softmax(scores if bias is None else scores + bias, -1), dropout)
        return weights @ v, weights


def _bias(q: Tensor, mask: Tensor | None, padding: Tensor | None) -> Tensor | None:
    """What is added to the scores of q [..., H, L, D]: mask [L, S] or [N * H, L, S], padding [S] or [N, S]."""
    if mask is not None:
        mask = _additive(mask, q)
        mask = mask.unflatten(0, q.shape[:-2]) if mask.dim() == 3 else mask
    if padding is None:
        return mask
    padding = _additive(padding, q)[..., None, None, :]
    return padding if mask is None else mask + padding


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype is not torch.bool:
        return mask.to(like.dtype)
    return torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill(mask, -math.inf)


_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


class Attention(nn.Module):
    """`nn.MultiheadAttention`, from which it takes its parameters and its forward."""

    stands_for = nn.MultiheadAttention

    def __init__(self, layer: nn.MultiheadAttention):
        super().__init__()
        self.num_heads, self.batch_first = layer.num_heads, layer.batch_first
        if layer.in_proj_weight is not None:
            weights = layer.in_proj_weight.chunk(3)
        else:
            weights = (layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight)
        biases = (None,) * 3 if layer.in_proj_bias is None else layer.in_proj_bias.chunk(3)
        self.q_proj, self.k_proj, self.v_proj = map(_linear, weights, biases)
        self.attention = DotProductAttention(layer.dropout)
        self.out_proj = _linear(layer.out_proj.weight, layer.out_proj.bias)
        self.__dict__.update({name: table for name, table in vars(layer).items() if name in _HOOKS})
        self.train(layer.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,  # a hint of what attn_mask is
    ) -> tuple[Tensor, Tensor | None]:
        q, k, v = (
            self._heads(project(x)) for project, x in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
        weights = None
        if need_weights:
            mixed, weights = self.attention(q, k, v, attn_mask, key_padding_mask, True)
            weights = weights.mean(-3) if average_attn_weights else weights
        else:
            mixed = self.attention(q, k, v, attn_mask, key_padding_mask)
        out = self.out_proj(mixed.transpose(-3, -2).flatten(-2))
        return (out if self.batch_first else out.transpose(0, -2)), weights

    def _heads(self, x: Tensor) -> Tensor:
        """[N, L, E], [L, N, E] or [L, E] -> [N, H, L, D] or [H, L, D]."""
        x = x if self.batch_first else x.transpose(0, -2)  # [L, E]: stays
        return x.unflatten(-1, (self.num_heads, -1)).transpose(-3, -2)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
    return layer


class EncoderLayer(nn.TransformerEncoderLayer):
    stands_for = nn.TransformerEncoderLayer

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        masks = (src_mask, src_key_padding_mask)
        if self.norm_first:
            src = src + self._sa_block(self.norm1(src), *masks)
            return src + self._ff_block(self.norm2(src))
        src = self.norm1(src + self._sa_block(src, *masks))
        return self.norm2(src + self._ff_block(src))


class DecoderLayer(nn.TransformerDecoderLayer):
    stands_for = nn.TransformerDecoderLayer  # whose forward has a graph once its parts have one


class Encoder(nn.TransformerEncoder):
    stands_for = nn.TransformerEncoder

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        for layer in self.layers:
            src = layer(src, src_mask=mask, src_key_padding_mask=src_key_padding_mask)
        return src if self.norm is None else self.norm(src)


class Decoder(nn.TransformerDecoder):
    stands_for = nn.TransformerDecoder

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        masks = {
            "tgt_mask": tgt_mask,
            "memory_mask": memory_mask,
            "tgt_key_padding_mask": tgt_key_padding_mask,
            "memory_key_padding_mask": memory_key_padding_mask,
        }
        for layer in self.layers:
            tgt = layer(tgt, memory, **masks)
        return tgt if self.norm is None else self.norm(tgt)


class Transformer(nn.Transformer):
    stands_for = nn.Transformer

    def forward(
        self,
        src: Tensor,
        tgt: Tensor,
        src_mask: Tensor | None = None,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        src_is_causal: bool | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        memory = self.encoder(src, src_mask, src_key_padding_mask)
        return self.decoder(tgt, memory, tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask)


_FORMS: dict[type, type] = {
    form.stands_for: form for form in (EncoderLayer, DecoderLayer, Encoder, Decoder, Transformer)
}
