"""serpentine_vae.py against naive loops, closed forms, the write-up's own formula and diffusers' schedulers."""

import dataclasses
import itertools
import math
import subprocess
import sys
from collections import Counter

import common
import serpentine_vae as serpentine
from common import UserError
from serpentine_vae import DIRECTIONS, VAE, Config, Denoiser, LatentDiffusion, VAEConfig

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ENVIRONMENT, ROOT, random_weights
from PIL import Image
from safetensors.torch import load_file, save_file

# A run that takes a few seconds, most of them for the VAE.
SMALL = dict(image_size=32, channels=4, vae_width=16, vae_steps=80, vae_batch_size=8, vae_lr=5e-3, width=16, depth=1)
SMALL |= dict(num_timesteps=20, steps=6, batch_size=4, lr=1e-3, device="cpu", precision="fp32", compile=False)
SMALL_FLAGS = [word for k, v in SMALL.items() if k != "compile" for word in ("--" + k.replace("_", "-"), str(v))]
FAST = dict(steps=4, precision="fp32")


def nudged(x, channels, row, column):
    """A copy of maps (B, C, H, W) that differs at one position."""
    x = x.clone()
    x[:, channels, row, column] += 1
    return x


def small_vae(decoder="local", width=8, channels=4):
    vae = random_weights(VAE(channels, width, 1, decoder))
    vae.mean.copy_(torch.linspace(-1, 1, channels))
    vae.std.copy_(torch.linspace(0.5, 2, channels))
    return vae


def small_model():
    """(model, config) as load_model() returns them."""
    denoiser = random_weights(Denoiser(4, 16, (1, 2), 1))
    return LatentDiffusion(small_vae(), denoiser, 9.0), Config(**SMALL)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder of 24 pictures of 32 x 32 pixels, smooth enough to be learned."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i in range(24):
        pixels = rng.integers(0, 256, (3, 3, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((32, 32), Image.BICUBIC).save(folder / f"{i:02d}.png")
    return folder


@pytest.fixture(scope="session")
def trained(pictures, tmp_path_factory):
    """The run folder of the denoiser, trained as a user would; that of its VAE lies beside it."""
    folder = tmp_path_factory.mktemp("user")
    words = [sys.executable, ROOT / "serpentine_vae.py", "train", "--data", pictures, *SMALL_FLAGS]
    done = subprocess.run(list(map(str, words)), cwd=folder, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0 and "PSNR" in done.stdout, done.stderr
    return folder / "runs" / "serpentine_vae"


def settings(pictures, out, **changes):
    return Config(**SMALL | dict(data=(str(pictures),), out=str(out)) | changes)


# ---- serpentine scans ----


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("height, width", [(1, 1), (1, 6), (5, 1), (3, 5), (5, 3), (4, 4), (10, 10), (7, 8)])
def test_every_path_visits_each_position_once_and_consecutive_ones_touch(height, width, direction):
    order = serpentine.serpentine_order(height, width, direction)
    assert sorted(order.tolist()) == list(range(height * width))
    rows, columns = order // width, order % width
    assert (rows.diff().abs().clamp(min=columns.diff().abs()) == 1).all()
    if direction.split()[0] in ("rows", "columns"):  # these touch along a whole side
        assert (rows.diff().abs() + columns.diff().abs() == 1).all()


def test_paths_are_what_their_names_say():
    def order(name):
        return serpentine.serpentine_order(2, 3, name).tolist()

    assert order("rows") == [0, 1, 2, 5, 4, 3]
    assert order("columns") == [0, 3, 4, 1, 2, 5]
    assert order("diagonals") == [3, 4, 0, 1, 5, 2]
    assert order("antidiagonals") == [5, 4, 2, 1, 3, 0]
    for name in ("rows", "columns", "diagonals", "antidiagonals"):
        assert order(f"{name} reversed") == order(name)[::-1]
    assert len({tuple(order(name)) for name in DIRECTIONS}) == len(DIRECTIONS) == 8


def naive_scan(a, b):
    h, all_h = torch.zeros_like(b[:, 0]), []
    for t in range(b.shape[1]):
        h = a[:, t] * h + b[:, t]
        all_h.append(h)
    return torch.stack(all_h, dim=1)


@pytest.mark.parametrize("height, width", [(1, 1), (1, 2), (3, 5), (4, 4), (1, 17), (7, 8), (16, 16), (1, 257)])
@pytest.mark.parametrize("gates", ["slow", "extreme"])
def test_scan_and_its_gradients_are_eight_naive_loops_along_the_paths(height, width, gates):
    count = height * width
    a = torch.rand(2, count, 16, dtype=torch.float64)
    a = (a > 0.01).double() if gates == "extreme" else 1 - 0.2 * a**2  # 0 forgets all, 1 nothing
    b, weight = torch.randn(2, 2, count, 16, dtype=torch.float64)
    a, b = a.requires_grad_(), b.requires_grad_()
    parts = []
    for k, direction in enumerate(DIRECTIONS):
        part, order = slice(2 * k, 2 * k + 2), serpentine.serpentine_order(height, width, direction)
        along = naive_scan(a[:, order, part], b[:, order, part])
        parts.append(along[:, order.argsort()])
    expected = torch.cat(parts, dim=2)
    ours = serpentine.scan_map(a, b, height, width)
    assert (ours - expected).abs().max() < 1e-12
    for x, y in zip(*(torch.autograd.grad((h * weight).sum(), (a, b)) for h in (ours, expected))):
        assert (x - y).abs().max() < 1e-10
    assert (serpentine.scan_map(a.float(), b.float(), height, width) - expected).abs().max() < 1e-6 * count + 1e-5


@torch.no_grad()
def test_a_serpentine_is_its_formula_and_starts_as_the_identity():
    module, x = serpentine.Serpentine(16), torch.randn(2, 16, 3, 5)
    assert torch.equal(module(x), x)
    module, x = random_weights(module, std=0.5).double(), x.double()
    tokens = F.layer_norm(x.flatten(2).transpose(1, 2), (16,), module.norm.weight, module.norm.bias)
    value, forget, gate = module.in_proj(tokens).chunk(3, dim=-1)
    forget = torch.sigmoid(forget + module.span)
    h = serpentine.scan_map(forget, (1 - forget) * value, 3, 5)
    expected = module.out_proj(h * gate * gate.sigmoid()).transpose(1, 2).unflatten(2, (3, 5))
    assert (module(x) - x - expected).abs().max() < 1e-5


# ---- VAE ----


@torch.no_grad()
def test_squeeze_and_excitation_is_its_formula():
    module, x = random_weights(serpentine.SqueezeExcite(8), std=1.0), torch.randn(2, 8, 3, 4)
    for picture, out in zip(x, module(x)):
        squeezed = torch.stack([channel.sum() / 12 for channel in picture])
        hidden = module.squeeze.weight @ squeezed + module.squeeze.bias
        scale = module.excite.weight @ (hidden / (1 + (-hidden).exp())) + module.excite.bias
        assert torch.allclose(out, picture * (2 / (1 + (-scale).exp()))[:, None, None], atol=1e-5)


@torch.no_grad()
def test_the_encoder_sees_the_whole_picture_and_the_decoder_eight_pixels_around_a_tile():
    vae, x = small_vae(), torch.rand(1, 3, 64, 64) * 2 - 1
    latent = vae.encode(x)
    assert latent.shape == (1, 4, 8, 8)
    assert (vae.encode(nudged(x, 0, 0, 0)) - latent)[:, :, 7, 7].abs().max() > 0
    changed = (vae.decode(nudged(latent, slice(None), 3, 4)) != vae.decode(latent)).any(dim=1)[0]
    rows, columns = changed.any(dim=1).nonzero()[:, 0], changed.any(dim=0).nonzero()[:, 0]
    assert [rows.min(), rows.max(), columns.min(), columns.max()] == [24 - 8, 32 + 7, 32 - 8, 40 + 7]


@torch.no_grad()
def test_the_global_decoder_is_as_large_and_reaches_everywhere():
    sizes = [sum(p.numel() for p in VAE(decoder=name).decoder.parameters()) for name in ("local", "global")]
    assert 0.95 < sizes[1] / sizes[0] < 1.05
    vae, latent = small_vae("global", 64), torch.randn(1, 4, 6, 6)
    assert (vae.decode(nudged(latent, 0, 0, 0)) != vae.decode(latent)).any(dim=1).all()


@torch.no_grad()
def test_vae_loss_equals_a_naive_one():
    config, vae, x, noise = VAEConfig(kl_weight=0.1), small_vae(), torch.rand(2, 3, 16, 16), torch.randn(2, 4, 2, 2)
    mean, logvar = vae.posterior(x)
    remade = vae.decode(mean + logvar.exp().sqrt() * noise)
    assert torch.allclose(vae(x, noise)[0], remade, atol=1e-5)
    loss = serpentine.vae_loss(config, x, *vae(x, noise))
    error = (remade - x).double().numpy()
    for i in range(2):
        e, expected = error[i], (error[i] ** 2).mean()
        for _ in range(3):
            down, across = e[:, 1:] - e[:, :-1], e[:, :, 1:] - e[:, :, :-1]
            expected += 0.5 * ((down**2).mean() + (across**2).mean())
            e = (e[:, ::2, ::2] + e[:, 1::2, ::2] + e[:, ::2, 1::2] + e[:, 1::2, 1::2]) / 4
        normal = torch.distributions.Normal
        kl = torch.distributions.kl_divergence(normal(mean[i], logvar[i].exp().sqrt()), normal(0, 1)).mean()
        assert loss[i].item() == pytest.approx(expected + 0.1 * kl.item(), rel=1e-4)


@torch.no_grad()
def test_latents_are_normalised_by_what_was_measured():
    vae = small_vae()
    some = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    serpentine.measure_latents(vae, some)
    latent = vae.encode(some / 127.5 - 1)
    normal = vae.normalise(latent)
    assert np.allclose(normal.numpy().mean(axis=(0, 2, 3)), 0, atol=1e-5)
    assert np.allclose(normal.numpy().std(axis=(0, 2, 3), ddof=1), 1, atol=1e-5)
    assert torch.allclose(vae.normalise(normal, inverse=True), latent, atol=1e-5)


def test_encode_extends_odd_sides_by_repeating_the_border():
    vae, x = small_vae(), torch.rand(40, 3, 10, 16)  # more pictures than are encoded at a time
    rows = [min(i, 9) for i in range(16)]
    with torch.no_grad():
        assert torch.allclose(serpentine.encode(vae, x), vae.encode(x[:, :, rows]), atol=1e-5)
    with pytest.raises(UserError, match="multiples of 8"):
        vae.encode(x)


# ---- noise and sampling ----


def some_noise(x, t):
    return 0.3 * x + 0.1 * math.sin(t)


def test_ancestral_sampling_is_the_write_ups_formula():
    steps = 29
    start, fresh = torch.randn(1, 2, 3, 3), [torch.randn(1, 2, 3, 3) for _ in range(steps - 1)]
    numbers, schedule = iter(fresh), serpentine.noise_schedule(steps)
    ours = serpentine.denoise(some_noise, start, schedule, steps, "ancestral", lambda: next(numbers))
    assert next(numbers, None) is None  # noise is added at each step of an index greater than 1, and there alone
    beta = np.concatenate([[0], np.linspace(1e-4, 2e-2, steps)])
    alpha_bar, x, numbers = np.cumprod(1 - beta), start.double(), iter(fresh)
    for t in range(steps, 0, -1):
        x = (x - beta[t] / (1 - alpha_bar[t]) ** 0.5 * some_noise(x, t)) / (1 - beta[t]) ** 0.5
        if t > 1:
            x = x + (beta[t] * (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t])) ** 0.5 * next(numbers)
    assert (ours - x).abs().max() < 1e-5


@pytest.mark.parametrize("limit", [None, 0.8])
def test_ddim_equals_diffusers(limit):
    from diffusers import DDIMScheduler

    clipping = dict(clip_sample=limit is not None, clip_sample_range=limit or 1.0, set_alpha_to_one=True)
    theirs = DDIMScheduler(1000, 1e-4, 2e-2, "linear", steps_offset=0, timestep_spacing="trailing", **clipping)
    theirs.set_timesteps(20)
    start = torch.randn(1, 2, 3, 3)
    ours, x = serpentine.denoise(some_noise, start, serpentine.noise_schedule(1000), 20, data_max=limit), start
    for t in theirs.timesteps:
        x = theirs.step(some_noise(x, t.item() + 1), t, x, use_clipped_model_output=limit is not None).prev_sample
    assert (ours - x).abs().max() < 1e-4


def test_resampling_goes_back_by_the_forward_process_and_clamps_again():
    asked, clamped, numbers = [], [], torch.randn(2, 1, 2)
    fresh, start, table = iter(numbers), torch.randn(1, 2), serpentine.noise_schedule(20)

    def predict(x, t):
        asked.append((t, x))
        return torch.zeros_like(x)

    def clamp(x, t):
        clamped.append(t)
        return x

    serpentine.denoise(predict, start, table, 2, noise_fn=lambda: next(fresh), clamp=clamp, resample_steps=3)
    assert [t for t, _ in asked] == [20, 20, 20, 10]  # the last step is made once
    assert clamped == [20, 10, 20, 10, 20, 10, 0]
    assert next(fresh, None) is None
    alpha = table[20] / table[10]
    for (_, x), (_, again), noise in zip(asked, asked[1:], numbers):
        after = (table[10] / table[20]).sqrt() * x  # one step of a network that predicts no noise
        assert torch.allclose(again, alpha.sqrt() * after + (1 - alpha).sqrt() * noise, atol=1e-6)


@torch.no_grad()
def test_every_position_and_its_time_matter_to_every_position_of_the_denoiser():
    x, t = torch.randn(2, 4, 5, 7), torch.tensor([3.0, 700.0])
    model = Denoiser(4, 16, (1, 2), 1)
    assert (model(x, t) == 0).all()  # a fresh one predicts zero
    out = random_weights(model)(x, t)
    assert (model(nudged(x, 0, 0, 0), t) - out)[:, :, 4, 6].abs().min() > 0
    assert torch.allclose(model(x, t, torch.ones(1, 1, 5, 7)), model(x, torch.zeros(2)), atol=1e-5)
    assert torch.equal(model(x, t, torch.zeros(2, 1, 5, 7)), out)
    assert not torch.allclose(model(x, t, torch.ones(1, 1, 5, 7)), out, atol=1e-2)


@pytest.mark.parametrize("predict", ["eps", "v"])
def test_a_denoiser_that_knows_the_latent_is_led_to_it_within_the_range_of_the_training_set(predict, monkeypatch):
    (model, config), latent, schedule = small_model(), torch.randn(2, 4, 3, 3), serpentine.noise_schedule(20)
    config = dataclasses.replace(config, predict=predict)

    def forward(self, x, t, known=None):
        alpha_bar = schedule[int(t[0])]
        noise = (x - alpha_bar.sqrt() * latent) / (1 - alpha_bar).sqrt()
        return noise if predict == "eps" else alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * latent

    monkeypatch.setattr(Denoiser, "forward", forward)
    for model.latent_range, wanted in ((None, latent), (0.5, latent.clamp(-0.5, 0.5))):
        made = serpentine.sample_latents(model, config, serpentine.SampleConfig(num=2, **FAST), (4, 3, 3))
        assert torch.allclose(model.vae.normalise(made), wanted, atol=1e-3)


# ---- inpainting ----


@pytest.mark.parametrize("height, width", [(24, 40), (21, 35)])
def test_a_position_is_kept_if_all_its_pixels_are(height, width):
    keep = (torch.rand(height, width) > 0.01).float()
    positions = serpentine.keep_positions(keep)
    assert positions.shape == (3, 5)
    for i, j in itertools.product(range(3), range(5)):
        assert positions[i, j] == (keep[8 * i : 8 * i + 8, 8 * j : 8 * j + 8] == 1).all()
    assert 0 < positions.sum() < 15
    aligned = torch.rand(3, 5).round().repeat_interleave(8, 0).repeat_interleave(8, 1)[:height, :width]
    assert torch.equal(serpentine.keep_positions(aligned).float(), aligned[::8, ::8])  # the write-up's nearest pixel


@pytest.mark.parametrize("how", ["mean", "noised"])
def test_known_positions_are_put_back_before_the_first_step_and_after_each(how):
    latent, noise, positions = torch.randn(1, 2, 3, 3), torch.randn(2, 2, 3, 3), torch.rand(3, 3) > 0.5
    seen, schedule = {}, serpentine.noise_schedule(20)

    def predict(x, t):
        seen[t] = x
        return some_noise(x, t)

    clamp = serpentine.clamp_known(latent, positions, how, noise, schedule)
    end = serpentine.denoise(predict, noise, schedule, 4, clamp=clamp)
    assert list(seen) == [20, 15, 10, 5]
    for t, x in [*seen.items(), (0, end)]:
        alpha_bar = np.prod(1 - np.linspace(1e-4, 2e-2, 20)[:t])
        known = latent if how == "mean" else alpha_bar**0.5 * latent + (1 - alpha_bar) ** 0.5 * noise
        assert torch.allclose(x[:, :, positions], known.expand_as(x)[:, :, positions], atol=1e-5)
        assert not torch.allclose(x[:, :, ~positions], known.expand_as(x)[:, :, ~positions], atol=1e-2)
    assert torch.equal(end[:, :, positions], latent.expand_as(end)[:, :, positions])


@pytest.mark.parametrize(
    "clamp, solver, size", [("noised", "ddim", (24, 32)), ("mean", "ancestral", (21, 35)), ("clean", "ddim", (24, 32))]
)
def test_kept_latents_and_with_composite_kept_pixels_are_bit_identical(clamp, solver, size):
    (model, config), x, keep = small_model(), torch.rand(1, 3, *size) * 2 - 1, torch.ones(size)
    keep[5:14, 9:21] = 0
    options = dict(num=2, clamp=clamp, solver=solver, **FAST)
    latents, rgb = serpentine.inpaint(model, config, x, keep, composite=True, **options)
    known, positions = serpentine.encode(model.vae, x), serpentine.keep_positions(keep)
    assert (latents[:, :, positions] == known[:, :, positions]).all()
    assert (latents[:, :, ~positions] != known[:, :, ~positions]).all()
    assert (latents[0][:, ~positions] != latents[1][:, ~positions]).all()  # the two results differ
    assert positions.sum() == positions.numel() - 2 * 2  # tiles of which a part is made anew are made anew whole
    kept = keep.bool()
    assert (rgb[:, :, kept] == (x / 2 + 0.5)[:, :, kept]).all()
    assert (rgb[:, :, ~kept] != (x / 2 + 0.5)[:, :, ~kept]).any()
    _, plain = serpentine.inpaint(model, config, x, keep, **options)
    assert torch.equal(serpentine.blend(x / 2 + 0.5, plain, keep), rgb)
    assert not torch.equal(plain[:, :, kept], rgb[:, :, kept])


def test_blend_carries_the_difference_over_the_border_where_it_fades():
    keep, original = torch.zeros(32, 48), torch.rand(1, 3, 32, 48) * 0.5 + 0.25
    keep[:, :20] = 1
    made = original + 0.1
    off = serpentine.blend(original, made, keep) - original
    for column in range(48):
        distance = column - 19  # from the last kept column
        wanted = 0.0 if distance <= 1 else 0.1 * (1 - 0.85 ** (distance - 1)) if distance <= 8 else 0.1
        assert torch.allclose(off[..., column], torch.full_like(off[..., column], wanted), atol=1e-6)
    made[..., 20:] = original[..., 20:]  # a difference in the kept part alone
    off = serpentine.blend(original, made, keep) - original
    assert off[..., 20].mean() == pytest.approx(-0.1, abs=1e-6)


def test_each_position_has_the_time_of_what_it_holds():
    block, x = random_weights(serpentine.Block(8, 16, 12)), torch.randn(2, 8, 3, 5)
    known = torch.rand(2, 1, 3, 5).round()
    emb, clean_emb = torch.randn(2, 12), torch.randn(1, 12)
    h = block.norm2(block.conv1(F.silu(block.norm1(x))))
    scale, shift = torch.empty(2, 16, 3, 5), torch.empty(2, 16, 3, 5)
    for i, row, column in itertools.product(range(2), range(3), range(5)):
        own = clean_emb[0] if known[i, 0, row, column] else emb[i]
        scale[i, :, row, column], shift[i, :, row, column] = block.modulation(own).chunk(2)
    h = block.shortcut(x) + block.conv2(F.silu(h * (1 + scale) + shift))
    assert torch.allclose(block(x, emb, clean_emb, known), block.serpentine(h), atol=1e-5)


def test_known_positions_in_training_are_the_inside_or_the_outside_of_rectangles():
    masks = serpentine.random_known(common.BatchRng(2000, 0), 6, 9, 0.5)[:, 0]
    kinds = Counter()
    for mask in masks:
        inside, outside = (torch.equal(m.any(1)[:, None] & m.any(0), m) for m in (mask, ~mask))
        assert inside or outside
        kinds["none" if not mask.any() else "inside" if inside else "outside"] += 1
    assert abs(kinds["none"] - 1000) < 100 and min(kinds["inside"], kinds["outside"]) > 400
    assert not serpentine.random_known(common.BatchRng(50, 0), 6, 9, 0.0).any()
    assert masks.float().mean(dim=0).min() > 0.1  # every position is known at times


@pytest.mark.parametrize("known_prob, calls", [(0.0, 49 * 5 + 1), (0.5, 12)])
def test_a_denoiser_trained_on_known_positions_is_given_them_and_needs_few_calls(known_prob, calls, monkeypatch):
    (model, config), x, keep, asked = small_model(), torch.rand(1, 3, 24, 24) * 2 - 1, torch.ones(24, 24), []
    keep[8:16, 8:24] = 0
    config = dataclasses.replace(config, known_prob=known_prob, num_timesteps=1000)
    ancestral, step = [], common.ddpm_step
    monkeypatch.setattr(common, "ddpm_step", lambda *values: ancestral.append(1) or step(*values))

    def forward(self, x, t, known=None):
        asked.append(known)
        return torch.zeros_like(x)

    monkeypatch.setattr(Denoiser, "forward", forward)
    serpentine.inpaint(model, config, x, keep, precision="fp32")
    assert len(asked) == calls and len(ancestral) == (12 if known_prob else 0)
    for known in asked:
        assert known is None if not known_prob else torch.equal(known[0, 0], serpentine.keep_positions(keep))


@pytest.mark.parametrize("solver", ["ddim", "ancestral"])
def test_result_i_depends_on_its_own_seed_and_picture_only(solver):
    (model, config), x, keep = small_model(), torch.rand(3, 3, 24, 24) * 2 - 1, torch.ones(24, 24)
    keep[8:16, 8:16] = 0
    _, together = serpentine.inpaint(model, config, x, keep, num=3, batch_size=2, solver=solver, **FAST)
    for i in range(3):
        _, alone = serpentine.inpaint(model, config, x[i : i + 1], keep, num=1, seed=i, solver=solver, **FAST)
        assert torch.allclose(alone[0], together[i], atol=1e-5)


def test_seam_is_the_mean_difference_across_the_border():
    rgb, keep = torch.rand(2, 3, 5, 6), (torch.rand(5, 6) > 0.5).float()
    steps = []
    for i, j in itertools.product(range(5), range(6)):
        for y, x in ((i + 1, j), (i, j + 1)):
            if y < 5 and x < 6 and keep[i, j] != keep[y, x]:
                steps.append((rgb[:, :, i, j] - rgb[:, :, y, x]).abs().mean().item())
    assert serpentine.seam(rgb, keep) == pytest.approx(np.mean(steps), rel=1e-5)


def test_leakage_is_what_a_change_of_the_middle_position_does_outside_its_tile():
    class Blur(torch.nn.Module):
        """The latent is the mean of each tile. It is decoded to all pixels that are at most `reach` from the tile."""

        mean, reach = torch.zeros(1), 0

        def encode(self, x):
            return F.avg_pool2d(x, 8)

        def decode(self, latent):
            wide = torch.ones(3, 1, 8 + 2 * self.reach, 8 + 2 * self.reach)
            return F.conv_transpose2d(latent, wide, stride=8, padding=self.reach, groups=3)

    vae, x = Blur(), torch.randn(500, 3, 40, 56)
    for vae.reach in (0, 3, 8, 12):
        before, after, change, outside, far = serpentine.leakage(vae, x)
        naive = (after - before).square().mean(dim=(0, 1))
        away = torch.tensor([[max(16 - i, i - 23, 24 - j, j - 31, 0) for j in range(56)] for i in range(40)])
        assert torch.equal(change, naive)
        assert torch.equal(change > 0, away <= vae.reach)
        assert outside == pytest.approx((naive[away > 0].sum() / naive.sum()).item())
        assert far == pytest.approx((naive[away > 8].sum() / naive.sum()).item(), abs=0.0 if vae.reach < 9 else 1e-6)
        assert change[20, 28].item() == pytest.approx(F.avg_pool2d(x, 8).var().item(), rel=0.1)


# ---- checkpoints and training ----


def test_load_returns_both_models_and_after_train_vae_the_vae(trained):
    (vae, denoiser), (alone, none) = (serpentine.load(path) for path in (trained, f"{trained}-vae"))
    assert isinstance(denoiser, Denoiser) and none is None
    for (name, a), b in zip(vae.state_dict().items(), alone.state_dict().values()):
        assert torch.equal(a, b), name
    assert not torch.equal(vae.std, torch.ones(4))  # measured
    with pytest.raises(UserError, match="without a denoiser"):
        serpentine.sample(*serpentine.load_model(f"{trained}-vae"))
    with pytest.raises(UserError, match=r"not a checkpoint of serpentine_vae\.py"):
        serpentine.load(ROOT / "weights" / "jit_lab.safetensors")


def test_the_denoiser_takes_the_sizes_of_its_vae_and_goes_on_with_the_vae_in_its_own_checkpoint(pictures, tmp_path):
    own = dict(image_size=32, channels=6, vae_width=8, encoder_depth=2, device="cpu", precision="fp32", compile=False)
    vae = VAEConfig(**own, data=(str(pictures),), out=str(tmp_path / "six"), steps=2, batch_size=4)
    assert serpentine.train_vae(vae) == 0
    config = settings(pictures, tmp_path / "run", vae=str(tmp_path / "six"))
    assert serpentine.train(config) == 0
    before, denoiser = serpentine.load(tmp_path / "run")
    assert before.channels == denoiser.conv_in.in_channels == 6
    assert serpentine.train(dataclasses.replace(config, vae="", resume="", steps=8)) == 0
    assert not (tmp_path / "run-vae").exists()
    after = serpentine.load(tmp_path / "run")[0].state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.state_dict().items())


def test_the_denoiser_learns_in_the_latents_of_a_published_vae(pictures, tmp_path):
    vae = common.TAEF2()
    for half in ("encoder", "decoder"):
        save_file(getattr(vae, half).state_dict(), tmp_path / f"taef2_{half}.safetensors")
    config = settings(pictures, tmp_path / "run", vae=str(tmp_path))
    assert serpentine.train(config) == 0
    model, own = serpentine.load_model(tmp_path / "run")
    assert model.vae.channels == model.denoiser.conv_in.in_channels == own.channels == 32
    stored = {name for name in load_file(tmp_path / "run" / "model.safetensors") if name.startswith("vae.")}
    assert stored == {"vae.mean", "vae.std"}  # its weights stay in their own file
    latents = serpentine.encode_all(model.vae, serpentine.load_data(config)[0])
    assert latents.mean().abs() < 0.1 and abs(latents.std() - 1) < 0.1
    assert serpentine.train(dataclasses.replace(config, vae="", resume="", steps=8)) == 0
    assert serpentine.sample(model, own, num=1, steps=2).shape == (1, 3, 32, 32)


def test_crops_of_photographs_are_the_same_each_time_and_never_of_astronaut():
    crops = serpentine.photo_crops(22, 32)
    assert crops.shape == (22, 3, 32, 32) and torch.equal(crops, serpentine.photo_crops(22, 32))
    assert len({crop.numpy().tobytes() for crop in crops}) == 22 and "astronaut" not in serpentine.PHOTOGRAPHS
    assert serpentine.photo_crops(11, 320).shape == (11, 3, 320, 320)  # larger than some of the photographs


def test_inpainting_as_the_write_up_does_it_is_one_option():
    (model, config), keep = small_model(), torch.ones(16, 16)
    keep[:8] = 0
    x, config = torch.rand(1, 3, 16, 16) * 2 - 1, dataclasses.replace(config, num_timesteps=12)
    written = dict(solver="ancestral", steps=12, resample_steps=1, clamp="mean")
    one, two = (serpentine.inpaint(model, config, x, keep, **o)[0] for o in (dict(as_written=True), written))
    assert torch.equal(one, two) and not torch.equal(one, serpentine.inpaint(model, config, x, keep, steps=12)[0])


def test_held_out_pictures_are_not_trained_on_and_the_same_in_every_stage(pictures):
    config = settings(pictures, "")
    used, held_out, loaded = serpentine.load_data(config)
    assert (len(held_out), len(used)) == (1, 23)
    parts = sorted(picture.numpy().tobytes() for part in (used, held_out) for picture in part)
    assert parts == sorted(picture.numpy().tobytes() for picture in loaded.pictures)
    for seed, width in ((5, 16), (0, 32)):
        assert torch.equal(serpentine.load_data(dataclasses.replace(config, seed=seed, width=width))[1], held_out)
    assert torch.equal(serpentine.unseen_pictures(config.data, config), held_out)
    assert len(serpentine.unseen_pictures(config.data, dataclasses.replace(config, data=("elsewhere",)))) == 24


def test_training_teaches_the_vae_to_reconstruct(trained):
    model, config = serpentine.load_model(trained)
    held_out = serpentine.unseen_pictures(config.data, config)
    grey = -10 * (held_out / 255 - 0.5).square().mean().log10()  # of a picture that is all mid-grey
    assert serpentine.psnr_and_ssim(model.vae, held_out)[0] > grey + 3


def test_training_teaches_the_denoiser_to_predict_the_noise(trained, pictures, tmp_path):
    changes = dict(vae=f"{trained}-vae", num_timesteps=1000, steps=60, lr=1e-2, batch_size=8, ema=0.8)
    assert serpentine.train(settings(pictures, tmp_path / "run", **changes)) == 0
    model, config = serpentine.load_model(tmp_path / "run")
    latent = serpentine.encode_all(model.vae, serpentine.load_data(config)[0])
    noise, t = torch.randn(latent.shape), 600
    with torch.no_grad():
        x_t = serpentine.add_noise(latent, noise, serpentine.noise_schedule(1000)[t])
        eps = model.denoiser(x_t, torch.full((len(x_t),), float(t)))
    assert (eps - noise).square().mean() < 0.5  # 1 of a network that predicts zero, more of one that predicts -noise


@pytest.mark.parametrize("predict", ["eps", "v"])
def test_training_noises_latents_and_mirrored_ones_to_the_timestep_that_the_denoiser_gets(
    predict, trained, pictures, tmp_path, monkeypatch
):
    noised, asked, losses = [], [], []

    def add_noise(latent, noise, alpha_bar, honest=serpentine.add_noise):
        noised.append((latent, noise, alpha_bar))
        return honest(latent, noise, alpha_bar)

    def forward(self, x, t, known=None, honest=Denoiser.forward):
        asked.append(t)
        output = honest(self, x, t, known)
        if self.training:  # where a latent is known, it is clean, and its prediction does not count
            latent, noise, alpha_bar = noised[-1]
            clean, alpha_bar = (x == latent).all(dim=1), alpha_bar[:, None, None, None]
            assert torch.equal(known[:, 0], clean)
            target = noise if predict == "eps" else alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * latent
            parts = [e[:, ~c].square() for e, c in zip((output - target).detach(), clean)]
            losses.append(torch.stack([part.mean() if part.numel() else torch.tensor(0.0) for part in parts]))
        return output

    def add(self, loss, times, honest=common.Run.add):
        assert torch.allclose(loss, losses[-1], atol=1e-5)
        honest(self, loss, times)

    monkeypatch.setattr(serpentine, "add_noise", add_noise)
    monkeypatch.setattr(Denoiser, "forward", forward)
    monkeypatch.setattr(common.Run, "add", add)
    changes = dict(vae=f"{trained}-vae", steps=20, flip=0.5, known_prob=0.5, predict=predict)
    config, schedule = settings(pictures, tmp_path / "run", **changes), serpentine.noise_schedule(20)
    assert serpentine.train(config) == 0
    assert len(noised) == len(losses) == 20
    assert all(torch.equal(alpha_bar, schedule[t.long()]) for (*_, alpha_bar), t in zip(noised, asked))
    times = {t.item() for t in torch.cat(asked[:20])}  # 80 numbers
    assert times <= set(range(1, 21)) and len(times) > 15
    vae, x = serpentine.load(trained)[0], serpentine.load_data(config)[0] / 127.5 - 1
    with torch.no_grad():
        plain, mirrored = (vae.normalise(vae.encode(way)) for way in (x, x.flip(-1)))
    latents = torch.cat([latent for latent, *_ in noised])
    distances = [(latents[:, None] - way).abs().amax(dim=(2, 3, 4)).amin(dim=1) for way in (plain, mirrored)]
    is_plain, is_mirrored = (distance < 1e-4 for distance in distances)
    assert (is_plain != is_mirrored).all()
    assert 25 < is_mirrored.sum() < 55  # of 80


@pytest.mark.parametrize("changes, says", [(dict(image_size=30), "not a multiple of 8"), (dict(vae="x"), "no weights")])
def test_settings_that_cannot_be_are_refused(changes, says, pictures, tmp_path):
    with pytest.raises(UserError, match=says):
        serpentine.train(settings(pictures, tmp_path / "run", **changes))
    with pytest.raises(UserError, match="multiple of 8"):
        Denoiser(width=20)
    with pytest.raises(UserError, match="multiple of 64"):
        VAE(4, 8, 1, "global")
    with pytest.raises(UserError, match="denoiser has 20 steps"):
        serpentine.sample(*small_model(), steps=21)


# ---- command line ----


def save_mask(path, size=(32, 32)):
    mask = Image.new("L", size, 255)
    mask.paste(0, (8, 8, 8 + size[0] // 2, 8 + size[1] // 2))
    mask.save(path)
    return path


def main(*words):
    return serpentine.main([str(word) for word in words])


@pytest.mark.parametrize("invert", [False, True])
def test_inpaint_writes_results_and_a_sheet_and_keeps_what_is_white(invert, trained, pictures, tmp_path):
    mask, picture, out = save_mask(tmp_path / "mask.png"), pictures / "03.png", tmp_path / "out.png"
    words = ["--weights", trained / "model.safetensors", "--steps", 4, "--device", "cpu", "--composite"]
    words += ["--image", picture, "--mask", mask, "--out", out, "--gif", tmp_path / "way.gif"] + ["--invert"] * invert
    assert main("inpaint", *words) == 0
    row, original = np.array(Image.open(tmp_path / "out-sheet.png")), np.array(Image.open(picture))
    white = (np.array(Image.open(mask)) == 255) != invert
    assert np.array_equal(row[:, :32], original)
    assert np.array_equal(row[:, 64:], np.array(Image.open(out)))
    assert np.array_equal(row[:, 32:64, 0] == 255, white)
    for result in (row[:, 64:96], row[:, 96:]):
        assert np.array_equal(result[white], original[white])
        assert not np.array_equal(result[~white], original[~white])
    with Image.open(tmp_path / "way.gif") as gif:
        assert gif.n_frames == 5


def test_bad_pictures_and_masks_are_refused(trained, pictures, tmp_path, capsys):
    picture, text, white = pictures / "00.png", tmp_path / "x", tmp_path / "white.png"
    text.write_text("no picture")
    wide = save_mask(tmp_path / "wide.png", (48, 32))
    Image.new("L", (32, 32), 255).save(white)
    Image.new("L", (32, 32), 0).save(tmp_path / "black.png")
    for words, says in [
        ((), "--image and a mask"),
        (("--image", picture, "--mask", tmp_path / "black.png"), "no whole tile"),
        (("--image", picture, "--mask", wide), "48 x 32 pixels, the picture 32 x"),
        (("--image", picture, "--mask", text), "not a readable picture"),
        (("--image", picture, "--mask", white), "keeps everything"),
    ]:
        assert main("inpaint", "--weights", trained, "--device", "cpu", *words) == 2
        assert says in capsys.readouterr().err


def test_reconstruct_measures_a_picture_of_any_size(trained, pictures, tmp_path, capsys):
    Image.open(pictures / "00.png").crop((0, 0, 21, 30)).save(tmp_path / "odd.png")
    words = ["--weights", trained, "--device", "cpu", "--out", tmp_path / "r.png", "--image", tmp_path / "odd.png"]
    assert main("reconstruct", *words) == 0
    psnr = float(capsys.readouterr().out.split("PSNR ")[1].split(" dB")[0])
    shown = np.array(Image.open(tmp_path / "r.png")).astype(float)
    assert shown.shape == (30, 42, 3)
    assert np.array_equal(shown[:, :21], np.array(Image.open(tmp_path / "odd.png")))
    assert psnr == pytest.approx(10 * np.log10(255**2 / np.square(shown[:, :21] - shown[:, 21:]).mean()), abs=0.1)


def test_seams_are_relative_to_the_originals_and_the_best_of_the_tries_counts(trained, pictures, monkeypatch, capsys):
    asked = []

    def near(model, config, x, keep, seed, **options):
        asked.append((seed, options["clamp"], options["steps"], keep[8:24, 8:24].mean(), keep.mean()))
        return None, x / 2 + 0.5 + (0.2 if len(asked) % 2 else 0.0)  # the second try is the original

    monkeypatch.setattr(serpentine, "inpaint", near)
    monkeypatch.setattr(common.Lpips, "load", lambda trunk, heads: common.Lpips().requires_grad_(False))
    words = ["--weights", trained, "--device", "cpu", "--data", pictures, "--clamp", "mean", "--steps", 7, "--tries", 2]
    assert main("seams", *words, "--lpips", "heads") == 0
    lines = capsys.readouterr().out.splitlines()
    assert all("made: 1.00, with --composite 1.00, LPIPS 0.0000 (" in line for line in lines[-2:])
    assert asked == [(seed, "mean", 7, *keep) for keep in ((0, 0.75), (1, 0.25)) for seed in (0, 1)]


def test_leakage_and_schedule_show_what_they_measure(trained, tmp_path, capsys):
    words = ["--weights", trained, "--device", "cpu", "--out", tmp_path / "s.png"]
    assert main("leakage", *words, "--against", f"{trained}-vae", "--num", 2) == 0
    lines = capsys.readouterr().out.splitlines()[:2]
    assert all(line.startswith("local decoder: ") and line.endswith(" 0.00% beyond 8 pixels") for line in lines)
    heat = np.array(Image.open(tmp_path / "s.png").reduce(3))[:32, 64:, 0]  # the middle position's tile is 16 to 23
    assert (heat[:8] == 255).all()  # white: no change
    assert heat[16:24, 16:24].min() == 0
    assert main("schedule", *words) == 0
    sheet = np.array(Image.open(tmp_path / "s.png")).astype(float)
    away = [np.abs(sheet[:32, 32 * i : 32 * i + 32] - sheet[:32, :32]).mean() for i in range(1, 8)]
    assert 0 < away[0] < away[-1]  # the last has more noise than the second


def test_the_shipped_weights_reconstruct_a_face_of_another_kind():
    model, _ = serpentine.load_model(ROOT / "weights" / "serpentine_vae.safetensors")
    face = torch.from_numpy(np.array(common.paint_face(3, 80)[0])).permute(2, 0, 1)[None]
    assert serpentine.psnr_and_ssim(model.vae, face)[0] > 20
