"""The command line and run folders, as a user meets them: budgets, resuming, broken files, Ctrl-C."""

import csv
import dataclasses
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser

import pytest
import torch
from conftest import ROOT, TINY, TINY_FLAGS
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import common
import dit_t2i
import jit_lab
import serpentine_vae
import unet_ddpm
from common import UserError

SYSTEMS = [jit_lab, dit_t2i, unet_ddpm, serpentine_vae]


@pytest.fixture
def train(folder, tmp_path, monkeypatch):
    """Train the tiny model in this process."""
    monkeypatch.chdir(tmp_path)

    def run(out, **changes):
        values = dict(TINY, data=str(folder), out=str(out), batch_size=8, lr=1e-3)
        values |= dict(minutes=None, device="cpu", precision="fp32")
        return jit_lab.train(jit_lab.Config(**(values | changes)))

    return run


def same_bits(one, other):
    for name in ("model.safetensors", "state.safetensors"):
        a, b = load_file(one / name), load_file(other / name)
        assert a.keys() == b.keys() and len(a) > 10
        for key in a:
            assert torch.equal(a[key], b[key]), f"{name}: {key}"


def read_log(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


HALF = {"precision": "fp16", "grad_accum": 2, "decay": "none"}


@pytest.mark.parametrize("options", [{}, HALF, {"precision": "bf16", "optimizer": "muon", "decay": "linear"}])
def test_interrupted_run_resumes_to_the_same_bits(train, tmp_path, monkeypatch, options):
    train(tmp_path / "whole", steps=8, **options)

    # Ctrl-C arrives in the middle of the fifth step.
    calls = []

    def interrupt(*arguments, honest=jit_lab.draw_batch):
        calls.append(arguments[2])
        if arguments[2] == 4 and calls.count(4) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return honest(*arguments)

    monkeypatch.setattr(jit_lab, "draw_batch", interrupt)
    assert train(tmp_path / "halves", steps=8, **options) == 130
    with safe_open(tmp_path / "halves" / "state.safetensors", "pt") as file:
        assert json.loads(file.metadata()["config"])["step"] == 5
    assert train(tmp_path / "halves", steps=8, resume=True, **options) == 0
    same_bits(tmp_path / "whole", tmp_path / "halves")
    logs = [read_log(tmp_path / name / "log.csv") for name in ("whole", "halves")]
    assert [row["step"] for row in logs[0]] == ["8"] and [row["step"] for row in logs[1]] == ["5", "8"]


def test_killed_run_resumes_to_the_same_bits(train, folder, tmp_path):
    demo = jit_lab.PRESETS["demo"] | {"minutes": None}
    train(tmp_path / "whole", steps=60, checkpoint_every=3, **demo)
    flags = [*TINY_FLAGS, "--data", folder, "--batch-size", 8, "--steps", 60, "--checkpoint-every", 3]
    flags += ["--out", tmp_path / "killed", "--device", "cpu", "--precision", "fp32", "--lr", 1e-3]
    words = [sys.executable, str(ROOT / "jit_lab.py"), "train", *map(str, flags)]
    process = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    state = tmp_path / "killed" / "state.safetensors"
    while not state.exists():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.1)
    process.kill()
    process.wait()
    with safe_open(state, "pt") as file:
        assert json.loads(file.metadata()["config"])["step"] < 60
    done = subprocess.run([*words, "--resume"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "resumed at step" in done.stdout
    same_bits(tmp_path / "whole", tmp_path / "killed")


def test_muon_is_for_machines_with_fast_bfloat16(train, tmp_path, monkeypatch):
    """Elsewhere a step of it would take seconds; a run goes on with the optimizer that it has."""
    kept = {}
    for fast in ("bf16", "fp32"):
        monkeypatch.setattr(common, "pick_precision", lambda wanted, device, fast=fast: fast)
        train(tmp_path / fast, steps=2, optimizer="auto")
        kept[fast] = {
            key.split(".")[2] for key in load_file(tmp_path / fast / "state.safetensors") if "optimizer." in key
        }
    assert kept == {
        "bf16": {"step", "exp_avg", "exp_avg_sq", "momentum_buffer"},
        "fp32": {"step", "exp_avg", "exp_avg_sq"},
    }
    with pytest.raises(UserError, match="--optimizer"):
        train(tmp_path / "bf16", steps=4, optimizer="auto", resume=True)


def test_run_folder_holds_what_the_readme_says(all_marks, train, tmp_path):
    train(tmp_path / "run", steps=20)
    run = tmp_path / "run"
    assert {p.name for p in run.iterdir()} == {
        *("model.safetensors", "state.safetensors", "log.csv", "samples", "index.html"),
    }
    steps = [2, 4, 6, 10, 14, 20]  # a tenth, two tenths, ... of the budget
    assert [p.name for p in sorted((run / "samples").iterdir())] == [f"step_{s:06d}.png" for s in steps]
    assert Image.open(run / "samples" / "step_000020.png").size == (80, 80)  # 5 x 5 pictures of 16 pixels
    rows = read_log(run / "log.csv")
    assert [row["step"] for row in rows] == ["10", "20"] and rows[1]["images"] == "160"
    bins = [float(rows[1][f"loss_bin_{k}"]) for k in range(8) if rows[1][f"loss_bin_{k}"]]
    assert len(bins) > 3 and float(rows[1]["lr"]) < float(rows[0]["lr"])
    config = jit_lab.load_model(run / "model.safetensors", "cpu")[1]
    assert config.steps == 20 and list(config.crop_sizes) == [0.5, 0.8, 1.0]


def test_compiler_does_not_use_up_the_warm_up(tiny_config, tmp_path, monkeypatch):
    seconds = [0.0]
    monkeypatch.setattr(common.time, "perf_counter", lambda: seconds[0])
    run = common.Run(tiny_config(minutes=1.0, out=str(tmp_path / "run")), "jit_lab")
    with run.clock():
        told = []
        for run.step, seconds[0] in ((1, 30.0), (2, 33.0), (3, 45.0), (4, 60.0)):  # half of the budget for the first
            run.due()
            told.append((run.progress, run.schedule))
    assert told == [(0.5, 0.0), (0.55, pytest.approx(0.1)), (0.75, 0.5), (1.0, 1.0)]


def test_first_step_counts_in_the_budget_that_a_resumed_run_has(train, tmp_path, monkeypatch):
    """Half a minute for the first step, of one minute; then the run gets ten, or steps, or less than that step took."""
    seconds, told = [0.0], []

    def due(self, honest=common.Run.due):
        seconds[0] += 30.0
        self.asked_to_stop = self.step % 2 == 0
        pictures = honest(self)
        told.append((self.progress, self.schedule))
        return pictures

    monkeypatch.setattr(common.time, "perf_counter", lambda: seconds[0])
    monkeypatch.setattr(common.Run, "due", due)
    run = tmp_path / "run"
    assert train(run, minutes=1.0) == 130 and told == [(0.5, 0.0), (1.0, 1.0)]
    assert train(run, minutes=10.0, resume=True) == 130
    assert told[2:] == [(0.15, pytest.approx(0.1 / 0.95)), (0.2, pytest.approx(0.15 / 0.95))]
    assert train(run, steps=100, resume=True) == 130 and told[4:] == [(0.05, 0.05), (0.06, 0.06)]
    assert train(tmp_path / "brief", minutes=0.4) == 0 and told[6:] == [(1.0, 1.0)]
    assert train(tmp_path / "brief", minutes=2.0, resume=True) == 130
    assert told[7:] == [(0.5, pytest.approx(0.25 / 0.75))]


def test_page_is_self_contained(all_marks, train, tmp_path):
    train(tmp_path / "run", steps=10)
    page = (tmp_path / "run" / "index.html").read_text()
    used = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attributes):
            used.append(tag)
            for name, value in attributes:
                assert name not in ("src", "href") or value.startswith("data:")

    Reader().feed(page)
    assert used.count("svg") == 2 and used.count("img") == 6 and "script" not in used and "link" not in used
    assert "--steps 20 --resume" in page and "hidden_size" in page  # its ten steps are used up
    shutil.copy(
        tmp_path / "run" / "samples" / "step_000010.png", tmp_path / "run" / "samples" / "step_000010 (copy).png"
    )
    train(tmp_path / "run", steps=12, resume=True)  # which passes over the copy


def test_what_a_run_drew_is_nothing_to_learn_from(train, folder):
    """A run folder within the folder of pictures: resuming finds the same pictures as before."""
    paths = common.picture_paths(folder)
    assert train(folder / "run", steps=4) == 0 and list((folder / "run" / "samples").glob("*.png"))
    assert train(folder / "run", steps=6, resume=True) == 0 and common.picture_paths(folder) == paths


def test_page_of_an_interrupted_run_goes_on_with_the_same_budget(train, tmp_path, monkeypatch):
    def due(self, honest=common.Run.due):
        self.asked_to_stop = self.step == 3
        return honest(self)

    monkeypatch.setattr(common.Run, "due", due)
    assert train(tmp_path / "run", steps=10) == 130
    page = (tmp_path / "run" / "index.html").read_text()
    assert " --resume</code>" in page and "--steps 20" not in page


def test_samples_while_training_come_from_fixed_noise_and_the_ema(train, tmp_path):
    train(tmp_path / "run", steps=10)
    model, config = jit_lab.load_model(tmp_path / "run" / "model.safetensors", "cpu")
    again = common.make_grid(
        common.to_uint8(jit_lab.sample(model, config, jit_lab.SampleConfig(num=25, steps=25, precision="fp32")))
    )
    assert again.tobytes() == Image.open(tmp_path / "run" / "samples" / "step_000010.png").tobytes()


def test_training_learns(train, tmp_path):
    train(tmp_path / "run", steps=150, color_fraction=1.0, lr=3e-3)
    losses = [float(row["loss"]) for row in read_log(tmp_path / "run" / "log.csv")]
    assert losses[-1] < 0.5 * losses[0]


def test_an_option_that_is_younger_than_the_run_was_at_its_default(train, tmp_path):
    train(tmp_path / "run", steps=2)
    tensors, header = common.load_tensors(tmp_path / "run" / "state.safetensors")
    del header["config"]["grad_clip"]
    common.save_tensors(tmp_path / "run" / "state.safetensors", tensors, header)
    with pytest.raises(UserError, match=r"--grad-clip 1.0 \(not 2.0\)"):
        train(tmp_path / "run", steps=4, resume=True, grad_clip=2.0)
    train(tmp_path / "run", steps=4, resume=True)
    assert common.load_tensors(tmp_path / "run" / "state.safetensors")[1]["step"] == 4


def test_what_cannot_go_on_is_refused(train, tmp_path, monkeypatch):
    train(tmp_path / "run", steps=4)
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*.safetensors")}
    with pytest.raises(UserError, match="not empty"):
        train(tmp_path / "run", steps=4)
    with pytest.raises(UserError, match="nothing to resume"):
        train(tmp_path / "other", steps=4, resume=True)
    with pytest.raises(UserError, match="was made with --lr"):
        train(tmp_path / "run", steps=4, resume=True, lr=0.5)
    with pytest.raises(UserError, match="give --minutes or --steps"):
        train(tmp_path / "new")
    with pytest.raises(UserError, match="does not divide --image-size"):
        train(tmp_path / "new", steps=4, patch_size=5)
    with pytest.raises(UserError, match="--batch-size 8 is no multiple of 3"):
        train(tmp_path / "new", steps=4, grad_accum=3)
    assert not (tmp_path / "new").exists()
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*.safetensors")}


def test_loss_that_is_not_finite_stops_the_run_and_spares_the_checkpoint(train, tmp_path, monkeypatch):
    def poison(*arguments, honest=jit_lab.flow_loss):
        poison.calls += 1
        return honest(*arguments) * (float("nan") if poison.calls > 6 else 1)

    poison.calls = 0
    monkeypatch.setattr(jit_lab, "flow_loss", poison)
    with pytest.raises(UserError, match=r"loss is nan at step 7; the last good checkpoint is .*state.safetensors"):
        train(tmp_path / "run", steps=10, checkpoint_every=1)
    assert all(t.isfinite().all() for t in load_file(tmp_path / "run" / "state.safetensors").values())


def test_gradient_that_is_not_finite_stops_the_run_and_spares_the_checkpoint(train, tmp_path, monkeypatch):
    def poison(*arguments, honest=torch.nn.utils.get_total_norm):
        poison.calls += 1
        if poison.calls == 4:
            arguments[0][0].fill_(float("inf"))
        return honest(*arguments)

    poison.calls = 0
    monkeypatch.setattr(jit_lab.nn.utils, "get_total_norm", poison)
    with pytest.raises(UserError, match="the gradient is not finite at step 4; the last good checkpoint"):
        train(tmp_path / "run", steps=10, checkpoint_every=1)
    assert all(t.isfinite().all() for t in load_file(tmp_path / "run" / "state.safetensors").values())


def test_average_follows_the_weights(train, tmp_path):
    train(tmp_path / "run", steps=60, decay="none")
    state = load_file(tmp_path / "run" / "state.safetensors")
    torch.manual_seed(0)
    fresh = jit_lab.build_model(jit_lab.Config(**TINY)).state_dict()
    to_weights = sum((state[f"ema.{k}"] - state[f"model.{k}"]).norm() for k in fresh)
    to_start = sum((state[f"ema.{k}"] - fresh[k]).norm() for k in fresh)
    assert 0 < to_weights < 0.5 * to_start


def test_training_walks_from_noise_to_data_and_tells_each_crop_its_place(train, tmp_path, monkeypatch):
    seen, places = [], []

    def loss(config, output, x_t, x, t, mask, honest=jit_lab.flow_loss):
        t4 = t.view(-1, 1, 1, 1)
        seen.append(((x_t - t4 * x) / (1 - t4)).std().item())
        return honest(config, output, x_t, x, t, mask)

    def batch(*arguments, honest=jit_lab.draw_batch):
        drawn = honest(*arguments)
        places.append(drawn[2:])
        return drawn

    def forward(self, x_t, t, y, top_idx=0, left_idx=0, honest=jit_lab.JiT.forward):
        if self.training:
            assert (top_idx, left_idx) == places[-1]
        return honest(self, x_t, t, y, top_idx, left_idx)

    monkeypatch.setattr(jit_lab, "flow_loss", loss)
    monkeypatch.setattr(jit_lab, "draw_batch", batch)
    monkeypatch.setattr(jit_lab.JiT, "forward", forward)
    train(tmp_path / "run", steps=30, noise_scale=2.0)
    assert all(abs(std - 2) < 0.2 for std in seen) and any(top != left for top, left in places)


def test_pictures_may_move_but_not_change(train, folder, tmp_path):
    train(tmp_path / "run", steps=2)
    moved = folder.rename(tmp_path / "elsewhere")
    assert train(tmp_path / "run", steps=3, resume=True, data=str(moved)) == 0
    (moved / "00.png").unlink()
    with pytest.raises(UserError, match="began with another data"):
        train(tmp_path / "run", steps=4, resume=True, data=str(moved))


def test_what_goes_wrong_in_drawing_costs_no_step(folder, tmp_path, monkeypatch, capsys):
    def draw(*arguments):
        raise UserError("no memory for pictures")

    monkeypatch.setattr(jit_lab, "sample", draw)
    words = ["train", *TINY_FLAGS, "--data", str(folder), "--batch-size", "8", "--steps", "4", "--device", "cpu"]
    assert jit_lab.main([*words, "--out", str(tmp_path / "run")]) == 2
    assert "no memory for pictures" in capsys.readouterr().err
    assert common.load_tensors(tmp_path / "run" / "state.safetensors", header_only=True)[1]["step"] == 4
    monkeypatch.undo()
    assert jit_lab.main([*words, "--out", f"{tmp_path}/run", "--resume"]) == 0


def test_a_header_that_is_not_ours_is_none(tmp_path, capsys):
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors", metadata={"config": "[1]"})
    assert common.load_tensors(tmp_path / "x.safetensors") == ({"a": torch.zeros(1)}, None)
    for module in (jit_lab, dit_t2i, unet_ddpm, serpentine_vae):
        prompt = ["cat"] if module is dit_t2i else []
        assert module.main(["sample", *prompt, "--weights", str(tmp_path / "x.safetensors")]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_full_disk_spares_the_last_checkpoint(folder, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["train", *TINY_FLAGS, "--data", str(folder), "--batch-size", "8", "--device", "cpu", "--out", "run"]
    assert jit_lab.main([*flags, "--steps", "4"]) == 0
    state = tmp_path / "run" / "state.safetensors"
    before = state.read_bytes()
    # No file may grow beyond 64 KiB: what a full disk looks like to the program.
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))  # noqa: E731
    code, _, errors = command(*flags, "--steps", 8, "--resume", preexec_fn=limit)
    assert code == 2 and errors.strip().splitlines()[-1].startswith("error: cannot write")
    assert "Traceback" not in errors and state.read_bytes() == before
    assert not list((tmp_path / "run").glob(".*part"))


@pytest.mark.parametrize(
    "words, message",
    [
        (["train", "--data", "nowhere"], "no folder nowhere"),
        (["train", "--data", "."], "no pictures in ."),
        (["train", "--patch-size", "7"], "--patch-size 7 does not divide --image-size 80"),
        (["train", "--lr", "-1"], "--lr -1.0: must be at least 0"),
        (["train", "--lr", "nan"], "--lr nan: must be at least 0"),
        (["train", "--time-mean", "nan"], "--time-mean nan: must be a finite number"),
        (["train", "--minutes", "inf"], "--minutes inf: must be a finite number"),
        (["train", "--out", "w.pth"], "cannot make w.pth"),
        (["train", "--lab-noise", "0.5"], "--lab-noise 0.5: give three numbers, for L*, a* and b*"),
        (["train", "--num-classes", "3"], "--num-classes 3: no data here has labels"),
        (["train", "--lr", "fast"], "argument --lr: invalid float value: 'fast'"),
        (["train", "--space", "cmyk"], "--space cmyk: choose one of lab, rgb"),
        (["train", "--nonsense"], "unrecognized arguments: --nonsense"),
        (["train", "--out", "/proc/run"], "cannot make /proc/run"),
        (["sample", "--weights", "nowhere.safetensors"], "no weights at nowhere.safetensors"),
        (["sample", "--steps", "0"], "--steps 0: must be at least 1"),
        (["sample", "--cfg", "3"], "--cfg 3.0: this checkpoint has one class, from which nothing differs"),
        (["sample", "--out", "grid"], "grid: name a picture file that can be written"),
        (["sample", "--gif", "way.mp4"], "way.mp4: name a picture file that can be written"),
        (["export", "--out", "x.safetensors"], "no weights at runs/jit_lab/model.safetensors; train some first"),
        (["export", "--weights", "w.pth", "--out", "x.safetensors"], "w.pth is no model.safetensors of jit_lab.py"),
        (["novelty", "--weights", "w.pth"], "does not say what it was trained on; name its pictures with --data"),
        (["novelty", "--alexnet", "a.pth"], "LPIPS needs two files"),
        (["dream"], "invalid choice: 'dream'"),
    ],
)
def test_mistake_is_one_line_and_code_two(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save(jit_lab.build_model(jit_lab.Config(**TINY)).state_dict(), "w.pth")
    assert common.run_command_line(jit_lab.__doc__, jit_lab.VERBS, words) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and errors.count("\n") == 1 and message in errors


def test_a_rank_that_torchrun_did_not_give_is_nobodys(train, tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
    assert train(tmp_path / "run", steps=1) == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="not by torchrun"):
        train(tmp_path / "other", steps=1)


def test_export_halves_a_checkpoint_and_nothing_else(train, tmp_path, capsys):
    train(tmp_path / "run", steps=1)
    words = ["export", "--out", "half.safetensors", "--weights"]
    assert jit_lab.main([*words, "run/model.safetensors"]) == 0
    whole, half = load_file("run/model.safetensors"), load_file("half.safetensors")
    assert whole.keys() == half.keys() and all(torch.equal(half[key], whole[key].bfloat16()) for key in whole)
    assert jit_lab.load_model("half.safetensors", "cpu")[1] == jit_lab.load_model("run/model.safetensors", "cpu")[1]
    capsys.readouterr()
    assert jit_lab.main(["export", "--out", ".", "--weights", "run/model.safetensors"]) == 2
    assert capsys.readouterr().err.startswith("error: cannot write .: ")
    assert jit_lab.main([*words, "run/state.safetensors"]) == 2
    assert "run/state.safetensors is no model.safetensors of jit_lab.py" in capsys.readouterr().err


def test_sample_writes_grid_singles_and_gif(train, command, tmp_path):
    train(tmp_path / "runs" / "jit_lab", steps=2)  # where sample looks first
    code, _, errors = command("sample", "--num", 5, "--steps", 12, "--each", "each", "--gif", "way.gif", "--seed", 4)
    assert code == 0, errors
    assert Image.open(tmp_path / "samples" / "jit_lab.png").size == (48, 32)
    assert sorted(p.name for p in (tmp_path / "each").iterdir()) == [f"{4 + i:06d}.png" for i in range(5)]
    assert Image.open(tmp_path / "way.gif").n_frames == 10


def test_novelty_writes_a_sheet_and_a_table(train, folder, command, tmp_path):
    train(tmp_path / "runs" / "jit_lab", steps=2)
    code, out, errors = command("novelty", "--num", 3, "--steps", 2, "--data", folder)
    assert code == 0, errors
    assert "multi-scale pixel distance" in out and "24 training pictures" in out
    rows = read_log(tmp_path / "samples" / "jit_lab_novelty.csv")
    assert len(rows) == 3 and all(row["nearest"].endswith(".png") and float(row["distance"]) > 0 for row in rows)
    assert Image.open(tmp_path / "samples" / "jit_lab_novelty.png").size[0] > 100


@pytest.mark.parametrize("module", SYSTEMS)
def test_help_explains_verbs_and_options(command, capsys, module):
    file = f"{module.__name__}.py"
    code, out, errors = command(file=file)
    assert code == 0 and f"python {file} train" in out and not errors
    assert all(f"{verb} " in out for verb in module.VERBS)
    with pytest.raises(SystemExit) as ended:
        module.main(["train", "--help"])
    assert ended.value.code == 0
    options = re.findall(r"--([a-z0-9-]+)", capsys.readouterr().out)
    for name, field in module.Config.__dataclass_fields__.items():
        assert (field.metadata["flag"] or "--" + name.replace("_", "-"))[2:] in options


def test_novelty_names_the_nearest_picture(train, folder, tmp_path, monkeypatch):
    train(tmp_path / "runs" / "jit_lab", steps=1)
    pictures, names, _ = common.load_pictures(str(folder), 16)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jit_lab, "sample", lambda *arguments: pictures[[5, 17, 2]] / 255)
    assert jit_lab.main(["novelty", "--num", "3", "--data", str(folder)]) == 0
    rows = read_log(tmp_path / "samples" / "jit_lab_novelty.csv")
    assert [row["nearest"] for row in rows] == [names[i] for i in (5, 17, 2)]
    assert max(float(row["distance"]) for row in rows) < 1e-3


def test_importing_has_no_side_effect(tmp_path):
    words = "import jit_lab, dit_t2i, unet_ddpm, serpentine_vae, os, sys; assert not os.listdir()"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", words, "--no-such-option"], cwd=tmp_path, env=environment)
    assert done.returncode == 0 and not list(tmp_path.iterdir())


def test_readme_names_only_what_exists():
    readme = (ROOT / "README.md").read_text()
    for path in re.findall(r"\]\(([^)#:]+)\)|src=\"([^\":]+)\"", readme):
        assert (ROOT / (path[0] or path[1])).exists(), path
    for module in SYSTEMS:
        name = module.__name__
        lines = re.findall(rf"(?:python|torchrun[^\n`]*) {name}\.py ([a-z-]+)([^\n`]*)", readme.replace("\\\n", " "))
        assert len(lines) > 3
        for verb, rest in lines:
            flags = {common.flag_of(field) for field in dataclasses.fields(module.VERBS[verb][1])}
            assert set(re.findall(r"--[a-z-]+", rest)) <= flags | {"--preset", "--help"}, rest
        for function in re.findall(rf"`{name}\.([A-Za-z_]+)`", readme):
            assert hasattr(module, function), function
    for function in re.findall(r"`common\.([A-Za-z_]+)`", readme):
        assert hasattr(common, function), function


def test_shipped_weights_are_small_and_load():
    path = ROOT / "weights" / "jit_lab.safetensors"
    assert path.stat().st_size < 20e6
    model, config = jit_lab.load_model(path, "cpu")
    rgb = jit_lab.sample(model, config, jit_lab.SampleConfig(num=4, steps=10))
    # A trained model draws pictures that differ, and that are neither flat nor noise.
    assert rgb.std(dim=(1, 2, 3)).min() > 0.1 and (rgb[0] - rgb[1]).abs().mean() > 0.05
    assert (rgb[..., 1:] - rgb[..., :-1]).abs().mean() < 0.1
