"""unet_ddpm.py against closed forms, diffusers' and scipy's results, and what it must not do."""

import csv
import json
import re
import shutil
import types
from pathlib import Path

import common
import unet_ddpm
from common import UserError
from unet_ddpm import Config, UNetModel

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from conftest import ROOT, random_weights, read_fixture, shapes
from PIL import Image
from safetensors.torch import load_file, save_file

SMALL = dict(image_size=8, in_channels=3, out_channels=3, model_channels=32, num_res_blocks=1, channel_mult=(1, 2))
SMALL |= dict(attention_resolutions=(4,), num_head_channels=16)
FLOW, DDPM, DDPM_V = Config(), Config(objective="ddpm"), Config(objective="ddpm", predict="v")


# ---- model ----


def test_the_write_ups_call_builds_the_published_names_and_shapes():
    with torch.device("meta"):
        model = UNetModel(in_channels=32, out_channels=32, num_res_blocks=2, attention_resolutions=(16, 8))
    assert shapes(model.state_dict()) == read_fixture("adm_281m")


def test_every_argument_of_guided_diffusion_is_accepted_and_those_without_meaning_only_as_they_are():
    ours = dict(conv_resample=True, dims=2, use_fp16=False, num_heads=2, num_heads_upsample=-1, num_classes=3)
    ours |= dict(use_scale_shift_norm=False, resblock_updown=False, use_new_attention_order=False, dropout=0.1)
    ours |= dict(use_checkpoint=True)
    names = set(UNetModel(**SMALL, **ours).state_dict())
    pooled = UNetModel(**SMALL, **(ours | dict(conv_resample=False)))
    assert names - set(pooled.state_dict()) == {
        f"{part}.{kind}" for part in ("input_blocks.2.0.op", "output_blocks.1.2.conv") for kind in ("weight", "bias")
    }
    assert pooled(torch.zeros(1, 3, 8, 8), torch.zeros(1), torch.zeros(1).long()).shape == (1, 3, 8, 8)
    for other in (dict(dims=3), dict(use_fp16=True), dict(num_heads_upsample=4), dict(use_new_attention_order=True)):
        with pytest.raises(ValueError, match=next(iter(other))):
            UNetModel(**SMALL, **other)


@pytest.mark.parametrize("group_channels, groups", [(0, [32, 32, 32]), (16, [4, 12, 32]), (64, [1, 3, 32])])
def test_groups_have_as_many_channels_as_asked_for_below_width_256(group_channels, groups):
    assert [unet_ddpm.group_norm(width, group_channels).num_groups for width in (64, 192, 256)] == groups


def test_fresh_blocks_are_their_shortcuts_and_a_fresh_model_returns_zero():
    torch.manual_seed(0)
    model, x, emb = UNetModel(**SMALL), torch.randn(2, 32, 8, 8), torch.randn(2, 128)
    assert torch.equal(model.input_blocks[1](x, emb), x)
    assert (model(torch.randn(2, 3, 8, 8), torch.tensor([3.0, 700.0])) == 0).all()


@torch.no_grad()
def test_fractions_of_a_timestep_matter():
    model, x, t = random_weights(UNetModel(**SMALL)), torch.randn(2, 3, 8, 8), torch.tensor([3.0, 700.0])
    assert (model(x, t + 0.25) - model(x, t)).abs().max() > 1e-3


def test_checkpointing_computes_twice_and_changes_no_gradient(monkeypatch):
    calls, gradients, forward = [], [], unet_ddpm.ResBlock.forward
    monkeypatch.setattr(unet_ddpm.ResBlock, "forward", lambda *inputs: (calls.append(1), forward(*inputs))[1])
    for use_checkpoint in (False, True):
        model = random_weights(UNetModel(**SMALL, use_checkpoint=use_checkpoint)).train()
        model(torch.ones(1, 3, 8, 8), torch.tensor([5.0])).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert len(calls) == 3 * 10  # each of the ten blocks once, then twice
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*gradients))


# ---- losses and samplers ----


class Exact(torch.nn.Module):
    """What a perfect network returns if all data are Gaussian with this mean and deviation."""

    def __init__(self, config, mean=0.5, std=0.2):
        super().__init__()
        self.config, self.mean, self.std = config, mean, std
        self.header = {"latent": (12, 2), "vae": None}
        self.anchor = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x, t):
        if self.config.objective == "flow":
            signal = t.view(-1, 1, 1, 1) / 999
            spread = 1 - signal
        else:
            abar = unet_ddpm.ALPHA_BARS[t.long()].view(-1, 1, 1, 1)
            signal, spread = abar.sqrt(), (1 - abar).sqrt()
        # Of x = signal data + spread noise, the expected data and noise
        surprise = (x - signal * self.mean) / (spread**2 + (signal * self.std) ** 2)
        data, noise = self.mean + signal * self.std**2 * surprise, spread * surprise
        if self.config.objective == "flow":
            return data - noise
        return noise if self.config.predict == "eps" else signal * noise - spread * data


def test_pairs_are_the_equations():
    x, noise = torch.full((3, 1, 1, 1), 2.0), torch.tensor([1.0, -1.0, 3.0]).view(3, 1, 1, 1)
    x_t, target, timestep, t = unet_ddpm.PAIRS["flow"](FLOW, x, noise, torch.tensor([0.0, 0.25, 1.0]))
    assert x_t.flatten().tolist() == [1.0, -0.25, 2.0] and target.flatten().tolist() == [1.0, 3.0, -1.0]
    assert timestep.tolist() == [0, 249.75, 999] and t.tolist() == [0, 0.25, 1]
    for config in (DDPM, DDPM_V):
        x_t, target, timestep, t = unet_ddpm.PAIRS["ddpm"](config, x, noise, torch.tensor([0.0, 0.2509, 0.9999]))
        assert timestep.tolist() == [0, 250, 999] and torch.equal(t, timestep / 1000)
        a = (1 - torch.linspace(1e-4, 2e-2, 1000)).cumprod(0)[[0, 250, 999]].view(3, 1, 1, 1)
        assert torch.allclose(x_t, a.sqrt() * x + (1 - a).sqrt() * noise)
        assert torch.allclose(target, a.sqrt() * noise - (1 - a).sqrt() * x if config is DDPM_V else noise)


SOLVERS = [(FLOW, "euler", 50), (FLOW, "heun", 20), (FLOW, "dpm", 50), (DDPM, "ddim", 500), (DDPM, "ancestral", 200)]


@pytest.mark.parametrize("config, solver, steps", [*SOLVERS, (DDPM_V, "ddim", 500)])
def test_exact_answers_lead_from_noise_to_the_gaussian(config, solver, steps):
    # The means over 12 channels of x_t decide nothing here, so pixel_shuffle may mix them.
    rgb = unet_ddpm.sample(Exact(config, mean=0.1), config, 200, steps, solver=solver, batch_size=100, precision="fp32")
    assert (2 * rgb - 1).mean().item() == pytest.approx(0.1, abs=0.02)
    assert (2 * rgb).std().item() == pytest.approx(0.2, rel=0.1)


@pytest.mark.parametrize("config, solver, steps", SOLVERS)
def test_a_picture_depends_on_its_seed_alone(config, solver, steps):
    def sampled(**options):
        return unet_ddpm.sample(Exact(config), config, steps=5, solver=solver, precision="fp32", **options)

    assert torch.allclose(sampled(num=5, batch_size=2)[4], sampled(num=1, seed=4)[0], atol=1e-6)
    assert (sampled(num=2)[0] - sampled(num=2)[1]).abs().max() > 0.01


@pytest.mark.parametrize("solver, clip", [("ddim", False), ("ancestral", False), ("ddim", True)])
def test_ddpm_sampling_equals_diffusers(solver, clip):
    """A ddim step with eta 1 is the ancestral step."""
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(1000, 1e-4, 2e-2, "linear", clip_sample=clip, timestep_spacing="trailing")
    theirs.set_timesteps(20)
    (x, data), new_noise = torch.randn(2, 2, 3, 4, 4), torch.randn(20, 2, 3, 4, 4)
    table = unet_ddpm.ALPHA_BARS

    def network(x, t):
        return 0.9 * (x - table[t].sqrt() * data) / (1 - table[t]).sqrt()

    states, noise, seen = [x], iter(new_noise), []
    for t, fresh in zip(theirs.timesteps, new_noise):
        eps, options = network(states[-1], t), dict(use_clipped_model_output=clip, variance_noise=fresh)
        states.append(theirs.step(eps, t, states[-1], float(solver == "ancestral"), **options).prev_sample)
    options = dict(data_max=1.0 if clip else None, callback=lambda x, part: seen.append(x))
    ours = unet_ddpm.ddpm_sample(DDPM, network, x, 20, lambda: next(noise), solver, **options)
    assert unet_ddpm.timesteps(20) == theirs.timesteps.tolist() and torch.equal(seen[-1], ours)
    torch.testing.assert_close(seen, states, atol=1e-5, rtol=0)


def test_clipping_keeps_the_data_in_the_checkpoints_range():
    model = Exact(DDPM, mean=3.0)
    model.header["range"] = 0.5
    rgb = unet_ddpm.sample(model, DDPM, 4, 5, precision="fp32")
    assert rgb.max().item() == pytest.approx(0.75, abs=1e-3)  # RGB of 0.5
    assert unet_ddpm.sample(model, DDPM, 4, 5, precision="fp32", clip=False).min() == 1


def test_solver_of_the_other_objective_is_refused():
    with pytest.raises(UserError, match="is not for flow weights; use euler or heun or dpm"):
        unet_ddpm.sample(Exact(FLOW), FLOW, solver="ddim")


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


def test_patches_are_whole_squares_of_the_picture():
    """The value of each pixel is its place, in each channel on another scale."""
    place = torch.arange(256.0).view(16, 16) * torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1).expand(2, 3, 1, 1)
    found = unet_ddpm.random_patches(place, common.generator(0), count=20).view(40, 3, 7, 7)
    assert found.mean().abs() < 1e-5 and found.std() == pytest.approx(1, abs=0.01)
    steps = found.diff(dim=-1), found.diff(dim=-2)
    assert torch.allclose(steps[0], steps[0][0, 0, 0, 0].expand_as(steps[0]), atol=1e-4)
    assert torch.allclose(steps[1], 16 * steps[0][0, 0, 0, 0].expand_as(steps[1]), atol=1e-4)
    assert len(found[:, 0, 0, 0].unique()) > 10


def test_sliced_wasserstein_equals_scipys_on_every_level_and_axis():
    real, made = torch.rand(2, 4, 3, 32, 32)
    axes = torch.randn(147, 8, generator=common.generator(1))
    axes = axes / axes.square().sum(dim=0).sqrt()
    levels = []
    for pair in zip(*map(unet_ddpm.laplacian_pyramid, (real, made))):
        a, b = (unet_ddpm.random_patches(level, common.generator(0)) for level in pair)
        slices = [scipy.stats.wasserstein_distance(a @ axis, b @ axis) for axis in axes.T]
        levels.append(1000 * np.mean(slices))
    assert unet_ddpm.sliced_wasserstein(real, made, directions=8) == pytest.approx(levels, rel=1e-4)


def test_frechet_distance_of_gaussians():
    a, b = torch.randn(500, 8) @ torch.randn(8, 8), torch.randn(500, 8) + 0.3
    cov_a, cov_b = np.cov(a.double().numpy().T), np.cov(b.double().numpy().T)
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    expected = float((a.mean(0) - b.mean(0)).square().sum()) + np.trace(cov_a + cov_b - 2 * root)
    assert unet_ddpm.frechet(a, b) == pytest.approx(expected, rel=1e-5)
    assert unet_ddpm.frechet(a[:5], a[:5] + 2) == pytest.approx(32, rel=1e-5)  # of a singular covariance, too


@pytest.fixture
def networks(tmp_path):
    """(AlexNet and a stand-in for Inception that takes bytes, as files: options of evaluate; AlexNet)."""

    class Features(torch.nn.Module):
        def forward(self, x: torch.Tensor, return_features: bool = False):
            assert x.dtype == torch.uint8 and return_features
            return x.float().mean(dim=(2, 3))

    torch.jit.script(Features()).save(tmp_path / "inception.pt")
    alexnet = common.Lpips()
    save_file({f"features.{k}": v for k, v in alexnet.features.state_dict().items()}, tmp_path / "alexnet.safetensors")
    return dict(inception=str(tmp_path / "inception.pt"), alexnet=str(tmp_path / "alexnet.safetensors")), alexnet


def test_distances_are_of_the_features_that_their_names_promise(networks):
    files, alexnet = networks
    pictures = common.Pictures(torch.randint(0, 256, (24, 3, 32, 32), dtype=torch.uint8), *[list(range(24))] * 3)
    data = unet_ddpm.Data(Config(image_size=32), pictures, left_out=[3, 5])
    config = unet_ddpm.EvaluateConfig(num=100, **files)
    distances = unet_ddpm.Distances(config, data, None, torch.device("cpu"))
    made = torch.rand(11, 3, 32, 32)
    found, order = distances(made), torch.randperm(22, generator=common.generator(0, 9))
    chosen = torch.tensor([i for i in range(24) if i not in (3, 5)])
    real, others = (pictures.pictures[chosen[part]] for part in order.split(11))
    assert distances.num == 11
    means = [part.float().mean(dim=(2, 3)) for part in (real, (made * 255).round())]
    assert found["frechet_inception"] == pytest.approx(unet_ddpm.frechet(*means), rel=1e-4)
    with torch.no_grad():
        layers = [alexnet.layers(rgb) for rgb in (real / 255, made)]
    features = [torch.cat([layer.mean(dim=(2, 3)) for layer in five], dim=1) for five in layers]
    assert features[0].shape == (11, 1152)
    assert found["frechet_alexnet"] == pytest.approx(1000 * unet_ddpm.frechet(*features), rel=1e-3)
    levels = unet_ddpm.sliced_wasserstein(real / 255, made)
    assert [found["distance"], found["finest_level"]] == pytest.approx([np.mean(levels), levels[0]], rel=1e-4)
    levels = unet_ddpm.sliced_wasserstein(real / 255, others / 255)
    assert distances.floor["distance"] == pytest.approx(np.mean(levels), rel=1e-4)


def test_what_is_no_inception_network_is_refused(tmp_path):
    (tmp_path / "broken.pt").write_bytes(b"no network")
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "other.pt")
    for name in ("broken.pt", "other.pt"):
        with pytest.raises(UserError, match="not a readable Inception network"):
            unet_ddpm.load_features(unet_ddpm.EvaluateConfig(inception=str(tmp_path / name)))


# ---- data and stages ----

TINY = dict(image_size=16, fold=2, model_channels=32, channel_mult=(1, 1), num_res_blocks=1, attention_resolutions=(4,))
TINY |= dict(num_head_channels=16, group_channels=16, batch_size=8, lr=1e-3, device="cpu", precision="fp32")
FLAGS = " ".join(f"--{k} {v}" for k, v in TINY.items()).replace("(1, 1)", "1 1").replace("(4,)", "4").split()


@pytest.fixture(scope="session")
def tagged(tmp_path_factory):
    """24 plain pictures with tags: 8 red, 8 green, 8 blue; every fourth is also marked rare."""
    folder, lines = tmp_path_factory.mktemp("tagged"), []
    for i in range(24):
        colour = ("red", "green", "blue")[i % 3]
        Image.new("RGB", (16, 16), colour).save(folder / f"{i:02d}.png")
        tags = [f"{colour} hair"] + ["rare"] * (i % 4 == 0)
        lines.append(json.dumps({"file_name": f"{i:02d}.png", "text": f"a {colour} face", "tags": tags}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def train(tagged, tmp_path, monkeypatch):
    """Train the tiny model in this process, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return lambda out, **changes: unet_ddpm.train(Config(**(TINY | dict(data=(str(tagged),), out=str(out)) | changes)))


def header_of(folder):
    return common.load_tensors(Path(folder) / "model.safetensors", header_only=True)[1]


@pytest.fixture
def seen(monkeypatch):
    """The names of the pictures that training reads."""
    names = []

    def read(self, index, flip_rng=None, honest=unet_ddpm.Data.read):
        names.extend(self.source.names[i] for i in index if flip_rng)
        return honest(self, index, flip_rng)

    monkeypatch.setattr(unet_ddpm.Data, "read", read)
    return names


def test_excluded_pictures_are_never_seen_and_finetuning_sees_no_others(train, tagged, seen):
    train("base", steps=9, stage="exclude", exclude_tags=("red hair", "rare"), objective="ddpm")
    rows = [json.loads(line) for line in (tagged / "metadata.jsonl").read_text().splitlines()]
    unwanted = {row["file_name"] for row in rows if {"red hair", "rare"} & set(row["tags"])}
    assert set(header_of("base")["left_out"]) == unwanted and len(unwanted) == 12
    assert set(seen) == {row["file_name"] for row in rows} - unwanted
    seen.clear()
    train("fine", steps=1, lr=0.0, stage="finetune", start="base", model_channels=64, num_head_channels=32)
    base, fine = (load_file(f"{name}/model.safetensors") for name in ("base", "fine"))
    assert all(torch.allclose(base[k], fine[k], atol=1e-7) for k in base)  # the model is the base's, and starts there
    assert header_of("fine")["config"]["objective"] == "ddpm"
    marks = sorted(Path("fine/marks").iterdir())
    assert [path.name for path in marks] == ["step_000000.safetensors", "step_000001.safetensors"]
    assert all(torch.equal(value, base[name].bfloat16()) for name, value in load_file(marks[0]).items())
    train("fine", steps=4, lr=0.0, stage="finetune", start="base", resume="", model_channels=64, num_head_channels=32)
    assert set(seen) == unwanted
    with pytest.raises(UserError, match="with other pictures"):
        train("other", steps=1, stage="finetune", start="base", num_samples=23)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(stage="exclude", exclude_tags=("red hat",)), "no picture has the tag 'red hat'; similar tags: red hair"),
        (dict(stage="exclude"), "--exclude-tags goes with"),
        (dict(stage="exclude", exclude_tags=("red hair", "green hair", "blue hair")), "no pictures are left"),
        (dict(exclude_tags=("rare",)), "--exclude-tags goes with"),
        (dict(stage="finetune"), "goes with"),
        (dict(stage="finetune", start="whole"), "no run of stage exclude"),
        (dict(fold=3), "--fold 3 does not divide"),
        (dict(model_channels=48, group_channels=0), "multiple of 32"),
        (dict(num_head_channels=24), "no multiple of num_head_channels 24; make"),
        (dict(attention_resolutions=(7,)), "sides are .8, 4.; name some"),
        (dict(image_size=18), "maps of side 9 cannot be halved"),
    ],
)
def test_what_cannot_be_is_refused(train, changes, message):
    if changes.get("start"):
        train(changes["start"], steps=1)
    with pytest.raises(UserError, match=message):
        train("other", steps=1, **changes)


def test_unshuffled_pictures_are_mirrored_pixel_by_pixel():
    pixels = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    config = Config(image_size=8, fold=4, flip=1.0, batch_size=3)
    data = unet_ddpm.Data(config, common.Pictures(pixels, list("abc"), [""] * 3, [[]] * 3))
    for step, order in ((0, common.batch_index(config, 3, 0)), (5, common.batch_index(config, 3, 5))):
        rgb = unet_ddpm.to_rgb(config, data.batch(step, slice(0, 2)))
        assert torch.allclose(rgb, pixels.flip(-1)[order[:2]] / 255, atol=1e-6)
    assert torch.allclose(unet_ddpm.to_rgb(config, data.read([2])), pixels[2:] / 255, atol=1e-6)


def test_latents_are_encoded_once_trained_on_and_decoded(train, tagged, tmp_path, monkeypatch, capsys, seen):
    save_file(common.AutoencoderKL(widths=(32, 32, 32, 32)).state_dict(), tmp_path / "vae.safetensors")
    encoded, honest = [], common.AutoencoderKL.encode
    monkeypatch.setattr(common.AutoencoderKL, "encode", lambda self, x: (encoded.append(len(x)), honest(self, x))[1])
    options = dict(vae="vae.safetensors", image_size=32, channel_mult=(1,), steps=2)
    for out in ("one", "two"):
        assert train(out, stage="exclude", exclude_tags=("rare",), **options) == 0
    assert sum(encoded) == 24
    header = header_of("one")
    assert header["latent"] == [4, 4] and len(header["left_out"]) == 6 and set(seen).isdisjoint(header["left_out"])
    (shards,) = Path("data").glob("latents-*")
    assert train("three", **(options | dict(data=(str(shards),)))) == 0  # the shards' folder itself
    with pytest.raises(UserError, match="in the latents of a VAE; name its weights"):
        train("five", **(options | dict(data=(str(shards),), vae="")))

    model, config = unet_ddpm.load_model("one/model.safetensors")
    vae = common.load_vae("vae.safetensors")
    latents = unet_ddpm.sample(model, config, 2, 2, precision="fp32")
    rgb = unet_ddpm.sample(model, config, 2, 2, precision="fp32", vae=vae)
    assert latents.shape == (2, 4, 4, 4)
    assert torch.allclose(rgb, (vae.decode(latents) / 2 + 0.5).clamp(0, 1), atol=1e-4)
    words = "sample --weights one --num 2 --steps 2 --each each --gif way.gif".split()
    assert unet_ddpm.main(words) == 0
    assert Image.open("samples/unet_ddpm.png").size == (64, 32) and len(list(Path("each").iterdir())) == 2
    assert Image.open("way.gif").n_frames == 3
    assert unet_ddpm.main([*words, "--vae", "gone.safetensors"]) == 2
    assert unet_ddpm.main("evaluate --weights one --steps 2".split()) == 0
    assert "9 pictures in 2 steps" in capsys.readouterr().out  # 18 of 24 were trained on


@pytest.mark.parametrize("name, count", [("adm_281m", 281_730_336), ("adm_281m_raw_ds", 280_674_336)])
def test_published_checkpoint_loads_in_both_layouts_that_the_write_up_allows(name, count, tmp_path):
    weights = {k: torch.zeros(()).expand(v) for k, v in read_fixture(name).items()}  # stored as one number each
    torch.save(weights, tmp_path / "model_ema.pt")
    model, config = unet_ddpm.load_model(tmp_path / "model_ema.pt", objective="ddpm", predict="v")
    assert sum(p.numel() for p in model.parameters()) == count
    assert model.header["latent"] == [32, 32] and (config.objective, config.predict) == ("ddpm", "v")


def test_weights_whose_header_names_no_data_can_be_shown(monkeypatch):
    """Such as the write-up's model_ema.pt, which `demo` takes."""
    run = types.SimpleNamespace(config=FLOW, folder="a", header={"latent": [32, 32]})
    monkeypatch.setattr(unet_ddpm, "Trained", lambda path, options: run)
    assert unet_ddpm.load_runs(["a.pt"], None) == {"flow": run}


def test_raw_latents_are_normalised_before_they_are_decoded():
    vae = common.AutoencoderKL(8, (32,) * 4, batch_norm=True).eval()
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 4)
    x, stored = torch.rand(1, 3, 32, 32) * 2 - 1, unet_ddpm.RawLatents(vae, 0.3, 2.5)
    with torch.no_grad():
        raw, _ = vae.posterior(x)
        expected = vae.decode(vae.encode(x))
        torch.testing.assert_close(stored.decode((raw - 0.3) / 2.5), expected)
        assert not torch.allclose(unet_ddpm.RawLatents(vae, 0, 1).decode(vae.encode(x)), expected, atol=1e-2)
    with pytest.raises(UserError, match="TAEF2 has only normalised latents"):
        unet_ddpm.RawLatents(common.TAEF2(), 0, 1)


# ---- training ----


def test_objectives_learn_from_the_same_data_noise_and_times(train, monkeypatch):
    received = {"flow": [], "ddpm": []}
    for objective in received:

        def pair(config, x, noise, u, honest=unet_ddpm.PAIRS[objective], name=objective):
            received[name].append((x, noise, u))
            return honest(config, x, noise, u)

        monkeypatch.setitem(unet_ddpm.PAIRS, objective, pair)
        train(objective, steps=3, objective=objective, grad_accum=2)
    assert len(received["flow"]) == 6
    for one, other in zip(*received.values()):
        assert all(torch.equal(a, b) for a, b in zip(one, other))


@pytest.mark.parametrize("objective, predict", [("flow", "eps"), ("ddpm", "v")])
def test_training_learns_the_colours_there_are(train, objective, predict):
    train("run", steps=200, objective=objective, predict=predict, lr=4e-3)
    model, config = unet_ddpm.load_model("run/model.safetensors")
    rgb = unet_ddpm.sample(model, config, num=24, steps=20, precision="fp32").mean(dim=(2, 3))
    pure = torch.tensor([[1.0, 0, 0], [0, 0.5, 0], [0, 0, 1.0]])
    assert torch.cdist(rgb, pure).amin(dim=1).median() < 0.35


def test_eight_bit_adamw_is_chosen_where_it_can_run(monkeypatch):
    for found, device, optimizer in ((None, "cuda", "adamw"), (1, "cuda", "adamw8bit"), (1, "cpu", "adamw")):
        monkeypatch.setattr(unet_ddpm.importlib.util, "find_spec", lambda name, found=found: found)
        assert unet_ddpm.resolve(Config(optimizer="auto"), torch.device(device)).optimizer == optimizer


# ---- comparison ----


@pytest.fixture
def compare(train, monkeypatch, capsys):
    """compare with fewer steps than a trained model wants: (exit code, stderr, rows of compare.csv)."""
    monkeypatch.setattr(unet_ddpm, "SAMPLING_STEPS", (2, 5))
    monkeypatch.setattr(unet_ddpm, "MARK_STEPS", 2)

    def run(*words, out="runs/compare"):
        code = unet_ddpm.main(["compare", "--num", "8", "--out", out, *map(str, words)])
        path = Path(out) / "compare.csv"
        return code, capsys.readouterr().err, list(csv.DictReader(path.open())) if path.exists() else []

    return run


def test_compare_trains_three_objectives_and_goes_on_where_it_was_killed(compare, tagged, tmp_path, capsys, seen):
    words = ["--data", tagged, "--epochs", 1, "--no-compile", *FLAGS]  # three steps
    code, _, rows = compare(*words)
    folder = tmp_path / "runs" / "compare"
    headers = {name: header_of(folder / name) for name in ("flow", "ddpm", "ddpm-v")}
    assert code == 0 and all(header["step"] == 3 for header in headers.values())
    assert [(r["objective"], r["sampling_steps"], r["seed"]) for r in rows] == [
        (name, steps, "0") for steps in ("2", "5") for name in headers
    ]
    chosen = [(h["config"]["objective"], h["config"]["predict"]) for h in headers.values()]
    assert chosen == [("flow", "eps"), ("ddpm", "eps"), ("ddpm", "v")]
    assert Image.open(folder / "compare.png").size[0] > 1000
    # The numbers are those that evaluate prints.
    words_2 = f"evaluate --weights {folder}/ddpm --num 8 --steps 5 --precision fp32".split()
    assert unet_ddpm.main(words_2) == 0
    away, floor = re.search(r"in 5 steps: ([0-9.]+) \(floor ([0-9.]+)\)", capsys.readouterr().out).groups()
    row = next(r for r in rows if (r["objective"], r["sampling_steps"]) == ("ddpm", "5"))
    assert float(row["distance"]) == pytest.approx(float(away), abs=0.06)
    assert float(row["floor"]) == pytest.approx(float(floor), abs=0.06)

    # Killed before the third run: the other two are used as they are.
    shutil.rmtree(folder / "ddpm-v")
    seen.clear()
    code, _, again = compare(*words)
    assert code == 0 and again == rows and len(seen) == 24
    # Runs can be named.
    code, _, named = compare("--runs", folder / "ddpm-v", folder / "flow", out="named")
    assert code == 0 and [r["objective"] for r in named] == ["ddpm-v", "flow"] * 2
    assert named[1::2] == rows[::3]


def test_compare_shows_how_finetuning_adapts(train, compare, tagged, networks):
    train("base/flow", steps=1, stage="exclude", exclude_tags=("rare",))
    train("base/ddpm", steps=1, stage="exclude", exclude_tags=("rare",), objective="ddpm")
    for name in ("flow", "ddpm"):
        train(f"fine/{name}", steps=3, stage="finetune", start=f"base/{name}")
    words = ["--runs", "base/flow", "base/ddpm", "--finetuned", "fine/flow", "fine/ddpm"]
    code, errors, rows = compare(*words, "--inception", networks[0]["inception"])
    assert code == 0, errors
    page = Path("runs/compare/index.html").read_text()
    assert re.search(r"by fine-tuning steps</h2><table><tr><td>flow</td><td>0: [0-9.]+</td><td>3: ", page)
    assert all(float(row["frechet_inception"]) > 0 and "frechet_alexnet" not in row for row in rows)
    train("all", steps=1, objective="ddpm")
    code, errors, _ = compare("--runs", "base/flow", "all")
    assert code == 2 and "were trained on different pictures" in errors


# ---- shipped weights ----


def painted_faces(num):
    faces = np.stack([np.asarray(common.paint_face(seed, 40)[0]) for seed in range(num)])
    return common.Pictures(torch.from_numpy(faces).permute(0, 3, 1, 2), list(range(num)), [""] * num, [[]] * num)


@torch.no_grad()
def test_shipped_ddpm_weights_predict_the_means_of_the_noise():
    """Slope of the predicted noise's channel means against the true ones at t = 999, over all pictures and channels: 1
    for a perfect network, 0 for one that does not see the means and whose samples have far too strong colours."""
    model, config = unet_ddpm.load_model(ROOT / "weights" / "unet_ddpm_ddpm.safetensors")
    x = unet_ddpm.Data(config, painted_faces(32)).read(range(32))
    noise = torch.randn(x.shape, generator=common.generator(123))
    x_t, target, timestep, _ = unet_ddpm.ddpm_pair(config, x, noise, torch.full((32,), 0.9999))
    true, predicted = (part.mean(dim=(2, 3)).flatten() for part in (target, model(x_t, timestep)))
    covariance = torch.stack((true, predicted)).cov()
    assert timestep[0] == 999 and config.predict == "eps" and covariance[0, 1] / covariance[0, 0] > 0.9


@pytest.mark.parametrize("name, objective, bar", [("unet_ddpm", "flow", 1.5), ("unet_ddpm_ddpm", "ddpm", 2.5)])
def test_shipped_weights_sample_faces_and_the_bar_would_show_if_they_did_not(name, objective, bar):
    paths = [ROOT / "weights" / f"{file}.safetensors" for file in ("unet_ddpm", "unet_ddpm_ddpm")]
    assert sum(path.stat().st_size for path in paths) < 20e6
    model, config = unet_ddpm.load_model(ROOT / "weights" / f"{name}.safetensors")
    data = unet_ddpm.Data(config, painted_faces(64))
    distances = unet_ddpm.Distances(unet_ddpm.EvaluateConfig(num=32), data, None, torch.device("cpu"))

    def ratio(model, steps):
        return distances(unet_ddpm.sample(model, config, 32, steps))["distance"] / distances.floor["distance"]

    assert config.objective == objective
    assert ratio(model, 10) < bar
    with torch.no_grad():
        model.out[2].weight.neg_()
    assert ratio(model, 2) > bar
