"""GPT-2 shards, decoded and written anew with a small vocabulary, so that the head of a small model does not eat its budget.

    python -m scripts.ablate reencode SHARDS DIR --bpe=BPE

SHARDS: a folder of *train_*.bin and *val_*.bin; BPE: a folder of GPT-2's encoder.json. DIR gets train_*.bin, val_*.bin, the
tokenizer.json and a meta.json that train.py understands. The vocabulary is a byte-level BPE of the first documents of the first
training shard, so any text can be written in it, and two runs write the same files.
"""
import argparse, itertools, json, time
from pathlib import Path

import numpy as np

from scripts.text import BOS, gpt2_bytes, package, texts_of, train_bpe
from train import UsageError, open_shards, require, write_shard

ALL = 1 << 40

def parse(argv):
    """Raises UsageError."""
    def fail(message):
        raise UsageError(f"{message} (python -m scripts.ablate reencode --help)")
    parser = argparse.ArgumentParser(usage="python -m scripts.ablate reencode SHARDS DIR --bpe=DIR [--FLAG=VALUE ...]", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error, flag = fail, parser.add_argument
    flag("shards", metavar="SHARDS", help="folder of GPT-2 shards, *train_*.bin and *val_*.bin")
    flag("out", metavar="DIR", help="where the new ones go")
    flag("--bpe", required=True, metavar="DIR", help="folder of GPT-2's encoder.json")
    flag("--vocab", type=int, default=4096, metavar="N", help="tokens of the new vocabulary, the BOS among them (default: %(default)s)")
    flag("--tokens", type=lambda text: int(float(text)), default=ALL, metavar="N", help="new training tokens at most (default: all)")
    flag("--sample", type=int, default=5000, metavar="N", help="documents that the vocabulary is made from (default: %(default)s)")
    args = parser.parse_args(argv)
    if not 257 <= args.vocab < 65535 or args.tokens < 1 or args.sample < 1:
        fail(f"--vocab={args.vocab} --tokens={args.tokens} --sample={args.sample}: wanted 257 to 65534, and more than 0")
    return args

def main(argv):
    """Writes shards, tokenizer.json and meta.json. Raises UsageError."""
    args = parse(argv)
    package("tokenizers", "reencode")
    shards = {split: open_shards(f"{args.shards}/*{split}_*.bin") for split in ("val", "train")}
    table, meta, out, start = gpt2_bytes(args.bpe), shards["train"].meta, Path(args.out), time.perf_counter()
    fits = meta["vocab_size"] == len(table)
    require(fits, f"{args.shards}: a vocabulary of {meta['vocab_size']}, but {args.bpe} has {len(table)}")
    old = " ".join(sorted(path.name for path in out.glob("*.bin")))
    require(not old, f"{out}: holds {old} already; wanted a new folder")
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_bpe(itertools.islice(texts_of(shards["train"].tokens[0], table, meta["bos_id"]), args.sample), args.vocab)
    tokenizer.save(str(out / "tokenizer.json"))
    meta = meta | {"tokenizer": "tokenizer.json", "vocab_size": tokenizer.get_vocab_size(), "bos_id": tokenizer.token_to_id(BOS)}
    (out / "meta.json").write_text(json.dumps(meta))
    left = {"val": ALL, "train": args.tokens}
    for split, i, old in [(split, i, old) for split in shards for i, old in enumerate(shards[split].tokens)]:
        if left[split]:
            texts = [*texts_of(old, table, shards[split].meta["bos_id"])]
            whole = [id for encoding in tokenizer.encode_batch(texts) for id in (meta["bos_id"], *encoding.ids)]
            tokens = np.array(whole[:left[split]], np.uint16)
            left[split] -= len(tokens)
            write_shard(out / f"{split}_{i:06d}.bin", tokens)
            print(f"{split}_{i:06d}.bin: {len(tokens)} tokens for {len(old)}, {sum(len(text.encode()) for text in texts) / len(whole):.3f} bytes "
                  f"per token, {time.perf_counter() - start:.0f} s so far", flush=True)
    print(f"wrote: {out}, a vocabulary of {meta['vocab_size']}")
