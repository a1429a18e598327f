"""dit_t2i.py against closed forms, naive versions and published layouts."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import FIXTURES
from PIL import Image
from safetensors.torch import load_file, save_file

import common
import dit_t2i
from common import BatchRng, UserError
from dit_t2i import Config, DiT, TrainingData, Words

SIZES = dict(patch_size=2, in_channels=3, depth=2, num_heads=2, head_dim=8, text_dim=12, latent_size=8)
CPU = torch.device("cpu")


def awake(seed=0, **changes):
    """A small DiT whose weights are all random: no gate is zero and hides what lies behind it."""
    torch.manual_seed(seed)
    model = DiT(**(SIZES | changes))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.5)
    return model.eval()


@torch.no_grad()
def without_attention(**changes):
    """awake() with a table of five words, in which nothing passes through attention."""
    model = awake(vocabulary=5, **changes)
    for layer in model.layers:
        layer.attn.vis_o_proj.weight.zero_()
        layer.attn.vis_o_proj.bias.zero_()
    return model


def inputs(batch=2, size=8, words=5):
    return torch.randn(batch, 3, size, size), torch.rand(batch), torch.randn(batch, words, 12)


# ---- model ----


def test_paper_preset_has_the_published_names_and_shapes():
    layout = json.loads((FIXTURES / "dfs_258m.json").read_text())
    with torch.device("meta"):
        model = dit_t2i.build_model(Config(**dit_t2i.PRESETS["paper"]), (4, 32))
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == layout
    assert sum(p.numel() for p in model.parameters()) == 257_669_392
    assert sum(p.numel() for p in model.parameters() if not p.requires_grad) == 5_903_680


@pytest.mark.parametrize("arch", ["dual", "joint"])
def test_fresh_layer_is_the_identity_and_a_fresh_model_returns_zero(arch):
    torch.manual_seed(0)
    model = DiT(**SIZES, arch=arch)
    txt, vis, condition = torch.randn(2, 5, 16), torch.randn(2, 16, 16), torch.randn(2, 16)
    after = model.layers[0](txt, vis, condition, dit_t2i.msrope(4, 4, 5, 8, CPU) if arch == "dual" else None)
    assert torch.equal(after[0], txt) and torch.equal(after[1], vis)
    assert (model(*inputs()) == 0).all()


@pytest.mark.parametrize("arch", ["dual", "joint"])
def test_only_the_text_of_the_last_layer_is_never_trained(arch):
    model = awake(arch=arch).train()
    model(*inputs()).square().sum().backward()
    for name, p in model.named_parameters():
        dead = name.startswith(("layers.1.txt_ff", "layers.1.attn.txt_q", "layers.1.attn.txt_o"))
        assert (p.grad is None) == dead, name
        assert dead or p.grad.abs().max() > 0, name


def test_positions_are_a_centred_grid_and_its_diagonal():
    cos, sin = dit_t2i.msrope(16, 16, 3, 8, CPU)
    rows = torch.cat((torch.tensor([8, 9, 10]), torch.arange(-8, 8).repeat_interleave(16)))
    columns = torch.cat((torch.tensor([8, 9, 10]), torch.arange(-8, 8).repeat(16)))
    # The first two of four angles follow the row, at frequencies 1 and 1/100; the others the column.
    for k, (position, frequency) in enumerate([(rows, 1), (rows, 0.01), (columns, 1), (columns, 0.01)]):
        assert torch.allclose(cos[:, k], torch.cos(position * frequency), atol=1e-5)
        assert torch.allclose(sin[:, k], torch.sin(position * frequency), atol=1e-5)
    # In a picture that is no square, text begins where the longer side ends.
    for shape in ((16, 24), (24, 16)):
        assert dit_t2i.msrope(*shape, 1, 8, CPU)[1][0, 0] == pytest.approx(math.sin(12), abs=1e-5)


def test_larger_picture_has_the_trained_positions_in_its_middle():
    for small, large in zip(dit_t2i.msrope(16, 16, 3, 8, CPU), dit_t2i.msrope(24, 20, 3, 8, CPU)):
        assert torch.equal(small[3:].unflatten(0, (16, 16)), large[3:].unflatten(0, (24, 20))[4:20, 2:18])
    whole, part = (dit_t2i.grid_embedding(side, side, 32, CPU) for side in (16, 8))
    assert torch.equal(whole.view(16, 16, 32)[4:12, 4:12].flatten(0, 1), part)


@torch.no_grad()
def test_word_order_matters_to_a_joint_model_with_its_own_words():
    model, (z, t, _) = awake(arch="joint", vocabulary=5), inputs()
    one, other = (model(z, t, torch.tensor([order, order])) for order in ([1, 2, 3], [3, 2, 1]))
    assert (one - other).abs().max() > 1e-2


@pytest.mark.parametrize("arch", ["dual", "joint"])
@torch.no_grad()
def test_words_of_its_own_table_join_the_time(arch):
    """As their sum or, in a joint model, as their mean. Neither depends on order or on what fills up a caption."""
    model, (z, t, _) = without_attention(arch=arch), inputs()

    def out(*words):
        return model(z, t, torch.tensor([words, words]))

    assert (out(1, 0) - out(2, 0)).abs().max() > 1e-2 and (out(1, 2) - out(1)).abs().max() > 1e-2
    assert torch.allclose(out(1, 2), out(2, 1, 0), atol=1e-5)
    assert torch.allclose(out(3), out(3, 3), atol=1e-5) == (arch == "joint")
    if arch == "dual":  # with the null caption, the condition is the time alone
        null = out(0, 0)
        model.text_proj.weight.zero_()
        model.text_proj.bias.zero_()
        assert torch.allclose(out(1, 2), null, atol=1e-6)


@torch.no_grad()
def test_patches_of_a_model_with_its_own_words_know_their_position():
    model = without_attention()
    out = model(torch.ones(1, 3, 8, 8), torch.tensor([0.5]), torch.tensor([[1]]))
    patches = out.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).reshape(16, -1)
    assert torch.cdist(patches, patches)[~torch.eye(16, dtype=torch.bool)].min() > 1e-3


def naive_joint(model, z, t, text):
    """The joint architecture as its write-up has it, token by token and head by head, with plain softmax attention."""
    w = model.state_dict()

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def silu(x):
        return x / (1 + (-x).exp())

    def layer_norm(x):
        return (x - x.mean()) / (x.var(unbiased=False) + 1e-6).sqrt()

    def rms_norm(x, weight):
        return x / (x.square().mean() + 1e-6).sqrt() * weight

    out = torch.zeros_like(z)
    for b in range(len(z)):
        angles = (1000 * t[b]).float() * torch.tensor([10_000 ** (-i / 128) for i in range(128)])
        sinusoid = torch.cat((angles.cos(), angles.sin())).to(z)
        time = linear("step_embed.mlp.2", silu(linear("step_embed.mlp.0", sinusoid)))
        caption = torch.stack([rms_norm(c, w["text_norm.weight"]) for c in text[b]])
        condition = silu(time + linear("caption_embed", sum(caption) / len(caption)))
        streams = {"txt": [linear("text_proj", c) for c in caption], "vis": []}
        for i in range(4):
            for j in range(4):
                patch = z[b, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
                embedded = (w["patch_embed.weight"] * patch).sum(dim=(1, 2, 3)) + w["patch_embed.bias"]
                streams["vis"].append(embedded + w["positions"][0, :, i, j])
        for n, last in ((0, False), (1, True)):
            here, heads = f"layers.{n}.", {}
            parts = {name: linear(f"{here}{name}_mod.1", condition).chunk(6) for name in streams}
            for name, tokens in streams.items():
                shift, scale, *_ = parts[name]
                for token in tokens:
                    x = layer_norm(token) * (1 + scale) + shift
                    for letter in "qkv":
                        y = linear(f"{here}attn.{name}_{letter}_proj", x).view(2, 8)
                        if letter != "v":
                            y = torch.stack(
                                [rms_norm(head, w[f"{here}attn.{name}_{letter}_norm.weight"]) for head in y]
                            )
                        heads.setdefault(letter, []).append(y)
            q, k, v = (torch.stack(heads[letter]) for letter in "qkv")  # (T + N, h, 8), text first
            gathered = []
            for query in q:
                mixed = []
                for h in range(2):
                    attended = ((k[:, h] @ query[h]) / 8**0.5).softmax(dim=0)
                    mixed.append(attended @ v[:, h])
                gathered.append(torch.cat(mixed))
            gathered = {"txt": gathered[: len(caption)], "vis": gathered[len(caption) :]}
            for name in ["vis"] if last else ["txt", "vis"]:
                _, _, gate1, shift2, scale2, gate2 = parts[name]
                for i, token in enumerate(streams[name]):
                    token = token + gate1 * linear(f"{here}attn.{name}_o_proj", gathered[name][i])
                    x = layer_norm(token) * (1 + scale2) + shift2
                    value, gate = linear(f"{here}{name}_ff.enter", x).chunk(2)
                    streams[name][i] = token + gate2 * linear(f"{here}{name}_ff.leave", value * silu(gate))
        shift, scale = linear("output_norm.linear.1", condition).chunk(2)
        for n, token in enumerate(streams["vis"]):
            i, j = divmod(n, 4)
            patch = linear("output_proj", layer_norm(token) * (1 + scale) + shift).view(2, 2, 3)
            out[b, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2] = patch.permute(2, 0, 1)
    return out


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@torch.no_grad()
def test_joint_forward_equals_a_naive_one():
    model = awake(arch="joint").double()
    z, t, text = (x.double() for x in inputs())
    for p in model.parameters():
        p.mul_(0.5)
    expected = naive_joint(model, z, t, text)
    assert expected.std() > 0.01
    assert (model(z, t, text) - expected).abs().max() < 1e-4 * expected.abs().max()


@torch.no_grad()
def test_learned_positions_are_stretched_for_another_size():
    model, text = awake(arch="joint"), inputs()[2]
    stretched = torch.nn.functional.interpolate(model.positions, (8, 8), mode="bicubic")
    for positions, side in ((model.positions, 8), (stretched, 16)):
        _, _, vis = model.embed(torch.zeros(2, 3, side, side), torch.ones(2), text, (side // 2, side // 2))
        added = vis[0].T.view(positions[0].shape) - model.patch_embed.bias[:, None, None]
        assert torch.allclose(added, positions[0], atol=1e-5)


@pytest.mark.parametrize("arch", ["dual", "joint"])
def test_checkpointing_activations_keeps_less_and_changes_no_bit(arch):
    results = []
    for checkpointing in (False, True):
        kept = []
        model = awake(arch=arch, depth=8).train()
        model.checkpointing = checkpointing
        torch.manual_seed(1)
        z, t, text = inputs()
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x.numel()) or x, lambda x: x):
            loss = model(z, t, text).square().mean()
        loss.backward()
        results.append((sum(kept), loss, [p.grad for p in model.parameters() if p.grad is not None]))
    (all_kept, loss, gradients), (few_kept, loss_again, gradients_again) = results
    assert loss == loss_again and all(map(torch.equal, gradients, gradients_again)) and few_kept < 0.3 * all_kept


def test_time_is_not_rounded_before_its_sinusoid():
    """The published code's t is bfloat16 under autocast: 753.1 becomes 752."""
    model, seen = awake(), []
    model.step_embed.mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    z, _, text = inputs()
    t = torch.tensor([0.7531, 0.7519])
    with torch.autocast("cpu", torch.bfloat16):
        model(z, t, text)
    assert torch.equal(seen[0], common.timestep_embedding(1000 * t, 256))


def test_prediction_of_data_becomes_the_velocity_to_it():
    torch.manual_seed(0)
    model = DiT(**SIZES, predict="data")
    data = 0.3
    with torch.no_grad():
        model.output_proj.bias.fill_(data)
    noise, t = torch.randn(2, 3, 8, 8), torch.tensor([0.2, 0.9])
    z = common.flow_point(torch.full_like(noise, data), noise, t)
    assert torch.allclose(model(z, t, torch.randn(2, 5, 12)), noise - data, atol=1e-4)


def test_size_that_the_patch_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="no multiple of the patch size 2"):
        awake()(*inputs(size=7))


# ---- loss, guidance, sampler ----


def point(data):
    """The exact velocity if all data is one point: (z - data) / t."""
    return lambda z, t, text: (z - data) / t.view(-1, 1, 1, 1)


class Exact(torch.nn.Module):
    """A model that computes `answer`; it has a parameter only to have a device."""

    time_min = 0.0

    def __init__(self, answer):
        super().__init__()
        self.answer, self.calls, self.weight = answer, [], torch.nn.Parameter(torch.zeros(1))

    def forward(self, z, t, text):
        self.calls.append(len(z))
        return self.answer(z, t, text)


def sampled(model, text=None, null=None, shape=(3, 4, 4), **settings):
    text = torch.zeros(1, 2, 3) if text is None else text
    null = torch.zeros(1, 2, 3) if null is None else null
    return dit_t2i.sample_latents(model, text, null, shape, **(dict(num=2, cfg=1.0) | settings))


@pytest.mark.parametrize("solver", list(common.SOLVERS))
@pytest.mark.parametrize("steps", [1, 28])
def test_exact_velocity_of_a_point_leads_from_noise_to_the_point(solver, steps):
    data, seen = torch.rand(3, 4, 4), []
    z = sampled(Exact(point(data)), steps=steps, solver=solver, callback=lambda z, t: seen.append((t, z)))
    assert (z - data).abs().max() < 1e-4
    # t = 1 is noise and t = 0 is data.
    assert seen[0][0] == 1 and torch.equal(seen[0][1], common.noise_for([0, 1], (3, 4, 4), "cpu"))
    assert seen[-1][0] == 0 and torch.equal(seen[-1][1], z)


def test_euler_steps_of_a_gaussian_converge_to_its_exact_flow():
    """Data N(mean, std^2): v = E[noise - data | z], and the flow ends at z_0 = mean + std * noise."""
    mean, std = 0.3, 0.5

    def velocity(z, t, text):
        t = t.view(-1, 1, 1, 1)
        variance = (1 - t) ** 2 * std**2 + t**2
        return (t - (1 - t) * std**2) * (z - (1 - t) * mean) / variance - mean

    exact = mean + std * common.noise_for(range(8), (3, 4, 4), "cpu")
    errors = [(sampled(Exact(velocity), num=8, steps=n) - exact).abs().mean() for n in (28, 56)]
    assert errors[1] < 0.02 and 1.7 < errors[0] / errors[1] < 2.3


@pytest.mark.parametrize("solver", list(common.SOLVERS))
def test_no_time_below_the_smallest_of_training_is_used(solver):
    """From there, one step leads to the data that the network predicts there, whatever it predicted before."""
    seen = []

    def velocity(z, t, text):
        seen.append(t[0].item())
        return (z - torch.full_like(z, 3 * t[0].item())) / t.view(-1, 1, 1, 1)  # the predicted data is 3 t

    model = Exact(velocity)
    model.time_min = 0.05
    z = sampled(model, steps=4, solver=solver)
    assert (
        min(seen) == pytest.approx(0.05) and max(seen) == 1 and torch.allclose(z, torch.full_like(z, 0.15), atol=1e-5)
    )
    if solver == "euler":
        assert seen == pytest.approx([1, 0.05 + 0.95 * 2 / 3, 0.05 + 0.95 / 3, 0.05])


def test_loss_is_zero_for_the_right_velocity_and_only_for_it():
    x, noise, t = torch.rand(6, 3, 8, 8), torch.randn(6, 3, 8, 8), torch.rand(6) * 0.9 + 0.1
    z_t = common.flow_point(x, noise, t)
    v = (z_t - x) / t.view(-1, 1, 1, 1)
    assert dit_t2i.flow_loss(v, x, noise).max() < 1e-6 and dit_t2i.flow_loss(v, x, noise).shape == (6,)
    for wrong in (-v, x, noise, z_t - x):
        assert dit_t2i.flow_loss(wrong, x, noise).min() > 1e-3
    assert torch.allclose(dit_t2i.flow_loss(v + 2, x, noise), torch.full((6,), 4.0))


def test_training_times_follow_their_law():
    def times(progress=0.0, time_min=0.0, **config):
        return dit_t2i.sample_times(Config(**config), BatchRng(20_000, 0), time_min, progress)

    for progress, mean in ((0.0, 0.7), (0.75, -0.8)):
        normal = torch.logit(times(progress, time_mean=(0.7, -1.3), time_std=0.5))
        assert abs(normal.mean() - mean) < 0.02 and abs(normal.std() - 0.5) < 0.02
    assert torch.equal(times(time_mean=(0.0,), time_std=1.0), torch.sigmoid(BatchRng(20_000, 0).randn()))  # the post's
    assert times(time_min=0.4).min() == pytest.approx(0.4)
    for time_min in (0.0, 0.05):  # uniform, by Kolmogorov's test
        t = times(time_min=time_min, arch="joint").sort()[0]
        assert (t - torch.linspace(time_min, 1, 20_000)).abs().max() < 0.015


def test_guidance_one_is_conditional_zero_is_unconditional_and_more_goes_further():
    text, null = torch.full((1, 2, 3), 0.3), torch.full((1, 2, 3), 0.2)

    def mean(cfg):
        model = Exact(lambda z, t, text: point(text.mean(dim=(1, 2)).view(-1, 1, 1, 1))(z, t, text))
        return sampled(model, text, null, cfg=cfg, steps=4).mean().item(), model.calls

    assert mean(1.0) == (pytest.approx(0.3, abs=1e-5), [2] * 4)  # a single pass
    assert mean(0.0)[0] == pytest.approx(0.2, abs=1e-5)
    assert mean(3.0) == (pytest.approx(0.2 + 3 * 0.1, abs=1e-5), [4] * 4)  # both in one batch
    assert mean(1.0 + 1e-6)[0] == pytest.approx(mean(1.0)[0], abs=1e-4)


def test_sample_depends_on_its_seed_and_prompt_only():
    model, text, null = awake(), torch.randn(3, 5, 12), torch.randn(1, 5, 12)
    together = sampled(model, text, null, (3, 8, 8), num=3, steps=2, batch_size=4)
    alone = sampled(model, text[1:2], null, (3, 8, 8), num=1, steps=2, seed=2)
    assert together.shape == (9, 3, 8, 8) and torch.allclose(together[5], alone[0], atol=1e-4)  # prompt 1, seed 2
    assert (together[4] - together[5]).abs().max() > 1e-2 and (together[2] - together[5]).abs().max() > 1e-2
    strided = sampled(model, text, null, (3, 8, 8), num=1, steps=2, seed_stride=2)
    assert torch.allclose(strided[1], alone[0], atol=1e-4)


# ---- words ----


def test_words_are_numbered_and_unknown_ones_are_named():
    words = Words.learn(["a red car", "a blue fish on a red background", "cat"])
    assert words.vocabulary == sorted({"red", "car", "blue", "fish", "on", "background", "cat"}) and words.length == 5
    number = words.number
    rows = words(["The RED car!", "", "a red zebra"])
    assert rows.tolist() == [[number["red"], number["car"], 0, 0, 0], [0] * 5, [number["red"], 0, 0, 0, 0]]
    assert words.warnings("a red car") == [] and words.warnings("") == []
    assert words.warnings("a red catt") == ["unknown word 'catt'; similar: cat"]
    assert "only the first 5 of 6" in words.warnings("red red red red red red")[0]
    assert words(["red " * 9]).shape == (1, 5)
    with pytest.raises(UserError, match="know no word of 'zebra'"):
        words.warnings("zebra")
    assert Words.learn(["one " * 99]).length == dit_t2i.MAX_WORDS
    more = Words.learn(["an amber fish"], words.vocabulary, 5)
    assert more.vocabulary == [*words.vocabulary, "amber"] and more.length == 5  # known words keep their numbers


# ---- data and training ----

TINY = dict(image_size=8, patch_size=2, depth=2, num_heads=2, head_dim=8, text_dim=12)


@pytest.fixture
def captioned(tmp_path, monkeypatch):
    """30 pictures of one colour: metadata.jsonl has the captions of the first 20, .txt files of the others but one."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "captioned"
    folder.mkdir()
    lines = []
    for i in range(30):
        name = ("red", "green", "blue")[i % 3]
        Image.new("RGB", (8, 8), name).save(folder / f"{i:02d}.png")
        if i < 20:
            lines.append(json.dumps({"file_name": f"{i:02d}.png", "text": f"a {name} square"}))
        elif i < 29:
            (folder / f"{i:02d}.txt").write_text(f"{name} tile\n")
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def train(captioned):
    def run(out, **changes):
        values = dict(TINY, data=(str(captioned),), out=str(out), batch_size=8, lr=1e-3, minutes=None, device="cpu")
        return dit_t2i.train(Config(**(values | dict(precision="fp32") | changes)))

    return run


def load(captioned, **changes):
    return TrainingData(Config(**(TINY | dict(data=(str(captioned),), batch_size=28) | changes)), CPU, "fp32")


def test_batches_hold_pictures_with_their_own_captions(captioned):
    data = load(captioned)
    assert len(data) == 28 and len(data.held_out) == 1 and set(data.train).isdisjoint(data.held_out)
    assert data.skipped == ["29.png: no caption"]
    assert data.header["latent"] == [3, 8] and data.header["vae"] is None and data.header["text"]["length"] == 2
    x, text = data.batch(0, slice(None))
    vocabulary = ["", *data.encoder.vocabulary]
    captions = [{vocabulary[i] for i in row} - {""} for row in text.tolist()]
    kept = [(picture, words) for picture, words in zip(x, captions) if words]
    assert len(kept) >= 20 and x.min() == -1 and x.max() == 1
    for picture, words in kept:
        assert ["red", "green", "blue"][picture.mean(dim=(1, 2)).argmax()] in words
    for rows in (slice(0, None, 2), slice(1, None, 2)):  # of two processes or accumulation passes
        assert all(torch.equal(part, whole[rows]) for part, whole in zip(data.batch(0, rows), (x, text)))


def test_a_tenth_of_the_captions_is_left_out(captioned):
    data = load(captioned)
    empty = torch.cat([(data.batch(step, slice(None))[1] == 0).all(dim=1) for step in range(60)])
    assert torch.equal(data.null, torch.zeros(1, 2, dtype=int)) and 0.08 < empty.float().mean() < 0.12


def test_words_are_learned_from_what_training_shows(captioned):
    (captioned / "metadata.jsonl").unlink()
    held_out = 1
    for _ in range(2):  # once to see which picture is held out
        for i in range(30):
            (captioned / f"{i:02d}.txt").write_text("a violet tile" if i == held_out else "a red tile")
        data = load(captioned)
        held_out = data.held_out[0]
    assert data.source.captions[held_out] == "a violet tile" and data.encoder.vocabulary == ["red", "tile"]


def test_pictures_and_captions_are_encoded_on_the_fly(captioned, partners):
    vae, clip = common.load_vae(partners[0]), dit_t2i.Clip(partners[1])
    data = load(captioned, image_size=16, vae=str(partners[0]), clip=str(partners[1]), text_dim=64, flip=1.0)
    assert data.header["latent"] == [4, 2] and data.header["vae"] == vae.hash
    assert data.header["text"] == {"clip": clip.hash} and torch.equal(data.null, clip([""]))
    x, text = data.load([0, 1], BatchRng(2, 1))
    pixels, captions = data.source.read([0, 1])
    assert torch.allclose(x, vae.encode(pixels.flip(-1)), atol=1e-5) and torch.allclose(text, clip(captions), atol=1e-5)
    ids = clip.tokenizer(captions)
    assert torch.equal(clip(captions), clip.model(ids, mask_padding=True))
    assert not torch.equal(clip(captions), clip.model(ids))
    with pytest.raises(UserError, match="states have width 64"):
        load(captioned, clip=str(partners[1]))


def same(one, other):
    one, other = load_file(one), load_file(other)
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("arch, optimizer", [("dual", "muon"), ("joint", "adamw")])
def test_resumed_run_ends_with_the_same_bits_and_samples_at_any_size(arch, optimizer, train, tmp_path, monkeypatch):
    options = dict(arch=arch, optimizer=optimizer, checkpoint_activations=arch == "joint", steps=6)
    train("whole", grad_accum=1, **options)

    def interrupted(self, grad_norm, lr, honest=common.Run.log):
        self.interrupted = self.step == 3
        honest(self, grad_norm, lr)

    with monkeypatch.context() as patch:
        patch.setattr(common.Run, "log", interrupted)
        assert train("halves", **options) == 130
    assert common.load_tensors("halves/state.safetensors")[1]["step"] == 4
    assert train("halves", resume="", **options) == 0
    for name in ("model.safetensors", "state.safetensors", "best.safetensors"):
        assert same(tmp_path / "whole" / name, tmp_path / "halves" / name)
    words = ["sample", "red square", "--weights", "whole", "--steps", "2", "--num", "2", "--size", "16"]
    assert dit_t2i.main([*words, "--out", "s.png"]) == 0 and Image.open("s.png").size == (32, 16)


def test_model_learns_which_word_is_which_colour(train):
    train("run", steps=150, batch_size=16, lr=3e-3, checkpoint_every=1000, cfg=1.0)
    model, config = dit_t2i.load_model("run/model.safetensors", "cpu")
    prompts = ["a red square", "a green square", "a blue square"]
    rgb = dit_t2i.sample(model, config, prompts, 4, cfg=2.0)
    assert rgb.shape == (12, 3, 8, 8) and rgb.min() >= 0 and rgb.max() <= 1
    assert rgb.mean(dim=(2, 3)).argmax(dim=1).tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_run_starts_from_other_weights_and_learns_new_words(train, captioned, tmp_path, capsys):
    """A learning rate of next to nothing leaves every weight as it was; new words are added behind the known ones."""
    train("first", steps=2)
    for side_car in captioned.glob("*.txt"):
        side_car.write_text("amber tile")
    train("second", steps=1, lr=1e-30, start="first/model.safetensors", depth=1, predict="velocity")
    (old, before), (new, after) = (common.load_tensors(tmp_path / n / "model.safetensors") for n in ("first", "second"))
    assert after["text"]["words"] == [*before["text"]["words"], "amber"]
    assert (after["config"]["depth"], after["config"]["predict"]) == (2, "data")  # the model is the weights'
    table = new.pop("words.weight")
    assert len(table) == len(old["words.weight"]) + 1 and table[-1].abs().max() > 0
    assert (table[:-1] - old.pop("words.weight")).abs().max() < 1e-20
    assert old.keys() == new.keys() and all((old[key] - new[key]).abs().max() < 1e-20 for key in old)
    (tmp_path / "first" / "model.safetensors").unlink()  # a run that resumes has all it needs
    assert dit_t2i.main(["train", "--resume", "second", "--steps", "2"]) == 0
    assert common.load_tensors(tmp_path / "second" / "model.safetensors")[1]["text"] == after["text"]


def test_resuming_with_other_captions_is_refused(train, captioned):
    train("run", steps=2)
    (captioned / "21.txt").write_text("blue tile\n")  # it was red: the same words, and the same pictures
    with pytest.raises(UserError, match="began with another data"):
        train("run", steps=4, resume="")


def test_held_out_loss_is_that_of_the_averaged_weights_at_fixed_noise(captioned):
    data = load(captioned)
    data.held_out = data.held_out + data.train[:9]
    model = Exact(lambda z, t, text: torch.zeros_like(z))
    losses = []
    for data.rows_at_once in (10, 3, 1):
        losses.append(dit_t2i.held_out_loss(data.config, data, model))
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)
    x = torch.cat([data.load([i], BatchRng(1, 0))[0] for i in data.held_out])
    noise = BatchRng(10, data.config.seed, 0, 4)
    noise.randn()  # the times
    assert losses[0] == pytest.approx((noise.randn(3, 8, 8) - x).square().mean().item(), rel=1e-5)


# ---- prepared shards ----


@pytest.fixture
def prepare(captioned, partners):
    words = f"prepare --data {captioned} --out shards --vae {partners[0]} --clip {partners[1]} --image-size 16"
    words += " --shard-size 8 --batch-size 3 --device cpu --precision fp32"
    return lambda *more: dit_t2i.main([*words.split(), *more])


def test_prepared_shards_hold_latents_and_clip_states(prepare, partners, captioned, capsys):
    (captioned / "broken.png").write_bytes(b"no picture")
    assert prepare("--precision", "bf16") == 0
    assert "30 samples in shards" in (out := capsys.readouterr().out) and "broken.png" in out
    data = common.Shards("shards", ("latents", "text"))
    latents, text = data.read([28, 0])
    vae, clip = common.load_vae(partners[0]), dit_t2i.Clip(partners[1])
    for i, row in ((28, 0), (0, 1)):
        picture = torch.from_numpy(common.read_picture(captioned / f"{i:02d}.png", 16).copy()).permute(2, 0, 1)[None]
        assert torch.allclose(latents[row], vae.encode(picture / 127.5 - 1)[0], atol=2e-2)
        # CLIP computes in float32 whatever the VAE's precision, as when a prompt is encoded.
        assert (text[row] != clip([data.captions[i]])[0].bfloat16()).float().mean() < 0.01
    assert (text[0] - text[1]).abs().max() > 0.05 and torch.allclose(data.extra("null"), clip([""]), atol=2e-2)


def test_training_and_sampling_from_shards(prepare, partners, tmp_path, capsys):
    assert prepare() == 0
    words = "train --preset paper --data shards --out run --epochs 1 --batch-size 8 --patch-size 1 --depth 1".split()
    words += "--num-heads 2 --head-dim 8 --device cpu --precision fp32 --no-compile".split()
    assert dit_t2i.main(words) == 2 and "states have width 64" in capsys.readouterr().err
    assert dit_t2i.main([*words, "--text-dim", "64"]) == 0
    sampling = ["sample", "a red square", "--weights", "run", "--steps", "2", "--num", "1"]
    assert dit_t2i.main([*sampling, "--clip", str(partners[1])]) == 2 and "--vae" in capsys.readouterr().err
    sampling += ["--vae", str(partners[0]), "--clip", str(partners[1])]
    assert dit_t2i.main([*sampling, "--size", "32", "--gif", "a.gif"]) == 0
    assert Image.open("samples/dit_t2i.png").size == (32, 32) and "warning" not in capsys.readouterr().err
    # Another VAE of the same shape, and one with other channels.
    torch.manual_seed(1)
    other = tmp_path / "other.safetensors"
    save_file(common.AutoencoderKL(widths=(32, 32, 32, 32)).state_dict(), other)
    assert dit_t2i.main([*sampling, "--vae", str(other)]) == 0
    assert "warning: --vae is not the file" in capsys.readouterr().err
    save_file(common.AutoencoderKL(32, widths=(32, 32, 32, 32), batch_norm=True).state_dict(), other)
    assert dit_t2i.main([*sampling, "--vae", str(other)]) == 2 and "32 channels" in capsys.readouterr().err
    assert dit_t2i.main(["sample", "red " * 100, *sampling[2:]]) == 0
    assert "the last 25 of" in capsys.readouterr().err


# ---- the command line ----


@pytest.fixture
def weights(train):
    """A checkpoint with random numbers for weights: a model that has hardly trained returns 0 for everything."""
    train("run", steps=1)
    tensors, header = common.load_tensors("run/model.safetensors")
    tensors = {name: torch.randn(tensor.shape) / 2 for name, tensor in tensors.items()}
    common.save_tensors("run/model.safetensors", tensors, header)
    return "run/model.safetensors"


def test_sample_makes_a_row_for_each_prompt(weights, tmp_path, monkeypatch, capsys):
    (tmp_path / "list.txt").write_text("a blue tile\n\ngreen\n")
    words = ["sample", "a red sqare", "--prompt", "red", "--prompts", "list.txt", "--weights", weights, "--num", "2"]
    words += "--steps 3 --precision fp32".split()
    assert dit_t2i.main([*words, "--out", "a.png", "--each", "each", "--gif", "a.gif", "--size", "12"]) == 0
    assert Image.open("a.png").size == (24, 48) and len(list((tmp_path / "each").iterdir())) == 8
    assert Image.open("a.gif").n_frames >= 3
    assert "unknown word 'sqare'; similar: square" in capsys.readouterr().err
    assert dit_t2i.main([*words, "--out", "b.png", "--negative", "red"]) == 0
    assert dit_t2i.main([*words, "--out", "c.png"]) == 0
    assert Image.open("b.png").tobytes() != Image.open("c.png").tobytes()
    # Picture 1 of a prompt is picture 0 of the next seed.
    for out, more in (("both", ["--seed", "0"]), ("alone", ["--seed", "1", "--num", "1"])):
        assert dit_t2i.main([*words, *more, "--each", out]) == 0
    both, alone = (sorted((tmp_path / out).iterdir()) for out in ("both", "alone"))
    zero, one, again = (np.stack([np.asarray(Image.open(p), int) for p in ps]) for ps in (both[::2], both[1::2], alone))
    assert np.abs(one - again).max() <= 1 < np.abs(one - zero).max()


@pytest.mark.parametrize(
    "words, message",
    [
        (["sample"], "no prompt"),
        (["sample", ""], "no prompt"),
        (["sample", "the zebra"], "know no word of 'the zebra'"),
        (["sample", "red", "--size", "9"], "--size 9 is no multiple of 2"),
        (["sample", "red", "--weights", "jit.safetensors"], "checkpoint of jit_lab"),
        (["sample", "red", "--weights", "foreign.safetensors"], "is not a readable checkpoint"),
        (["sample", "red", "--prompts", "missing.txt"], "missing.txt"),
        (["sample", "red", "--cfg", "-1"], "--cfg -1.0: must be"),
        (["train", "--data", "nowhere"], "nowhere"),
        (["train", "--data", "bare"], "0 captions in bare"),
        (["train", "--data", "captioned", "--patch-size", "3", "--image-size", "8"], "--patch-size 3 does not divide"),
        (["train", "--data", "captioned", "--vae", "x"], "no weights at x"),
        (["train", "--data", "captioned", "--clip", "x"], "x"),
        (["train", "--data", "captioned", "--from", "x"], "no weights at x"),
        (["prepare", "--data", "captioned"], "prepare needs"),
    ],
)
def test_mistakes_end_in_one_line(weights, tmp_path, capsys, words, message):
    save_file({"x": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    header = {"config": json.dumps({"system": "jit_lab", "config": {}})}
    save_file({"x": torch.zeros(1)}, tmp_path / "jit.safetensors", metadata=header)
    (tmp_path / "bare").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "bare" / "a.png")
    if words[0] == "sample" and "--weights" not in words:
        words = [*words, "--weights", weights]
    if words[0] == "train":
        words = [*words, "--steps", "1", "--out", "elsewhere"]
    capsys.readouterr()
    assert dit_t2i.main(words) == 2
    error = capsys.readouterr().err.rpartition("\r")[2]  # behind a progress bar that has erased itself
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


def test_published_checkpoint_loads_without_its_pickle(tmp_path):
    model = awake(in_channels=4, text_dim=768, latent_size=32, num_heads=2, head_dim=16)
    content = {"model": {}, "ema_model": model.state_dict(), "epoch": 3, "train_config": {"lr": 1e-4}}
    torch.save(content, tmp_path / "best.pt")
    loaded, config = dit_t2i.load_model(tmp_path / "best.pt", "cpu")
    z, t, text = torch.randn(1, 4, 32, 32), torch.tensor([0.5]), torch.randn(1, 7, 768)
    assert torch.equal(loaded(z, t, text), model(z, t, text))
    assert config.cfg == 4.0 and loaded.header["latent"] == [4, 32] and loaded.predict == "velocity"
