"""Text into shards that train.py reads.

    python -m scripts.prepare SOURCE ... --out=DIR
    python -m scripts.prepare SOURCE ... --report=gpt2,bpe:4096,bytes    what is a token worth?

A SOURCE is a file, a folder, a glob in quotes, a URL, or OWNER/NAME of a dataset of the Hugging
Face Hub, for instance tiny Shakespeare as nanoGPT cuts it, and OpenWebText:

    T=https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt
    python -m scripts.prepare $T --out=shakespeare_char --tokenizer=chars --val_tail=0.1
    python -m scripts.prepare Skylion007/openwebtext --out=openwebtext --tokenizer=gpt2

.txt is one document, or several with --separator between them; .jsonl and .parquet hold one in the
field --field of each line or row; .txt.gz and .jsonl.gz are read as they are. Of a dataset all
Parquet files are read whose path has --files.

Each document begins with BOS. It goes to training or, by a hash of its text (of its first MiB), to
validation: equal texts to the same side. A shard is about --shard_tokens tokens: as many documents
as have the bytes that so many tokens are by the first MiB of text. So a shard depends on its own
text only: stop this whenever you like, the same command writes what is missing, and the same bytes
as ever. meta.json says by names and sizes what the shards were made of, and another recipe is
refused. A text longer than a MiB is encoded in pieces, cut where a byte-level BPE cuts it too.
"""

import collections
import functools
import glob
import gzip
import hashlib
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from scripts.text import (
    BYTES,
    GPT2,
    GPT2_FILES,
    fetch_gpt2,
    gpt2_files,
    open_tokenizer,
    package,
    read_args,
    train_bpe,
    usage_errors,
)
from train import (
    UsageError,
    cache_dir,
    command,
    open_shard,
    read_meta,
    require,
    write_file,
    write_shard,
)

PIECE = 1 << 20  # characters of a piece of text, and of a batch that a worker encodes at a time
KINDS = ("bytes", "chars", "gpt2", "bpe")
SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet")
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
    "separator": ("", "stands between the documents of a .txt; \\n is a newline"),
    "files": ("train", "regular expression: of a dataset the files whose path has it"),
    "revision": ("", "commit or branch of a dataset; without one, the newest"),
    "val": (0.01, "share of the documents for validation, by their hash", 0, 1),
    "val_tail": (0.0, "instead, the last share of the characters of one .txt", 0, 1),
    "shard_tokens": (100_000_000, "tokens of a shard, about", 1, 1 << 30),
    "jobs": (os.cpu_count() or 1, "processes that encode", 1, 1 << 10),
    "report": ("", "KIND,...: print bytes per token of these and GPT-2's; bpe:N is one of N"),
}

# ---- Sources -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    name: str  # as in meta.json
    size: int  # of the file, bytes
    fetch: Callable  # () -> its local Path


def kind_of(name):
    """The suffix that says how to read a file, or ""."""
    return next((suffix for suffix in SUFFIXES if name.lower().endswith(suffix)), "")


def download(url):
    """The Source of a URL, in the cache. Raises UsageError."""
    name = f"{hashlib.sha256(url.encode()).hexdigest()[:12]}-{url.rsplit('/', 1)[-1]}"
    path = cache_dir() / "text" / name
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        staging = path.with_suffix(f".{os.getpid()}")
        with (
            usage_errors(f"{url}: cannot be fetched"),
            urllib.request.urlopen(url, timeout=60) as answer,
            open(staging, "wb") as file,
        ):
            shutil.copyfileobj(answer, file)
            if answer.length:
                raise OSError(f"it ended {answer.length} bytes early")
        staging.replace(path)
    return Source(url, path.stat().st_size, lambda: path)


def list_parquet(repo, revision, args):
    """(commit, [(name, size)] of the Parquet files) of a dataset of the Hub. Raises UsageError."""
    from huggingface_hub import HfApi

    with usage_errors(f"{repo}: neither a file here nor to be had from the Hub", Exception):
        info = HfApi().dataset_info(repo, revision=revision, files_metadata=True)
    found = []
    for file in info.siblings:
        if file.rfilename.endswith(".parquet") and re.search(args.files, file.rfilename):
            found.append((file.rfilename, file.size))
    return info.sha, sorted(found)


def fetch_parquet(repo, name, sha):
    from huggingface_hub import hf_hub_download

    with usage_errors(f"{repo}: {name} cannot be fetched", Exception):
        return Path(hf_hub_download(repo, name, repo_type="dataset", revision=sha))


def hub_files(repo, args):
    """The Sources of a dataset: its Parquet files, else those that the Hub has made of it.

    Raises UsageError.
    """
    sha, files = list_parquet(repo, args.revision or None, args)
    if not files and not args.revision:
        sha, files = list_parquet(repo, "refs/convert/parquet", args)
    if any("partial-" in name for name, _ in files):
        print(f"note: of {repo} the Hub has made Parquet files of the first part only", flush=True)
    require(files, f"{repo}: no Parquet file there has a path that matches --files={args.files}")
    sources = []
    for name, size in files:
        fetch = functools.partial(fetch_parquet, repo, name, sha)
        sources.append(Source(f"{repo}@{sha}/{name}", size, fetch))
    return sources


def local_files(given):
    """The Sources of a file, or of what text a folder or a glob holds, by name."""
    if os.path.isfile(given):
        names = [given]
    else:
        pattern = os.path.join(glob.escape(given), "**") if os.path.isdir(given) else given
        found = sorted(glob.glob(pattern, recursive=True))
        names = [name for name in found if os.path.isfile(name) and kind_of(name)]
    sources = []
    for name in names:
        fetch = functools.partial(Path, name)
        sources.append(Source(os.path.basename(name), os.path.getsize(name), fetch))
    return sources


def find_sources(args):
    """[Source] of what was named, in the order given. Raises UsageError."""
    found = []
    for given in args.sources:
        if re.match("https?://", given):
            found.append(download(given))
        elif sources := local_files(given):
            found += sources
        else:
            is_dataset = re.fullmatch(r"[\w.-]+/[\w.-]+", given) and not os.path.exists(given)
            wanted = f"no file, and no {', '.join(SUFFIXES)} in it; nor is it OWNER/NAME of the Hub"
            require(is_dataset, f"{given}: {wanted}")
            found += hub_files(given, args)
    for source in found:
        require(kind_of(source.name), f"{source.name}: wanted {', '.join(SUFFIXES)}")
    return found


# ---- Documents -----------------------------------------------------------------------------------


def cut(file):
    """Yield a text file's text in pieces of about PIECE characters.

    A piece ends with a newline that stands alone between two letters: what a byte-level BPE makes
    of the pieces is what it makes of the whole. Where there is none in 16 pieces, anywhere.
    """
    rest = ""
    while block := file.read(PIECE):
        rest += block
        end = 0
        if match := re.match(r".*\S\n(?=\S)", rest, re.DOTALL):  # the last one
            end = match.end()
        elif len(rest) > 16 * PIECE:
            end = len(rest)
        if end:
            yield rest[:end]
            rest = rest[end:]
    if rest:
        yield rest


def split_text(file, separator):
    """Yield the texts between separators, one at a time in memory."""
    rest = ""
    while block := file.read(PIECE):
        *whole, rest = (rest + block).split(separator)
        yield from whole
    yield rest


def parquet_texts(source, path, name):
    """Yield the texts in a column of a Parquet file. Raises UsageError where there is none."""
    file = package("pyarrow.parquet", "a .parquet file").ParquetFile(path)
    columns = file.schema_arrow.names
    wanted = f"--field can be {', '.join(columns)}"
    require(name in columns, f"{source.name}: no column {name!r}; {wanted}")
    for batch in file.iter_batches(256, columns=[name]):
        yield from batch.column(0).to_pylist()


def json_texts(source, file, name):
    """Yield the texts in a field of each line. Raises UsageError, naming the line without one."""
    for number, line in enumerate(file, 1):
        if line.strip():
            row = json.loads(line)
            here = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            text = row.get(name) if isinstance(row, dict) else None
            said = f"no text {name!r}; --field names it, here is {here}"
            require(isinstance(text, str), f"{source.name}, line {number}: {said}")
            yield text


def as_file(text):
    """A text as an open file. Half a surrogate pair, which JSON can hold, is a question mark."""
    return io.StringIO((text or "").encode(errors="replace").decode(), newline="")


def texts(source, args):
    """Yield the texts of a Source, each as an open file. Raises UsageError."""
    path = source.fetch()
    kind = kind_of(source.name)
    if kind == ".parquet":
        yield from map(as_file, parquet_texts(source, path, args.field))
        return
    opened = gzip.open if kind.endswith(".gz") else open
    with opened(path, "rt", encoding="utf-8", newline="\n") as file:
        if kind.startswith(".jsonl"):
            yield from map(as_file, json_texts(source, file, args.field))
        elif args.separator:
            yield from map(as_file, split_text(file, args.separator.replace("\\n", "\n")))
        else:
            yield file


def documents(source, args):
    """Yield (whether a document begins, text) of a Source. Raises UsageError."""
    with usage_errors(f"{source.name}: cannot be read"):
        for file in texts(source, args):
            begins = True
            for piece in cut(file):
                yield begins, piece
                begins = False


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


def put_gpt2(folder, args):
    """GPT-2's files, of --gpt2, of the folder itself or from the Hub."""
    package("tokenizers", "GPT-2's tokenizer")
    files = gpt2_files(args.gpt2 or folder)
    wanted = f"--gpt2={args.gpt2}: wanted a folder of encoder.json and vocab.bpe"
    require(files or not args.gpt2, wanted)
    for path, name in zip(files or fetch_gpt2(), GPT2_FILES[0], strict=True):
        write_file(folder / name, path.read_bytes())
    return GPT2


def put_alphabet(folder, sources, args):
    """All characters of the text, in order."""
    path = folder / "characters.json"
    if not path.exists():
        found = set()
        for _, _, text in pieces(sources, args):
            found.update(text)
        write_file(path, json.dumps("".join(sorted(found))).encode())
    count = len(json.loads(path.read_text()))
    wanted = "wanted at most 65533; --tokenizer=bpe spells any text"
    require(count <= 65533, f"{count} different characters: {wanted}")
    return {"tokenizer": path.name, "vocab_size": count + 1, "bos_id": count}


def put_bpe(folder, vocab_size, sources, args):
    """A vocabulary made from the first MiB of training text."""
    path = folder / "tokenizer.json"
    if not path.exists():
        print(f"a BPE of {vocab_size} from {args.bpe_mib} MiB of training text ...", flush=True)
        text = first_texts(sources, args, "train", args.bpe_mib << 20)
        write_file(path, train_bpe(text, vocab_size).to_str().encode())
    tokenizer = package("tokenizers", "a BPE").Tokenizer.from_file(str(path))
    return {"tokenizer": path.name, "vocab_size": tokenizer.get_vocab_size(), "bos_id": 0}


def put_copy(folder, other):
    """The tokenizer of another folder of shards."""
    wanted = f"--tokenizer={other}: wanted {', '.join(KINDS)}, or a folder with a meta.json"
    require((other / "meta.json").is_file(), wanted)
    meta = read_meta(other / "meta.json")
    files = {"bytes": (), "gpt2": GPT2_FILES[0]}
    with usage_errors(wanted):
        for name in files.get(meta["tokenizer"], [Path(meta["tokenizer"]).name]):
            write_file(folder / name, (other / name).read_bytes())
    return meta


def put_tokenizer(kind, vocab_size, folder, sources, args):
    """Put the files of a tokenizer into a folder, where they are not there.

    Returns what meta.json says of it. Raises UsageError.
    """
    if kind == "bytes":
        return BYTES
    if kind == "gpt2":
        return put_gpt2(folder, args)
    if kind == "chars":
        return put_alphabet(folder, sources, args)
    if kind == "bpe":
        return put_bpe(folder, vocab_size, sources, args)
    return put_copy(folder, Path(kind))


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
    """Yield the text of all shards as Batches, in order: a Batch has PIECE bytes or ends a shard.

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
        if draft.size - draft.taken >= PIECE:
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


def is_whole(path):
    try:
        return len(open_shard(path)) > 0
    except UsageError:
        return False


def find_shard_bytes(sources, meta, args, out):
    """Bytes of text for a shard, by the first MiB. Raises UsageError where there is no text."""
    text = "".join(first_texts(sources, args, "train", PIECE))[:PIECE]
    require(text, f"{args.sources[0]}: holds no training text")
    count = len(open_tokenizer(meta, out).encode(text))
    return max(1, round(args.shard_tokens * len(text.encode()) / count))


def write_shards(sources, meta, args, out):
    """Write the shards that are missing. Returns (bytes of all text, shards that were there).

    Raises UsageError.
    """
    there = {path.name for path in out.glob("*.bin") if is_whole(path)}
    shard_bytes = find_shard_bytes(sources, meta, args, out)
    small = sum(source.size for source in sources) <= 8 * PIECE
    jobs = 1 if small else args.jobs  # a process takes seconds to start
    parts = collections.defaultdict(list)  # shard -> tokens of its batches so far
    ahead = collections.deque()  # (batch, its tokens to come)
    size = 0
    said = began = time.perf_counter()

    def finish(batch, future):
        parts[batch.shard].append(future.result())
        if batch.ends_shard:
            tokens = np.concatenate(parts.pop(batch.shard))
            write_shard(out / batch.shard, tokens)
            print(f"{batch.shard}: {len(tokens)} tokens", flush=True)

    with start_pool(jobs, meta, out) as pool:
        for batch in batches(pieces(sources, args), shard_bytes):
            size += batch.size
            if batch.shard not in there:
                ahead.append((batch, pool.submit(encode, batch.pieces)))
            while len(ahead) > 2 * jobs:
                finish(*ahead.popleft())
            now = time.perf_counter()
            if now - said > 10:
                said = now
                speed = size / 1e6 / (now - began)
                print(f"{size / 1e6:.0f} MB of text, {speed:.1f} MB/s", flush=True)
        for batch, future in ahead:
            finish(batch, future)
    return size, len(there)


# ---- Report --------------------------------------------------------------------------------------


def report(sources, args):
    """Print the bytes of a token of each tokenizer in --report, and of GPT-2's.

    They are counted on the validation text; vocabularies are made from the training text.
    """
    text = list(first_texts(sources, args, "val", 16 * PIECE))
    more = "a larger --val or --val_tail takes some"
    require(text, f"{args.sources[0]}: no validation text to count on; {more}")
    size = sum(len(piece.encode()) for piece in text)
    rows = []
    for name in dict.fromkeys(["gpt2", *args.report.split(",")]):
        sized = re.fullmatch(r"bpe:(\d+)", name)
        kind, vocab_size = ("bpe", int(sized[1])) if sized else (name, args.vocab_size)
        with tempfile.TemporaryDirectory() as folder:
            meta = put_tokenizer(kind, vocab_size, Path(folder), sources, args)
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
    """Raises UsageError where a folder's shards are of another recipe."""
    file = out / "meta.json"
    if not file.exists():
        shards = list(out.glob("*.bin"))
        require(not shards, f"{out}: holds shards without a meta.json; wanted a new folder")
        return
    with usage_errors(f"{file}: cannot be read"):
        was = dict(json.loads(file.read_text())["recipe"])
    for name, value in recipe.items():
        before, now = str(was.get(name))[:100], str(value)[:100]
        other = f"{out}: its shards have another {name}: {before}, not {now}; wanted a new folder"
        require(was.get(name) == value, other)


def tell(out, size, num_there, seconds):
    """Say what the folder holds, and the line that trains on it."""
    counts = {path.name: len(open_shard(path)) for path in sorted(out.glob("*.bin"))}
    val = sum(count for name, count in counts.items() if name.startswith("val"))
    train = sum(counts.values()) - val
    print(
        f"wrote: {out}, {train} training tokens and {val} for validation in {len(counts)} shards "
        f"({num_there} were there), {size / (train + val):.3f} bytes per token, in {seconds:.0f} s"
    )
    if not val:
        print(
            "note: no document fell to validation, and train.py wants some: the same with --out of "
            "a new folder and --val=0.1, or, of one .txt, --val_tail=0.1"
        )
        return
    line = f"python train.py --train_files='{out}/train_*.bin' --val_files='{out}/val_*.bin'"
    targets = counts["val_000000.bin"] - 1
    if targets < 10_485_760:  # what a run scores by default
        line += f" --val_tokens={min(targets, 262_144)}"
    if train < 1e9:
        line += " --max_epochs=1000"
    print(f"next: {line}")


def main(argv=None):
    """Writes shards, tokenizer and meta.json, or prints a report. Raises UsageError."""
    args = parse(sys.argv[1:] if argv is None else argv)
    sources = find_sources(args)
    if args.val_tail:
        kinds = [kind_of(source.name) for source in sources]
        is_one = kinds in ([".txt"], [".txt.gz"]) and not args.separator
        require(is_one, f"--val_tail={args.val_tail}: wanted one .txt that is one document")
    if args.report:
        return report(sources, args)
    out = Path(args.out)
    recipe = recipe_of(sources, args)
    check_recipe(out, recipe)
    out.mkdir(parents=True, exist_ok=True)

    def describe(meta):
        write_file(out / "meta.json", json.dumps(meta | {"recipe": recipe}, indent=1).encode())

    if not (out / "meta.json").exists():
        describe({})  # first: another recipe might take the tokenizer to come for its own
    mb = sum(source.size for source in sources) / 1e6
    print(f"{len(sources)} files, {mb:.1f} MB", flush=True)
    began = time.perf_counter()
    meta = put_tokenizer(args.tokenizer, args.vocab_size, out, sources, args)
    describe(meta)
    size, num_there = write_shards(sources, meta, args, out)
    for staging in out.glob("*.[0-9]*"):  # of runs that were killed
        staging.unlink()
    tell(out, size, num_there, time.perf_counter() - began)
    return 0


if __name__ == "__main__":
    sys.exit(command(main))
