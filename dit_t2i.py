"""Text to image with a dual-stream diffusion transformer: from words, or CLIP, to pixels, or Stable Diffusion latents.

The system of the write-up "Diffusion From Scratch", from data to picture in this one file. t = 0 is DATA and t = 1 is
NOISE, as in the write-up: z_t = (1 - t) data + t noise, and the network's velocity points from data to noise.

    python dit_t2i.py sample "a red car" --num 4               from the run's weights, else from weights/
    python dit_t2i.py train                                    ten minutes on two CPU cores, drawn scenes
    python dit_t2i.py train --data DIR                         a folder of pictures with captions
    python dit_t2i.py prepare --data DIR --out SHARDS --vae VAE --clip CLIP
    python dit_t2i.py train --preset paper --data SHARDS       the write-up's 258M parameters
    python dit_t2i.py train --arch joint                       the architecture of another write-up, "re-diffusion"
    torchrun --nproc-per-node 8 dit_t2i.py train --preset paper --arch joint --stream 'shards/*.jsonl' --steps 100000 \\
        --clip CLIP --vae VAE                                  ... at its scale

Beside the write-up, read first msrope, JointAttention, DualStreamLayer and DiT, then flow_loss and guided, then train
and sample. The default data are painted scenes (common.py), so that training needs no download.

Measured on two cores with AVX512-BF16: ten minutes of drawn scenes are 66,000 pictures, to a held-out loss of 0.063.
The weights that come with the code were trained on a million pictures of emoji in two and a half hours
(experiments/emoji.py paints them and measures: all of 200 pairs of a colour and a thing that were never shown have the
right hue, 96.5 % are the right thing). `sample "a red car" --num 4` takes 4 seconds, start included.
"""

import collections
import concurrent.futures
import contextlib
import copy
import dataclasses
import difflib
import functools
import glob
import gzip
import http.client
import io
import ipaddress
import itertools
import json
import math
import os
import random
import re
import socket
import ssl
import string
import sys
import tarfile
import threading
import time
import unicodedata
import urllib.parse
import weakref
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.utils.checkpoint import checkpoint

import common
from common import (
    Draw,
    RMSNorm,
    Run,
    TimestepEmbedder,
    UserError,
    apply_rope,
    attention,
    autocast,
    flow_point,
    generator,
    load_into,
    load_tensors,
    modulate,
    option,
    rms_norm,
    rope_2d,
    sincos_2d,
    sincos_table,
    unpair,
)

# ----------------------------------------------------------------------------------------------------------------
# Configuration


@dataclasses.dataclass
class Config(common.TrainConfig):
    """What the presets have in common; PRESETS holds what each changes."""

    # Data
    data: str = option("drawn", "drawn: painted scenes; or a folder of captioned pictures, or of shards")
    image_size: int = option(64, "side of the training pictures in pixels; of shards, theirs counts", low=8)
    vae: str = option("", "VAE of the shards in --data, to show pictures while training; of a --stream's latents")
    flip: float = option(
        0.0, "how often a picture of a folder or a stream is mirrored, whatever its caption says", low=0.0, high=1.0
    )
    epochs: int | None = option(None, "stop after so many passes over the data", low=1)
    start: str = option("", "weights to begin with, such as weights/dit_t2i.safetensors (default: none)", flag="--from")
    # Data from the web
    stream: str = option("", "metadata shards whose pictures are fetched, e.g. 'shards/*.jsonl' (.parquet, .tar)")
    threads: int = option(16, "pictures that each process fetches at a time", low=1)
    per_host: int = option(8, "of these at most from one host", low=1)
    timeout: float = option(10.0, "seconds that a picture may take, all tries together", low=0.01)
    max_mb: float = option(20.0, "largest file that is fetched, in megabytes", low=0.0)
    private_hosts: bool = option(False, "follow addresses into private networks and to this machine, too")
    cache_gb: float = option(1.0, "memory that keeps decoded pictures, on each machine; 0: none", low=0.0)
    min_score: float = option(0.0, "least aesthetic score that a picture may have; 0: any or none", low=0.0)
    min_side: int = option(0, "least length of a picture's shorter side in pixels", low=0)
    # Text
    encoder: str = option("words", "of captions: words, a table that is learned, or CLIP", choices=("words", "clip"))
    clip: str = option("", "CLIP ViT-L/14: a Hugging Face folder, or its weights beside its tokenizer files")
    max_words: int = option(16, "longest caption that the word table's model can read", low=1)
    null_prob: float = option(0.1, "how often a caption is left out, for guidance", low=0.0, high=1.0)
    # Model
    arch: str = option(
        "dual",
        "dual: two streams that meet in attention, turned by their places; joint: the write-up re-diffusion's",
        choices=("dual", "joint"),
    )
    patch_size: int = option(8, "side of a token's patch in pixels, or latent cells", low=1)
    depth: int = option(6, "number of dual-stream layers", low=1)
    num_heads: int = option(4, "attention heads", low=1)
    head_dim: int = option(64, "width of a head, split between height and width", low=4)
    text_dim: int = option(256, "width of a caption's tokens as the encoder gives them", low=1)
    # Objective
    predict: str = option(
        "data", "what the last layer says: data (in pixels) or velocity", choices=("data", "velocity")
    )
    time_law: str = option(
        "",
        "of t: the sigmoid of a normal, or uniform (default: normal, for joint uniform)",
        choices=("", "normal", "uniform"),
    )
    time_mean: float = option(2.5, "of the normal whose sigmoid is t; above 0: mostly noise")
    time_fall: float = option(2.0, "by how much that mean falls over the run: words first, then strokes")
    time_std: float = option(1.5, "its spread", low=0.0)
    time_min: float = option(0.05, "least training t, by which a prediction of data is divided", low=0.0, high=1.0)
    checkpoint_activations: bool = option(False, "keep less in memory while training, compute each layer twice")
    # Optimizer
    optimizer: str = option(
        "adamw",
        "adamw; muon for the matrices of attention and MLP, adamw for the rest; auto: muon where bfloat16 is fast",
        choices=("adamw", "muon", "auto"),
    )
    # Sampling
    cfg: float = option(3.0, "guidance of the pictures made while training, and default of sample", low=0.0)


PRESETS = {
    # Muon's part of a step is the same for any batch, hence 64. After ten minutes of drawn scenes the held-out loss is
    # 0.063; AdamW, a cosine and batches of 32 come to 0.072 with a fifth more pictures.
    "demo": dict(minutes=10.0, batch_size=64, lr=2e-3, optimizer="auto", decay="linear", ema=0.995),
    # The write-up's: batch 128, 200 epochs, AdamW at 1e-4 after 2,000 steps of warm-up, clipping at 1, EMA 0.9995.
    "paper": dict(
        epochs=200,
        image_size=256,
        batch_size=128,
        lr=1e-4,
        warmup=2000.0,
        decay="none",
        beta2=0.999,
        ema=0.9995,
        flip=0.5,
        encoder="clip",
        patch_size=2,
        depth=12,
        num_heads=12,
        text_dim=768,
        predict="velocity",
        time_mean=0.0,
        time_fall=0.0,
        time_std=1.0,
        time_min=0.0,
        checkpoint_every=1000,
        cfg=4.0,
    ),
}


# ----------------------------------------------------------------------------------------------------------------
# Data sets: what training asks them is batch(index, draw) -> (pictures or latents (B, C, H, W), captions or their
# encodings), and how many they have.


class PictureSet:
    """Captioned pictures in memory: (N, 3, S, S) uint8, and N captions."""

    def __init__(self, pictures, captions, flip=0.0):
        self.pictures, self.captions, self.flip = pictures, captions, flip

    def __len__(self):
        return len(self.captions)

    def checksum(self):
        return common.checksum(self.pictures, self.captions)

    def caption(self, i):
        return self.captions[i]

    def batch(self, index, draw):
        x = self.pictures[index] / 127.5 - 1
        return common.mirror_some(x, self.flip, draw), [self.captions[i] for i in index]


class ShardSet:
    """Latents and text embeddings that `prepare` wrote."""

    def __init__(self, folder, flip=0.0):
        self.shards = common.Shards(folder, SHARD, ("caption",), SHARD_KEYS, extra=("null",))
        self.header, self.null, self.flip = self.shards.header, self.shards.extra["null"].float(), flip
        if self.null.shape[1:] != self.shards.shapes["text"]:
            raise UserError(f"the null caption in {folder} is of another shape than the text; run prepare again")

    def __len__(self):
        return len(self.shards)

    def checksum(self):
        return self.shards.checksum()

    def caption(self, i):
        return self.shards.rows[i]["caption"]

    def batch(self, index, draw):
        latents, text = self.shards.read(index)
        return common.mirror_some(latents, self.flip, draw), text


SHARD = ("latents", "text")  # (n, C, H, W) and (n, T, D), both bfloat16
SHARD_KEYS = ("vae", "clip", "image_size")  # what all shards of a folder have in common


class Part:
    """Some samples of a data set, as a data set."""

    def __init__(self, whole, index):
        self.whole, self.index = whole, index

    def __len__(self):
        return len(self.index)

    def caption(self, i):
        return self.whole.caption(self.index[i])

    def batch(self, index, draw):
        return self.whole.batch([self.index[i] for i in index], draw)

    def all_captions(self):
        return [self.whole.caption(i) for i in self.index]


def captions_of(paths, folder):
    """path -> caption, for those of `paths` that have one. Raises UserError if none has."""
    captions = {path: text for path, (text, _) in common.read_metadata(paths, folder).items() if text}
    if captions.keys().isdisjoint(paths):
        raise UserError(f"no captions in {folder}; write them into metadata.jsonl, or beside each picture as .txt")
    return captions


# What --data knows nothing of.
STREAM_FIELDS = "threads per_host timeout max_mb private_hosts cache_gb min_score min_side".split()


def load_data(config):
    """What --data names -> (all, training set, held-out set, lines about skipped files), or what --stream names ->
    (stream, stream, None, []). Raises UserError."""
    if not config.stream and (idle := common.differences(config, {}, STREAM_FIELDS)):
        raise UserError(f"options of a stream without --stream; name one, or keep to {idle}")
    if config.stream and config.data != "drawn":
        raise UserError("--data and --stream are two sources; name one of them")
    skipped, shards = [], not config.stream and any(Path(config.data).glob("shard_*.safetensors"))
    if config.clip and config.encoder == "words" and not shards:
        raise UserError("--clip goes with --encoder clip, or with shards; add that, or leave --clip out")
    if config.stream:
        if config.epochs:
            raise UserError("a stream has no end and no epochs; give --steps or --minutes")
        stream = Stream(config)
        return stream, stream, None, []
    if config.vae and not shards:
        raise UserError(
            "--vae goes with shards: write them with prepare --data DIR --vae ..., then train on their folder"
        )
    if config.encoder == "clip" and not shards and not config.clip:
        raise UserError("name CLIP's files with --clip, or give --data a folder of shards that prepare wrote")
    if config.flip and config.data == "drawn" and not config.stream:
        raise UserError(f"--flip {config.flip} is for your own pictures; say --flip 0")
    if config.data == "drawn":
        scenes = common.draw_set(common.paint_scene, 20_000, config.image_size)
        everything = PictureSet(scenes.pictures, scenes.captions)  # never mirrored: captions tell left from right
    elif shards:
        everything = ShardSet(config.data, config.flip)
        skipped = everything.shards.skipped
    else:
        pictures, paths, skipped = common.read_folder(config.data, config.image_size)
        captions = captions_of(paths, config.data)
        good = [i for i, path in enumerate(paths) if path in captions]
        skipped += [f"{path}: no caption" for path in paths if path not in captions]
        everything = PictureSet(pictures[good], [captions[paths[i]] for i in good], config.flip)
    # One in fifty, at most 1,000, is never trained on: the loss of 256 of them says which checkpoint is the best.
    order = torch.randperm(len(everything), generator=generator(config.seed, 7)).tolist()
    cut = max(1, min(1000, len(order) // 50))
    if len(order) < 2:
        raise UserError(
            f"{config.data} holds a single captioned picture; two is the least, one to learn and one to check"
        )
    return everything, Part(everything, order[cut:]), Part(everything, order[:cut]), skipped


# ----------------------------------------------------------------------------------------------------------------
# Streams: pictures fetched from the web during training ("Distributed Streaming Training" of the write-up
# re-diffusion). Metadata shards name the pictures, one row each. Every process owns a share of the rows and passes over
# them again and again, in threads that fetch and decode. Rows that give no picture are counted by reason and left out.

WORDS_FROM = 20_000  # captions from which --encoder words learns its vocabulary
USER_AGENT = "dit_t2i (training of a text-to-image model)"
REDIRECTS = (301, 302, 303, 307, 308)
MAX_REDIRECTS = 5
PAUSES = (0.5, 1.0)  # seconds before the second and the third try
WEB_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # others of Pillow's are rare, or start programs
MAX_STREAM_PIXELS = 32_000_000  # a larger picture is not decoded: many threads decode at once, 4 bytes a pixel each
trusted = functools.cache(ssl.create_default_context)  # loading the certificates takes a while


class Refused(Exception):
    """A row that gives no picture. kind: the reason, under which it is counted; transient: another try may succeed."""

    def __init__(self, kind, transient=False):
        super().__init__(kind)
        self.kind, self.transient = kind, transient


class Starved(Exception):
    """Training has to end while the stream waits for a picture."""


def is_public(address):
    """Whether an IP address belongs to the public internet. IPv6 forms that carry an IPv4 address count as that one."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if ip.version == 4:
        return ip.is_global and not ip.is_multicast
    nat64 = ip in ipaddress.ip_network("64:ff9b::/96")
    carried = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if nat64 else ip.ipv4_mapped or ip.sixtofour
    if carried:
        return is_public(str(carried))
    return ip.is_global and ip in ipaddress.ip_network("2000::/3")  # global unicast: not multicast, not site-local


def seconds_left(deadline):
    """Seconds until a time.monotonic(). Raises TimeoutError when it has passed."""
    if (seconds := deadline - time.monotonic()) <= 0:
        raise TimeoutError
    return seconds


class DeadlineReader(io.RawIOBase):
    """Reads a socket until a deadline. A socket's own timeout restarts with every packet, so a server that sends one
    byte a second, in headers or body, could hold a thread for hours."""

    def __init__(self, sock, deadline):
        self.sock, self.deadline = sock, deadline

    def makefile(self, mode):  # the only method of a socket that HTTPResponse calls
        return io.BufferedReader(self)

    def readable(self):
        return True

    def readinto(self, buffer):
        self.sock.settimeout(seconds_left(self.deadline))
        return self.sock.recv_into(buffer)


def connect(host, port, deadline, private):
    """A socket to `host`. The name is resolved once and the very addresses that were checked are dialled: a second
    lookup might return others. (Only the system limits how long a lookup takes.)"""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = list(dict.fromkeys(place[0] for *_, place in found))
    if not private and not all(map(is_public, addresses)):
        raise Refused("private address")
    for address in addresses:
        try:
            return socket.create_connection((address, port), seconds_left(deadline))
        except OSError:  # for example IPv6 where there is none
            if address == addresses[-1]:
                raise


def request(url, deadline, max_bytes, private, redirects=MAX_REDIRECTS):
    """One try to fetch, through redirects, each of which is checked like the first address."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise Refused("bad address")
    target = urllib.parse.quote(f"{parts.path or '/'}{parts.query and '?' + parts.query}", safe=string.punctuation)
    host = parts.netloc.rpartition("@")[2].encode("idna").decode()
    lines = [f"GET {target} HTTP/1.1", f"Host: {host}", f"User-Agent: {USER_AGENT}", "Connection: close", "", ""]
    secure = parts.scheme == "https"
    sock = connect(parts.hostname, parts.port or (443 if secure else 80), deadline, private)
    with contextlib.ExitStack() as stack:
        stack.enter_context(sock)
        sock.settimeout(seconds_left(deadline))
        if secure:
            sock = stack.enter_context(trusted().wrap_socket(sock, server_hostname=parts.hostname))
        sock.sendall("\r\n".join(lines).encode())
        response = http.client.HTTPResponse(DeadlineReader(sock, deadline))
        response.begin()
        status, location = response.status, response.headers["Location"]
        if status in REDIRECTS and location:
            if not redirects:
                raise Refused("too many redirects")
            stack.close()
            # http.client reads a header's bytes, which are mostly UTF-8, as latin-1.
            location = urllib.parse.quote(location.strip(), safe=string.punctuation, encoding="latin-1")
            return request(urllib.parse.urljoin(url, location), deadline, max_bytes, private, redirects - 1)
        if status != 200:
            raise Refused(f"http {status}", transient=status in (408, 429) or status >= 500)
        if "noai" in str(response.headers.get_all("X-Robots-Tag")).lower():
            raise Refused("declined by its owner")  # the header asks not to train on the picture
        if (response.length or 0) > max_bytes:  # length: the bytes still to come, None if unknown
            raise Refused("too large")
        content = response.read(max_bytes + 1)
        if len(content) > max_bytes:
            raise Refused("too large")
        if response.length:
            raise Refused("truncated", transient=True)
        return content


def fetch(url, timeout=10.0, max_bytes=20_000_000, private=False):
    """The bytes behind an http(s) URL. Whatever goes wrong raises Refused.

    timeout: seconds for everything together: connecting, headers, body, redirects, and up to two more tries after
    failures that may pass. private: whether addresses in private networks and on this machine are allowed.
    """
    deadline = time.monotonic() + timeout
    for pause in (*PAUSES, None):
        try:
            return request(url, deadline, max_bytes, private)
        except Refused as problem:
            failure = problem
        except TimeoutError:
            failure = Refused("too slow")  # final, since no time is left
        except http.client.IncompleteRead:
            failure = Refused("truncated", transient=True)
        except OSError as problem:
            failure = Refused("no connection", transient=problem.errno != socket.EAI_NONAME)  # unless no such host
        except Exception:  # the libraries raise nearly anything on a broken URL or header
            failure = Refused("bad address or answer")
        if not failure.transient or pause is None or time.monotonic() + pause > deadline:
            raise failure
        time.sleep(pause)


def decode_picture(content, size, min_side=0):
    """Bytes of a picture file -> (size, size, 3) uint8, the centre square. Raises Refused."""
    try:
        with Image.open(io.BytesIO(content), formats=WEB_FORMATS) as picture:  # reads the header, not the pixels
            width, height = picture.size
        if width * height > MAX_STREAM_PIXELS:
            raise Image.DecompressionBombError
        if min(width, height) < min_side:
            raise Refused("too small")
        return common.read_picture(io.BytesIO(content), size)
    except Refused:
        raise
    except Image.UnidentifiedImageError:
        raise Refused("no picture") from None
    except Image.DecompressionBombError:
        raise Refused("too large") from None
    except Exception:  # Pillow raises nearly anything on a broken file
        raise Refused("broken picture") from None


class Cache:
    """Decoded pictures by URL, at most `budget` bytes of them; the least recently used one is dropped first."""

    def __init__(self, budget):
        self.budget, self.total = budget, 0
        self.pictures, self.lock = collections.OrderedDict(), threading.Lock()

    def get(self, url):
        with self.lock:
            if url in self.pictures:
                self.pictures.move_to_end(url)
            return self.pictures.get(url)

    def put(self, url, picture):
        with self.lock:
            if url not in self.pictures:
                self.pictures[url] = picture
                self.total += picture.nbytes
            while self.total > self.budget:
                self.total -= self.pictures.popitem(last=False)[1].nbytes


def read_tar(path):
    """The rows of a webdataset shard: neighbouring files of one stem are a row, for example 7.jpg, 7.json and 7.txt.
    (Read with the standard library: the webdataset package would hand names to a shell.)"""
    with tarfile.open(path) as tar:
        files = (member for member in tar if member.isfile())
        for _, members in itertools.groupby(files, lambda member: os.path.splitext(member.name)[0]):
            row = {}
            for member in members:
                suffix, content = os.path.splitext(member.name)[1].lower(), tar.extractfile(member).read()
                if suffix == ".json":
                    row |= json.loads(content)
                elif suffix == ".txt":
                    row["caption"] = content.decode("utf-8", "replace")
                elif suffix in common.PICTURE_SUFFIXES:
                    row["picture"] = content
            yield row


def read_shard(path):
    """The rows of a .jsonl, .parquet or .tar shard: dictionaries, or JSON still to be parsed. A shard that cannot be
    read, or not to its end, ends with None. Raises UserError if pyarrow is missing."""
    try:
        if path.endswith(".parquet"):
            from pyarrow import parquet

            for batch in parquet.ParquetFile(path).iter_batches(1000):
                yield from batch.to_pylist()
        elif path.endswith(".tar"):
            yield from read_tar(path)
        else:
            with open(path, encoding="utf-8-sig", errors="replace") as file:
                yield from file
    except ImportError:
        raise UserError(".parquet shards need a package that is not here: pip install pyarrow") from None
    except Exception:  # each format fails in its own way
        yield None


def parse_row(row, min_score=0.0, min_side=0):
    """A row of read_shard -> (url, caption, the picture file's bytes or None), by our names or LAION's (URL, TEXT,
    AESTHETIC_SCORE, ...). Raises Refused if it is broken, or filtered out by its own numbers."""
    if row is None:
        raise Refused("broken shard")
    try:
        row = json.loads(row) if isinstance(row, str) else row
        row = {key.lower(): value for key, value in row.items() if value is not None}
        url, content = row.get("url", "").strip(), row.get("picture")
        caption = next(row[key] for key in ("caption", "text", "prompt") if key in row).strip()
        caption.encode()  # fails on half a surrogate pair, which no text encoder can read
        score = float(row.get("aesthetic_score", row.get("aesthetic", 0)))
        side = min(float(row.get(key, math.inf)) for key in ("width", "height"))
    except (StopIteration, AttributeError, TypeError, ValueError, OverflowError, RecursionError):
        raise Refused("broken row") from None
    if not caption or not (url or isinstance(content, bytes)):
        raise Refused("broken row")
    if min_score and not score >= min_score:  # also refuses NaN
        raise Refused("low score")
    if side < min_side:
        raise Refused("too small")
    return url, caption, content if isinstance(content, bytes) else None


class Stream:
    """Captioned pictures from metadata shards, without end: pass after pass over all shards, shuffled in each pass.

    Row i of file f belongs to the process with (f + i) % world == rank, in every pass, so that its picture is in that
    process's cache. Threads load a window of rows at once, but pictures are handed out in the order of the rows. One
    place (pass, shard within the pass's order, row) is therefore all that a checkpoint needs: all before it is done.
    `counts` has the number of rows by outcome: "fetched", "from the cache", or the reason of a refusal.
    """

    def __init__(self, config):
        self.config, self.rank, self.world = config, common.rank(), common.world()
        self.names = sorted(glob.glob(config.stream, recursive=True))
        unknown = [name for name in self.names if not name.endswith((".jsonl", ".parquet", ".tar"))]
        if unknown or not self.names:
            what = f"{unknown[0]} is no shard" if unknown else f"no shards at {config.stream}"
            raise UserError(f"{what}; name .jsonl, .parquet or .tar files, e.g. --stream 'shards/*.jsonl'")
        Image.init()  # loads Pillow's formats, before several threads would at the same time
        self.pool = concurrent.futures.ThreadPoolExecutor(config.threads)
        self.cache = Cache(int(1e9 * config.cache_gb) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        self.gates, self.lock = weakref.WeakValueDictionary(), threading.Lock()  # host -> semaphore while one needs it
        # Rows under way: enough that the threads have work during a step, few enough to fit into memory.
        self.window = 4 * config.threads + 2 * config.batch_size // (config.grad_accum * self.world)
        self.stop = lambda: False  # train() replaces it: does the run have to end?
        self.start((0, 0, 0), {}, good_pass=-1)

    def start(self, place, counts, good_pass):
        """Go on from a place. good_pass: the last pass that is known to have given a picture."""
        self.place, self.counts, self.good_pass = place, collections.Counter(counts), good_pass
        self.rows, self.ahead = self.walk(*place), collections.deque()
        self.commit()

    def walk(self, first_pass, shard, first_row):
        """(the place after it, row) of each of this process's rows from a place on, without end."""
        for number in itertools.count(first_pass):
            order, found = list(range(len(self.names))), False
            random.Random(f"{self.config.seed} {number}").shuffle(order)
            while shard < len(order):
                file = order[shard]
                for i, row in enumerate(read_shard(self.names[file])):
                    if i >= first_row and (file + i) % self.world == self.rank:
                        found = True
                        yield (number, shard, i + 1), row
                shard, first_row = shard + 1, 0
            if not found and number > first_pass:
                raise UserError(f"{self.config.stream} has no rows for process {self.rank + 1} of {self.world}")
            shard = 0

    def load(self, row):
        """In a thread: (outcome, (S, S, 3) uint8, caption) of a row. Raises Refused."""
        config = self.config
        url, caption, content = parse_row(row, config.min_score, config.min_side)
        if content is not None:
            return "fetched", decode_picture(content, config.image_size, config.min_side), caption
        if (picture := self.cache.get(url)) is not None:
            return "from the cache", picture, caption
        host = url.partition("://")[2].partition("/")[0].lower()
        with self.lock:
            gate = self.gates.setdefault(host, threading.Semaphore(config.per_host))
        with gate:
            content = fetch(url, config.timeout, int(1e6 * config.max_mb), config.private_hosts)
        picture = decode_picture(content, config.image_size, config.min_side)
        self.cache.put(url, picture)
        return "fetched", picture, caption

    def sample(self):
        """The next row's (S, S, 3) uint8 and caption. Raises Starved once stop() is true, and UserError if a whole pass
        gave no picture."""
        while not self.stop():
            while len(self.ahead) < self.window:
                place, row = next(self.rows)
                self.ahead.append((place, self.pool.submit(self.load, row)))
            place, task = self.ahead[0]
            if not concurrent.futures.wait([task], timeout=0.5).done:
                continue
            try:
                kind, picture, caption = task.result()
            except Refused as problem:
                kind, picture = problem.kind, None
            if picture is None and place[0] > self.good_pass + 1:
                reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.counts.most_common(4))
                raise UserError(f"a whole pass over {self.config.stream} gave no picture: {reasons}")
            self.ahead.popleft()
            self.place = place
            self.counts[kind] += 1
            if picture is not None:
                self.good_pass = place[0]
                return picture, caption
        raise Starved

    def batch(self, index, draw):
        """As many samples as `index` is long: (B, 3, S, S) in [-1, 1], captions."""
        pictures, captions = zip(*(self.sample() for _ in index))
        x = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 127.5 - 1
        return common.mirror_some(x, self.config.flip, draw), list(captions)

    def commit(self):
        """To be called after an optimizer step: the rows handed out so far are done, and a checkpoint may say so."""
        self.committed = {"place": self.place, "counts": dict(self.counts)}

    def state_dict(self):
        """This process's place and counts, for JSON; a checkpoint keeps a list of those of all processes."""
        return self.committed

    def load_state_dict(self, states):
        """Go on from a checkpoint's list of states. As many processes as then go on where each was; another number of
        them from the least place, so that some rows come again and none is lost."""
        places = [tuple(state["place"]) for state in states]
        place = places[self.rank] if len(places) == self.world else min(places)
        totals = sum((collections.Counter(state["counts"]) for state in states), collections.Counter())
        self.start(place, totals if self.rank == 0 else {}, good_pass=place[0])

    def close(self):
        """Drop what waits for a thread; the threads end with the fetches that they are at."""
        self.pool.shutdown(wait=False, cancel_futures=True)

    def captions(self, most):
        """The first ones in the shards, to learn words from and to sample while training."""
        found = []
        for row in itertools.chain.from_iterable(map(read_shard, self.names)):
            with contextlib.suppress(Refused):
                found.append(parse_row(row)[1])
            if len(found) == most:
                break
        return found

    def __len__(self):
        """The number of shards; nobody has counted the rows."""
        return len(self.names)

    def checksum(self):
        return zlib.crc32(json.dumps([Path(name).name for name in self.names]).encode())


# ----------------------------------------------------------------------------------------------------------------
# Text encoders: what a model asks them is encoder(captions) -> (B, T) word numbers or (B, T, text_dim) states. The
# encoding of "" is the null caption of guidance.


class Words:
    """Captions as numbers of words. The table that gives each word a vector is the model's own and is learned.

    Articles go; the rest are looked up. Number 0 fills the caption up to `length`, so that "" is all zeros.
    """

    def __init__(self, vocabulary, length):
        self.vocabulary, self.length = list(vocabulary), length
        self.number = {word: i for i, word in enumerate(self.vocabulary, 1)}

    @staticmethod
    def split(caption):
        return [word for word in re.findall(r"[^\W_]+", caption.lower()) if word not in ("a", "an", "the")]

    @classmethod
    def learn(cls, captions, most):
        """The vocabulary of some captions, and the length of the longest, at most `most`. Raises UserError if they have
        no word."""
        captions = [cls.split(caption) for caption in captions]
        if not any(captions):
            raise UserError("there is no word in any caption; write captions such as a red car")
        return cls(sorted({word for words in captions for word in words}), min(most, max(map(len, captions))))

    def after(self, words, length):
        """These words behind those that weights know, which keep their numbers."""
        known = set(words)
        return Words([*words, *(w for w in self.vocabulary if w not in known)], max(self.length, length))

    def __call__(self, captions):
        rows = [[self.number[word] for word in self.split(caption) if word in self.number] for caption in captions]
        return torch.tensor([(row + [0] * self.length)[: self.length] for row in rows])

    def complaints(self, caption):
        """What of a caption is lost, in lines that say so. Raises UserError if all of it is."""
        words, lines = self.split(caption), []
        for word in words:
            if word not in self.number:
                near = difflib.get_close_matches(word, self.vocabulary, 3, 0.6)
                lines.append(f"unknown word {word!r}" + (f"; near it are {', '.join(near)}" if near else ""))
        known = sum(word in self.number for word in words)
        if known > self.length:
            lines.append(f"only the first {self.length} of {known} words of {caption!r} are read")
        if caption.strip() and not known:
            raise UserError("; ".join([f"no word of {caption!r} is known to these weights", *lines]))
        return lines


# ----------------------------------------------------------------------------------------------------------------
# Text encoders: CLIP
#
# The text half of CLIP ViT-L/14 (Radford et al. 2021, section 2.4) turns a caption into 77 vectors of width 768; it
# stays frozen. ClipTokenizer cuts the caption into ids, ClipTextEncoder makes vectors of them, and both read the files
# that CLIP_SOURCE publishes. Letters: B captions, T = 77 tokens, D = 768, h = 12 heads.

CLIP_SOURCE = "openai/clip-vit-large-patch14"
CLIP_LENGTH = 77  # tokens of a caption, its start and its end included
CLIP_SPECIAL = ["<|startoftext|>", "<|endoftext|>"]

# A word is an English contraction, a run of letters, one digit, or a run of whatever else is not space. CLIP says so
# in Unicode's classes, which `re` lacks; this pattern sees an ASCII silhouette of the text (see ClipTokenizer.words).
CLIP_WORD = re.compile(r"'(?:s|t|re|ve|m|ll|d)|[a-z]+|[0-9]|[^\sa-z0-9]+", re.ASCII)


def byte_symbols():
    """One visible character for each byte, in the order of their ids: printable Latin-1 stands for itself, and the 68
    others (space, control codes...) borrow the letters from U+0100 on. So any bytes can be written as text."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + i) for i, byte in enumerate(others)}


def silhouette(c):
    """The ASCII character that stands for c in CLIP_WORD's eyes."""
    if c.isascii():
        return c
    return " " if c.isspace() else {"L": "a", "N": "0"}.get(unicodedata.category(c)[0], "!")


class ClipTokenizer:
    """Text to ids by byte-pair encoding (Sennrich et al. 2016) with CLIP's published table of merges.

    path: a folder with vocab.json and merges.txt, or tokenizer.json, or merges.txt(.gz) alone; or one of these files;
    or the weight file beside them. Raises UserError if none is there or they contradict one another.
    """

    def __init__(self, path):
        file = self.find(Path(path))
        self.symbols = byte_symbols()
        self.word_ids = functools.lru_cache(100_000)(self.word_ids)  # the web has no end of words
        try:
            vocab, merges = self.read(file)
            if vocab is None:  # its order is known: bytes, bytes that end a word, merges, the two special tokens
                merges = merges[:48_894]  # OpenAI's own file goes on
                base = list(self.symbols.values())
                order = [*base, *(symbol + "</w>" for symbol in base), *map("".join, merges), *CLIP_SPECIAL]
                vocab = {symbol: i for i, symbol in enumerate(order)}
                whole = len(merges) == 48_894
            else:
                whole = len(merges) >= len(vocab) - 2 * 256 - 2
            unknown = [s for s in [*map("".join, merges), *CLIP_SPECIAL] if not isinstance(vocab.get(s), int)]
            if unknown or not whole:
                raise ValueError(f"no id for {unknown[0]}" if unknown else f"it ends after {len(merges)} merges")
        except Exception as problem:  # there are many ways to be no tokenizer; to the user they are one
            reason = str(problem).split("\n")[0][:120]
            raise UserError(f"{file} is not CLIP's tokenizer ({reason}); get it anew from {CLIP_SOURCE}") from None
        self.vocab = vocab
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        self.start, self.end = (vocab[token] for token in CLIP_SPECIAL)

    @staticmethod
    def find(path):
        """The file that holds the merges."""
        if path.is_file() and path.suffix in (".txt", ".gz", ".json"):
            return path.with_name("merges.txt") if path.name == "vocab.json" else path
        folder = path.parent if path.is_file() else path
        for place in (folder, folder / "tokenizer", folder.parent / "tokenizer"):  # diffusers gives it its own folder
            for name in ("merges.txt", "merges.txt.gz", "tokenizer.json"):
                if (place / name).is_file():
                    return place / name
        wanted = f"vocab.json and merges.txt, or tokenizer.json, of {CLIP_SOURCE}"
        raise UserError(f"no CLIP tokenizer in {folder}: put {wanted} there")

    @staticmethod
    def read(file):
        """(symbol -> id, or None where only merges are there; the merges in their order, each a pair of symbols)"""
        if file.suffix == ".json":
            content = json.loads(file.read_text("utf-8"))
            lines, vocab = content["model"]["merges"], content["model"]["vocab"]
            vocab = vocab | {token["content"]: token["id"] for token in content["added_tokens"]}
        else:
            text = (gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()).decode("utf-8")
            lines = [line for line in text.splitlines() if line and "#version" not in line]
            beside = file.with_name("vocab.json")
            vocab = json.loads(beside.read_text("utf-8")) if beside.is_file() else None
        pairs = [line.split() if isinstance(line, str) else line for line in lines]  # JSON has had both forms
        return vocab, [(left, right) for left, right in pairs]

    def __call__(self, texts):
        """A list of B strings -> ids (B, 77): the start, at most 75 tokens of the text, then ends."""
        ids = torch.full((len(texts), CLIP_LENGTH), self.end)
        for row, text in zip(ids, texts):
            tokens = [self.start, *self.encode(text)[: CLIP_LENGTH - 2]]
            row[: len(tokens)] = torch.tensor(tokens)
        return ids

    def overflow(self, text):
        """How many tokens of the text are cut off; 0 where all of it fits."""
        return max(0, len(self.encode(text)) + 2 - CLIP_LENGTH)

    def encode(self, text):
        """All ids of a text, without start and end. A special token that is spelled out in the text is that token."""
        ids = []
        for part in re.split(f"({'|'.join(map(re.escape, CLIP_SPECIAL))})", text):
            if part in CLIP_SPECIAL:
                ids.append(self.vocab[part])
            else:
                ids += itertools.chain.from_iterable(map(self.word_ids, self.words(part)))
        return ids

    @staticmethod
    def words(text):
        """Composed (NFC), in lower case, cut into words. Lower case goes letter by letter: Python's for whole strings
        writes a Greek sigma differently at a word's end, CLIP's does not."""
        text = "".join(map(str.lower, unicodedata.normalize("NFC", text)))
        return [text[slice(*match.span())] for match in CLIP_WORD.finditer("".join(map(silhouette, text)))]

    def word_ids(self, word):
        """Byte-pair encoding: of all pairs of neighbours merge the one that was learned first, until none is known."""
        symbols = [self.symbols[byte] for byte in word.encode("utf-8", "replace")]
        symbols[-1] += "</w>"
        while len(symbols) > 1:
            pair = min(itertools.pairwise(symbols), key=lambda pair: self.ranks.get(pair, len(self.ranks)))
            if pair not in self.ranks:
                break
            i = 0
            while i < len(symbols) - 1:
                if (symbols[i], symbols[i + 1]) == pair:
                    symbols[i : i + 2] = ["".join(pair)]
                i += 1
        # The published vocabulary knows every byte; in a smaller one the end token stands for the unknown.
        return [self.vocab.get(symbol, self.end) for symbol in symbols]


class ClipLayer(nn.Module):
    """A pre-norm transformer block: x += attention(norm(x)), x += mlp(norm(x)). Heads are 64 wide in every CLIP."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.self_attn = nn.ModuleDict({f"{name}_proj": nn.Linear(dim, dim) for name in ("q", "k", "v", "out")})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, hidden), "fc2": nn.Linear(hidden, dim)})

    def forward(self, x, mask):
        normed = self.layer_norm1(x)
        q, k, v = (self.self_attn[f"{name}_proj"](normed).unflatten(-1, (-1, 64)).transpose(1, 2) for name in "qkv")
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  #     (B, h, T, 64)
        x = x + self.self_attn["out_proj"](mixed.transpose(1, 2).flatten(2))  # (B, T, D)
        hidden = self.mlp["fc1"](self.layer_norm2(x))  #                        (B, T, 4D)
        return x + self.mlp["fc2"](hidden * torch.sigmoid(1.702 * hidden))  # CLIP's quick stand-in for GELU


class ClipTextEncoder(nn.Module):
    """CLIP's causal text transformer, by default ViT-L/14's. Its parameters have the published names without the
    prefix `text_model.`, as transformers 5 saves them."""

    def __init__(self, vocab=49_408, length=CLIP_LENGTH, dim=768, hidden=3072, depth=12):
        super().__init__()
        tables = {"token_embedding": nn.Embedding(vocab, dim), "position_embedding": nn.Embedding(length, dim)}
        self.embeddings = nn.ModuleDict(tables)
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(ClipLayer(dim, hidden) for _ in range(depth))})
        self.final_layer_norm = nn.LayerNorm(dim)

    def forward(self, ids, mask_padding=False):
        """ids (B, T) -> the last hidden state after the final norm, (B, T, D).

        mask_padding hides the keys after the first end token. It changes the vectors of the padding only, but those
        are fed to the image model like all others: Stable Diffusion leaves it off, our text-to-image source has it on.
        """
        tokens = self.embeddings["token_embedding"]
        mask = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril()  # (T, T)
        if mask_padding:
            is_end = (ids == tokens.num_embeddings - 1).int()
            mask = mask & (is_end.cumsum(1) - is_end == 0)[:, None, None, :]  #                      (B, 1, T, T)
        x = tokens(ids) + self.embeddings["position_embedding"].weight[: ids.shape[1]]  #            (B, T, D)
        for layer in self.encoder["layers"]:
            x = layer(x, mask)
        return self.final_layer_norm(x)

    @classmethod
    def load(cls, path):
        """From a Hugging Face folder (or a pipeline's, which has a text_encoder/ folder), or a single file: the text
        half alone, a whole CLIP, a Stable Diffusion checkpoint. float32, frozen. Raises UserError if it is no CLIP."""
        file = Path(path)
        if not file.is_file():
            names = ("model.safetensors", "model.fp16.safetensors", "pytorch_model.bin")
            places = [folder / name for folder in (file, file / "text_encoder") for name in names]
            file = next((place for place in places if place.is_file()), None)
            if not file:
                raise UserError(f"no CLIP weights in {path}: put model.safetensors of {CLIP_SOURCE} there")
        content, _ = load_tensors(file)
        try:
            content = {str(name): tensor for name, tensor in content.get("state_dict", content).items()}
            # Whatever stands before this name stands before all names of the text half. The rest of the file (vision,
            # projections, other networks) and the position numbers that older files list are not needed.
            first = "embeddings.token_embedding.weight"
            prefix = next(name for name in content if name.endswith(first)).removesuffix(first)
            weights = {name.removeprefix(prefix): w for name, w in content.items() if name.startswith(prefix)}
            weights = {k: w for k, w in weights.items() if not k.endswith(("position_ids", "text_projection.weight"))}
            length, hidden = (
                len(weights[k]) for k in ("embeddings.position_embedding.weight", "encoder.layers.0.mlp.fc1.weight")
            )
            vocab, dim = weights[first].shape
            depth = sum(name.endswith("layer_norm1.weight") for name in weights)
            if dim % 64 or not {w.dtype for w in weights.values()} <= {torch.float32, torch.float16, torch.bfloat16}:
                raise ValueError
            beside = file.with_name("config.json")
            config = json.loads(beside.read_text("utf-8")) if beside.is_file() else {}
            if config.get("text_config", config).get("hidden_act", "quick_gelu") != "quick_gelu":
                raise ValueError  # some later CLIPs differ in nothing but this
        except (OSError, ValueError, LookupError, TypeError, AttributeError, StopIteration):
            raise UserError(f"{file} holds no CLIP text encoder that fits; take that of {CLIP_SOURCE}") from None
        with torch.device("meta"):
            model = cls(vocab, length, dim, hidden, depth)
        load_into(model, weights, file)
        return model.eval().requires_grad_(False)


class Clip:
    """Captions as the states of CLIP's text tower. Like the write-up, which hands CLIP its tokenizer's mask, we let no
    token see the padding."""

    def __init__(self, path, device="cpu"):
        if not path:
            raise UserError(f"name CLIP's files with --clip: a folder with those of {CLIP_SOURCE}")
        self.tokenizer, self.model = ClipTokenizer(path), ClipTextEncoder.load(path).to(device)

    def __call__(self, captions):
        device = next(self.model.parameters()).device
        return self.model(self.tokenizer(captions).to(device), mask_padding=True).cpu()

    def complaints(self, caption):
        cut = self.tokenizer.overflow(caption)
        return [f"the last {cut} tokens of {caption[:40]!r}... are more than CLIP reads"] if cut else []


# ----------------------------------------------------------------------------------------------------------------
# Model: the dual-stream transformer (the write-up's "Dual-Stream Blocks" and "MSRoPE"; after Qwen-Image)
# B pictures, C channels, T text tokens, N = (H / patch_size)(W / patch_size) image tokens, D width, h heads


def centred(height, width, device=None):
    """Positions of a grid's rows and columns with (0, 0) in its middle: 16 of them run from -8 to 7."""
    return [torch.arange(count, device=device) - count // 2 for count in (height, width)]


def msrope(height, width, text_len, head_dim, device=None):
    """Rotary tables of text and image: ((T, head_dim/2) cos and sin, (N, head_dim/2) cos and sin).

    Image tokens lie on a centred grid, so that a larger picture goes on outwards, with the trained positions in its
    middle. Text follows on the diagonal from the grid's corner, (8, 8), (9, 9), ...: the same number on both axes, so
    for text the two halves of a head turn as one.
    """
    diagonal = torch.arange(text_len, device=device) + max(height // 2, width // 2)
    text = tuple(torch.cat((table, table), dim=-1) for table in sincos_table(diagonal, head_dim // 2))
    return text, rope_2d(*centred(height, width, device), head_dim)


class FeedForward(nn.Module):
    """Two layers with a GELU between them, four times as wide inside."""

    def __init__(self, width):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))

    def forward(self, x):
        return self.net(x)


class SwiGLU(nn.Module):
    """value * silu(gate) between two layers (Shazeer 2020, eq. 6), as large as FeedForward: two thirds as wide
    inside, with half as many matrices again."""

    def __init__(self, width):
        super().__init__()
        inside = math.ceil(8 * width / 3 / 64) * 64
        self.enter, self.leave = nn.Linear(width, 2 * inside), nn.Linear(inside, width)

    def forward(self, x):
        value, gate = self.enter(x).chunk(2, dim=-1)
        return self.leave(value * F.silu(gate))


class JointAttention(nn.Module):
    """Each stream has its own queries, keys and values; then all tokens, text first, attend to all."""

    def __init__(self, num_heads, head_dim):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        width = num_heads * head_dim
        for stream in ("vis", "txt"):
            for letter in "qkvo":
                self.add_module(f"{stream}_{letter}_proj", nn.Linear(width, width))
        for stream in ("vis", "txt"):
            for letter in "qk":
                self.add_module(f"{stream}_{letter}_norm", RMSNorm(head_dim))

    def heads(self, x):
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, h, N, head_dim)

    def turned(self, name, x, rope):
        """Queries or keys of a stream, as `name` ("vis_q") says: normalised, and turned by their places, rope's."""
        proj, norm = getattr(self, f"{name}_proj"), getattr(self, f"{name}_norm")
        if rope is None:
            return norm(self.heads(proj(x)))
        weight, bias, scale = (unpair(rows, self.head_dim) for rows in (proj.weight, proj.bias, norm.weight))
        return apply_rope(rms_norm(self.heads(F.linear(x, weight, bias)), scale), rope)

    def forward(self, txt, vis, rope, text_goes_on=True):
        """txt (B, T, D), vis (B, N, D) -> what each has gathered; None for text that has no layer left to go to. rope:
        the tables of both streams, or (None, None) where tokens know their places otherwise."""
        txt_rope, vis_rope = rope
        q = self.turned("vis_q", vis, vis_rope)
        k = torch.cat((self.turned("txt_k", txt, txt_rope), self.turned("vis_k", vis, vis_rope)), dim=2)
        v = torch.cat((self.heads(self.txt_v_proj(txt)), self.heads(self.vis_v_proj(vis))), dim=2)
        if text_goes_on:
            q = torch.cat((self.turned("txt_q", txt, txt_rope), q), dim=2)  # (B, h, T + N, head_dim)
        x = attention(q, k, v).transpose(1, 2).flatten(2)
        if not text_goes_on:
            return None, self.vis_o_proj(x)
        txt, vis = x.split((txt.shape[1], vis.shape[1]), dim=1)
        return self.txt_o_proj(txt), self.vis_o_proj(vis)


class DualStreamLayer(nn.Module):
    """Joint attention and, per stream, a feed-forward network; each behind a LayerNorm that the time shifts and scales
    and a gate that it opens. The gates start at zero, so that a fresh layer is the identity (adaLN-Zero).

    In the last layer nothing reads the text any more. Its text queries, output and feed-forward network can learn
    nothing there (5.9M of the write-up's 258M parameters); they exist because the published checkpoints have them, and
    in "joint" for the sake of one class.
    """

    def __init__(self, num_heads, head_dim, last, feed_forward=FeedForward):
        super().__init__()
        width = num_heads * head_dim
        self.last = last
        self.vis_mod = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.vis_ff = feed_forward(width)
        self.txt_mod = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.txt_ff = feed_forward(width)
        self.attn = JointAttention(num_heads, head_dim)
        if last:
            for part in (self.txt_ff, self.attn.txt_q_proj, self.attn.txt_q_norm, self.attn.txt_o_proj):
                part.requires_grad_(False)

    def forward(self, txt, vis, condition, rope):
        def norm(x):
            return F.layer_norm(x, x.shape[-1:], eps=1e-6)

        shift1, scale1, gate1, shift2, scale2, gate2 = self.vis_mod(condition).chunk(6, dim=-1)
        txt_shift1, txt_scale1, txt_gate1, txt_shift2, txt_scale2, txt_gate2 = self.txt_mod(condition).chunk(6, dim=-1)
        from_txt, from_vis = self.attn(
            modulate(norm(txt), txt_shift1, txt_scale1), modulate(norm(vis), shift1, scale1), rope, not self.last
        )
        vis = vis + gate1.unsqueeze(1) * from_vis
        vis = vis + gate2.unsqueeze(1) * self.vis_ff(modulate(norm(vis), shift2, scale2))
        if not self.last:
            txt = txt + txt_gate1.unsqueeze(1) * from_txt
            txt = txt + txt_gate2.unsqueeze(1) * self.txt_ff(modulate(norm(txt), txt_shift2, txt_scale2))
        return txt, vis


class OutputNorm(nn.Module):
    """The last LayerNorm, shifted and scaled by the time."""

    def __init__(self, width):
        super().__init__()
        self.linear = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, condition):
        shift, scale = self.linear(condition).chunk(2, dim=-1)
        return modulate(F.layer_norm(x, x.shape[-1:], eps=1e-6), shift, scale)


class DiT(nn.Module):
    """Diffusion transformer of two streams, in two architectures.

    "dual" is "Diffusion from Scratch". "joint" is "re-diffusion", whose published code does not run; built is what its
    text says, in the same layers. Against "dual" it has learned positions instead of turned heads, the mean of the
    caption beside the time (section 4.2), and SwiGLU, which is its code's. Where the text is silent or at odds with
    itself: AdaLN-Zero is DiT's, with a gate that starts at zero, which the formula (4.3) lacks; the time is of 1000 t,
    for at a period of 10,000 a t up to 1 hardly turns; the caption is normed before its mean, which is of words alone
    or of all of CLIP's 77 states; residuals go around attention and around the MLP (4.4), each stream with its own
    output matrix; queries and keys are normed by head; after the last layer, whose text nobody reads, come the same
    norm and projection as in "dual".

    latent_size  side of the training latents (or pictures). Of "dual" nothing depends on it, since positions are
                 computed; the learned ones of "joint" are stretched for another size. Multiples of patch_size will do
    vocabulary   words of the model's own table; 0 for a text encoder that brings vectors
    predict      what the last layer says: "velocity", or "data", from which the velocity follows
    time_min     least t that training shows; sample() asks for none below

    model(z_t, t, text) -> velocity (noise - data), like z_t (B, C, H, W). t (B,) in [0, 1], 1 = noise. text
    (B, T, text_dim), or (B, T) word numbers. Raises ValueError if patch_size does not divide H and W.
    """

    def __init__(
        self,
        patch_size=2,
        in_channels=4,
        depth=12,
        num_heads=12,
        head_dim=64,
        text_dim=768,
        latent_size=32,
        vocabulary=0,
        predict="velocity",
        time_min=0.0,
        arch="dual",
    ):
        super().__init__()
        width = num_heads * head_dim
        self.patch_size, self.head_dim, self.predict, self.time_min = patch_size, head_dim, predict, time_min
        self.joint, self.checkpointing = arch == "joint", False
        self.words = nn.Embedding(vocabulary + 1, text_dim) if vocabulary else None
        self.patch_embed = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)
        # The sinusoid is of 1000 t and stays in float32. The published code lets autocast round it to bfloat16, which
        # leaves 251 different values from 256 to 1000.
        self.step_embed = TimestepEmbedder(width, scale=1000)
        self.text_norm = RMSNorm(text_dim)
        self.text_proj = nn.Linear(text_dim, width)
        if self.joint:
            self.positions = nn.Parameter(torch.zeros(1, width, latent_size // patch_size, latent_size // patch_size))
            self.caption_embed = nn.Linear(text_dim, width)
        feed_forward = SwiGLU if self.joint else FeedForward
        layers = (DualStreamLayer(num_heads, head_dim, i == depth - 1, feed_forward) for i in range(depth))
        self.layers = nn.ModuleList(layers)
        self.output_norm = OutputNorm(width)
        self.output_proj = nn.Linear(width, patch_size**2 * in_channels)
        self.initialize_weights()

    def initialize_weights(self):
        """Xavier for linear layers, but N(0, 0.02) for those that embed time and text, and zero for gates and output: a
        fresh model says 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        embeddings = [self.step_embed.mlp[0].weight, self.step_embed.mlp[2].weight, self.text_proj.weight]
        if self.joint:
            embeddings += [self.caption_embed.weight, self.positions]
        for weight in embeddings:
            nn.init.normal_(weight, std=0.02)
        if self.words is not None:  # short vectors turn sooner, and text_norm makes them long
            nn.init.normal_(self.words.weight, std=0.1)
        for layer in self.layers:
            nn.init.zeros_(layer.vis_mod[1].weight)
            nn.init.zeros_(layer.txt_mod[1].weight)
        nn.init.zeros_(self.output_norm.linear[1].weight)
        nn.init.zeros_(self.output_proj.weight)

    def forward(self, z_t, t, text):
        p, (_, channels, height, width) = self.patch_size, z_t.shape
        if height % p or width % p:
            raise ValueError(f"{height} x {width} is no multiple of the patch size {p}")
        height, width = height // p, width // p
        condition = self.step_embed(t)  # (B, D)
        states = self.text_norm(text if self.words is None else self.words(text))
        txt = self.text_proj(states).float()  # (B, T, D); the streams add up in float32
        vis = self.patch_embed(z_t).flatten(2).transpose(1, 2).float().contiguous()  # (B, N, D)
        rope = None, None
        if self.joint:
            places = self.positions
            if places.shape[2:] != (height, width):
                places = F.interpolate(places, (height, width), mode="bicubic")
            vis = vis + places.flatten(2).transpose(1, 2)
            told = torch.ones_like(states[..., :1]) if self.words is None else (text > 0).unsqueeze(-1)
            condition = condition + self.caption_embed((states * told).sum(dim=1) / told.sum(dim=1).clamp(min=1))
            if self.words is not None:  # CLIP's states know the order of words, a table's do not
                order = torch.arange(txt.shape[1], device=z_t.device)
                txt = txt + torch.cat(sincos_table(order, txt.shape[-1]), dim=-1)
        else:
            rope = msrope(height, width, text.shape[1], self.head_dim, z_t.device)
            if self.words is not None:
                # What the write-up leaves to attention is too slow for a few minutes. The words' sum joins the time, as
                # pooled text does in Stable Diffusion 3 (Esser et al. 2024, section 4), and patches know their place.
                condition = condition + (txt * (text > 0).unsqueeze(-1)).sum(dim=1)
                vis = vis + sincos_2d(*centred(height, width, z_t.device), vis.shape[-1])
        for layer in self.layers:
            if self.checkpointing and self.training:  # forget what lies within, compute it again going back
                txt, vis = checkpoint(layer, txt, vis, condition, rope, use_reentrant=False)
            else:
                txt, vis = layer(txt, vis, condition, rope)
        out = self.output_proj(self.output_norm(vis, condition)).float()  # (B, N, p p C)
        out = out.unflatten(1, (height, width)).unflatten(-1, (p, p, channels))  # (B, H/p, W/p, p, p, C)
        out = out.permute(0, 5, 1, 3, 2, 4).reshape(z_t.shape)
        if self.predict == "velocity":
            return out
        # z_t = data + t (noise - data), so what lies between z_t and the data is t times the velocity.
        return (z_t - out) / t.view(-1, 1, 1, 1).clamp(min=1e-3)


def build_model(config, channels, size, vocabulary):
    """A fresh DiT for latents (channels, size, size). Raises UserError where the config's sizes do not go together."""
    if size % config.patch_size:
        raise UserError(f"--patch-size {config.patch_size} does not divide {size}, the side of the model's pictures")
    if config.head_dim % 4:
        raise UserError(f"--head-dim {config.head_dim} must be a multiple of 4")
    sizes = config.patch_size, channels, config.depth, config.num_heads, config.head_dim, config.text_dim, size
    model = DiT(*sizes, vocabulary, config.predict, config.time_min, config.arch)
    model.checkpointing = config.checkpoint_activations
    return model


# ----------------------------------------------------------------------------------------------------------------
# Preparing: pictures and captions, encoded once


@dataclasses.dataclass
class PrepareConfig(common.ShardConfig):
    """Options of the verb prepare."""

    clip: str = option("", "CLIP ViT-L/14: a Hugging Face folder, or its weights beside its tokenizer files")


def prepare_command(options):
    """Encode a folder into shards of latents and CLIP states. A shard is written whole or not at all, so the same
    command goes on after a kill with the first one that is missing. Raises UserError."""
    if not (options.data and options.out and options.vae):
        raise UserError("prepare needs --data, --out, --vae and --clip")
    device = common.pick_device(options.device)
    precision = common.pick_precision(options.precision, device)
    vae, clip = common.load_vae(options.vae).to(device), Clip(options.clip, device)
    paths = common.picture_paths(options.data)
    captions = captions_of(paths, options.data)
    missing = [path for path in paths if path not in captions]
    paths = [path for path in paths if path in captions]
    about = {"vae": common.fingerprint(vae), "clip": common.fingerprint(clip.model), "image_size": options.image_size}

    def encode(pictures, rows):
        with autocast(device, precision):
            latents = vae.encode(pictures.to(device))
        return {"latents": latents, "text": clip([row["caption"] for row in rows])}  # as sampling encodes prompts

    rows = {path: {"caption": captions[path]} for path in paths}
    with torch.no_grad():
        null = {"null": clip([""]).bfloat16().cpu()}
    if cut := sum(bool(clip.complaints(row["caption"])) for row in rows.values()):
        print(f"{cut:,} captions are longer than the {CLIP_LENGTH} tokens that CLIP reads, and lose their ends")
    done, skipped = common.write_shards(options, paths, about, rows, encode, null)
    common.tell_skipped([f"{path}: no caption" for path in missing] + skipped)
    if not done:
        raise UserError(f"no readable picture with a caption in {options.data}")
    print(f"{done:,} samples in {options.out}; now: python dit_t2i.py train --preset paper --data {options.out}")


# ----------------------------------------------------------------------------------------------------------------
# Rectified flow and guidance


def flow_loss(config, model, x, text, draw, progress=0.0):
    """What each picture of the batch costs, (B,), and its time, (B,): the squared error of the velocity noise - data at
    z_t = (1 - t) data + t noise, with t the sigmoid of a normal ("Rectified Flow" in the write-up; in re-diffusion's,
    "Diffusion as Rectified Flow", t is uniform). progress, from 0 to 1, is the part of the run that is over."""
    if (config.time_law or {"dual": "normal", "joint": "uniform"}[config.arch]) == "uniform":
        t = config.time_min + (1 - config.time_min) * draw.rand()
    else:
        mean = config.time_mean - progress * config.time_fall
        t = torch.sigmoid(mean + config.time_std * draw.randn()).clamp(min=config.time_min)
    noise = draw.randn(*x.shape[1:])
    error = model(flow_point(x, noise, t), t, text) - (noise - x)
    return error.square().mean(dim=(1, 2, 3)), t


def guided(model, text, null, cfg):
    """velocity(z, t) = v_null + cfg (v_text - v_null), both from one doubled batch ("Classifier Free Guidance"; Ho &
    Salimans 2022, eq. 6). At cfg 1 the null caption cancels, so that the conditional velocity alone is computed."""

    def velocity(z, t):
        times = torch.full((len(z),), t, device=z.device)
        if cfg == 1:
            return model(z, times, text)
        both = torch.cat((text, null.expand_as(text)))
        with_text, without = model(torch.cat((z, z)), torch.cat((times, times)), both).chunk(2)
        return without + cfg * (with_text - without)

    return velocity


# ----------------------------------------------------------------------------------------------------------------
# Training


MODEL_FIELDS = "arch patch_size depth num_heads head_dim text_dim predict".split()


def begin_with(start, model, config, header):
    """Put weights, as load_model() gives them (DiT, Config, header), into a fresh model, which may know more words than
    they do. config, header: the new run's. Raises UserError where they are of another model, text encoder or VAE."""
    old_model, old_config, old_header = start
    fields = [*MODEL_FIELDS, "image_size"] if config.arch == "joint" else MODEL_FIELDS  # its positions are learned
    if asked := common.differences(config, dataclasses.asdict(old_config), fields):
        raise UserError(f"{config.start} was trained with {asked}; give the same")
    theirs, ours = ("a word table" if "words" in h["text"] else "CLIP" for h in (old_header, header))
    if theirs != ours:
        raise UserError(f"{config.start} reads captions through {theirs}, this run through {ours}; name other weights")
    partners = (
        ("VAE", old_header["vae"], header["vae"]),
        ("CLIP", *(h["text"].get("clip") for h in (old_header, header))),
    )
    for what, old, new in partners:
        if old and not common.is_same_network(new or [], old):
            raise UserError(f"{config.start} was trained with another {what}; take that, or name other weights")
    weights = old_model.state_dict()
    if model.words is not None:  # words that are new to the weights keep the vectors they have
        known = weights["words.weight"]
        weights["words.weight"] = torch.cat((known, model.words.weight.detach()[len(known) :]))
    load_into(model, weights, config.start)


def hidden_parts(model):
    """The modules whose matrices --optimizer muon steps."""
    return [part for layer in model.layers for part in (layer.attn, layer.vis_ff, layer.txt_ff)]


def train(config):
    """Train from nothing, or go on with --resume; what is left behind is a run folder. Raises UserError."""
    device, precision = common.set_up(config)
    config = common.settle_optimizer(config, device)
    start = load_model(config.start, torch.device("cpu")) if config.start and not config.resume else None
    everything, data, held_out, skipped = load_data(config)
    if isinstance(everything, ShardSet):  # for the record: what they were made with
        config = dataclasses.replace(config, image_size=everything.header["image_size"], encoder="clip")
    if config.epochs:
        steps = config.epochs * math.ceil(len(data) / config.batch_size)
        config = dataclasses.replace(config, steps=min(steps, config.steps or steps))
    run = Run(config, "dit_t2i")
    encoder, vae = None, common.load_vae(config.vae).to(device) if config.vae else None
    if config.stream:
        channels, size = (vae.latent_channels, config.image_size // vae.stride) if vae else (3, config.image_size)
    else:
        channels, size = data.batch([0], Draw(1, 0))[0].shape[1:3]
    run.header = {"data": [len(everything), everything.checksum()], "latent": [channels, size], "vae": None}
    if config.stream and vae:
        run.header["vae"] = common.fingerprint(vae)
    if isinstance(everything, ShardSet):  # encoded before: neither CLIP nor VAE is needed, but for pictures
        null = everything.null
        run.header |= {"text": {"clip": everything.header["clip"]}, "vae": everything.header["vae"]}
        common.check_partner("--vae", vae, run.header["vae"])
        if config.clip:  # for whoever samples
            common.check_partner("--clip", Clip(config.clip).model, everything.header["clip"])
    elif config.encoder == "clip":
        encoder = Clip(config.clip, device)
        run.header["text"] = {"clip": common.fingerprint(encoder.model)}
    else:
        captions = data.captions(WORDS_FROM) if config.stream else data.all_captions()
        encoder = Words.learn(captions, config.max_words)
        if cut := sum(len(Words.split(caption)) > encoder.length for caption in captions):
            print(f"{cut:,} of {len(captions):,} captions are longer than --max-words {encoder.length}: their ends go")
        # The words of the weights that this run began with, or of its own checkpoint, come first.
        before = start[2] if start else load_tensors(run.state_path, header_only=True)[1] if run.resume else None
        text = (before or {}).get("text", {})
        encoder = encoder.after(text.get("words", []), text.get("length", 0))
        run.header["text"] = {"words": encoder.vocabulary, "length": encoder.length}
    if encoder:
        null = encoder([""])
    if null.is_floating_point() and config.text_dim != null.shape[-1]:
        raise UserError(f"--text-dim {config.text_dim}: the text of this CLIP is {null.shape[-1]} wide")
    chosen = [len(held_out) * i // 16 for i in range(16)] if held_out else []
    if encoder:
        shown = encoder([held_out.caption(i) for i in chosen] or everything.captions(16))
    else:
        shown = held_out.batch(chosen, Draw(16, 0))[1]

    torch.manual_seed(config.seed)
    words = len(encoder.vocabulary) if isinstance(encoder, Words) else 0
    model = build_model(config, channels, size, words)
    if start:
        begin_with(start, model, config, run.header)
        del start
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    trained = common.parallelize(config, model, ema, device, lambda net: net.layers)
    optimizer, scaler = common.make_optimizer(config, model, device, hidden_parts(model))
    if config.checkpoint_activations:
        common.narrow_gradients(config, model, device)
    if run.resume:
        header = run.load(model, ema, optimizer, scaler)
        began_with = header["config"].get("start", "")
        if config.start and not began_with:
            raise UserError(f"the run in {run.folder} did not begin with other weights; leave --from out")
        run.config = dataclasses.replace(run.config, start=began_with)  # for the next checkpoint to tell
        if config.stream:
            data.load_state_dict(header["stream"])
    if config.stream:
        data.stop = run.should_end
    if common.worth_compiling(config, device):
        for layer in model.layers:
            layer.compile(dynamic=False)
    run.tell_skipped(skipped)
    amount = f"{len(data):,} shards" if config.stream else f"{len(data):,} samples and {len(held_out):,} held out"
    print(run.banner(model, device, precision, amount))

    # What fits into a process's memory in training does so elsewhere.
    at_once = max(1, config.batch_size // (config.grad_accum * common.world()))

    def draw_batch(source, index, draw):
        """Samples of a data set, ready for the model: (x (B, C, H, W), text), a tenth of the captions left out."""
        x, text = source.batch(index, draw)
        x = x.to(device)
        text = encoder(text) if encoder else text
        left_out = draw.rand() < config.null_prob
        text = torch.where(left_out.view(-1, *[1] * (text.dim() - 1)), null, text)
        if config.stream and vae:
            with torch.no_grad(), autocast(device, precision):
                x = vae.encode(x)
        return x, text.to(device)

    @torch.no_grad()
    def held_out_loss():
        """Of the averaged weights, always with the same noise and at the same times, drawn as when training begins."""
        count, costs = min(256, len(held_out)), []
        for first in range(0, count, at_once):
            rows = range(count)[first : first + at_once]
            draws = functools.partial(Draw, count, config.seed, 0, rows=slice(rows.start, rows.stop))
            x, text = draw_batch(held_out, rows, draws(2))
            with autocast(device, precision):
                costs.append(flow_loss(config, ema, x, text, draws(3, device=device))[0])
        return torch.cat(costs).mean().item()

    with run.clock(), contextlib.closing(data) if config.stream else contextlib.nullcontext():
        while not run.done:
            costs, times, draws = [], [], functools.partial(Draw, config.batch_size, config.seed, run.step)
            # A stream gives what comes next, whatever it is asked for.
            index = range(config.batch_size) if config.stream else common.batch_index(config, len(data), run.step)
            try:
                for rows in common.microbatches(config, trained):
                    x, text = draw_batch(data, index[rows], draws(1, rows=rows))
                    with autocast(device, precision):
                        draw = draws(4, rows=rows, device=device)
                        cost, t = flow_loss(config, trained, x, text, draw, run.progress)
                    scaler.scale(cost.mean() / config.grad_accum).backward()
                    costs.append(cost.detach())
                    times.append(t)
                common.optimizer_step(config, run, model, ema, optimizer, scaler, torch.cat(costs), torch.cat(times))
                if config.stream:
                    data.commit()
            except Starved:  # the run has to end, as due() finds below; the step is not made and its rows are not done
                pass

            pictures, checkpoint = run.due()
            if checkpoint and config.stream:
                states = common.all_gather_objects(data.state_dict())
                counts = sum((collections.Counter(state["counts"]) for state in states), collections.Counter())
                run.bar.write(f"step {run.step}: " + ", ".join(f"{n:,} {kind}" for kind, n in counts.items()))
                run.save(model, ema, optimizer, scaler, also={"stream": states})
            elif checkpoint:
                run.save(model, ema, optimizer, scaler, held_out_loss())
            if pictures:
                # Guidance doubles what is computed at once.
                few = max(1, min(16, at_once // 2))
                options = DrawConfig(num=1, cfg=config.cfg, precision=precision, batch_size=few)
                drawn = sample(ema, options, shown, null, (channels, size, size))
                run.save_samples(torch.cat([to_rgb(vae, part) for part in drawn.split(few)]))
    return run.farewell()


# ----------------------------------------------------------------------------------------------------------------
# Sampling


@dataclasses.dataclass
class DrawConfig(common.DrawConfig):
    """How pictures are drawn from weights, for whatever purpose."""

    clip: str = option("", "CLIP, for weights that were trained with it (default: training's --clip)")
    vae: str = option("", "VAE, for weights that were trained in its latents (default: training's --vae)")
    num: int = option(4, "pictures of each prompt", low=1)
    cfg: float | None = option(None, "guidance: 1 conditional, 0 unconditional (default: the weights')", low=0.0)
    steps: int = option(28, "steps from noise to picture", low=1)
    solver: str = option("euler", "how a step is made", choices=tuple(common.SOLVERS))
    shift: float = option(1.0, "above 1: more of the steps where noise is (Esser et al. 2024, eq. 23)", low=0.01)
    batch_size: int = option(16, "pictures at a time", low=1)


@dataclasses.dataclass
class SampleConfig(DrawConfig):
    """Options of the verb sample."""

    prompt: tuple[str, ...] = option(
        (), 'what to draw, e.g. "a red car"; several prompts make several rows', positional=True
    )
    prompts: str = option("", "file with a prompt in each line")
    negative: str = option("", "what guidance leads away from (default: the empty caption)")
    size: int | None = option(None, "side of the pictures in pixels (default: as trained)", low=8)
    tile: int | None = option(None, "decode in tiles of so many latent cells, where memory is short", low=32)
    out: str = option("samples/dit_t2i.png", "picture of all samples, a row for each prompt", picture="still")
    each: str = option("", "folder for single pictures")
    gif: str = option("", "animation of the first pictures, from noise to data in at most 10 frames", picture="film")


@torch.no_grad()
def sample(model, options, text, null, shape, watch=None, apart=0):
    """Draw options.num pictures for each row of text -> (P * num, C, H, W) as the model sees them, by prompt.

    text (P, T) or (P, T, text_dim), null the same of one row; shape (C, H, W). From noise at t = 1 to data at t = 0;
    picture i of prompt p depends on the seed options.seed + apart * p + i only: all prompts share their noise unless
    told apart. watch(z, t) sees the states of the first batch.
    """
    device = next(model.parameters()).device
    precision = common.pick_precision(options.precision, device)
    # Below the least time of training lies a single step, which lands on the predicted data.
    least, count = model.time_min, max(options.steps - (model.time_min > 0), 1)
    times = [1 - i / count for i in range(options.steps)]
    times = [least + (1 - least) * options.shift * t / (1 + (options.shift - 1) * t) for t in times] + [0.0]
    text, null = text.to(device), null.to(device)
    jobs = [(row, options.seed + apart * row + i) for row in range(len(text)) for i in range(options.num)]
    pictures = []
    for first in range(0, len(jobs), options.batch_size):
        rows, seeds = zip(*jobs[first : first + options.batch_size])
        z = common.noise_for(seeds, shape, device)
        with autocast(device, precision):
            velocity = guided(model, text[list(rows)], null, options.cfg)
            pictures.append(common.SOLVERS[options.solver](velocity, z, times, watch if first == 0 else None))
    return torch.cat(pictures)


def to_rgb(vae, x, tile=None):
    """What the model sees -> RGB in [0, 1], latents in tiles of so many cells or whole. Latents without a VAE to decode
    them: their first three channels."""
    if vae is not None:
        x = common.decode_tiled(vae, x, tile) if tile else vae.decode(x)
    return (x[:, :3] / 2 + 0.5).clamp(0, 1)


def load_model(path, device):
    """(DiT in eval mode, Config, header) from our own checkpoint, or one of the published repository (.pt).

    Raises UserError if the file is broken or of another model.
    """
    weights, header = load_tensors(path)
    if header and header.get("system") != "dit_t2i":
        made_by = header.get("system", "another program")
        raise UserError(f"{path} is a checkpoint of {made_by}; name one of dit_t2i.py's")
    try:
        if not header:
            weights = weights.get("ema_model", weights)
            width, channels, patch, _ = weights["patch_embed.weight"].shape
            sizes = {"patch_size": patch, "text_dim": len(weights["text_norm.weight"])}
            sizes["head_dim"] = len(weights["layers.0.attn.vis_q_norm.weight"])
            sizes["num_heads"] = width // sizes["head_dim"]
            sizes["depth"] = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("layers."))
            header = {"config": PRESETS["paper"] | sizes, "latent": [channels, 32], "text": {"clip": None}, "vae": None}
        config = Config(**header["config"])
        common.check_config(config)
        model = build_model(config, *header["latent"], len(header["text"].get("words", ())))
    except (KeyError, TypeError, ValueError, AttributeError) as problem:
        raise UserError(f"{path} is no checkpoint of dit_t2i.py (no usable {problem}); name another") from None
    load_into(model, weights, path)
    return model.to(device).eval().requires_grad_(False), config, header


def load_partners(options, config, header):
    """The text encoder and the VAE (or None) that belong to a checkpoint. Raises UserError where they are not to be
    had or do not belong to it."""
    if "words" in header["text"]:
        encoder = Words(header["text"]["words"], header["text"]["length"])
    else:
        encoder = Clip(options.clip or config.clip)
        common.check_partner("--clip", encoder.model, header["text"]["clip"])
        if config.text_dim != (width := encoder([""]).shape[-1]):
            raise UserError(
                f"--clip: its states are {width} wide, and these weights read {config.text_dim}; name another"
            )
    vae = common.load_vae_of(header, options.vae or config.vae) if header["latent"][0] != 3 else None
    for flag, given, used in (("--clip", options.clip, isinstance(encoder, Clip)), ("--vae", options.vae, vae)):
        if given and not used:
            raise UserError(f"{flag}: these weights were trained without one; leave it out")
    return encoder, vae


def sample_command(options):
    """Write what sample() draws: a grid, and with --each and --gif single pictures and the way there."""
    prompts = list(options.prompt)
    if options.prompts:
        try:
            prompts += [
                line.strip() for line in Path(options.prompts).read_text("utf-8-sig").splitlines() if line.strip()
            ]
        except (OSError, UnicodeDecodeError) as problem:
            raise UserError(f"cannot read prompts from {options.prompts}: {problem}") from None
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise UserError('no prompt; say what to draw, e.g. sample "a red car"')
    device = common.pick_device(options.device)
    model, config, header = load_model(common.find_weights(options.weights, "dit_t2i"), device)
    encoder, vae = load_partners(options, config, header)
    options = dataclasses.replace(options, cfg=config.cfg if options.cfg is None else options.cfg)
    if options.negative and options.cfg <= 1:
        none = f"--cfg {options.cfg:g} is no guidance"
        raise UserError(f"--negative is what guidance leads away from, and {none}; give a --cfg above 1")
    if options.tile and (not vae or options.tile % 2):
        raise UserError(f"--tile {options.tile} should be an even number of a VAE's cells; give one, or leave it out")
    for text in [*prompts, options.negative]:
        for line in encoder.complaints(text):
            print(f"warning: {line}", file=sys.stderr)
    channels, stride = header["latent"][0], vae.stride if vae else 1
    size = options.size or header["latent"][1] * stride
    if size % (step := stride * math.lcm(config.patch_size, getattr(vae, "patch", 1))):
        raise UserError(f"--size {size} is no multiple of {step}")
    if common.pick_precision(options.precision, device) == "bf16":
        model = model.bfloat16()  # once, instead of at every step
    vae = vae.to(device) if vae else None

    def to_grid(z):
        return common.make_grid(common.to_uint8(to_rgb(vae, z[:16], options.tile)))

    frames, watch = common.film(to_grid, options.gif)
    text, null = encoder([*prompts, options.negative]).split((len(prompts), 1))
    shape = channels, size // stride, size // stride
    latents = sample(model, options, text, null, shape, lambda z, t: watch(z, 1 - t))
    with autocast(device, common.pick_precision(options.precision, device)):
        rgb = torch.cat([to_rgb(vae, part, options.tile).cpu() for part in latents.split(options.batch_size)])
    names = [f"{row:03d}_{options.seed + i:06d}" for row in range(len(prompts)) for i in range(options.num)]
    columns = options.num if len(prompts) > 1 else None
    common.write_samples(common.to_uint8(rgb), names, options, frames, columns)


# ----------------------------------------------------------------------------------------------------------------
# Command line

VERBS = {
    "prepare": (
        prepare_command,
        PrepareConfig,
        None,
        "encode a folder, e.g. prepare --data DIR --out SHARDS --vae V --clip C",
    ),
    "train": (train, Config, PRESETS, "train, e.g. python dit_t2i.py train --minutes 10"),
    "sample": (sample_command, SampleConfig, None, 'draw pictures, e.g. python dit_t2i.py sample "a red car"'),
    "export": common.export("dit_t2i"),
}


def main(argv=None):
    """The command line: the words after the file's name, or sys.argv's; returns the exit code."""
    return common.run_command_line(__doc__, VERBS, argv)


if __name__ == "__main__":
    sys.exit(main())
