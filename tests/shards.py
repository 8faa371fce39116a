"""Small shards, written from the description of the format alone: 256 int32 (magic, version, count, zeros), then uint16."""
import json
import struct

import numpy as np

BOS = 256


def shard_bytes(tokens, magic=20240520, version=1, count=None):
    tokens = [int(token) for token in tokens]
    header = struct.pack("<256i", magic, version, len(tokens) if count is None else count, *[0] * 253)
    return header + struct.pack(f"<{len(tokens)}H", *tokens)


def documents(seed, num_docs, shortest=20, longest=120):
    """Documents of skewed bytes, each led by BOS: a model has something to learn in a few steps."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(shortest, longest, num_docs)
    return np.concatenate([np.r_[BOS, np.minimum(rng.geometric(0.1, length - 1), 255)] for length in lengths])


def meta_json(tokenizer="test", vocab_size=257, bos_id=BOS):
    return json.dumps({"tokenizer": tokenizer, "vocab_size": vocab_size, "bos_id": bos_id})


def make_folder(folder, tokenizer="test", train=(documents(1, 90), documents(2, 70)), val=documents(3, 40)):
    """Training shards, one validation shard and their meta.json. Returns the two flags that name them."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, tokens in enumerate(train):
        (folder / f"train_{i:06d}.bin").write_bytes(shard_bytes(tokens))
    (folder / "val_000000.bin").write_bytes(shard_bytes(val))
    (folder / "meta.json").write_text(meta_json(tokenizer))
    return [f"--train_files={folder}/train_*.bin", f"--val_files={folder}/val_*.bin"]
