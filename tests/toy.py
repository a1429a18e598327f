"""The smallest model file: a network of four layers that removes noise from pictures of 8 x 8 pixels.

It has everything that a model file has, and a run of twenty steps takes less than a second, so the tests of runs,
checkpoints and processes use it. t = 0 is noise.

    PYTHONPATH=. python tests/toy.py train --steps 20
"""

import copy
import dataclasses
import sys

import common
from common import BatchRng, autocast, flow_point, lr_factor, micro_batches, option, set_lr, update_ema

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclasses.dataclass
class Config(common.TrainConfig):
    data: tuple[str, ...] = option(("stripes",), "stripes, or folders of pictures, .tar or .parquet files")
    batch_size: int = option(8, "pictures per step", low=1)
    optimizer: str = option("adamw", "adamw or muon", choices=("adamw", "muon"))
    width: int = option(8, "channels", low=1)


PRESETS = {"demo": dict(steps=20, lr=1e-2), "paper": dict(minutes=60.0, width=16)}


class Block(nn.Module):
    """x + linear(silu(linear(x))) over the channels of each pixel."""

    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(F.silu(self.up(x)))


class Model(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv_in, self.conv_out = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 3, 3, padding=1)
        self.blocks = nn.ModuleList([Block(width)])
        self.to(memory_format=torch.channels_last)

    def forward(self, x):
        x = self.conv_in(x).permute(0, 2, 3, 1)  # (B, 8, 8, width)
        for block in self.blocks:
            x = block(x)
        return self.conv_out(x.permute(0, 3, 1, 2))


def load_data(config):
    if config.data != ("stripes",):
        return common.load_pictures(config.data, 8)
    pictures = torch.randint(0, 256, (24, 3, 1, 8), generator=torch.Generator().manual_seed(0)).expand(-1, -1, 8, -1)
    return common.Pictures(pictures.byte(), list(map(str, range(24))), [""] * 24, [[]] * 24)


def load_batch(config, data, step, rows):
    return data.pictures[common.batch_index(config, len(data), step)[rows]] / 127.5 - 1


def train(config):
    device, precision = common.init_training(config)
    run = common.Run(config, "toy", enough=160)
    data = load_data(config)
    torch.manual_seed(config.seed)
    model = Model(config.width)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    trained = common.parallelize(config, model, ema, device, lambda net: net.blocks)
    optimizer, scaler = common.make_optimizer(config, model, device, model.blocks)
    run.header = {"data": data.checksum()}
    run.start(model, ema, optimizer, scaler, f"{len(data)} pictures", len(data), data.skipped)
    common.compile_blocks(config, device, model.blocks)
    for step in run.steps():
        lr = config.lr * lr_factor(run.progress, step, config.warmup, config.decay)
        set_lr(optimizer, lr)
        for rows in micro_batches(config):
            rng = BatchRng(config.batch_size, config.seed, step, 1, rows=rows)
            x = load_batch(config, data, step, rows).to(device)
            t, noise = rng.rand().to(device), rng.randn(*x.shape[1:]).to(device)
            with autocast(device, precision):
                x_hat = trained(flow_point(noise, x, t))
            loss = (x_hat - x).square().mean(dim=(1, 2, 3))
            scaler.scale(loss.mean() / config.grad_accum).backward()
            run.add(loss, t)
        scaler.unscale_(optimizer)
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        update_ema(ema, model, step, config.ema)
        run.log(grad_norm, lr)
        if run.checkpoint_due:
            run.save(model, ema, optimizer, scaler)
        if run.pictures_due:
            with torch.no_grad():
                run.save_pictures(ema(common.noise_for(range(4), (3, 8, 8), device)).float() / 2 + 0.5)
    return run.finish()


SUBCOMMANDS = {"train": (train, Config, PRESETS, "train on stripes"), "export": common.export("toy")}


def main(argv=None):
    return common.run_command_line("toy", __doc__, SUBCOMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
