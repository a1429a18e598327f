"""Training in many processes: torchrun's jobs give what one process gives, end with a reason, and go on."""

import csv
import importlib
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_FLAGS
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from webserver import Server, write_shards

import common
import dit_t2i

# name -> file, verb, options
SMALL = {
    "jit_lab": ("jit_lab", "train", [*TINY_FLAGS, "--optimizer", "adamw"]),
    "muon": ("jit_lab", "train", [*TINY_FLAGS, "--optimizer", "muon"]),
    "dit_t2i": ("dit_t2i", "train", "--image-size 16 --depth 2 --num-heads 2 --head-dim 8 --text-dim 16".split()),
    "unet_ddpm": ("unet_ddpm", "train", "--image-size 16 --model-channels 32 --num-head-channels 32".split()),
    "serpentine_vae": ("serpentine_vae", "train", "--image-size 32 --width 16 --depth 1 --multipliers 1".split()),
    "vae": ("serpentine_vae", "train-vae", "--image-size 16 --channels 4 --vae-width 8".split()),
}
SMALL["dit_t2i"][2].extend(["--optimizer", "adamw"])
SMALL["joint"] = (*SMALL["dit_t2i"][:2], [*SMALL["dit_t2i"][2], "--arch", "joint"])
SMALL["unet_ddpm"][2].extend("--num-res-blocks 1 --channel-mult 1 --attention-resolutions 8".split())
SMALL["serpentine_vae"][2].extend(["--vae", str(ROOT / "weights" / "serpentine_vae.safetensors")])


def words_of(name, folder, out, steps, **changes):
    """(file, the words that train a system of SMALL)."""
    file, verb, options = SMALL[name]
    given = dict(data=folder, out=out, steps=steps, batch_size=8, device="cpu", precision="fp32", checkpoint_every=10)
    given |= changes
    return file, [verb, *options, *(str(word) for k, v in given.items() for word in ("--" + k.replace("_", "-"), v))]


def make_pictures(folder):
    """24 captioned pictures of noise."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(24):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(f"a {'red green blue'.split()[i % 3]} tile")
    return folder


@pytest.fixture
def captioned(tmp_path):
    return make_pictures(tmp_path / "pictures")


def torchrun(processes, *words):
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes, *words]


# What torchrun starts below: several trainings, one after the other, to start the processes only once.
TRAININGS = """
import importlib, json, os, sys, common
os._exit = lambda code: None  # with which one would end
drew = set()
for file, words in json.loads(open(sys.argv[1]).read()):
    module, kind = importlib.import_module(file), (file, words[0], "--fsdp" in words)
    common.MARKS = () if kind in drew else (1.0,)  # pictures at the end, once from whole weights and once from sharded
    drew.add(kind)
    module.DrawConfig.__post_init__ = lambda options: vars(options).update(num=4, steps=4)  # few of them, and rough
    code = module.main(words)
    if code:
        sys.exit(code)
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Each system trained for twenty steps by one process, by two with accumulation, and by two with --fsdp; and one
    run handed on from two processes to two sharded ones and to one. Returns the folder with their run folders."""
    folder = tmp_path_factory.mktemp("trained")
    data, jobs = make_pictures(folder / "pictures"), []
    same = dict(decay="none", warmup=0, ema=0.9, time_fall=0)  # with nothing that knows the budget

    def add(name, out, steps, *more, **changes):
        file, words = words_of(name, data, folder / out, steps, **changes)
        jobs.append([file, [*words, *more]])

    for name in SMALL:
        add(name, f"{name}-ddp", 20, "--grad-accum", "2", ema=0.9)
        add(name, f"{name}-fsdp", 20, "--fsdp", ema=0.9)
    add("dit_t2i", "parts", 10, **same)
    add("dit_t2i", "parts", 20, "--resume", "--fsdp", **same)
    small = "--image-size 16 --channels 4 --vae-width 8 --vae-steps 3 --width 16 --depth 1 --multipliers 1".split()
    add("vae", "both", 3)
    jobs[-1][1] = ["train", *small, *jobs[-1][1][1 + len(SMALL["vae"][2]) :]]
    server = Server()
    rows = [{"url": f"{server.address}/good/{n}", "caption": f"picture {n}"} for n in range(60)]
    shards = write_shards(folder / "shards", rows, 7)
    add("dit_t2i", "stream", 10, "--private-hosts", "--threads", "1", stream=shards, data="drawn")
    (folder / "jobs.json").write_text(json.dumps(jobs))
    (folder / "trainings.py").write_text(TRAININGS)
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    words = list(map(str, torchrun(2, folder / "trainings.py", folder / "jobs.json")))
    with server:
        done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    (folder / "asked.json").write_text(json.dumps(server.asked))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("fresh run") == len(jobs)  # the first process alone speaks; one resumes, one is two
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "MARKS", ())
        for name in SMALL:
            file, words = words_of(name, data, folder / f"{name}-one", 20, ema=0.9)
            assert importlib.import_module(file).main(words) == 0
        for out, more in (("parts", ["--resume"]), ("whole", [])):
            assert dit_t2i.main([*words_of("dit_t2i", data, folder / out, 30, **same)[1], *more]) == 0
    return folder


@pytest.fixture
def launch(tmp_path):
    """Start a file's train, in one process or under torchrun; returns the process."""
    started = []

    def run(file, *words, processes=1, options=()):
        words = [*(torchrun(processes, *options) if processes > 1 else [sys.executable]), ROOT / f"{file}.py", *words]
        environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            list(map(str, words)), cwd=tmp_path, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        started.append(process)
        return process

    yield run
    for process in started:
        if process.poll() is None:
            for pid in [*children(process.pid), process.pid]:  # each has a process group of its own
                os.killpg(pid, signal.SIGKILL)


def flat(named):
    file, words = named
    return [file, *words]


def ended(process, code=0):
    out, err = process.communicate(timeout=150)
    assert process.returncode == code, err[-3000:]
    return out, err


def log_of(folder):
    with open(folder / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def header_of(path):
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["config"])


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_learn_what_one_learns(trained, name, kind):
    one, two = (log_of(trained / f"{name}-{which}") for which in ("one", kind))
    assert [row["step"] for row in two] == ["10", "20"] and [row["images"] for row in two] == ["80", "160"]
    assert float(one[0]["loss"]) != float(one[1]["loss"])
    for a, b in zip(one, two):
        assert abs(float(a["loss"]) - float(b["loss"])) < 1e-5
        assert abs(float(a["grad_norm"]) / float(b["grad_norm"]) - 1) < 1e-3
    apart = 5e-3 if name == "muon" else 1e-3  # Muon's iterations are in bfloat16
    same_weights(*(trained / f"{name}-{which}" / "model.safetensors" for which in ("one", kind)), apart)


def same_weights(one, other, apart=1e-3):
    a, b = load_file(one), load_file(other)
    assert a.keys() == b.keys() and max((a[key] - b[key]).abs().max() for key in a) < apart


def test_another_number_of_processes_goes_on(trained):
    """Ten steps in two processes, ten in two sharded ones, ten in one: as thirty in one."""
    whole, parts = log_of(trained / "whole"), log_of(trained / "parts")
    assert [row["step"] for row in parts] == ["10", "20", "30"]
    for a, b in zip(whole, parts):
        assert abs(float(a["loss"]) - float(b["loss"])) < 1e-5
    same_weights(*(trained / name / "state.safetensors" for name in ("whole", "parts")))


def test_processes_share_a_stream(trained):
    """Eighty pictures of sixty rows, forty for each process: each row once, and twenty again in the second pass."""
    state, asked = header_of(trained / "stream" / "state.safetensors"), json.loads((trained / "asked.json").read_text())
    counts = [state["counts"] for state in state["stream"]]
    assert [sum(count.values()) for count in counts] == [40, 40] and len(asked) == 60
    assert all(set(count) <= {"fetched", "from the cache"} for count in counts)
    assert [state["place"][0] for state in state["stream"]] == [1, 1]


def test_both_stages_of_serpentine_vae_follow_each_other(trained):
    """Each process has the VAE that the first one wrote."""
    assert header_of(trained / "both-vae" / "model.safetensors")["step"] == 3
    header = header_of(trained / "both" / "model.safetensors")
    assert header["step"] == 3 and header["vae"]


def test_accumulation_changes_nothing(captioned, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, parts in (("one", 1), ("four", 4)):
        assert dit_t2i.main(words_of("dit_t2i", captioned, name, 10, grad_accum=parts)[1]) == 0
    one, four = (float(log_of(tmp_path / name)[0]["loss"]) for name in ("one", "four"))
    assert abs(one - four) < 1e-6


def test_killed_process_ends_the_attempt_and_torchrun_goes_on_from_the_last_checkpoint(captioned, launch, tmp_path):
    """kill -9 of one process, twice: the first time there is another attempt, the second time there is none left."""
    out, every = tmp_path / "run", 5
    words = [*flat(words_of("dit_t2i", captioned, out, 1000, checkpoint_every=every)), "--no-compile"]
    job, reached = launch(*words, processes=2, options=["--max-restarts", "1"]), [0]
    for number in range(2):
        deadline = time.time() + 60
        while time.time() < deadline:
            reached.append(header_of(out / "state.safetensors")["step"] if (out / "state.safetensors").exists() else 0)
            if reached[-1] > reached[0] + 2 * every:
                break
            time.sleep(0.05)
        os.kill(children(job.pid)[number], signal.SIGKILL)
        reached = [reached[-1]] + [header_of(out / "state.safetensors")["step"]] * (number == 0)
    told, err = ended(job, 1)
    assert "Signal 9 (SIGKILL)" in err
    resumed = int(told.split("resumed at step ")[1].split()[0])
    assert told.count("resumed at step") == 1 and resumed > 0 and resumed % every == 0
    step = header_of(out / "state.safetensors")["step"]
    assert resumed < step < 1000
    out_again, _ = ended(launch(*flat(words_of("dit_t2i", captioned, out, step + 10)), "--resume"))
    assert f"resumed at step {step}" in out_again
    steps = [int(row["step"]) for row in log_of(out)]
    assert steps == sorted(set(steps)) and steps[-1] == step + 10


def children(pid):
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    return sorted(map(int, listed.split()))


def test_mistake_ends_the_job_with_its_reason(captioned, launch, tmp_path):
    _, err = ended(launch(*flat(words_of("jit_lab", captioned, "run", 5, batch_size=9)), processes=2), 1)
    assert "error: --batch-size 9 is no multiple of 2, --grad-accum times processes" in err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    words = flat(words_of("jit_lab", captioned, "full", 5))
    _, err = ended(launch(*words, processes=2, options=["--max-restarts", "1"]), 1)
    assert err.count("error: full holds files but no checkpoint") == 2  # and again when torchrun tried anew
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["letter.txt"]
    _, err = ended(launch(*flat(words_of("jit_lab", captioned, "run", 5)), "--fsdp"), 2)
    assert "start them with torchrun" in err and "Traceback" not in err


def test_a_report_is_written_whole_though_torchrun_ends_the_process(monkeypatch, capsys):
    """Half a report would keep torchrun from another attempt."""
    heard, written = [], []

    class Handler:
        def record_exception(self, problem):
            os.kill(os.getpid(), signal.SIGTERM)
            written.append(problem)

    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(common, "get_error_handler", Handler)
    before = signal.signal(signal.SIGTERM, lambda signum, frame: heard.append(signum))
    try:
        assert common.fail("a reason", "a line") == 2
    finally:
        signal.signal(signal.SIGTERM, before)
    assert written == ["a reason"] and not heard and capsys.readouterr().err == "error: a line\n"


def test_ctrl_c_saves_in_all_processes_at_one_step(captioned, launch, tmp_path):
    out = tmp_path / "run"
    words = flat(words_of("dit_t2i", captioned, out, 5000))
    job, deadline = launch(*words, "--no-compile", processes=2), time.time() + 60
    while not (out / "state.safetensors").exists():
        assert job.poll() is None and time.time() < deadline
        time.sleep(0.05)
    os.killpg(job.pid, signal.SIGINT)  # as a terminal does; torchrun hands it on
    told, err = job.communicate(timeout=60)
    step = header_of(out / "state.safetensors")["step"]
    assert f"stopped and saved at step {step}" in told and "torchrun --nproc-per-node 2" in told
    assert "Connection closed" not in err


def test_draws_of_parts_are_rows_of_the_whole():
    for kind, size in (("randn", (2, 3)), ("rand", ()), ("randint", (7,))):
        whole = getattr(common.Draw(12, 5, 6), kind)(*size)
        for passes in (1, 2, 3, 4):
            for part in range(passes):
                rows = slice(part, None, passes)
                assert torch.equal(getattr(common.Draw(12, 5, 6, rows=rows), kind)(*size), whole[rows])
    assert not torch.equal(common.Draw(12, 5, 6).rand(), common.Draw(12, 5, 7).rand())
