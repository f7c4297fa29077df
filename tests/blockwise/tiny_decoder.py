"""A small model with the module names of the Llama family, whose ways of calling its blocks can be chosen."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["RETURNS", "TinyDecoder", "make_batches"]

HIDDEN, FFN, HEADS, VOCABULARY = 16, 24, 4, 32

RETURNS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tensor": lambda x, _: x,
    "tuple": lambda x, extra: (x, extra, None),
    "list": lambda x, extra: [x, {"extra": extra}],
}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.v_proj = nn.Linear(HIDDEN, HIDDEN)
        self.o_proj = nn.Linear(HIDDEN, HIDDEN)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Linear(HIDDEN, FFN)
        self.down_proj = nn.Linear(FFN, HIDDEN)


class Layer(nn.Module):
    """Mixes tokens by a matrix that it is given, and scales by a vector and a number that it is given."""

    def __init__(self, returns: str) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(HIDDEN)
        self.self_attn = Attention()
        self.post_attention_layernorm = nn.LayerNorm(HIDDEN)
        self.mlp = Mlp()
        self.returns = RETURNS[returns]
        self.num_calls = 0
        self.in_place = False

    def forward(self, hidden_states: Tensor, mixing: Tensor, table: tuple[Tensor, Tensor], factor: float = 1.0) -> Any:
        self.num_calls += 1
        x = mixing @ self.self_attn.v_proj(self.input_layernorm(hidden_states)) * table[0] + table[1]
        if self.in_place:
            hidden_states += factor * self.self_attn.o_proj(x)
        else:
            hidden_states = hidden_states + factor * self.self_attn.o_proj(x)
        x = self.mlp.up_proj(self.post_attention_layernorm(hidden_states)).relu()
        hidden_states = hidden_states + self.mlp.down_proj(x)
        return self.returns(hidden_states, x.mean())


class TinyDecoder(nn.Module):
    """Layers get different mixing matrices, tables and factors; ``between`` is done to hidden states in between."""

    def __init__(self, num_layers: int = 4, returns: str = "tensor", by_keyword: bool = False, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.config = SimpleNamespace(
            num_attention_heads=HEADS, num_key_value_heads=2, hidden_size=HIDDEN, intermediate_size=FFN, use_cache=True
        )
        self.embed_tokens = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList(Layer(returns) for _ in range(num_layers))
        self.norm = nn.LayerNorm(HIDDEN)
        self.lm_head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
        self.by_keyword = by_keyword
        self.between: Callable[[Tensor], Tensor] = lambda x: x
        self.table_depends_on_hidden_states = False
        self.num_rounds = 1
        self.double()

    def forward(self, input_ids: Tensor, offset: int = 0) -> Tensor:
        assert self.config.use_cache in (True, False)
        x = self.embed_tokens(input_ids)
        length = x.shape[1]
        causal = torch.ones(length, length, dtype=x.dtype).tril()
        local = causal.triu(-2)
        mixings = [(m / m.sum(-1, keepdim=True)) for m in (causal, local)]
        for number, layer in enumerate([*self.layers] * self.num_rounds):
            at = torch.arange(length, dtype=x.dtype)[:, None] + offset
            angles = at / (number % 3 + 1) / torch.arange(1, HIDDEN + 1, dtype=x.dtype)
            table = (
                (angles.cos(), x.mean((0, 1))) if self.table_depends_on_hidden_states else (angles.cos(), angles.sin())
            )
            if self.by_keyword:
                out = layer(hidden_states=x, mixing=mixings[number % 2], table=table, factor=1 + number / 10)
            else:
                out = layer(x, mixings[number % 2], table, factor=1 + number / 10)
            x = out if isinstance(out, Tensor) else out[0]
            if number < len(self.layers) - 1:
                x = self.between(x)
        return self.lm_head(self.norm(x))


def make_batches(number: int = 3, length: int = 6) -> list[Tensor]:
    """Batches of different shapes."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, VOCABULARY, (2 + n % 2, length + n), generator=generator) for n in range(number)]
