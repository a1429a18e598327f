"""Several processes under torchrun learn what one learns, end together, and go on from a checkpoint."""

import csv
import importlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import toy
from conftest import ENVIRONMENT, ROOT, TINY_FLAGS
from safetensors.torch import load_file

import common

# name -> (file, the words that train a tiny network)
SMALL = {
    "toy": "toy train --optimizer muon",
    "jit_lab": f"jit_lab train --optimizer muon {' '.join(TINY_FLAGS)}",
    "dit_t2i": "dit_t2i train --optimizer adamw --image-size 16 --depth 2 --num-heads 2 --head-dim 8 --text-dim 16",
    "unet_ddpm": "unet_ddpm train --image-size 16 --model-channels 32 --num-head-channels 32 --num-res-blocks 1 "
    "--channel-mult 1 --attention-resolutions 8",
    "vae": "serpentine_vae train-vae --image-size 16 --channels 4 --vae-width 8",
    "serpentine_vae": "serpentine_vae train --image-size 32 --width 16 --depth 1 --multipliers 1 "
    f"--vae {ROOT / 'weights' / 'serpentine_vae.safetensors'}",
}

# What torchrun starts: several trainings, one after the other, because starting takes longer than they do.
TRAININGS = """
import importlib, json, os, sys, common
os._exit, common.MARKS = lambda code: None, ()
codes = [importlib.import_module(file).main(words) for file, *words in json.loads(open("jobs.json").read())]
sys.exit(codes != [0] * (len(codes) - 1) + [2])
"""


def torchrun(*words, processes=2):
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes, *words]
    return list(map(str, words))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder of runs: each system trained by one process, by two that accumulate, and by two with --fsdp; and the
    toy handed on from two processes to two sharded ones and to one."""
    folder = tmp_path_factory.mktemp("trained")
    data = folder / "pictures"
    data.mkdir()
    for i in range(24):
        common.paint_face(i, 32)[0].save(data / f"{i:02d}.png")
        (data / f"{i:02d}.txt").write_text(f"a {'red green blue'.split()[i % 3]} tile")

    def job(name, out, steps, more=""):
        shared = f"--data {data} --out {folder / out} --steps {steps} --batch-size 8 --ema 0.9 --no-compile"
        return [*SMALL[name].split(), *shared.split(), *"--device cpu --precision fp32".split(), *more.split()]

    same = "--decay none --warmup 0"  # with learning rates that do not depend on the budget
    jobs = []
    for name in SMALL:
        jobs.append(job(name, f"{name}-ddp", 20 if name == "toy" else 4, "--grad-accum 2"))
        jobs.append(job(name, f"{name}-fsdp", 20 if name == "toy" else 4, "--fsdp"))
    jobs += [job("toy", "parts", 10, same), job("toy", "parts", 20, f"{same} --resume --fsdp")]
    jobs.append(job("toy", "mistake", 10, "--batch-size 9"))
    (folder / "jobs.json").write_text(json.dumps(jobs))
    (folder / "trainings.py").write_text(TRAININGS)
    environment = ENVIRONMENT | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    words = torchrun(folder / "trainings.py")
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("fresh run") == len(jobs) - 2  # the first process alone prints
    assert done.stderr.count("--batch-size 9 is no multiple of 2, --grad-accum times processes") == 2
    assert not (folder / "mistake").exists() and "Traceback" not in done.stderr
    alone = [job(name, f"{name}-one", 20 if name == "toy" else 4) for name in SMALL]
    alone += [job("toy", "parts", 30, f"{same} --resume"), job("toy", "whole", 30, same)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "MARKS", ())
        for file, *words in alone:
            assert importlib.import_module(file).main(words) == 0
    return folder


def log_of(folder):
    with open(folder / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def step_of(out):
    path = out / "state.safetensors"
    return common.load_tensors(path, header_only=True)[1]["step"] if path.exists() else 0


def assert_close(one, other, apart):
    a, b = load_file(one), load_file(other)
    assert a.keys() == b.keys() and max((a[key] - b[key]).abs().max() for key in a) < apart


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_learn_what_one_learns(trained, name, kind):
    one, two = (log_of(trained / f"{name}-{which}") for which in ("one", kind))
    assert [row["step"] for row in two] == [row["step"] for row in one]
    assert [row["images"] for row in two] == [row["images"] for row in one]
    for a, b in zip(one, two):
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), abs=2e-5)
        assert float(a["grad_norm"]) == pytest.approx(float(b["grad_norm"]), rel=1e-3)
    apart = 5e-3 if "muon" in SMALL[name] else 1e-3  # Muon's iterations are in bfloat16
    assert_close(*(trained / f"{name}-{which}" / "model.safetensors" for which in ("one", kind)), apart)


def test_another_number_of_processes_goes_on(trained):
    """Ten steps in two processes, ten in two sharded ones, ten in one: as thirty in one."""
    whole, parts = log_of(trained / "whole"), log_of(trained / "parts")
    assert [row["step"] for row in parts] == ["10", "20", "30"]
    for a, b in zip(whole, parts):
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), abs=2e-5)
    assert_close(*(trained / name / "state.safetensors" for name in ("whole", "parts")), 5e-3)


def children(pid):
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    return sorted(map(int, listed.split()))


def test_after_a_killed_process_torchrun_goes_on_and_ctrl_c_saves_in_all_processes(tmp_path):
    out = tmp_path / "run"
    words = f"train --steps 100000 --batch-size 8 --checkpoint-every 5 --device cpu --no-compile --out {out}".split()
    words = torchrun("--max-restarts", 1, ROOT / "tests" / "toy.py", *words)
    job = subprocess.Popen(
        words, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip

    def wait_for_step(step):
        deadline = time.time() + 60
        while step_of(out) <= step:
            assert job.poll() is None and time.time() < deadline, job.communicate()
            time.sleep(0.05)

    try:
        wait_for_step(10)
        os.kill(children(job.pid)[1], signal.SIGKILL)
        # Wait for the second attempt: torchrun ends the first one before it starts it.
        killed_at = step_of(out)
        wait_for_step(killed_at + 10)
        os.killpg(job.pid, signal.SIGINT)  # as a terminal does; torchrun hands it on
        told, errors = job.communicate(timeout=60)
    finally:
        for pid in [*children(job.pid), job.pid] if job.poll() is None else []:
            os.killpg(pid, signal.SIGKILL)
    resumed = int(told.split("resumed at step ")[1].split()[0])
    assert "fresh run" in told and resumed % 5 == 0 and resumed >= 10
    step = step_of(out)
    assert f"stopped and saved at step {step}; to go on" in told and step > resumed, errors
    assert toy.main(f"train --resume {out} --steps {step + 10} --device cpu".split()) == 0
    steps = [int(row["step"]) for row in log_of(out)]
    assert steps == sorted(set(steps)) and steps[-1] == step + 10
