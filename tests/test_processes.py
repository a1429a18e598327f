"""Several processes under torchrun learn what one learns, end together, and go on from a checkpoint."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time

import common

import pytest
import toy
from conftest import ENVIRONMENT, ROOT, TINY_FLAGS
from safetensors.torch import load_file

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

    def job(name, kind, more=""):
        shared = f"--data {data} --out {folder / f'{name}-{kind}'} --steps {20 if name == 'toy' else 4} --batch-size 8"
        shared += f" --ema 0.9 --no-compile --device cpu --precision fp32 {more}"
        return [*SMALL[name].split(), *shared.split()]

    same = "--decay none --warmup 0"  # with learning rates that do not depend on the budget
    jobs = [job(name, *kind) for name in SMALL for kind in (("ddp", "--grad-accum 2"), ("fsdp", "--fsdp"))]
    jobs += [job("toy", "parts", f"{same} --steps 10"), job("toy", "parts", f"{same} --resume --fsdp")]
    jobs.append(job("toy", "mistake", "--batch-size 9"))
    (folder / "jobs.json").write_text(json.dumps(jobs))
    (folder / "trainings.py").write_text(TRAININGS)
    options = dict(cwd=folder, env=ENVIRONMENT | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}, text=True, timeout=300)
    done = subprocess.run(torchrun(folder / "trainings.py"), capture_output=True, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("fresh run") == len(jobs) - 2  # the first process alone prints
    assert done.stderr.count("--batch-size 9 is no multiple of 2, --grad-accum times processes") == 2
    assert not (folder / "toy-mistake").exists() and "Traceback" not in done.stderr
    alone = [job(name, "one") for name in SMALL]
    alone += [job("toy", "parts", f"{same} --resume --steps 30"), job("toy", "whole", f"{same} --steps 30")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "MARKS", ())
        for file, *words in alone:
            assert importlib.import_module(file).main(words) == 0
    return folder


def step_of(out):
    path = out / "state.safetensors"
    return common.load_tensors(path, header_only=True)[1]["step"] if path.exists() else 0


def assert_same_run(one, two, apart, file):
    """The logs of two run folders are as good as equal, and the tensors of `file` at most `apart`."""
    logs = [common.read_log(folder) for folder in (one, two)]
    assert [row["step"] for row in logs[0]] == [row["step"] for row in logs[1]] != []
    for a, b in zip(*logs):
        assert a["images"] == b["images"] and float(a["loss"]) == pytest.approx(float(b["loss"]), abs=2e-5)
        assert float(a["grad_norm"]) == pytest.approx(float(b["grad_norm"]), rel=1e-3)
    a, b = (load_file(folder / file) for folder in (one, two))
    assert a.keys() == b.keys() and max((a[key] - b[key]).abs().max() for key in a) < apart


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_learn_what_one_learns(trained, name, kind):
    apart = 5e-3 if "muon" in SMALL[name] else 1e-3  # Muon's iterations may be in bfloat16
    assert_same_run(trained / f"{name}-one", trained / f"{name}-{kind}", apart, "model.safetensors")


def test_another_number_of_processes_goes_on(trained):
    """Ten steps in two processes, ten in two sharded ones, ten in one: as thirty in one."""
    assert [row["step"] for row in common.read_log(trained / "toy-parts")] == ["10", "20", "30"]
    assert_same_run(trained / "toy-whole", trained / "toy-parts", 5e-3, "state.safetensors")


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
            assert job.poll() is None, job.communicate()
            assert time.time() < deadline  # without communicate(), which would wait for a job that is alive
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
    steps = [int(row["step"]) for row in common.read_log(out)]
    assert steps == sorted(set(steps)) and steps[-1] == step + 10
