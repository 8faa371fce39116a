"""Text into shards that train.py reads.

    python -m scripts.prepare SOURCE ... --out=DIR             files, folders, globs, URLs, or datasets of the Hugging Face Hub
    python -m scripts.prepare SOURCE ... --report=gpt2,bpe:4096,bytes     how many bytes of this text is a token? Writes nothing

Tiny Shakespeare, by characters and by a vocabulary of its own, the last tenth for validation, as nanoGPT cuts it; OpenWebText:
    T=https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt
    python -m scripts.prepare $T --out=shakespeare_char --tokenizer=chars --val_tail=0.1
    python -m scripts.prepare $T --out=shakespeare_bpe --tokenizer=bpe --vocab_size=1024 --val_tail=0.1
    python -m scripts.prepare Skylion007/openwebtext --out=openwebtext --tokenizer=gpt2 --val=0.0005

.txt is one document, or several with --separator between them; .jsonl and .parquet hold one in the field --field of each line or
row; .txt.gz and .jsonl.gz are read as they are. Of a dataset of the Hub all Parquet files are read whose path matches --files.

Each document begins with BOS, and goes to training or, by a hash of its text (of its first MiB), to validation: equal texts to
the same side. A shard is about --shard_tokens tokens: as many documents as have the bytes that so many tokens are by the first
MiB of text. So a shard depends on its own text only: stop this whenever you like, the same command writes what is missing, and
the same bytes as ever. meta.json says what the shards were made of, by names and sizes, and another recipe is refused.
A text longer than a MiB is encoded in pieces, cut where a byte-level BPE cuts it too.
"""
import argparse, collections, contextlib, dataclasses, glob, gzip, hashlib, io, itertools, json, multiprocessing, os, re, shutil
import signal, sys, tempfile, threading, time, urllib.request
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Callable

import numpy as np

from scripts.text import (BYTES, GPT2, GPT2_FILES, fetch_gpt2, gpt2_files, open_tokenizer, package, train_bpe,
                          usage_errors)
from train import UsageError, cache_dir, command, open_shard, write_shard

PIECE = 1 << 20  # characters of a piece of text, and of a batch that a worker encodes at a time
KINDS, TEXT, ROWS = ("bytes", "chars", "gpt2", "bpe"), (".txt", ".txt.gz"), (".jsonl", ".jsonl.gz", ".parquet")

# ---- Sources ----

@dataclasses.dataclass(frozen=True)
class Source:
    name: str        # as in meta.json
    size: int        # of the file, bytes
    fetch: Callable  # () -> its local Path

def kind_of(name):
    """The suffix that says how to read a file, or ""."""
    return next((suffix for suffix in (*TEXT, *ROWS) if name.lower().endswith(suffix)), "")

def download(url):
    """The Source of a URL, in the cache. Raises UsageError."""
    path = cache_dir() / "text" / f"{hashlib.sha256(url.encode()).hexdigest()[:12]}-{url.rsplit('/', 1)[-1]}"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        staging = path.with_suffix(f".{os.getpid()}")
        with (usage_errors(f"{url}: cannot be fetched"), urllib.request.urlopen(url, timeout=60) as answer,
              open(staging, "wb") as file):
            shutil.copyfileobj(answer, file)
            if answer.length:
                raise OSError(f"it ended {answer.length} bytes early")
        staging.replace(path)
    return Source(url, path.stat().st_size, lambda: path)

def hub_files(repo, args):
    """The Sources of a dataset of the Hub: its own Parquet files, else those that the Hub has made of it. Raises UsageError."""
    from huggingface_hub import HfApi, hf_hub_download
    def listed(revision):
        with usage_errors(f"{repo}: neither a file here nor to be had from the Hub", Exception):
            info = HfApi().dataset_info(repo, revision=revision, files_metadata=True)
        named = sorted((file.rfilename, file.size) for file in info.siblings if file.rfilename.endswith(".parquet"))
        return info.sha, [(name, size) for name, size in named if re.search(args.files, name)]
    sha, files = listed(args.revision)
    if not files and not args.revision:
        sha, files = listed("refs/convert/parquet")
    if any("partial-" in name for name, _ in files):
        print(f"note: of {repo} the Hub has made Parquet files of the first part only", flush=True)
    if not files:
        raise UsageError(f"{repo}: no Parquet file there has a path that matches --files={args.files}")
    def fetch(name):
        with usage_errors(f"{repo}: {name} cannot be fetched", Exception):
            return Path(hf_hub_download(repo, name, repo_type="dataset", revision=sha))
    return [Source(f"{repo}@{sha}/{name}", size, lambda name=name: fetch(name)) for name, size in files]

def find_sources(args):
    """[Source, ...] of what was named: files in the order given, those of folders and globs by name. Raises UsageError."""
    found = []
    for given in args.sources:
        if re.match("https?://", given):
            found.append(download(given))
            continue
        pattern = os.path.join(given, "**") if os.path.isdir(given) else given
        names = [given] if os.path.isfile(given) else sorted(glob.glob(pattern, recursive=True))
        if names := [name for name in names if os.path.isfile(name) and (kind_of(name) or name == given)]:
            found += [Source(os.path.basename(name), os.path.getsize(name), lambda name=name: Path(name)) for name in names]
        elif re.fullmatch(r"[\w.-]+/[\w.-]+", given) and not os.path.exists(given):
            found += hub_files(given, args)
        else:
            raise UsageError(f"{given}: no file, and no {', '.join((*TEXT, *ROWS))} in it; nor is it OWNER/NAME of a dataset of the Hub")
    for source in found:
        if not kind_of(source.name):
            raise UsageError(f"{source.name}: wanted {', '.join((*TEXT, *ROWS))}")
    return found

# ---- Documents ----

def cut(file):
    """Yield a text file's text in pieces of about PIECE, cut after a newline that stands alone between two letters: what a
    byte-level BPE makes of them is what it makes of the whole. Where there is none in 16 pieces, anywhere."""
    rest = ""
    while block := file.read(PIECE):
        rest += block
        at = len(rest) - 1
        while (at := rest.rfind("\n", 0, at)) > 0 and (rest[at - 1].isspace() or rest[at + 1].isspace()):
            pass
        at = at + 1 if at > 0 else len(rest) if len(rest) > 16 * PIECE else 0
        if at:
            yield rest[:at]
            rest = rest[at:]
    if rest:
        yield rest

def split_on(separator, file):
    """Yield the texts between separators, one at a time in memory."""
    rest = ""
    while block := file.read(PIECE):
        *whole, rest = (rest + block).split(separator)
        yield from whole
    yield rest

def texts(source, path, args):
    """Yield the texts of a file, each as an open file."""
    kind = kind_of(source.name)
    if kind == ".parquet":
        file = package("pyarrow.parquet", "a .parquet file").ParquetFile(path)
        if args.field not in file.schema_arrow.names:
            raise UsageError(f"{source.name}: no column {args.field!r}; --field can be {', '.join(file.schema_arrow.names)}")
        for batch in file.iter_batches(256, columns=[args.field]):
            yield from map(as_file, filter(None, batch.column(0).to_pylist()))
        return
    with gzip.open(path) if kind.endswith(".gz") else open(path, "rb") as file:
        if kind in TEXT:
            text = io.TextIOWrapper(file, encoding="utf-8", newline="")
            yield from map(as_file, split_on(args.separator, text)) if args.separator else [text]
            return
        for number, line in enumerate(file, 1):
            row = json.loads(line) if line.strip() else {args.field: ""}
            if not isinstance(row, dict) or not isinstance(row.get(args.field), str):
                raise UsageError(f"{source.name}, line {number}: no text {args.field!r}; --field names it, here is "
                                f"{', '.join(row) if isinstance(row, dict) else type(row).__name__}")
            yield as_file(row[args.field])

def as_file(text):
    """JSON can hold half a surrogate pair, which is no text: it becomes a question mark."""
    return io.StringIO(text.encode(errors="replace").decode(), newline="")

def documents(source, args):
    """Yield (whether a document begins, text) of a file. Raises UsageError."""
    path = source.fetch()
    with usage_errors(f"{source.name}: cannot be read"):
        for file in texts(source, path, args):
            for number, piece in enumerate(cut(file)):
                yield number == 0, piece

def pieces(sources, args):
    """Yield (split, whether a document begins, text) of all text, in order: which it is depends on the text and args alone."""
    if args.val_tail:
        left = int(sum(len(piece) for _, piece in documents(sources[0], args)) * (1 - args.val_tail))
    for first, piece in itertools.chain.from_iterable(documents(source, args) for source in sources):
        if args.val_tail:
            for part, text in (("train", piece[:left]), ("val", piece[left:])):
                if text:
                    yield part, first or part != split, text
                    split, first = part, False
            left = max(0, left - len(piece))
            continue
        if first:
            share = int.from_bytes(hashlib.sha256(piece.encode()).digest()[:8], "big") / 2 ** 64
            split = "val" if share < args.val else "train"
        yield split, first, piece

# ---- Tokenizers ----

def sample(sources, args, split, most):
    """Yield texts of a split from the beginning, about `most` characters in all."""
    for part, _, text in pieces(sources, args):
        if part == split:
            yield text
            if (most := most - len(text)) <= 0:
                return

def make_tokenizer(kind, vocab_size, folder, sources, args):
    """Puts the files of a tokenizer into a folder. Returns what meta.json says of it. Raises UsageError."""
    if kind == "bytes":
        return BYTES
    if kind == "gpt2":
        package("tokenizers", "GPT-2's tokenizer")
        if args.gpt2 and not gpt2_files(args.gpt2):
            raise UsageError(f"--gpt2={args.gpt2}: wanted a folder of encoder.json and vocab.bpe")
        for path, name in zip(gpt2_files(args.gpt2) if args.gpt2 else gpt2_files(folder) or fetch_gpt2(), GPT2_FILES[0]):
            put(folder / name, path.read_bytes())
        return GPT2
    if kind not in KINDS:
        with usage_errors(f"--tokenizer={kind}: wanted {', '.join(KINDS)}, or a folder of shards with a meta.json"):
            meta = {key: json.loads((Path(kind) / "meta.json").read_text())[key] for key in BYTES}
            for name in {"bytes": (), "gpt2": GPT2_FILES[0]}.get(meta["tokenizer"], (meta["tokenizer"],)):
                put(folder / name, (Path(kind) / name).read_bytes())
        return meta
    name = {"chars": "characters.json", "bpe": "tokenizer.json"}[kind]
    if kind == "chars":
        if not (folder / name).exists():
            put(folder / name, json.dumps("".join(sorted(set().union(*(text for _, _, text in pieces(sources, args)))))).encode())
        size = len(json.loads((folder / name).read_text())) + 1
        if size > 65534:
            raise UsageError(f"{size - 1} different characters: wanted at most 65533; --tokenizer=bpe spells any text")
        return {"tokenizer": name, "vocab_size": size, "bos_id": size - 1}
    if not (folder / name).exists():
        print(f"a BPE of {vocab_size} from the first {args.bpe_mib} MiB of training text ...", flush=True)
        tokenizer = train_bpe(sample(sources, args, "train", args.bpe_mib << 20), vocab_size)
        put(folder / name, tokenizer.to_str().encode())
    size = package("tokenizers", "a BPE").Tokenizer.from_file(str(folder / name)).get_vocab_size()
    return {"tokenizer": name, "vocab_size": size, "bos_id": 0}

def put(path, blob):
    """Write a file, atomically."""
    staging = path.with_suffix(f".{os.getpid()}")
    staging.write_bytes(blob)
    staging.replace(path)

# ---- Shards ----

def start_worker(meta, folder):
    """Opens the tokenizer of a worker; a process ends with its parent, however that ends."""
    global tokenizer
    tokenizer = open_tokenizer(meta, folder)
    if parent := multiprocessing.parent_process():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        threading.Thread(target=lambda: parent.join() or os._exit(1), daemon=True).start()

def encode(batch):
    """uint16 tokens of [(whether a document begins, text), ...]."""
    ids = []
    for first, text in batch:
        ids += [tokenizer.bos_id] * first
        ids += tokenizer.encode(text)
    return np.array(ids, np.uint16)

@dataclasses.dataclass
class Open:
    """A shard in the making. there: it is on the disk already, its text is passed over. size: of its text so far, bytes."""
    path: Path
    there: bool
    size: int = 0
    batch: list = dataclasses.field(default_factory=list)  # the last pieces, not yet sent to a worker
    batch_size: int = 0                                    # their characters
    tokens: list = dataclasses.field(default_factory=list)

class Writer:
    """Takes pieces of text in order, has them encoded by the pool a batch at a time, and writes each shard when it is whole."""
    def __init__(self, out, shard_bytes, pool, in_flight):
        self.out, self.shard_bytes, self.pool, self.in_flight = out, shard_bytes, pool, in_flight
        self.open, self.queue = {}, collections.deque()  # queue: (shard, whether this is its last batch, future)
        self.counts, self.bytes, self.there = {}, 0, 0   # {file: tokens}; of text; shards that were on the disk
        self.began = self.shown = time.perf_counter()

    def begin(self, split, number):
        path, there = self.out / f"{split}_{number:06d}.bin", False
        with contextlib.suppress(UsageError):
            self.counts[path.name], there = len(open_shard(path)), True
        self.there += there
        self.open[split] = Open(path, there)
        return self.open[split]

    def add(self, split, first, text):
        shard = self.open.get(split) or self.begin(split, 0)
        if shard.size >= self.shard_bytes:
            self.send(shard, last=True)
            shard = self.begin(split, int(shard.path.stem[-6:]) + 1)
        size = len(text) if text.isascii() else len(text.encode())
        shard.size, self.bytes = shard.size + size, self.bytes + size
        if not shard.there:
            shard.batch.append((first, text))
            shard.batch_size += len(text)
            if shard.batch_size >= PIECE:
                self.send(shard)

    def send(self, shard, last=False):
        if not shard.there:
            self.queue.append((shard, last, self.pool.submit(encode, shard.batch)))
            shard.batch, shard.batch_size = [], 0
            self.collect(self.in_flight)

    def collect(self, most):
        """Wait until at most so many batches are under way."""
        while len(self.queue) > most:
            shard, last, future = self.queue.popleft()
            shard.tokens.append(future.result())
            if last:
                tokens = np.concatenate(shard.tokens)
                write_shard(shard.path, tokens)
                self.counts[shard.path.name], shard.tokens = len(tokens), []
                print(f"{shard.path.name}: {len(tokens)} tokens", flush=True)

    def finish(self):
        for shard in self.open.values():
            self.send(shard, last=True)
        self.collect(0)

    def progress(self, where, share):
        """share: of the work that is done, or 0 where that is not known."""
        now = time.perf_counter()
        if now - self.shown > 2:
            eta = f", eta {(now - self.began) * (1 / share - 1) / 60:.0f} min" if share else ""
            print(f"{where}, {self.bytes / 1e6:.0f} MB of text, {len(self.counts)} shards, "
                  f"{self.bytes / 1e6 / (now - self.began):.1f} MB/s{eta}", flush=True)
            self.shown = now

def write_shards(sources, meta, args, out):
    """Write what is missing. Returns the Writer. Raises UsageError."""
    tokenizer, total = open_tokenizer(meta, out), sum(source.size for source in sources)
    text = "".join(sample(sources, args, "train", PIECE))[:PIECE]
    if not text:
        raise UsageError(f"{args.sources[0]}: holds no training text")
    shard_bytes = max(1, round(args.shard_tokens * len(text.encode()) / len(tokenizer.encode(text))))
    jobs = args.jobs if total > 8 * PIECE else 1  # a process takes seconds to start
    pool = (ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), start_worker, (meta, out)) if jobs > 1
            else ThreadPoolExecutor(1, initializer=start_worker, initargs=(meta, out)))
    with pool:
        writer, done = Writer(out, shard_bytes, pool, 2 * jobs), 0
        for number, source in enumerate(sources, 1):
            for piece in pieces([source], args):
                writer.add(*piece)
                writer.progress(f"file {number} of {len(sources)}", done / total)
            done += source.size
        writer.finish()
    return writer

# ---- Report ----

def report(sources, args):
    """Prints a table: the bytes of a token of each tokenizer in --report, and of GPT-2's, on the validation text."""
    rows, text = [], [*sample(sources, args, "val", 16 * PIECE)]
    if not text:
        raise UsageError(f"{args.sources[0]}: no validation text to count on; a larger --val or --val_tail takes some")
    size = sum(len(piece.encode()) for piece in text)
    for name in dict.fromkeys(("gpt2", *args.report.split(","))):
        kind, _, vocab = name.partition(":") if name.partition(":")[0] in KINDS else (name, "", "")
        with tempfile.TemporaryDirectory() as folder:
            meta = make_tokenizer(kind, int(vocab or args.vocab_size), Path(folder), sources, args)
            tokenizer = open_tokenizer(meta, folder)
        count = sum(len(tokenizer.encode(piece)) for piece in text)
        rows.append((name, meta["vocab_size"], count, size / count))
    print(f"\n{size} bytes of validation text; what is learned is learned from the training text\n\n"
          "| tokenizer | vocabulary | tokens | bytes per token | tokens for one of GPT-2's |\n| --- | --- | --- | --- | --- |")
    for name, vocab, count, share in rows:
        print(f"| {name} | {vocab} | {count} | {share:.3f} | {count / rows[0][2]:.3f} |")

# ---- main ----

def parse(argv):
    """Raises UsageError."""
    def fail(message):
        raise UsageError(f"{message} (python -m scripts.prepare --help)")
    parser = argparse.ArgumentParser(usage="python -m scripts.prepare SOURCE ... --out=DIR [--FLAG=VALUE ...]", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error, flag = fail, parser.add_argument
    number = lambda text: int(float(text))
    flag("sources", nargs="+", metavar="SOURCE", help="file, folder, glob in quotes, URL, or OWNER/NAME of a dataset of the Hub")
    flag("--out", metavar="DIR", help="where train_*.bin, val_*.bin, meta.json and the tokenizer go")
    flag("--tokenizer", default="gpt2", metavar="KIND", help="bytes; chars, the characters of this text; gpt2; bpe, a vocabulary made "
         "from this text; or a folder of shards, whose tokenizer is taken (default: %(default)s)")
    flag("--vocab_size", type=number, default=4096, metavar="N", help="of bpe, the BOS and 256 bytes among them (default: %(default)s)")
    flag("--bpe_mib", type=int, default=100, metavar="N", help="MiB of training text that bpe is made from (default: %(default)s)")
    flag("--gpt2", metavar="DIR", help="folder of GPT-2's encoder.json and vocab.bpe (default: from the Hub)")
    flag("--field", default="text", metavar="NAME", help="the text of a line or row (default: %(default)s)")
    flag("--separator", default="", metavar="TEXT", help="stands between the documents of a .txt; \\n is a newline (default: none)")
    flag("--files", default="train", metavar="REGEX", help="of a dataset the files whose path has this (default: %(default)s)")
    flag("--revision", metavar="SHA", help="commit or branch of a dataset (default: the newest)")
    flag("--val", type=float, metavar="SHARE", help="share of the documents for validation, by their hash (default: 0.01)")
    flag("--val_tail", type=float, default=0.0, metavar="SHARE", help="instead, the last share of the characters of one .txt")
    flag("--shard_tokens", type=number, default=100_000_000, metavar="N", help="tokens of a shard, about (default: %(default)s)")
    flag("--jobs", type=int, default=os.cpu_count(), metavar="N", help="processes that encode (default: %(default)s)")
    flag("--report", metavar="KIND,...", help="print a table of bytes per token of these and GPT-2's; bpe:N is one of N")
    args = parser.parse_args(argv)
    def need(ok, name, wanted):
        if not ok:
            fail(f"--{name}={getattr(args, name)}: wanted {wanted}")
    need(args.out or args.report, "out", "a folder")
    need(257 <= args.vocab_size <= 65534, "vocab_size", "257 to 65534")
    need(1 <= args.shard_tokens <= 1 << 30, "shard_tokens", "1 to 2^30")
    need(args.jobs >= 1, "jobs", "at least 1")
    need(args.bpe_mib >= 1, "bpe_mib", "at least 1")
    need(0 <= args.val_tail < 1 and not (args.val_tail and args.val is not None), "val_tail", "a share below 1, without --val")
    args.val, args.separator = 0.01 if args.val is None else args.val, args.separator.replace("\\n", "\n")
    need(0 <= args.val < 1, "val", "a share below 1")
    try:
        re.compile(args.files)
    except re.error as error:
        fail(f"--files={args.files}: wanted a regular expression ({error})")
    return args

def main(argv=None):
    """Writes shards, tokenizer and meta.json, or prints a report. Raises UsageError."""
    args = parse(sys.argv[1:] if argv is None else argv)
    sources = find_sources(args)
    if args.val_tail and (len(sources) != 1 or kind_of(sources[0].name) not in TEXT or args.separator):
        raise UsageError(f"--val_tail={args.val_tail}: wanted one .txt that is one document, not {len(sources)} files or documents")
    if args.report:
        return report(sources, args)
    out = Path(args.out)
    names = "tokenizer vocab_size bpe_mib field separator val val_tail shard_tokens".split()
    recipe = {"sources": [[source.name, source.size] for source in sources]} | {name: getattr(args, name) for name in names}
    if any(out.glob("*.bin")) and not (out / "meta.json").exists():
        raise UsageError(f"{out}: holds shards without a meta.json; wanted a new folder")
    with usage_errors(f"{out / 'meta.json'}: cannot be read"):
        old = json.loads((out / "meta.json").read_text()) if (out / "meta.json").exists() else {}
    if old and old.get("recipe") != recipe:
        was = old.get("recipe") or {}
        other = next((name for name in recipe if was.get(name) != recipe[name]), "recipe")
        raise UsageError(f"{out}: its shards have another {other}: {str(was.get(other))[:100]}, not {str(recipe.get(other))[:100]}; "
                         "wanted a new folder")
    out.mkdir(parents=True, exist_ok=True)
    describe = lambda **more: put(out / "meta.json", json.dumps(more | {"recipe": recipe}, indent=1).encode())
    if not old:
        describe()  # before a tokenizer is there that another recipe might take for its own
    print(f"{len(sources)} files, {sum(source.size for source in sources) / 1e6:.1f} MB", flush=True)
    meta = make_tokenizer(args.tokenizer, args.vocab_size, out, sources, args)
    describe(**meta)
    started = time.perf_counter()
    writer = write_shards(sources, meta, args, out)
    counts = dict(sorted(writer.counts.items()))
    describe(**meta, tokens=counts)
    for staging in out.glob("*.[0-9]*"):  # of runs that were killed
        staging.unlink()
    train, val = (sum(count for name, count in counts.items() if name.startswith(split)) for split in ("train", "val"))
    print(f"wrote: {out}, {train} training tokens and {val} for validation in {len(counts)} shards ({writer.there} were there), "
          f"{writer.bytes / max(1, train + val):.3f} bytes per token, in {time.perf_counter() - started:.0f} s")
    first = counts.get("val_000000.bin", 0) - 1
    print(f"next: python train.py --train_files='{out}/train_*.bin' --val_files='{out}/val_*.bin'"
          + (f" --val_tokens={min(first, 262_144)}" if first < 10_485_760 else "") + (" --max_epochs=1000" if train < 1e9 else "")
          if first > 0 else "note: no document fell to validation, and train.py wants some: the same with --out of a new folder and --val=0.1, or, of one .txt, --val_tail=0.1")
    return 0

if __name__ == "__main__":
    sys.exit(command(main))
