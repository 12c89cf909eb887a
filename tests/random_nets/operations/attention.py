"""Multi-head attention, written out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from random_nets.op import Op
from random_nets.program import Choose, Settings
from random_nets.shapes import Shape, is_sequence


class Attention(Op):
    """Multi-head attention in the ways people write it."""

    makes_silence = True

    def __init__(
        self,
        width: int,
        tokens: int,
        heads: int,
        shared: int,
        inner: int,
        kind: str,
        core: str,
        bias: str,
        norm: str,
        dynamic: bool,
        residual: bool,
    ) -> None:
        super().__init__()
        self.heads, self.shared, self.inner, self.scale = heads, shared, inner, inner**-0.5
        self.kind, self.core, self.bias, self.norm = kind, core, bias, norm
        self.dynamic, self.residual = dynamic, residual
        if kind in ("fused", "chunk", "packed"):
            self.qkv = nn.Linear(width, 3 * heads * inner)
        else:
            self.q = nn.Linear(width, heads * inner)
            if kind == "kv":
                self.kv = nn.Linear(width, 2 * heads * inner)
            else:
                self.k, self.v = nn.Linear(width, shared * inner), nn.Linear(width, shared * inner, bias=False)
        if bias == "table":
            self.table = nn.Parameter(torch.empty(heads, tokens, tokens))
        if bias == "lookup":
            self.table = nn.Parameter(torch.empty(2 * tokens - 1, heads))
            places = torch.arange(tokens)
            self.register_buffer("index", places[:, None] - places[None] + tokens - 1)
        if norm in ("layer", "rms"):
            self.norm_q, self.norm_k = ((nn.LayerNorm if norm == "layer" else nn.RMSNorm)(inner) for _ in range(2))
        if norm == "temperature":
            self.temperature = nn.Parameter(torch.empty(heads, 1, 1))
        self.proj = nn.Linear(heads * inner, width)

    @classmethod
    def fits(cls, *shapes: Shape) -> bool:
        return is_sequence(shapes[0]) and shapes[0][0] <= 20

    @classmethod
    def draw(cls, choose: Choose, *shapes: Shape) -> Settings:
        tokens, width = shapes[0]
        kind = choose(["fused", "chunk", "packed", "separate", "kv", "multiquery", "grouped"])
        heads = choose([4, 6] if kind == "grouped" else [2, 3, 4])
        shared = {"multiquery": 1, "grouped": heads // 2}.get(kind, heads)
        core = choose(["sdpa", "manual", "einsum", "linear", "channels", "causal"])
        bias = choose(["no", "table", "lookup"]) if core in ("sdpa", "manual") else "no"
        norm = choose(["no", "no", "layer", "rms", "cosine", "temperature"])
        return {
            "width": width,
            "tokens": tokens,
            "heads": heads,
            "shared": shared,
            "inner": choose([2, 3, 4]),
            "kind": kind,
            "core": core,
            "bias": bias,
            "norm": norm,
            "dynamic": choose([False, True]),
            "residual": choose([False, True]),
        }

    @classmethod
    def silent(cls, flags: Sequence[bool], settings: Settings) -> bool:
        return all(flags) or not settings["residual"]

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self._project(x)
        if self.norm in ("layer", "rms"):
            q, k = self.norm_q(q), self.norm_k(k)
        elif self.norm == "cosine":
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        elif self.norm == "temperature":
            q = q * self.temperature
        y = self._attend(q, k, v)
        y = y.transpose(1, 2)
        y = y.reshape(b, n, -1) if self.dynamic else y.reshape(b, n, self.heads * self.inner)
        y = self.proj(y)
        return x + y if self.residual else y

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, n, _ = x.shape
        h, d = self.heads, self.inner
        if self.kind == "fused":
            q, k, v = self.qkv(x).reshape(b, n, 3, h, d).permute(2, 0, 3, 1, 4).unbind(0)
            return q, k, v
        if self.kind == "packed":
            q, k, v = self.qkv(x).reshape(b, n, h, 3 * d).transpose(1, 2).chunk(3, -1)
            return q, k, v
        if self.kind == "chunk":
            parts = self.qkv(x).chunk(3, dim=-1)
        elif self.kind == "kv":
            parts = (self.q(x), *self.kv(x).split(h * d, -1))
        else:
            parts = (self.q(x), self.k(x), self.v(x))
        q, k, v = (
            part.view(b, n, -1, d).transpose(1, 2)
            if self.dynamic
            else part.view(b, n, h if i == 0 else self.shared, d).transpose(1, 2)
            for i, part in enumerate(parts)
        )
        return q, k, v

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.kind == "grouped" and not (self.core == "sdpa" and self.dynamic):
            if self.dynamic:
                k, v = (t.repeat_interleave(self.heads // self.shared, 1) for t in (k, v))
            else:
                b, s, n, d = k.shape
                times = self.heads // self.shared
                k, v = (t[:, :, None].expand(b, s, times, n, d).reshape(b, s * times, n, d) for t in (k, v))
        bias = None
        if self.bias == "table":
            bias = self.table.unsqueeze(0)
        elif self.bias == "lookup":
            n = q.shape[2]
            bias = self.table[self.index.view(-1)].view(n, n, -1).permute(2, 0, 1).contiguous()
        return self._combine(q, k, v, bias)

    def _combine(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        if self.core == "sdpa":
            if self.kind == "multiquery":
                k, v = (t.expand(-1, self.heads, -1, -1) for t in (k, v))
            gqa = k.shape[1] != q.shape[1]
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=gqa)
        if self.core == "linear":
            return F.relu(q) @ (F.relu(k).transpose(-1, -2) @ v)
        if self.core == "channels":  # cross-covariance attention
            scores = (q.transpose(-1, -2) @ k).softmax(-1)
            return (scores @ v.transpose(-1, -2)).transpose(-1, -2)
        if self.core == "einsum":
            k, v = (t.expand(-1, self.heads, -1, -1) for t in (k, v))
            scores = torch.einsum("bhnd,bhmd->bhnm", q, k) * self.scale
            return torch.einsum("bhnm,bhmd->bhnd", scores.softmax(-1), v)
        scores = (q * self.scale) @ k.transpose(-2, -1)
        if bias is not None:
            scores = scores + bias
        if self.core == "causal":
            n = q.shape[2]
            scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), float("-inf"))
        return scores.softmax(dim=-1) @ v
