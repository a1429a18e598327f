"""unet_ddpm.py against golden files, diffusers' schedulers, closed forms and naive versions."""

import dataclasses
import functools
import importlib.util
import itertools
import json
import re
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from conftest import FIXTURES, ROOT
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import common
import unet_ddpm
from common import UserError
from unet_ddpm import Config, DrawConfig, UNetModel

MAPS = {"latent": (3, 2)}  # what a checkpoint's header says of its maps
CPU = DrawConfig(device="cpu", precision="fp32")
SMALL = dict(image_size=8, in_channels=3, out_channels=3, model_channels=32, num_res_blocks=1, channel_mult=(1, 2))
SMALL |= dict(attention_resolutions=(4,), num_head_channels=16)


def awake(**changes):
    """A small U-Net whose every weight is random: nothing is zero, so nothing is hidden behind a closed gate."""
    torch.manual_seed(0)
    model = UNetModel(**(SMALL | changes))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.1)
    return model.eval()


# ---- model ----


def test_the_write_ups_call_builds_281_million_parameters_with_their_names():
    layout = json.loads((FIXTURES / "adm_281m.json").read_text())
    with torch.device("meta"):
        model = UNetModel(
            in_channels=32, model_channels=256, out_channels=32, num_res_blocks=2, attention_resolutions=(16, 8)
        )
        preset = unet_ddpm.build_model(Config(**unet_ddpm.PRESETS["paper"]), 32, 32)
    for built in (model, preset):
        assert {k: list(v.shape) for k, v in built.state_dict().items()} == layout
    assert sum(p.numel() for p in model.parameters()) == 281_730_336


def test_fresh_blocks_are_their_shortcuts_and_a_fresh_model_says_zero():
    torch.manual_seed(0)
    model, x, emb = UNetModel(**SMALL), torch.randn(2, 32, 8, 8), torch.randn(2, 128)
    assert torch.equal(model.input_blocks[1](x, emb), x)
    assert (model(torch.randn(2, 3, 8, 8), torch.tensor([3.0, 700.0])) == 0).all()


@torch.no_grad()
def test_every_cell_the_time_and_the_class_matter():
    model = awake(num_classes=4)
    x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 700.0]), torch.tensor([1, 2])
    out = model(x, t, y)
    assert (model(x, t + 0.5, y) - out).abs().max() > 1e-3  # and not only whole timesteps
    assert (model(x, t, y + 1) - out).abs().max() > 1e-3
    far = x.clone()
    far[:, :, 0, 0] += 1
    assert (model(far, t, y) - out)[:, :, 7, 7].abs().min() > 0


@torch.no_grad()
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_group_norm_in_bfloat16_is_torchs_rounded(memory_format):
    norm = unet_ddpm.norm(64)
    norm.weight.normal_()
    norm.bias.normal_()
    x = (3 * torch.randn(4, 64, 20, 20) + 2).bfloat16().to(memory_format=memory_format)
    exact = torch.nn.functional.group_norm(x.float(), 32, norm.weight, norm.bias)
    rounding = (exact.bfloat16().float() - exact).square().mean().sqrt()
    assert (norm(x).float() - exact).square().mean().sqrt() < 3 * rounding
    scale, shift = torch.randn(2, 4, 64, 1, 1).bfloat16()
    exact = exact * (1 + scale.float()) + shift.float()
    rounding = (exact.bfloat16().float() - exact).square().mean().sqrt()
    assert (norm(x, scale, shift).float() - exact).square().mean().sqrt() < 3 * rounding
    in_float32 = norm(x.float(), scale.float(), shift.float())
    assert torch.allclose(in_float32, exact, atol=1e-4)


@pytest.mark.parametrize("side", [4, 8])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_convolution_of_small_maps_is_torchs(monkeypatch, side, memory_format):
    """Forward and backward; a product where weights in channels-last outweigh the map, torch's own elsewhere."""
    conv = unet_ddpm.Conv(48, 24).to(memory_format=memory_format)
    x = torch.randn(2, 48, side, side, requires_grad=True)
    wanted = torch.nn.functional.conv2d(x, conv.weight, conv.bias, padding=1)
    products = []

    def linear(*given, honest=torch.nn.functional.linear):
        products.append(1)
        return honest(*given)

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    out = conv(x)
    assert len(products) == (side == 4 and memory_format == torch.channels_last)
    assert torch.allclose(out, wanted, atol=1e-5)
    towards = torch.randn_like(out)
    for mine, theirs in zip(*(torch.autograd.grad(y, (x, *conv.parameters()), towards) for y in (out, wanted))):
        assert torch.allclose(mine, theirs, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = conv(x)
    rounded.backward(towards.bfloat16())
    assert rounded.dtype == torch.bfloat16 and (rounded.float() - wanted).abs().max() < 0.02
    assert conv.weight.grad.is_contiguous(memory_format=memory_format)  # AdamW would have to copy any other


def test_what_is_done_in_place_for_sampling_changes_nothing():
    model, x, t = awake(), torch.randn(2, 3, 8, 8), torch.tensor([3.0, 700.0])
    before, out = x.clone(), model(x, t)
    with torch.no_grad():
        assert torch.equal(model(x, t), out)
    assert torch.equal(x, before)


def test_checkpointing_computes_twice_and_changes_no_gradient(monkeypatch):
    calls, gradients = [], []

    def forward(self, x, emb, honest=unet_ddpm.ResBlock.forward):
        calls[-1] += 1
        return honest(self, x, emb)

    monkeypatch.setattr(unet_ddpm.ResBlock, "forward", forward)
    for checkpointing in (False, True):
        model = awake().train()
        model.checkpointing = checkpointing
        calls.append(0)
        model(torch.ones(1, 3, 8, 8), torch.tensor([5.0])).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert calls[1] == 2 * calls[0] > 0
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*gradients))


# ---- DDPM's formulas ----

ABAR = common.alphas_cumprod(common.linear_betas(1000))


def test_betas_are_those_of_the_paper():
    betas = common.linear_betas(1000)
    assert (
        betas.dtype == torch.float32
        and betas[0].item() == pytest.approx(1e-4)
        and betas[-1].item() == pytest.approx(2e-2)
    )
    assert ABAR[-1].item() == pytest.approx(4.036e-5, rel=1e-3)


def test_noising_at_once_equals_noising_step_by_step():
    """Of a Gaussian: q(x_t | x_0) has mean sqrt(abar_t) x_0 and variance 1 - abar_t (Ho et al. 2020, eq. 4)."""
    mean, variance = 1.0, 0.0
    for t, beta in enumerate(common.linear_betas(1000).double().tolist()):
        mean, variance = mean * (1 - beta) ** 0.5, variance * (1 - beta) + beta
        assert ABAR[t].item() ** 0.5 == pytest.approx(mean, rel=1e-3)
        assert 1 - ABAR[t].item() == pytest.approx(variance, rel=1e-3)


@pytest.mark.parametrize("steps", [1000, 50])
def test_ancestral_steps_equal_diffusers(steps):
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler(1000, 1e-4, 2e-2, "linear", clip_sample=False)
    theirs.set_timesteps(steps)
    x, data = torch.randn(2, 2, 3, 4, 4)
    for t, t_next in itertools.pairwise([*theirs.timesteps.tolist(), -1]):
        eps = (x - ABAR[t].sqrt() * data) / (1 - ABAR[t]).sqrt()  # what a network that knows the data would say
        torch.manual_seed(t)
        noise = torch.randn(x.shape) if t else 0
        torch.manual_seed(t)
        step = theirs.step(eps, t, x).prev_sample
        ours = common.ddpm_step(x, eps, ABAR[t], ABAR[t_next] if t else torch.ones(()), noise)
        assert (ours - step).abs().max() < 1e-5
        x = step


@pytest.mark.parametrize("eta, clamp", [(0.0, False), (0.7, False), (1.0, False), (0.0, True)])
def test_ddim_sampling_equals_diffusers(eta, clamp):
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(1000, 1e-4, 2e-2, "linear", clip_sample=clamp, timestep_spacing="trailing")
    theirs.set_timesteps(20)
    (x, data), fresh = torch.randn(2, 2, 3, 4, 4), torch.randn(20, 2, 3, 4, 4)

    def predict(x, t, abar):
        return 0.9 * (x - abar.sqrt() * data) / (1 - abar).sqrt()

    expected, noise, states = x, iter(fresh), []
    assert unet_ddpm.timesteps(20) == theirs.timesteps.tolist()
    for i, t in enumerate(theirs.timesteps.tolist()):
        eps = predict(expected, t, ABAR[t])
        step = theirs.step(eps, t, expected, eta, use_clipped_model_output=clamp, variance_noise=fresh[i])
        expected = step.prev_sample
        states.append(expected)
    seen, options = [], DrawConfig(steps=20, solver="ddim", eta=eta)
    limit = 1.0 if clamp else None
    ours = unet_ddpm.ddpm_sample(predict, x, options, lambda: next(noise), limit, lambda x, part: seen.append(x))
    assert len(seen) == 21 and torch.equal(seen[-1], ours)
    for mine, step in zip(seen[1:], states):
        assert (mine - step).abs().max() < 1e-5


def test_eta_one_is_ancestral():
    x, eps, noise = torch.randn(3, 5)
    for t, t_next in ((999, 998), (500, 400), (20, 0)):
        a, b = ABAR[t].item(), ABAR[t_next].item()
        one, other = common.ddpm_step(x, eps, a, b, noise), common.ddim_step(x, eps, a, b, 1.0, noise)
        assert torch.allclose(one, other, atol=1e-5)


# ---- objectives ----


class Exact(torch.nn.Module):
    """What a perfect network would say if all data were Gaussian with this mean and deviation."""

    def __init__(self, config, mean=0.5, std=0.2):
        super().__init__()
        self.config, self.mean, self.std = config, mean, std
        self.anchor = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x, t):
        t = t.view(-1, 1, 1, 1)
        if self.config.objective == "flow":
            t = t / 999
            variance = (1 - t) ** 2 + (t * self.std) ** 2  # of x_t = (1 - t) noise + t data
            data = self.mean + t * self.std**2 / variance * (x - t * self.mean)
            noise = (1 - t) / variance * (x - t * self.mean)
            return data - noise
        abar = ABAR[t.long()]
        variance = 1 - abar + abar * self.std**2
        noise = (1 - abar).sqrt() / variance * (x - abar.sqrt() * self.mean)
        data = (x - (1 - abar).sqrt() * noise) / abar.sqrt()
        return noise if self.config.predict == "eps" else abar.sqrt() * noise - (1 - abar).sqrt() * data


CONFIGS = [Config(), Config(objective="ddpm"), Config(objective="ddpm", predict="v")]


@pytest.mark.parametrize("config", CONFIGS)
def test_loss_is_zero_for_the_right_answer_and_for_no_other(config):
    x, noise, u = torch.full((64, 3, 2, 2), 0.5), torch.randn(64, 3, 2, 2), torch.linspace(0.01, 0.99, 64)
    loss = unet_ddpm.LOSSES[config.objective]
    cost, times = loss(config, Exact(config, std=0.0), x, noise, u)
    assert cost.shape == (64,) and cost.max() < 1e-3
    assert (times - u).abs().max() < 2e-3
    assert loss(config, Exact(config, mean=0.4, std=0.0), x, noise, u)[0].max() > 1e-3
    assert loss(config, lambda x, t: torch.zeros_like(x), x, noise, u)[0].min() > 0.05


@pytest.mark.parametrize("config", CONFIGS)
def test_network_is_told_times_over_the_same_range(config):
    seen = []
    u = torch.linspace(0, 1 - 1e-6, 50)
    unet_ddpm.LOSSES[config.objective](
        config, lambda x, t: (seen.append(t), x)[1], torch.zeros(50, 1, 1, 1), torch.zeros(50, 1, 1, 1), u
    )
    assert seen[0].min() == 0 and seen[0].max() == pytest.approx(999, abs=0.01) and (seen[0].diff() >= 0).all()


WAYS = [(CONFIGS[0], "euler", 50), (CONFIGS[0], "heun", 20), (CONFIGS[0], "dpm", 50)]
WAYS += [(CONFIGS[1], "ddim", 500), (CONFIGS[1], "ancestral", 200)]


@pytest.mark.parametrize("config, solver, steps", [*WAYS, (CONFIGS[2], "ddim", 500)])
def test_exact_answers_lead_from_noise_to_the_gaussian(config, solver, steps):
    options = DrawConfig(num=500, steps=steps, solver=solver, batch_size=250, device="cpu", precision="fp32")
    x = unet_ddpm.sample(Exact(config), config, options, MAPS)
    assert x.mean().item() == pytest.approx(0.5, abs=0.02)
    assert x.std().item() == pytest.approx(0.2, rel=0.1)


@pytest.mark.parametrize("config, solver, steps", WAYS)
def test_map_depends_on_its_seed_alone(config, solver, steps):
    def draw(**options):
        return unet_ddpm.sample(
            Exact(config), config, DrawConfig(steps=5, solver=solver, precision="fp32", **options), MAPS
        )

    assert torch.allclose(draw(num=5, batch_size=2)[4], draw(num=1, seed=4)[0], atol=1e-6)
    assert (draw(num=2)[0] - draw(num=2)[1]).abs().max() > 0.01


def test_timesteps_start_at_pure_noise():
    assert unet_ddpm.timesteps(1000) == list(range(999, -1, -1))
    assert unet_ddpm.timesteps(4) == [999, 749, 499, 249]


def test_solver_of_the_other_objective_is_refused():
    with pytest.raises(UserError, match="learned flow; use euler or heun"):
        unet_ddpm.sample(Exact(CONFIGS[0]), CONFIGS[0], DrawConfig(solver="ddim"), MAPS)
    with pytest.raises(UserError, match="do not say how far their data reach"):
        unet_ddpm.sample(Exact(CONFIGS[1]), CONFIGS[1], DrawConfig(clamp=True), MAPS)
    with pytest.raises(UserError, match="are for DDPM"):
        unet_ddpm.sample(Exact(CONFIGS[0]), CONFIGS[0], DrawConfig(clamp=False), MAPS)


# ---- distances ----


def test_pyramid_adds_up_to_the_picture():
    x = torch.rand(2, 3, 64, 64)
    fine, middle, low = unet_ddpm.laplacian_pyramid(x)
    assert [level.shape[-1] for level in (fine, middle, low)] == [64, 32, 16]

    def enlarge(small):
        big = torch.zeros(2, 3, 2 * small.shape[-1], 2 * small.shape[-1])
        big[..., ::2, ::2] = 4 * small
        return unet_ddpm.blur(big)

    assert torch.allclose(fine + enlarge(middle + enlarge(low)), x, atol=1e-5)
    flat = unet_ddpm.laplacian_pyramid(torch.full((1, 3, 64, 64), 0.7))
    assert flat[0][..., 4:-4, 4:-4].abs().max() < 1e-6  # plain areas add nothing at fine levels


def test_neighbourhoods_are_cut_where_they_say():
    """A picture whose every pixel names its place; patches must be whole squares of it."""
    place = torch.arange(256.0).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    found = unet_ddpm.neighbourhoods(place, common.generator(0), count=20).view(40, 3, 7, 7)
    assert found.mean().abs() < 1e-5 and found.std() == pytest.approx(1, abs=0.01)
    steps = found.diff(dim=-1), found.diff(dim=-2)
    assert torch.allclose(steps[0], steps[0][0, 0, 0, 0].expand_as(steps[0]), atol=1e-4)
    assert torch.allclose(steps[1], 16 * steps[0][0, 0, 0, 0].expand_as(steps[1]), atol=1e-4)
    assert len(found[:, 0, 0, 0].unique()) > 10


def test_sliced_wasserstein_grows_with_what_is_wrong():
    def far(a, b):
        return np.mean(unet_ddpm.sliced_wasserstein(a, b))

    real, more = torch.rand(2, 64, 3, 32, 32)
    real, more = (unet_ddpm.blur(x) for x in (real, more))
    floor, own = far(real, more), far(real, real)
    assert own == 0 and 0 < floor < 60
    for spoil in (
        lambda x: torch.rand_like(x),
        lambda x: unet_ddpm.blur(unet_ddpm.blur(x)),
        lambda x: x[..., :1].expand_as(x),
    ):
        assert far(real, spoil(more)) > 2 * floor
    assert far(real, more[torch.randperm(64)]) == pytest.approx(floor, rel=0.2)


def test_sliced_wasserstein_equals_scipys_on_every_axis():
    real, made = torch.rand(2, 4, 3, 16, 16)  # a single level
    a, b = (unet_ddpm.neighbourhoods(x, common.generator(0)) for x in (real, made))
    axes = torch.randn(147, 8, generator=common.generator(1))
    axes = axes / axes.square().sum(dim=0).sqrt()
    slices = [scipy.stats.wasserstein_distance(a @ axis, b @ axis) for axis in axes.T]
    assert unet_ddpm.sliced_wasserstein(real, made, directions=8) == [pytest.approx(1000 * np.mean(slices), rel=1e-4)]


def test_frechet_distance_of_gaussians():
    a, b = torch.randn(500, 8) @ torch.randn(8, 8), torch.randn(500, 8) + 0.3
    cov_a, cov_b = np.cov(a.double().numpy().T), np.cov(b.double().numpy().T)
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    expected = float((a.mean(0) - b.mean(0)).square().sum()) + np.trace(cov_a + cov_b - 2 * root)
    assert unet_ddpm.frechet(a, b) == pytest.approx(expected, rel=1e-5)
    assert unet_ddpm.frechet(a, a) == pytest.approx(0, abs=1e-6)
    assert unet_ddpm.frechet(a, a + 2) == pytest.approx(32, rel=1e-5)


def test_inception_is_a_named_file_that_takes_bytes(tmp_path):
    class Features(torch.nn.Module):
        def forward(self, x: torch.Tensor, return_features: bool = False):
            assert x.dtype == torch.uint8 and return_features
            return x.float().mean(dim=(2, 3))

    torch.jit.script(Features()).save(tmp_path / "inception.pt")
    pictures = torch.rand(40, 3, 8, 8)
    measure = unet_ddpm.Distance(list(range(40)), lambda index: pictures[index], 20, str(tmp_path / "inception.pt"))
    made = 1 - pictures[:20]
    others = pictures[torch.randperm(40, generator=common.generator(0, 9))[20:]]
    means = [(part * 255).round().mean(dim=(2, 3)) for part in (others, made)]
    assert measure.name == "Inception FID"
    assert measure.floor == pytest.approx(unet_ddpm.frechet(measure.real, means[0]), rel=1e-5)
    assert measure(made) == pytest.approx(unet_ddpm.frechet(measure.real, means[1]), rel=1e-5)
    (tmp_path / "broken.pt").write_bytes(b"no network")
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "other.pt")
    for name in ("broken.pt", "other.pt"):
        with pytest.raises(UserError, match="no Inception network"):
            unet_ddpm.load_inception(tmp_path / name)


# ---- stages and runs ----

TINY = dict(image_size=16, fold=2, model_channels=32, channel_mult=(1, 1), num_res_blocks=1, attention_resolutions=(4,))
TINY |= dict(num_head_channels=16)


def make_tagged(folder):
    """24 plain pictures with tags: 8 red, 8 green, 8 blue; every fourth is also marked rare."""
    folder.mkdir()
    lines = []
    for i in range(24):
        colour = ("red", "green", "blue")[i % 3]
        Image.new("RGB", (16, 16), colour).save(folder / f"{i:02d}.png")
        tags = [f"{colour} hair"] + ["rare"] * (i % 4 == 0)
        lines.append(json.dumps({"file_name": f"{i:02d}.png", "text": f"a {colour} face", "tags": tags}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def tagged(tmp_path):
    return make_tagged(tmp_path / "tagged")


def train_tiny(out, data, **changes):
    values = dict(TINY, data=str(data), out=str(out), batch_size=8, lr=1e-3, minutes=None, device="cpu")
    return unet_ddpm.train(Config(**(values | dict(precision="fp32") | changes)))


@pytest.fixture
def train(tagged, tmp_path, monkeypatch):
    """Train the tiny model in this process."""
    monkeypatch.chdir(tmp_path)
    return functools.partial(train_tiny, data=tagged)


def header_of(path):
    with safe_open(path / "model.safetensors", "pt") as file:
        return json.loads(file.metadata()["config"])


def test_excluded_pictures_are_never_seen_and_finetuning_sees_no_others(train, tagged, tmp_path, monkeypatch):
    seen = []

    def batch(self, index, draw=None, honest=unet_ddpm.Pixels.batch):
        seen.extend(self.names[i] for i in index)
        return honest(self, index, draw)

    train(tmp_path / "base", steps=9, stage="exclude", exclude_tags=("red hair", "rare"))
    rows = [json.loads(line) for line in (tagged / "metadata.jsonl").read_text().splitlines()]
    unwanted = sorted(row["file_name"] for row in rows if {"red hair", "rare"} & set(row["tags"]))
    assert header_of(tmp_path / "base")["left_out"] == unwanted and len(unwanted) == 12
    monkeypatch.setattr(unet_ddpm.Pixels, "batch", batch)
    train(tmp_path / "again", steps=9, stage="exclude", exclude_tags=("red hair", "rare"))
    assert set(seen) == {row["file_name"] for row in rows} - set(unwanted)
    seen.clear()
    train(tmp_path / "fine", steps=6, stage="finetune", start=str(tmp_path / "base"))
    assert set(seen) == set(unwanted)


def test_folded_pictures_are_mirrored_pixel_by_pixel():
    pictures = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    data = unet_ddpm.Pixels(pictures, "abc", [[], [], []], 4, flip=1.0)
    rgb = unet_ddpm.to_rgb(Config(fold=4), None, data.batch([0, 1, 2], common.Draw(3, 0)))
    assert torch.allclose(rgb, pictures.flip(-1) / 255, atol=1e-6)
    assert torch.allclose(unet_ddpm.to_rgb(Config(fold=4), None, data.batch([0, 1, 2])), pictures / 255, atol=1e-6)


def test_finetuning_starts_where_the_base_ended(train, tmp_path):
    train(tmp_path / "base", steps=4, stage="exclude", exclude_tags=("rare",))
    train(tmp_path / "fine", steps=1, lr=0.0, stage="finetune", start=str(tmp_path / "base"))
    base, fine = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "fine"))
    assert all(torch.allclose(base[k], fine[k], atol=1e-7) for k in base)
    marks = sorted((tmp_path / "fine" / "marks").iterdir())
    assert [path.name for path in marks] == ["step_000000.safetensors", "step_000001.safetensors"]
    assert all(torch.equal(value, base[name].bfloat16()) for name, value in load_file(marks[0]).items())


@pytest.fixture(scope="module")
def folder_of_runs(tmp_path_factory):
    """Three runs of one step: `whole`, `base` without what is rare, and `bare`, that one's weights without a header."""
    folder = tmp_path_factory.mktemp("runs")
    data = make_tagged(folder / "tagged")
    train_tiny(folder / "whole", data, steps=1)
    train_tiny(folder / "base", data, steps=1, stage="exclude", exclude_tags=("rare",))
    (folder / "bare").mkdir()
    save_file(load_file(folder / "base" / "model.safetensors"), folder / "bare" / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(stage="exclude", exclude_tags=("red hat",)), "no picture bears the tag 'red hat'; near it are red hair"),
        (dict(stage="exclude"), "wants tags"),
        (dict(stage="exclude", exclude_tags=("red hair", "green hair", "blue hair")), "nothing is left"),
        (dict(stage="finetune"), "wants a run of stage exclude"),
        (dict(stage="finetune", start="whole"), "not of stage exclude"),
        (dict(stage="finetune", start="bare"), "no checkpoint of unet_ddpm.py"),
        (dict(exclude_tags=("rare",)), "--exclude-tags goes with --stage exclude"),
        (dict(start="base"), "--from goes with --stage finetune"),
        (dict(predict="v"), "--predict v goes with --objective ddpm"),
        (dict(stage="finetune", start="base", objective="ddpm"), r"with --objective flow \(not ddpm\); give"),
        (dict(stage="finetune", start="base", image_size=32), r"with --image-size 16 \(not 32\); give"),
        (dict(fold=3), "--fold 3 does not divide"),
        (dict(model_channels=48), "multiple of 32"),
        (dict(attention_resolutions=(7,)), "sides are 8, 4; name one"),
        (dict(stage="finetune", start="base", model_channels=64), r"with --model-channels 32 \(not 64\); give"),
    ],
)
def test_stage_that_cannot_be_is_refused(folder_of_runs, monkeypatch, changes, message):
    monkeypatch.chdir(folder_of_runs)
    with pytest.raises(UserError, match=message):
        train_tiny("other", "tagged", steps=1, **changes)
    assert not list(Path().glob("other/*"))


def test_finetuning_wants_the_pictures_that_the_base_had(train, tagged, tmp_path):
    train("base", steps=1, stage="exclude", exclude_tags=("rare",))
    (tagged / "01.png").rename(tagged / "99.png")
    with pytest.raises(UserError, match="with other pictures"):
        train("fine", steps=1, stage="finetune", start="base")


def test_finetuning_resumes_on_the_pictures_it_began_with(train, tmp_path):
    """Though its base has gone, or was made anew with other tags in the meantime."""
    fine = dict(stage="finetune", start="base", decay="none", warmup=0)
    train("base", steps=1, stage="exclude", exclude_tags=("rare",))
    train("whole", steps=4, **fine)
    train("fine", steps=2, **fine)
    left_out = header_of(tmp_path / "fine")["left_out"]
    assert len(left_out) == 18
    shutil.rmtree("base")
    assert train("fine", steps=3, resume=True, **fine) == 0
    train("base", steps=1, stage="exclude", exclude_tags=("red hair",))
    assert train("fine", steps=4, resume=True, **fine) == 0
    assert header_of(tmp_path / "fine")["left_out"] == left_out
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "fine"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_both_objectives_learn_from_the_same_data_and_noise(train, tmp_path, monkeypatch):
    seen = {"flow": [], "ddpm": []}
    for objective in seen:

        def loss(config, model, x, noise, u, honest=unet_ddpm.LOSSES[objective], name=objective):
            seen[name].append((x, noise, u))
            return honest(config, model, x, noise, u)

        monkeypatch.setitem(unet_ddpm.LOSSES, objective, loss)
        train(tmp_path / objective, steps=3, objective=objective)
    assert len(seen["flow"]) == 3
    for one, other in zip(*seen.values()):
        assert all(torch.equal(a, b) for a, b in zip(one, other))


def test_what_was_measured_is_not_measured_again(train, tmp_path):
    """Another machine's VAE encodes a little otherwise, and a run that goes on there keeps its range."""
    train(tmp_path / "run", steps=1)
    tensors, header = common.load_tensors(tmp_path / "run" / "state.safetensors")
    common.save_tensors(tmp_path / "run" / "state.safetensors", tensors, header | {"range": 0.75})
    train(tmp_path / "run", steps=2, resume=True)
    assert header["range"] == 1.0 and header_of(tmp_path / "run")["range"] == 0.75


@pytest.mark.parametrize("objective", ["flow", "ddpm"])
def test_resumed_run_ends_with_the_same_bits(train, tmp_path, monkeypatch, objective):
    same = dict(steps=6, objective=objective, dropout=0.1, grad_accum=2)
    train(tmp_path / "whole", **same)

    def due(self, honest=common.Run.due):
        self.asked_to_stop = self.step == 3
        return honest(self)

    with monkeypatch.context() as patch:
        patch.setattr(common.Run, "due", due)
        assert train(tmp_path / "halves", **same) == 130
    assert train(tmp_path / "halves", **same, resume=True) == 0
    for name in ("model", "state"):
        one, other = (load_file(tmp_path / run / f"{name}.safetensors") for run in ("whole", "halves"))
        assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("objective, predict", [("flow", "eps"), ("ddpm", "v")])
def test_training_learns_the_colours_there_are(train, tmp_path, objective, predict):
    train(tmp_path / "run", steps=300, objective=objective, predict=predict, lr=4e-3)
    model, config, header = unet_ddpm.load_model(tmp_path / "run" / "model.safetensors", CPU)
    x = unet_ddpm.sample(model, config, DrawConfig(num=24, steps=20, precision="fp32"), header)
    rgb = unet_ddpm.to_rgb(config, None, x).mean(dim=(2, 3))
    pure = torch.tensor([[1.0, 0, 0], [0, 0.5, 0], [0, 0, 1.0]])
    assert torch.cdist(rgb, pure).amin(dim=1).median() < 0.35


def test_latents_are_encoded_once_and_trained_on(train, tagged, tmp_path, monkeypatch, capsys):
    for seed, name in enumerate(("vae", "other")):
        torch.manual_seed(seed)
        save_file(common.AutoencoderKL(widths=(32, 32, 32, 32)).state_dict(), tmp_path / f"{name}.safetensors")
    encoded, seen = [], []

    def encode(self, x, honest=common.AutoencoderKL.encode):
        encoded.append(len(x))
        return honest(self, x)

    def batch(self, index, draw=None, honest=unet_ddpm.Latents.batch):
        seen.extend(self.names[i] for i in index)
        return honest(self, index, draw)

    monkeypatch.setattr(common.AutoencoderKL, "encode", encode)
    monkeypatch.setattr(unet_ddpm.Latents, "batch", batch)
    (tagged / "00.txt").write_bytes("café".encode("latin-1"))  # a caption, which nobody asks for here
    options = dict(vae="vae.safetensors", image_size=32, channel_mult=(1,))
    excluding = options | dict(stage="exclude", exclude_tags=("rare",))
    for out in ("one", "two"):
        assert train(tmp_path / out, steps=2, **excluding) == 0
    assert sum(encoded) == 24
    header = header_of(tmp_path / "one")
    assert header["latent"] == [4, 4] and len(header["left_out"]) == 6 and set(seen).isdisjoint(header["left_out"])
    with pytest.raises(UserError, match="maps of side 3 cannot be halved 1 times"):  # and not after hours of encoding
        train(tmp_path / "odd", steps=1, vae="vae.safetensors", image_size=24)
    assert sum(encoded) == 24
    (shards,) = (tmp_path / "data").glob("latents-tagged-32-*")
    # The shards' folder is as good as the pictures', if the VAE is the one that made them.
    assert train(tmp_path / "three", steps=1, **(excluding | dict(data=str(shards)))) == 0
    with pytest.raises(UserError, match="a VAE's latents; name its weights"):
        train(tmp_path / "four", steps=1, **(excluding | dict(data=str(shards), vae="")))
    with pytest.raises(UserError, match="not the weights"):
        train(tmp_path / "five", steps=1, **(excluding | dict(data=str(shards), vae="other.safetensors")))
    with pytest.raises(UserError, match="--image-size 36 is no multiple of 8"):
        train(tmp_path / "six", steps=1, **(options | dict(image_size=36)))
    with pytest.raises(UserError, match="of pictures of 32 pixels; say --image-size so"):
        train(tmp_path / "six", steps=1, **(options | dict(data=str(shards), image_size=16)))
    # Other pictures under the same names are other pictures.
    before = (tagged / "00.png").read_bytes()
    Image.effect_noise((40, 40), 50).convert("RGB").save(tagged / "00.png")
    with pytest.raises(UserError, match="began with another data"):
        train(tmp_path / "one", steps=3, resume=True, **excluding)
    assert sum(encoded) == 48 and len(list((tmp_path / "data").glob("latents-tagged-32-*"))) == 2
    with pytest.raises(UserError, match="was trained with another autoencoder"):
        changes = options | dict(vae="other.safetensors", stage="finetune", start="one")
        train(tmp_path / "seven", steps=1, **changes)

    capsys.readouterr()

    def told(*words):
        return unet_ddpm.main(list(map(str, words))), capsys.readouterr().err

    sampling = ["sample", "--weights", "one/model.safetensors", "--num", 2, "--steps", 2]
    for words, message in (
        ([*sampling, "--vae", "gone.safetensors"], "name its weights with --vae"),
        ([*sampling, "--vae", "other.safetensors"], "not the weights"),
        ([*sampling, "--vae", "vae.safetensors", "--clamp"], "leave them out"),
        ([*sampling, "--vae", "vae.safetensors", "--eta", 1], "leave it out"),
        ([*sampling, "--vae", "vae.safetensors", "--objective", "ddpm"], "learned --objective flow, not ddpm"),
    ):
        code, errors = told(*words)
        assert code == 2 and message in errors and errors.count("\n") == 1, errors
    assert told(*sampling, "--each", "each", "--gif", "way.gif") == (0, "")
    assert Image.open("samples/unet_ddpm.png").size == (64, 32) and len(list((tmp_path / "each").iterdir())) == 2
    assert Image.open("way.gif").n_frames == 3
    measure = ["evaluate", "--weights", "one/model.safetensors", "--steps", 2]
    assert (
        told("encode", "--data", tagged, "--image-size", 32, "--vae", "other.safetensors", "--out", "foreign")[0] == 0
    )
    code, errors = told(*measure, "--data", "foreign")
    assert code == 2 and "holds latents of another VAE" in errors
    # Encoding again into the same place must be the same encoding.
    again = ["encode", "--data", tagged, "--image-size", 32, "--out", shards]
    code, errors = told(*again, "--vae", "other.safetensors")
    assert code == 2 and "other pictures or settings" in errors
    code, errors = told(*again, "--vae", "vae.safetensors")
    assert code == 2 and "pictures, captions or tags have changed" in errors
    (tagged / "00.png").write_bytes(before)
    assert told(*again, "--vae", "vae.safetensors")[0] == 0 and sum(encoded) == 96
    lines = (tagged / "metadata.jsonl").read_text().replace('"rare"', '"common"')
    (tagged / "metadata.jsonl").write_text(lines)
    code, errors = told(*again, "--vae", "vae.safetensors")
    assert code == 2 and "tags have changed" in errors


def test_shards_of_another_system_are_refused(tmp_path):
    header = {"asked": ["a"], "rows": [{"file": "a", "caption": "a"}], "skipped": [], "vae": [], "image_size": 8}
    (tmp_path / "shards").mkdir()
    common.save_tensors(tmp_path / "shards" / "shard_00000.safetensors", {"latents": torch.zeros(1, 4, 4, 4)}, header)
    with pytest.raises(UserError, match="holds no tags: it was encoded for another"):
        unet_ddpm.Latents(tmp_path / "shards", 0.0)


def test_published_checkpoint_loads_without_its_pickle(tmp_path):
    layout = json.loads((FIXTURES / "adm_281m.json").read_text())
    weights = {k: torch.zeros(()).expand(v) for k, v in layout.items()}  # stored as one number each
    torch.save(weights, tmp_path / "model_ema.pt")
    with pytest.raises(UserError, match="--predict v goes with --objective ddpm"):
        unet_ddpm.load_model(tmp_path / "model_ema.pt", dataclasses.replace(CPU, predict="v"))
    model, _, header = unet_ddpm.load_model(tmp_path / "model_ema.pt", CPU)
    assert sum(p.numel() for p in model.parameters()) == 281_730_336 and header["latent"] == [32, 32]
    torch.save({"input_blocks.0.0.weight": torch.zeros(1), "note": "by its author"}, tmp_path / "model_ema.pt")
    with pytest.raises(UserError, match="holds more than weights \\(note\\)"):
        unet_ddpm.load_model(tmp_path / "model_ema.pt", CPU)
    torch.save({"weights": object()}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="not a readable weight file"):
        unet_ddpm.load_model(tmp_path / "evil.pt", CPU)


@pytest.fixture
def few_steps(monkeypatch):
    """Fewer steps in compare's curves than a trained model wants."""
    monkeypatch.setattr(unet_ddpm, "SAMPLING_STEPS", (5, 10))
    monkeypatch.setattr(unet_ddpm, "TRAINING_STEPS", 5)


def test_compare_writes_its_page_and_takes_runs_that_are_there(few_steps, train, tagged, tmp_path, capsys):
    flags = [
        word
        for k, v in TINY.items()
        for word in ("--" + k.replace("_", "-"), *map(str, v if isinstance(v, tuple) else (v,)))
    ]

    def compare(*words):
        code = unet_ddpm.main(["compare", "--num", "8", *words])
        return code, capsys.readouterr().err

    words = ["--data", str(tagged), "--steps", "4", "--batch-size", "8", *flags]
    assert compare(*words)[0] == 0
    folder = tmp_path / "runs" / "compare"
    page = (folder / "index.html").read_text()
    assert "Sliced Wasserstein distance" in page and "real against real" in page
    assert Image.open(folder / "compare.png").size[0] > 1000
    assert header_of(folder / "flow")["step"] == header_of(folder / "ddpm")["step"] == 4
    # The numbers are those that evaluate prints.
    words = ["--weights", str(folder / "ddpm" / "model.safetensors"), "--num", "8", "--steps", "10"]
    assert unet_ddpm.main(["evaluate", *words]) == 0
    away, floor = re.search(r"in 10 steps: ([0-9.]+) \(floor ([0-9.]+)\)", capsys.readouterr().out).groups()
    ddpm = re.search(r"<td>ddpm</td><td>[0-9.]+</td><td>([0-9.]+)</td>", page)
    assert ddpm[1] == away and f"<td>{floor}</td>" in page

    # Once more is a mistake, and with --resume nothing is trained again.
    code, errors = compare("--data", str(tagged), "--steps", "4", "--batch-size", "8", *flags)
    assert code == 2 and "add --resume" in errors
    (folder / "flow" / "marks" / "step_000004 copy.safetensors").write_bytes(b"")
    again = compare("--data", str(tagged), "--steps", "4", "--batch-size", "8", *flags, "--resume")
    assert again[0] == 0 and (folder / "index.html").read_text() == page

    given = ["--flow", str(folder / "flow"), "--ddpm", str(folder / "ddpm")]
    with open(folder / "flow" / "log.csv", "a") as log:
        log.write("5,1.0,")  # as a full disk may leave it
    assert compare(*given, "--out", "second")[0] == 0
    tables = [re.findall("<table>.*</table>", text) for text in (page, (tmp_path / "second/index.html").read_text())]
    assert tables[0] == tables[1]
    # With one run given, the other learns from the same, as long.
    code, errors = compare("--ddpm", str(folder / "ddpm"), "--out", "third", "--steps", "1")
    assert code == 2 and "--steps none (not 1)" in errors and not (tmp_path / "third").exists()
    assert compare("--ddpm", str(folder / "ddpm"), "--out", "third")[0] == 0
    flow = header_of(tmp_path / "third" / "flow")
    assert flow["step"] == 4 and flow["config"]["data"] == str(tagged) and flow["config"]["fold"] == 2
    code, errors = compare("--flow", given[3], "--out", "fourth")
    assert code == 2 and "learned ddpm" in errors and not (tmp_path / "fourth").exists()
    train("apart", steps=1, stage="exclude", exclude_tags=("rare",), objective="ddpm")
    code, errors = compare("--flow", given[1], "--ddpm", "apart", "--out", "fourth")
    assert code == 2 and "different left-out pictures" in errors
    shutil.copytree(tagged, tmp_path / "more")
    shutil.copy(tagged / "00.png", tmp_path / "more" / "99.png")
    header = header_of(folder / "flow")
    tensors, _ = common.load_tensors(folder / "flow" / "model.safetensors")
    header["config"]["data"] = "more"
    common.save_tensors(tmp_path / "moved" / "model.safetensors", tensors, header)
    code, errors = compare("--flow", "moved", "--out", "fourth")
    assert code == 2 and "more is not what moved was trained on" in errors and not (tmp_path / "fourth").exists()
    train("short", steps=1, objective="ddpm")
    assert "leave --objective out" in compare("--objective", "ddpm", "--out", "fourth")[1]
    assert "by --finetuned" in compare("--stage", "finetune", "--from", "apart", "--out", "fourth")[1]
    assert "leave --fsdp out" in compare("--flow", given[1], "--fsdp", "--out", "fourth")[1]
    (tmp_path / "short" / "log.csv").rename("log.csv")
    assert "short has no log.csv" in compare("--flow", given[1], "--ddpm", "short", "--out", "fourth")[1]
    Path("log.csv").rename(tmp_path / "short" / "log.csv")
    assert "differ in --steps: 4, 1" in compare("--flow", given[1], "--ddpm", "short", "--out", "fourth")[1]
    assert compare("--finetuned", str(folder / "flow"), "--out", "fifth")[0] == 2 and not (tmp_path / "fifth").exists()


def test_compare_draws_how_finetuning_adapts(few_steps, train, tmp_path, capsys):
    for objective in ("flow", "ddpm"):
        train(tmp_path / f"{objective}-base", steps=3, stage="exclude", exclude_tags=("rare",), objective=objective)
        fine = dict(stage="finetune", start=str(tmp_path / f"{objective}-base"), objective=objective)
        train(tmp_path / f"{objective}-fine", steps=3, **fine)
    words = ["compare", "--flow", "flow-base", "--ddpm", "ddpm-base", "--finetuned", "flow-fine", "ddpm-fine"]
    assert unet_ddpm.main([*words, "--num", "3"]) == 0, capsys.readouterr().err
    page = (tmp_path / "runs" / "compare" / "index.html").read_text()
    title = page.index("of the left-out pictures")
    assert page[title:].startswith("of the left-out pictures, by finetuning steps</h2><table><tr><td></td><td>0</td>")
    assert page[title:].count("<tr>") == 4  # steps, flow, ddpm, real against real


def test_evaluate_prints_the_distance_and_its_floor(train, tagged, tmp_path, capsys):
    train(tmp_path / "run", steps=2, stage="exclude", exclude_tags=("rare",))
    words = ["evaluate", "--weights", "run/model.safetensors", "--steps", "2"]
    assert unet_ddpm.main(words) == 0
    out, errors = capsys.readouterr()
    assert "pyramids x 1000, 9 pictures in 2 steps" in out and "note" not in errors
    shutil.copytree(tagged, tmp_path / "copy")
    (tmp_path / "copy" / "00.png").unlink()
    assert unet_ddpm.main([*words, "--data", "copy"]) == 0
    out, errors = capsys.readouterr()
    assert "11 pictures in 2 steps" in out and "not what these weights were trained on" in errors
    Path("copy").rename("gone")
    assert unet_ddpm.main([*words, "--data", "copy", "--solver", "ddim"]) == 2
    assert "use euler" in capsys.readouterr().err  # before the pictures are looked for
    assert unet_ddpm.main([*words, "--vae", "vae"]) == 2
    assert "error: these weights work in pixels; leave --vae out\n" in capsys.readouterr().err


def test_moments_of_eight_bits_come_back_as_they_were(tmp_path):
    pytest.importorskip("torchao", reason="8-bit AdamW is torchao's, which wants a C++ compiler: pip install torchao")
    torch.manual_seed(0)
    models = [torch.nn.Linear(64, 64) for _ in range(2)]
    optimizers = [unet_ddpm.make_optimizer(Config(optimizer="adamw8bit"), m, torch.device("cpu")) for m in models]
    for _ in range(2):
        models[0](torch.randn(4, 64)).square().sum().backward()
        optimizers[0][0].step()
    ema = torch.nn.Linear(64, 64)
    state = common.pack_state(models[0], ema, *optimizers[0])
    common.save_tensors(tmp_path / "state.safetensors", state, {})
    tensors, _ = common.load_tensors(tmp_path / "state.safetensors")
    common.unpack_state(tensors, "state", models[1], ema, *optimizers[1])
    again = common.pack_state(models[1], ema, *optimizers[1])
    assert any(name.endswith("codes") for name in state) and state.keys() == again.keys()
    assert all(torch.equal(state[name], again[name]) for name in state)


def test_eight_bits_without_a_compiler_say_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.optim", types.SimpleNamespace(AdamW8bit=None))
    monkeypatch.setattr(common.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="install a C\\+\\+ compiler"):
        unet_ddpm.make_optimizer(Config(optimizer="adamw8bit"), torch.nn.Linear(2, 2), torch.device("cpu"))


def test_a_name_that_is_not_utf8_is_a_name():
    names = ["caf\udce9.png", "b.png"]  # as Linux hands over a Latin-1 name
    one, other = (unet_ddpm.Pixels(torch.zeros(2, 3, 4, 4), order, [[], []], 2, 0.0) for order in (names, names[::-1]))
    assert one.header != other.header


def test_eight_bits_without_their_package_name_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    model = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match="pip install torchao"):
        unet_ddpm.make_optimizer(Config(optimizer="adamw8bit"), model, torch.device("cpu"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torchao" else 1 / 0)
    for device in ("cpu", "cuda"):
        assert unet_ddpm.settle_optimizer(Config(optimizer="auto"), torch.device(device)).optimizer == "adamw"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "torchao")
    for device, optimizer in (("cpu", "adamw"), ("cuda", "adamw8bit")):
        assert unet_ddpm.settle_optimizer(Config(optimizer="auto"), torch.device(device)).optimizer == optimizer


def test_shipped_weights_are_small_and_draw_faces():
    paths = [ROOT / "weights" / name for name in ("unet_ddpm.safetensors", "unet_ddpm_ddpm.safetensors")]
    assert sum(path.stat().st_size for path in paths) < 20e6
    faces = np.stack([np.asarray(common.paint_face(seed, 40)[0]) for seed in range(128)])
    rgb = torch.from_numpy(faces).permute(0, 3, 1, 2) / 255
    distance = unet_ddpm.Distance(range(128), lambda index: rgb[index], 64)
    for path, objective, bar in zip(paths, ("flow", "ddpm"), (1.5, 6)):
        model, config, header = unet_ddpm.load_model(path, CPU)
        made = unet_ddpm.sample(model, config, DrawConfig(num=64, steps=10), header)
        assert config.objective == objective
        assert distance(unet_ddpm.to_rgb(config, None, made)) < bar * distance.floor
