"""The building blocks of DiffDis's attention: Stable Diffusion's transformer block, and its dual-stream form.

A Stable Diffusion attention block lets image tokens attend to each other and to a text. The paper's
"dual-stream deep fusion attention" (section 3.3) adds one more token, the noised *text query*, which travels
with the image tokens through every attention block of the UNet's encoder half and is denoised by what it
sees there. `SpatialTransformer` is that block; `AlignmentTransformer` follows the middle block.

Letters: B batch, N image tokens, C their width, L text tokens, D width of the text query.
Module names are Stable Diffusion's own wherever it has the module, so that its weights load by name; all that
DiffDis adds here is named `query_...`, so that `"query_" in name` tells new parameters from pretrained ones.
Read next: data.py, or straight on to model.py, which stacks these blocks."""
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class FusionConfig:
    """How the text query meets the image (paper: Tables 4 and 5, section 3.3)."""
    query_width: int               # D, width of the text query = width of the text encoder
    fusion: bool = True            # Table 4: the query joins every encoder-half block, or only the end
    shared_attention: bool = True  # Table 5: the query uses the image tokens' q/k/v/out, or its own
    own_ffn: bool = True           # Table 5: the query has its own feed-forward, or the image tokens'
    align_blocks: int = 6          # M, transformer blocks after the middle block
    head_width: int = 64           # of a head in those M blocks

    def __post_init__(self) -> None:
        if not self.fusion and not (self.shared_attention and self.own_ffn and self.align_blocks):
            raise ValueError("without fusion it is the align_blocks that read, and nothing else is to change")


class Attention(nn.Module):
    """Multi-head attention by PyTorch's fused kernel: softmax(q kᵀ / √d) v. Without `context` it is
    self-attention. bias: of q, k and v, which only the autoencoder's have."""

    def __init__(self, width: int, heads: int, context_width: int | None = None, bias: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias)
        self.to_k = nn.Linear(context_width or width, width, bias)
        self.to_v = nn.Linear(context_width or width, width, bias)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])  # a list: the pretrained key is `to_out.0`

    def project(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.to_q(x), self.to_k(context), self.to_v(context)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [B, N, C] on k, v [B or 1, L, C] -> [B, N, C], before the output projection."""
        # k and v of the null prompt, the same for every image, are projected once, then expanded.
        batch = len(q)
        q, k, v = (x.expand(batch, -1, -1).unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.to_out[0](self.attend(*self.project(x, x if context is None else context)))


class GEGLU(nn.Module):
    """x · GELU(gate), both from one linear layer (Shazeer 2020); the gate is the *second* half."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Sequential):
    def __init__(self, width: int) -> None:
        super().__init__()
        # The middle entry is Stable Diffusion's dropout of rate 0: it keeps the second layer's name, `net.2`.
        self.net = nn.Sequential(GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))


class TransformerBlock(nn.Module):
    """Stable Diffusion's block: self-attention, cross-attention to text, feed-forward; pre-norm, residual.

    With `fusion` it is the dual-stream block: the query token goes through the *shared* self-attention beside
    the image tokens, then through a feed-forward of its own, without cross-attention.
    `context_width` None leaves the cross-attention out (the M blocks of the alignment transformer)."""

    def __init__(self, width: int, heads: int, context_width: int | None,
                 fusion: FusionConfig | None = None) -> None:
        super().__init__()
        self.norm1, self.attn1 = nn.LayerNorm(width), Attention(width, heads)
        if context_width is not None:
            self.norm2, self.attn2 = nn.LayerNorm(width), Attention(width, heads, context_width)
        self.norm3, self.ff = nn.LayerNorm(width), FeedForward(width)
        self.query_attn = self.query_ff = None
        if fusion is not None and not fusion.shared_attention:
            self.query_norm1, self.query_attn = nn.LayerNorm(width), Attention(width, heads)
        if fusion is not None and fusion.own_ffn:
            self.query_norm3, self.query_ff = nn.LayerNorm(width), FeedForward(width)

    def forward(self, x: Tensor, context: Tensor | None = None,
                query: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """x [B, N, C], context [B or 1, L, D], query [B, 1, C] or None (masked) -> x, query."""
        if query is None:                                         # no operation but Stable Diffusion's
            x = x + self.attn1(self.norm1(x))
        elif self.query_attn is None:
            both = torch.cat([query, x], dim=1)                   # [B, 1+N, C]
            both = both + self.attn1(self.norm1(both))
            query, x = both[:, :1], both[:, 1:]
        else:
            x_norm, query_norm = self.norm1(x), self.query_norm1(query)
            pairs = zip(self.query_attn.project(query_norm, query_norm), self.attn1.project(x_norm, x_norm))
            mixed = self.attn1.attend(*(torch.cat(pair, dim=1) for pair in pairs))            # [B, 1+N, C]
            query, x = query + self.query_attn.to_out[0](mixed[:, :1]), x + self.attn1.to_out[0](mixed[:, 1:])
        if context is not None:
            x = x + self.attn2(self.norm2(x), context)
        x = x + self.ff(self.norm3(x))
        if query is not None:
            query = query + (self.query_ff(self.query_norm3(query)) if self.query_ff is not None else
                             self.ff(self.norm3(query)))
        return x, query


class SpatialTransformer(nn.Module):
    """A UNet attention block: GroupNorm, 1×1 in, K transformer blocks, 1×1 out, residual.

    With `fusion` it carries the text query along: FC_in adds the state left by the previous block to the
    noised query (the skip connection across blocks), FC_out hands the state on."""

    def __init__(self, width: int, heads: int, context_width: int, depth: int = 1,
                 fusion: FusionConfig | None = None) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, width, eps=1e-6)     # 1e-6 here, 1e-5 in the ResNet blocks: SD's own mix
        self.proj_in = nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(width, heads, context_width, fusion) for _ in range(depth))
        self.proj_out = nn.Conv2d(width, width, 1)
        if fusion is not None:
            self.query_in = nn.Linear(fusion.query_width, width)
            self.query_out = nn.Linear(width, fusion.query_width)

    def forward(self, x: Tensor, context: Tensor, query: Tensor | None = None,
                state: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """x [B, C, H, W], context [B or 1, L, D], query = e_t + Embed(t_e) [B, D] or None (masked), state h_e
        [B, D] -> x [B, C, H, W], the query's next state [B, D] or None."""
        height = x.shape[2]
        tokens = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)             # [B, N, C]
        q = None if query is None else self.query_in(state + query).unsqueeze(1)   # [B, 1, C]
        for block in self.transformer_blocks:
            tokens, q = block(tokens, context, q)
        out = self.proj_out(tokens.transpose(1, 2).unflatten(2, (height, -1)))
        return x + out, None if q is None else self.query_out(q.squeeze(1))


class AlignmentTransformer(nn.Module):
    """After the middle block: concat(FC(h_e), FC(middle features)) -> M transformer blocks -> linear
    predictor on the query token. Our choice: a layer norm before it, as pre-norm transformers end."""

    def __init__(self, image_width: int, config: FusionConfig) -> None:
        super().__init__()
        width = config.query_width
        self.query_fc = nn.Linear(width, width)
        self.image_fc = nn.Linear(image_width, width)
        self.blocks = nn.ModuleList(
            TransformerBlock(width, width // config.head_width, None) for _ in range(config.align_blocks))
        self.norm = nn.LayerNorm(width)
        self.predictor = nn.Linear(width, width)

    def forward(self, state: Tensor, features: Tensor) -> Tensor:
        """state h_e [B, D], middle features [B, C, H, W] -> the text target's prediction [B, D] (Eq. 7)."""
        image_tokens = self.image_fc(features.flatten(2).transpose(1, 2))              # [B, N, D]
        tokens = torch.cat([self.query_fc(state).unsqueeze(1), image_tokens], dim=1)   # [B, 1+N, D]
        for block in self.blocks:
            tokens, _ = block(tokens)
        return self.predictor(self.norm(tokens)[:, 0])
