"""jit_lab.py against closed forms, scikit-image, the post's own code and naive loops."""

import argparse
import copy
import csv
import dataclasses
import math

import common
import jit_lab
from common import UserError
from jit_lab import Config, Dataset, JiT

import numpy as np
import pytest
import torch
from conftest import TINY, random_weights, read_fixture, shapes
from PIL import Image
from safetensors.torch import save_file
from skimage import color


def tiny_config(**changes):
    return Config(**(TINY | changes))


def tiny_model(**changes):
    return random_weights(jit_lab.build_model(tiny_config(**changes)), std=0.2)


def save_model(path, config):
    header = {"system": "jit_lab", "config": vars(config)}
    common.save_tensors(path, jit_lab.build_model(config).state_dict(), header)


def label(count=1):
    return torch.zeros(count, dtype=torch.long)


def random_rgb(count, size=16):
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)


# ---- few steps ----


def test_jumps_of_a_straight_way_all_have_its_velocity_and_cover_it():
    times = jit_lab.few_times(4)
    start, end = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    states = [(1 - t) * start + t * end for t in times]
    x_t, x_next, t, t_next, label = jit_lab.jumps(states)
    velocity = (x_next - x_t) / (t_next - t).view(-1, 1, 1, 1)
    assert torch.allclose(velocity, (end - start).repeat(7, 1, 1, 1), atol=1e-5)
    assert times[0] == 0 and times[-1] == 1 and times[1] < 0.25
    for k, steps in enumerate(jit_lab.FEW_STEPS):  # each picture's steps, one after the other, are those of the sampler
        wanted = torch.tensor(jit_lab.few_times(steps))
        for picture in range(2):
            of = [i for i in range(picture, 14, 2) if label[i] == k]
            assert torch.allclose(t[of], wanted[:-1]) and torch.allclose(t_next[of], wanted[1:])


def test_distilled_model_lands_near_the_end_of_the_way_that_it_was_shown(tmp_path, capsys):
    """The teacher's way in 8 steps bends (random weights); its own large Euler steps miss the end by far more. AdamW
    distills what Muon has trained."""
    teacher, config = tiny_model(), tiny_config(predict="v", data=("drawn",), optimizer="muon")
    common.save_tensors(tmp_path / "t.safetensors", teacher.state_dict(), {"system": "jit_lab", "config": vars(config)})
    words = ["--weights", tmp_path / "t.safetensors", "--out", tmp_path / "d.safetensors", "--device", "cpu"]
    assert jit_lab.main(["distill", *map(str, words), "--steps", "150", "--batch-size", "16", "--lr", "3e-3"]) == 0
    teacher, config = jit_lab.load_model(tmp_path / "t.safetensors", torch.device("cpu"))
    student, own = jit_lab.load_model(tmp_path / "d.safetensors", torch.device("cpu"))
    assert (config.optimizer, own.optimizer) == ("muon", "adamw")
    end = jit_lab.sample(teacher, config, 32, 200, seed=500, cfg=1.25)
    for steps in jit_lab.FEW_STEPS:
        off, before = (
            (jit_lab.sample(model, config, 32, steps, seed=500) - end).square().mean() for model in (student, teacher)
        )
        assert off < 0.5 * before, (steps, off, before)
    with pytest.raises(UserError, match="a distilled model takes 4, 2, 1"):
        jit_lab.sample(student, config, 1, 3)
    assert jit_lab.main(["distill", "--weights", str(tmp_path / "d.safetensors")]) == 2
    assert "is distilled already" in capsys.readouterr().err
    assert jit_lab.main(["sample", "--weights", str(tmp_path / "d.safetensors"), "--steps", "4", "--cfg", "2"]) == 2
    assert "has learned its guidance" in capsys.readouterr().err


# ---- the loss ----


@pytest.mark.parametrize("predict", ["x", "v", "eps"])
@pytest.mark.parametrize("loss", ["v", "x"])
def test_loss_is_zero_for_the_right_answer_and_only_for_it(predict, loss):
    config = tiny_config(predict=predict, loss=loss)
    data, noise, t = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8), torch.tensor([0.1, 0.4, 0.6, 0.9])
    x_t, mask = common.flow_point(noise, data, t), torch.ones(4, 3, 1, 1)
    right = {"x": data, "v": data - noise, "eps": noise}
    assert jit_lab.flow_loss(config, right[predict], x_t, data, t, mask).max() < 1e-8
    for wrong in [-right[predict], *(v for k, v in right.items() if k != predict)]:
        assert jit_lab.flow_loss(config, wrong, x_t, data, t, mask).min() > 1e-2


def test_velocity_loss_is_the_text_of_the_post_and_data_loss_its_code():
    x_0, x_1, x_hat = torch.randn(3, 4, 3, 8, 8).unbind(0)
    t, mask = torch.tensor([0.0, 0.3, 0.5, 0.8]), (torch.rand(4, 3, 1, 1) > 0.5).float()
    x_t, wide = common.flow_point(x_0, x_1, t), t.view(-1, 1, 1, 1)
    text = (((x_hat - x_t) / (1 - wide) - (x_1 - x_0)) ** 2 * mask).mean(dim=(1, 2, 3))
    code = (((x_hat - x_0) - (x_1 - x_0)) ** 2 * mask).mean(dim=(1, 2, 3))
    assert torch.allclose(jit_lab.flow_loss(tiny_config(loss="v"), x_hat, x_t, x_1, t, mask), text, rtol=1e-4)
    assert torch.allclose(jit_lab.flow_loss(tiny_config(loss="x"), x_hat, x_t, x_1, t, mask), code, rtol=1e-4)


def test_error_of_each_channel_is_measured_relative_to_its_noise():
    config = tiny_config(loss="x", lab_noise=(0.6, 0.3, 0.2))
    x, t, mask = torch.zeros(1, 3, 8, 8), torch.tensor([0.5]), torch.ones(1, 3, 1, 1)
    losses = [jit_lab.flow_loss(config, x + (torch.arange(3) == c).view(3, 1, 1), x, x, t, mask) for c in range(3)]
    assert torch.allclose(torch.cat(losses), torch.tensor([1.0, 4.0, 9.0]) / 3)


def test_training_times_follow_their_distribution():
    rng = common.BatchRng(20_000, 0)
    normal = torch.logit(jit_lab.training_times(tiny_config(time_mean=-0.8, time_std=0.6), rng))
    assert abs(normal.mean() + 0.8) < 0.02 and abs(normal.std() - 0.6) < 0.02
    flat = jit_lab.training_times(tiny_config(time="uniform"), rng)
    assert (torch.histc(flat, 10, 0, 1) / 2000 - 1).abs().max() < 0.1


# ---- the sampler ----


class Oracle(torch.nn.Module):
    """A network that always knows the data, answer(x_t, t, y), and outputs what config.predict asks for."""

    distilled = False

    def __init__(self, config, answer, num_classes=1):
        super().__init__()
        self.config, self.answer, self.num_classes = config, answer, num_classes
        self.anchor = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x_t, t, y, skip=None):
        data = self.answer(x_t, t, y)
        return {"x": data, "v": (data - x_t) / (1 - t), "eps": (x_t - t * data) / (1 - t)}[self.config.predict]


@pytest.mark.parametrize(
    "predict, solver, steps", [("x", "euler", 1), ("x", "euler", 200), ("v", "heun", 20), ("eps", "dpm", 20)]
)
def test_exact_velocity_of_a_point_leads_to_the_point(predict, solver, steps):
    config = tiny_config(predict=predict)
    data = jit_lab.rgb_to_lab(torch.rand(1, 3, 16, 16))
    model = Oracle(config, lambda x_t, t, y: data.expand_as(x_t))
    rgb = jit_lab.sample(model, config, num=2, steps=steps, solver=solver, precision="fp32")
    assert (rgb - jit_lab.lab_to_rgb(data)).abs().max() < 2e-3


def test_time_0_is_the_noise_of_the_seed_and_time_1_the_data():
    config = tiny_config(lab_noise=(0.6, 0.3, 0.2), noise_scale=2.0)
    data, states = torch.full((1, 3, 16, 16), 0.1), []
    model = Oracle(config, lambda x_t, t, y: data.expand_as(x_t))
    jit_lab.sample(model, config, 1, 10, seed=7, precision="fp32", callback=lambda x, t: states.append((t, x)))
    assert [round(t, 6) for t, _ in states] == [i / 10 for i in range(11)]
    noise = torch.tensor([1.2, 0.6, 0.4]).view(3, 1, 1) * common.noise_for([7], (3, 16, 16), "cpu")
    for t, x in states:
        assert torch.allclose(x, (1 - t) * noise + t * data, atol=1e-4)


def test_guidance_1_is_conditional_0_is_unconditional_and_3_goes_beyond():
    config = tiny_config(space="rgb")
    levels = torch.tensor([0.1, 0.3, 0.2])  # of labels 0 and 1 and of the null label
    model = Oracle(config, lambda x_t, t, y: levels[y].view(-1, 1, 1, 1).expand_as(x_t), num_classes=2)

    def level(**guidance):
        return (jit_lab.sample(model, config, 1, 4, precision="fp32", **guidance) * 2 - 1).mean().item()

    assert level(label=0) == pytest.approx(0.1, abs=1e-5)
    assert level(label=1, cfg=1) == pytest.approx(0.3, abs=1e-5)
    assert level(label=1, cfg=0) == pytest.approx(0.2, abs=1e-5)
    assert level(label=1, cfg=3) == pytest.approx(0.2 + 3 * (0.3 - 0.2), abs=1e-5)


def test_guidance_of_one_class_leads_away_from_the_model_without_its_second_last_block():
    model, config, t = tiny_model(depth=3), tiny_config(depth=3), 0.3
    worse, x_t = copy.deepcopy(model), common.noise_for([0, 1], (3, 16, 16), "cpu")
    del worse.blocks[1]
    full, less = (net(x_t, t, label(2)) for net in (model, worse))
    assert (full - less).abs().max() > 0.01
    for cfg in (1, 1.5, 3):
        expected = (1 - cfg) * less + cfg * full
        assert torch.allclose(jit_lab.guided_data(model, config, x_t, t, 0, cfg), expected, atol=1e-5)
    ours = jit_lab.sample(model, dataclasses.replace(config, cfg=3.0), 1, 2)  # the weights' guidance is the default
    assert torch.equal(ours, jit_lab.sample(model, config, 1, 2, cfg=3.0))
    assert not torch.equal(ours, jit_lab.sample(model, config, 1, 2))


def test_picture_depends_on_its_seed_only():
    model, config = tiny_model(), tiny_config()
    together = jit_lab.sample(model, config, 5, 3, seed=10, precision="fp32")
    apart = jit_lab.sample(model, config, 3, 3, seed=12, batch_size=2, precision="fp32")
    assert torch.allclose(together[2:], apart, atol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-2)


# ---- the model ----


def test_paper_preset_is_the_model_and_the_training_of_the_post():
    config = common.make_config(Config, {"preset": "paper"}, jit_lab.PRESETS)
    with torch.device("meta"):
        model = jit_lab.build_model(config)
    assert shapes(model.state_dict()) == read_fixture("jit_seed")
    assert sum(p.numel() for p in model.parameters()) == 129_993_264
    assert config.batch_size == 256 and config.grad_accum == 4 and config.steps * 256 // 10_000 == 1280


def test_state_dict_has_the_names_and_shapes_of_the_official_jit():
    with torch.device("meta"):
        model = JiT(256, 16, num_classes=1000, in_context_len=32, in_context_start=4)
    assert shapes(model.state_dict()) == read_fixture("jit_b16_256")


def test_new_block_is_the_identity_and_a_new_model_outputs_zero():
    model = jit_lab.build_model(tiny_config())
    x, rope = torch.randn(2, 16, 32), common.rope_2d(torch.cartesian_prod(torch.arange(4), torch.arange(4)), 16)
    assert torch.equal(model.blocks[0](x, torch.randn(2, 32), rope), x)
    assert (model(torch.randn(2, 3, 16, 16), 0.3, label(2)) == 0).all()


def test_place_of_a_crop_enters_through_the_absolute_embedding_and_not_through_rope():
    model, x = tiny_model(), torch.randn(2, 3, 8, 8)
    here, there = model(x, 0.5, label(2), 0, 0), model(x, 0.5, label(2), 2, 1)
    assert (here - there).abs().max() > 1e-2
    # With the slice of (2, 1) moved to (0, 0), the two calls differ in RoPE only.
    grid = model.pos_embed.data.view(4, 4, -1)
    grid[:2, :2] = grid[2:4, 1:3].clone()
    assert (model(x, 0.5, label(2), 0, 0) - there).abs().max() < 1e-5


@pytest.mark.parametrize("side, top, left", [(16, 1, 0), (16, 0, 1), (10, 0, 0), (20, 0, 0), (8, -1, 0), (8, 0, -1)])
def test_picture_that_does_not_fit_the_grid_is_refused(side, top, left):
    with pytest.raises(ValueError, match="do not fit a grid of 4 x 4 patches of 4"):
        jit_lab.build_model(tiny_config())(torch.randn(1, 3, side, side), 0.5, label(), top, left)


# ---- colour and data ----


def test_lab_equals_scikit_image_and_has_an_inverse():
    steps = torch.linspace(0, 1, 17)
    cube = torch.cartesian_prod(steps, steps, steps).T.reshape(1, 3, 17, 289)  # all of RGB, black and white included
    lab = jit_lab.rgb_to_lab(cube)
    ours = torch.stack([(lab[0, 0] + 1) * 50, lab[0, 1] * 128, lab[0, 2] * 128], -1)
    assert np.abs(ours.numpy() - color.rgb2lab(cube[0].permute(1, 2, 0).numpy())).max() < 1e-3
    assert (jit_lab.lab_to_rgb(lab) - cube).abs().max() < 1e-3
    grey = cube[:, :1].expand_as(cube)
    assert jit_lab.rgb_to_lab(grey)[:, 1:].abs().max() < 1e-4


def test_lab_outside_the_gamut_equals_scikit_image():
    lab = torch.rand(1, 3, 40, 40) * 2 - 1
    scaled = torch.stack([(lab[0, 0] + 1) * 50, lab[0, 1] * 128, lab[0, 2] * 128], -1).double().numpy()
    with pytest.warns(UserWarning, match="negative Z"):
        theirs = color.lab2rgb(scaled)
    assert np.abs(jit_lab.lab_to_rgb(lab)[0].permute(1, 2, 0).numpy() - theirs).max() < 1e-3


def test_monochrome_pictures_send_no_gradient_into_chroma_and_all_of_it_into_lightness():
    config = tiny_config(color_fraction=0.5, full_image_prob=1.0, batch_size=32)
    data = Dataset(config, random_rgb(40), torch.arange(40) < 20)
    x, mask, *_ = data.batch(0)
    grey = (x[:, 1:].abs().amax(dim=(1, 2, 3)) == 0).view(-1)
    assert 2 < grey.sum() < 30
    output = torch.randn_like(x, requires_grad=True)
    noise, t = torch.randn_like(x), torch.full((32,), 0.5)
    jit_lab.flow_loss(config, output, common.flow_point(noise, x, t), x, t, mask).sum().backward()
    assert (output.grad[grey][:, 1:] == 0).all() and (output.grad[grey][:, :1] != 0).all()
    assert (output.grad[~grey] != 0).all()


def test_a_part_keeps_its_colour_by_seed_and_grey_files_are_recognised(folder):
    def in_color(**changes):
        return jit_lab.load_data(tiny_config(data=(str(folder),), **changes), "cpu")[0].in_color

    everything = in_color(color_fraction=1.0)
    assert everything.tolist() == [i % 4 != 0 for i in range(24)]
    half = in_color(color_fraction=0.5)
    assert torch.equal(half, in_color(color_fraction=0.5)) and 0 < half.sum() <= 12
    assert not torch.equal(half, in_color(color_fraction=0.5, seed=1))
    assert not half[~everything].any()


def test_without_any_colour_zero_chroma_is_learned():
    x, mask, *_ = Dataset(tiny_config(batch_size=4), random_rgb(4), torch.zeros(4, dtype=torch.bool)).batch(0)
    assert (x[:, 1:] == 0).all() and (mask == 1).all()


def test_crops_are_those_of_the_posts_code():
    config = Config(patch_size=4)
    crops = [jit_lab.random_crop(config, common.generator(i)) for i in range(6000)]
    places = {side: {c[:2] for c in crops if c[2] == side} for side in (10, 16, 20)}
    assert {side: len(p) for side, p in places.items()} == {10: 121, 16: 25, 20: 1}
    assert abs(sum(c[2] == 20 for c in crops) / len(crops) - (0.2 + 0.8 / 3)) < 0.02


@pytest.mark.parametrize("space", ["lab", "rgb"])
def test_batch_holds_the_pixels_of_its_crop(space):
    config, rgb = tiny_config(space=space, crop_sizes=(0.5,), full_image_prob=0.0, batch_size=1), random_rgb(1)
    data, places = Dataset(config, rgb, torch.ones(1, dtype=torch.bool)), set()
    for step in range(40):
        x, _, top, left = data.batch(step)
        expected = rgb[:, :, top * 4 : top * 4 + 8, left * 4 : left * 4 + 8] / 255
        assert torch.allclose(jit_lab.to_rgb(config, x), expected, atol=1e-3)
        places.add((top, left))
    assert len(places) == 9


def test_pictures_in_colour_come_three_times_as_often():
    rgb = torch.zeros(100, 3, 16, 16, dtype=torch.uint8)
    rgb[:10, 0] = 255  # the ten in colour are red
    data = Dataset(tiny_config(batch_size=6000, full_image_prob=1.0), rgb, torch.arange(100) < 10)
    x, mask, *_ = data.batch(0)
    assert abs((x[:, 1, 0, 0] > 0.1).float().mean().item() - 30 / 120) < 0.03
    assert ((mask[:, 1, 0, 0] == 1) == (x[:, 1, 0, 0] > 0.1)).all()


# ---- published weights ----

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
    with torch.device("meta"):
        names = shapes(JiT().state_dict())
    weights = {name: 0.02 * torch.randn(shape) for name, shape in names.items()}  # a trained model's are not zero
    save_file(weights, "waifu_diffusion_1280_bs256.safetensors")
    noise = common.noise_for([3], (3, 80, 80), "cpu")
    monkeypatch.setattr(torch, "randn", lambda *a, **k: noise.clone())
    names = {"JiT": JiT, "torch": torch, "device": "cpu"}
    # Every line as printed, but two steps: fifty of the full-size model take half a minute.
    shorter = QUICK_INFERENCE.replace("range(50)", "range(2)").replace("step / 50", "step / 2")
    exec(shorter.replace("step/50", "step/2").replace("v / 50", "v / 2"), names)
    monkeypatch.undo()
    model, config = jit_lab.load_model(tmp_path / "waifu_diffusion_1280_bs256.safetensors", "cpu")
    assert config.space == "lab"
    ours = jit_lab.sample(model, config, num=1, steps=2, seed=3, precision="fp32")
    assert names["rgb"].shape == (80, 80, 3)
    assert (ours - jit_lab.lab_to_rgb(names["pred_x1"].clamp(-1, 1))).abs().max() < 1e-4
    assert (ours[0].permute(1, 2, 0) - torch.from_numpy(names["rgb"])).abs().max() < 2e-3


def test_official_checkpoint_loads_with_its_namespace_sizes_and_space(tmp_path):
    sizes = dict(input_size=16, patch_size=4, hidden_size=32, depth=12, num_heads=2, num_classes=7, bottleneck_dim=8)
    model = JiT(**sizes, in_context_len=3, in_context_start=4).eval()
    for p in model.parameters():
        p.data.normal_(std=0.2)
    state = {f"net.{k}": v for k, v in model.state_dict().items()}
    content = {"model": {}, "model_ema1": state, "model_ema2": {}, "epoch": 3, "args": argparse.Namespace(lr=1e-4)}
    torch.save(content, tmp_path / "jit.pth")
    loaded, config = jit_lab.load_model(tmp_path / "jit.pth", "cpu")
    x, y = torch.randn(1, 3, 16, 16), torch.tensor([6])
    assert torch.equal(loaded(x, 0.5, y), model(x, 0.5, y))
    assert (config.space, config.image_size, config.depth, config.num_heads) == ("rgb", 16, 12, 2)


@pytest.mark.parametrize(
    "header, message",
    [({"system": "dit_t2i"}, "checkpoint of dit_t2i"), (None, "not a readable checkpoint of a JiT")],
)
def test_checkpoint_of_another_model_is_refused(tmp_path, header, message):
    common.save_tensors(tmp_path / "model.safetensors", {"weight": torch.zeros(3)}, header)
    with pytest.raises(UserError, match=message):
        jit_lab.load_model(tmp_path, "cpu")


# ---- novelty ----


@pytest.fixture
def lpips_files(tmp_path):
    """(file of the trunk, file of the heads), the same random weights each time."""
    rng = torch.Generator().manual_seed(0)
    sizes = {0: (64, 3, 11, 11), 3: (192, 64, 5, 5), 6: (384, 192, 3, 3), 8: (256, 384, 3, 3), 10: (256, 256, 3, 3)}
    trunk = {"classifier.1.weight": torch.zeros(4, 4)}  # a real file has the classifier too
    for k, size in sizes.items():
        trunk[f"features.{k}.weight"] = torch.randn(size, generator=rng) / math.sqrt(math.prod(size[1:]))
        trunk[f"features.{k}.bias"] = torch.randn(size[0], generator=rng) * 0.1
    heads = {f"lin{k}.model.1.weight": torch.rand(1, s[0], 1, 1, generator=rng) for k, s in enumerate(sizes.values())}
    torch.save(trunk, tmp_path / "alexnet.pth")
    save_file(heads, tmp_path / "heads.safetensors")
    return tmp_path / "alexnet.pth", tmp_path / "heads.safetensors"


def test_lpips_equals_the_reference_package(lpips_files):
    """tests/fixtures/lpips.json: distances that the package lpips 0.1.4 gives for these weights and pictures."""
    lpips = common.Lpips.load(*lpips_files)
    x = torch.rand(4, 3, 80, 80, generator=torch.Generator().manual_seed(1))
    ours = (lpips(x[:2]) - lpips(x[2:])).square().sum(1)
    assert torch.allclose(ours, torch.tensor(read_fixture("lpips")["distances"]), rtol=1e-4)


def test_nearest_picture_is_the_one_that_a_loop_finds():
    metric, pictures = jit_lab.pixel_features, random_rgb(60, 40)
    queries = (pictures[[7, 31]] / 255 + 0.02 * torch.randn(2, 3, 40, 40)).clamp(0, 1)
    distances, index = jit_lab.nearest(metric, queries, pictures, batch_size=13)
    features = metric(pictures / 255)
    for i in range(2):
        each = [(metric(queries[i : i + 1])[0] - f).square().sum().item() for f in features]
        assert index[i] == int(np.argmin(each)) and distances[i].item() == pytest.approx(min(each), rel=1e-2)
    assert index.tolist() == [7, 31]
    others, found = jit_lab.nearest(metric, pictures[:20] / 255, pictures, skip_self=True, batch_size=13)
    assert (found != torch.arange(20)).all() and (others > distances.max()).all()


def test_pixel_distance_is_the_mean_over_three_scales():
    a, b = torch.rand(1, 3, 16, 16), torch.rand(1, 3, 16, 16)
    by_hand = 0
    for k in (1, 2, 4):
        small = [x.reshape(3, 16 // k, k, 16 // k, k).mean(dim=(2, 4)) for x in (a, b)]
        by_hand += (small[0] - small[1]).square().mean() / 3
    ours = (jit_lab.pixel_features(a) - jit_lab.pixel_features(b)).square().sum()
    assert torch.allclose(ours, by_hand, rtol=1e-4)


def test_novelty_names_the_training_picture_that_a_sample_copies(tmp_path, folder, lpips_files, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_model("model.safetensors", tiny_config(image_size=32, data=(str(folder),)))
    pictures = common.load_pictures([folder], 32).pictures
    monkeypatch.setattr(jit_lab, "sample", lambda *arguments: pictures[[5, 17, 2]] / 255)
    words = f"novelty --weights model.safetensors --num 3 --seed 4 --alexnet {lpips_files[0]} --lpips".split()
    assert jit_lab.main([*words, str(lpips_files[1])]) == 0
    rows = list(csv.DictReader((tmp_path / "samples" / "jit_lab_novelty.csv").open()))
    assert [(row["seed"], row["nearest"]) for row in rows] == [("4", "05.png"), ("5", "17.png"), ("6", "02.png")]
    assert all(float(row["distance"]) < 1e-4 for row in rows)
    assert "0 of 3 at 0.25 or more" in capsys.readouterr().out
    sheet = np.asarray(Image.open(tmp_path / "samples" / "jit_lab_novelty.png"))
    assert (sheet[:32, :32] == sheet[:32, 32:64]).all()  # the copy beside its original


@pytest.mark.parametrize(
    "words, message",
    [
        ("train --patch-size 5", "--patch-size 5 does not divide --image-size 16"),
        ("train --num-heads 5", "--hidden-size 32 must be a multiple of 4 x --num-heads 5"),
        ("train --lab-noise 1 1", "give three numbers"),
        ("sample --label 1", "labels 0 to 0"),
        ("novelty --alexnet a.pth", "LPIPS needs two files"),
        ("novelty", "the training pictures (gone) are not here"),
    ],
)
def test_mistakes_are_one_line_that_says_what_to_do(tmp_path, folder, words, message, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_model("model.safetensors", tiny_config(data=("gone",)))
    words = words.split()
    if words[0] == "train":
        small = "--image-size 16 --patch-size 4 --hidden-size 32 --steps 1".split()
        words = ["train", "--data", str(folder), *small, *words[1:]]
    else:
        words += ["--weights", "model.safetensors"]
    assert jit_lab.main(words) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error
