"""CLIP's tokenizer and text encoder against transformers', and files that are broken or of other models."""

import gzip
import json
import random
import unicodedata

from common import UserError
from dit_t2i import ClipTextEncoder, ClipTokenizer, byte_symbols

import pytest
import torch
from conftest import FIXTURES, read_fixture, shapes
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
from transformers import CLIPTokenizer as OracleTokenizer

START, END = 49406, 49407
# Only what this Python's Unicode tables know: later ones give more code points a class.
ASSIGNED = [c for c in map(chr, range(0x110000)) if unicodedata.category(c) not in ("Cn", "Cs", "Co")]
SMALL = {"vocab_size": 300, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 2, "hidden_act": "quick_gelu", "bos_token_id": 298, "eos_token_id": 299}


def one_line(call, *wanted):
    """The call fails as a user's mistake, in one line that has all of `wanted` in it."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and all(str(word) in message for word in wanted), message


# Tokenizer


MERGES = gzip.decompress((FIXTURES / "clip_merges.txt.gz").read_bytes()).decode()


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder with merges.txt and vocab.json, rebuilt here by its definition, byte for byte as long as the published
    ones."""
    printable = [c for c in map(chr, range(256)) if c.isprintable() and c not in " \xa0\xad"]
    order = [ord(c) for c in printable] + [b for b in range(256) if chr(b) not in printable]
    letters = [*printable, *(chr(256 + i) for i in range(256 - len(printable)))]
    assert byte_symbols() == dict(zip(order, letters))
    merged = [line.replace(" ", "") for line in MERGES.splitlines()[1:]]
    names = [*letters, *(c + "</w>" for c in letters), *merged, "<|startoftext|>", "<|endoftext|>"]
    folder = tmp_path_factory.mktemp("published")
    (folder / "merges.txt").write_text(MERGES, "utf-8")
    (folder / "vocab.json").write_text(
        json.dumps({name: i for i, name in enumerate(names)}, ensure_ascii=False), "utf-8"
    )
    assert [(folder / name).stat().st_size for name in ("merges.txt", "vocab.json")] == [524_619, 961_143]
    return folder


@pytest.fixture(scope="module")
def oracle(published):
    return OracleTokenizer.from_pretrained(published)


@pytest.fixture(scope="module")
def tokenizer(published):
    return ClipTokenizer(published)


def padded(oracle, texts):
    return oracle(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt")


def varied_texts(count, seed):
    """Strings of what a caption may hold, and of much that it should not."""
    rng = random.Random(seed)
    # All alphabets, from ASCII to kana, as of Unicode 3.2: the order of later marks differs between tables.
    known = [c for c in ASSIGNED if unicodedata.ucd_3_2_0.category(c) != "Cn"]
    scripts = [known[i : i + 128] for i in range(0, known.index("\u3105"), 128)]
    words = "a photo cat Hello WORLD anime girl, (blue eyes:1.3) 8k naïve Σίσυφος ΣΑΣ <|endoftext|> <|startoftext|>"
    words = [*words.split(), *"İstanbul straße ﬁne \u212ang x_y http://a.b/c?d=1&amp;e".split()]
    contractions = "'s 't 're 've 'm 'll 'd 'S 'RE 'Ll 'x ''s \u2019s ' s't've".split()
    spaces = [" ", "  ", "\t", "\n", "\r\n", "\u00a0", "\u2003", "\u3000", "\x85", "\u2028", "\u200b", "\x0b", ""]
    emoji = ["👩\u200d👩\u200d👧", "👍🏽", "🏳️\u200d🌈", "🇩🇪", "❤️", "🧑🏿\u200d🚀"]
    marks = [chr(c) for c in range(0x300, 0x370)] + ["\u0323", "\u3099", "\u0cc6\u0cc2", "\u1161", "\u11a8", "\u0338"]
    makers = [
        lambda: rng.choice(words),
        lambda: rng.choice(words) + rng.choice(contractions),
        lambda: rng.choice(contractions),
        lambda: "".join(rng.choices(rng.choice(scripts), k=rng.randint(1, 6))),
        lambda: rng.choice(emoji),
        lambda: rng.choice("aeiouAEOnsᄀかΩ<>=") + "".join(rng.choices(marks, k=rng.randint(1, 3))),
        lambda: str(rng.randint(0, 10**9)) + rng.choice(["", "th", "½", "²", "Ⅷ", "٣٤", "px"]),
        lambda: "".join(rng.choices("!?.,:;-_()[]{}<>|/\\'\"#$%&*+=@^`~", k=rng.randint(1, 6))),
        lambda: "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(1, 12))),
    ]
    lengths = [0, 1, 2, 3, 4, 5, 6, 8, 60]
    for _ in range(count):
        pieces = rng.choices(makers, k=rng.choices(lengths, [1, 9, 9, 9, 9, 9, 9, 9, 1])[0])
        yield "".join(make() + rng.choice(spaces[: rng.choice([1, 1, 13])]) for make in pieces)


def test_ids_equal_transformers_on_varied_texts(tokenizer, oracle):
    texts = list(varied_texts(4000, seed=0))
    ours, theirs = tokenizer(texts), padded(oracle, texts)["input_ids"]
    assert ours.dtype == torch.int64 and ours.shape == (4000, 77)
    wrong = [ascii(text) for text, same in zip(texts, (ours == theirs).all(dim=1)) if not same]
    assert not wrong, f"{len(wrong)} differ: {wrong[:5]}"
    assert sum(len(tokenizer.encode(text)) > 75 for text in texts) > 30  # the cut was compared, too


def test_ids_equal_transformers_on_every_assigned_code_point(tokenizer, oracle):
    """Each between letters, ten to a text: its class, its lower case and its bytes."""
    texts = [" ".join(f"a{c}b" for c in ASSIGNED[i : i + 10]) for i in range(0, len(ASSIGNED), 10)]
    ours = [tokenizer.encode(text) for text in texts]
    theirs = oracle(texts, add_special_tokens=False)["input_ids"]
    assert not [ascii(text) for text, a, b in zip(texts, ours, theirs) if a != b][:5]


def test_known_ids(tokenizer):
    assert tokenizer(["a photo of a cat"])[0].tolist() == [START, 320, 1125, 539, 320, 2368] + [END] * 71
    assert tokenizer.encode("\ud83d") == tokenizer.encode("?")  # half an emoji, as broken JSON has it


@pytest.fixture
def tokenizer_json(tmp_path, oracle):
    oracle.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "merges.txt").exists()
    return tmp_path / "saved" / "tokenizer.json"


def test_every_published_form_gives_the_same_ids(tokenizer, tokenizer_json, published, tmp_path):
    texts = list(varied_texts(300, seed=1))
    content = json.loads(tokenizer_json.read_text("utf-8"))
    assert isinstance(content["model"]["merges"][0], list)
    old = tmp_path / "old"  # with merges as "a b", as files were written before 2024
    old.mkdir()
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    (old / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    openai = tmp_path / "openai" / "merges.txt.gz"  # another first line, and more merges than are used
    openai.parent.mkdir()
    lines = ['"bpe.txt#version: 0.2', *MERGES.splitlines()[1:], "some thing</w>", "never used</w>", ""]
    openai.write_bytes(gzip.compress("\r\n".join(lines).encode()))
    (openai.parent / "model.safetensors").touch()
    forms = [tokenizer_json, tokenizer_json.parent, old, openai, openai.parent / "model.safetensors"]
    forms += [str(published), published / "vocab.json", published / "merges.txt"]
    expected = tokenizer(texts)
    for form in forms:
        assert torch.equal(ClipTokenizer(form)(texts), expected), form


def test_missing_or_broken_tokenizer_files_are_one_line(tmp_path, tokenizer_json):
    one_line(lambda: ClipTokenizer(tmp_path), tmp_path, "merges.txt", "openai/clip-vit-large-patch14")
    for name, content in [
        ("merges.txt", MERGES[:300_001].encode()),
        ("merges.txt.gz", gzip.compress(MERGES.encode())[:99_999]),
        ("tokenizer.json", tokenizer_json.read_bytes()[:999_999]),
        ("tokenizer.json", b"{}"),
    ]:
        (tmp_path / name).write_bytes(content)
        one_line(lambda name=name: ClipTokenizer(tmp_path / name), tmp_path / name)


# Text encoder


def scramble(model, seed=0):
    """Random weights with which states are O(1), attention is peaked, and every bias and gain has an effect."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.normal_(1.0 if name.endswith("weight") else 0.0, 0.2, generator=draw)
            elif "embedding" in name:
                p.normal_(0, 1, generator=draw)
            elif p.dim() == 2:
                p.normal_(0, (2 if "q_proj" in name else 1) * p.shape[1] ** -0.5, generator=draw)
            else:
                p.normal_(0, 0.2, generator=draw)
    return model.eval()


def test_full_size_equals_transformers(tokenizer, oracle, tmp_path):
    config = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
    theirs = scramble(CLIPTextModel._from_config(config, attn_implementation="eager"))
    theirs.save_pretrained(tmp_path)
    ours = ClipTextEncoder.load(tmp_path)
    (tmp_path / "model.safetensors").unlink()  # half a gigabyte
    layout = {f"text_model.{name}": shape for name, shape in shapes(ours.state_dict()).items()}
    assert layout == read_fixture("clip_l_text")
    assert not ours.training and not any(p.requires_grad for p in ours.parameters())

    texts = ["", "a cat", "a photo of a cat, " * 30]
    ids = tokenizer(texts)
    attention_mask = padded(oracle, texts)["attention_mask"]
    assert attention_mask.sum(1).tolist() == [2, 4, 77]
    with torch.no_grad():
        plain = theirs(input_ids=ids).last_hidden_state
        masked = theirs(input_ids=ids, attention_mask=attention_mask).last_hidden_state
    assert plain.std() > 0.5
    assert (ours(ids) - plain).abs().max() < 1e-4
    assert (ours(ids, mask_padding=True) - masked).abs().max() < 1e-4


@pytest.fixture
def small(tmp_path):
    """(transformers' small text model, whose weights 16 bits can hold, its folder, ids, expected states)."""
    model = scramble(CLIPTextModel(CLIPTextConfig(**SMALL))).half().float()
    model.save_pretrained(tmp_path / "small")
    ids = torch.randint(298, (2, 77), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model, tmp_path / "small", ids, model(input_ids=ids).last_hidden_state


def test_every_published_layout_loads_alike(small, tmp_path):
    model, folder, ids, expected = small
    bare = load_file(folder / "model.safetensors")
    assert "embeddings.token_embedding.weight" in bare
    prefixed = {f"text_model.{k}": v for k, v in bare.items()}
    position_ids = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    layouts = {"bare": bare, "prefixed": prefixed, "old": prefixed | position_ids}
    sd = {f"cond_stage_model.transformer.{k}": v for k, v in (prefixed | position_ids).items()}
    layouts["sd"] = sd | {"model.diffusion_model.out.0.weight": torch.ones(3), "alphas_cumprod": torch.ones(3)}
    for name, tensors in layouts.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
    torch.save({"state_dict": layouts["sd"], "global_step": 5}, tmp_path / "sd.ckpt")
    pipeline = tmp_path / "pipeline"
    (pipeline / "text_encoder").mkdir(parents=True)
    torch.save(layouts["old"], pipeline / "text_encoder" / "pytorch_model.bin")
    vision = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision |= {"image_size": 32, "patch_size": 16}
    whole = CLIPModel(CLIPConfig(text_config=SMALL, vision_config=vision))
    paths = [folder, str(folder), pipeline, pipeline / "text_encoder", tmp_path / "sd.ckpt"]
    for larger in (whole, CLIPTextModelWithProjection(CLIPTextConfig(**SMALL))):
        larger.text_model.load_state_dict(model.state_dict())
        paths.append(tmp_path / type(larger).__name__)
        larger.save_pretrained(paths[-1])
    save_file({k: v.half() for k, v in bare.items()}, tmp_path / "model.fp16.safetensors")
    for path in [*paths, tmp_path, *(tmp_path / f"{name}.safetensors" for name in layouts)]:
        encoder = ClipTextEncoder.load(path)
        assert {p.dtype for p in encoder.parameters()} == {torch.float32}
        assert (encoder(ids) - expected).abs().max() < 1e-4, path


def test_foreign_and_broken_weights_are_one_line(small, tmp_path):
    bare, file = load_file(small[1] / "model.safetensors"), tmp_path / "file.safetensors"
    one_line(lambda: ClipTextEncoder.load(tmp_path), tmp_path, "model.safetensors", "openai/clip-vit-large-patch14")
    for weights, wanted in [
        ({"encoder.block.0.layer.0.SelfAttention.q.weight": torch.ones(2, 2)}, "not a readable text encoder"),
        ({"embeddings.token_embedding.weight": torch.ones(2, 2)}, "not a readable text encoder"),
        ({k: v for k, v in bare.items() if k != "final_layer_norm.bias"}, "final_layer_norm.bias is missing"),
    ]:
        save_file(weights, file)
        one_line(lambda: ClipTextEncoder.load(file), file, wanted)
