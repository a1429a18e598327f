"""common.py: the maths against closed forms, the plumbing against broken files."""

import io
import math
import os
import re
import warnings
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import common
from common import UserError

# ---- positions ----


def test_timestep_embedding_is_cosines_then_sines():
    t = torch.tensor([0.0, 0.3, 1.0])
    ours = common.timestep_embedding(t, 256)
    for b in range(3):
        for i in range(128):
            angle = t[b].item() * 10_000 ** (-i / 128)
            assert ours[b, i].item() == pytest.approx(math.cos(angle), abs=1e-6)
            assert ours[b, 128 + i].item() == pytest.approx(math.sin(angle), abs=1e-6)


def test_timestep_embedding_stays_exact_under_autocast():
    t = torch.tensor([999.0])
    exact = common.timestep_embedding(t, 256)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(common.timestep_embedding(t, 256), exact)


def test_rope_turns_each_pair_by_its_row_or_column():
    """Against complex multiplication, one token and one pair at a time: a dropped or swapped axis fails."""
    x = torch.randn(1, 6, 8)
    apart = common.unpair(x.transpose(0, -1), 8).transpose(0, -1)
    assert apart[0, 0].tolist() == x[0, 0, [0, 2, 4, 6, 1, 3, 5, 7]].tolist()
    ours = common.apply_rope(apart, common.rope_2d(torch.arange(3, 5), torch.arange(1, 4), 8))
    for n, (row, column) in enumerate((r, c) for r in (3, 4) for c in (1, 2, 3)):
        for pair in range(4):
            position = row if pair < 2 else column
            angle = position * 10_000 ** (-(pair % 2) / 2)
            turned = complex(*x[0, n, 2 * pair : 2 * pair + 2].tolist()) * complex(math.cos(angle), math.sin(angle))
            assert ours[0, n, pair].item() == pytest.approx(turned.real, abs=1e-5)
            assert ours[0, n, pair + 4].item() == pytest.approx(turned.imag, abs=1e-5)


@pytest.mark.parametrize("shift", [(5, 0), (0, 5), (7, 3)])
def test_rope_scores_depend_on_relative_position_only(shift):
    q, k = torch.randn(2, 12, 16).unbind(0)

    def scores(down, right):
        rope = common.rope_2d(torch.arange(3) + down, torch.arange(4) + right, 16)
        return common.apply_rope(q, rope) @ common.apply_rope(k, rope).T

    assert torch.allclose(scores(0, 0), scores(*shift), atol=1e-4)
    still = common.rope_2d(torch.arange(3), torch.arange(4), 16)
    moved = common.rope_2d(torch.arange(3) + shift[0], torch.arange(4) + shift[1], 16)
    one_sided = common.apply_rope(q, moved) @ common.apply_rope(k, still).T
    assert (one_sided - scores(0, 0)).abs().max() > 0.1


def test_plain_attention_equals_the_fused_kernel():
    q, k, v = torch.randn(3, 2, 4, 100, 32).bfloat16().unbind(0)
    reference = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
    assert (common.attention(q, k, v).float() - reference).abs().max() < 0.03
    assert (common.attention(q.float(), k.float(), v.float()) - reference).abs().max() < 1e-5


# ---- flow ----


def test_flow_line_goes_from_start_to_end():
    start, end = torch.randn(2, 3, 3, 4, 4).unbind(0)
    x = common.flow_point(start, end, torch.tensor([0.0, 0.25, 1.0]))
    assert torch.equal(x[0], start[0]) and torch.equal(x[2], end[2])
    assert torch.allclose(x[1], 0.75 * start[1] + 0.25 * end[1])


@pytest.mark.parametrize("backwards", [False, True])
def test_solvers_converge_at_their_order(backwards):
    """dx/dt = x has x(1) = e x(0): halving the step halves Euler's error and quarters Heun's, both ways in time."""
    expected = math.exp(-1.0 if backwards else 1.0)

    def error(solver, steps):
        times = [i / steps for i in range(steps + 1)]
        x = solver(lambda x, t: x, torch.ones(1, dtype=torch.float64), times[::-1] if backwards else times)
        return abs(x.item() - expected)

    assert error(common.flow_euler, 100) / error(common.flow_euler, 200) == pytest.approx(2, rel=0.05)
    # Heun ends on one step of Euler's, which is of second order too when it is taken once.
    assert error(common.flow_heun, 100) / error(common.flow_heun, 200) == pytest.approx(4, rel=0.05)
    assert error(common.flow_heun, 100) < error(common.flow_euler, 100) / 10


def test_solver_asks_for_the_velocity_at_the_right_times():
    asked = []
    common.flow_euler(lambda x, t: asked.append(t) or torch.zeros(1), torch.zeros(1), [0.0, 0.5, 1.0])
    assert asked == [0.0, 0.5]


# ---- optimisation ----


def test_learning_rate_rises_then_falls():
    def factor(progress, warmup=0.1, decay="cosine", step=0):
        return common.lr_factor(progress, step, warmup, decay)

    assert factor(0.0) == 0 and factor(0.05) == pytest.approx(0.5)
    assert factor(0.1) == pytest.approx(1) and factor(0.55) == pytest.approx(0.5)
    assert factor(1.0) == pytest.approx(0, abs=1e-12)
    assert factor(0.25, decay="linear") == pytest.approx(0.75 / 0.9) and factor(1.0, decay="linear") == 0
    assert factor(0.9, decay="none") == 1 and factor(0.0, 0.0) == 1
    # From 1 on, the warm-up counts steps.
    assert [factor(0.0, 4, "none", step) for step in range(5)] == [0.25, 0.5, 0.75, 1, 1]
    # Where the rise ends is not known beforehand then, so the fall has been running from the start, and takes over.
    whole = [factor(step / 20, 10, "linear", step) for step in range(21)]
    assert whole == pytest.approx([min((step + 1) / 10, 1 - step / 20) for step in range(21)])


def test_muon_makes_all_directions_of_a_step_equally_long():
    """Against U V^T of the gradient's singular value decomposition, from which its five iterations stay within a third;
    what is no matrix, AdamW steps."""
    torch.manual_seed(0)
    model = torch.nn.Linear(24, 40)
    twin = torch.nn.Linear(24, 40)
    twin.load_state_dict(model.state_dict())
    before = model.weight.detach().clone()
    optimizer = common.Muon([model.weight], [model.bias], 0.01, (0.9, 0.95), 0.0, True)
    adamw = torch.optim.AdamW([twin.bias], 0.01, (0.9, 0.95), weight_decay=0.0)
    for part in (optimizer, adamw):
        part.param_groups[0]["lr"] /= 2  # as a warm-up would
    x = torch.randn(64, 24) * torch.logspace(0, -1, 24)  # a gradient with long directions and short ones
    for net in (model, twin):
        net(x).square().mean().backward()
    u, lengths, v = torch.linalg.svd(model.weight.grad, full_matrices=False)
    optimizer.step()
    adamw.step()
    step = (before - model.weight.detach()) / (0.005 * 0.2 * 40**0.5)
    assert lengths[0] / lengths[-1] > 10
    assert (u.T @ step @ v.T - torch.eye(24)).abs().max() < 0.35
    assert torch.allclose(model.bias, twin.bias, atol=1e-7)


def test_ema_is_the_weighted_sum_it_claims_to_be():
    """Of weights that walk at random: over many steps it stays beside the plain average that takes in every one."""
    model, ema = (torch.nn.Linear(64, 1, bias=False) for _ in range(2))
    walk = torch.randn(401, 1, 64, generator=torch.Generator().manual_seed(0)).cumsum(dim=0)
    expected, away = ema.weight.detach().clone(), []
    for step in range(1, 401):
        model.weight.data.copy_(walk[step])
        decay = min(0.98, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * walk[step]
        common.update_ema(ema, model, step, 0.98)
        away.append((ema.weight - expected).square().mean().sqrt().item())
    assert max(away[:100]) < 1e-4
    lag = (walk[400] - expected).square().mean().sqrt().item()
    assert max(away[103::4]) < 0.3 * lag
    before = ema.weight.clone()
    common.update_ema(ema, model, 401, 0.98)
    assert torch.equal(ema.weight, before)
    model.weight.data.add_(1)
    common.update_ema(ema, model, 401, 0.0)
    assert torch.equal(ema.weight, model.weight)


def test_compiler_that_does_not_work_stops_nothing(tmp_path, monkeypatch):
    """One that writes empty files. A linear layer's forward pass does without it, its backward pass would not."""
    for name in ("c++", "g++", "clang++"):
        script = f'touch {tmp_path}/asked; while [ "$1" != -o ]; do echo; shift || exit; done; : > "$2"'
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(torch._dynamo.config, "suppress_errors", False)  # what is to be set comes back afterwards
    monkeypatch.setattr(torch._functorch.config, "force_non_lazy_backward_lowering", False)
    assert common.worth_compiling(common.TrainConfig(steps=1000), torch.device("cpu"))

    class Block(torch.nn.Module):  # the compiler would pass over a module of torch's own
        def __init__(self, activation):
            super().__init__()
            self.linear, self.activation = torch.nn.Linear(3, 4), activation

        def forward(self, x):
            return self.activation(self.linear(x))

    for activation in (torch.nn.Identity(), torch.nn.SiLU()):
        block, x = Block(activation), torch.randn(2, 3)
        (expected,) = torch.autograd.grad(block(x).sum(), block.linear.bias)
        block.compile()
        (given,) = torch.autograd.grad(block(x).sum(), block.linear.bias)
        assert torch.allclose(given, expected)
    assert (tmp_path / "asked").exists()


# ---- pictures in ----


def png(path, mode="RGB", size=(20, 20), color=None, **options):
    Image.new(mode, size, color if color is not None else 0).save(path, **options)


def test_folder_of_odd_files_is_read_or_counted(tmp_path):
    png(tmp_path / "a.png", color=(255, 0, 0))
    png(tmp_path / "cmyk.jpg", "CMYK", color=(0, 255, 255, 0))
    Image.fromarray(np.full((20, 20), 32768, np.uint16)).save(tmp_path / "deep.png")
    png(tmp_path / "palette.png", "P")
    Image.new("RGBA", (20, 20), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    frames = [Image.new("RGB", (20, 20), c) for c in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    png(tmp_path / "wide.png", size=(60, 20), color=(0, 255, 0))
    buffer = io.BytesIO()
    Image.new("RGB", (20, 20), "red").save(buffer, "PNG")
    (tmp_path / "misnamed.jpg").write_bytes(buffer.getvalue())
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "truncated.png").write_bytes(buffer.getvalue()[:50])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("not a picture")
    (tmp_path / "notes.txt").write_text("ignored")
    Image.new("1", (9000, 9000)).save(tmp_path / "bomb.png")
    png(tmp_path / "hurt.jpg", color=(0, 0, 255), dpi=(72, 72), exif=b"Exif\0\0 no EXIF at all")
    Image.fromarray(np.full((20, 20), 0.5, np.float32)).save(tmp_path / "real.tif")
    turned = np.zeros((20, 20), np.uint16)
    turned[:10] = 65535  # white above; to be turned by 180 degrees
    orientation = Image.Exif()
    orientation[0x0112] = 3
    Image.fromarray(turned).save(tmp_path / "turned.png", exif=orientation)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pictures, paths, skipped = common.read_folder(tmp_path, 8)
    middle = {path.name: pictures[i, :, 4, 4].tolist() for i, path in enumerate(paths)}
    corner = {path.name: pictures[i, :, 0, 0].tolist() for i, path in enumerate(paths)}
    assert middle["a.png"] == middle["misnamed.jpg"] == [255, 0, 0]
    assert middle["deep.png"] == [128, 128, 128] and middle["clear.png"] == [255, 255, 255]
    assert middle["moving.gif"][0] > 200 and middle["moving.gif"][2] < 50  # the first frame
    assert middle["wide.png"] == [0, 255, 0] and "palette.png" in middle
    assert np.abs(np.subtract(middle["cmyk.jpg"], [255, 0, 0])).max() < 10
    assert middle["hurt.jpg"][2] > 200 and corner["turned.png"] == [0, 0, 0]
    broken = ["bomb.png", "empty.png", "real.tif", "sub/truncated.png", "text.jpg"]
    assert sorted(line.split(":")[0] for line in skipped) == broken
    assert pictures.shape == (10, 3, 8, 8) and [str(p) for p in paths] == sorted(str(p) for p in paths)


def test_links_to_folders_are_followed_and_no_folder_is_read_twice(tmp_path):
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "data"
    (elsewhere / "deep").mkdir(parents=True)
    (folder / "own").mkdir(parents=True)
    for path in (elsewhere / "a.png", elsewhere / "deep" / "b.png", folder / "own" / "c.png"):
        png(path)
    (elsewhere / "metadata.jsonl").write_text('{"file_name": "deep/b.png", "text": "behind a link"}')
    (folder / "linked").symlink_to(elsewhere, target_is_directory=True)
    (folder / "again").symlink_to(folder / "own", target_is_directory=True)  # whose pictures keep their own names
    (elsewhere / "deep" / "up").symlink_to(folder, target_is_directory=True)  # round and round
    (folder / "gone.png").symlink_to(tmp_path / "nowhere.png")
    paths = common.picture_paths(folder)
    assert [str(path.relative_to(folder)) for path in paths] == ["linked/a.png", "linked/deep/b.png", "own/c.png"]
    assert common.read_metadata(paths, folder)[folder / "linked" / "deep" / "b.png"][0] == "behind a link"


def test_folder_without_pictures_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no folder"):
        common.read_folder(tmp_path / "missing", 8)
    with pytest.raises(UserError, match="no pictures in"):
        common.read_folder(tmp_path, 8)
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(UserError, match="none of the 1 files"):
        common.read_folder(tmp_path, 8)


# ---- files out ----


def test_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path):
    path = tmp_path / "model.safetensors"
    common.save_tensors(path, {"a": torch.ones(3)}, {"step": 1})
    before = path.read_bytes()

    def break_half_way(part):
        part.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left"):
        common.save_atomically(path, break_half_way)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_checkpoint_comes_back_with_its_header(tmp_path):
    tensors = {"a": torch.randn(3, 4), "b": torch.arange(5)}
    common.save_tensors(tmp_path / "x.safetensors", tensors, {"system": "x", "config": {"lr": 0.1}})
    loaded, header = common.load_tensors(tmp_path / "x.safetensors")
    assert all(torch.equal(loaded[k], tensors[k]) for k in tensors) and header["config"]["lr"] == 0.1


def test_grid_holds_every_picture_in_its_place():
    pictures = np.stack([np.full((4, 4, 3), i * 10, np.uint8) for i in range(5)])
    sheet = np.asarray(common.make_grid(pictures))
    assert sheet.shape == (8, 12, 3)
    assert [sheet[1, 1, 0], sheet[1, 5, 0], sheet[1, 9, 0], sheet[5, 1, 0], sheet[5, 5, 0], sheet[5, 9, 0]] == [
        *(0, 10, 20, 30, 40),
        255,
    ]


def test_chart_puts_large_values_high_and_late_ones_right():
    chart = common.svg_chart({"loss": [(10, 1.0), (20, 0.1), (30, 0.01)]})
    HTMLParser().feed(chart)
    points = [tuple(map(float, p.split(","))) for p in re.search('points="([^"]*)"', chart)[1].split()]
    assert [x for x, _ in points] == sorted(x for x, _ in points)
    assert points[0][1] < points[1][1] < points[2][1]  # downwards on the screen
    assert points[1][1] - points[0][1] == pytest.approx(points[2][1] - points[1][1], abs=0.2)  # logarithmic


# ---- painted faces and scenes ----

PAINTED = [  # seed, caption, mean colours of the four quarters of the picture
    (
        common.paint_face,
        3,
        80,
        "a face with silver braids, calm closed eyes, a smile and freckles, on a mint background",
        [201, 221, 220, 199, 222, 220, 198, 206, 196, 197, 208, 200],
    ),
    (
        common.paint_face,
        10,
        80,
        "a face with a blue bun, sharp grey eyes, a smirk and a coral beanie, on a cream background",
        [209, 185, 184, 218, 184, 175, 212, 177, 166, 214, 186, 176],
    ),
    (
        common.paint_face,
        21,
        80,
        "a face with curly blond hair, round green eyes, a smirk, freckles and a purple beanie, on a peach background",
        [210, 178, 171, 211, 180, 178, 231, 190, 166, 231, 191, 166],
    ),
    (
        common.paint_scene,
        0,
        64,
        "a purple heart below a red bird",
        [198, 210, 225, 203, 201, 214, 150, 174, 150, 154, 179, 159],
    ),
    (common.paint_scene, 7, 64, "a small yellow umbrella", [52, 57, 96, 54, 58, 95, 40, 48, 99, 40, 48, 99]),
    (common.paint_scene, 12, 64, "a black bird", [171, 194, 219, 164, 184, 206, 209, 214, 220, 206, 213, 220]),
]


@pytest.mark.parametrize("paint, seed, size, caption, quarters", PAINTED)
def test_a_seed_gives_the_picture_that_it_always_gave(paint, seed, size, caption, quarters):
    picture, words, _ = paint(seed, size)
    assert words == caption
    assert np.asarray(picture.reduce(size // 2), int).ravel() == pytest.approx(quarters, abs=1)


def test_painted_faces_are_a_function_of_their_number():
    one, caption, tags = common.paint_face(3)
    again, *words = common.paint_face(3)
    assert one.size == (80, 80) and one.tobytes() == again.tobytes() and words == [caption, tags]
    many = {common.paint_face(seed)[0].tobytes() for seed in range(300)}
    assert len(many) == 300
    assert len({common.paint_face(seed)[1] for seed in range(300)}) > 290


def test_painted_face_is_the_same_at_any_size():
    small, large = common.paint_face(11, 40)[0], common.paint_face(11, 160)[0].reduce(4)
    assert np.abs(np.asarray(small, int) - np.asarray(large, int)).mean() < 4


def test_faces_are_kept_and_painted_anew_when_the_tables_change(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    faces = common.draw_set(common.paint_face, 12, 16)
    kept = list((tmp_path / "data").iterdir())
    assert len(kept) == 1 and faces.pictures.shape == (12, 3, 16, 16) and len(faces.captions) == len(faces.tags) == 12
    assert np.array_equal(faces.pictures[9].permute(1, 2, 0).numpy(), np.asarray(common.paint_face(9, 16)[0]))
    stamp = kept[0].stat().st_mtime_ns
    assert torch.equal(common.draw_set(common.paint_face, 12, 16).pictures, faces.pictures)
    assert kept[0].stat().st_mtime_ns == stamp
    tensors, words = common.load_tensors(kept[0])
    common.save_tensors(kept[0], tensors, words | {"tags": [["of another time"]] * 12})
    assert common.draw_set(common.paint_face, 12, 16).tags == faces.tags
    monkeypatch.setitem(common.picture_tables("faces"), "skins", {"blue": "#0000ff"})
    assert not torch.equal(common.draw_set(common.paint_face, 12, 16).pictures, faces.pictures)


def test_there_are_more_than_a_million_different_faces():
    tables = common.picture_tables("faces")
    names = "styles fringes eyes brows mouths cheeks tops patterns accessories skins hairs".split()
    assert math.prod(len(tables[name]) for name in names) > 1_000_000
