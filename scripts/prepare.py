"""Text into shards that train.py reads.

    python -m scripts.prepare SOURCE ... --out=DIR
    python -m scripts.prepare SOURCE ... --report=gpt2,bpe:4096,bytes    what is a token worth?

A SOURCE is a file, a folder, a pattern in quotes (the last part of a path only), a URL, or
OWNER/NAME of a dataset of the Hugging Face Hub, for instance tiny Shakespeare as nanoGPT cuts it,
and OpenWebText:

    T=https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt
    python -m scripts.prepare $T --out=shakespeare_char --tokenizer=chars --val_tail=0.1
    python -m scripts.prepare Skylion007/openwebtext --out=openwebtext --tokenizer=gpt2

.txt is one document, or several with --separator between them; .jsonl and .parquet hold one in the
field --field of each line or row; .txt.gz and .jsonl.gz are read as they are. Of a dataset all
Parquet files are read whose path has --files. Each file is read once, by whatever names and links
it is reached; what of a folder is passed over is said.

All text is UTF-8; a byte order mark at a file's beginning is no text. \\n in --separator is a line
end, LF or CR LF; those inside of a document stay as they are. A null or empty text is no document,
whatever the file: it is passed over and counted.

Each document begins with BOS. It goes to training or, by a hash of its text (of its first MiB), to
validation: equal texts to the same side. A shard is about --shard_tokens tokens: as many documents
as have the bytes that so many tokens are by the first MiB of text. So a shard depends on its own
text only: stop this whenever you like, the same command writes what is missing, and the same bytes
as ever. meta.json says by names and sizes what the shards were made of, and another recipe is
refused, as are another tokenizer and a second process in the same folder. A text longer than a MiB
is encoded in pieces, cut where a byte-level BPE cuts it too.
"""

import collections
import contextlib
import hashlib
import json
import multiprocessing
import os
import re
import shlex
import signal
import sys
import tempfile
import threading
import time
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from scripts import reading
from scripts.reading import documents, find_sources
from scripts.text import (
    GPT2_FILES,
    fetch_gpt2,
    gpt2_files,
    open_bpe,
    open_tokenizer,
    package,
    read_args,
    read_tokenizer,
    remove_staging,
    say,
    sha256_of,
    train_bpe,
    usage_errors,
)
from train import (
    BYTES_META,
    GPT2_META,
    UsageError,
    command,
    open_shard,
    owning,
    read_meta,
    require,
    write_file,
    write_shard,
)

KINDS = ("bytes", "chars", "gpt2", "bpe")
SHARD = re.compile(r"(train|val)_\d{6,}\.bin")
FLAGS = {
    "out": ("", "folder for train_*.bin, val_*.bin, meta.json and the tokenizer"),
    "tokenizer": (
        "gpt2",
        "bytes; chars, the characters of this text; gpt2; bpe, a vocabulary made from this text; "
        "or a folder of shards, whose tokenizer is taken",
    ),
    "vocab_size": (4096, "of bpe, the BOS and 256 bytes among them", 257, 65534),
    "bpe_mib": (100, "MiB of training text that bpe is made from", 1, 1 << 20),
    "gpt2": ("", "folder of GPT-2's encoder.json and vocab.bpe; without one, the Hub"),
    "field": ("text", "the text of a line or row"),
    "separator": ("", "stands between the documents of a .txt; \\n is a line end"),
    "files": ("train", "regular expression: of a dataset the files whose path has it"),
    "revision": ("", "commit or branch of a dataset; without one, the newest"),
    "val": (0.01, "share of the documents for validation, by their hash", 0, 1),
    "val_tail": (0.0, "instead, the last share of the characters of one .txt", 0, 1),
    "shard_tokens": (100_000_000, "tokens of a shard, about", 1, 1 << 30),
    "jobs": (os.cpu_count() or 1, "processes that encode", 1, 1 << 10),
    "report": ("", "KIND,...: print bytes per token of these and GPT-2's; bpe:N is one of N"),
}

# ---- What goes where -----------------------------------------------------------------------------


def split_by_hash(sources, args):
    """Yield (split, whether a document begins, text): a document's first piece decides."""
    split = "train"
    for source in sources:
        for begins, text in documents(source, args):
            if begins:
                number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
                split = "val" if number < args.val * 2**64 else "train"
            yield split, begins, text


def split_by_place(source, args):
    """Yield the same of a text whose last characters, --val_tail of them, are for validation."""
    length = sum(len(text) for _, text in documents(source, args))
    end = int(length * (1 - args.val_tail))
    position = 0
    for begins, text in documents(source, args):
        inside = max(0, end - position)
        if text[:inside]:
            yield "train", begins, text[:inside]
        if text[inside:]:
            yield "val", position <= end, text[inside:]
        position += len(text)


def pieces(sources, args):
    """Yield (split, whether a document begins, text) of all text: of text and args alone."""
    if args.val_tail:
        return split_by_place(sources[0], args)
    return split_by_hash(sources, args)


def first_texts(sources, args, split, most):
    """Yield texts of a split from the beginning, about `most` characters in all."""
    for part, _, text in pieces(sources, args):
        if part == split:
            yield text
            most -= len(text)
            if most <= 0:
                return


# ---- Tokenizers ----------------------------------------------------------------------------------
# Each gives what meta.json says, and {name: bytes} of the files. What a folder holds is taken.


def make_gpt2(folder, args):
    """GPT-2's files, of --gpt2, of the folder itself or from the Hub."""
    package("tokenizers", "GPT-2's tokenizer")
    paths = gpt2_files(args.gpt2 or folder)
    wanted = f"--gpt2={args.gpt2}: wanted a folder of encoder.json and vocab.bpe"
    require(paths or not args.gpt2, wanted)
    blobs = [path.read_bytes() for path in paths or fetch_gpt2()]
    return GPT2_META, dict(zip(GPT2_FILES[0], blobs, strict=True))


def make_alphabet(folder, sources, args):
    """All characters of the text, in order."""
    path = folder / "characters.json"
    if path.exists():
        blob = path.read_bytes()
    else:
        found = set()
        for _, _, text in pieces(sources, args):
            found.update(text)
        blob = json.dumps("".join(sorted(found))).encode()
    with usage_errors(f"{path}: wanted an alphabet"):
        count = len(json.loads(blob))
    wanted = "wanted at most 65533; --tokenizer=bpe spells any text"
    require(count <= 65533, f"{count} different characters: {wanted}")
    return {"tokenizer": path.name, "vocab_size": count + 1, "bos_id": count}, {path.name: blob}


def make_bpe(folder, vocab_size, sources, args):
    """A vocabulary made from the first MiB of training text."""
    path = folder / "tokenizer.json"
    if path.exists():
        blob = path.read_bytes()
    else:
        say(f"a BPE of up to {vocab_size} from at most {args.bpe_mib} MiB of training text ...")
        text = first_texts(sources, args, "train", args.bpe_mib << 20)
        blob = train_bpe(text, vocab_size).to_str().encode()
    size = open_bpe(blob, path).get_vocab_size()
    say(f"vocabulary: {size}")
    return {"tokenizer": path.name, "vocab_size": size, "bos_id": 0}, {path.name: blob}


def make_copy(other):
    """The tokenizer of another folder of shards."""
    wanted = f"--tokenizer={other}: wanted {', '.join(KINDS)}, or a folder with a meta.json"
    require((other / "meta.json").is_file(), wanted)
    meta = read_meta(other / "meta.json")
    paths, blobs = read_tokenizer(meta, other)
    is_gpt2 = meta["tokenizer"] == "gpt2"
    names = GPT2_FILES[0] if is_gpt2 else [path.name for path in paths]
    return meta, dict(zip(names, blobs, strict=True))


def make_tokenizer(kind, vocab_size, folder, sources, args):
    """(what meta.json says of a tokenizer, {name: bytes} of its files). Raises UsageError.

    folder: where its files may lie already.
    """
    if kind == "bytes":
        return BYTES_META, {}
    if kind == "gpt2":
        meta, files = make_gpt2(folder, args)
    elif kind == "chars":
        meta, files = make_alphabet(folder, sources, args)
    elif kind == "bpe":
        meta, files = make_bpe(folder, vocab_size, sources, args)
    else:
        meta, files = make_copy(Path(kind))
    return meta | {"tokenizer_sha256": sha256_of(files.values())}, files


# ---- Shards --------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """What a worker encodes at a time."""

    shard: str  # the name of its file
    pieces: list  # of (whether a document begins, text)
    size: int  # of the texts, bytes
    ends_shard: bool


@dataclass
class Draft:
    """The shard of a split that is being filled."""

    split: str
    number: int = 0
    size: int = 0  # of its text so far, bytes
    taken: int = 0  # of what has gone into a Batch
    waiting: list = field(default_factory=list)  # the pieces that have not

    def take(self, ends_shard):
        name = f"{self.split}_{self.number:06d}.bin"
        batch = Batch(name, self.waiting, self.size - self.taken, ends_shard)
        self.waiting, self.taken = [], self.size
        return batch


def batches(pieces, shard_bytes):
    """Yield the text of all shards as Batches, in order: it has a PIECE of bytes or ends a shard.

    A shard ends with the piece that fills it. pieces: (split, whether a document begins, text).
    """
    drafts = {}
    for split, begins, text in pieces:
        draft = drafts.setdefault(split, Draft(split))
        if draft.size >= shard_bytes:
            yield draft.take(ends_shard=True)
            draft = drafts[split] = Draft(split, draft.number + 1)
        draft.waiting.append((begins, text))
        draft.size += len(text.encode())
        if draft.size - draft.taken >= reading.PIECE:
            yield draft.take(ends_shard=False)
    for draft in drafts.values():
        yield draft.take(ends_shard=True)


def start_worker(meta, folder):
    """Open the tokenizer of a worker. A process ends with its parent, however that ends."""
    global tokenizer
    tokenizer = open_tokenizer(meta, folder)
    parent = multiprocessing.parent_process()

    def end_with_parent():
        parent.join()
        os._exit(1)

    if parent:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        threading.Thread(target=end_with_parent, daemon=True).start()


def encode(pieces):
    """uint16 tokens of [(whether a document begins, text)]."""
    ids = []
    for begins, text in pieces:
        if begins:
            ids.append(tokenizer.bos_id)
        ids += tokenizer.encode(text)
    return np.array(ids, np.uint16)


def start_pool(jobs, meta, folder):
    """Workers that encode: processes, or for one job a thread."""
    if jobs == 1:
        return ThreadPoolExecutor(1, initializer=start_worker, initargs=(meta, folder))
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(jobs, spawn, start_worker, (meta, folder))


def shards_in(folder):
    """Paths of what has a shard's name."""
    return sorted(path for path in folder.iterdir() if SHARD.fullmatch(path.name))


def is_whole(path):
    try:
        return len(open_shard(path)) > 0
    except UsageError:
        return False


def find_shard_bytes(sources, meta, args, out):
    """Bytes of text for a shard, by the first MiB. Raises UsageError where there is no text."""
    text = "".join(first_texts(sources, args, "train", reading.PIECE))[: reading.PIECE]
    require(text, f"{args.sources[0]}: holds no training text")
    count = len(open_tokenizer(meta, out).encode(text))
    return max(1, round(args.shard_tokens * len(text.encode()) / count))


@dataclass
class Written:
    """What write_shards has done."""

    num_there: int  # shards that were there
    size: int = 0  # of all text, bytes
    num_documents: int = 0
    names: set = field(default_factory=set)  # of the shards


def write_shards(sources, meta, args, out):
    """Write the shards that are missing. Returns a Written. Raises UsageError."""
    there = {path.name for path in shards_in(out) if is_whole(path)}
    shard_bytes = find_shard_bytes(sources, meta, args, out)
    small = sum(source.size for source in sources) <= 8 * reading.PIECE
    jobs = 1 if small else args.jobs  # a process takes seconds to start
    parts = collections.defaultdict(list)  # shard -> tokens of its batches so far
    ahead = collections.deque()  # (batch, its tokens to come)
    written = Written(len(there))
    said = began = time.perf_counter()

    def finish(batch, future):
        parts[batch.shard].append(future.result())
        if batch.ends_shard:
            tokens = np.concatenate(parts.pop(batch.shard))
            write_shard(out / batch.shard, tokens)
            say(f"{batch.shard}: {len(tokens)} tokens")

    pool = start_pool(jobs, meta, out)
    try:
        for batch in batches(pieces(sources, args), shard_bytes):
            written.size += batch.size
            written.num_documents += sum(begins for begins, _ in batch.pieces)
            written.names.add(batch.shard)
            if batch.shard not in there:
                ahead.append((batch, pool.submit(encode, batch.pieces)))
            while len(ahead) > 2 * jobs:
                finish(*ahead.popleft())
            now = time.perf_counter()
            if now - said > 10:
                said = now
                speed = written.size / 1e6 / (now - began)
                say(f"{written.size / 1e6:.0f} MB of text, {speed:.1f} MB/s")
        for batch, future in ahead:
            finish(batch, future)
    except BrokenExecutor as error:
        ended = f"a process that encodes was ended, by a lack of memory perhaps ({error})"
        raise UsageError(f"{ended}; fewer --jobs take less") from error
    finally:
        pool.shutdown(cancel_futures=True)
    return written


# ---- Report --------------------------------------------------------------------------------------


def report(sources, args):
    """Print the bytes of a token of each tokenizer in --report, and of GPT-2's.

    They are counted on the validation text; vocabularies are made from the training text.
    """
    text = list(first_texts(sources, args, "val", 16 * reading.PIECE))
    more = "a larger --val or --val_tail takes some"
    require(text, f"{args.sources[0]}: no validation text to count on; {more}")
    size = sum(len(piece.encode()) for piece in text)
    rows = []
    for name in dict.fromkeys(["gpt2", *args.report.split(",")]):
        sized = re.fullmatch(r"bpe:(\d+)", name)
        kind, vocab_size = ("bpe", int(sized[1])) if sized else (name, args.vocab_size)
        require(257 <= vocab_size <= 65534, f"--report={name}: wanted bpe:257 to bpe:65534")
        with tempfile.TemporaryDirectory() as folder:
            meta, files = make_tokenizer(kind, vocab_size, Path(folder), sources, args)
            for file, blob in files.items():
                write_file(Path(folder) / file, blob)
            tokenizer = open_tokenizer(meta, folder)
        count = sum(len(tokenizer.encode(piece)) for piece in text)
        rows.append((name, meta["vocab_size"], count))
    print(f"\n{size} bytes of validation text\n")
    print("| tokenizer | vocabulary | tokens | bytes per token | tokens for one of GPT-2's |")
    print("| --- | --- | --- | --- | --- |")
    _, _, of_gpt2 = rows[0]
    for name, vocab_size, count in rows:
        shares = f"{size / count:.3f} | {count / of_gpt2:.3f}"
        print(f"| {name} | {vocab_size} | {count} | {shares} |")


# ---- main ----------------------------------------------------------------------------------------


def parse(argv):
    """Raises UsageError."""
    args = read_args(argv, __doc__, FLAGS, positional="sources")
    require(args.out or args.report, "--out: wanted a folder")
    with usage_errors(f"--files={args.files}: wanted a regular expression", re.error):
        re.compile(args.files)
    return args


def recipe_of(sources, args):
    """What the shards follow from, for meta.json."""
    names = "tokenizer vocab_size bpe_mib field separator val val_tail shard_tokens".split()
    files = [[source.name, source.size] for source in sources]
    return {"sources": files} | {name: getattr(args, name) for name in names}


def check_recipe(out, recipe):
    """The meta.json of a folder, {} where there is none.

    Raises UsageError where the folder's shards are of another recipe, or its files not prepare's.
    """
    file = out / "meta.json"
    if not os.path.lexists(file):
        names = {path.name for path in shards_in(out)} | {"tokenizer.json", "characters.json"}
        for name in sorted(names):
            said = f"{out}: holds {name} without a meta.json; wanted a new folder"
            require(not os.path.lexists(out / name), said)
        return {}
    wanted = f"{file}: wanted a file that prepare has made, or a new folder"
    require(file.is_file() and not file.is_symlink(), wanted)
    with usage_errors(wanted):
        meta = dict(json.loads(file.read_bytes()))
        was = dict(meta["recipe"])
    for name, value in recipe.items():
        before, now = str(was.get(name))[:100], str(value)[:100]
        other = f"{out}: its shards have another {name}: {before}, not {now}; wanted a new folder"
        require(was.get(name) == value, other)
    return meta


def check_tokenizer(out, before, meta, files):
    """Raises UsageError where a folder holds another tokenizer than the one to be put there.

    before: what its meta.json says.
    """
    was, now = before.get("tokenizer_sha256", ""), meta["tokenizer_sha256"]
    said = f"{out}: its shards were made with another tokenizer, of the SHA-256 {was}, not {now}"
    require(was in ("", now), f"{said}; wanted that one, or a new folder")
    for name, blob in files.items():
        path = out / name
        there = path.read_bytes() if os.path.lexists(path) else blob
        require(there == blob, f"{path}: there already, and another's; wanted a new folder")


def tell(out, sources, written, seconds):
    """Say what the folder holds, and the line that trains on it. Raises UsageError."""
    counts = {}
    for path in shards_in(out):
        require(path.name in written.names, f"{path}: of another text; wanted a folder without it")
        counts[path.name] = len(open_shard(path))
    val = sum(count for name, count in counts.items() if name.startswith("val"))
    train = sum(counts.values()) - val
    num_empty = sum(source.num_empty for source in sources)
    say(f"documents: {written.num_documents} ({num_empty} null or empty ones passed over)")
    say(
        f"wrote: {out}, {train} training tokens and {val} for validation in {len(counts)} shards "
        f"({written.num_there} were there), {written.size / (train + val):.3f} bytes per token, "
        f"in {seconds:.0f} s"
    )
    if not val:
        say(
            "note: no document fell to validation, and train.py wants some: with --out of a new "
            "folder a greater --val, or, of one .txt that is one document, --val_tail=0.1"
        )
        return
    train_files, val_files = (shlex.quote(f"{out}/{split}_*.bin") for split in ("train", "val"))
    line = f"python train.py --train_files={train_files} --val_files={val_files}"
    targets = counts["val_000000.bin"] - 1
    if targets < 10_485_760:  # what a run scores by default
        line += f" --val_tokens={min(targets, 262_144)}"
    if train < 1e8:  # the other presets are for a billion tokens
        line += " --preset=demo"
    if train < 1e9:
        line += " --max_epochs=1000"
    if train < 2000:
        say("note: this is too little to train on, even in a thousand epochs")
    say(f"next: {line}")


@contextlib.contextmanager
def output(out):
    """Hold the lock of a folder. Yields put(name, bytes), which writes a file there.

    After an error without a shard its files go again: the next try may be of another recipe.
    """
    is_new, mine = not out.exists(), []

    def put(name, blob):
        if not os.path.lexists(out / name):
            mine.append(name)
        write_file(out / name, blob)

    with owning(out):
        try:
            yield put
        except (UsageError, OSError):
            for name in [] if shards_in(out) else mine:
                (out / name).unlink(missing_ok=True)
            if is_new and not any(out.iterdir()):
                out.rmdir()
            raise


def write_folder(sources, args, out, put):
    """Write shards, tokenizer and meta.json. Raises UsageError."""
    began = time.perf_counter()
    recipe = recipe_of(sources, args)
    before = check_recipe(out, recipe)

    def describe(meta):
        put("meta.json", json.dumps(meta | {"recipe": recipe}, indent=1).encode())

    if not before:
        describe({})  # first: another recipe might take the tokenizer to come for its own
    mb = sum(source.size for source in sources) / 1e6
    say(f"{len(sources)} file{'s' if len(sources) > 1 else ''}, {mb:.1f} MB")
    meta, files = make_tokenizer(args.tokenizer, args.vocab_size, out, sources, args)
    check_tokenizer(out, before, meta, files)
    remove_staging(out, lambda name: name in files or name == "meta.json" or SHARD.fullmatch(name))
    for name, blob in files.items():
        put(name, blob)
    describe(meta)
    written = write_shards(sources, meta, args, out)
    tell(out, sources, written, time.perf_counter() - began)


def main(argv=None):
    """Writes shards, tokenizer and meta.json, or prints a report. Raises UsageError."""
    args = parse(sys.argv[1:] if argv is None else argv)
    sources = find_sources(args)
    if args.val_tail:
        kinds = [source.kind for source in sources]
        is_one = kinds in ([".txt"], [".txt.gz"]) and not args.separator
        require(is_one, f"--val_tail={args.val_tail}: wanted one .txt that is one document")
    if args.report:
        return report(sources, args)
    out = Path(args.out)
    is_free = out.is_dir() or not os.path.lexists(out)
    require(is_free, f"--out={out}: wanted a folder, it is something else")
    with output(out) as put:
        write_folder(sources, args, out, put)
    return 0


if __name__ == "__main__":
    sys.exit(command(main))
