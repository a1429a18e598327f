"""dit_t2i.py against closed forms, naive versions and published layouts."""

import json

import common
import dit_t2i
from common import BatchRng, UserError
from dit_t2i import Config, DiT, TrainingData, Words

import numpy as np
import pytest
import torch
from conftest import random_weights, read_fixture, shapes
from PIL import Image
from safetensors.torch import load_file, save_file

SIZES = dict(patch_size=2, in_channels=3, depth=2, num_heads=2, head_dim=8, text_dim=12, latent_size=8)
CPU = torch.device("cpu")
NOTHING = torch.zeros(1, 2, 3)  # text of no meaning


def awake(**changes):
    return random_weights(DiT(**(SIZES | changes)), std=0.5)


def inputs(batch=2, size=8, words=5):
    return torch.randn(batch, 3, size, size), torch.rand(batch), torch.randn(batch, words, 12)


# ---- model ----


def test_paper_preset_has_the_published_names_and_shapes():
    with torch.device("meta"):
        model = dit_t2i.build_model(Config(**dit_t2i.PRESETS["paper"]), (4, 32))
    assert shapes(model.state_dict()) == read_fixture("dfs_258m")
    assert sum(p.numel() for p in model.parameters()) == 257_669_392
    assert sum(p.numel() for p in model.parameters() if not p.requires_grad) == 5_903_680


@pytest.mark.parametrize("arch", ["dual", "joint"])
def test_fresh_layer_is_the_identity_and_a_fresh_model_returns_zero(arch):
    torch.manual_seed(0)
    model = DiT(**SIZES, arch=arch)
    txt, vis, condition = torch.randn(2, 5, 16), torch.randn(2, 16, 16), torch.randn(2, 16)
    after = model.layers[0](txt, vis, condition, dit_t2i.msrope(4, 4, 5, 8, CPU) if arch == "dual" else None)
    assert torch.equal(after[0], txt) and torch.equal(after[1], vis)
    assert (model(*inputs()) == 0).all()


@pytest.mark.parametrize("height, width", [(16, 16), (24, 20), (16, 24), (24, 16)])
def test_positions_are_a_centred_grid_and_its_diagonal(height, width):
    """So a larger picture has the trained positions in its middle. Text begins where the longer side ends."""
    text = torch.arange(3) + max(height, width) // 2
    rows = torch.cat((text, torch.arange(-height // 2, height // 2).repeat_interleave(width)))
    columns = torch.cat((text, torch.arange(-width // 2, width // 2).repeat(height)))
    cos, sin = dit_t2i.msrope(height, width, 3, 8, CPU)
    # The first two of four angles follow the row, at frequencies 1 and 1/100; the others the column.
    for k, (position, frequency) in enumerate([(rows, 1), (rows, 0.01), (columns, 1), (columns, 0.01)]):
        assert torch.allclose(cos[:, k], torch.cos(position * frequency), atol=1e-5)
        assert torch.allclose(sin[:, k], torch.sin(position * frequency), atol=1e-5)
    fixed = torch.cat([common.timestep_embedding(positions[3:], 16) for positions in (rows, columns)], dim=1)
    assert torch.equal(dit_t2i.grid_embedding(height, width, 32, CPU), fixed)


@torch.no_grad()
def test_words_of_a_joint_models_own_table_join_the_time_and_tokens_know_their_places():
    """The mean of a caption's words is added to the time; what fills up a caption is not. Learned positions are
    stretched for a larger picture."""
    model, (z, t, _) = awake(arch="joint", vocabulary=5), inputs(3, size=16)
    captions = [[2, 1, 3], [4], []]
    text = torch.tensor([words + [0] * (3 - len(words)) for words in captions])
    condition, txt, vis = model.embed(z, t, text, (8, 8))
    vectors = model.text_norm(model.words(text))
    means = [rows[: len(words)].sum(dim=0) / max(1, len(words)) for rows, words in zip(vectors, captions)]
    time = model.step_embed(t) + model.caption_embed(torch.stack(means))
    tokens = model.text_proj(vectors) + common.timestep_embedding(torch.arange(3), 16)
    stretched = torch.nn.functional.interpolate(model.positions, (8, 8), mode="bicubic")
    patches = (model.patch_embed(z) + stretched).flatten(2).transpose(1, 2)
    for ours, expected in ((condition, time), (txt, tokens), (vis, patches)):
        assert torch.allclose(ours, expected, atol=1e-5)


def naive_joint(model, z, t, text):
    """The joint architecture as its write-up has it, picture by picture and head by head, with plain softmax
    attention."""
    w = model.state_dict()

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def silu(x):
        return x / (1 + (-x).exp())

    def modulated(x, shift, scale):
        x = x - x.mean(dim=-1, keepdim=True)
        return x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * (1 + scale) + shift

    def rms_norm(name, x):
        return x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"]

    out = torch.zeros_like(z)
    for b in range(len(z)):
        angles = (1000 * t[b]).float() * torch.tensor([10_000 ** (-i / 128) for i in range(128)])
        sinusoid = torch.cat((angles.cos(), angles.sin())).to(z)
        time = linear("step_embed.mlp.2", silu(linear("step_embed.mlp.0", sinusoid)))
        caption = rms_norm("text_norm", text[b])
        condition = silu(time + linear("caption_embed", sum(caption) / len(caption)))
        corners = [(i, j) for i in range(0, 8, 2) for j in range(0, 8, 2)]
        patches = [(w["patch_embed.weight"] * z[b, :, i : i + 2, j : j + 2]).sum(dim=(1, 2, 3)) for i, j in corners]
        vis = torch.stack(patches) + w["patch_embed.bias"] + w["positions"][0].flatten(1).T
        streams = {"txt": linear("text_proj", caption), "vis": vis}
        for n in range(2):
            parts = {name: linear(f"layers.{n}.{name}_mod.1", condition).chunk(6) for name in streams}
            heads = {"q": [], "k": [], "v": []}
            for name, x in streams.items():
                x = modulated(x, *parts[name][:2])
                for letter in "qkv":
                    y = linear(f"layers.{n}.attn.{name}_{letter}_proj", x).view(-1, 2, 8)
                    heads[letter].append(y if letter == "v" else rms_norm(f"layers.{n}.attn.{name}_{letter}_norm", y))
            q, k, v = (torch.cat(both).unbind(1) for both in heads.values())  # of two heads (T + N, 8), text first
            mixed = [(q[h] @ k[h].T / 8**0.5).softmax(dim=-1) @ v[h] for h in range(2)]
            for name, taken in zip(streams, torch.cat(mixed, dim=1).split((5, 16))):
                _, _, gate1, shift2, scale2, gate2 = parts[name]
                x = streams[name] + gate1 * linear(f"layers.{n}.attn.{name}_o_proj", taken)
                value, gate = linear(f"layers.{n}.{name}_ff.enter", modulated(x, shift2, scale2)).chunk(2, dim=-1)
                streams[name] = x + gate2 * linear(f"layers.{n}.{name}_ff.leave", value * silu(gate))
        patches = linear("output_proj", modulated(streams["vis"], *linear("output_norm.linear.1", condition).chunk(2)))
        for (i, j), patch in zip(corners, patches):
            out[b, :, i : i + 2, j : j + 2] = patch.view(2, 2, 3).permute(2, 0, 1)
    return out


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@torch.no_grad()
def test_joint_forward_equals_a_naive_one():
    model = awake(arch="joint").double()
    z, t, text = (x.double() for x in inputs())
    for p in model.parameters():
        p.mul_(0.5)
    expected = naive_joint(model, z, t, text)
    assert expected.std() > 0.01
    assert (model(z, t, text) - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("arch", ["dual", "joint"])
def test_checkpointing_activations_keeps_less_and_changes_no_bit(arch):
    results = []
    for checkpointing in (False, True):
        kept = []
        model = awake(arch=arch, depth=8).train()
        model.checkpointing = checkpointing
        torch.manual_seed(1)
        z, t, text = inputs()
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x.numel()) or x, lambda x: x):
            loss = model(z, t, text).square().mean()
        loss.backward()
        results.append((sum(kept), loss, [p.grad for p in model.parameters() if p.grad is not None]))
    (all_kept, loss, gradients), (few_kept, loss_again, gradients_again) = results
    assert loss == loss_again and all(map(torch.equal, gradients, gradients_again)) and few_kept < 0.3 * all_kept


# ---- loss, guidance, sampler ----


def point(data):
    """The exact velocity if all data is one point: (z - data) / t."""
    return lambda z, t, text: (z - data) / t.view(-1, 1, 1, 1)


class Exact(torch.nn.Module):
    """A model that computes `answer`; it has a parameter only to have a device."""

    time_min = 0.0

    def __init__(self, answer):
        super().__init__()
        self.answer, self.calls, self.weight = answer, [], torch.nn.Parameter(torch.zeros(1))

    def forward(self, z, t, text):
        self.calls.append(len(z))
        return self.answer(z, t, text)


def sampled(model, text=NOTHING, null=NOTHING, shape=(3, 4, 4), **settings):
    return dit_t2i.sample_latents(model, text, null, shape, **(dict(num=2, cfg=1.0) | settings))


@pytest.mark.parametrize("solver", list(common.SOLVERS))
@pytest.mark.parametrize("steps", [1, 28])
def test_exact_velocity_of_a_point_leads_from_noise_to_the_point(solver, steps):
    data, seen = torch.rand(3, 4, 4), []
    z = sampled(Exact(point(data)), steps=steps, solver=solver, callback=lambda z, t: seen.append((t, z)))
    assert (z - data).abs().max() < 1e-4
    # t = 1 is noise and t = 0 is data, and all steps are of one length.
    assert [t for t, _ in seen] == pytest.approx([1 - i / steps for i in range(steps + 1)])
    assert torch.equal(seen[0][1], common.noise_for([0, 1], (3, 4, 4), "cpu")) and torch.equal(seen[-1][1], z)


@pytest.mark.parametrize("solver", list(common.SOLVERS))
def test_no_time_below_the_smallest_of_training_is_used(solver):
    """From there, one step leads to the data that the network predicts there, whatever it predicted before."""
    seen = []

    def velocity(z, t, text):
        seen.append(t[0].item())
        return (z - torch.full_like(z, 3 * t[0].item())) / t.view(-1, 1, 1, 1)  # the predicted data is 3 t

    model = Exact(velocity)
    model.time_min = 0.05
    z = sampled(model, steps=4, solver=solver)
    assert min(seen) == pytest.approx(0.05) and max(seen) == 1
    assert torch.allclose(z, torch.full_like(z, 0.15), atol=1e-5)
    if solver == "euler":
        assert seen == pytest.approx([1, 0.05 + 0.95 * 2 / 3, 0.05 + 0.95 / 3, 0.05])


def test_loss_is_zero_for_the_right_velocity_and_only_for_it():
    x, noise, t = torch.rand(6, 3, 8, 8), torch.randn(6, 3, 8, 8), torch.rand(6) * 0.9 + 0.1
    z_t = common.flow_point(x, noise, t)
    v = (z_t - x) / t.view(-1, 1, 1, 1)
    assert dit_t2i.flow_loss(v, x, noise).max() < 1e-6 and dit_t2i.flow_loss(v, x, noise).shape == (6,)
    for wrong in (-v, x, noise, z_t - x):
        assert dit_t2i.flow_loss(wrong, x, noise).min() > 1e-3
    assert torch.allclose(dit_t2i.flow_loss(v + 2, x, noise), torch.full((6,), 4.0))


def test_training_times_follow_their_law():
    def times(progress=0.0, time_min=0.0, **config):
        return dit_t2i.sample_times(Config(**config), BatchRng(20_000, 0), time_min, progress)

    for progress, mean in ((0.0, 0.7), (0.75, -0.8)):
        normal = torch.logit(times(progress, time_mean=(0.7, -1.3), time_std=0.5))
        assert abs(normal.mean() - mean) < 0.02 and abs(normal.std() - 0.5) < 0.02
    assert torch.equal(times(time_mean=(0.0,), time_std=1.0), torch.sigmoid(BatchRng(20_000, 0).randn()))  # the post's
    assert times(time_min=0.4).min() == pytest.approx(0.4)
    for time_min in (0.0, 0.05):  # uniform, by Kolmogorov's test
        t = times(time_min=time_min, arch="joint").sort()[0]
        assert (t - torch.linspace(time_min, 1, 20_000)).abs().max() < 0.015


def test_guidance_one_is_conditional_zero_is_unconditional_and_more_goes_further():
    text, null = torch.full((1, 2, 3), 0.3), torch.full((1, 2, 3), 0.2)

    def mean(cfg):
        model = Exact(lambda z, t, text: point(text.mean(dim=(1, 2)).view(-1, 1, 1, 1))(z, t, text))
        return sampled(model, text, null, cfg=cfg, steps=4).mean().item(), model.calls

    assert mean(1.0) == (pytest.approx(0.3, abs=1e-5), [2] * 4)  # a single pass
    assert mean(0.0)[0] == pytest.approx(0.2, abs=1e-5)
    assert mean(3.0) == (pytest.approx(0.2 + 3 * 0.1, abs=1e-5), [4] * 4)  # both in one batch


def test_sample_depends_on_its_seed_and_prompt_only():
    model, text, null = awake(), torch.randn(3, 5, 12), torch.randn(1, 5, 12)
    together = sampled(model, text, null, (3, 8, 8), num=3, steps=2, batch_size=4)
    alone = sampled(model, text[1:2], null, (3, 8, 8), num=1, steps=2, seed=2)
    assert together.shape == (9, 3, 8, 8) and torch.allclose(together[5], alone[0], atol=1e-4)  # prompt 1, seed 2
    assert (together[4] - together[5]).abs().max() > 1e-2 and (together[2] - together[5]).abs().max() > 1e-2
    strided = sampled(model, text, null, (3, 8, 8), num=1, steps=2, seed_stride=2)
    assert torch.allclose(strided[1], alone[0], atol=1e-4)


# ---- words ----


def test_words_are_numbered_and_unknown_ones_are_named():
    words = Words.learn(["a red car", "a blue fish on a red background", "cat"])
    assert words.vocabulary == sorted({"red", "car", "blue", "fish", "on", "background", "cat"}) and words.length == 5
    number = words.number
    rows = words(["The RED car!", "", "a red zebra"])
    assert rows.tolist() == [[number["red"], number["car"], 0, 0, 0], [0] * 5, [number["red"], 0, 0, 0, 0]]
    assert words.warnings("a red car") == [] and words.warnings("") == []
    assert words.warnings("a red catt") == ["unknown word 'catt'; similar: cat"]
    assert "only the first 5 of 6" in words.warnings("red red red red red red")[0]
    assert words(["red " * 9]).shape == (1, 5)
    with pytest.raises(UserError, match="know no word of 'zebra'"):
        words.warnings("zebra")
    assert Words.learn(["one " * 99]).length == dit_t2i.MAX_WORDS
    more = Words.learn(["an amber fish"], words.vocabulary, 5)
    assert more.vocabulary == [*words.vocabulary, "amber"] and more.length == 5  # known words keep their numbers


# ---- data and training ----

TINY = dict(image_size=8, patch_size=2, depth=2, num_heads=2, head_dim=8, text_dim=12, data=("captioned",), lr=1e-3)
TINY |= dict(batch_size=8, minutes=None, device="cpu", precision="fp32")


@pytest.fixture
def captioned(tmp_path, monkeypatch):
    """30 pictures of one colour: metadata.jsonl has the captions of the first 20, .txt files of the others but one."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "captioned"
    folder.mkdir()
    lines = []
    for i in range(30):
        name = ("red", "green", "blue")[i % 3]
        Image.new("RGB", (8, 8), name).save(folder / f"{i:02d}.png")
        if i < 20:
            lines.append(json.dumps({"file_name": f"{i:02d}.png", "text": f"a {name} square"}))
        elif i < 29:
            (folder / f"{i:02d}.txt").write_text(f"{name} tile\n")
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def train(out, **changes):
    return dit_t2i.train(Config(**(TINY | dict(out=out) | changes)))


def load(**changes):
    return TrainingData(Config(**(TINY | dict(batch_size=28) | changes)), CPU, "fp32")


def test_batches_hold_pictures_with_their_own_captions(captioned):
    data = load()
    assert len(data) == 28 and len(data.held_out) == 1 and set(data.train).isdisjoint(data.held_out)
    assert data.skipped == ["29.png: no caption"]
    assert data.header["latent"] == [3, 8] and data.header["vae"] is None and data.header["text"]["length"] == 2
    x, text = data.batch(0, slice(None))
    vocabulary = ["", *data.encoder.vocabulary]
    captions = [{vocabulary[i] for i in row} - {""} for row in text.tolist()]
    kept = [(picture, words) for picture, words in zip(x, captions) if words]
    assert len(kept) >= 20 and x.min() == -1 and x.max() == 1
    for picture, words in kept:
        assert ["red", "green", "blue"][picture.mean(dim=(1, 2)).argmax()] in words
    for rows in (slice(0, None, 2), slice(1, None, 2)):  # of two processes or accumulation passes
        assert all(torch.equal(part, whole[rows]) for part, whole in zip(data.batch(0, rows), (x, text)))
    # A tenth of the captions is left out.
    empty = torch.cat([(data.batch(step, slice(None))[1] == 0).all(dim=1) for step in range(60)])
    assert torch.equal(data.null, torch.zeros(1, 2, dtype=int)) and 0.08 < empty.float().mean() < 0.12


def test_words_are_learned_from_what_training_shows(captioned):
    (held_out,) = load().held_out
    (captioned / "metadata.jsonl").unlink()
    for i in range(29):
        (captioned / f"{i:02d}.txt").write_text("a violet tile" if i == held_out else "a red tile")
    data = load()
    assert data.held_out == [held_out] and data.encoder.vocabulary == ["red", "tile"]


def test_pictures_and_captions_are_encoded_on_the_fly(captioned, partners):
    vae, clip = common.load_vae(partners[0]), dit_t2i.Clip(partners[1])
    data = load(image_size=16, vae=str(partners[0]), clip=str(partners[1]), text_dim=64, flip=1.0)
    assert data.header["latent"] == [4, 2] and data.header["vae"] == vae.hash
    assert data.header["text"] == {"clip": clip.hash} and torch.equal(data.null, clip([""]))
    x, text = data.load([0, 1], BatchRng(2, 1))
    pixels, captions = data.source.read([0, 1])
    assert torch.allclose(x, vae.encode(pixels.flip(-1)), atol=1e-5) and torch.allclose(text, clip(captions), atol=1e-5)
    ids = clip.tokenizer(captions)
    assert torch.equal(clip(captions), clip.model(ids, mask_padding=True))
    assert not torch.equal(clip(captions), clip.model(ids))
    with pytest.raises(UserError, match="states have width 64"):
        load(clip=str(partners[1]))


@pytest.mark.parametrize("arch, optimizer", [("dual", "muon"), ("joint", "adamw")])
def test_resumed_run_ends_with_the_same_bits_and_samples_at_any_size(arch, optimizer, captioned, monkeypatch):
    options = dict(arch=arch, optimizer=optimizer, checkpoint_activations=arch == "joint", steps=6)
    train("whole", grad_accum=1, **options)

    def interrupted(self, grad_norm, lr, honest=common.Run.log):
        self.interrupted = self.step == 3
        honest(self, grad_norm, lr)

    monkeypatch.setattr(common.Run, "log", interrupted)
    assert train("halves", **options) == 130
    assert common.load_tensors("halves/state.safetensors")[1]["step"] == 4
    assert train("halves", resume="", **options) == 0
    for name in ("model.safetensors", "state.safetensors", "best.safetensors"):
        one, other = (load_file(f"{run}/{name}") for run in ("whole", "halves"))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    words = ["sample", "red square", "--weights", "whole", "--steps", "2", "--num", "2", "--size", "16"]
    assert dit_t2i.main([*words, "--out", "s.png"]) == 0 and Image.open("s.png").size == (32, 16)
    (captioned / "21.txt").write_text("blue tile\n")  # it was red: the same words, and the same pictures
    with pytest.raises(UserError, match="began with another data"):
        train("halves", resume="", **options)


def test_model_learns_which_word_is_which_colour(captioned):
    train("run", steps=150, batch_size=16, lr=3e-3, checkpoint_every=1000, cfg=1.0)
    model, config = dit_t2i.load_model("run/model.safetensors", "cpu")
    prompts = ["a red square", "a green square", "a blue square"]
    rgb = dit_t2i.sample(model, config, prompts, 4, cfg=2.0)
    assert rgb.shape == (12, 3, 8, 8) and rgb.min() >= 0 and rgb.max() <= 1
    assert rgb.mean(dim=(2, 3)).argmax(dim=1).tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_run_starts_from_other_weights_and_learns_new_words(captioned, tmp_path):
    """A learning rate of next to nothing leaves every weight as it was; new words are added behind the known ones."""
    train("first", steps=2)
    for side_car in captioned.glob("*.txt"):
        side_car.write_text("amber tile")
    train("second", steps=1, lr=1e-30, start="first/model.safetensors", depth=1, predict="velocity")
    (old, before), (new, after) = (common.load_tensors(tmp_path / n / "model.safetensors") for n in ("first", "second"))
    assert after["text"]["words"] == [*before["text"]["words"], "amber"]
    assert (after["config"]["depth"], after["config"]["predict"]) == (2, "data")  # the model is the weights'
    table = new.pop("words.weight")
    assert len(table) == len(old["words.weight"]) + 1 and table[-1].abs().max() > 0
    assert (table[:-1] - old.pop("words.weight")).abs().max() < 1e-20
    assert old.keys() == new.keys() and all((old[key] - new[key]).abs().max() < 1e-20 for key in old)
    (tmp_path / "first" / "model.safetensors").unlink()  # a run that resumes has all it needs
    assert dit_t2i.main(["train", "--resume", "second", "--steps", "2"]) == 0
    assert common.load_tensors(tmp_path / "second" / "model.safetensors")[1]["text"] == after["text"]


def test_held_out_loss_is_at_fixed_noise_in_any_batches(captioned):
    data = load()
    data.held_out, data.rows_at_once = data.held_out + data.train[:9], 3
    loss = dit_t2i.held_out_loss(data.config, data, Exact(lambda z, t, text: torch.zeros_like(z)))
    x = torch.cat([data.load([i], BatchRng(1, 0))[0] for i in data.held_out])
    noise = BatchRng(10, data.config.seed, 0, 4)
    noise.randn()  # the times
    assert loss == pytest.approx((noise.randn(3, 8, 8) - x).square().mean().item(), rel=1e-5)


# ---- prepared shards ----


@pytest.fixture
def prepare(captioned, partners):
    words = f"prepare --data captioned --out shards --vae {partners[0]} --clip {partners[1]} --image-size 16"
    words += " --shard-size 8 --batch-size 3 --device cpu --precision fp32"
    return lambda *more: dit_t2i.main([*words.split(), *more])


def test_prepared_shards_hold_latents_and_clip_states(prepare, partners, captioned, capsys):
    (captioned / "broken.png").write_bytes(b"no picture")
    assert prepare("--precision", "bf16") == 0
    assert "30 samples in shards" in (out := capsys.readouterr().out) and "broken.png" in out
    data = common.Shards("shards", ("latents", "text"))
    latents, text = data.read([28, 0])
    vae, clip = common.load_vae(partners[0]), dit_t2i.Clip(partners[1])
    for i, row in ((28, 0), (0, 1)):
        picture = torch.from_numpy(common.read_picture(captioned / f"{i:02d}.png", 16).copy()).permute(2, 0, 1)[None]
        assert torch.allclose(latents[row], vae.encode(picture / 127.5 - 1)[0], atol=2e-2)
        # CLIP computes in float32 whatever the VAE's precision, as when a prompt is encoded.
        assert (text[row] != clip([data.captions[i]])[0].bfloat16()).float().mean() < 0.01
    assert (text[0] - text[1]).abs().max() > 0.05 and torch.allclose(data.extra("null"), clip([""]), atol=2e-2)


def test_training_and_sampling_from_shards(prepare, partners, tmp_path, capsys):
    assert prepare() == 0
    words = "train --preset paper --data shards --out run --epochs 1 --batch-size 8 --patch-size 1 --depth 1".split()
    words += "--num-heads 2 --head-dim 8 --device cpu --precision fp32 --no-compile".split()
    assert dit_t2i.main(words) == 2 and "states have width 64" in capsys.readouterr().err
    assert dit_t2i.main([*words, "--text-dim", "64"]) == 0
    sampling = ["sample", "a red square", "--weights", "run", "--steps", "2", "--num", "1"]
    assert dit_t2i.main([*sampling, "--clip", str(partners[1])]) == 2 and "--vae" in capsys.readouterr().err
    sampling += ["--vae", str(partners[0]), "--clip", str(partners[1])]
    assert dit_t2i.main([*sampling, "--size", "32", "--gif", "a.gif"]) == 0
    assert Image.open("samples/dit_t2i.png").size == (32, 32) and "warning" not in capsys.readouterr().err
    # Another VAE of the same shape, and one with other channels.
    torch.manual_seed(1)
    other = tmp_path / "other.safetensors"
    save_file(common.AutoencoderKL(widths=(32, 32, 32, 32)).state_dict(), other)
    assert dit_t2i.main([*sampling, "--vae", str(other)]) == 0
    assert "warning: --vae is not the file" in capsys.readouterr().err
    save_file(common.AutoencoderKL(32, widths=(32, 32, 32, 32), batch_norm=True).state_dict(), other)
    assert dit_t2i.main([*sampling, "--vae", str(other)]) == 2 and "32 channels" in capsys.readouterr().err
    assert dit_t2i.main(["sample", "red " * 100, *sampling[2:]]) == 0
    assert "the last 25 of" in capsys.readouterr().err


# ---- the command line ----


@pytest.fixture
def weights(captioned):
    """Random numbers in place of the last run's weights: a model that has hardly trained returns 0 for everything."""
    train("runs/dit_t2i", steps=1)
    tensors, header = common.load_tensors("runs/dit_t2i/model.safetensors")
    tensors = {name: torch.randn(tensor.shape) / 2 for name, tensor in tensors.items()}
    common.save_tensors("runs/dit_t2i/model.safetensors", tensors, header)


def test_sample_makes_a_row_for_each_prompt(weights, tmp_path, capsys):
    (tmp_path / "list.txt").write_text("a blue tile\n\ngreen\n")
    words = ["sample", "a red sqare", *"--prompt red --prompts list.txt --num 2 --steps 3 --precision fp32".split()]
    assert dit_t2i.main([*words, "--out", "a.png", "--each", "each", "--gif", "a.gif", "--size", "12"]) == 0
    assert Image.open("a.png").size == (24, 48) and len(list((tmp_path / "each").iterdir())) == 8
    assert Image.open("a.gif").n_frames >= 3
    assert "unknown word 'sqare'; similar: square" in capsys.readouterr().err
    pictures = []
    for out, more in (("plain", []), ("away", ["--negative", "red"]), ("next", ["--seed", "1", "--num", "1"])):
        assert dit_t2i.main([*words, *more, "--each", out]) == 0
        pictures.append(np.stack([np.asarray(Image.open(path), int) for path in sorted((tmp_path / out).iterdir())]))
    plain, away, following = pictures
    assert (plain != away).any()
    # Picture 1 of a prompt is picture 0 of the next seed.
    assert np.abs(plain[1::2] - following).max() <= 1 < np.abs(plain[1::2] - plain[::2]).max()


@pytest.mark.parametrize(
    "words, message",
    [
        (["sample"], "no prompt"),
        (["sample", ""], "no prompt"),
        (["sample", "the zebra"], "know no word of 'the zebra'"),
        (["sample", "red", "--size", "9"], "--size 9 is no multiple of 2"),
        (["sample", "red", "--weights", "jit.safetensors"], "checkpoint of jit_lab"),
        (["sample", "red", "--weights", "foreign.safetensors"], "is not a readable checkpoint"),
        (["sample", "red", "--prompts", "missing.txt"], "missing.txt"),
        (["train", "--data", "bare"], "0 captions in bare"),
        (["train", "--data", "captioned", "--patch-size", "3", "--image-size", "8"], "--patch-size 3 does not divide"),
        (["train", "--data", "captioned", "--vae", "x"], "no weights at x"),
        (["train", "--data", "captioned", "--clip", "x"], "no tokenizer in x"),
        (["train", "--data", "captioned", "--from", "x"], "no weights at x"),
        (["prepare", "--data", "captioned"], "prepare needs"),
    ],
)
def test_mistakes_end_in_one_line(weights, tmp_path, capsys, words, message):
    save_file({"x": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    header = {"config": json.dumps({"system": "jit_lab", "config": {}})}
    save_file({"x": torch.zeros(1)}, tmp_path / "jit.safetensors", metadata=header)
    (tmp_path / "bare").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "bare" / "a.png")
    if words[0] == "train":
        words = [*words, "--steps", "1", "--out", "elsewhere"]
    capsys.readouterr()
    assert dit_t2i.main(words) == 2
    error = capsys.readouterr().err.rpartition("\r")[2]  # behind a progress bar that has erased itself
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


def test_published_checkpoint_loads_without_its_pickle_and_training_starts_from_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dit_t2i, "preview", lambda *args: torch.zeros(1, 3, 8, 8))  # 28 steps that do not matter here
    layout = read_fixture("dfs_258m")
    names = [name for name in layout if not name.startswith("layers.") or name.startswith("layers.0.")]
    weights = {name: 0.02 * torch.randn(layout[name]) for name in names}
    torch.save({"model": {}, "ema_model": weights, "epoch": 3, "train_config": {"lr": 1e-4}}, "best.pt")
    loaded, config = dit_t2i.load_model("best.pt", "cpu")
    assert config.cfg == 4.0 and loaded.header["latent"] == [4, 32] and loaded.predict == "velocity"
    rows = [[f"{i}.png", f"picture {i}", []] for i in range(3)]
    tensors = {"latents": torch.randn(3, 4, 32, 32), "text": torch.randn(3, 77, 768), "null": torch.randn(1, 77, 768)}
    tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    header = {"vae": None, "clip": None, "rows": rows, "skipped": [], "source": []}
    common.save_tensors("data/shard_00000.safetensors", tensors, header)
    words = "train --preset paper --data data --from best.pt --out run --batch-size 1 --device cpu --no-compile".split()
    assert dit_t2i.main([*words, "--steps", "1", "--lr", "0"]) == 0
    for state in (loaded.state_dict(), dit_t2i.load_model("run", "cpu")[0].state_dict()):
        assert len(state) == len(weights) and all(torch.equal(state[name], weights[name]) for name in weights)
