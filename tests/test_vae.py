"""common.py's autoencoders against diffusers, naive forwards and the published layouts."""

import sys
import types

import common
from common import TAEF2, AutoencoderKL, UserError, load_vae

import diffusers
import pytest
import torch
import torch.nn.functional as F
from conftest import read_fixture, shapes
from safetensors.torch import save_file

SMALL = (32, 32, 64, 64)


@torch.no_grad()
def randomize(module):
    """Norms of their own for every channel and statistics that are not trivial, so that no mix-up can hide."""
    for name, p in module.named_parameters():
        if "norm" in name or "pool.1" in name:
            p.add_(torch.randn_like(p) * 0.2)
    if getattr(module, "bn", None) is not None:
        module.bn.running_mean.normal_()
        module.bn.running_var.uniform_(0.5, 4)
    return module.eval().requires_grad_(False)


def small(**options):
    return randomize(AutoencoderKL(widths=SMALL, **options))


# ---- every published layout, against diffusers ----


def rename(weights, table):
    for old, new in table.items():
        weights = {k.replace(old, new): v for k, v in weights.items()}
    return weights


def old_attention(weights):
    return rename(weights, {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"})


def ldm(weights):
    table = {f".up_blocks.{i}.": f".up.{3 - i}." for i in range(4)} | {
        ".down_blocks.": ".down.", ".resnets.": ".block.", ".downsamplers.0.": ".downsample.",
        ".upsamplers.0.": ".upsample.", "conv_shortcut": "nin_shortcut", "conv_norm_out": "norm_out",
        "mid_block.block.0.": "mid.block_1.", "mid_block.block.1.": "mid.block_2.",
        "mid_block.attentions.0.": "mid.attn_1.", "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v",
        "to_out.0": "proj_out",
    }  # fmt: skip
    weights = rename(weights, table)
    return {k: v[..., None, None] if ".attn_1." in k and v.dim() == 2 else v for k, v in weights.items()}


def bfl(weights):
    where = {"quant_conv": "encoder.", "post_quant_conv": "decoder."}
    return {where.get(k.split(".")[0], "") + k: v for k, v in ldm(weights).items()}


def reference(batch_norm, decoder=None):
    blocks = dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    if batch_norm:
        narrow = {"decoder_block_out_channels": decoder} if decoder else {}
        return randomize(diffusers.AutoencoderKLFlux2(block_out_channels=SMALL, **narrow))
    return randomize(diffusers.AutoencoderKL(block_out_channels=SMALL, layers_per_block=2, **blocks))


@pytest.mark.parametrize(
    "name, layout, batch_norm, decoder",
    [
        ("sd_vae", dict, False, None),
        ("sd_vae_old_attention", old_attention, False, None),
        ("sd_vae_ldm", ldm, False, None),
        ("flux2_vae_diffusers", dict, True, None),
        ("flux2_vae_bfl", bfl, True, None),
        (None, dict, True, (32, 64, 64, 96)),  # FLUX.2's small decoder
    ],
)
def test_every_published_layout_loads_and_equals_diffusers(name, layout, batch_norm, decoder, tmp_path):
    if name:  # at full size: the names and shapes of the published file
        with torch.device("meta"):
            full = AutoencoderKL(32 if batch_norm else 4, batch_norm=batch_norm)
        assert shapes(layout(full.state_dict())) == read_fixture(name)

    theirs = reference(batch_norm, decoder)
    save_file({k: v.contiguous() for k, v in layout(theirs.state_dict()).items()}, tmp_path / "vae.safetensors")
    ours = load_vae(tmp_path / "vae.safetensors")
    assert not ours.training and not any(p.requires_grad for p in ours.parameters())
    assert (ours.latent_channels, ours.stride) == (32 if batch_norm else 4, 8)
    ours.train()  # a training loop around it must not shift the statistics

    x = torch.rand(2, 3, 32, 48) * 2 - 1
    want = theirs.encode(x).latent_dist
    mean, logvar = ours.posterior(x)
    assert mean.std() > 0.1  # the comparison is of numbers of order one
    torch.testing.assert_close(mean, want.mode(), atol=1e-4, rtol=0)
    torch.testing.assert_close(logvar, want.logvar, atol=1e-4, rtol=0)
    latent = want.mode() * 0.18215
    if batch_norm:  # as in FLUX.2's pipeline, by the batch norm itself
        latent = F.pixel_shuffle(theirs.bn(F.pixel_unshuffle(want.mode(), 2)), 2)
    torch.testing.assert_close(ours.encode(x), latent, atol=1e-4, rtol=0)

    z = torch.randn_like(mean)
    picture = theirs.decode(z).sample
    assert picture.std() > 0.1
    torch.testing.assert_close(ours.decode(ours.normalise(z)), picture, atol=1e-4, rtol=0)
    with torch.autocast("cpu", torch.bfloat16):
        rough = ours.decode(ours.normalise(z))
    assert rough.dtype == torch.float32
    assert (rough - picture).square().mean().sqrt() < 0.05 * picture.std()


def test_whole_sd_checkpoint_is_searched_for_its_autoencoder(tmp_path, monkeypatch):
    vae = small()
    weights = {f"first_stage_model.{k}": v.half() for k, v in ldm(vae.state_dict()).items()}
    weights |= {"model.diffusion_model.out.2.bias": torch.zeros(4), "first_stage_model.loss.logvar": torch.zeros(())}
    trainer = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")  # published files name its class
    trainer.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": trainer.__name__})
    with monkeypatch.context() as patch:
        for name in ("pytorch_lightning", "pytorch_lightning.callbacks", trainer.__name__):
            patch.setitem(sys.modules, name, trainer)
        callbacks = {trainer.ModelCheckpoint: {"best_model_path": "nowhere"}}
        torch.save({"state_dict": weights, "global_step": 7, "callbacks": callbacks}, tmp_path / "sd.ckpt")
    loaded = load_vae(tmp_path / "sd.ckpt").state_dict()
    assert loaded.keys() == vae.state_dict().keys()
    assert all(v.dtype == torch.float32 and torch.equal(loaded[k], v.half()) for k, v in vae.state_dict().items())


# ---- TAEF2 ----


def naive_taef2(weights, x, half):
    """The encoder or the decoder, written down layer by layer from the published description."""

    def conv(x, i, stride=1):
        return F.conv2d(x, weights[f"{half}.{i}.weight"], weights.get(f"{half}.{i}.bias"), stride, padding=1)

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


@pytest.mark.parametrize("save, suffix", [(save_file, "safetensors"), (torch.save, "pth")])
def test_taef2_loads_from_its_files_and_equals_the_naive_forward(save, suffix, tmp_path):
    weights = {k: v.half().contiguous() for k, v in randomize(TAEF2()).state_dict().items()}
    assert shapes(weights) == read_fixture("taef2")
    save(weights, tmp_path / f"merged.{suffix}")
    for half in ("encoder", "decoder"):
        part = {k.partition(".")[2]: v for k, v in weights.items() if k.startswith(half)}
        save(part, tmp_path / f"taef2_{half}.{suffix}")

    weights = {k: v.float() for k, v in weights.items()}
    x, latent = torch.rand(2, 3, 16, 32), torch.randn(2, 32, 2, 4) * 2
    z, picture = naive_taef2(weights, x, "encoder"), naive_taef2(weights, latent, "decoder") * 2 - 1
    for path in (tmp_path, tmp_path / f"merged.{suffix}"):
        vae = load_vae(path)
        assert (vae.latent_channels, vae.stride) == (32, 8) and not hasattr(vae, "posterior")
        torch.testing.assert_close(vae.encode(x * 2 - 1), z, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(vae.decode(latent), picture, atol=1e-5, rtol=1e-4)


# ---- mistakes ----


def test_sizes_that_do_not_fit_are_refused():
    sd, flux2, tae = small(), small(latent_channels=8, batch_norm=True), TAEF2()
    for function, shape, message in [
        (sd.encode, (1, 3, 32, 36), r"multiples of 8, not \(1, 3, 32, 36\)"),
        (sd.encode, (3, 32, 32), r"\(B, 3, H, W\)"),
        (flux2.encode, (1, 3, 32, 40), "multiples of 16"),
        (flux2.decode, (1, 8, 4, 5), "multiples of 2"),
        (tae.encode, (1, 3, 12, 16), "multiples of 8"),
    ]:
        with pytest.raises(UserError, match=message):
            function(torch.zeros(shape))


def test_files_that_are_no_autoencoder_are_refused(tmp_path):
    good, path = {k: v.contiguous() for k, v in small().state_dict().items()}, tmp_path / "vae.safetensors"
    half = {k.removeprefix("encoder."): v for k, v in TAEF2().state_dict().items() if k.startswith("encoder.")}
    for weights, message in [
        ({"blocks.0.attn.qkv.weight": torch.zeros(3)}, "no autoencoder .* blocks.0.attn.qkv.weight"),
        ({k: v for k, v in good.items() if k != "quant_conv.bias"}, "quant_conv.bias is missing"),
        (good | {"post_quant_conv.bias": torch.zeros(16)}, "no autoencoder"),  # its scale is not known
        (half, "no autoencoder"),
    ]:
        save_file(weights, path)
        with pytest.raises(UserError, match=message):
            load_vae(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=r"vae.safetensors is not a readable weight file"):
        load_vae(path)
    with pytest.raises(UserError, match=r"no autoencoder in .* diffusion_pytorch_model.safetensors"):
        load_vae(tmp_path)
    with pytest.raises(UserError, match="no weights at"):
        load_vae(tmp_path / "none.safetensors")


def test_checkpoint_asks_for_the_vae_it_was_trained_with(tmp_path, capsys):
    paths = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    for path in paths:
        save_file({k: v.contiguous() for k, v in small().state_dict().items()}, path)
    header = {"latent": [4, 8], "vae": load_vae(paths[0]).hash}
    common.load_matching_vae(paths[0], header)
    assert not capsys.readouterr().err
    common.load_matching_vae(paths[1], header)
    assert "warning: --vae is not the file" in capsys.readouterr().err
    with pytest.raises(UserError, match="--vae has 4 channels, these weights have 32"):
        common.load_matching_vae(paths[0], header | {"latent": [32, 8]})
