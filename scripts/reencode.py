"""GPT-2 shards, decoded and written anew with a small vocabulary, so that the head of a small model does not eat its budget.

    python -m scripts.ablate reencode SHARDS DIR --bpe=BPE

SHARDS: a folder of *train_*.bin and *val_*.bin; BPE: a folder of GPT-2's encoder.json. DIR gets train_*.bin, val_*.bin, the
tokenizer.json and a meta.json that train.py understands. The vocabulary is a byte-level BPE of the first documents of the first
training shard, so any text can be written in it, and two runs write the same files.
"""
import argparse, itertools, json, time
from pathlib import Path

import numpy as np

from train import DataError, UsageError, errors_as, open_shards, write_shard

BOS, ALL = "<|endoftext|>", 1 << 40

def gpt2_bytes(folder):
    """The bytes of each GPT-2 token, by id, from encoder.json. Raises DataError."""
    with errors_as(DataError, f"{folder}: wanted GPT-2's encoder.json"):
        ids = json.loads((Path(folder) / "encoder.json").read_text())
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]  # these stand for themselves, the others for 256, 257, ...
    others = [byte for byte in range(256) if byte not in plain]
    byte_of = {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}
    table = {number: bytes(map(byte_of.__getitem__, text)) for text, number in ids.items() if text != BOS}
    return [table.get(i, b"") for i in range(max(ids.values()) + 1)]

def texts_of(tokens, table, bos):
    """Yield the documents of a shard. What stands before the first BOS is one; bytes that are no UTF-8, by a cut, become U+FFFD."""
    edges = [0, *np.flatnonzero(tokens == bos).tolist(), len(tokens)]
    for first, last in zip(edges, edges[1:]):
        if last > first:
            yield b"".join(map(table.__getitem__, tokens[first:last].tolist())).decode(errors="replace")

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
    """Writes shards, tokenizer.json and meta.json. Raises UsageError, DataError."""
    args = parse(argv)
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError:
        raise UsageError("reencode needs the package tokenizers: pip install -r scripts/requirements.txt") from None
    shards = {split: open_shards(f"{args.shards}/*{split}_*.bin") for split in ("val", "train")}
    table, meta, out, start = gpt2_bytes(args.bpe), shards["train"].meta, Path(args.out), time.perf_counter()
    if meta["vocab_size"] != len(table):
        raise DataError(f"{args.shards}: a vocabulary of {meta['vocab_size']}, but {args.bpe} has {len(table)}")
    if old := sorted(out.glob("*.bin")):
        raise UsageError(f"{out}: holds {old[0].name} already; wanted a new folder")
    out.mkdir(parents=True, exist_ok=True)
    tokenizer, level = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel
    tokenizer.pre_tokenizer, tokenizer.decoder = level(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=args.vocab, special_tokens=[BOS], initial_alphabet=sorted(level.alphabet()), show_progress=False)
    tokenizer.train_from_iterator(itertools.islice(texts_of(shards["train"].tokens[0], table, meta["bos_id"]), args.sample), trainer)
    tokenizer.encode_special_tokens = True  # as text where a document holds these very letters
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
