"""Small shards, written from the description of the format alone.

A shard is 256 int32 (magic, version, count, zeros), then uint16.
"""

import hashlib
import json
import struct
from pathlib import Path

import numpy as np

BOS = 256
TINY = f"@{Path(__file__).parents[1]}/scripts/presets/tiny.args"  # flags of a run of seconds


def shard_bytes(tokens, magic=20240520, version=1, count=None):
    tokens = [int(token) for token in tokens]
    count = len(tokens) if count is None else count
    header = struct.pack("<256i", magic, version, count, *[0] * 253)
    return header + struct.pack(f"<{len(tokens)}H", *tokens)


def documents(seed, num_docs, shortest=20, longest=120):
    """Documents of skewed bytes, each led by BOS: a model has something to learn in a few steps."""
    rng = np.random.default_rng(seed)
    docs = []
    for length in rng.integers(shortest, longest, num_docs):
        docs.append(np.r_[BOS, np.minimum(rng.geometric(0.1, length - 1), 255)])
    return np.concatenate(docs)


def meta_json(tokenizer="test", vocab_size=257, bos_id=BOS, sha256=None):
    """sha256: of the tokenizer's files, "" in an older meta.json; of bytes there are none."""
    if sha256 is None:
        sha256 = hashlib.sha256(b"" if tokenizer == "bytes" else tokenizer.encode()).hexdigest()
    meta = {"tokenizer": tokenizer, "vocab_size": vocab_size, "bos_id": bos_id}
    return json.dumps(meta | {"tokenizer_sha256": sha256} if sha256 else meta)


TRAIN, VAL = (documents(1, 90), documents(2, 70)), documents(3, 40)


def make_folder(folder, tokenizer="test", train=TRAIN, val=VAL):
    """Training shards, a validation shard and their meta.json. Returns the flags that name them."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, tokens in enumerate(train):
        (folder / f"train_{i:06d}.bin").write_bytes(shard_bytes(tokens))
    (folder / "val_000000.bin").write_bytes(shard_bytes(val))
    (folder / "meta.json").write_text(meta_json(tokenizer))
    return [f"--train_files={folder}/train_*.bin", f"--val_files={folder}/val_*.bin"]
