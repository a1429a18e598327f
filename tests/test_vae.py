"""common.py's autoencoders against diffusers at full size, naive forwards and the published layouts."""

import json
import sys
import tempfile
import types

import pytest
import torch
import torch.nn.functional as F
from conftest import FIXTURES
from safetensors.torch import load_file, save_file

from common import TAEF2, VAE_NAMES, AutoencoderKL, UserError, decode_tiled, load_vae

SMALL = (32, 32, 64, 64)
UP = {f".up_blocks.{i}.": f".up.{3 - i}." for i in range(4)}


def layout(name):
    return {k: tuple(v) for k, v in json.loads((FIXTURES / f"{name}.json").read_text()).items()}


def shapes(module):
    return {k: tuple(v.shape) for k, v in module.state_dict().items()}


@torch.no_grad()
def awaken(module):
    """Norms of their own for every channel and statistics that are not trivial, so that no mix-up can hide."""
    for name, p in module.named_parameters():
        if "norm" in name or "pool.1" in name:
            p.add_(torch.randn_like(p) * 0.2)
    if getattr(module, "bn", None) is not None:
        module.bn.running_mean.normal_()
        module.bn.running_var.uniform_(0.5, 4)
    return module.eval().requires_grad_(False)


def small(**options):
    return awaken(AutoencoderKL(widths=SMALL, **options))


# ---- the layouts, written by tables of their own ----


def old_attention(weights):
    new_to_old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    table = {f"attentions.0.{new}.": f"attentions.0.{old}." for new, old in new_to_old.items()}
    return {rename(k, table): v for k, v in weights.items()}


def ldm(weights, prefix=""):
    table = {
        **UP, ".down_blocks.": ".down.", ".resnets.": ".block.", ".downsamplers.0.": ".downsample.",
        ".upsamplers.0.": ".upsample.", "conv_shortcut": "nin_shortcut", "conv_norm_out": "norm_out",
        "mid_block.block.0.": "mid.block_1.", "mid_block.block.1.": "mid.block_2.",
        "mid_block.attentions.0.": "mid.attn_1.", "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v",
        "to_out.0": "proj_out",
    }  # fmt: skip
    renamed = {prefix + rename(k, table): v for k, v in weights.items()}
    return {k: v[..., None, None] if ".attn_1." in k and v.dim() == 2 else v for k, v in renamed.items()}


def bfl(weights):
    where = {"quant_conv": "encoder.", "post_quant_conv": "decoder."}
    return {where.get(k.split(".")[0], "") + k: v for k, v in ldm(weights).items()}


def rename(name, table):
    for old, new in table.items():
        name = name.replace(old, new)
    return name


def plain(weights):
    return {k: v.contiguous() for k, v in weights.items()}


@pytest.mark.parametrize(
    "name, write, batch_norm",
    [
        ("sd_vae", plain, False),
        ("sd_vae_old_attention", old_attention, False),
        ("sd_vae_ldm", ldm, False),
        ("flux2_vae_diffusers", plain, True),
        ("flux2_vae_bfl", bfl, True),
    ],
)
def test_every_published_layout_loads_and_gives_bit_identical_weights(name, write, batch_norm, tmp_path):
    channels = 32 if batch_norm else 4
    with torch.device("meta"):
        full = AutoencoderKL(latent_channels=channels, batch_norm=batch_norm)
        assert shapes_of(write(full.state_dict())) == layout(name)  # names and shapes of the published file

    vae = small(latent_channels=channels, batch_norm=batch_norm)
    save_file(plain(write(vae.state_dict())), tmp_path / "vae.safetensors")
    loaded = load_vae(tmp_path / "vae.safetensors")
    own = loaded.state_dict()
    assert own.keys() == vae.state_dict().keys() and all(torch.equal(own[k], v) for k, v in vae.state_dict().items())
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert (loaded.latent_channels, loaded.stride) == (channels, 8)


def shapes_of(weights):
    return {k: tuple(v.shape) for k, v in weights.items()}


def test_our_own_names_are_untouched_by_the_rename_table():
    for name in ("sd_vae", "flux2_vae_diffusers", "taef2"):
        for key in layout(name):
            assert rename(key, dict(VAE_NAMES)) == key


def test_a_whole_sd_checkpoint_is_searched_for_its_autoencoder(tmp_path, monkeypatch):
    vae = small()
    content = ldm(vae.state_dict(), "first_stage_model.") | {"model.diffusion_model.out.2.bias": torch.zeros(4)}
    trainer = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")  # published ones name its class
    trainer.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": trainer.__name__})
    with monkeypatch.context() as patch:
        for name in ("pytorch_lightning", "pytorch_lightning.callbacks", trainer.__name__):
            patch.setitem(sys.modules, name, trainer)
        callbacks = {trainer.ModelCheckpoint: {"best_model_path": "nowhere"}}
        torch.save({"state_dict": content, "global_step": 7, "callbacks": callbacks}, tmp_path / "sd.ckpt")
    z = torch.randn(1, 4, 4, 4)
    vae.to(memory_format=torch.channels_last)
    assert torch.equal(load_vae(tmp_path / "sd.ckpt").decode(z), vae.decode(z))


def test_losses_beside_the_weights_are_ignored_and_16_bit_weights_widened(tmp_path):
    weights = {k: v.bfloat16() for k, v in plain(small().state_dict()).items()}
    torch.save({"state_dict": ldm(weights) | {"loss.logvar": torch.zeros(())}}, tmp_path / "vae.pt")
    loaded = load_vae(tmp_path / "vae.pt").state_dict()
    assert all(v.dtype == torch.float32 and torch.equal(v, weights[k].float()) for k, v in loaded.items())


# ---- against diffusers, at full size ----


def reference(kind):
    diffusers = pytest.importorskip("diffusers")
    blocks = dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    if kind == "sd":
        widths = dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4)
        return awaken(diffusers.AutoencoderKL(**blocks, **widths))
    narrow = {"decoder_block_out_channels": (96, 192, 384, 384)} if kind == "flux2-small" else {}
    return awaken(diffusers.AutoencoderKLFlux2(**narrow))


SIZES = {"sd": 83_653_863, "flux2": 84_046_115, "flux2-small": 62_373_091}


@pytest.mark.parametrize("kind, parameters", SIZES.items())
def test_encode_posterior_and_decode_equal_diffusers(kind, parameters):
    theirs = reference(kind)
    with tempfile.TemporaryDirectory() as folder:  # pytest would keep its 335 MB for three runs
        theirs.save_pretrained(folder)
        ours = load_vae(folder)
    assert sum(p.numel() for p in ours.parameters()) == parameters
    if kind != "flux2-small":
        assert shapes(ours) == layout("sd_vae" if kind == "sd" else "flux2_vae_diffusers")

    x = torch.rand(2, 3, 64, 48) * 2 - 1
    want = theirs.encode(x).latent_dist
    mean, logvar = ours.posterior(x)
    assert mean.std() > 0.1  # the comparison is of numbers of order one
    torch.testing.assert_close(mean, want.mode(), atol=1e-4, rtol=0)
    torch.testing.assert_close(logvar, want.logvar, atol=1e-4, rtol=0)
    latent = want.mode() * 0.18215
    if kind != "sd":  # as FLUX.2's pipeline has it, by the batch norm itself
        latent = F.pixel_shuffle(theirs.bn(F.pixel_unshuffle(want.mode(), 2)), 2)
    torch.testing.assert_close(ours.encode(x), latent, atol=1e-4, rtol=0)

    z = torch.randn_like(mean)  # not the posterior's mean: random weights give one that says little
    picture = theirs.decode(z).sample
    assert picture.std() > 0.1 and picture.shape == x.shape
    torch.testing.assert_close(ours.decode(ours.normalise(z)), picture, atol=1e-4, rtol=0)
    with torch.autocast("cpu", torch.bfloat16):
        rough = ours.decode(ours.normalise(z))
    assert rough.dtype == torch.float32
    assert (rough - picture).square().mean().sqrt() < 0.05 * picture.std()


# ---- the latents ----


def test_sd_latents_are_scaled_and_flux2_latents_normalised_by_patch():
    z = torch.randn(2, 4, 6, 8)
    assert torch.equal(small().normalise(z), z * 0.18215)

    vae = small(latent_channels=8, batch_norm=True)
    z = torch.randn(2, 8, 6, 4)
    want = torch.empty_like(z)
    for c in range(8):
        for i in range(2):
            for j in range(2):  # one mean and variance for each channel and each place in a 2x2 patch
                k = c * 4 + i * 2 + j
                std = (vae.bn.running_var[k] + 1e-4).sqrt()
                want[:, c, i::2, j::2] = (z[:, c, i::2, j::2] - vae.bn.running_mean[k]) / std
    torch.testing.assert_close(vae.normalise(z), want)


@pytest.mark.parametrize("options", [{}, dict(latent_channels=8, batch_norm=True)], ids=["sd", "flux2"])
def test_normalising_back_and_forth_is_the_identity(options):
    vae = small(**options).train()  # a training loop around it must not shift the statistics
    z = torch.randn(2, vae.latent_channels, 4, 4)
    torch.testing.assert_close(vae.normalise(vae.normalise(z), inverse=True), z)
    torch.testing.assert_close(vae.normalise(vae.normalise(z, inverse=True)), z)


def test_encode_takes_the_mean_or_with_a_generator_a_sample():
    vae, x = small(), torch.rand(1, 3, 32, 32) * 2 - 1
    mean, logvar = vae.posterior(x)
    assert torch.equal(vae.encode(x), mean * 0.18215)
    draws = [vae.encode(x, torch.Generator().manual_seed(seed)) / 0.18215 for seed in (0, 0, *range(1, 200))]
    assert torch.equal(draws[0], draws[1])
    standard = (torch.stack(draws[1:]) - mean) / (logvar / 2).exp()
    assert abs(standard.mean()) < 0.05 and abs(standard.std() - 1) < 0.05


def test_log_variance_is_clamped():
    vae = small()
    vae.quant_conv.bias[4:] = torch.tensor([-1e3, 1e3, -1e3, 1e3])
    logvar = vae.posterior(torch.zeros(1, 3, 16, 16))[1]
    assert logvar[0, 0].unique() == -30 and logvar[0, 1].unique() == 20


def test_a_picture_is_the_same_in_every_batch_and_gradients_flow():
    vae, z = small(), torch.randn(3, 4, 4, 4)
    assert torch.equal(vae.decode(z)[1:2], vae.decode(z[1:2]))
    z = z[:1].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: vae.double().decoder(z).mean(), z[..., :2, :2].detach().requires_grad_())


# ---- tiles ----


def test_one_tile_is_the_whole_decode_and_many_join_seamlessly():
    vae, z = small(), torch.randn(1, 4, 24, 20)
    assert torch.equal(decode_tiled(vae, z, tile=24), vae.decode(z))

    class Local(torch.nn.Module):  # a decoder that looks at one cell at a time must not notice the tiles
        latent_channels, stride = 4, 8

        def decode(self, latent):
            return F.interpolate(latent[:, :3], scale_factor=8.0)

    for size in ((24, 20), (8, 50), (17, 9)):
        z = torch.randn(2, 4, *size)
        torch.testing.assert_close(decode_tiled(Local(), z, tile=8, overlap=4), Local().decode(z))


def test_tiles_are_full_and_fade_linearly_into_each_other():
    class Counting(torch.nn.Module):  # the first tile is black, the second white
        latent_channels, stride, calls = 4, 8, 0

        def decode(self, latent):
            assert latent.shape[2:] == (16, 16)
            self.calls += 1
            return torch.full((1, 3, 128, 128), self.calls - 1.0)

    row = decode_tiled(Counting(), torch.zeros(1, 4, 16, 28), tile=16, overlap=4)[0, 0, 0]
    ramp = (torch.arange(32) + 0.5) / 32
    torch.testing.assert_close(row, torch.cat([torch.zeros(96), ramp, torch.ones(96)]))
    # The last tile moves back to be full, and the fade takes all of the wider overlap.
    row = decode_tiled(Counting(), torch.zeros(1, 4, 16, 26), tile=16, overlap=4)[0, 0, 0]
    torch.testing.assert_close(row, torch.cat([torch.zeros(80), (torch.arange(48) + 0.5) / 48, torch.ones(80)]))


def test_seams_of_a_real_decoder_are_no_steeper_than_its_picture():
    vae = awaken(AutoencoderKL(2 * 2, SMALL))
    z = F.interpolate(torch.randn(1, 4, 4, 4), size=(24, 24), mode="bilinear")
    step = (decode_tiled(vae, z, tile=16, overlap=8) - vae.decode(z)).diff(dim=-1).abs().mean(dim=(0, 1, 2))
    assert step[56:136].max() < 3 * step.mean()  # the difference has no jump where tiles begin and end


# ---- TAEF2 ----


def naive_taef2(weights, x, half):
    """The encoder or the decoder, written down layer by layer from the published description."""

    def conv(x, i, stride=1):
        bias = weights.get(f"{half}.{i}.bias")
        return F.conv2d(x, weights[f"{half}.{i}.weight"], bias, stride, padding=1)

    def block(x, i):
        name = f"{half}.{i}."
        if name + "pool.0.weight" in weights:
            h = F.conv2d(x, weights[name + "pool.0.weight"]).unflatten(1, (4, 64))
            mean, var = h.mean((2, 3, 4), keepdim=True), h.var((2, 3, 4), keepdim=True, correction=0)
            h = ((h - mean) / (var + 1e-5).sqrt()).flatten(1, 2)
            h = h * weights[name + "pool.1.weight"][:, None, None] + weights[name + "pool.1.bias"][:, None, None]
            x = x + F.conv2d(h.relu(), weights[name + "pool.3.weight"])
        h = conv(x, f"{i}.conv.0").relu()
        return (x + conv(conv(h, f"{i}.conv.2").relu(), f"{i}.conv.4")).relu()

    if half == "encoder":
        x = block(conv(x, 0), 1)
        for first in (2, 6, 10):
            x = conv(x, first, stride=2)
            for i in range(first + 1, first + 4):
                x = block(x, i)
        return conv(x, 14)
    x = conv(3 * torch.tanh(x / 3), 1).relu()
    for i in (3, 4, 5):
        x = block(x, i)
    for first, count in ((7, 3), (12, 3), (17, 1)):
        x = conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3), first)
        for i in range(first + 1, first + 1 + count):
            x = block(x, i)
    return conv(x, 19)


@pytest.mark.parametrize("kind", ["merged.safetensors", "folder of safetensors", "folder of pth"])
def test_taef2_loads_from_its_files_and_equals_the_naive_forward(kind, tmp_path):
    weights = {k: v.half() for k, v in awaken(TAEF2()).state_dict().items()}
    assert shapes_of(weights) == layout("taef2")
    halves = {"encoder": {}, "decoder": {}}
    for k, v in weights.items():
        half, key = k.split(".", 1)
        halves[half][key] = v
    path = tmp_path
    if kind.startswith("merged"):
        path = tmp_path / kind
        save_file(plain(weights), path)
    for half, content in halves.items():
        if kind.endswith("of safetensors"):
            save_file(plain(content), path / f"taef2_{half}.safetensors")
        elif kind.endswith("pth"):
            torch.save(content, path / f"taef2_{half}.pth")
    vae = load_vae(path)
    assert (vae.latent_channels, vae.stride) == (32, 8) and not hasattr(vae, "posterior")

    weights = {k: v.float() for k, v in weights.items()}
    x = torch.rand(2, 3, 32, 48)
    z = naive_taef2(weights, x, "encoder")
    torch.testing.assert_close(vae.encode(x * 2 - 1), z, atol=1e-5, rtol=1e-4)
    z = torch.randn_like(z) * 2
    want = naive_taef2(weights, z, "decoder") * 2 - 1
    torch.testing.assert_close(vae.decode(z), want, atol=1e-5, rtol=1e-4)


# ---- mistakes ----


def one_line(call, *words):
    with pytest.raises(UserError) as problem:
        call()
    message = str(problem.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_sizes_that_do_not_fit_are_refused_in_one_line():
    sd, flux2, tae = small(), small(latent_channels=8, batch_norm=True), TAEF2()
    one_line(lambda: sd.encode(torch.zeros(1, 3, 32, 36)), "multiples of 8", "(1, 3, 32, 36)")
    one_line(lambda: flux2.encode(torch.zeros(1, 3, 32, 40)), "multiples of 16", "(1, 3, 32, 40)")
    one_line(lambda: flux2.decode(torch.zeros(1, 8, 4, 5)), "multiples of 2", "(1, 8, 4, 5)")
    one_line(lambda: sd.decode(torch.zeros(1, 8, 4, 4)), "(B, 4, H, W)", "(1, 8, 4, 4)")
    one_line(lambda: sd.encode(torch.zeros(3, 32, 32)), "(B, 3, H, W)", "(3, 32, 32)")
    one_line(lambda: tae.encode(torch.zeros(1, 3, 12, 16)), "multiples of 8")
    one_line(lambda: decode_tiled(sd, torch.zeros(1, 4, 9, 9), tile=8, overlap=8), "overlap 8")


def test_files_that_are_no_autoencoder_are_refused_in_one_line(tmp_path):
    good = plain(small().state_dict())
    path = tmp_path / "vae.safetensors"

    def refuse(weights, *words):
        save_file(weights, path)
        one_line(lambda: load_vae(path), str(path), *words)

    refuse({"blocks.0.attn.qkv.weight": torch.zeros(3)}, "no autoencoder", "blocks.0.attn.qkv.weight")
    refuse({}, "no autoencoder", "0 tensors")
    refuse({k: v for k, v in good.items() if k != "quant_conv.bias"}, "quant_conv.bias is missing")
    refuse(good | {"encoder.extra.weight": torch.zeros(3)}, "encoder.extra.weight is unknown")
    refuse(good | {"decoder.conv_out.weight": torch.zeros(3, 32, 1, 1)}, "decoder.conv_out.weight is (3, 32, 1, 1)")
    first = "encoder.down_blocks.0.resnets.0.conv1.weight"
    refuse(good | {first: torch.zeros(100, 32, 3, 3)}, "no autoencoder")
    refuse(good | {first: torch.zeros(())}, "no autoencoder")
    refuse(good | {"post_quant_conv.bias": torch.zeros(16)}, "no autoencoder")  # whose scale nobody knows
    half = {k.removeprefix("encoder."): v for k, v in TAEF2().state_dict().items() if k.startswith("encoder.")}
    refuse(plain(half), "no autoencoder")

    save_file(good, path)
    assert load_file(path).keys() == good.keys()
    path.write_bytes(path.read_bytes()[:100_000])
    one_line(lambda: load_vae(path), "not a readable weight file")
    torch.save({"state_dict": good}, tmp_path / "vae.ckpt")
    (tmp_path / "vae.ckpt").write_bytes((tmp_path / "vae.ckpt").read_bytes()[:100_000])
    one_line(lambda: load_vae(tmp_path / "vae.ckpt"), "not a readable weight file")
    one_line(lambda: load_vae(tmp_path / "none.safetensors"), "no weights at")
    one_line(lambda: load_vae(tmp_path), "no autoencoder in", "diffusion_pytorch_model.safetensors")
