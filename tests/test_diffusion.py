"""Schedules and samplers against diffusers and formulas, predictions against what they undo."""
import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from diffusion import (alignment_loss, ddim, generator_of, make_alphas_cumprod, make_denoiser, make_target,
                       q_sample, read_prediction, sampling_timesteps, signal_and_noise)


def test_cosine_schedule_follows_its_formula() -> None:
    alphas = make_alphas_cumprod("cosine", 1000)
    f = lambda u: math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    for t in (0, 10, 500, 990):
        assert abs(alphas[t].item() - f((t + 1) / 1000) / f(0)) < 1e-9
    assert 0 < alphas[999] < 1e-4, "the last step is capped, or signal would vanish altogether"


@pytest.mark.parametrize("shape", [(5, 4, 3, 3), (5, 16)])
@pytest.mark.parametrize("gamma", [1.0, 0.3])
@pytest.mark.parametrize("kind", ["noise", "v", "data"])
def test_a_perfect_prediction_gives_back_data_and_noise(kind: str, gamma: float, shape: tuple) -> None:
    alphas = make_alphas_cumprod("linear", 1000)
    x0, noise, t = torch.randn(shape), torch.randn(shape), torch.tensor([0, 1, 500, 998, 999])
    x_t = q_sample(x0, t, noise, alphas, gamma)
    a, s = signal_and_noise(t, x0, alphas, gamma)
    expected = torch.stack([gamma * alphas[k].sqrt() * x0[i] + (1 - alphas[k]).sqrt() * noise[i]
                            for i, k in enumerate(t.tolist())])
    assert torch.allclose(x_t, expected.float(), atol=1e-6)
    x0_pred, eps_pred = read_prediction(kind, make_target(kind, x0, noise, a, s), x_t, a, s)
    assert torch.allclose(x0_pred, x0, atol=2e-4), "reading the prediction must undo what the target says"
    assert torch.allclose(eps_pred, noise, atol=2e-4)


def test_alignment_loss_equals_slow_infonce() -> None:
    torch.manual_seed(0)
    text = F.normalize(torch.randn(6, 8), dim=-1)
    x0_pred = text + torch.randn(6, 8) / 3          # so that rows' and columns' best differ
    loss, found = alignment_loss(x0_pred, text, torch.tensor(2.0))
    similarity = math.exp(2) * F.cosine_similarity(x0_pred[:, None], text[None], dim=2)
    assert loss.shape == found.shape == (6,)
    for i in range(6):
        of_image, of_text = similarity[i], similarity[:, i]
        slow = (of_image.logsumexp(0) - of_image[i]) / 2 + (of_text.logsumexp(0) - of_text[i]) / 2
        assert abs(loss[i] - slow) < 1e-5 and found[i] == (of_image.argmax() == i)


def test_timesteps_are_all_or_an_error() -> None:
    assert sampling_timesteps(1000, 1000, "trailing") == [*reversed(range(1000))]
    for steps, spacing in ((0, "leading"), (1000, "leading"), (0, "trailing"), (1001, "trailing")):
        with pytest.raises(ValueError, match="expected 1 to"):
            sampling_timesteps(steps, 1000, spacing)


@pytest.mark.parametrize("order, spacing, steps", [
    *itertools.product((1,), ("leading",), (1, 2, 7, 20, 50, 999)),
    *itertools.product((2,), ("leading", "trailing"), (1, 2, 7, 20, 50)), (2, "trailing", 999)])
def test_samplers_equal_diffusers(order: int, spacing: str, steps: int) -> None:
    """DDIM, which stops at ᾱ_0, and DPM-Solver++(2M): the same network, and the same table."""
    diffusers = pytest.importorskip("diffusers")
    betas = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
    scheduler = (diffusers.DPMSolverMultistepScheduler(**betas, timestep_spacing=spacing) if order == 2 else
                 diffusers.DDIMScheduler(**betas, clip_sample=False, set_alpha_to_one=False))
    alphas = make_alphas_cumprod("linear", 1000)

    def denoise(x: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Right for Gaussian data, with a bend, so that no step is like another. In float64: over 999 steps
        float32's rounding alone, ours and theirs, adds up to 2e-5."""
        alpha_bar = alphas[t].view(-1, 1, 1, 1)
        a, s, bend = alpha_bar.sqrt(), (1 - alpha_bar).sqrt(), 0.2 * torch.sin(2 * x)
        return a * x - s * s * bend, s * x + a * s * bend
    assert (scheduler.alphas_cumprod - alphas).abs().max() < 1e-6, "not Stable Diffusion's schedule"
    assert alphas.dtype == torch.float64, "1 - ᾱ cancels near t = 0"
    scheduler.alphas_cumprod, scheduler.final_alpha_cumprod = alphas, alphas[0]
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps.tolist()
    if (order, spacing) != (2, "leading"):        # of which diffusers has another stride than with DDIM
        assert timesteps == sampling_timesteps(steps, 1000, spacing)
    start = theirs = torch.randn(2, 4, 8, 8, dtype=torch.float64, generator=generator_of(0))
    for t in scheduler.timesteps:
        theirs = scheduler.step(denoise(theirs, t.expand(len(theirs)))[1], t, theirs).prev_sample
    last = 1.0 if order == 2 else float(alphas[0])
    ours = ddim(denoise, start, timesteps, alphas, final_alpha_cumprod=last, order=order)
    assert (ours - theirs).abs().max() < 1e-5, "not the sampler's trajectory"


@pytest.mark.parametrize("gamma", [1.0, 0.4])
@pytest.mark.parametrize("kind", ["data", "noise", "v"])
def test_algorithm_3_equals_the_text(kind: str, gamma: float) -> None:
    """Four steps of it, written out, with a network that answers to what it is given and when."""
    alphas = make_alphas_cumprod("cosine", 1000)
    mix = torch.randn(8, 8, generator=generator_of(7)) / 8 ** 0.5

    def network(e_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.tanh(e_t @ mix) + t[:, None] / 1000
    e = noise = torch.randn(3, 8, generator=generator_of(8))
    timesteps = [999, 749, 499, 249]
    for t, later in zip(timesteps, [*timesteps[1:], None]):
        a, s = gamma * alphas[t].item() ** 0.5, (1 - alphas[t].item()) ** 0.5
        out = network(e, torch.full((3,), t))
        # Out of e_t = a e_0 + s ε and, for v, v = a ε − s e_0.
        e_0 = {"data": out, "noise": (e - s * out) / a, "v": (a * e - s * out) / (a * a + s * s)}[kind]
        e_0 = e_0 / e_0.norm(dim=1, keepdim=True)
        eps = (e - a * e_0) / s
        following = 1.0 if later is None else alphas[later].item()
        e = gamma * following ** 0.5 * e_0 + (1 - following) ** 0.5 * eps
    assert sampling_timesteps(4, 1000, "trailing") == timesteps
    ours = ddim(make_denoiser(network, kind, alphas, gamma, unit_norm=True), noise, timesteps, alphas, gamma)
    assert torch.allclose(ours, e / gamma, atol=1e-4), "not Algorithm 3"
    assert torch.allclose(ours.norm(dim=1), torch.ones(3), atol=1e-5)


def test_generators_depend_on_their_key_alone() -> None:
    draw = lambda *key: torch.randn(3, generator=generator_of(*key))
    assert torch.equal(draw(1, 2, 3), draw(1, 2, 3))
    keys = [(0,), (1,), (0, 1), (1, 0), (0, 0, 1), (0, 1, 0)]
    assert len({tuple(draw(*key).tolist()) for key in keys}) == len(keys)
