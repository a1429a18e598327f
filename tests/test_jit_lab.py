"""jit_lab.py against closed forms, golden files and naive loops."""

import argparse
import json
import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import FIXTURES, TINY
from safetensors.torch import save_file
from skimage import color

import common
import jit_lab
from common import UserError
from jit_lab import Config, Dataset, JiT


def sample(model, config, seeds, watch=None, **options):
    """jit_lab.sample for these consecutive seeds, in float32."""
    options = jit_lab.SampleConfig(num=len(seeds), seed=seeds[0], precision="fp32", **options)
    return jit_lab.sample(model, config, options, watch)


# ---- model ----


@pytest.mark.parametrize(
    "layout, arguments",
    [
        ("jit_seed", dict(input_size=80, patch_size=4, hidden_size=768, depth=12, num_heads=12, num_classes=1)),
        ("jit_b16_256", dict(input_size=256, patch_size=16, num_classes=1000, in_context_len=32, in_context_start=4)),
    ],
)
def test_state_dict_has_the_published_names_and_shapes(layout, arguments):
    with torch.device("meta"):
        model = JiT(**arguments)
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == json.loads(
        (FIXTURES / f"{layout}.json").read_text()
    )


def test_paper_preset_is_the_posts_model():
    config = common.make_config(Config, {"preset": "paper"}, jit_lab.PRESETS)
    with torch.device("meta"):
        model = jit_lab.build_model(config)
    assert sum(p.numel() for p in model.parameters()) == 129_993_264
    assert config.batch_size == 256 and config.grad_accum == 4 and config.steps * 256 // 10_000 == 1280


QUICK_INFERENCE = """
from safetensors.torch import load_file
from skimage import color
import numpy as np

model = JiT(input_size=80, patch_size=4, in_channels=3,
            hidden_size=768, depth=12, num_heads=12, num_classes=1)
state_dict = load_file("waifu_diffusion_1280_bs256.safetensors")
model.load_state_dict(state_dict)
model.to(device).eval()

# Generate
xt = torch.randn((1, 3, 80, 80), device=device)
y = torch.zeros(1, dtype=torch.long, device=device)
for step in range(50):
    t = torch.tensor(step / 50, device=device)
    pred_x1 = model(xt, t, y, top_idx=0, left_idx=0)
    v = (pred_x1 - xt) / max(1.0 - step/50, 1e-2)
    xt = xt + v / 50

# Convert CIELAB → RGB
lab = torch.clamp(pred_x1[0], -1, 1).cpu().numpy()
L = (lab[0] + 1) * 50
a = lab[1] * 128
b = lab[2] * 128
rgb = color.lab2rgb(np.stack([L, a, b], axis=-1))
"""


def test_the_posts_quick_inference_runs_as_printed_and_agrees_with_sample(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = JiT()
    with torch.no_grad():  # not zero, as a trained one
        model.final_layer.linear.weight.normal_(std=0.02)
    save_file(model.state_dict(), "waifu_diffusion_1280_bs256.safetensors")
    noise = common.noise_for([3], (3, 80, 80), "cpu")
    monkeypatch.setattr(torch, "randn", lambda *a, **k: noise.clone())
    space = {"JiT": JiT, "torch": torch, "device": "cpu"}
    # Every line as printed, but three steps: fifty of the full-size model's take half a minute.
    shorter = QUICK_INFERENCE.replace("range(50)", "range(3)").replace("step / 50", "step / 3")
    exec(shorter.replace("step/50", "step/3").replace("v / 50", "v / 3"), space)
    monkeypatch.undo()
    model, config = jit_lab.load_model(tmp_path / "waifu_diffusion_1280_bs256.safetensors", "cpu")
    assert config.space == "lab"
    ours = sample(model, config, [3], steps=3)
    assert space["rgb"].shape == (80, 80, 3) and np.isfinite(space["rgb"]).all()
    assert (ours - jit_lab.lab_to_rgb(space["pred_x1"].clamp(-1, 1))).abs().max() < 1e-4
    assert (ours[0].permute(1, 2, 0) - torch.from_numpy(space["rgb"])).abs().max() < 2e-3


def test_fresh_block_is_the_identity_and_fresh_model_says_zero(tiny_config):
    model = jit_lab.build_model(tiny_config())
    x, c = torch.randn(2, 16, 32), torch.randn(2, 32)
    rope = common.rope_2d(torch.arange(4), torch.arange(4), 16)
    assert torch.equal(model.blocks[0](x, c, rope), x)
    assert (model(torch.randn(2, 3, 16, 16), 0.3, torch.zeros(2, dtype=torch.long)) == 0).all()


def test_time_may_be_a_float_a_scalar_or_a_batch(tiny_config, awake_model):
    model, x, y = awake_model(tiny_config()), torch.randn(2, 3, 16, 16), torch.zeros(2, dtype=torch.long)
    outputs = [model(x, t, y) for t in (0.25, torch.tensor(0.25), torch.tensor([0.25, 0.25]))]
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
    assert not torch.allclose(outputs[0], model(x, 0.75, y))


def test_crop_learns_its_place_from_the_absolute_embedding_and_not_from_rope(tiny_config, awake_model):
    """FACT: RoPE is relative, so only the slice of pos_embed tells a crop where it lies."""
    model = awake_model(tiny_config())
    x, y = torch.randn(2, 3, 8, 8), torch.zeros(2, dtype=torch.long)
    here, there = model(x, 0.5, y, 0, 0), model(x, 0.5, y, 2, 1)
    assert (here - there).abs().max() > 1e-2
    # Put the slice of (2, 1) at (0, 0): what is left of the move is RoPE's, and that is nothing.
    with torch.no_grad():
        grid = model.pos_embed.view(4, 4, -1).clone()
        grid[:2, :2] = model.pos_embed.view(4, 4, -1)[2:4, 1:3]
        model.pos_embed.copy_(grid.view(1, 16, -1))
    assert (model(x, 0.5, y, 0, 0) - there).abs().max() < 1e-5


def test_eval_builds_no_graph_and_train_does(tiny_config):
    model = jit_lab.build_model(tiny_config())
    x, y = torch.randn(1, 3, 16, 16), torch.zeros(1, dtype=torch.long)
    assert not model.eval()(x, 0.5, y).requires_grad
    assert model.train()(x, 0.5, y).requires_grad and not model.pos_embed.requires_grad
    # The picture itself may still ask for a gradient, as classifier guidance does.
    assert model.eval()(x.requires_grad_(), 0.5, y).requires_grad


@pytest.mark.parametrize("side, top, left", [(16, 1, 0), (16, 0, 1), (10, 0, 0), (20, 0, 0), (8, -1, 0), (8, 0, -1)])
def test_picture_that_does_not_fit_the_grid_is_refused(tiny_config, side, top, left):
    model = jit_lab.build_model(tiny_config())
    with pytest.raises(ValueError, match="do not fit a grid of 4 x 4 patches of 4"):
        model(torch.randn(1, 3, side, side), 0.5, torch.zeros(1, dtype=torch.long), top, left)


# ---- colour ----


def test_lab_equals_scikit_image_and_comes_back():
    steps = torch.linspace(0, 1, 17)
    cube = torch.cartesian_prod(steps, steps, steps).T.reshape(1, 3, 17, 289)  # all of RGB, black and white included
    lab = jit_lab.rgb_to_lab(cube)
    theirs = color.rgb2lab(cube[0].permute(1, 2, 0).numpy())
    ours = torch.stack([(lab[0, 0] + 1) * 50, lab[0, 1] * 128, lab[0, 2] * 128], -1)
    assert np.abs(ours.numpy() - theirs).max() < 1e-3
    assert (jit_lab.lab_to_rgb(lab) - cube).abs().max() < 1e-3


def test_lab_outside_the_gamut_equals_scikit_image():
    lab = torch.rand(1, 3, 40, 40) * 2 - 1
    scaled = torch.stack([(lab[0, 0] + 1) * 50, lab[0, 1] * 128, lab[0, 2] * 128], -1).double().numpy()
    with pytest.warns(UserWarning, match="negative Z"):
        theirs = color.lab2rgb(scaled)
    assert np.abs(jit_lab.lab_to_rgb(lab)[0].permute(1, 2, 0).numpy() - theirs).max() < 1e-3


def test_grey_has_no_chroma():
    grey = torch.linspace(0, 1, 256).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert jit_lab.rgb_to_lab(grey)[:, 1:].abs().max() < 1e-4


def test_monochrome_pictures_send_no_gradient_into_chroma_and_full_gradient_into_lightness(tiny_config):
    config = tiny_config(color_fraction=0.5, full_image_prob=1.0, batch_size=32)
    rgb = torch.randint(0, 256, (40, 3, 16, 16), dtype=torch.uint8)
    data = Dataset(rgb, torch.arange(40) < 20)
    x, mask, *_ = jit_lab.draw_batch(config, data, 0, slice(None), "cpu")
    grey = (x[:, 1:].abs().amax(dim=(1, 2, 3)) == 0).view(-1)
    assert 2 < grey.sum() < 30
    output = torch.randn_like(x, requires_grad=True)
    noise, t = torch.randn_like(x), torch.full((32,), 0.5)
    jit_lab.flow_loss(config, output, common.flow_point(noise, x, t), x, t, mask).sum().backward()
    assert (output.grad[grey][:, 1:] == 0).all() and (output.grad[grey][:, :1] != 0).all()
    assert (output.grad[~grey] != 0).all()


def test_a_tenth_keeps_its_colour_by_seed_alone_and_grey_files_are_recognised(folder, tiny_config):
    def in_color(**changes):
        return jit_lab.load_dataset(tiny_config(data=str(folder), **changes))[0].in_color

    everything = in_color(color_fraction=1.0)
    assert everything.tolist() == [i % 4 != 0 for i in range(24)]
    half = in_color(color_fraction=0.5)
    assert torch.equal(half, in_color(color_fraction=0.5)) and 0 < half.sum() <= 12
    assert not torch.equal(half, in_color(color_fraction=0.5, seed=1))
    assert not half[~everything].any()


def test_set_without_any_colour_learns_to_have_none(tiny_config):
    data = Dataset(torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8), torch.zeros(4, dtype=torch.bool))
    x, mask, *_ = jit_lab.draw_batch(tiny_config(batch_size=4), data, 0, slice(None), "cpu")
    assert (x[:, 1:] == 0).all() and (mask == 1).all()


def test_rgb_space_is_what_the_file_shows(tiny_config):
    data = Dataset(torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8), torch.ones(1, dtype=torch.bool))
    config = tiny_config(space="rgb", batch_size=1, full_image_prob=1.0)
    x, *_ = jit_lab.draw_batch(config, data, 0, slice(None), "cpu")
    assert (jit_lab.to_rgb(config, x) - data.rgb / 255).abs().max() < 1e-3


# ---- crops and sampling of the data ----


def test_crops_are_what_the_posts_code_does():
    config = Config(patch_size=4)
    crops = [jit_lab.random_crop(config, common.generator(i)) for i in range(6000)]
    places = {side: {c[:2] for c in crops if c[2] == side} for side in (10, 16, 20)}
    assert {side: len(p) for side, p in places.items()} == {10: 121, 16: 25, 20: 1}
    full = sum(c[2] == 20 for c in crops) / len(crops)
    assert abs(full - (0.2 + 0.8 / 3)) < 0.02


def test_batch_holds_the_pixels_of_its_crop(tiny_config):
    config = tiny_config(color_fraction=1.0, crop_sizes=(0.5,), full_image_prob=0.0, batch_size=1)
    rgb = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8)
    data = Dataset(rgb, torch.ones(1, dtype=torch.bool))
    seen = set()
    for step in range(40):
        x, _, top, left = jit_lab.draw_batch(config, data, step, slice(None), "cpu")
        expected = rgb[:, :, top * 4 : top * 4 + 8, left * 4 : left * 4 + 8] / 255
        assert torch.allclose(jit_lab.lab_to_rgb(x), expected, atol=1e-3)
        seen.add((top, left))
    assert len(seen) == 9


def test_colour_is_drawn_three_times_as_often(tiny_config):
    rgb = torch.zeros(100, 3, 16, 16, dtype=torch.uint8)
    rgb[:10, 0] = 255  # the ten in colour are red
    data = Dataset(rgb, torch.arange(100) < 10)
    config = tiny_config(batch_size=6000, full_image_prob=1.0)
    x, mask, *_ = jit_lab.draw_batch(config, data, 0, slice(None), "cpu")
    share = (x[:, 1, 0, 0] > 0.1).float().mean().item()
    assert abs(share - 30 / 120) < 0.03
    assert ((mask[:, 1, 0, 0] == 1) == (x[:, 1, 0, 0] > 0.1)).all()


def test_draws_depend_on_seed_and_step_alone(folder, tiny_config):
    config = tiny_config(data=str(folder), batch_size=8)
    data, _ = jit_lab.load_dataset(config)
    first = jit_lab.draw_batch(config, data, 5, slice(None), "cpu")
    torch.rand(100)  # somebody else's randomness
    again = jit_lab.draw_batch(config, data, 5, slice(None), "cpu")
    assert torch.equal(first[0], again[0]) and first[2:] == again[2:]
    other = jit_lab.draw_batch(config, data, 6, slice(None), "cpu")[0]
    assert other.shape != first[0].shape or not torch.equal(other, first[0])
    parts = [jit_lab.draw_batch(config, data, 5, slice(part, None, 2), "cpu") for part in (0, 1)]
    assert all(part[2:] == first[2:] for part in parts)  # all passes and processes cut the same place
    assert all(torch.equal(part[0], first[0][k::2]) for k, part in enumerate(parts))


# ---- the flow ----


def exact_model(config, answer):
    """A `network` that always knows the data: what it outputs is what config.predict asks for."""

    class Oracle(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.anchor = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x_t, t, y, top_idx=0, left_idx=0):
            data = answer(x_t, t, y)
            if config.predict == "x":
                return data
            if config.predict == "v":
                return (data - x_t) / max(1 - t, 1e-9)
            return (x_t - t * data) / max(1 - t, 1e-9)

    return Oracle()


@pytest.mark.parametrize("predict", ["x", "v"])
@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("steps", [1, 50, 200])
def test_exact_velocity_of_a_point_leads_to_the_point(tiny_config, predict, solver, steps):
    config = tiny_config(predict=predict)
    data = jit_lab.rgb_to_lab(torch.rand(1, 3, 16, 16))
    model = exact_model(config, lambda x_t, t, y: data.expand_as(x_t))
    drawn = sample(model, config, [0, 1], steps=steps, solver=solver)
    assert (drawn - jit_lab.lab_to_rgb(data)).abs().max() < 2e-3


def test_exact_velocity_of_a_gaussian_integrates_to_the_gaussian(tiny_config):
    """Data N(m, s^2), noise N(0, 1): x_hat = m + s^2 t (x_t - t m) / ((1 - t)^2 + s^2 t^2). No network is involved."""
    mean, std = 0.3, 0.2
    config = tiny_config(space="rgb")

    def x_hat(x, t, y):
        return mean + std**2 * t * (x - t * mean) / ((1 - t) ** 2 + std**2 * t**2)

    drawn = sample(exact_model(config, x_hat), config, range(64), steps=100, solver="heun") * 2 - 1
    assert abs(drawn.mean().item() - mean) < 0.01 and abs(drawn.std().item() - std) < 0.01


def test_trajectory_starts_at_the_noise_of_the_seed_and_ends_at_the_data(tiny_config):
    config = tiny_config()
    data = torch.full((1, 3, 16, 16), 0.1)
    seen = []
    model = exact_model(config, lambda x_t, t, y: data.expand_as(x_t))
    sample(model, config, [7], lambda x, t: seen.append((t, x)), steps=10)
    assert [round(t, 6) for t, _ in seen] == [i / 10 for i in range(11)]
    noise = common.noise_for([7], (3, 16, 16), "cpu")
    for t, x in seen:
        assert torch.allclose(x, (1 - t) * noise + t * data, atol=1e-4)


@pytest.mark.parametrize("predict", ["x", "v", "eps"])
@pytest.mark.parametrize("loss", ["v", "x"])
def test_loss_is_zero_for_the_right_answer_and_only_for_it(tiny_config, predict, loss):
    config = tiny_config(predict=predict, loss=loss)
    data, noise, t = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8), torch.tensor([0.1, 0.4, 0.6, 0.9])
    x_t, mask = common.flow_point(noise, data, t), torch.ones(4, 3, 1, 1)
    right = {"x": data, "v": data - noise, "eps": noise}
    assert jit_lab.flow_loss(config, right[predict], x_t, data, t, mask).max() < 1e-8
    for wrong in [-right[predict], *(v for k, v in right.items() if k != predict)]:
        assert jit_lab.flow_loss(config, wrong, x_t, data, t, mask).min() > 1e-2


def test_velocity_loss_is_the_text_of_the_post_and_data_loss_its_code(tiny_config):
    x_0, x_1, x_hat = torch.randn(3, 4, 3, 8, 8).unbind(0)
    t, mask = torch.tensor([0.0, 0.3, 0.5, 0.8]), (torch.rand(4, 3, 1, 1) > 0.5).float()
    x_t, wide = common.flow_point(x_0, x_1, t), t.view(-1, 1, 1, 1)
    text = (((x_hat - x_t) / (1 - wide) - (x_1 - x_0)) ** 2 * mask).mean(dim=(1, 2, 3))
    code = (((x_hat - x_0) - (x_1 - x_0)) ** 2 * mask).mean(dim=(1, 2, 3))
    assert torch.allclose(jit_lab.flow_loss(tiny_config(loss="v"), x_hat, x_t, x_1, t, mask), text, rtol=1e-4)
    assert torch.allclose(jit_lab.flow_loss(tiny_config(loss="x"), x_hat, x_t, x_1, t, mask), code, rtol=1e-4)


def test_training_times_follow_their_law(tiny_config):
    normal = torch.logit(jit_lab.draw_times(tiny_config(time_mean=-0.8, time_std=0.6), common.Draw(20_000, 0)))
    assert abs(normal.mean() + 0.8) < 0.02 and abs(normal.std() - 0.6) < 0.02
    flat = jit_lab.draw_times(tiny_config(time="uniform"), common.Draw(20_000, 0))
    assert (torch.histc(flat, 10, 0, 1) / 2000 - 1).abs().max() < 0.1


def test_guidance_one_is_conditional_zero_is_not_and_more_leads_further(tiny_config):
    config = tiny_config(num_classes=2, space="rgb")
    model = exact_model(config, lambda x_t, t, y: torch.tensor([0.1, 0.3, 0.2])[y].view(-1, 1, 1, 1).expand_as(x_t))

    def drawn(cfg, label=1):
        return (sample(model, config, [0], steps=4, cfg=cfg, label=label) * 2 - 1).mean().item()

    assert drawn(1) == pytest.approx(0.3, abs=1e-5)  # the label's own
    assert drawn(0) == pytest.approx(0.2, abs=1e-5)  # row 2, the null label
    assert drawn(3) == pytest.approx(0.2 + 3 * (0.3 - 0.2), abs=1e-5)
    assert drawn(1, label=0) == pytest.approx(0.1, abs=1e-5)


def test_picture_depends_on_its_seed_alone(tiny_config, awake_model):
    config = tiny_config()
    model = awake_model(config)
    together = sample(model, config, range(10, 15), steps=3, batch_size=5)
    apart = sample(model, config, range(12, 15), steps=3, batch_size=2)
    assert torch.allclose(together[2:], apart, atol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-2)


def test_clamp_keeps_x_hat_in_range(tiny_config):
    config = tiny_config(space="rgb")
    model = exact_model(config, lambda x_t, t, y: torch.full_like(x_t, 3.0))
    seen = []
    sample(model, config, [0], lambda x, t: seen.append(x), steps=2, clamp=True)
    assert (seen[-1] == 1).all()


def test_clamp_keeps_the_guided_x_hat_in_range_too(tiny_config):
    """1 with the label and 0.5 without come to 2 where guidance is 3, which is out of range, as neither of them is."""
    config = tiny_config(space="rgb")
    model = exact_model(config, lambda x_t, t, y: (0.5 + 0.5 * (y == 0)).view(-1, 1, 1, 1).expand_as(x_t))
    for clamp, end in ((False, 2.0), (True, 1.0)):
        seen = []
        sample(model, config, [0], lambda x, t, seen=seen: seen.append(x), steps=2, cfg=3.0, clamp=clamp)
        assert torch.allclose(seen[-1], torch.full_like(seen[-1], end), atol=1e-6)


def test_eps_holds_every_step_back_but_the_last(tiny_config):
    """Where 1 - t counts as 1, a quarter of the way is a quarter of what is left."""
    config = tiny_config(space="rgb", eps_sample=1.0)
    model = exact_model(config, lambda x_t, t, y: torch.ones_like(x_t))
    seen = []
    sample(model, config, [0], lambda x, t: seen.append(x), steps=4)
    for k in range(4):
        assert torch.allclose(1 - seen[k], 0.75**k * (1 - seen[0]), atol=1e-6)
    assert torch.allclose(seen[4], torch.ones_like(seen[4]), atol=1e-6)


# ---- published weights ----


def test_config_is_recovered_from_a_bare_state_dict():
    made = dict(TINY, num_classes=7, in_context_len=3, depth=12, hidden_size=32, num_heads=2)
    config = jit_lab.config_of_weights(jit_lab.build_model(Config(**made)).state_dict())
    assert {k: getattr(config, k) for k in made} == made
    assert config.in_context_start == 4 and config.space == "rgb"


def test_official_checkpoint_loads_with_its_namespace(tmp_path, tiny_config, awake_model):
    model = awake_model(tiny_config())
    state = {f"net.{k}": v for k, v in model.state_dict().items()}
    content = {"model": {}, "model_ema1": state, "model_ema2": {}, "epoch": 3, "args": argparse.Namespace(lr=1e-4)}
    torch.save(content, tmp_path / "jit.pth")
    loaded, _ = jit_lab.load_model(tmp_path / "jit.pth", "cpu")
    x, y = torch.randn(1, 3, 16, 16), torch.zeros(1, dtype=torch.long)
    assert torch.equal(loaded(x, 0.5, y), model(x, 0.5, y))


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("name", ["evil.safetensors", "evil.pth", "evil.bin"])
def test_malicious_pickle_does_not_run(tmp_path, name):
    (tmp_path / name).write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    with pytest.raises(UserError, match="not a readable weight file"):
        jit_lab.load_model(tmp_path / name, "cpu")
    torch.save({"model": Bomb(tmp_path / "ran")}, tmp_path / name)
    with pytest.raises(UserError, match="not a readable weight file"):
        jit_lab.load_model(tmp_path / name, "cpu")
    assert not (tmp_path / "ran").exists()


def test_checkpoint_that_does_not_fit_is_named(tmp_path, tiny_config):
    config = tiny_config()
    header = {"system": "jit_lab", "step": 0, "config": vars(config)}
    weights = jit_lab.build_model(config).state_dict()
    path = tmp_path / "model.safetensors"

    def message(weights, header=header):
        common.save_tensors(path, weights, header)
        with pytest.raises(UserError) as problem:
            jit_lab.load_model(path, "cpu")
        return str(problem.value)

    assert "blocks.0.norm1.weight is missing" in message(
        {k: v for k, v in weights.items() if k != "blocks.0.norm1.weight"}
    )
    assert "is (5,), not (32,)" in message(weights | {"blocks.0.norm1.weight": torch.zeros(5)})
    assert "checkpoint of dit_t2i" in message(weights, header | {"system": "dit_t2i"})
    assert "no JiT checkpoint" in message({"weight": torch.zeros(3)}, None)
    common.save_tensors(path, weights, header)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="not a readable weight file"):
        jit_lab.load_model(path, "cpu")


# ---- novelty ----


def naive_lpips(a, b, trunk, heads):
    """LPIPS from the paper's formula, one layer and one distance at a time."""
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    a, b = (((x * 2 - 1).permute(0, 2, 3, 1) - shift) / scale for x in (a, b))
    a, b = a.permute(0, 3, 1, 2), b.permute(0, 3, 1, 2)
    total = 0
    layers = [(0, 4, 2, False), (3, 1, 2, True), (6, 1, 1, True), (8, 1, 1, False), (10, 1, 1, False)]
    for k, (index, stride, padding, pool) in enumerate(layers):
        weight, bias = trunk[f"features.{index}.weight"], trunk[f"features.{index}.bias"]
        if pool:
            a, b = F.max_pool2d(a, 3, 2), F.max_pool2d(b, 3, 2)
        a, b = (F.relu(F.conv2d(x, weight, bias, stride, padding)) for x in (a, b))
        unit = [x / (x.norm(dim=1, keepdim=True) + 1e-10) for x in (a, b)]
        total = total + F.conv2d((unit[0] - unit[1]) ** 2, heads[f"lin{k}.model.1.weight"]).mean(dim=(1, 2, 3))
    return total


def lpips_files(tmp_path):
    draw = torch.Generator().manual_seed(0)
    sizes = {0: (64, 3, 11, 11), 3: (192, 64, 5, 5), 6: (384, 192, 3, 3), 8: (256, 384, 3, 3), 10: (256, 256, 3, 3)}
    trunk = {"classifier.1.weight": torch.zeros(4, 4)}  # a real file has the classifier too
    for k, size in sizes.items():
        trunk[f"features.{k}.weight"] = torch.randn(size, generator=draw) / math.sqrt(math.prod(size[1:]))
        trunk[f"features.{k}.bias"] = torch.randn(size[0], generator=draw) * 0.1
    heads = {f"lin{k}.model.1.weight": torch.rand(1, s[0], 1, 1, generator=draw) for k, s in enumerate(sizes.values())}
    torch.save(trunk, tmp_path / "alexnet.pth")
    save_file(heads, tmp_path / "heads.safetensors")
    return trunk, heads, (tmp_path / "alexnet.pth", tmp_path / "heads.safetensors")


def test_files_that_are_not_those_of_lpips_are_named(tmp_path):
    _, heads, files = lpips_files(tmp_path)
    del heads["lin3.model.1.weight"]
    save_file(heads, files[1])
    with pytest.raises(UserError, match=r"heads.safetensors holds no lin3\.model\.1\.weight; it should be"):
        jit_lab.Lpips.load(*files)


def test_lpips_equals_its_formula(tmp_path):
    trunk, heads, files = lpips_files(tmp_path)
    metric = jit_lab.Lpips.load(*files)
    a, b = torch.rand(3, 3, 80, 80), torch.rand(3, 3, 80, 80)
    with torch.no_grad():
        ours = (metric.describe(a) - metric.describe(b)).square().sum(1)
    assert torch.allclose(ours, naive_lpips(a, b, trunk, heads), rtol=1e-4)


def test_lpips_equals_the_reference_package(tmp_path):
    """tests/fixtures/lpips.json: distances that the package lpips 0.1.4 gives for these weights and pictures."""
    _, _, files = lpips_files(tmp_path)
    golden = json.loads((FIXTURES / "lpips.json").read_text())
    x = torch.rand(4, 3, 80, 80, generator=torch.Generator().manual_seed(1))
    metric = jit_lab.Lpips.load(*files)
    with torch.no_grad():
        ours = (metric.describe(x[:2]) - metric.describe(x[2:])).square().sum(1)
    assert torch.allclose(ours, torch.tensor(golden["distances"]), rtol=1e-4)


@pytest.mark.parametrize("kind", ["pixels", "lpips"])
def test_nearest_picture_is_the_one_a_loop_finds(tmp_path, kind):
    metric = jit_lab.MultiscalePixels() if kind == "pixels" else jit_lab.Lpips.load(*lpips_files(tmp_path)[2])
    pictures = torch.randint(0, 256, (60, 3, 40, 40), dtype=torch.uint8)
    queries = (pictures[[7, 31]] / 255 + 0.02 * torch.randn(2, 3, 40, 40)).clamp(0, 1)
    distances, index = jit_lab.nearest(metric, queries, pictures, batch_size=13)
    with torch.no_grad():
        described = [metric.describe(p[None] / 255)[0] for p in pictures]
        for i in range(2):
            each = [(metric.describe(queries[i : i + 1])[0] - d).square().sum().item() for d in described]
            assert index[i] == int(np.argmin(each)) and distances[i].item() == pytest.approx(min(each), rel=1e-2)
    assert index.tolist() == [7, 31]
    itself, found = jit_lab.nearest(metric, pictures[:20] / 255, pictures, skip_self=True, batch_size=13)
    assert (found != torch.arange(20)).all() and (itself > distances.max()).all()


def test_multiscale_pixel_distance_is_the_mean_over_three_scales():
    a, b = torch.rand(1, 3, 16, 16), torch.rand(1, 3, 16, 16)
    by_hand = 0
    for k in (1, 2, 4):
        small = [x.reshape(3, 16 // k, k, 16 // k, k).mean(dim=(2, 4)) for x in (a, b)]
        by_hand += (small[0] - small[1]).square().mean() / 3
    metric = jit_lab.MultiscalePixels()
    assert torch.allclose((metric.describe(a) - metric.describe(b)).square().sum(), by_hand, rtol=1e-4)
