"""serpentine_vae.py against naive loops, closed forms, the write-up's own formula and diffusers' schedulers."""

import dataclasses
import itertools
import json
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import common
import serpentine_vae as serpentine
from common import UserError
from serpentine_vae import DIRECTIONS, VAE, Config, Denoiser, DrawConfig, InpaintConfig, VAEConfig

# A run so small that it takes a second.
SMALL = dict(image_size=32, channels=4, vae_width=8, vae_steps=6, width=16, depth=1, levels=21, vae_batch_size=4)
SMALL |= dict(steps=6, batch_size=4, device="cpu", precision="fp32", compile=False)
SMALL_FLAGS = [word for k, v in SMALL.items() if k != "compile" for word in ("--" + k.replace("_", "-"), str(v))]
HEADER = {"config": {"levels": 21, "image_size": 32}, "range": 9.0, "held_out": []}
FAST = dict(steps=4, device="cpu", precision="fp32")


def awake(model, std=0.1, seed=0):
    """Every weight random: nothing is zero, so nothing is hidden behind a closed gate."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(std * torch.randn(p.shape, generator=draw))
    return model.eval()


def small_vae(decoder="local", width=8, channels=4):
    vae = awake(VAE(channels, width, 1, decoder))
    vae.mean.copy_(torch.linspace(-1, 1, channels))
    vae.std.copy_(torch.linspace(0.5, 2, channels))
    return vae


def small_denoiser():
    return awake(Denoiser(4, 16, (1, 2), 1))


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
    """A run folder of both stages; its VAE's lies beside it."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    assert serpentine.train(Config(**SMALL, data=str(pictures), out=str(out))) == 0
    return out


def weights_of(path):
    return load_file(path / "state.safetensors")


# ---- paths ----


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("height, width", [(1, 1), (1, 6), (5, 1), (3, 5), (5, 3), (4, 4), (10, 10), (7, 8)])
def test_every_path_visits_each_cell_once_and_its_neighbours_touch(height, width, direction):
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


def test_each_part_of_a_cell_goes_along_its_own_path_and_comes_back():
    there, back = serpentine.all_paths(3, 5, torch.device("cpu"))
    x = torch.arange(15 * 8).view(1, 15 * 8, 1)  # row n * 8 + k is part k of cell n
    walked = serpentine.Reorder.apply(x.float(), there, back).view(15, 8).long()
    for k, direction in enumerate(DIRECTIONS):
        assert torch.equal(walked[:, k], serpentine.serpentine_order(3, 5, direction) * 8 + k)
    assert torch.equal(there[back], torch.arange(15 * 8))


def test_reordering_passes_the_gradient_that_indexing_does():
    there, back = serpentine.all_paths(3, 5, torch.device("cpu"))
    x, weight = torch.randn(2, 120, 3, requires_grad=True), torch.randn(2, 120, 3)
    ours, theirs = serpentine.Reorder.apply(x, there, back), x[:, there]
    ours, theirs = (torch.autograd.grad((y * weight).sum(), x)[0] for y in (ours, theirs))
    assert torch.equal(ours, theirs)


# ---- scan ----


def naive_scan(a, b):
    h, all_h = torch.zeros_like(b[:, 0]), []
    for t in range(b.shape[1]):
        h = a[:, t] * h + b[:, t]
        all_h.append(h)
    return torch.stack(all_h, dim=1)


@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 100, 256, 257, 4096])
def test_scan_and_its_gradients_equal_the_naive_loop(count):
    a = 1 - 0.2 * torch.rand(2, count, 3) ** 2  # memories over a few cells up to thousands
    b, weight = ((1 - a) * torch.randn(2, count, 3)).requires_grad_(), torch.randn(2, count, 3)
    a.requires_grad_()
    ours, theirs = serpentine.Scan.apply(a, b), naive_scan(a, b)
    assert (ours - theirs).abs().max() < 1e-4
    for x, y in zip(*(torch.autograd.grad((h * weight).sum(), (a, b)) for h in (ours, theirs))):
        assert (x - y).abs().max() < 1e-4 * max(1, y.abs().max())


def test_scan_in_float64_is_exact_where_gates_are_open_or_shut():
    a = (torch.rand(1, 300, 4, dtype=torch.float64) > 0.01).double()  # 0 forgets all, 1 nothing
    b = torch.randn(1, 300, 4, dtype=torch.float64)
    assert (serpentine.Scan.apply(a, b) - naive_scan(a, b)).abs().max() < 1e-12


def test_a_serpentine_is_eight_naive_loops_merged():
    module = awake(serpentine.Serpentine(16), std=0.5).double()
    x = torch.randn(2, 16, 3, 5, dtype=torch.float64)
    cells = F.layer_norm(x.flatten(2).transpose(1, 2), (16,), module.norm.weight, module.norm.bias)
    value, forget, gate = module.in_proj(cells).chunk(3, dim=-1)
    forget = torch.sigmoid((forget + module.span).float()).double()
    merged = torch.zeros_like(value)
    for k, direction in enumerate(DIRECTIONS):
        h = torch.zeros(2, 2, dtype=torch.float64)
        for cell in serpentine.serpentine_order(3, 5, direction).tolist():
            a, v = forget[:, cell, 2 * k : 2 * k + 2], value[:, cell, 2 * k : 2 * k + 2]
            h = a * h + (1 - a) * v
            merged[:, cell, 2 * k : 2 * k + 2] = h
    expected = module.out_proj(merged * gate * gate.sigmoid()).transpose(1, 2).unflatten(2, (3, 5))
    assert (module(x) - x - expected).abs().max() < 1e-5


@torch.no_grad()
def test_a_serpentine_sees_the_whole_map_and_starts_as_a_shortcut():
    x = torch.randn(1, 16, 6, 6)
    assert torch.equal(serpentine.Serpentine(16)(x), x)
    module, x = awake(serpentine.Serpentine(16), std=0.5).double(), x.double()
    module.span.fill_(3.0)  # long memories
    moved = x.clone()
    moved[:, 0, 2, 3] += 1
    assert ((module(moved) - module(x)).abs().amax(dim=1) > 0).all()


def test_what_a_serpentine_keeps_for_its_gradient_grows_linearly():
    def kept(side):
        sizes = []

        def pack(tensor):
            sizes.append(tensor.numel() * tensor.element_size())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            serpentine.Serpentine(16)(torch.randn(1, 16, side, side, requires_grad=True))
        return sum(sizes)

    assert math.log2(kept(32) / kept(16)) == pytest.approx(2, abs=0.05)  # four times the positions, four times as much


# ---- VAE ----


@torch.no_grad()
def test_cell_norm_looks_at_no_other_cell():
    norm = awake(serpentine.CellNorm(8), std=1.0)
    x = torch.randn(2, 8, 3, 4)
    cell = x[1, :, 2, 1]
    normed = (cell - cell.mean()) / (cell.var(unbiased=False) + norm.eps).sqrt()
    assert torch.allclose(norm(x)[1, :, 2, 1], normed * norm.weight + norm.bias, atol=1e-5)


@torch.no_grad()
def test_squeeze_and_excitation_is_its_formula():
    module, x = awake(serpentine.SqueezeExcite(8), std=1.0), torch.randn(2, 8, 3, 4)
    for picture, out in zip(x, module(x)):
        squeezed = torch.stack([channel.sum() / 12 for channel in picture])
        hidden = module.squeeze.weight @ squeezed + module.squeeze.bias
        scale = module.excite.weight @ (hidden / (1 + (-hidden).exp())) + module.excite.bias
        assert torch.allclose(out, picture * (2 / (1 + (-scale).exp()))[:, None, None], atol=1e-5)


@torch.no_grad()
def test_the_encoder_sees_the_whole_picture_and_the_decoder_eight_pixels_around_a_tile():
    vae = small_vae()
    x = torch.rand(1, 3, 64, 64) * 2 - 1
    moved = x.clone()
    moved[:, 0, 0, 0] += 1
    latent = vae.encode(x)
    assert latent.shape == (1, 4, 8, 8)
    assert (vae.encode(moved) - latent)[:, :, 7, 7].abs().max() > 0
    nudged = latent.clone()
    nudged[:, :, 3, 4] += 1
    changed = (vae.decode(nudged) != vae.decode(latent)).any(dim=1)[0]
    rows, columns = changed.any(dim=1).nonzero()[:, 0], changed.any(dim=0).nonzero()[:, 0]
    assert [rows.min(), rows.max(), columns.min(), columns.max()] == [24 - 8, 32 + 7, 32 - 8, 40 + 7]


def test_reach_by_gradient_is_the_radius_of_the_kernels():
    class Aside(torch.nn.Conv2d):  # each pixel shows its own cell and the one above
        def decode(self, latent):
            return F.interpolate(self(F.pad(latent, (0, 0, 1, 0))), scale_factor=8)

    assert serpentine.reach(small_vae(), 4) == 8
    assert serpentine.reach(Aside(4, 3, (2, 1)), 4) == 8
    wide = torch.nn.Conv2d(4, 3, 5, padding=2)
    wide.decode = lambda latent: F.interpolate(wide(latent), scale_factor=8)
    assert serpentine.reach(wide, 4) == 16  # two cells


def test_the_decoder_to_compare_with_is_as_large_and_reaches_everywhere():
    local, wide = VAE().decoder, small_vae("global", 64)
    sizes = [sum(p.numel() for p in decoder.parameters()) for decoder in (local, VAE(decoder="global").decoder)]
    assert 0.95 < sizes[1] / sizes[0] < 1.05
    assert serpentine.reach(wide, 4) is None
    with pytest.raises(UserError, match="multiple of 64"):
        VAE(4, 8, 1, "global")


def test_vae_loss_equals_a_naive_one():
    config, vae, x, noise = VAEConfig(kl_weight=0.1), small_vae(), torch.rand(2, 3, 16, 16), torch.randn(2, 4, 2, 2)
    with torch.no_grad():
        cost = serpentine.vae_loss(config, vae, x, noise)
        mean, logvar = vae.posterior(x)
        error = (vae.decode(mean + logvar.exp().sqrt() * noise) - x).double().numpy()
    for i in range(2):
        e, expected = error[i], (error[i] ** 2).mean()
        for _ in range(3):
            down, across = e[:, 1:] - e[:, :-1], e[:, :, 1:] - e[:, :, :-1]
            expected += 0.5 * ((down**2).mean() + (across**2).mean())
            e = (e[:, ::2, ::2] + e[:, 1::2, ::2] + e[:, ::2, 1::2] + e[:, 1::2, 1::2]) / 4
        normal = torch.distributions.Normal
        posterior = normal(mean[i], logvar[i].exp().sqrt())
        kl = torch.distributions.kl_divergence(posterior, normal(0, 1)).mean()
        assert cost[i].item() == pytest.approx(expected + 0.1 * kl.item(), rel=1e-4)


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


def test_sides_that_are_no_multiples_of_8_are_refused():
    with pytest.raises(UserError, match="multiples of 8"):
        small_vae().encode(torch.zeros(1, 3, 12, 16))


def test_psnr_is_its_definition():
    class Offset(torch.nn.Module):
        mean = torch.zeros(1)

        def encode(self, x):
            return x

        def decode(self, latent):
            return latent + 0.2  # a tenth of the range

    assert serpentine.psnr(Offset(), torch.zeros(3, 3, 8, 8).byte()).tolist() == pytest.approx([20.0] * 3, abs=1e-4)


# ---- noise ----


def test_step_0_is_clean_and_the_rest_follow_linear_betas():
    betas = [0.0] + [1e-4 + (2e-2 - 1e-4) * i / 999 for i in range(1000)]
    abar = np.cumprod(1 - np.array(betas))
    ours = serpentine.alphas_bar(1001)
    assert ours[0] == 1
    assert len(ours) == 1001
    assert np.allclose(ours, abar, rtol=2e-4)
    assert ours[-1].item() == pytest.approx(4.036e-5, rel=1e-3)


def test_noise_loss_asks_for_the_noise_at_uniform_steps_from_1_on():
    config, seen = Config(levels=5), []

    def denoiser(x, t):
        seen.append((x, t))
        return 0.5 * x

    latent, noise, u = torch.randn(4, 2, 3, 3), torch.randn(4, 2, 3, 3), torch.tensor([0.0, 0.25, 0.5, 0.9999])
    cost, times = serpentine.noise_loss(config, denoiser, latent, noise, u)
    (x, t) = seen[0]
    assert t.tolist() == [1, 2, 3, 4]
    assert torch.allclose(cost, (0.5 * x - noise).square().mean(dim=(1, 2, 3)))
    assert (times < 1).all()
    betas = np.linspace(1e-4, 2e-2, 4)
    for i in range(4):
        abar = np.prod(1 - betas[: i + 1])
        assert torch.allclose(x[i], abar**0.5 * latent[i] + (1 - abar) ** 0.5 * noise[i], atol=1e-5)


def some_noise(x, t):
    return 0.3 * x + 0.1 * math.sin(t)


def test_ancestral_sampling_is_the_write_ups_formula():
    levels = 30
    start, fresh = torch.randn(1, 2, 3, 3), [torch.randn(1, 2, 3, 3) for _ in range(levels - 2)]
    draws = iter(fresh)
    ours = serpentine.denoise(some_noise, start, levels, levels - 1, eta=1.0, fresh=lambda: next(draws))
    assert next(draws, None) is None  # noise came in at each step of an index greater than 1, and there alone
    beta = np.concatenate([[0], np.linspace(1e-4, 2e-2, levels - 1)])
    abar, x, draws = np.cumprod(1 - beta), start.double(), iter(fresh)
    for t in range(levels - 1, 0, -1):
        x = (x - beta[t] / (1 - abar[t]) ** 0.5 * some_noise(x, t)) / (1 - beta[t]) ** 0.5
        if t > 1:
            x = x + (beta[t] * (1 - abar[t - 1]) / (1 - abar[t])) ** 0.5 * next(draws)
    assert (ours - x).abs().max() < 1e-5


@pytest.mark.parametrize("limit", [None, 0.8])
def test_ddim_equals_diffusers(limit):
    from diffusers import DDIMScheduler

    settings = dict(clip_sample=limit is not None, clip_sample_range=limit or 1.0, set_alpha_to_one=True)
    theirs = DDIMScheduler(1000, 1e-4, 2e-2, "linear", steps_offset=0, timestep_spacing="trailing", **settings)
    theirs.set_timesteps(20)
    start = torch.randn(1, 2, 3, 3)
    ours, x = serpentine.denoise(some_noise, start, 1001, 20, limit=limit), start
    for t in theirs.timesteps:
        x = theirs.step(some_noise(x, t.item() + 1), t, x, use_clipped_model_output=limit is not None).prev_sample
    assert (ours - x).abs().max() < 1e-4


@pytest.mark.parametrize("eta, steps, repeat", [(0.0, 200, 1), (1.0, 1000, 1), (0.0, 1000, 3)])
def test_with_the_right_noise_all_ways_end_in_the_right_distribution(eta, steps, repeat):
    deviation = 0.5  # of the data; the best guess of the noise then is linear in x
    table = serpentine.alphas_bar(1001).tolist()

    def predict(x, t):
        return (1 - table[t]) ** 0.5 * x / (table[t] * deviation**2 + 1 - table[t])

    fresh = lambda: torch.randn(20_000, 1)  # noqa: E731
    x = serpentine.denoise(predict, fresh(), 1001, steps, eta, fresh, repeat=repeat)
    assert x.std().item() == pytest.approx(deviation, rel=0.03)


def test_repeated_strides_go_back_by_one_draw_and_clamp_again():
    asked, clamped, draws = [], [], []

    def predict(x, t):
        asked.append((t, x))
        return torch.zeros_like(x)

    def clamp(x, t):
        clamped.append(t)
        return x

    def fresh():
        draws.append(torch.randn(1, 2))
        return draws[-1]

    start, table = torch.randn(1, 2), serpentine.alphas_bar(21)
    serpentine.denoise(predict, start, 21, 2, fresh=fresh, clamp=clamp, repeat=3)
    assert [t for t, _ in asked] == [20, 20, 20, 10]  # the last stride ends in data, from where nothing leads back
    assert clamped == [20, 10, 20, 10, 20, 10, 0]
    assert len(draws) == 2
    part = table[20] / table[10]
    after = (table[10] / table[20]).sqrt() * start  # of a network that sees no noise, one stride
    assert torch.allclose(asked[1][1], part.sqrt() * after + (1 - part).sqrt() * draws[0], atol=1e-6)


def test_denoise_shows_the_way_from_start_to_end():
    parts, states = [], []

    def watch(x, part):
        parts.append(part)
        states.append(x)

    start = torch.randn(1, 2)
    end = serpentine.denoise(some_noise, start, 21, 4, watch=watch)
    assert parts == [0, 0.25, 0.5, 0.75, 1.0]
    assert torch.equal(states[0], start)
    assert torch.equal(states[-1], end)


# ---- denoiser and sampling ----


def test_a_fresh_denoiser_says_zero_and_takes_any_size():
    model = Denoiser(4, 16, (1, 2), 1)
    for size in ((3, 5), (4, 4), (1, 7)):
        assert (model(torch.randn(2, 4, *size), torch.tensor([1.0, 900.0])) == 0).all()


@torch.no_grad()
def test_every_cell_and_the_time_matter_to_every_other_cell():
    model, x, t = small_denoiser(), torch.randn(2, 4, 5, 6), torch.tensor([3.0, 700.0])
    out = model(x, t)
    assert (model(x, t + 1) - out).abs().amax(dim=(1, 2, 3)).min() > 1e-6
    far = x.clone()
    far[:, 0, 0, 0] += 1
    assert (model(far, t) - out)[:, :, 4, 5].abs().min() > 0


def test_sample_i_depends_on_its_own_seed_only():
    vae, denoiser = small_vae(), small_denoiser()
    for solver in ("ddim", "ancestral"):
        options = DrawConfig(num=5, seed=3, solver=solver, **FAST)
        together = serpentine.sample(vae, denoiser, options, HEADER, (4, 3, 3))
        one = dataclasses.replace(options, num=2, seed=5, batch_size=1)
        assert torch.allclose(serpentine.sample(vae, denoiser, one, HEADER, (4, 3, 3)), together[2:4], atol=1e-5)
        assert (together[0] - together[1]).abs().max() > 0.01
    with pytest.raises(UserError, match="20 noisy levels"):
        serpentine.sample(vae, denoiser, dataclasses.replace(options, steps=21), HEADER, (4, 3, 3))


# ---- inpainting ----


def test_a_cell_is_kept_if_all_its_pixels_are():
    keep = (torch.rand(24, 40) > 0.01).float()
    cells = serpentine.keep_cells(keep)
    assert cells.shape == (3, 5)
    for i, j in itertools.product(range(3), range(5)):
        assert cells[i, j].item() == all(keep[8 * i + a, 8 * j + b] == 1 for a in range(8) for b in range(8))
    assert 0 < cells.sum() < 15
    aligned = torch.rand(3, 5).round().repeat_interleave(8, 0).repeat_interleave(8, 1)
    assert torch.equal(serpentine.keep_cells(aligned).float(), aligned[::8, ::8])  # the write-up's nearest neighbour


def test_padding_goes_right_and_down_and_is_kept():
    picture, keep = torch.rand(1, 3, 10, 16), torch.zeros(10, 16)
    padded, padded_keep = serpentine.pad_to_tiles(picture, keep)
    assert padded.shape == (1, 3, 16, 16)
    assert torch.equal(padded[:, :, :10], picture)
    assert torch.equal(padded[:, :, 15], picture[:, :, 9])
    assert padded_keep[10:].all()
    assert not padded_keep[:10].any()


@pytest.mark.parametrize("how", ["mean", "noised"])
def test_known_cells_are_put_back_before_the_first_step_and_after_each(how):
    anchor, noise, cells = torch.randn(1, 2, 3, 3), torch.randn(2, 2, 3, 3), torch.rand(3, 3) > 0.5
    seen = {}

    def predict(x, t):
        seen[t] = x
        return some_noise(x, t)

    clamp = serpentine.clamp_known(anchor, cells, how, noise, 21)
    end = serpentine.denoise(predict, noise, 21, 4, clamp=clamp)
    assert list(seen) == [20, 15, 10, 5]
    for t, x in [*seen.items(), (0, end)]:
        abar = np.prod(1 - np.linspace(1e-4, 2e-2, 20)[:t])
        level = anchor if how == "mean" else abar**0.5 * anchor + (1 - abar) ** 0.5 * noise
        assert torch.allclose(x[:, :, cells], level.expand_as(x)[:, :, cells], atol=1e-5)
        assert not torch.allclose(x[:, :, ~cells], level.expand_as(x)[:, :, ~cells], atol=1e-2)
    assert torch.equal(end[:, :, cells], anchor.expand_as(end)[:, :, cells])


@pytest.mark.parametrize("clamp, solver, size", [("noised", "ddim", (24, 32)), ("mean", "ancestral", (21, 35))])
def test_kept_latents_and_with_composite_kept_pixels_are_bit_identical(clamp, solver, size):
    vae, denoiser, picture = small_vae(), small_denoiser(), torch.rand(1, 3, *size) * 2 - 1
    keep = torch.ones(size)
    keep[5:14, 9:21] = 0
    options = InpaintConfig(num=2, clamp=clamp, solver=solver, composite=True, **FAST)
    latents, cells, anchor, rgb = serpentine.inpaint(vae, denoiser, options, HEADER, picture, keep)
    assert (latents[:, :, cells] == anchor[:, :, cells]).all()
    assert (latents[:, :, ~cells] != anchor[:, :, ~cells]).all()
    assert (latents[0][:, ~cells] != latents[1][:, ~cells]).all()  # two results are two
    assert cells.sum() == cells.numel() - 2 * 2  # tiles of which a part is to be made are made whole
    kept = keep.bool()
    assert (rgb[:, :, kept] == (picture / 2 + 0.5)[:, :, kept]).all()
    assert (rgb[:, :, ~kept] != (picture / 2 + 0.5)[:, :, ~kept]).any()
    plain = serpentine.inpaint(vae, denoiser, dataclasses.replace(options, composite=False), HEADER, picture, keep)[-1]
    assert torch.equal(plain[:, :, ~kept], rgb[:, :, ~kept])
    assert not torch.equal(plain[:, :, kept], rgb[:, :, kept])


def test_one_picture_for_each_result_gives_what_each_alone_gives():
    vae, denoiser, many = small_vae(), small_denoiser(), torch.rand(3, 3, 24, 24) * 2 - 1
    keep = torch.ones(24, 24)
    keep[8:16, 8:16] = 0
    options = InpaintConfig(num=3, **FAST)
    together = serpentine.inpaint(vae, denoiser, options, HEADER, many, keep)[-1]
    for i in range(3):
        alone = dataclasses.replace(options, num=1, seed=i)
        one = serpentine.inpaint(vae, denoiser, alone, HEADER, many[i : i + 1], keep)[-1]
        assert torch.allclose(one[0], together[i], atol=1e-5)


def test_a_mask_without_a_whole_tile_to_keep_is_refused():
    vae, denoiser, keep = small_vae(), small_denoiser(), torch.ones(24, 24)
    keep[::4] = 0
    with pytest.raises(UserError, match="no whole tile"):
        serpentine.inpaint(vae, denoiser, InpaintConfig(**FAST), HEADER, torch.zeros(1, 3, 24, 24), keep)
    with pytest.raises(UserError, match="keeps everything"):
        serpentine.inpaint(vae, denoiser, InpaintConfig(**FAST), HEADER, torch.zeros(1, 3, 24, 24), torch.ones(24, 24))


def test_seam_is_the_mean_step_across_the_border():
    rgb, keep = torch.rand(2, 3, 5, 6), (torch.rand(5, 6) > 0.5).float()
    steps = []
    for i, j in itertools.product(range(5), range(6)):
        for y, x in ((i + 1, j), (i, j + 1)):
            if y < 5 and x < 6 and keep[i, j] != keep[y, x]:
                steps.append((rgb[:, :, i, j] - rgb[:, :, y, x]).abs().mean().item())
    assert serpentine.seam(rgb, keep) == pytest.approx(np.mean(steps), rel=1e-5)


@pytest.mark.parametrize("size", [32, 80, 256])
def test_the_face_mask_follows_the_tiles(size):
    keep = serpentine.face_mask(size)
    cells = serpentine.keep_cells(keep).float()
    assert torch.equal(cells.repeat_interleave(8, 0).repeat_interleave(8, 1), keep)
    assert 0.2 < 1 - keep.mean() < 0.5


# ---- leakage ----


def test_fall_off_equals_a_naive_count():
    change = torch.rand(24, 32)
    mean, total = serpentine.fall_off(change, 1, 2)
    by_distance = {}
    for y, x in itertools.product(range(24), range(32)):
        away = max(8 - y, y - 15, 16 - x, x - 23, 0)
        by_distance.setdefault(away, []).append(change[y, x].item())
    assert mean.tolist() == pytest.approx([np.mean(by_distance[d]) for d in range(len(mean))], rel=1e-5)
    assert total.tolist() == pytest.approx([np.sum(by_distance[d]) for d in range(len(mean))], rel=1e-5)


def test_a_disturbance_moves_the_middle_cell_alone_and_by_its_own_deviation():
    class Copy(torch.nn.Module):  # each pixel of a tile shows its cell's channels
        def __init__(self):
            super().__init__()
            self.unused = torch.nn.Parameter(torch.zeros(1))

        def encode(self, x):
            return F.avg_pool2d(x, 8)

        def decode(self, latent):
            return latent.repeat_interleave(8, 2).repeat_interleave(8, 3)

    x = torch.randn(500, 3, 24, 40)
    before, after, row, column = serpentine.disturb(Copy(), x)
    assert (row, column) == (1, 2)
    change = (after - before).square().mean(dim=(0, 1))
    mean, total = serpentine.fall_off(change, row, column)
    assert total[1:].sum() == 0
    assert mean[0].item() == pytest.approx(F.avg_pool2d(x, 8).var().item(), rel=0.1)


# ---- checkpoints and training ----


def test_load_gives_back_both_and_of_train_vae_the_vae(trained):
    vae, denoiser = serpentine.load(trained / "model.safetensors")
    alone, none = serpentine.load(trained.parent / "tiny-vae" / "model.safetensors")
    assert none is None
    for (name, a), b in zip(vae.state_dict().items(), alone.state_dict().values()):
        assert torch.equal(a, b), name
    stored = load_file(trained / "model.safetensors")
    assert all(torch.equal(stored[f"denoiser.{name}"], v) for name, v in denoiser.state_dict().items())
    assert not torch.equal(vae.std, torch.ones(4))  # measured
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    assert torch.equal(vae.encode(x), vae.posterior(x)[0])


def test_a_checkpoint_names_what_was_held_out_and_its_partner(trained, pictures):
    header = common.load_tensors(trained / "model.safetensors")[1]
    assert len(header["held_out"]) == 1  # of 24, one in fifty, but one at least
    assert (pictures / header["held_out"][0]).is_file()
    assert header["pictures"][0] == 23
    assert header["vae"] == common.fingerprint(serpentine.load(trained / "model.safetensors")[0])
    held_out, _ = serpentine.held_out_pictures("", header)
    assert len(held_out) == 1
    expected = common.read_picture(pictures / header["held_out"][0], 32)
    assert np.array_equal(held_out[0].permute(1, 2, 0), expected)


def test_a_vae_and_a_denoiser_that_do_not_belong_together_are_refused(trained, tmp_path):
    tensors, header = common.load_tensors(trained / "model.safetensors")
    other = {f"vae.{name}": v for name, v in small_vae().state_dict().items()}
    common.save_tensors(tmp_path / "mixed.safetensors", tensors | other, header)
    with pytest.raises(UserError, match="not the weights that this model was trained with"):
        serpentine.load(tmp_path / "mixed.safetensors")
    common.save_tensors(tmp_path / "half.safetensors", {k: v.bfloat16() for k, v in tensors.items()}, header)
    serpentine.load(tmp_path / "half.safetensors")  # rounded, it is still the same


def test_strange_files_are_refused(tmp_path, trained):
    save_file({"a": torch.zeros(1)}, tmp_path / "bare.safetensors")
    with pytest.raises(UserError, match=r"no checkpoint of serpentine_vae\.py"):
        serpentine.load(tmp_path / "bare.safetensors")
    with pytest.raises(UserError, match=r"of jit_lab\.py"):
        serpentine.load(ROOT / "weights" / "jit_lab.safetensors")
    tensors, header = common.load_tensors(trained / "model.safetensors")
    config = header["config"]
    for damage in (
        {"range": None},
        {"vae": []},
        {"held_out": None},
        {"config": None},
        {"config": config | {"multipliers": 3}},
        {"config": config | {"channels": 2.5}},
        {"config": config | {"levels": 1}},
    ):
        common.save_tensors(tmp_path / "poor.safetensors", tensors, header | damage)
        with pytest.raises(UserError, match=r"poor|--levels"):
            serpentine.load(tmp_path / "poor.safetensors")
    common.save_tensors(tmp_path / "list.safetensors", tensors, [1, 2])
    with pytest.raises(UserError, match=r"no checkpoint of serpentine_vae\.py"):
        serpentine.load(tmp_path / "list.safetensors")


@pytest.mark.parametrize("stage", ["vae", "denoiser"])
def test_a_resumed_run_equals_one_that_went_through(stage, trained, pictures, tmp_path):
    settings = SMALL | dict(data=str(pictures), flip=0.5, steps=6, decay="none", warmup=0)

    def run(out, **changes):
        if stage == "denoiser":
            vae = str(trained.parent / "tiny-vae")
            return serpentine.train(Config(**settings | dict(out=str(out), vae=vae) | changes))
        own = {field.name for field in dataclasses.fields(VAEConfig)}
        chosen = {name: value for name, value in (settings | changes).items() if name in own}
        return serpentine.train_vae(VAEConfig(**chosen, out=str(out)))

    assert run(tmp_path / "whole") == 0
    assert run(tmp_path / "parts", steps=3) == 0
    assert run(tmp_path / "parts", resume=True) == 0
    whole, parts = weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    half = common.load_tensors(tmp_path / "whole" / "model.safetensors")[0]
    assert any(name.startswith("vae.") for name in half)


def test_train_goes_on_with_a_vae_that_was_left_half_done(pictures, tmp_path):
    settings = SMALL | dict(data=str(pictures), out=str(tmp_path / "run"))
    own = {name: settings[name] for name in ("image_size", "channels", "vae_width", "device", "precision", "compile")}
    half = VAEConfig(**own, data=str(pictures), out=f"{tmp_path}/run-vae", steps=2, batch_size=4, lr=2e-3)
    assert serpentine.train_vae(half) == 0
    assert serpentine.train(Config(**settings)) == 0
    header = common.load_tensors(tmp_path / "run-vae" / "model.safetensors")[1]
    assert header["step"] == SMALL["vae_steps"]


@pytest.mark.parametrize("stage", ["run-vae", "run"])
def test_resume_goes_on_with_whichever_stage_was_interrupted(stage, trained, pictures, tmp_path, monkeypatch):
    settings = SMALL | dict(data=str(pictures), out=str(tmp_path / "run"))

    def due(self, honest=common.Run.due):
        """Ctrl-C is pressed after two steps of the stage."""
        self.asked_to_stop = self.folder.name == stage and self.step >= 2
        return honest(self)

    with monkeypatch.context() as patch:
        patch.setattr(common.Run, "due", due)
        assert serpentine.train(Config(**settings)) == 130
    assert (tmp_path / "run" / "state.safetensors").exists() == (stage == "run")
    assert serpentine.train(Config(**settings | dict(resume=True))) == 0
    for one, other in ((tmp_path / "run-vae", trained.parent / "tiny-vae"), (tmp_path / "run", trained)):
        ours, theirs = weights_of(one), weights_of(other)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_vae_of_other_sizes_brings_its_own(pictures, tmp_path):
    own = dict(image_size=32, channels=6, vae_width=8, encoder_depth=2, device="cpu", precision="fp32", compile=False)
    vae = VAEConfig(**own, data=str(pictures), out=str(tmp_path / "six"), steps=2, batch_size=4)
    assert serpentine.train_vae(vae) == 0
    changes = dict(data=str(pictures), out=f"{tmp_path}/run/", vae=str(tmp_path / "six"))
    assert serpentine.train(Config(**SMALL | changes)) == 0
    vae, denoiser = serpentine.load(tmp_path / "run" / "model.safetensors")
    assert vae.channels == 6
    assert denoiser.conv_in.in_channels == 6


def test_out_may_end_in_a_slash(pictures, tmp_path):
    assert (
        serpentine.train(Config(**SMALL | dict(data=str(pictures), out=f"{tmp_path}/run/", vae_steps=2, steps=2))) == 0
    )
    assert (tmp_path / "run-vae" / "model.safetensors").exists()


def test_the_denoiser_learns_normalised_latents_mirrored_or_not(trained, pictures, tmp_path, monkeypatch):
    seen = []

    def spy(config, denoiser, latent, noise, u, honest=serpentine.noise_loss):
        seen.append(latent)
        return honest(config, denoiser, latent, noise, u)

    monkeypatch.setattr(serpentine, "noise_loss", spy)
    vae_path = trained.parent / "tiny-vae"
    settings = SMALL | dict(data=str(pictures), vae=str(vae_path), flip=0.5, steps=12)
    assert serpentine.train(Config(**settings | dict(out=str(tmp_path / "run")))) == 0
    vae, _ = serpentine.load(vae_path / "model.safetensors")
    paths = sorted(pictures.iterdir())
    x = torch.from_numpy(np.stack([np.array(Image.open(path)) for path in paths])).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        both = [vae.normalise(vae.encode(way)).flatten(1) for way in (x, x.flip(-1))]
    turned = []
    for latent in torch.cat(seen).flatten(1):
        away = [(way - latent).square().sum(dim=1).min().item() for way in both]
        assert min(away) < 1e-6
        turned.append(away[1] < away[0])
    assert 8 < sum(turned) < 40  # of 48


def test_what_the_vae_never_saw_the_denoiser_does_not_see_either(trained, pictures, tmp_path):
    vae_path = trained.parent / "tiny-vae"
    changes = dict(data=str(pictures), out=str(tmp_path / "run"), vae=str(vae_path), seed=5)
    assert serpentine.train(Config(**SMALL | changes)) == 0
    names = [common.load_tensors(path / "model.safetensors")[1]["held_out"] for path in (vae_path, tmp_path / "run")]
    assert names[0] == names[1]
    _, _, own, _ = serpentine.load_data(Config(**SMALL | changes))
    assert own != names[0]  # which its own seed would not have chosen


def test_held_out_names_say_the_same_pictures_again_in_their_folder_alone(pictures, monkeypatch):
    config = Config(**SMALL | dict(data=str(pictures), seed=3))
    many = torch.arange(300)[:, None, None, None].expand(-1, 3, 32, 32)
    names = [f"{pictures}/{i:03d}.png" for i in range(300)]
    monkeypatch.setattr(common, "load_pictures", lambda data, size: (many, names, []))
    first, unseen, held_out, _ = serpentine.load_data(config)
    again = serpentine.load_data(dataclasses.replace(config, seed=4), held_out)
    assert len(held_out) == 6 and torch.equal(again[0], first) and again[2] == held_out  # a resumed run compares them
    header = {"config": {"data": str(pictures), "image_size": 32}, "held_out": held_out}
    assert torch.equal(serpentine.held_out_pictures("", header)[0], unseen)
    some = header | {"held_out": [*held_out, "1000.png"]}
    assert len(serpentine.held_out_pictures("", some)[0]) == 300
    assert len(serpentine.held_out_pictures("", header | {"held_out": []})[0]) == 300


def test_limit_keeps_what_each_step_predicts_in_range():
    vae, denoiser = small_vae(), small_denoiser()
    vae.mean.zero_(), vae.std.fill_(1.0)
    with torch.no_grad():
        denoiser.conv_out.weight.mul_(50)
    header = HEADER | {"range": 0.25}
    options = DrawConfig(num=2, **FAST)
    drawn = serpentine.sample(vae, denoiser, options, header, (4, 3, 3))
    assert drawn.abs().max() <= 0.25 + 1e-5  # the last step lands on what it predicts
    free = serpentine.sample(vae, denoiser, dataclasses.replace(options, limit=False), header, (4, 3, 3))
    assert free.abs().max() > 0.5


def test_a_run_cannot_go_on_with_another_vae(trained, pictures, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    shutil.copytree(trained.parent / "tiny-vae", tmp_path / "run-vae")
    tensors, header = common.load_tensors(tmp_path / "run-vae" / "model.safetensors")
    tensors["vae.decoder.0.weight"] = tensors["vae.decoder.0.weight"] + 1
    common.save_tensors(tmp_path / "run-vae" / "model.safetensors", tensors, header)
    with pytest.raises(UserError, match="began with another vae"):
        own = dict(data=str(pictures), out=f"{tmp_path}/run", vae=f"{tmp_path}/run-vae", resume=True, steps=8)
        serpentine.train(Config(**SMALL | own))


def test_a_denoiser_that_has_begun_goes_on_with_its_own_vae(trained, pictures, tmp_path):
    """Neither is another trained where the VAE's folder has gone, nor that trained on where its budget has grown."""
    shutil.copytree(trained, tmp_path / "run")
    before = serpentine.load(trained / "model.safetensors")[0].state_dict()
    own = dict(data=str(pictures), out=f"{tmp_path}/run", resume=True, vae_steps=50)
    assert serpentine.train(Config(**SMALL | own | dict(steps=9))) == 0 and not (tmp_path / "run-vae").exists()
    shutil.copytree(trained.parent / "tiny-vae", tmp_path / "run-vae")
    assert serpentine.train(Config(**SMALL | own | dict(steps=10))) == 0
    assert common.load_tensors(tmp_path / "run-vae" / "model.safetensors")[1]["step"] < 50
    after = serpentine.load(tmp_path / "run" / "model.safetensors")[0].state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_vae_that_is_done_stays_though_the_denoiser_begins_anew(trained, pictures, tmp_path):
    """Killed before its first checkpoint, it has left a log and what was skipped; and another option for it does not
    suit the VAE's run."""
    shutil.copytree(trained.parent / "tiny-vae", tmp_path / "run-vae")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.csv").write_text("step\n")
    (tmp_path / "run" / "skipped.txt").write_text("broken.png: no picture\n")
    own = dict(data=str(pictures), out=f"{tmp_path}/run", resume=True)
    with pytest.raises(
        UserError, match=f"made with --ema .*or keep the VAE that is there with --vae {tmp_path}/run-vae"
    ):
        serpentine.train(Config(**SMALL | own | dict(ema=0.5)))
    assert serpentine.train(Config(**SMALL | own)) == 0
    header = common.load_tensors(tmp_path / "run" / "model.safetensors")[1]
    assert header["vae"] == common.fingerprint(serpentine.load(tmp_path / "run-vae" / "model.safetensors")[0])


def test_a_checkpoint_has_the_settings_of_the_vae_in_it(trained, pictures, tmp_path):
    tensors, header = common.load_tensors(trained.parent / "tiny-vae" / "model.safetensors")
    header["config"]["kl_weight"] = 0.125
    common.save_tensors(tmp_path / "vae.safetensors", tensors, header)
    own = dict(data=str(pictures), out=f"{tmp_path}/run", vae=f"{tmp_path}/vae.safetensors")
    assert serpentine.train(Config(**SMALL | own)) == 0
    assert common.load_tensors(tmp_path / "run" / "model.safetensors")[1]["config"]["kl_weight"] == 0.125


def test_decoding_takes_many_cells_in_parts(monkeypatch):
    vae, seen = small_vae(), []
    latent = torch.randn(3, 4, 80, 80)
    honest = vae.decoder.forward
    monkeypatch.setattr(vae.decoder, "forward", lambda x: seen.append(len(x)) or honest(x))
    parts = serpentine.decode(vae, latent)
    assert seen == [2, 1]  # 12,800 cells at a time
    assert torch.allclose(parts[2:], serpentine.decode(vae, latent[2:]), atol=1e-5)


def test_training_learns(pictures, tmp_path):
    own = dict(image_size=32, channels=4, vae_width=16, batch_size=8, lr=5e-3, device="cpu", precision="fp32")
    out = tmp_path / "vae"
    serpentine.train_vae(VAEConfig(**own, steps=150, compile=False, data=str(pictures), out=str(out)))
    vae, _ = serpentine.load(out / "model.safetensors")
    held_out, what = serpentine.held_out_pictures("", common.load_tensors(out / "model.safetensors")[1])
    assert what == "held-out pictures"
    plain = -10 * (held_out / 255 - 0.5).square().mean().log10()  # of a picture that is all mid-grey
    assert serpentine.psnr(vae, held_out).mean() > plain + 3


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(image_size=30), "no multiple of 8"),
        (dict(width=20), "multiple of 8"),
        (dict(grad_accum=3), "is no multiple of 3"),
        (dict(vae="nowhere"), "no weights"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, says, pictures, tmp_path):
    with pytest.raises(UserError, match=says):
        serpentine.train(Config(**SMALL | dict(data=str(pictures), out=str(tmp_path / "run")) | changes))


# ---- command line ----


def save_mask(path, size=(32, 32), mode="L"):
    mask = Image.new("L", size, 255)
    mask.paste(0, (8, 8, 8 + size[0] // 2, 8 + size[1] // 2))
    mask.convert(mode).save(path)
    return path


def shout(*words):
    return serpentine.main([str(word) for word in words])


def test_train_as_a_user_would(command, pictures, tmp_path):
    code, out, err = command("train", "--data", pictures, *SMALL_FLAGS, file="serpentine_vae.py")
    assert code == 0, err
    assert "PSNR" in out
    for folder in ("runs/serpentine_vae-vae", "runs/serpentine_vae"):
        assert {"model.safetensors", "state.safetensors", "log.csv", "index.html", "samples"} <= {
            path.name for path in (tmp_path / folder).iterdir()
        }
    pages = [
        (tmp_path / folder / "index.html").read_text() for folder in ("runs/serpentine_vae-vae", "runs/serpentine_vae")
    ]
    assert ["Loss by time" in page for page in pages] == [False, True]  # a VAE knows no time
    code, _, err = command("train", "--data", pictures, *SMALL_FLAGS, file="serpentine_vae.py")
    assert code == 2
    assert "not empty" in err
    assert err.count("\n") == 1


def test_sample_writes_a_grid_single_pictures_and_the_way(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["--weights", trained / "model.safetensors", "--steps", 4, "--num", 3, "--device", "cpu"]
    assert shout("sample", *words, "--each", "each", "--gif", "way.gif") == 0
    assert Image.open("samples/serpentine_vae.png").size == (64, 64)
    assert sorted(path.name for path in (tmp_path / "each").iterdir()) == [f"00000{i}.png" for i in range(3)]
    with Image.open("way.gif") as gif:
        assert gif.n_frames == 5
    assert shout("sample", *words, "--size", 16, 40, "--out", "wide.png") == 0
    assert Image.open("wide.png").size == (80, 32)
    capsys.readouterr()
    assert shout("sample", *words, "--size", 15) == 2
    assert "multiples of 8" in capsys.readouterr().err
    vae_alone = trained.parent / "tiny-vae" / "model.safetensors"
    assert shout("sample", "--weights", vae_alone) == 2
    assert "no denoiser" in capsys.readouterr().err


@pytest.mark.parametrize("invert", [False, True])
def test_inpaint_writes_results_way_and_sheet_and_keeps_what_is_white(invert, trained, pictures, tmp_path):
    mask, picture, out = save_mask(tmp_path / "mask.png"), pictures / "03.png", tmp_path / "out.png"
    words = ["--weights", trained / "model.safetensors", "--steps", 4, "--device", "cpu", "--composite"]
    words += ["--image", picture, "--mask", mask, "--out", out] + ["--invert"] * invert
    assert shout("inpaint", *words) == 0
    made, original = np.array(Image.open(out)), np.array(Image.open(picture))
    white = (np.array(Image.open(mask)) == 255) != invert
    for result in (made[:, :32], made[:, 32:]):
        assert np.array_equal(result[white], original[white])
        assert not np.array_equal(result[~white], original[~white])
    sheet = np.array(Image.open(tmp_path / "out-sheet.png"))
    assert np.array_equal(sheet[:, :32], original)
    assert np.array_equal(sheet[:, 32:64, 0] == 255, white)
    assert np.array_equal(sheet[:, 64:], made)
    with Image.open(tmp_path / "out.gif") as gif:
        assert gif.n_frames == 5
        assert gif.size == (64, 32)


def test_help_says_what_white_means(command):
    code, out, _ = command("inpaint", "--help", file="serpentine_vae.py")
    assert code == 0
    assert "WHITE is KEPT" in " ".join(out.split())


def test_masks_that_can_be_understood_are_and_say_so(tmp_path, capsys):
    expected = serpentine.open_mask(save_mask(tmp_path / "a.png"), 32, 32)
    assert capsys.readouterr().err == ""
    assert expected.sum() == 32 * 32 - 16 * 16
    for mode in ("1", "RGB", "RGBA", "P"):
        assert torch.equal(serpentine.open_mask(save_mask(tmp_path / "b.png", mode=mode), 32, 32), expected)
    assert capsys.readouterr().err == ""
    large = Image.open(tmp_path / "a.png").resize((64, 64), Image.NEAREST)
    large.save(tmp_path / "c.png")
    assert torch.equal(serpentine.open_mask(tmp_path / "c.png", 32, 32), expected)
    assert "resized" in capsys.readouterr().err
    large.putpixel((0, 0), 0)  # half a pixel that is to be made is a pixel to be made
    large.save(tmp_path / "c.png")
    shrunk = serpentine.open_mask(tmp_path / "c.png", 32, 32)
    assert shrunk[0, 0] == 0
    assert (shrunk != expected).sum() == 1
    for size, height, width in (((167, 333), 1000, 500), ((333, 167), 500, 1000)):  # a third, rounded, either way up
        save_mask(tmp_path / "f.png", size)
        assert serpentine.open_mask(tmp_path / "f.png", height, width).shape == (height, width)
    with pytest.raises(UserError, match="bring them to one shape"):
        serpentine.open_mask(tmp_path / "f.png", 500, 1010)
    Image.fromarray(np.array(Image.open(tmp_path / "a.png")).astype(np.uint16) * 257).save(tmp_path / "e.png")
    assert torch.equal(serpentine.open_mask(tmp_path / "e.png", 32, 32), expected)
    capsys.readouterr()
    Image.open(tmp_path / "a.png").point(lambda v: 140 if v else 90).save(tmp_path / "d.png")
    assert torch.equal(serpentine.open_mask(tmp_path / "d.png", 32, 32), expected)
    assert "1024 pixels" in capsys.readouterr().err


def bad_inputs(folder, picture):
    mask, tiny, text = save_mask(folder / "mask.png"), folder / "tiny.png", folder / "text.png"
    Image.new("RGB", (7, 20)).save(tiny)
    text.write_text("no picture")
    glass = Image.new("RGBA", (32, 32), (255, 255, 255, 255))
    glass.putpixel((3, 3), (0, 0, 0, 0))
    glass.save(folder / "glass.png")
    for name, value in (("white", 255), ("black", 0)):
        Image.new("L", (32, 32), value).save(folder / f"{name}.png")
    save_mask(folder / "wide.png", (48, 32))
    return [
        ((), "--image and a mask"),
        (("--image", picture, "--mask", folder / "white.png"), "keeps everything"),
        (("--image", picture, "--mask", folder / "black.png"), "keeps nothing"),
        (("--image", picture, "--mask", folder / "wide.png"), "48 x 32 pixels, the picture 32 x 32"),
        (("--image", picture, "--mask", folder / "glass.png"), "transparent"),
        (("--image", picture, "--mask", text), "no readable picture"),
        (("--image", text, "--mask", mask), "no readable picture"),
        (("--image", tiny, "--mask", mask), "less than one tile"),
        (("--image", folder / "nowhere.png", "--mask", mask), "no readable picture"),
        (("--image", picture, "--mask", mask, "--out", folder / "x.jpg"), "name a .png"),
        (("--image", picture, "--mask", mask, "--out", picture), "would replace"),
        (("--image", picture, "--mask", folder / "x-sheet.png", "--out", folder / "x.png"), "would replace"),
    ]


def test_bad_pictures_and_masks_are_one_line_and_lose_nothing(trained, pictures, tmp_path, capsys):
    out = tmp_path / "out.png"
    out.write_bytes(b"mine")
    for words, says in bad_inputs(tmp_path, pictures / "00.png"):
        assert (
            shout(
                "inpaint", "--weights", trained / "model.safetensors", *words, *["--out", out] * ("--out" not in words)
            )
            == 2
        )
        err = capsys.readouterr().err
        assert says in err
        assert err.startswith("error: ")
        assert err.count("\n") == 1
    assert out.read_bytes() == b"mine"


def test_reconstruct_measures_what_was_held_out_or_any_picture(trained, pictures, tmp_path, capsys):
    words = ["--weights", trained / "model.safetensors", "--device", "cpu", "--out", tmp_path / "r.png"]
    assert shout("reconstruct", *words) == 0
    assert "PSNR of 1 held-out pictures" in capsys.readouterr().out
    assert Image.open(tmp_path / "r.png").size == (64, 32)
    Image.open(pictures / "00.png").crop((0, 0, 21, 30)).save(tmp_path / "odd.png")
    assert shout("reconstruct", *words, "--image", tmp_path / "odd.png") == 0
    told = float(capsys.readouterr().out.split("odd.png: ")[1].split(" dB")[0])
    shown = np.array(Image.open(tmp_path / "r.png")).astype(float)
    assert shown.shape == (30, 42, 3)
    assert np.array_equal(shown[:, :21], np.array(Image.open(tmp_path / "odd.png")))
    assert told == pytest.approx(10 * np.log10(255**2 / np.square(shown[:, :21] - shown[:, 21:]).mean()), abs=0.1)


def test_leakage_compares_with_other_vaes(trained, tmp_path, capsys):
    wide, taef2 = VAEConfig(vae_width=64, channels=4, decoder="global", image_size=32), tmp_path / "taef2"
    tensors = {f"vae.{k}": v for k, v in awake(serpentine.build_vae(wide)).state_dict().items()}
    header = {"system": "serpentine_vae", "config": dataclasses.asdict(wide), "held_out": []}
    common.save_tensors(tmp_path / "wide.safetensors", tensors, header)
    taef2.mkdir()
    for name, v in {"encoder": 0, "decoder": 0}.items():
        part = {k.removeprefix(f"{name}."): v for k, v in common.TAEF2().state_dict().items() if k.startswith(name)}
        save_file(part, taef2 / f"taef2_{name}.safetensors")
    words = ["--weights", trained / "model.safetensors", "--against", tmp_path / "wide.safetensors"]
    words += ["--published", taef2, "--num", 2, "--device", "cpu", "--out", tmp_path / "l.png"]
    assert shout("leakage", *words) == 0
    local, against, published = capsys.readouterr().out.splitlines()[:3]
    assert local.startswith("local")
    assert "0.00% of the change lies outside the tile and 8 pixels" in local
    assert "reaches 8 pixels" in local
    assert against.startswith("global")
    assert "all over the map" in against
    assert published.startswith("published")
    assert Image.open(tmp_path / "l.png").width >= 640


def test_leakage_of_flux_2s_layout(trained, tmp_path, capsys):
    flux, path = common.AutoencoderKL(32, (32, 32, 32, 32), batch_norm=True), tmp_path / "flux.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in flux.state_dict().items()}, path)
    words = ["--weights", trained / "model.safetensors", "--published", path, "--num", 2, "--device", "cpu"]
    assert shout("leakage", *words, "--out", tmp_path / "l.png") == 0
    assert "published, decoder of" in capsys.readouterr().out


def test_schedule_goes_from_the_picture_to_noise(trained, pictures, tmp_path):
    words = ["--weights", trained / "model.safetensors", "--device", "cpu", "--out", tmp_path / "s.png"]
    assert shout("schedule", *words, "--image", pictures / "05.png") == 0
    sheet = np.array(Image.open(tmp_path / "s.png")).astype(float)
    assert sheet.shape[1] == 640
    vae, _ = serpentine.load(trained / "model.safetensors")
    x = torch.from_numpy(np.array(Image.open(pictures / "05.png"))).permute(2, 0, 1)[None] / 127.5 - 1
    clean = common.make_grid(common.to_uint8(serpentine.decode(vae, serpentine.encode(vae, x))))
    clean = np.array(clean.resize((80, 80), Image.LANCZOS)).astype(float)
    away = [np.abs(sheet[:80, 80 * i : 80 * i + 80] - clean)[8:-8, 8:-8].mean() for i in range(8)]
    assert away[0] < 2
    assert min(away[1:]) > away[0]


def test_seams_are_relative_to_the_originals(trained, monkeypatch, capsys):
    def perfect(vae, denoiser, options, header, pictures, keep):
        asked.append((options.clamp, options.seed, len(pictures), keep.mean().item()))
        return None, None, None, pictures / 2 + 0.5

    asked = []
    monkeypatch.setattr(serpentine, "inpaint", perfect)
    words = ["--weights", trained / "model.safetensors", "--device", "cpu", "--data", "drawn", "--num", 3]
    monkeypatch.setattr(
        serpentine, "held_out_pictures", lambda data, header: (torch.randint(0, 255, (5, 3, 32, 32)), "")
    )
    assert shout("seams", *words, "--batch-size", 2) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.count("1.00") for line in lines[1:]] == [2] * 4
    assert asked == [
        (clamp, seed, 2 - seed // 2, keep) for keep in (0.75, 0.25) for clamp in ("noised", "mean") for seed in (0, 2)
    ]


def test_seams_of_real_inpainting(trained, capsys):
    assert shout("seams", "--weights", trained / "model.safetensors", "--device", "cpu", "--steps", 3) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert "1 held-out pictures" in lines[0]
    assert lines[1].startswith("face made, --clamp noised")
    assert lines[4].startswith("background made, --clamp mean")


# ---- what came with the code ----


def test_the_weights_that_came_with_the_code():
    path = ROOT / "weights" / "serpentine_vae.safetensors"
    assert path.stat().st_size < 20e6
    vae, denoiser = serpentine.load(path)
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["config"])
    assert header["config"]["levels"] == 1001
    face = torch.from_numpy(np.array(common.paint_face(3, 80)[0])).permute(2, 0, 1)[None] / 127.5 - 1
    assert serpentine.psnr(vae, face) > 20  # it never saw a face of this kind
    drawn = serpentine.sample(vae, denoiser, DrawConfig(num=4, steps=20, device="cpu"), header, (vae.channels, 10, 10))
    normal = vae.normalise(drawn)
    assert 0.7 < normal.std() < 1.3
    rgb = serpentine.decode(vae, drawn)
    assert (rgb[0] - rgb[1]).abs().mean() > 0.05
