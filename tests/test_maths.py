"""The mathematics in common.py against closed forms, exact solutions and diffusers."""

import math

import common

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

# ---- positions ----


def test_timestep_embedding_is_cosines_then_sines():
    t = torch.tensor([0.0, 0.3, 999.0], dtype=torch.float64)
    angles = t[:, None] * 10_000 ** (-torch.arange(128, dtype=torch.float64) / 128)
    with torch.autocast("cpu", torch.bfloat16):  # which must not touch it
        ours = common.timestep_embedding(t, 256)
    torch.testing.assert_close(ours.double(), torch.cat([angles.cos(), angles.sin()], dim=1), atol=1e-4, rtol=0)


def test_position_embedding_encodes_the_row_in_its_first_half_and_the_column_in_its_second():
    table = common.sincos_2d(torch.cartesian_prod(torch.arange(3), torch.arange(5)), 16).view(3, 5, 16)
    for row in range(3):
        for column in range(5):
            expected = common.timestep_embedding(torch.tensor([row, column]), 8).flatten()
            torch.testing.assert_close(table[row, column], expected)


def test_rope_rotates_each_pair_by_its_row_or_column():
    """Against complex multiplication, one token and one pair at a time."""
    x = torch.randn(1, 6, 8)
    ours = common.apply_rope(x, common.rope_2d(torch.cartesian_prod(torch.arange(3, 5), torch.arange(1, 4)), 8))
    for n, position in enumerate((row, column) for row in (3, 4) for column in (1, 2, 3)):
        for pair in range(4):
            angle = position[pair // 2] * 10_000 ** (-(pair % 2) / 2)
            turned = complex(*x[0, n, 2 * pair : 2 * pair + 2]) * complex(math.cos(angle), math.sin(angle))
            assert ours[0, n, 2 * pair : 2 * pair + 2].tolist() == pytest.approx([turned.real, turned.imag], abs=1e-5)


def test_rope_scores_depend_on_relative_position_only():
    (q, k), here = torch.randn(2, 12, 16), torch.cartesian_prod(torch.arange(3), torch.arange(4))
    there = here + torch.tensor([7, 3])

    def scores(q_places, k_places):
        return common.apply_rope(q, common.rope_2d(q_places, 16)) @ common.apply_rope(k, common.rope_2d(k_places, 16)).T

    torch.testing.assert_close(scores(here, here), scores(there, there), atol=1e-4, rtol=0)
    assert (scores(here, here) - scores(there, here)).abs().max() > 0.1


def test_plain_attention_equals_the_fused_kernel():
    q, k, v = torch.randn(3, 2, 4, 100, 32)
    reference = (q @ k.transpose(2, 3) / 32**0.5).softmax(-1) @ v
    torch.testing.assert_close(common.attention(q, k, v), reference, atol=1e-5, rtol=0)
    rough = common.attention(q.bfloat16(), k.bfloat16(), v.bfloat16())
    torch.testing.assert_close(rough.float(), reference, atol=0.03, rtol=0)


# ---- rectified flow ----


def test_flow_line_goes_from_start_to_end():
    start, end = torch.randn(2, 3, 3, 4, 4)
    x = common.flow_point(start, end, torch.tensor([0.0, 0.25, 1.0]))
    assert torch.equal(x[0], start[0]) and torch.equal(x[2], end[2])
    torch.testing.assert_close(x[1], 0.75 * start[1] + 0.25 * end[1])


MEAN, STD = 0.5, 0.3


def gaussian_velocity(x, t):
    """E[data - noise | x_t = x] for data of N(MEAN, STD^2), with noise at t = 0: the exact velocity field."""
    variance = (1 - t) ** 2 + (t * STD) ** 2
    return MEAN + (t * STD**2 - (1 - t)) / variance * (x - t * MEAN)


@pytest.mark.parametrize("noise_at", [0, 1])
@pytest.mark.parametrize("name, order", [("euler", 1), ("heun", 2), ("dpm", 2)])
def test_solvers_take_noise_to_data_at_their_order(name, order, noise_at):
    """The exact velocity of a Gaussian takes the noise x to MEAN + STD x. Half the step gives half the error of a
    first-order solver and about a quarter of a second-order solver's, in both directions of time."""
    noise = torch.linspace(-2, 2, 9, dtype=torch.float64)

    def error(steps):
        times = [i / steps for i in range(steps + 1)]
        velocity = gaussian_velocity
        if noise_at == 1:
            times, velocity = times[::-1], lambda x, t: -gaussian_velocity(x, 1 - t)
        return (common.SOLVERS[name](velocity, noise, times) - (MEAN + STD * noise)).abs().max().item()

    assert error(512) / error(1024) == pytest.approx(2**order, rel=0.15)
    assert error(512) < (5e-3 if order == 1 else 1e-4)


@pytest.mark.parametrize("name, asked", [("euler", [1, 0.6, 0.2]), ("heun", [1, 0.6, 0.6, 0.2, 0.2])])
def test_solvers_evaluate_the_velocity_and_show_the_states_at_the_given_times(name, asked):
    given, seen = [], []
    x = common.SOLVERS[name](
        lambda x, t: given.append(t) or torch.ones(1), torch.zeros(1), [1, 0.6, 0.2, 0.0], lambda x, t: seen.append(t)
    )
    assert given == asked and seen == [1, 0.6, 0.2, 0.0] and x.item() == pytest.approx(-1)


# ---- DDPM ----

BETAS = common.linear_betas(1000).double()
ALPHA_BARS = common.alphas_cumprod(BETAS)


def test_closed_form_equals_the_iterated_form():
    """x_t = sqrt(1 - beta) x_{t-1} + sqrt(beta) noise, a thousand times: the data's factor and the noise's variance."""
    factor, variance = 1.0, 0.0
    for beta, alpha_bar in zip(BETAS, ALPHA_BARS):
        factor, variance = factor * (1 - beta) ** 0.5, variance * (1 - beta) + beta
        torch.testing.assert_close(torch.stack([factor, variance]), torch.stack([alpha_bar**0.5, 1 - alpha_bar]))


@pytest.mark.parametrize("alpha_bar", [1.0, 0.5, 4e-5])
def test_noise_and_data_follow_from_v(alpha_bar):
    data, noise = torch.randn(3, 4, 5, 6), torch.randn(3, 4, 5, 6)
    x_t, v = alpha_bar**0.5 * data + (1 - alpha_bar) ** 0.5 * noise, common.ddpm_v(data, noise, alpha_bar)
    assert torch.allclose(common.eps_from_v(v, x_t, alpha_bar), noise, atol=1e-5)
    assert torch.allclose(alpha_bar**0.5 * x_t - (1 - alpha_bar) ** 0.5 * v, data, atol=1e-5)


@pytest.mark.parametrize("t, t_next", [(999, 998), (500, 499), (900, 300), (1, 0)])
def test_ddpm_step_samples_the_posterior(t, t_next):
    """Against the product of two Gaussians: x_next given the data, and x_t given x_next."""
    alpha_bar, alpha_bar_next = ALPHA_BARS[t], ALPHA_BARS[t_next]
    data, eps, noise = torch.randn(3, 5, dtype=torch.float64)
    x = alpha_bar**0.5 * data + (1 - alpha_bar) ** 0.5 * eps
    alpha = alpha_bar / alpha_bar_next
    precision = 1 / (1 - alpha_bar_next) + alpha / (1 - alpha)
    mean = (alpha_bar_next**0.5 * data / (1 - alpha_bar_next) + alpha**0.5 * x / (1 - alpha)) / precision
    step = common.ddpm_step(x, eps, alpha_bar, alpha_bar_next, noise)
    torch.testing.assert_close(step, mean + noise / precision**0.5)
    torch.testing.assert_close(common.ddim_step(x, eps, alpha_bar, alpha_bar_next, 1.0, noise), step)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("eta", [None, 0.0, 0.6])
def test_samplers_equal_diffusers_step_by_step(clip, eta, monkeypatch):
    """Twenty steps of the thousand with the same noise and the same made-up network, which clipping changes. eta None:
    ddpm_step, else ddim_step."""
    kind = DDPMScheduler if eta is None else DDIMScheduler
    theirs = kind(beta_start=1e-4, beta_end=2e-2, clip_sample=clip, timestep_spacing="leading")
    theirs.set_timesteps(20)
    assert torch.equal(common.linear_betas(1000), theirs.betas)
    alpha_bars = common.alphas_cumprod(common.linear_betas(1000))
    x, changed = torch.randn(2, 3, 4, 4), 0
    for t in theirs.timesteps.tolist():
        alpha_bar, alpha_bar_next = alpha_bars[t], alpha_bars[t - 50] if t >= 50 else torch.tensor(1.0)
        noise, eps = torch.randn_like(x), torch.tanh(x) * 0.8
        monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *a, n=noise, **k: n)
        options = {} if eta is None else dict(eta=eta, use_clipped_model_output=clip, variance_noise=noise)
        theirs_x = theirs.step(eps, t, x, **options).prev_sample
        if clip:
            clipped = common.clip_x0(x, eps, alpha_bar, 1.0)
            changed += (clipped - eps).abs().max() > 0.01
            eps = clipped
        if eta is None:
            x = common.ddpm_step(x, eps, alpha_bar, alpha_bar_next, noise * (t > 0))
        else:
            x = common.ddim_step(x, eps, alpha_bar, alpha_bar_next, eta, noise)
        torch.testing.assert_close(x, theirs_x, atol=2e-4, rtol=1e-4)
    assert not clip or changed > 5
