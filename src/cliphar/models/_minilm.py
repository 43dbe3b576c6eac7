"""A BERT sentence encoder, and the projection of its sentences into CLIP's space.

The weights come from all-MiniLM-L6-v2 (Reimers and Gurevych, "Sentence-BERT", 2019,
https://arxiv.org/abs/1908.10084; MiniLM: Wang et al., 2020, https://arxiv.org/abs/2002.10957). Module
names follow that checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["SentenceEncoder", "TextProjection"]

_MAX_POSITIONS = 64


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.attention_output = nn.Linear(width, width)
        self.attention_norm = nn.LayerNorm(width, eps=1e-12)
        self.intermediate = nn.Linear(width, hidden)
        self.output = nn.Linear(hidden, width)
        self.output_norm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        n, t, d = x.shape

        def split(y: Tensor) -> Tensor:
            return y.view(n, t, self.heads, d // self.heads).transpose(1, 2)

        y = F.scaled_dot_product_attention(
            split(self.query(x)), split(self.key(x)), split(self.value(x)), attn_mask=bias
        )
        x = self.attention_norm(x + self.attention_output(y.transpose(1, 2).reshape(n, t, d)))
        y = self.output(F.gelu(self.intermediate(x)))
        normed: Tensor = self.output_norm(x + y)
        return normed


class SentenceEncoder(nn.Module):
    """Token ids to unit-length sentence vectors: the mean of the last layer over real tokens.

    Args:
        vocab_size: rows of the (pruned) vocabulary; id 0 is padding.
        layers: transformer layers.

    ``forward`` takes int64 [N,T] with T <= 64 and returns float [N,384] of unit length.
    """

    out_features = 384

    def __init__(self, vocab_size: int, layers: int = 6) -> None:
        super().__init__()
        width = self.out_features
        self.word_embeddings = nn.Embedding(vocab_size, width, padding_idx=0)
        self.position_embeddings = nn.Embedding(_MAX_POSITIONS, width)
        self.embeddings_norm = nn.LayerNorm(width, eps=1e-12)
        self.layers = nn.ModuleList(_Layer(width, 12, 4 * width) for _ in range(layers))

    def forward(self, ids: Tensor) -> Tensor:
        mask = ids != 0
        x = self.embeddings_norm(self.word_embeddings(ids) + self.position_embeddings.weight[: ids.shape[1]])
        bias = torch.where(mask, 0.0, -1e4)[:, None, None, :].to(x.dtype)
        for layer in self.layers:
            x = layer(x, bias)
        weights = mask.to(x.dtype)[..., None]
        return F.normalize((x * weights).sum(1) / weights.sum(1).clamp(min=1.0), dim=-1)

    def load_minilm(self, weights: dict[str, Tensor], kept_tokens: list[int]) -> None:
        """Copy all-MiniLM-L6-v2's tensors, and of its vocabulary the kept rows.

        Args:
            weights: the checkpoint's state dict, with or without a ``bert.`` prefix.
            kept_tokens: the checkpoint's token id of each of our ids.
        """
        source = {k.removeprefix("bert."): v.float() for k, v in weights.items()}
        own = self.state_dict()
        # token type 0 is added to every position there; folded into the positions here
        own["word_embeddings.weight"] = source["embeddings.word_embeddings.weight"][kept_tokens]
        own["position_embeddings.weight"] = (
            source["embeddings.position_embeddings.weight"][:_MAX_POSITIONS]
            + source["embeddings.token_type_embeddings.weight"][0]
        )
        names = {
            "query": "attention.self.query",
            "key": "attention.self.key",
            "value": "attention.self.value",
            "attention_output": "attention.output.dense",
            "attention_norm": "attention.output.LayerNorm",
            "intermediate": "intermediate.dense",
            "output": "output.dense",
            "output_norm": "output.LayerNorm",
        }
        for kind in ("weight", "bias"):
            own[f"embeddings_norm.{kind}"] = source[f"embeddings.LayerNorm.{kind}"]
            for i in range(len(self.layers)):
                for ours, theirs in names.items():
                    own[f"layers.{i}.{ours}.{kind}"] = source[f"encoder.layer.{i}.{theirs}.{kind}"]
        self.load_state_dict(own)


class TextProjection(nn.Module):
    """Sentence vectors to unit-length CLIP embeddings: a linear map plus a two-layer perceptron.

    ``forward`` takes float [N,384] and returns float [N, dim] of unit length.
    """

    def __init__(self, dim: int, hidden: int, dropout: float = 0.4) -> None:
        super().__init__()
        self.linear = nn.Linear(SentenceEncoder.out_features, dim)
        self.inner = nn.Linear(SentenceEncoder.out_features, hidden)
        self.outer = nn.Linear(hidden, dim)
        self.dropout = dropout

    def forward(self, sentences: Tensor) -> Tensor:
        hidden = F.dropout(F.gelu(self.inner(sentences)), self.dropout, self.training)
        return F.normalize(self.linear(sentences) + self.outer(hidden), dim=-1)

    @classmethod
    def merged(cls, members: Sequence[TextProjection]) -> TextProjection:
        """One projection whose output, before normalisation, is the mean of the members' outputs.

        The sum of perceptrons is one with their hidden units side by side, so an ensemble costs one pass.
        """
        first, count = members[0], len(members)
        hidden = sum(member.inner.out_features for member in members)
        whole = cls(first.linear.out_features, hidden, first.dropout)
        with torch.no_grad():
            whole.linear.weight.copy_(torch.stack([m.linear.weight for m in members]).mean(0))
            whole.linear.bias.copy_(torch.stack([m.linear.bias for m in members]).mean(0))
            whole.inner.weight.copy_(torch.cat([m.inner.weight for m in members]))
            whole.inner.bias.copy_(torch.cat([m.inner.bias for m in members]))
            whole.outer.weight.copy_(torch.cat([m.outer.weight for m in members], 1) / count)
            whole.outer.bias.copy_(torch.stack([m.outer.bias for m in members]).mean(0))
        return whole.eval()
