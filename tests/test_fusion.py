"""The dual-stream block against a slow reading of the README's method 4, one token at a time."""
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import build, randomise, tiny_config

from fusion import AlignmentTransformer, Attention, FusionConfig, SpatialTransformer, TransformerBlock


def slow_attention(attention: Attention, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    """softmax(q·k/√d) v written out, head by head and token by token."""
    width = x.shape[-1] // attention.heads
    q, k, v = attention.to_q(x), attention.to_k(context), attention.to_v(context)
    out = torch.zeros_like(q)
    for b in range(len(x)):
        for h in range(attention.heads):
            part = slice(h * width, (h + 1) * width)
            for i in range(x.shape[1]):
                weights = torch.softmax(k[b, :, part] @ q[b, i, part] / width ** 0.5, dim=0)
                out[b, i, part] = weights @ v[b, :, part]
    return attention.to_out[0](out)


@torch.no_grad()
@pytest.mark.parametrize("own_ffn", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_dual_stream_block_equals_the_text(shared: bool, own_ffn: bool) -> None:
    config = FusionConfig(8, shared_attention=shared, own_ffn=own_ffn, head_width=8)
    block = randomise(TransformerBlock(16, 2, 8, config))
    x, context, query = torch.randn(2, 5, 16), torch.randn(2, 3, 8), torch.randn(2, 1, 16)
    # Step 3, in its own words: shared self-attention over the concatenation; then split.
    if shared:
        normed = block.norm1(torch.cat([query, x], dim=1))
        attended = slow_attention(block.attn1, normed, normed)
        q, tokens = query + attended[:, :1], x + attended[:, 1:]
    else:       # the query's own q, k, v, out; both streams still see each other
        nq, nx = block.query_norm1(query), block.norm1(x)
        streams = ((block.query_attn, nq), (block.attn1, nx))
        keys = torch.cat([own.to_k(stream) for own, stream in streams], dim=1)
        values = torch.cat([own.to_v(stream) for own, stream in streams], dim=1)
        attended = [slow_attention(SimpleNamespace(heads=2, to_q=own.to_q, to_k=lambda _: keys,
                                                   to_v=lambda _: values, to_out=own.to_out), stream, stream)
                    for own, stream in streams]
        q, tokens = query + attended[0], x + attended[1]
    # image tokens: cross-attention, then the image FFN; query token: its own FFN, no cross-attention.
    tokens = tokens + slow_attention(block.attn2, block.norm2(tokens), context)
    tokens = tokens + block.ff(block.norm3(tokens))
    q = q + (block.query_ff(block.query_norm3(q)) if own_ffn else block.ff(block.norm3(q)))
    got_tokens, got_q = block(x, context, query)
    assert torch.allclose(got_tokens, tokens, atol=1e-5) and torch.allclose(got_q, q, atol=1e-5)


@torch.no_grad()
def test_the_alignment_transformer_equals_the_text() -> None:
    head = randomise(AlignmentTransformer(24, FusionConfig(16, align_blocks=2, head_width=8)))
    state, features = torch.randn(2, 16), torch.randn(2, 24, 2, 3)
    pixels = [features[:, :, y, x] for y in range(2) for x in range(3)]
    tokens = [head.query_fc(state)] + [head.image_fc(pixel) for pixel in pixels]
    tokens = torch.stack(tokens, dim=1)
    assert head.blocks[0].attn1.heads == 2, "of head_width each"
    for block in head.blocks:
        normed = block.norm1(tokens)
        tokens = tokens + slow_attention(block.attn1, normed, normed)
        tokens = tokens + block.ff(block.norm3(tokens))
    expected = head.predictor(head.norm(tokens))[:, 0]
    assert torch.allclose(head(state, features), expected, atol=1e-5), "the prediction is read at the query"


@torch.no_grad()
def test_k_transformer_blocks_follow_one_another() -> None:
    block = randomise(SpatialTransformer(32, 2, 8, 3, FusionConfig(8, head_width=8)))
    x, context, query, state = (torch.randn(2, 32, 2, 3), torch.randn(2, 3, 8),
                                torch.randn(2, 8), torch.randn(2, 8))
    projected = block.proj_in(block.norm(x))
    tokens = torch.stack([projected[:, :, row, column] for row in range(2) for column in range(3)], dim=1)
    q = block.query_in(state + query)[:, None]
    assert len(block.transformer_blocks) == 3 and block.norm.eps == 1e-6, "Stable Diffusion's"
    for inner in block.transformer_blocks:
        tokens, q = inner(tokens, context, q)
    rows = torch.stack([tokens[:, 3 * row:3 * row + 3] for row in range(2)], dim=1)
    out = block.proj_out(rows.permute(0, 3, 1, 2))
    got, next_state = block(x, context, query, state)
    assert torch.allclose(got, x + out, atol=1e-5)
    assert torch.allclose(next_state, block.query_out(q[:, 0]), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("fusion", [True, False])
def test_the_query_enters_as_its_noised_self_plus_its_timestep(fusion: bool) -> None:
    """Step 1: what the first thing that sees the query is handed, e_t + Embed(t_e); the image beside it is at
    a timestep that generation never draws."""
    model = build(tiny_config(fusion=FusionConfig(32, fusion, align_blocks=1, head_width=16)))
    unet, seen, image_timesteps = model.unet, [], []
    unet.time_embedding.register_forward_pre_hook(
        lambda module, args: image_timesteps.append(args[0].tolist()))
    first = unet.down_blocks[0].attentions[0].query_in if fusion else unet.query_head.query_fc
    first.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    z, e_t, context = torch.randn(2, 192, 4, 4), torch.randn(2, 32), torch.randn(2, 24, 32)
    t = torch.tensor([3, 900])
    unet.denoise_query(e_t, t, z, context[:1])
    embedding = unet.query_time_embedding
    for i in range(2):
        angles = torch.tensor([t[i] * 10000 ** (-k / 16) for k in range(16)])
        sinusoid = torch.cat([angles.cos(), angles.sin()])
        expected = e_t[i] + embedding.linear_2(torch.nn.functional.silu(embedding.linear_1(sinusoid)))
        for given in seen:
            assert torch.allclose(given[i], expected, atol=1e-4), "t_e must tell how noisy the query is"
    assert len(seen) == 1 and image_timesteps == [[1000, 1000]]


@torch.no_grad()
@pytest.mark.parametrize("change", [{}, {"fusion": False}, {"shared_attention": False}, {"own_ffn": False},
                                    {"align_blocks": 0}, {"align_blocks": 3}])
def test_every_ablation_reads_the_image_and_only_the_image(change: dict) -> None:
    config = tiny_config()
    model = build(replace(config, fusion=replace(config.fusion, **change)))
    latents, t, noisy = torch.randn(3, 192, 4, 4), torch.full((3,), 999), torch.randn(1, 32).expand(3, -1)
    pred = model.denoise_query(noisy, t, latents)
    assert pred.shape == (3, 32)
    assert not torch.allclose(pred[0], pred[1], atol=1e-4), "the prediction must depend on the image"
    assert torch.allclose(pred[1], model.denoise_query(noisy[:1], t[:1], latents[1:2])[0], atol=1e-5), \
        "a row must not see the other rows of its batch"
    assert len(model.unet.query_head.blocks) == model.config.fusion.align_blocks
