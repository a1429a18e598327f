"""common.py: learning rates, averages and optimizers, random numbers, checkpoints, autoencoders, options and errors."""

import copy
import dataclasses
import math
import pickle
import types

import common
from common import AutoencoderKL, BatchRng, UserError

import numpy as np
import pytest
import torch
import toy
from PIL import Image
from safetensors.torch import save_file

# ---- optimization ----


def test_learning_rate_rises_then_falls():
    def factor(progress, warmup=0.1, decay="cosine", step=0):
        return common.lr_factor(progress, step, warmup, decay)

    assert factor(0.0) == 0 and factor(0.05) == pytest.approx(0.5)
    assert factor(0.1) == pytest.approx(1) and factor(0.55) == pytest.approx(0.5)
    assert factor(1.0) == pytest.approx(0, abs=1e-12)
    assert factor(0.25, decay="linear") == pytest.approx(0.75 / 0.9) and factor(1.0, decay="linear") == 0
    assert factor(0.9, decay="none") == 1 and factor(0.0, 0.0) == 1
    # From 1 on, the warm-up counts steps. The fall then begins at the start of the run.
    assert [factor(0.0, 4, "none", step) for step in range(5)] == [0.25, 0.5, 0.75, 1, 1]
    whole = [factor(step / 20, 10, "linear", step) for step in range(21)]
    assert whole == pytest.approx([min((step + 1) / 10, 1 - step / 20) for step in range(21)])


def test_ema_is_the_weighted_sum_of_all_weights_so_far():
    model, ema = (torch.nn.Linear(64, 1, bias=False, dtype=torch.float64) for _ in range(2))
    walk = torch.randn(201, 1, 64, dtype=torch.float64).cumsum(dim=0)
    first = ema.weight.detach().clone()
    for step in range(1, 201):
        model.weight.data.copy_(walk[step])
        common.update_ema(ema, model, step, 0.9)
    decays = [min(0.9, (1 + step) / (10 + step)) for step in range(201)]
    expected = math.prod(decays[1:]) * first
    for step in range(1, 201):
        expected += (1 - decays[step]) * math.prod(decays[step + 1 :]) * walk[step]
    torch.testing.assert_close(ema.weight.data, expected)
    assert decays[1] < 0.2 and decays[-1] == 0.9
    common.update_ema(ema, model, 201, 0.0)
    assert torch.equal(ema.weight, model.weight)


def test_muon_makes_all_directions_of_a_step_equally_long():
    """Against U V^T of the gradient's singular value decomposition, of which its five iterations stay within a third;
    parameters that are no matrix take AdamW's step."""
    model = torch.nn.Linear(24, 40)
    twin = copy.deepcopy(model)
    before = model.weight.detach().clone()
    config = toy.Config(optimizer="muon", lr=0.01)
    optimizer, _ = common.make_optimizer(config, model, torch.device("cpu"), [model])
    adamw = torch.optim.AdamW([twin.bias], 0.01, (0.9, 0.95), weight_decay=0.0)
    for part in (optimizer, adamw):
        common.set_lr(part, 0.005)  # as in a warm-up
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


def test_muon_in_bfloat16_makes_torchs_steps():
    model = torch.nn.Sequential(torch.nn.Linear(24, 40), torch.nn.Linear(40, 8))
    twin, weights = copy.deepcopy(model), [model[0].weight, model[1].weight]
    optimizer = common.Muon(weights, [model[0].bias, model[1].bias], 0.01, (0.9, 0.95), 0.1, True, torch.bfloat16)
    reference = torch.optim.Muon([twin[0].weight, twin[1].weight], 0.01, 0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        x = torch.randn(16, 24)
        for net in (model, twin):
            net.zero_grad()
            net(x).square().mean().backward()
        optimizer.step()
        reference.step()
        for ours, theirs in zip((model[0].bias, model[1].bias), (twin[0].bias, twin[1].bias)):
            theirs.data.copy_(ours)  # AdamW's part is not compared
    assert torch.equal(model[0].weight, twin[0].weight) and torch.equal(model[1].weight, twin[1].weight)


@pytest.mark.parametrize("kind, slots", [("adamw", ["exp_avg", "exp_avg_sq", "step"]), ("muon", ["momentum_buffer"])])
def test_state_that_is_not_the_optimizers_own_is_refused(kind, slots):
    model, config = toy.Model(8), toy.Config(optimizer=kind)
    optimizer, _ = common.make_optimizer(config, model, torch.device("cpu"), model.blocks)
    tensors = common.optimizer_state(model, optimizer)[1]
    keys = sorted(k for k in tensors if k.startswith("blocks.0.up.weight"))
    assert keys == [f"blocks.0.up.weight:{slot}" for slot in slots]
    for broken in ({k: v for k, v in tensors.items() if k != keys[0]}, tensors | {keys[0]: torch.zeros(3, 3)}):
        with pytest.raises(UserError, match=f"state: no {keys[0]} of this model's shape"):
            common.load_optimizer(model, optimizer, broken, "state")


def test_blocks_are_compiled_where_the_budget_is_long_enough_to_gain(monkeypatch):
    def compiled(**options):
        blocks = [types.SimpleNamespace(compile=lambda dynamic: calls.append(dynamic)) for _ in range(2)]
        calls = []
        common.compile_blocks(common.TrainConfig(**options), torch.device(options.get("device", "cpu")), blocks)
        return len(calls)

    monkeypatch.setattr(common.shutil, "which", lambda name: name)
    assert [compiled(minutes=5), compiled(minutes=1), compiled(steps=1000), compiled(steps=999)] == [2, 0, 2, 0]
    assert [compiled(steps=9, compile=True), compiled(minutes=9, compile=False), compiled(device="mps")] == [2, 0, 0]
    monkeypatch.setattr(common.shutil, "which", lambda name: None)
    assert compiled(minutes=5) == 0


# ---- random numbers ----


def test_numbers_of_a_row_do_not_depend_on_processes_and_accumulation(monkeypatch):
    for kind, size in (("randn", (2, 3)), ("rand", ())):
        whole = getattr(BatchRng(12, 5, 6), kind)(*size)
        for processes, grad_accum in ((1, 1), (1, 4), (2, 3), (3, 1)):
            seen = []
            for process in range(processes):
                monkeypatch.setattr(common, "world", lambda n=processes: n)
                monkeypatch.setattr(common, "rank", lambda n=process: n)
                for rows in common.micro_batches(common.TrainConfig(batch_size=12, grad_accum=grad_accum)):
                    assert torch.equal(getattr(BatchRng(12, 5, 6, rows=rows), kind)(*size), whole[rows])
                    seen += range(12)[rows]
            assert sorted(seen) == list(range(12))


# ---- checkpoints ----


def test_foreign_weights_have_no_header_and_run_no_code(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors", metadata={"config": "[1]"})
    assert common.load_tensors(tmp_path / "x.safetensors")[1] is None
    torch.save({"a": torch.ones(1)}, tmp_path / "x.pth")
    assert common.load_tensors(tmp_path / "x.pth") == ({"a": torch.ones(1)}, None)

    class Attack:
        def __reduce__(self):
            return (tmp_path / "hacked").touch, ()

    (tmp_path / "x.ckpt").write_bytes(pickle.dumps(Attack(), protocol=2))
    torch.save({"a": Attack()}, tmp_path / "x.pt")
    for name in ("x.ckpt", "x.pt"):
        with pytest.raises(UserError, match=f"{name} is not a readable weight file"):
            common.load_tensors(tmp_path / name)
    assert not (tmp_path / "hacked").exists()


def test_prefixes_of_wrappers_are_taken_off(tmp_path):
    weights = {"a.weight": torch.ones(2), "b": torch.zeros(1)}
    for prefix in ("", "module.", "_orig_mod.", "module._orig_mod."):
        save_file({prefix + k: v for k, v in weights.items()}, tmp_path / "w.safetensors", {"config": "not JSON"})
        assert common.load_tensors(tmp_path / "w.safetensors")[0].keys() == weights.keys()
    torch.save({"model_ema1": {"module." + k: v for k, v in weights.items()}, "epoch": 3}, tmp_path / "w.PTH")
    assert common.load_tensors(tmp_path / "w.PTH")[0]["model_ema1"].keys() == weights.keys()


def test_weights_that_do_not_fit_are_named():
    weights = {k: v for k, v in toy.Model(8).state_dict().items() if k != "conv_in.bias"}
    weights |= {"extra": torch.zeros(1), "conv_out.bias": torch.zeros(5)}
    message = r"w.pt does not fit this model: conv_in.bias is missing; extra is unknown; conv_out.bias is \(5,\), not"
    with pytest.raises(UserError, match=message + r" \(3"):
        common.load_into(toy.Model(8), weights, "w.pt")


def test_weights_come_from_what_is_named_then_the_run_then_the_shipped_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    assert str(common.find_weights("a.pt", "jit_lab")) == "a.pt"
    assert str(common.find_weights("run", "jit_lab")) == "run/model.safetensors"
    assert common.find_weights("", "jit_lab").parent.name == "weights"
    common.save_tensors(tmp_path / "runs" / "jit_lab" / "model.safetensors", {}, {})
    assert str(common.find_weights("", "jit_lab")) == "runs/jit_lab/model.safetensors"


# ---- autoencoders ----


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.fp16.safetensors", "vae/diffusion_pytorch_model.bin"])
def test_variants_of_a_vae_load_with_the_scale_of_their_configuration(tmp_path, name):
    weights, path = {k: v.half() for k, v in AutoencoderKL(widths=(32,) * 4).state_dict().items()}, tmp_path / name
    path.parent.mkdir(exist_ok=True)
    (torch.save if path.suffix == ".bin" else save_file)(weights, path)
    assert common.load_vae(tmp_path).scale == 0.18215
    path.with_name("config.json").write_text('{"scaling_factor": 0.13025, "shift_factor": 0.5}')
    vae, latent = common.load_vae(tmp_path), torch.tensor([1.5])
    assert torch.allclose(vae.normalise(latent), torch.tensor([0.13025]))
    assert torch.allclose(vae.normalise(vae.normalise(latent), inverse=True), latent)


def test_an_autoencoder_never_overflows_in_fp16():
    vae, x = AutoencoderKL(widths=(32,) * 4).eval(), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        vae.encoder.conv_in.weight.mul_(1e6)
        expected = vae.encode(x)
        with common.autocast(torch.device("cpu"), "fp16"):
            assert torch.equal(vae.encode(x), expected) and expected.isfinite().all()


# ---- options and errors ----


@dataclasses.dataclass
class Options:
    words: tuple[str, ...] = common.option((), "words", positional=True)
    max_size: int = common.option(3, "size", low=1, high=9)
    kind: str = common.option("a", "kind", choices=("a", "b"))
    rate: float | None = common.option(None, "rate in %", low=0.0)
    fast: bool = common.option(False, "fast")
    weights: tuple[float, ...] = common.option((1.0, 2.0), "weights", flag="--w")
    out: str = common.option("", "picture", picture=True)


@pytest.fixture
def run_options(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def run(line, act=lambda config: None):
        given = []
        subcommands = {"go": (lambda config: given.append(config) or act(config), Options, None, "go on")}
        code = common.run_command_line("x", "This is x.", subcommands, line.split())
        out, err = capsys.readouterr()
        return (code, given[0] if given else None, out, err)

    return run


def test_options_are_typed_and_may_be_written_with_underscores_or_hyphens(run_options):
    assert run_options("go")[1] == Options()
    expected = Options(("red", "car"), 5, "b", 0.5, True, (3.0, 4.0), "a_b.png")
    line = "--kind b --rate=0.5 --fast --w 3 4 --out=a_b.png"
    for size in ("--max-size 5", "--max_size 5", "--max_size=5"):
        assert run_options(f"go red car {size} {line}")[1] == expected
    assert run_options("go --no-fast")[1].fast is False
    assert run_options("") == (0, None, run_options("")[2], "") and "This is x." in run_options("")[2]


@pytest.mark.parametrize(
    "line, message",
    [
        ("go --max-size 0", "--max-size 0: must be a number from 1 to 9"),
        ("go --max-size 10", "--max-size 10: must be a number from 1 to 9"),
        ("go --max-size big", "argument --max-size: invalid int value: 'big' (see"),
        ("go --kind c", "--kind c: choose one of a, b"),
        ("go --rate nan", "--rate nan: must be a number from 0.0 to inf"),
        ("go --rate inf", "--rate inf: must be a number from 0.0"),
        ("go --w nan", "--w nan: must be a number"),
        ("go --out x.mp4", "x.mp4: name a picture file"),
        ("go --nonsense", "unrecognized arguments: --nonsense"),
        ("dream", "invalid choice: 'dream'"),
    ],
)
def test_mistake_is_one_line_and_exit_code_two(line, message, run_options):
    code, config, out, err = run_options(line)
    assert (code, config, out) == (2, None, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err


def test_errors_of_a_program_become_one_line_and_bugs_do_not(run_options):
    def fail(problem):
        def act(config):
            raise problem

        return act

    no_memory = "out of memory; lower --batch-size or the pictures' size, or raise --grad-accum"
    for problem, line in [
        (UserError("no file"), "no file"),
        (UserError("\x1b[31m\nall is well"), r"\x1b[31m\nall is well"),  # a file's name is no command to the terminal
        (PermissionError(13, "denied", "x"), "[Errno 13] denied: 'x'"),
        (MemoryError(), no_memory),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), no_memory),
    ]:
        code, _, _, err = run_options("go", fail(problem))
        assert code == 2 and err == f"error: {line}\n"
    assert run_options("go", fail(KeyboardInterrupt()))[0] == 130
    with pytest.raises(RuntimeError):
        run_options("go", fail(RuntimeError("a bug")))


def test_help_names_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit):
        toy.main(["train", "--help"])
    out = capsys.readouterr().out
    assert all(common.flag_of(field) in out for field in dataclasses.fields(toy.Config))
    assert "[0.01]" in out and "[stripes]" in out and "--preset {demo,paper}" in out  # the demo's lr, not the class's


def test_presets_stand_over_defaults_and_given_options_over_presets():
    def config(**given):
        return common.make_config(toy.Config, given, toy.PRESETS, "toy")

    assert (config().lr, config().steps, config().out) == (0.01, 20, "runs/toy")
    assert (config(lr=0.5).lr, config(preset="paper").width, config(preset="paper").steps) == (0.5, 16, None)
    assert common.make_config(common.SampleConfig, {}, None, "x").out == "samples/x.png"
    assert config(minutes=2.0).steps is None and config(preset="paper", epochs=3).minutes is None


def test_config_in_a_header_is_checked_and_may_have_unknown_fields():
    header = {"config": {"width": 4, "gone": 1, "data": ["a folder"]}}
    config = common.config_from_header(toy.Config, header, "w.pt")
    assert (config.width, config.data, config.lr) == (4, ("a folder",), toy.Config().lr)
    for broken in ({}, {"config": [1]}, {"config": {"width": 0}}):
        with pytest.raises(UserError):
            common.config_from_header(toy.Config, broken, "w.pt")


def test_precision_and_device_are_what_the_machine_has(monkeypatch):
    assert common.pick_device("auto").type in ("cpu", "cuda", "mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device mps: torch finds no such device here"):
        common.pick_device("mps")
    cpu = torch.device("cpu")
    for capability, precision in (("amx_bf16", "bf16"), ("avx512_bf16", "bf16"), ("avx2", "fp32")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda name=capability: {name: True})
        assert common.pick_precision("auto", cpu) == precision and common.pick_precision("fp16", cpu) == "fp16"
    with common.autocast(cpu, "bf16"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


# ---- the smallest diffusion model ----


def test_points_of_noise_become_a_spiral_only_after_the_whole_training(tmp_path):
    def energy_distance(a, b):  # 0 for equal distributions (Szekely & Rizzo 2013, eq. 5)
        return (2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean()).item()

    def strays(points, data):  # the part that is three standard deviations of the spiral's width or more from it
        return (torch.cdist(points, data).min(dim=1)[0] > 0.15).float().mean().item()

    end, data = common.flow_2d(out=tmp_path / "flow.png")
    real = common.spiral(2000)
    assert energy_distance(real, data) < 0.003 and strays(real, data) < 0.002
    # For five seeds 0.0007 to 0.0045 and 2.6 to 4.3 %; after 1,000 steps 0.0026 to 0.0051 and 5.9 to 9.0 %.
    assert energy_distance(end, data) < 0.006 and strays(end, data) < 0.05
    assert np.asarray(Image.open(tmp_path / "flow.png")).std() > 10
    end, data = common.flow_2d(steps=250, out=tmp_path / "early.png")
    assert energy_distance(end, data) > 0.006 and strays(end, data) > 0.2


def test_paths_are_drawn_from_the_noise_to_where_they_end():
    states = torch.tensor([[[-2.0, 1.0]], [[2.0, 1.0]]])  # one point, which moves to the right in one step
    image = np.asarray(common.draw_paths(states, torch.tensor([[0.0, -2.0]])))

    def is_drawn(panel, x, y):
        return (image[int(20 + (y / 6.4 + 0.5) * 240), int((panel + x / 6.4 + 0.5) * 240)] < 255).any()

    assert is_drawn(0, -2, 1) and is_drawn(1, -2, 1) and not is_drawn(1, 0, 1)
    assert is_drawn(3, 0, 1) and is_drawn(3, 2, 1) and not is_drawn(3, 2, -1) and is_drawn(4, 0, -2)
