"""dit_t2i.py against golden files, closed forms and naive versions."""

import dataclasses
import json
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import FIXTURES
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import common
import dit_t2i
from common import UserError
from dit_t2i import Config, DiT, SampleConfig, Words

SIZES = dict(patch_size=2, in_channels=3, depth=2, num_heads=2, head_dim=8, text_dim=12, latent_size=8)


def awake(seed=0, **changes):
    """A small DiT whose every weight is random: nothing is zero, so nothing is hidden behind a closed gate."""
    torch.manual_seed(seed)
    model = DiT(**(SIZES | changes))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.5)
    return model.eval()


@torch.no_grad()
def without_attention(**changes):
    """awake() with five words of its own, in which nothing comes through attention."""
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
    config = Config(**dit_t2i.PRESETS["paper"])
    with torch.device("meta"):
        model = dit_t2i.build_model(config, 4, 32, 0)
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == layout
    assert sum(p.numel() for p in model.parameters()) == 257_669_392


def test_fresh_layer_is_the_identity_and_a_fresh_model_says_zero():
    torch.manual_seed(0)
    model = DiT(**SIZES)
    z, t, text = inputs()
    txt, vis, condition = torch.randn(2, 5, 16), torch.randn(2, 16, 16), torch.randn(2, 16)
    after = model.layers[0](txt, vis, condition, dit_t2i.msrope(4, 4, 5, 8))
    assert torch.equal(after[0], txt) and torch.equal(after[1], vis)
    assert (model(z, t, text) == 0).all()


def test_dead_parameters_are_the_last_layers_text_and_no_others():
    with torch.device("meta"):
        model = dit_t2i.build_model(Config(**dit_t2i.PRESETS["paper"]), 4, 32, 0)
    assert sum(p.numel() for p in model.parameters() if not p.requires_grad) == 5_903_680
    model = awake().train()
    model(*inputs()).square().sum().backward()
    for name, p in model.named_parameters():
        dead = name.startswith(("layers.1.txt_ff", "layers.1.attn.txt_q", "layers.1.attn.txt_o"))
        assert (p.grad is None) == dead, name
        assert dead or p.grad.abs().max() > 0, name


def test_positions_are_a_centred_grid_and_a_diagonal_behind_it():
    text, image = dit_t2i.msrope(16, 16, 3, 8)
    rows = torch.arange(-8, 8).repeat_interleave(16)
    columns = torch.arange(-8, 8).repeat(16)
    # The first two of four angles turn with the row, at frequencies 1 and 1/100; the others with the column.
    for k, (position, frequency) in enumerate([(rows, 1), (rows, 0.01), (columns, 1), (columns, 0.01)]):
        assert torch.allclose(image[0][:, k], torch.cos(position * frequency), atol=1e-5)
        assert torch.allclose(image[1][:, k], torch.sin(position * frequency), atol=1e-5)
    for k, frequency in enumerate([1, 0.01, 1, 0.01]):
        angles = torch.tensor([8.0, 9, 10]) * frequency
        assert torch.allclose(text[0][:, k], torch.cos(angles), atol=1e-5)
        assert torch.allclose(text[1][:, k], torch.sin(angles), atol=1e-5)
    # Beside a picture that is no square, text begins where the longer side ends.
    for shape in ((16, 24), (24, 16)):
        assert dit_t2i.msrope(*shape, 1, 8)[0][1][0, 0] == pytest.approx(math.sin(12), abs=1e-5)


def test_larger_picture_has_the_trained_positions_in_its_middle():
    small, large = dit_t2i.msrope(16, 16, 3, 8)[1], dit_t2i.msrope(24, 20, 3, 8)[1]
    for a, b in zip(small, large):
        assert torch.equal(a.unflatten(0, (16, 16)), b.unflatten(0, (24, 20))[4:20, 2:18])


def test_every_place_and_every_word_order_matters():
    model = awake()
    z, t, text = inputs()
    out = model(z, t, text)
    for swapped in (model(z.transpose(2, 3), t, text).transpose(2, 3), model(z, t, text.flip(1))):
        assert (out - swapped).abs().max() > 1e-2
    assert (out - model(z, t + 0.2, text)).abs().max() > 1e-2


@torch.no_grad()
def test_word_order_matters_to_a_joint_model_too():
    z, t, text = inputs()
    states = awake(arch="joint")
    assert torch.allclose(states(z, t, text), states(z, t, text.flip(1)), atol=1e-4)  # it must come with the states
    words = awake(arch="joint", vocabulary=5)
    one, other = (words(z, t, torch.tensor([order, order])) for order in ([1, 2, 3], [3, 2, 1]))
    assert (one - other).abs().max() > 1e-2


def test_attention_is_joint():
    """Pixels see words, and (through the next layer) words see pixels: a one-layer model has only the first."""
    z, t, text = inputs()
    moved = z + torch.eye(8)
    one, two = awake(depth=1), awake(depth=2)
    for model in (one, two):
        assert (model(z, t, text) - model(z, t, text + 1)).abs().max() > 1e-2
    seen = []
    two.layers[1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    two(z, t, text), two(moved, t, text)
    assert (seen[0] - seen[1]).abs().max() > 1e-2


@torch.no_grad()
def test_words_of_its_own_table_also_join_the_time_as_their_sum():
    model, (z, t, _) = without_attention(), inputs()

    def say(*words):
        return model(z, t, torch.tensor([words, words]))

    assert (say(1, 0) - say(2, 0)).abs().max() > 1e-2
    assert torch.allclose(say(1, 2), say(2, 1), atol=1e-5)  # a sum has no order
    assert torch.equal(say(1, 0), say(1, 0, 0)) and torch.equal(say(0), say(0, 0))  # what fills up says nothing
    condition = model.step_embed(t)
    model.step_embed.forward = lambda t: condition  # of the null caption, the time alone
    model.text_proj.weight.zero_()
    model.text_proj.bias.zero_()
    assert torch.allclose(say(1, 2), say(0, 0), atol=1e-6)


@torch.no_grad()
def test_patches_of_a_model_with_its_own_words_know_their_place():
    model = without_attention()
    out = model(torch.ones(1, 3, 8, 8), torch.tensor([0.5]), torch.tensor([[1]]))
    patches = out.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).reshape(16, -1)
    assert torch.cdist(patches, patches)[~torch.eye(16, dtype=torch.bool)].min() > 1e-3
    whole, part = (common.sincos_2d(*dit_t2i.centred(side, side), 32) for side in (16, 8))
    assert torch.equal(whole.view(16, 16, 32)[4:12, 4:12].flatten(0, 1), part)


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


@torch.no_grad()
def test_joint_forward_equals_a_naive_one():
    model = awake(arch="joint").double()
    z, t, text = (x.double() for x in inputs())
    for p in model.parameters():
        p.mul_(0.5)
    expected = naive_joint(model, z, t, text)
    assert expected.std() > 0.01
    assert (model(z, t, text) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_a_fresh_joint_model_says_zero_and_only_the_last_layers_text_is_dead():
    torch.manual_seed(0)
    assert (DiT(**SIZES, arch="joint")(*inputs()) == 0).all()
    model = awake(arch="joint").train()
    model(*inputs()).square().sum().backward()
    for name, p in model.named_parameters():
        dead = name.startswith(("layers.1.txt_ff", "layers.1.attn.txt_q", "layers.1.attn.txt_o"))
        assert (p.grad is None) == dead, name
        assert dead or p.grad.abs().max() > 0, name


@torch.no_grad()
def test_learned_positions_are_stretched_for_another_size():
    model, text = awake(arch="joint"), inputs()[2]
    seen = []
    model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    for side in (8, 16):
        model(torch.zeros(2, 3, side, side), torch.ones(2), text)
    places = [
        x[0].T.unflatten(1, (side, side)) - model.patch_embed.bias[:, None, None] for x, side in zip(seen, (4, 8))
    ]
    assert torch.allclose(places[0], model.positions[0], atol=1e-5)
    stretched = torch.nn.functional.interpolate(model.positions, (8, 8), mode="bicubic")
    assert torch.allclose(places[1], stretched[0], atol=1e-5)


@torch.no_grad()
def test_joint_words_join_the_time_as_their_mean():
    model, (z, t, _) = without_attention(arch="joint"), inputs()

    def say(*words):
        return model(z, t, torch.tensor([words, words]))

    assert (say(1, 0) - say(2, 0)).abs().max() > 1e-2
    assert torch.allclose(say(1, 2), say(2, 1, 0), atol=1e-5)  # a mean has no order
    assert torch.allclose(say(3), say(3, 3, 0), atol=1e-5)
    assert (say(1, 2) - say(1)).abs().max() > 1e-2


@pytest.mark.parametrize("arch", ["dual", "joint"])
def test_checkpointing_activations_keeps_less_and_changes_no_bit(arch):
    kept, losses, gradients = [], [], []
    for checkpointing in (False, True):
        sizes = []
        model, (z, t, text) = awake(arch=arch, depth=8).train(), inputs()
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(0.3)
        model.checkpointing = checkpointing

        def pack(tensor, sizes=sizes):
            sizes.append(tensor.numel() if tensor.requires_grad else 0)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(z, t, text).square().mean()
        loss.backward()
        kept.append(sum(sizes))
        losses.append(loss.item())
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert losses[0] == losses[1]
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
    assert kept[1] < 0.2 * kept[0]


@pytest.mark.parametrize("whole", [False, True])
def test_time_is_not_rounded_before_its_sinusoid(whole):
    """The published code's t is bfloat16 under autocast: 753.1 becomes 752."""
    model = awake()
    seen = []
    model.step_embed.mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    z, _, text = inputs()
    t = torch.tensor([0.7531, 0.7519])
    with torch.autocast("cpu", torch.bfloat16):
        (model.bfloat16() if whole else model)(z, t, text)
    exact = common.timestep_embedding(1000 * t, 256)
    assert torch.equal(seen[0].float(), exact.bfloat16().float() if whole else exact)


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


# ---- flow, guidance, solvers ----


def point(data):
    """The exact velocity where all data is one point: (z - data) / t."""
    return lambda z, t, text: (z - data) / t.view(-1, 1, 1, 1)


class Exact(torch.nn.Module):
    """A model that knows the answer; it has a parameter only to have a device."""

    time_min = 0.0

    def __init__(self, answer):
        super().__init__()
        self.answer, self.calls, self.weight = answer, [], torch.nn.Parameter(torch.zeros(1))

    def forward(self, z, t, text):
        self.calls.append(len(z))
        return self.answer(z, t, text)


def draw(model, text=None, null=None, shape=(3, 4, 4), watch=None, **options):
    text = torch.zeros(1, 2, 3) if text is None else text
    null = torch.zeros(1, 2, 3) if null is None else null
    options = SampleConfig(**(dict(num=2, cfg=1.0, precision="fp32", device="cpu") | options))
    return dit_t2i.sample(model, options, text, null, shape, watch)


@pytest.mark.parametrize("solver", list(common.SOLVERS))
@pytest.mark.parametrize("steps", [1, 28])
def test_exact_velocity_of_a_point_leads_from_noise_to_the_point(solver, steps):
    data = torch.rand(3, 4, 4)
    seen = []
    drawn = draw(Exact(point(data)), steps=steps, solver=solver, watch=lambda z, t: seen.append((t, z)))
    assert (drawn - data).abs().max() < 1e-4
    # t = 1 is noise and t = 0 is data.
    assert seen[0][0] == 1 and torch.equal(seen[0][1], common.noise_for([0, 1], (3, 4, 4), "cpu"))
    assert seen[-1][0] == 0 and torch.equal(seen[-1][1], drawn)


@pytest.mark.parametrize("solver", list(common.SOLVERS))
@pytest.mark.parametrize("steps", [3, 28, 200])
def test_no_time_below_the_least_of_training_is_asked_for(solver, steps):
    """And from there one step leads to the data that the network predicts there, whatever it predicted before."""
    seen = []

    def velocity(z, t, text):
        seen.append(t[0].item())
        return (z - torch.full_like(z, 3 * t[0].item())) / t.view(-1, 1, 1, 1)  # the predicted data is 3 t all over

    model = Exact(velocity)
    model.time_min = 0.05
    drawn = draw(model, steps=steps, solver=solver)
    assert min(seen) == pytest.approx(0.05) and max(seen) == 1
    assert torch.allclose(drawn, torch.full_like(drawn, 0.15), atol=1e-5)


def gaussian(mean, std):
    """The exact velocity where data is N(mean, std^2): E[noise - data | z]."""

    def velocity(z, t, text):
        t = t.view(-1, 1, 1, 1)
        variance = (1 - t) ** 2 * std**2 + t**2
        return (t - (1 - t) * std**2) * (z - (1 - t) * mean) / variance - mean

    return velocity


@pytest.mark.parametrize("solver, order, steps", [("euler", 1, 40), ("heun", 2, 40), ("dpm", 2, 160)])
def test_solvers_have_their_order_on_a_gaussian(solver, order, steps):
    """The flow of a Gaussian is known: z_0 = mean + std * noise. Halving the step divides the error by 2^order."""
    mean, std = 0.3, 0.5
    exact = mean + std * common.noise_for(range(8), (3, 4, 4), "cpu")
    errors = []
    for count in (steps, 2 * steps):
        drawn = draw(Exact(gaussian(mean, std)), num=8, steps=count, solver=solver)
        errors.append((drawn - exact).abs().mean().item())
    assert errors[1] < 0.02 and order - 0.35 < math.log2(errors[0] / errors[1]) < order + 0.6


def test_steps_are_where_the_shift_puts_them():
    """Equal ones at 1; more near the noise above it; and with a least time of training one that lands from there."""
    asked = []
    model = Exact(lambda z, t, text: asked.append(t[0].item()) or torch.zeros_like(z))
    for least, shift, expected in (
        (0.0, 1.0, [1, 0.75, 0.5, 0.25]),
        (0.0, 3.0, [1, 0.9, 0.75, 0.5]),
        (0.1, 1.0, [1, 0.7, 0.4, 0.1]),
    ):
        asked.clear()
        model.time_min = least
        draw(model, num=1, steps=4, shift=shift)
        assert asked == pytest.approx(expected)


def test_second_order_in_half_the_steps_is_nearer_than_euler():
    exact = 0.3 + 0.5 * common.noise_for(range(8), (3, 4, 4), "cpu")
    error = {}
    for solver, steps in (("euler", 28), ("dpm", 14), ("heun", 14)):
        drawn = draw(Exact(gaussian(0.3, 0.5)), num=8, steps=steps, solver=solver)
        error[solver] = (drawn - exact).abs().mean()
    assert error["dpm"] < error["euler"] and error["heun"] < error["euler"]


def test_loss_is_zero_for_the_right_velocity_and_only_for_it():
    config, x = Config(time_mean=0.0, time_std=0.5), torch.rand(6, 3, 8, 8)
    seen = {}

    def right(z, t, text):
        seen["t"] = t
        return (z - x) / t.view(-1, 1, 1, 1)

    costs, t = dit_t2i.flow_loss(config, right, x, None, common.Draw(6, 3))
    assert costs.max() < 1e-6 and torch.equal(t, seen["t"])
    for wrong in (lambda *a: -right(*a), lambda z, t, text: x, lambda z, t, text: z - x):
        assert dit_t2i.flow_loss(config, wrong, x, None, common.Draw(6, 3))[0].min() > 1e-2


def test_training_times_follow_their_law():
    config = Config(time_mean=0.7, time_std=0.5, time_min=0.0)
    zero = lambda z, t, text: torch.zeros_like(z)  # noqa: E731
    _, t = dit_t2i.flow_loss(config, zero, torch.zeros(20_000, 1, 1, 1), None, common.Draw(20_000, 0))
    normal = torch.logit(t)
    assert abs(normal.mean() - 0.7) < 0.02 and abs(normal.std() - 0.5) < 0.02
    config = dataclasses.replace(config, time_fall=2.0)
    _, t = dit_t2i.flow_loss(config, zero, torch.zeros(20_000, 1, 1, 1), None, common.Draw(20_000, 0), 0.75)
    assert abs(torch.logit(t).mean() + 0.8) < 0.02
    _, t = dit_t2i.flow_loss(Config(time_min=0.4), zero, torch.zeros(500, 1, 1, 1), None, common.Draw(500, 0))
    assert t.min() == pytest.approx(0.4) and t.max() > 0.6
    for changes in (dict(arch="joint"), dict(time_law="uniform"), dict(arch="joint", time_min=0.0)):
        config = Config(**changes)
        _, t = dit_t2i.flow_loss(config, zero, torch.zeros(20_000, 1, 1, 1), None, common.Draw(20_000, 0))
        assert (t.sort()[0] - torch.linspace(config.time_min, 1, 20_000)).abs().max() < 0.015  # Kolmogorov's test
    config = Config(arch="joint", time_law="normal", time_mean=3.0)
    _, t = dit_t2i.flow_loss(config, zero, torch.zeros(2000, 1, 1, 1), None, common.Draw(2000, 0))
    assert t.mean() > 0.8


def test_guidance_one_is_conditional_zero_is_not_and_more_leads_further():
    text, null = torch.full((1, 2, 3), 0.3), torch.full((1, 2, 3), 0.2)

    def drawn(cfg):
        model = Exact(lambda z, t, text: point(text.mean(dim=(1, 2)).view(-1, 1, 1, 1))(z, t, text))
        return draw(model, text, null, cfg=cfg, steps=4).mean().item(), model.calls

    assert drawn(1.0) == (pytest.approx(0.3, abs=1e-5), [2] * 4)  # a single pass
    assert drawn(0.0)[0] == pytest.approx(0.2, abs=1e-5)
    assert drawn(3.0) == (pytest.approx(0.2 + 3 * 0.1, abs=1e-5), [4] * 4)  # both as one batch


def test_cfg_one_equals_the_conditional_model():
    model = awake()
    text = torch.randn(1, 5, 12)
    shape = (3, 8, 8)
    for cfg in (1.0, 1.0 + 1e-6):
        drawn = draw(model, text, torch.randn(1, 5, 12), shape, cfg=cfg, steps=3)
        z = common.noise_for([0, 1], shape, "cpu")
        by_hand = common.flow_euler(
            lambda z, t: model(z, torch.full((2,), t), text.expand(2, -1, -1)), z, [1, 2 / 3, 1 / 3, 0]
        )
        assert torch.allclose(drawn, by_hand, atol=1e-3)


def test_picture_depends_on_its_seed_and_prompt_alone():
    model = awake()
    text = torch.randn(3, 5, 12)
    together = draw(model, text, torch.randn(1, 5, 12), (3, 8, 8), num=3, steps=2, batch_size=4)
    alone = draw(model, text[1:2], torch.randn(1, 5, 12), (3, 8, 8), num=1, steps=2, seed=2)
    assert together.shape == (9, 3, 8, 8)
    assert torch.allclose(together[5], alone[0], atol=1e-4)  # prompt 1, seed 2
    assert not torch.allclose(together[4], together[5], atol=1e-2) and not torch.allclose(
        together[2], together[5], atol=1e-2
    )


# ---- words ----


def test_words_number_what_they_know_and_complain_of_the_rest():
    words = Words.learn(["a red car", "a blue fish on a red background", "cat"], most=16)
    assert words.vocabulary == sorted({"red", "car", "blue", "fish", "on", "background", "cat"}) and words.length == 5
    number = words.number
    rows = words(["The RED car!", "", "a red zebra"])
    assert rows.tolist() == [[number["red"], number["car"], 0, 0, 0], [0] * 5, [number["red"], 0, 0, 0, 0]]
    assert words.complaints("a red car") == [] and words.complaints("") == []
    assert words.complaints("a red catt") == ["unknown word 'catt'; near it are cat"]
    assert "only the first 5 of 6" in words.complaints("red red red red red red")[0]
    assert words(["red " * 9]).shape == (1, 5)
    with pytest.raises(UserError, match="no word of 'zebra' is known"):
        words.complaints("zebra")
    assert Words.learn(["one two three"], most=2).length == 2


def test_every_sample_comes_once_an_epoch():
    config = Config(batch_size=4, seed=3)
    drawn = [i for step in range(9) for i in common.batch_index(config, 12, step)]
    epochs = [drawn[k : k + 12] for k in (0, 12, 24)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs) and epochs[0] != epochs[1]
    assert common.batch_index(config, 12, 5) == drawn[20:24]
    straddling = common.batch_index(config, 6, 1)  # the last batch of an epoch is filled from the next
    assert len(straddling) == 4


# ---- captioned folders, runs ----

TINY = dict(image_size=8, patch_size=2, depth=2, num_heads=2, head_dim=8, text_dim=12)


@pytest.fixture
def captioned(tmp_path):
    """30 plain pictures: metadata.jsonl names the first 20, .txt files lie beside the others but one."""
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
def train(captioned, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(out, **changes):
        values = dict(TINY, data=str(captioned), out=str(out), batch_size=8, lr=1e-3, minutes=None, device="cpu")
        return dit_t2i.train(Config(**(values | dict(precision="fp32") | changes)))

    return run


def test_captions_come_from_metadata_and_side_cars(captioned):
    _, data, held_out, skipped = dit_t2i.load_data(Config(data=str(captioned), image_size=8))
    assert len(data) + len(held_out) == 29 and len(held_out) == 1
    assert set(data.index).isdisjoint(held_out.index)
    assert len(skipped) == 1 and skipped[0].endswith("29.png: no caption")
    x, captions = data.batch(range(len(data)), common.Draw(len(data), 0))
    assert sum("tile" in caption for caption in captions) in (8, 9)
    for picture, caption in zip(x, captions):
        channel = ["red", "green", "blue"].index(next(w for w in caption.split() if w in ("red", "green", "blue")))
        assert picture.mean(dim=(1, 2)).argmax() == channel
    path = captioned / "20.png"  # a line with tags alone leaves the text to the side-car
    (captioned / "metadata.jsonl").write_text(json.dumps({"file_name": path.name, "tags": ["plain"]}))
    assert common.read_metadata([path], captioned)[path] == ("blue tile", ["plain"])
    (captioned / "metadata.jsonl").write_text("not json\n")
    with pytest.raises(UserError, match="line 1"):
        common.read_metadata([], captioned)
    (captioned / "metadata.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not UTF-8"):
        common.read_metadata([], captioned)


@pytest.mark.parametrize("arch", ["dual", "joint"])
def test_a_run_of_either_architecture_resumes_and_draws_at_any_size(arch, train, tmp_path, monkeypatch):
    options = dict(arch=arch, decay="none", warmup=0.0, time_fall=0.0, checkpoint_activations=True)
    train(tmp_path / "whole", steps=4, **options)
    train(tmp_path / "halves", steps=2, **options)
    train(tmp_path / "halves", steps=4, resume=True, **options)
    one, other = (load_file(tmp_path / name / "state.safetensors") for name in ("whole", "halves"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert ("model.positions" in one) == (arch == "joint")
    assert dit_t2i.build_model(Config(**TINY, arch=arch, checkpoint_activations=True), 3, 8, 5).checkpointing
    words = ["sample", "red square", "--weights", str(tmp_path / "whole" / "model.safetensors"), "--steps", "2"]
    assert dit_t2i.main([*words, "--num", "2", "--size", "16", "--out", str(tmp_path / "s.png")]) == 0
    assert Image.open(tmp_path / "s.png").size == (32, 16)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_what_saves_memory_changes_no_bit(optimizer, train, tmp_path, monkeypatch):
    """Layers computed twice, and gradients of linear layers kept in bfloat16 as autocast computes them."""
    kept, put_aside = [], common.narrow_gradients

    def watched(config, model, device):
        put_aside(config, model, device)
        model.output_proj.weight.register_post_accumulate_grad_hook(
            lambda w: kept.append((w.grad, w.narrow_grad.dtype))
        )

    monkeypatch.setattr(common, "narrow_gradients", watched)
    options = dict(steps=6, precision="bf16", grad_clip=0.1, optimizer=optimizer)
    train(tmp_path / "plain", **options)
    train(tmp_path / "small", checkpoint_activations=True, **options)
    assert kept == [(None, torch.bfloat16)] * 6
    one, other = (load_file(tmp_path / name / "state.safetensors") for name in ("plain", "small"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    for given in (dict(precision="fp32"), dict(precision="bf16", grad_accum=2)):  # where they would lose, they stay
        model = torch.nn.Sequential(torch.nn.Linear(2, 2))
        put_aside(Config(**given), model, torch.device("cpu"))
        model(torch.ones(1, 2)).sum().backward()
        assert model[0].weight.grad is not None


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resumed_run_ends_with_the_same_bits(optimizer, train, tmp_path, monkeypatch):
    options = dict(grad_accum=2, optimizer=optimizer)
    train(tmp_path / "whole", steps=8, **options)
    options |= dict(decay="none", warmup=0.0, time_fall=0.0)
    train(tmp_path / "halves", steps=4, **options)
    train(tmp_path / "plain", steps=8, **options)
    train(tmp_path / "halves", steps=8, resume=True, **options)
    for name in ("model.safetensors", "state.safetensors", "best.safetensors"):
        one, other = load_file(tmp_path / "plain" / name), load_file(tmp_path / "halves" / name)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert not torch.equal(
        load_file(tmp_path / "whole" / "model.safetensors")["text_proj.weight"],
        load_file(tmp_path / "plain" / "model.safetensors")["text_proj.weight"],
    )

    def due(self, honest=common.Run.due):
        self.asked_to_stop = self.step == 4
        return honest(self)

    # With all that follows the budget, too.
    options = dict(grad_accum=2, optimizer=optimizer)
    with monkeypatch.context() as patch:
        patch.setattr(common.Run, "due", due)
        assert train(tmp_path / "cut", steps=8, **options) == 130
    assert common.load_tensors(tmp_path / "cut" / "state.safetensors")[1]["step"] == 4
    assert train(tmp_path / "cut", steps=8, resume=True, **options) == 0
    one, other = (load_file(tmp_path / name / "state.safetensors") for name in ("whole", "cut"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_more_epochs_go_on_where_fewer_ended(train, tmp_path):
    options = dict(decay="none", warmup=0.0, time_fall=0.0)
    train(tmp_path / "three", epochs=3, **options)
    train(tmp_path / "more", epochs=1, **options)
    assert safe_open(tmp_path / "more" / "model.safetensors", "pt").metadata()
    train(tmp_path / "more", epochs=3, resume=True, **options)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("three", "more"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    header = json.loads(safe_open(tmp_path / "more" / "model.safetensors", "pt").metadata()["config"])
    assert header["step"] == 3 * math.ceil(28 / 8)


def test_times_are_told_how_far_the_run_is(train, tmp_path, monkeypatch):
    told = []

    def flow_loss(*arguments, honest=dit_t2i.flow_loss):
        told.append(arguments[5:])
        return honest(*arguments)

    monkeypatch.setattr(dit_t2i, "flow_loss", flow_loss)
    train(tmp_path / "run", steps=4)
    assert [progress for (progress,) in filter(None, told)] == [0.0, 0.25, 0.5, 0.75]


def test_a_tenth_of_the_captions_is_left_out(train, tmp_path, monkeypatch):
    empty = []

    def loss(config, model, x, text, *more, honest=dit_t2i.flow_loss):
        if model.training:
            empty.extend((text == 0).all(dim=1).tolist())
        return honest(config, model, x, text, *more)

    monkeypatch.setattr(dit_t2i, "flow_loss", loss)
    train(tmp_path / "run", steps=60, batch_size=16, null_prob=0.1)
    assert len(empty) == 960 and 0.06 < sum(empty) / 960 < 0.14


def test_model_learns_which_word_is_which_colour(train, tmp_path):
    train(tmp_path / "run", steps=250, batch_size=16, lr=3e-3, checkpoint_every=1000, cfg=1.0)
    model, _, header = dit_t2i.load_model(tmp_path / "run" / "model.safetensors", "cpu")
    words = Words(header["text"]["words"], header["text"]["length"])
    text, null = words(["a red square", "a green square", "a blue square"]), words([""])
    options = SampleConfig(num=4, cfg=2.0, precision="fp32")
    drawn = dit_t2i.sample(model, options, text, null, (3, 8, 8)).mean(dim=(2, 3))
    assert drawn.argmax(dim=1).tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_run_begins_with_other_weights_and_teaches_them_new_words(train, captioned, tmp_path):
    """A step of no length leaves every weight where it began; words keep their numbers, and new ones come behind."""
    train(tmp_path / "first", steps=2)
    first = tmp_path / "first" / "best.safetensors"
    for side_car in captioned.glob("*.txt"):
        side_car.write_text("amber tile")
    train(tmp_path / "second", steps=1, lr=1e-30, start=str(first))
    second = tmp_path / "second" / "model.safetensors"
    (old, before), (new, after) = common.load_tensors(first), common.load_tensors(second)
    assert after["text"]["words"] == [*before["text"]["words"], "amber"] and "amber" not in before["text"]["words"]
    table = new.pop("words.weight")
    assert len(table) == len(old["words.weight"]) + 1 and table[-1].abs().max() > 0
    assert (table[:-1] - old.pop("words.weight")).abs().max() < 1e-20
    assert old.keys() == new.keys() and all((old[key] - new[key]).abs().max() < 1e-20 for key in old)
    first.unlink()  # a run that goes on has all it needs, and need not be told again
    train(tmp_path / "second", steps=2, lr=1e-30, start="gone", resume=True)
    train(tmp_path / "second", steps=3, lr=1e-30, resume=True)
    train(tmp_path / "second", steps=4, lr=1e-30, start="gone", resume=True)
    assert common.load_tensors(second)[1]["text"] == after["text"]
    train(tmp_path / "third", steps=1)
    with pytest.raises(UserError, match="did not begin with other weights"):
        train(tmp_path / "third", steps=2, start=str(second), resume=True)


def test_weights_that_do_not_belong_to_a_run_are_refused(train, tmp_path):
    train(tmp_path / "first", steps=1)
    first = tmp_path / "first" / "model.safetensors"
    with pytest.raises(UserError, match=r"trained with --depth 2 \(not 3\); give the same"):
        train(tmp_path / "deeper", steps=1, depth=3, start=str(first))
    weights, header = common.load_tensors(first)
    common.save_tensors(tmp_path / "other.safetensors", weights, header | {"vae": [0.5, 0.25]})
    with pytest.raises(UserError, match="another VAE"):
        train(tmp_path / "latent", steps=1, start=str(tmp_path / "other.safetensors"))
    header["text"] = {"clip": [0.5, 0.25]}
    del weights["words.weight"]
    common.save_tensors(tmp_path / "other.safetensors", weights, header)
    with pytest.raises(UserError, match="through CLIP, this run through a word table"):
        train(tmp_path / "clip", steps=1, start=str(tmp_path / "other.safetensors"))
    with pytest.raises(UserError, match="no weights at"):
        train(tmp_path / "nothing", steps=1, start="nowhere.safetensors")


def test_other_pictures_under_the_same_name_are_not_resumed_with(train, captioned, tmp_path):
    train(tmp_path / "run", steps=2)
    Image.new("RGB", (8, 8), "pink").save(captioned / "90.png")
    (captioned / "90.txt").write_text("pink square")
    with pytest.raises(UserError, match="began with another data"):
        train(tmp_path / "run", steps=4, resume=True)
    (captioned / "90.png").unlink()
    train(tmp_path / "run", steps=3, resume=True)
    (captioned / "21.txt").write_text("blue tile\n")  # it was red: the same words, and the same pictures
    with pytest.raises(UserError, match="began with another data"):
        train(tmp_path / "run", steps=4, resume=True)


def test_words_are_those_that_training_shows(train, captioned, tmp_path):
    (captioned / "metadata.jsonl").unlink()
    held_out = 1
    for _ in range(2):  # once to see which picture is held out
        for i in range(30):
            (captioned / f"{i:02d}.txt").write_text("a violet tile" if i == held_out else "a red tile")
        _, data, kept, _ = dit_t2i.load_data(Config(data=str(captioned), image_size=8))
        held_out = kept.index[0]
    assert kept.caption(0) == "a violet tile" and set(data.all_captions()) == {"a red tile"}
    train(tmp_path / "run", steps=1)
    assert common.load_tensors(tmp_path / "run" / "model.safetensors")[1]["text"]["words"] == ["red", "tile"]


def test_best_checkpoint_is_that_of_the_least_held_out_loss(train, tmp_path, monkeypatch):
    losses = []

    def loss(config, model, *more, honest=dit_t2i.flow_loss):
        costs, t = honest(config, model, *more)
        if model.training:
            return costs, t
        losses.append([3.0, 1.0, 2.0][len(losses)])
        return torch.full_like(costs, losses[-1]), t

    monkeypatch.setattr(dit_t2i, "flow_loss", loss)
    train(tmp_path / "run", steps=3, checkpoint_every=1)
    header = json.loads(safe_open(tmp_path / "run" / "best.safetensors", "pt").metadata()["config"])
    assert len(losses) == 3 and header["held_out_loss"] == 1.0 and header["step"] == 2


# ---- the command line ----


@pytest.fixture
def weights(train, tmp_path):
    """A checkpoint of a run, with random numbers for weights: a model that has hardly trained says 0 to everything."""
    train(tmp_path / "run", steps=1)
    path = tmp_path / "run" / "model.safetensors"
    tensors, header = common.load_tensors(path)
    common.save_tensors(path, {name: torch.randn(tensor.shape) / 2 for name, tensor in tensors.items()}, header)
    return path


def test_sample_draws_a_row_for_each_prompt(weights, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.txt").write_text("a blue tile\n\ngreen\n")
    words = ["sample", "a red sqare", "--prompts", "list.txt", "--weights", str(weights), "--num", "2", "--steps", "3"]
    assert dit_t2i.main([*words, "--out", "a.png", "--each", "each", "--gif", "a.gif", "--size", "12"]) == 0
    assert Image.open("a.png").size == (24, 36) and len(list((tmp_path / "each").iterdir())) == 6
    assert Image.open("a.gif").n_frames >= 3
    assert "unknown word 'sqare'; near it are square" in capsys.readouterr().err
    away_from = []

    def sample(model, options, text, null, *more, honest=dit_t2i.sample):
        away_from.append(null)
        return honest(model, options, text, null, *more)

    monkeypatch.setattr(dit_t2i, "sample", sample)
    assert dit_t2i.main([*words, "--out", "b.png", "--negative", "red"]) == 0
    assert dit_t2i.main([*words, "--out", "c.png"]) == 0
    assert Image.open("b.png").tobytes() != Image.open("c.png").tobytes()
    told = common.load_tensors(weights)[1]["text"]
    known = Words(told["words"], told["length"])
    assert torch.equal(away_from[0], known(["red"])) and torch.equal(away_from[1], known([""]))
    # Picture 1 of a prompt is picture 0 of the next seed.
    for out, more in (("both", ["--seed", "0"]), ("alone", ["--seed", "1", "--num", "1"])):
        assert dit_t2i.main([*words, *more, "--each", out, "--precision", "fp32"]) == 0
    both, alone = (sorted((tmp_path / out).iterdir()) for out in ("both", "alone"))
    zero, one, same = (np.asarray(Image.open(path), int) for path in (*both[2:4], alone[1]))
    assert np.abs(one - same).max() <= 1 < np.abs(one - zero).max()


@pytest.mark.parametrize(
    "words, says",
    [
        (["sample"], "no prompt"),
        (["sample", ""], "no prompt"),
        (["sample", "zebra"], "no word of 'zebra' is known"),
        (["sample", "red", "--size", "9"], "--size 9 is no multiple of 2"),
        (["sample", "red", "--weights", "jit.safetensors"], "checkpoint of jit_lab"),
        (["sample", "red", "--weights", "foreign.safetensors"], "no checkpoint of dit_t2i.py"),
        (["sample", "red", "--prompts", "missing.txt"], "cannot read prompts"),
        (["sample", "red", "--cfg", "-1"], "--cfg -1.0: must be at least 0"),
        (["train", "--data", "nowhere"], "no folder nowhere"),
        (["train", "--data", "bare"], "no captions in bare"),
        (["train", "--data", "captioned", "--patch-size", "3", "--image-size", "8"], "--patch-size 3 does not divide"),
        (["train", "--data", "captioned", "--vae", "x"], "--vae goes with shards"),
        (["train", "--vae", "x"], "--vae goes with shards"),
        (["sample", "the"], "no word of 'the' is known"),
        (["sample", "red", "--negative", "blue", "--cfg", "1"], "--cfg 1 is no guidance"),
        (["sample", "red", "--negative", "blue", "--cfg", "0.5"], "--cfg 0.5 is no guidance"),
        (["train", "--flip", "0.5"], "--flip 0.5 is for your own pictures"),
        (["train", "--data", "captioned", "--stream", "x.jsonl"], "--data and --stream are two sources"),
        (["sample", "red", "--tile", "32"], "--tile 32 should be an even number of a VAE's cells"),
        (["sample", "red", "--vae", "x"], "--vae: these weights were trained without one"),
        (["sample", "red", "--clip", "x"], "--clip: these weights were trained without one"),
        (["sample", "red", "--out", "drawn"], "drawn: name a picture file that can be written"),
        (["train", "--data", "captioned", "--clip", "x"], "--clip goes with --encoder clip, or with shards"),
        (["train", "--data", "captioned", "--encoder", "clip"], "name CLIP's files with --clip"),
        (["train", "--data", "captioned", "--min-side", "8"], "without --stream; name one, or keep to --min-side 0"),
        (["train", "--data", "cut"], "no readable shard"),
        (["prepare", "--data", "captioned"], "prepare needs"),
    ],
)
def test_mistakes_end_in_one_line(weights, tmp_path, monkeypatch, capsys, words, says):
    monkeypatch.chdir(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    header = {"config": json.dumps({"system": "jit_lab", "config": {}})}
    save_file({"x": torch.zeros(1)}, tmp_path / "jit.safetensors", metadata=header)
    (tmp_path / "bare").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "bare" / "a.png")
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "shard_00000.safetensors").write_bytes(weights.read_bytes()[:1000])
    if words[0] == "sample" and "--weights" not in words:
        words = [*words, "--weights", str(weights)]
    if words[0] == "train":
        words = [*words, "--steps", "1", "--out", "elsewhere"]
    capsys.readouterr()
    assert dit_t2i.main(words) == 2
    out = capsys.readouterr().err.rpartition("\r")[2]  # behind a progress bar that has wiped itself out
    assert out.startswith("error: ") and out.count("\n") == 1 and says in out


def test_published_checkpoint_loads_without_its_pickle(tmp_path):
    model = awake(in_channels=4, text_dim=768, latent_size=32, num_heads=2, head_dim=16)
    content = {"model": {}, "ema_model": model.state_dict(), "epoch": 3, "train_config": {"lr": 1e-4}}
    torch.save(content, tmp_path / "best.pt")
    loaded, config, header = dit_t2i.load_model(tmp_path / "best.pt", "cpu")
    z, text = torch.randn(1, 4, 32, 32), torch.randn(1, 7, 768)
    assert torch.equal(loaded(z, torch.tensor([0.5]), text), model(z, torch.tensor([0.5]), text))
    assert config.cfg == 4.0 and header["latent"] == [4, 32] and loaded.predict == "velocity"


def test_config_survives_its_checkpoint(weights):
    _, config, header = dit_t2i.load_model(weights, "cpu")
    assert {k: getattr(config, k) for k in TINY} == TINY
    assert dataclasses.asdict(config)["cfg"] == 3.0 and header["latent"] == [3, 8]


# ---- prepared shards ----


@pytest.fixture
def prepare(captioned, partners, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (captioned / "broken.png").write_bytes(b"no picture")
    (captioned / "broken.txt").write_text("nothing")
    words = [
        "prepare",
        "--data",
        str(captioned),
        "--out",
        "shards",
        "--vae",
        str(partners[0]),
        "--clip",
        str(partners[1]),
    ]
    words += ["--image-size", "16", "--shard", "8", "--batch-size", "3", "--device", "cpu", "--precision", "fp32"]
    return lambda *more: dit_t2i.main([*words, *more])


def test_prepared_shards_hold_what_the_encoders_say(prepare, partners, captioned, capsys):
    assert prepare() == 0
    out = capsys.readouterr().out
    assert "29 samples in shards" in out and "skipped 2" in out and "29.png: no caption" in out and "broken.png" in out
    data = dit_t2i.ShardSet("shards")
    assert len(data) == 29
    latents, text = data.batch([28, 0], common.Draw(2, 0))
    vae, clip = common.load_vae(partners[0]), dit_t2i.Clip(partners[1])
    for i, row in ((28, 0), (0, 1)):
        picture = torch.from_numpy(common.read_picture(captioned / f"{i:02d}.png", 16).copy()).permute(2, 0, 1)[None]
        assert torch.allclose(latents[row], vae.encode(picture / 127.5 - 1)[0].bfloat16().float(), atol=1e-2)
        assert torch.allclose(text[row], clip([data.caption(i)])[0].bfloat16().float(), atol=1e-2)
    assert (latents[0] - latents[1]).abs().max() > 0.01 and (text[0] - text[1]).abs().max() > 0.05
    assert torch.allclose(data.null, clip([""]).bfloat16().float(), atol=1e-2)
    ids = clip.tokenizer(["a cat"])
    assert torch.equal(clip(["a cat"]), clip.model(ids, mask_padding=True))
    assert not torch.equal(clip(["a cat"]), clip.model(ids))
    flipped, _ = dit_t2i.ShardSet("shards", flip=1.0).batch([28, 0], common.Draw(2, 0))
    assert torch.equal(flipped, latents.flip(-1))


def test_prepared_captions_are_those_that_sampling_makes(prepare, partners):
    """In float32, whatever the precision of the VAE: next to no number is rounded to another one."""
    assert prepare("--precision", "bf16") == 0
    data, clip = dit_t2i.ShardSet("shards"), dit_t2i.Clip(partners[1])
    _, text = data.batch(range(29), common.Draw(29, 0))
    expected = clip([data.caption(i) for i in range(29)]).bfloat16().float()
    assert (text != expected).float().mean() < 0.01


def test_prepare_goes_on_after_a_kill_with_nothing_done_twice(prepare, monkeypatch, tmp_path, capsys):
    saved = []

    def save(path, *arguments, honest=common.save_tensors):
        if len(saved) == 2:
            raise KeyboardInterrupt
        saved.append(path.name)
        honest(path, *arguments)

    monkeypatch.setattr(common, "save_tensors", save)
    assert prepare() == 130 and saved == ["shard_00000.safetensors", "shard_00001.safetensors"]
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "shards").iterdir()}
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    encoded = []

    def encode(self, x, honest=common.AutoencoderKL.encode):
        encoded.append(len(x))
        return honest(self, x)

    monkeypatch.setattr(common.AutoencoderKL, "encode", encode)
    assert prepare() == 0 and sum(encoded) == 29 - 16
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    assert len(dit_t2i.ShardSet("shards")) == 29
    assert prepare() == 0 and sum(encoded) == 29 - 16  # a finished folder is left as it is
    assert prepare("--image-size", "24") == 2
    shutil.copy("shards/shard_00001.safetensors", "shards/shard_00004.safetensors")  # as of a time with more pictures
    assert prepare() == 2 and "shard_00004.safetensors was made from other pictures" in capsys.readouterr().err


def test_prepare_tells_what_has_changed_since(prepare, captioned, capsys):
    def refused():
        return prepare() == 2 and "pictures, captions or tags have changed since shards" in capsys.readouterr().err

    assert prepare() == 0
    picture, caption = captioned / "03.png", captioned / "21.txt"
    before = picture.read_bytes()
    Image.effect_noise((8, 8), 50).save(picture)
    assert refused()
    picture.write_bytes(before)
    assert prepare() == 0
    caption.write_text("another tile")
    assert refused()


def test_prepare_looks_for_its_folder_before_it_encodes(prepare, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common.AutoencoderKL, "encode", lambda self, x: pytest.fail("encoded"))
    (tmp_path / "shards").write_text("a file")
    assert prepare() == 2 and "cannot write into shards" in capsys.readouterr().err


def other_clip(partners):
    """The folder of a CLIP with other weights."""
    folder = shutil.copytree(partners[1], partners[1].with_name("other-clip"))
    weights = load_file(folder / "model.safetensors")
    save_file({name: 2 * tensor for name, tensor in weights.items()}, folder / "model.safetensors")
    return folder


def test_training_and_sampling_from_shards(prepare, partners, tmp_path, monkeypatch, capsys):
    assert prepare() == 0
    words = ["train", "--preset", "paper", "--data", "shards", "--out", "run", "--epochs", "2", "--batch-size", "8"]
    words += ["--patch-size", "1", "--depth", "1", "--num-heads", "2", "--head-dim", "8", "--device", "cpu"]
    assert dit_t2i.main([*words, "--text-dim", "768"]) == 2 and "is 64 wide" in capsys.readouterr().err
    words += ["--text-dim", "64", "--precision", "fp32"]
    assert (
        dit_t2i.main([*words, "--clip", str(other_clip(partners))]) == 2
        and "not the weights" in capsys.readouterr().err
    )
    assert dit_t2i.main(words) == 0
    _, header = common.load_tensors(tmp_path / "run" / "model.safetensors")
    assert (
        header["config"]["image_size"] == 16 and header["config"]["encoder"] == "clip"
    )  # the shards', not the preset's
    assert dit_t2i.main([*words, "--epochs", "3", "--resume"]) == 0
    sampling = ["sample", "a red square", "--weights", "run/model.safetensors", "--steps", "2", "--num", "1"]
    assert dit_t2i.main([*sampling, "--clip", str(partners[1])]) == 2 and "--vae" in capsys.readouterr().err
    sampling += ["--vae", str(partners[0]), "--clip", str(partners[1])]
    assert dit_t2i.main([*sampling, "--size", "32", "--gif", "a.gif"]) == 0
    assert Image.open("samples/dit_t2i.png").size == (32, 32)
    tiles = []

    def decode_tiled(vae, latents, tile, honest=common.decode_tiled):
        tiles.append(tile)
        return honest(vae, latents, tile)

    monkeypatch.setattr(common, "decode_tiled", decode_tiled)
    assert dit_t2i.main([*sampling, "--tile", "32"]) == 0 and tiles == [32]
    # Another VAE of the same shape, and one with other channels.
    torch.manual_seed(1)
    other = tmp_path / "other.safetensors"
    save_file(common.AutoencoderKL(widths=(32, 32, 32, 32)).state_dict(), other)
    assert dit_t2i.main([*sampling, "--vae", str(other)]) == 2 and "not the weights" in capsys.readouterr().err
    save_file(common.AutoencoderKL(32, widths=(32, 32, 32, 32), batch_norm=True).state_dict(), other)
    assert dit_t2i.main([*sampling, "--vae", str(other)]) == 2 and "has 32 channels" in capsys.readouterr().err
    long = ["sample", "red " * 100, *sampling[2:]]
    assert dit_t2i.main(long) == 0 and "25 tokens" in capsys.readouterr().err


def test_shard_that_was_cut_short_is_named(prepare, tmp_path, capsys):
    assert prepare() == 0
    path = tmp_path / "shards" / "shard_00001.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(UserError, match="is no readable shard"):
        dit_t2i.ShardSet("shards")
    header = json.loads(safe_open(tmp_path / "shards" / "shard_00000.safetensors", "pt").metadata()["config"])
    short = {"latents": torch.zeros(3, 4, 2, 2), "text": torch.zeros(3, 77, 64), "null": torch.zeros(1, 77, 64)}
    common.save_tensors(path, short, header)
    with pytest.raises(UserError, match="disagree"):
        dit_t2i.ShardSet("shards")
