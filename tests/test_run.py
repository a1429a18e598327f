"""Run folders, as a user meets them: checkpoints, resuming, budgets, interrupts, the log and the page. tests/toy.py is
the model file."""

import csv
import dataclasses
import gc
import importlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser

import common
from common import UserError
from experiments import expected

import pytest
import torch
import toy
from conftest import ENVIRONMENT, ROOT
from PIL import Image
from safetensors.torch import load_file


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Train the toy in this process, into a folder of an empty directory."""
    monkeypatch.chdir(tmp_path)

    def run(out="run", resume=None, **changes):
        options = dict(minutes=None, steps=20, lr=1e-2, device="cpu", precision="fp32") | changes
        return toy.train(toy.Config(out=out, resume=resume, **options))

    return run


@pytest.fixture
def at_step(monkeypatch):
    """at_step(5, act) calls act() in the middle of step 5, the first time."""

    def install(step, act):
        calls = []

        def load_batch(config, data, now, rows, honest=toy.load_batch):
            if now == step and not calls:
                calls.append(now)
                act()
            return honest(config, data, now, rows)

        monkeypatch.setattr(toy, "load_batch", load_batch)

    return install


def send(signum):
    return lambda: os.kill(os.getpid(), signum)


def header_of(run):
    return common.load_tensors(f"{run}/state.safetensors", header_only=True)[1]


def log_of(run):
    with open(f"{run}/log.csv", newline="") as file:
        return list(csv.DictReader(file))


def assert_same_bits(one, other):
    for name in ("model.safetensors", "state.safetensors"):
        a, b = load_file(f"{one}/{name}"), load_file(f"{other}/{name}")
        assert a.keys() == b.keys() and len(a) > 7
        assert [key for key in a if not torch.equal(a[key], b[key])] == []


# ---- resuming ----

HALF = {"precision": "fp16", "grad_accum": 2, "decay": "none"}
MUON = {"precision": "bf16", "optimizer": "muon", "decay": "linear"}


@pytest.mark.parametrize("options", [{}, HALF, MUON], ids=["fp32", "fp16", "muon"])
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_saves_and_resumes_to_the_same_bits(train, at_step, options, signum, capsys):
    train("whole", **options)
    at_step(4, send(signum))
    assert train("halves", **options) == 130
    assert header_of("halves")["step"] == 5 and "stopped and saved at step 5; to go on" in capsys.readouterr().out
    assert signal.getsignal(signum) in (signal.SIG_DFL, signal.default_int_handler)
    assert train("halves", resume="", **options) == 0
    assert "resumed at step 5 in halves" in capsys.readouterr().out
    assert_same_bits("whole", "halves")
    assert [row["step"] for row in log_of("whole")] == ["10", "20"]
    assert [row["step"] for row in log_of("halves")] == ["5", "10", "20"]


def test_killed_run_resumes_to_the_same_bits(train, tmp_path):
    """kill -9 of a process that writes a checkpoint at every step."""
    train("whole", steps=80)
    words = "train --steps 80 --checkpoint-every 1 --device cpu --precision fp32 --out killed".split()
    words = [sys.executable, str(ROOT / "tests" / "toy.py"), *words]
    process = subprocess.Popen(words, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (tmp_path / "killed" / "state.safetensors").exists():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.1)
    process.kill()
    process.wait()
    assert 0 < header_of("killed")["step"] < 80
    for name in (".model.safetensors.part", ".tmp1a2b3c"):
        (tmp_path / "killed" / name).touch()
    assert toy.main([*words[2:], "--resume", "--checkpoint-every", "80"]) == 0
    assert_same_bits("whole", "killed")
    assert [path.name for path in (tmp_path / "killed").glob(".*")] == [".lock"]


def test_run_that_died_before_its_first_checkpoint_starts_afresh(train, at_step):
    at_step(15, lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train()
    gc.collect()  # as the end of a process does, this gives the folder's lock back
    assert len(log_of("run")) == 1
    assert train() == 0 and [row["step"] for row in log_of("run")] == ["10", "20"]


def test_log_and_samples_behind_the_checkpoint_and_damaged_lines_are_cut_off(train):
    train(steps=10)
    log = common.Path("run/log.csv").read_bytes()
    later, ends = b"30,1,240" + b",1" * 12 + b"\n40,1", range(20, 80, 10)
    damaged = [b"\r\n" + log, b"\xff\xfe" + log, log + b"\0" * 40 + b",,,,\n", log + b"abc,1,2\n"]
    for end, content in zip(ends, [log + later, *damaged, log + b"2,1,8,x,4,5,6" + b"," * 8], strict=True):
        common.Path("run/log.csv").write_bytes(content)
        Image.new("RGB", (4, 4)).save("run/samples/step_000099.png")
        train(steps=end, resume="")
        assert [row["step"] for row in log_of("run")] == ["10", str(end)]
    assert sorted(os.listdir("run/samples")) == [f"step_{step:06d}.png" for step in (10, *ends)]


@pytest.mark.parametrize("named", ["run", "run/state.safetensors", "run/model.safetensors"])
def test_resume_takes_the_run_or_its_checkpoint_and_its_settings(train, named):
    words = ["train", "--device", "cpu", "--width", "4"]
    assert toy.main([*words, "--steps", "3", "--lr", "0.005", "--out", "run"]) == 0
    assert toy.main(["train", "--steps", "5", "--resume", named]) == 0
    assert header_of("run")["step"] == 5 and header_of("run")["config"]["lr"] == 0.005


def test_what_cannot_go_on_is_refused(train, tmp_path, monkeypatch):
    train(steps=4)
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*.safetensors")}
    for out, changes, message in [
        ("run", {}, "run holds a run; add --resume to go on with it, or name another --out"),
        ("new", {"resume": ""}, "nothing to resume in new: no checkpoint; start a run without --resume"),
        ("run", {"resume": "", "lr": 0.5}, r"run was made with --lr 0.01, not 0.5; leave --lr out"),
        ("new", {"steps": None}, "a run needs an end: give --minutes, --steps or --epochs"),
        ("new", {"grad_accum": 3}, "--batch-size 8 is no multiple of 3"),
        ("new", {"fsdp": True}, "--fsdp needs torchrun"),
    ]:
        with pytest.raises(UserError, match=message):
            train(out, **changes)
        assert not (tmp_path / "new").exists()
    run = common.Run(toy.Config(out="locked", steps=1), "toy")
    with pytest.raises(UserError, match=r"another run is writing to locked; name another --out \(process \d+\)"):
        train("locked")
    run.lock.close()
    assert train("locked") == 0
    data = toy.load_data(toy.Config())
    monkeypatch.setattr(toy, "load_data", lambda config: common.dataclasses.replace(data, captions=["new"] * 24))
    with pytest.raises(UserError, match="run began with another data"):
        train(resume="")
    monkeypatch.undo()
    assert before == {p: p.read_bytes() for p in before}
    monkeypatch.chdir(tmp_path)
    tensors, header = common.load_tensors("run/state.safetensors")
    unreadable = [{"step": "x"}, {"images": None}, {"seconds": []}, {"config": [1]}, {"best": {}}]
    messages = ["is not a readable checkpoint"] * len(unreadable) + ["step -1", "is not a run of toy.py"]
    for damage, message in zip([*unreadable, {"step": -1}, {"system": "other"}], messages):
        common.save_tensors("run/state.safetensors", tensors, header | damage)
        with pytest.raises(UserError, match=rf"run/state.safetensors .*{message}"):
            train(resume="")


def test_options_that_do_not_change_the_numbers_may_change(train):
    train(steps=3)
    assert train(steps=4, resume="", grad_accum=2, checkpoint_every=1, compile=False) == 0
    tensors, header = common.load_tensors("run/state.safetensors")
    del header["config"]["grad_clip"]  # of a run that is older than this option
    common.save_tensors("run/state.safetensors", tensors, header)
    assert train(steps=5, resume="", grad_clip=2.0) == 0


# ---- what goes wrong on the way ----


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_numbers_that_are_not_finite_stop_the_run_and_spare_the_checkpoint(train, monkeypatch, kind):
    def poison(self, loss, t, honest=common.Run.add):
        honest(self, loss * (float("nan") if self.step == 6 and kind == "loss" else 1), t)

    def norm(*arguments, honest=torch.nn.utils.clip_grad_norm_):
        steps.append(honest(*arguments))
        return steps[-1] * (float("inf") if len(steps) == 7 and kind == "gradient" else 1)

    steps = []
    monkeypatch.setattr(common.Run, "add", poison)
    monkeypatch.setattr(toy.nn.utils, "clip_grad_norm_", norm)
    message = r"(loss nan, gradient 0|loss 0.*, gradient inf).* at step 7; the last checkpoint is run/state.safetensors"
    with pytest.raises(UserError, match=message):
        train(checkpoint_every=1)
    assert header_of("run")["step"] == 6
    assert all(t.isfinite().all() for t in load_file("run/state.safetensors").values())


def test_full_disk_is_one_line_and_spares_the_files(train, tmp_path, monkeypatch, capsys):
    train(steps=4)
    before = {p: p.read_bytes() for p in (tmp_path / "run").glob("*.safetensors")}

    def full_disk(tensors, part, metadata):
        part.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(common, "save_file", full_disk)
    assert toy.main("train --steps 8 --out run --resume --device cpu".split()) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: cannot write run/model.safetensors") and len(before) == 2
    assert line.endswith("No space left on device; free some space or name another place")
    assert before == {p: p.read_bytes() for p in before}


# ---- budgets ----


@pytest.fixture
def clock(monkeypatch):
    """The run's clock, moved by the test, and a little each time it is read."""
    now = [0.0]

    def read():
        now[0] += 1e-9
        return now[0]

    monkeypatch.setattr(common.time, "perf_counter", read)
    return now


@pytest.fixture
def progress(clock, monkeypatch):
    """The run's progress after each step. The first takes 30 seconds, as with a compiler; then 10 seconds each."""
    progress = []

    def log(self, *numbers, honest=common.Run.log):
        clock[0] += 10.0 if self.step else 30.0
        honest(self, *numbers)
        progress.append(self.progress)

    monkeypatch.setattr(common.Run, "log", log)
    return progress


def test_run_that_sees_too_few_pictures_says_so_early_and_at_the_end(train, progress, monkeypatch, capsys):
    """Two minutes are ten steps of 8 pictures; the toy needs 160. The first step is not counted when it is foretold."""
    monkeypatch.setattr(common, "LOG_EVERY", 1)
    train(steps=None, minutes=2.0)
    lines = [line for line in capsys.readouterr().err.splitlines() if "need" in line]
    ending = "need 160: go on afterwards by the same command with --resume --minutes 4"
    assert len(lines) == 2 and all(line.endswith(ending) for line in lines)
    assert " are 96 pictures" in lines[0] and " are 80 pictures" in lines[1]
    train(steps=None, minutes=5.0, out="enough")  # the same clock, 28 steps
    assert "need" not in capsys.readouterr().err


def test_first_step_is_no_part_of_the_schedule_but_of_the_budget(train, progress):
    train(steps=None, minutes=1.0)
    assert progress == [0, pytest.approx(1 / 3), pytest.approx(2 / 3), 1]
    train(steps=None, minutes=2.0, resume="")
    assert progress[4:] == [pytest.approx((70 + 10 * k - 30) / 90) for k in range(6)]


def test_whichever_budget_ends_first_ends_the_run(train, clock):
    train("steps", steps=7, epochs=3, minutes=9.0)
    train("epochs", steps=99, epochs=3)  # 24 pictures, 8 in each step
    assert header_of("steps")["step"] == 7 and header_of("epochs")["step"] == 9


def test_checkpoints_and_pictures_come_at_their_marks(train, all_marks, monkeypatch):
    saved, pictures = [], []
    monkeypatch.setattr(common.Run, "save", lambda self, *parts: saved.append(self.step))
    monkeypatch.setattr(common.Run, "save_pictures", lambda self, rgb: pictures.append(self.step))
    train(steps=20, checkpoint_every=7)
    assert pictures == [2, 4, 6, 10, 14, 20] and saved == [2, 4, 6, 7, 10, 14, 20]


# ---- what a run leaves ----


def test_run_folder_holds_what_the_design_names(train):
    assert train() == 0
    names = {"model.safetensors", "state.safetensors", "log.csv", "samples", "index.html", ".lock"}
    assert set(os.listdir("run")) == names
    assert Image.open("run/samples/step_000020.png").size == (16, 16)
    weights, header = common.load_tensors("run/model.safetensors")
    state = load_file("run/state.safetensors")
    assert all(torch.equal(weights[k], state[f"ema.{k}"]) for k in weights)
    assert any(not torch.equal(weights[k], state[f"model.{k}"]) for k in weights)
    assert (header["system"], header["step"], header["config"]["width"]) == ("toy", 20, 8) and header["data"]


def test_log_holds_the_mean_loss_of_all_pictures_and_of_each_part_of_the_time(train, monkeypatch):
    losses, times = [], []

    def add(self, loss, t, honest=common.Run.add):
        losses.append(loss.detach())
        times.append(t)
        honest(self, loss, t)

    monkeypatch.setattr(common.Run, "add", add)
    train(grad_accum=2, decay="none", warmup=0)
    rows, losses, times = log_of("run"), torch.cat(losses), torch.cat(times)
    assert [row["step"] for row in rows] == ["10", "20"] and [row["images"] for row in rows] == ["80", "160"]
    for row, part in zip(rows, (slice(0, 80), slice(80, 160))):
        assert float(row["loss"]) == pytest.approx(losses[part].mean().item(), rel=1e-4) and float(row["lr"]) == 0.01
        for k in range(8):
            chosen = losses[part][(times[part] >= k / 8) & (times[part] < (k + 1) / 8)]
            assert float(row[f"loss_bin_{k}"]) == pytest.approx(chosen.mean().item(), rel=1e-4)
    assert float(rows[1]["loss"]) < float(rows[0]["loss"])


def test_best_weights_are_those_with_the_lowest_held_out_loss(train, monkeypatch):
    losses = iter([3.0, 1.0, 2.0])

    def save(self, *parts, honest=common.Run.save):
        honest(self, *parts, held_out_loss=next(losses), note="kept")

    monkeypatch.setattr(common.Run, "save", save)
    train(steps=3, checkpoint_every=1)
    header = common.load_tensors("run/best.safetensors", header_only=True)[1]
    assert (header["step"], header["held_out_loss"]) == (2, 1.0) and header_of("run")["note"] == "kept"


def test_page_needs_no_other_file_and_no_script(train, all_marks):
    train()
    page, tags = common.Path("run/index.html").read_text(), []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attributes):
            tags.append(tag)
            for name, value in attributes:
                assert not name.startswith("on") and (name not in ("src", "href") or value.startswith("data:image/png"))

    Reader().feed(page)
    assert tags.count("img") == tags.count("input") == 6 + 1 + 8 and not {"script", "link", "iframe"} & set(tags)
    assert not re.search(r"https?://|url\(|@import", page)
    assert "<td>grad_accum</td>" in page and "step 20, 160 pictures" in page


def test_page_shows_what_to_expect(train, monkeypatch):
    charts, honest = {}, common.chart
    expected = {"run": "an earlier run", "curve": [[8, 1], [400, 0.1], [401, 0.05]]}
    monkeypatch.setattr(common, "expected_run", lambda system, config: expected if config.width == 8 else None)
    monkeypatch.setattr(
        common, "chart", lambda title, curves, **how: charts.update(curves) or honest(title, curves, **how)
    )
    for width in (4, 8):
        train(str(width), width=width, steps=50)
        assert ("Expected: an earlier run." in common.Path(f"{width}/index.html").read_text()) == (width == 8)
    assert charts["expected"] == [(8, 1), (400, 0.1)]  # as far as this run goes
    assert charts["this run"] == [(int(row["images"]), float(row["loss"])) for row in log_of("8")]
    assert charts["t 0.25 to 0.375"] == [(int(row["images"]), float(row["loss_bin_2"])) for row in log_of("8")]


EXPECTED = json.loads((ROOT / "assets" / "expected.json").read_text())


@pytest.mark.parametrize("run", EXPECTED, ids=lambda run: run["settings"]["system"])
def test_demo_runs_and_no_others_know_what_loss_to_expect(run):
    module = importlib.import_module(run["settings"]["system"])
    given = {"objective": run["settings"].get("objective", "flow")} if module.__name__ == "unet_ddpm" else {}
    config = common.make_config(module.Config, given | {"minutes": 3.0, "seed": 5}, module.PRESETS)
    assert common.expected_run(module.__name__, config) == run
    assert common.expected_run("toy", config) is None
    others = [{"image_size": 16}, {"lr": 1e-5}, {"batch_size": 4}]
    others += {"jit_lab": [{"color_fraction": 1.0}], "serpentine_vae": [{"predict": "eps"}]}.get(module.__name__, [])
    others += {"dit_t2i": [{"start": "run"}, {"arch": "joint"}], "unet_ddpm": [{"vae": "v"}]}.get(module.__name__, [])
    for other in others:
        assert common.expected_run(module.__name__, dataclasses.replace(config, **other)) is None, other
    pictures, losses = zip(*run["curve"])
    assert 30 <= len(losses) <= 40 and list(pictures) == sorted(set(pictures)) and losses[0] > 3 * losses[-1] > 0


def test_a_thinned_log_has_the_mean_loss_of_each_part():
    rows = [{"images": f"{32 * i}", "loss": f"{32 * i}"} for i in range(1, 1001)]
    curve = expected.thin(rows)
    assert 38 < len(curve) <= 40 and all(y == pytest.approx(x, rel=1e-3) for x, y in curve)
    assert curve[0][0] < 100 and curve[-1][0] == pytest.approx(32_000 * (1 + (39 / 40) ** 2) / 2, rel=0.01)


def test_skipped_pictures_are_named_with_escapes_that_any_console_can_print(train, monkeypatch):
    Image.new("RGB", (8, 8)).save("0.png")
    told = {"a\n\x1b]0;title\x07\x1b[31m.png": "a\\n\\x1b]0;title\\x07\\x1b[31m.png", "\u732b.png": "\\u732b.png"}
    told[os.fsdecode(b"\xff.png")] = "\\udcff.png"
    for name in told:
        common.Path(name).write_text("no picture")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "cp1252"))
    assert toy.main("train --data . --steps 1 --out run --device cpu".split()) == 0
    sys.stdout.flush()
    out, listed = sys.stdout.buffer.getvalue().decode(), common.Path("run/skipped.txt").read_text()
    assert "skipped 3 pictures: a" in out and "\x1b" not in out + listed
    assert all(shown in out for shown in told.values())


def test_export_halves_a_checkpoint(train, capsys):
    train(steps=1)
    assert toy.main("export --weights run --out half.safetensors".split()) == 0
    (whole, header), (half, half_header) = map(common.load_tensors, ("run/model.safetensors", "half.safetensors"))
    assert half_header == header and whole.keys() == half.keys()
    assert all(torch.equal(half[key], whole[key].bfloat16()) for key in whole)
    assert toy.main(["export"]) == 2 and "no weights at runs/toy" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no signal for the death of a parent")
def test_processes_that_paint_end_with_a_killed_run(tmp_path):
    words = [sys.executable, str(ROOT / "jit_lab.py"), "train", "--image-size", "80", "--steps", "2", "--out", "run"]
    run = subprocess.Popen(words, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    painters = common.Path(f"/proc/{run.pid}/task/{run.pid}/children")

    def wait_until(condition, seconds):
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.1)

    wait_until(painters.read_text, 60)
    time.sleep(0.5)
    pids = painters.read_text().split()
    run.kill()
    run.wait()
    wait_until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in pids), 10)
