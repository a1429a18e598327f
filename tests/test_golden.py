"""Forward passes of the published models, computed once by the published code: tests/fixtures/*_dev_*.safetensors."""

import json

from dit_t2i import DiT
from jit_lab import JiT
from unet_ddpm import UNetModel

import pytest
import torch
from conftest import FIXTURES
from safetensors import safe_open
from safetensors.torch import load_file


@pytest.mark.parametrize("name", ["jit_dev_0", "jit_dev_1"])
def test_forward_equals_the_official_jit(name):
    path = FIXTURES / f"{name}.safetensors"
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["config"])
    tensors = load_file(path)
    model = JiT(**config)
    model.load_state_dict({k.removeprefix("weight."): v for k, v in tensors.items() if k.startswith("weight.")})
    output = model.eval()(tensors["input.x"], tensors["input.t"], tensors["input.y"])
    assert (output - tensors["output"]).abs().max() < 1e-4


@pytest.mark.parametrize("number", [0, 1])
def test_forward_equals_guided_diffusion(number):
    path = FIXTURES / f"adm_unet_dev_{number}.safetensors"
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["config"])
    golden = load_file(path)
    # Its class wants factors where ours, like the write-up, wants sides of maps.
    config["attention_resolutions"] = [config["image_size"] // factor for factor in config["attention_resolutions"]]
    model = UNetModel(**({"num_head_channels": -1} | config)).eval()
    model.load_state_dict({k.removeprefix("weight."): v for k, v in golden.items() if k.startswith("weight.")})
    with torch.no_grad():
        out = model(golden["input.x"], golden["input.t"], golden.get("input.y"))
    assert (out - golden["output"]).abs().max() < 1e-4


def test_forward_equals_the_published_code():
    path = FIXTURES / "dfs_dit_dev_0.safetensors"
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["config"])
    golden = load_file(path)
    config["depth"], config["num_heads"] = config.pop("n_layer"), config.pop("n_head")
    model = DiT(**config).eval()
    model.load_state_dict({k.removeprefix("weight."): v for k, v in golden.items() if k.startswith("weight.")})
    t = golden["input.timestep_times_1000"] / 1000
    out = model(golden["input.x"], t, golden["input.text_embeddings"])
    assert (out - golden["output"]).abs().max() < 1e-4
