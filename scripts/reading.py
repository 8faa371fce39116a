"""Where text comes from: files, folders, URLs and datasets, and the documents in them.

What scripts/prepare.py says of a SOURCE is done here: each file is found once, whatever links and
names lead to it, and its text comes in pieces. What cannot be read raises UsageError, which names
the file and the line, row or byte.
"""

import collections
import dataclasses
import functools
import gzip
import hashlib
import http.client
import io
import itertools
import json
import os
import re
import shutil
import urllib.parse
import urllib.request
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from scripts.text import hub_errors, package, remove_staging, say, usage_errors
from train import UsageError, cache_dir, find_shards, owning, require

PIECE = 1 << 20  # characters of a piece of text, and of a batch that a worker encodes at a time
SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet")
WANTED = f"wanted {', '.join(SUFFIXES)}"
DAMAGED = (OSError, EOFError, zlib.error)  # what reading a file raises, compressed or not
TEXT = re.compile(r"(dictionary<values=)?(large_)?string(_view)?\b.*|null")  # a column's type

# ---- Sources -------------------------------------------------------------------------------------


@dataclass
class Source:
    name: str  # as in meta.json
    kind: str  # one of SUFFIXES, or ""
    size: int  # of the file, bytes
    fetch: Callable  # () -> its local Path
    identity: object  # equal for two names of one file
    num_empty: int = 0  # null and empty texts of the last reading, which are no documents


def kind_of(name):
    """The suffix that says how to read a file, or ""."""
    return next((suffix for suffix in SUFFIXES if name.lower().endswith(suffix)), "")


def as_sent(url):
    """A URL in the characters that a server takes. Raises ValueError."""
    parts = urllib.parse.urlsplit(url)
    host = parts.netloc.encode("idna").decode()
    path, query = (urllib.parse.quote(part, safe="%/:=&?+!$,;'@()*~") for part in parts[2:4])
    return urllib.parse.urlunsplit((parts.scheme, host, path, query, ""))


def fetch_url(url, path, is_gz):
    """Write what a server answers into a file; is_gz: the text is to stay compressed.

    Raises UsageError.
    """
    broken = (*DAMAGED, http.client.HTTPException, ValueError)
    with (
        usage_errors(f"{url}: cannot be fetched", broken),
        urllib.request.urlopen(as_sent(url), timeout=60) as answer,
        open(path, "wb") as file,
    ):
        if answer.headers.get_content_type() == "text/html":
            raise OSError("it is a web page; fetch the text by hand, and name the file")
        coding = answer.headers.get("Content-Encoding", "identity").lower()
        if coding not in ("identity", "gzip", "x-gzip"):
            raise OSError(f"it comes in the coding {coding}")
        unpacks = coding != "identity" and not is_gz
        shutil.copyfileobj(gzip.open(answer) if unpacks else answer, file)
        if answer.length:
            raise OSError(f"it ended {answer.length} bytes early")


def download(url):
    """The Source of a URL, in the cache. Raises UsageError."""
    path = re.split("[?#]", url)[0]
    last = (path if kind_of(path) else url).rsplit("/", 1)[-1]
    name = re.sub(r"[^\w.-]", "_", last, flags=re.ASCII)[-80:]
    require(kind_of(name), f"{url}: {WANTED}")
    key = hashlib.sha256(url.encode(errors="replace")).hexdigest()[:12]
    folder = cache_dir() / "text" / key
    if not (folder / name).exists():
        with owning(folder):
            remove_staging(folder, name.__eq__)
            staging = folder / f".{name}.{os.getpid()}.part"
            try:
                fetch_url(url, staging, kind_of(name).endswith(".gz"))
                staging.replace(folder / name)
            finally:
                staging.unlink(missing_ok=True)
                if not any(folder.iterdir()):
                    folder.rmdir()
    return dataclasses.replace(local_source(folder / name), name=url)


def list_parquet(repo, revision, args):
    """(commit, [(name, size)] of the Parquet files) of a dataset of the Hub. Raises UsageError."""
    with hub_errors(f"{repo}: neither a file here nor to be had from the Hub"):
        from huggingface_hub import HfApi

        info = HfApi().dataset_info(repo, revision=revision, files_metadata=True)
        files = [(str(file.rfilename), int(file.size or 0)) for file in info.siblings or []]
    found = []
    for name, size in files:
        if name.endswith(".parquet") and re.search(args.files, name):
            leads_out = {"", ".", ".."} & set(name.split("/")) or "\\" in name
            require(not leads_out, f"{repo}: its file {name!r} is named as one outside of it")
            found.append((name, size))
    return info.sha, sorted(found)


def fetch_parquet(repo, name, sha):
    with hub_errors(f"{repo}: {name} cannot be fetched"):
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(repo, name, repo_type="dataset", revision=sha))


def hub_files(repo, args):
    """The Sources of a dataset: its Parquet files, else those that the Hub has made of it.

    Raises UsageError.
    """
    sha, files = list_parquet(repo, args.revision or None, args)
    if not files and not args.revision:
        sha, files = list_parquet(repo, "refs/convert/parquet", args)
    if any("partial-" in name for name, _ in files):
        say(f"note: of {repo} the Hub has made Parquet files of the first part only")
    require(files, f"{repo}: no Parquet file there has a path that matches --files={args.files}")
    sources = []
    for name, size in files:
        fetch = functools.partial(fetch_parquet, repo, name, sha)
        whole = f"{repo}@{sha}/{name}"
        sources.append(Source(whole, ".parquet", size, fetch, whole))
    return sources


def identity_of(path):
    """Equal for two paths of one file or folder, through links too."""
    facts = os.stat(path)
    return facts.st_dev, facts.st_ino


def local_source(path):
    name, size = os.path.basename(path), os.path.getsize(path)
    return Source(name, kind_of(name), size, functools.partial(Path, path), identity_of(path))


def walk(root, passed):
    """Paths of the files below a folder, through links too, but each folder is entered once.

    passed: {why: [path]} of what is passed over, which grows.
    """
    found, seen = [], {identity_of(root)}
    unreadable = passed["cannot be opened"]
    for here, folders, names in os.walk(
        root, onerror=lambda error: unreadable.append(error.filename), followlinks=True
    ):
        found += [os.path.join(here, name) for name in names]
        entered = []
        for name in sorted(folders):
            path = os.path.join(here, name)
            identity = identity_of(path)
            if name.startswith("."):
                passed["hidden"].append(path)
            elif identity in seen:
                passed["reached before"].append(path)
            else:
                entered.append(name)
                seen.add(identity)
        folders[:] = entered
    return found


def why_not(path):
    """Why a file of a folder is passed over, or ""."""
    if os.path.basename(path).startswith("."):
        return "hidden"
    if not kind_of(path):
        return "of another kind"
    return "" if os.path.isfile(path) else "no file, or a link to none"


def local_files(given, passed):
    """The Sources of a file, or of what text a folder or a pattern holds, by name.

    passed: as of walk.
    """
    if os.path.isfile(given):
        return [local_source(given)]
    found = []
    for root in [given] if os.path.isdir(given) else map(str, find_shards(given)):
        found += walk(root, passed) if os.path.isdir(root) else [root]
    sources = []
    for path in sorted(found):
        if why := why_not(path):
            passed[why].append(path)
        else:
            sources.append(local_source(path))
    return sources


def find_sources(args):
    """[Source] of what was named, in the order given, each file once. Raises UsageError.

    Prints what was passed over.
    """
    found, passed = {}, collections.defaultdict(list)
    for given in args.sources:
        if re.match("https?://", given):
            sources = [download(given)]
        elif not (sources := local_files(given, passed)):
            is_dataset = re.fullmatch(r"[\w.-]+/[\w.-]+", given) and not os.path.exists(given)
            said = f"{given}: no file or folder with text in it, nor OWNER/NAME of a dataset"
            require(is_dataset, f"{said}; {WANTED}. Only the last part of a path is a pattern")
            sources = hub_files(given, args)
        for source in sources:
            require(source.kind, f"{source.name}: {WANTED}")
            if found.setdefault(source.identity, source) is not source:
                passed["reached before"].append(source.name)
    for why, names in passed.items():
        if names:
            more = ", ..." if len(names) > 3 else ""
            say(f"passed over, {why}: {len(names)} ({', '.join(names[:3])}{more})")
    return list(found.values())


# ---- Documents -----------------------------------------------------------------------------------


def cut(blocks):
    """Yield a text in pieces of about PIECE characters; it comes in blocks of as many.

    A piece ends with a newline that stands alone between two letters: what a byte-level BPE makes
    of the pieces is what it makes of the whole. Where there is none in 16 pieces, anywhere.
    """
    rest = ""
    for block in blocks:
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


def in_blocks(text):
    """Yield a text, or null, in blocks. Half a surrogate pair, as JSON can hold, becomes "?"."""
    text = (text or "").encode(errors="replace").decode()
    for i in range(0, len(text), PIECE):
        yield text[i : i + PIECE]


def text_blocks(source, file):
    """Yield a text file in blocks. Raises UsageError, naming the byte that cannot be read."""
    reader = io.TextIOWrapper(file, "utf-8-sig", newline="\n")
    try:
        while block := reader.read(PIECE):
            yield block
    except UnicodeDecodeError as error:
        place = file.tell() - len(error.object) + error.start
        raise UsageError(f"{source.name}, byte {place}: wanted UTF-8 ({error.reason})") from error
    except DAMAGED as error:
        said = f"cannot be read ({type(error).__name__}: {error})"
        raise UsageError(f"{source.name}, after byte {file.tell()} of the text: {said}") from error


def split_text(blocks, separator):
    """Yield the texts between separators, one at a time in memory.

    A line end in the separator is LF or CR LF in the text.
    """
    ends = separator.replace("\\r", "\r").replace("\\n", "\n").replace("\r\n", "\n")
    pattern = re.compile("\r?\n".join(map(re.escape, ends.split("\n"))))
    rest = ""
    for block in blocks:
        *whole, rest = pattern.split(rest + block)
        yield from filter(None, whole)
    if rest:
        yield rest


def numbered(source, unit, items, kinds):
    """Yield (place, item) of an iterator. Raises UsageError that names the place it broke at.

    unit: "line" or "row". kinds: what reading raises.
    """
    end = object()
    for number in itertools.count(1):
        place = f"{source.name}, {unit} {number}"
        with usage_errors(f"{place}: cannot be read", kinds):
            item = next(items, end)
        if item is end:
            return
        yield place, item


def parquet_rows(file, name):
    """Yield the values in a column of a Parquet file."""
    for batch in file.iter_batches(256, columns=[name]):
        for value in batch.column(0):
            yield value.as_py()


def parquet_texts(source, path, name):
    """Yield the texts in a column of a Parquet file. Raises UsageError where there is none."""
    parquet = package("pyarrow.parquet", "a .parquet file")
    kinds = (OSError, ValueError, package("pyarrow", "a .parquet file").ArrowException)
    with usage_errors(f"{source.name}: cannot be read", kinds):
        file = parquet.ParquetFile(path)
        columns = {column.name: str(column.type) for column in file.schema_arrow}
    names = [column for column, kind in columns.items() if TEXT.fullmatch(kind)]
    wanted = f"wanted text; --field can be {', '.join(names) or 'none of its columns'}"
    here = f"the column {name!r} is {columns.get(name, 'not there')}"
    require(name in names, f"{source.name}: {here}, {wanted}")
    for _, text in numbered(source, "row", parquet_rows(file, name), kinds):
        yield text


def json_row(line, place):
    """The JSON of a line. Raises UsageError."""
    wanted = f"{place}: wanted JSON in UTF-8"
    with usage_errors(wanted, (ValueError, RecursionError)):
        try:
            return json.loads(line.decode("utf-8-sig"))
        except json.JSONDecodeError as error:  # its own words count lines from here
            raise UsageError(f"{wanted} ({error.msg}, character {error.pos + 1})") from error


def json_texts(source, file, name):
    """Yield the texts in a field of each line. Raises UsageError, naming the line without one."""
    for place, line in numbered(source, "line", file, DAMAGED):
        if line.strip():
            row = json_row(line, place)
            here = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            text = row.get(name, 0) if isinstance(row, dict) else 0
            said = f"no text {name!r}; --field names it, here is {here}"
            require(text is None or isinstance(text, str), f"{place}: {said}")
            yield text


def texts(source, args):
    """Yield the texts of a Source, each in blocks. Raises UsageError."""
    path = source.fetch()
    if source.kind == ".parquet":
        yield from map(in_blocks, parquet_texts(source, path, args.field))
        return
    with usage_errors(f"{source.name}: cannot be read", OSError):
        file = gzip.open(path) if source.kind.endswith(".gz") else open(path, "rb")
    with file:
        if source.kind.startswith(".jsonl"):
            yield from map(in_blocks, json_texts(source, file, args.field))
        elif args.separator:
            blocks = text_blocks(source, file)
            yield from map(in_blocks, split_text(blocks, args.separator))
        else:
            yield text_blocks(source, file)


def documents(source, args):
    """Yield (whether a document begins, text) of a Source. Raises UsageError."""
    source.num_empty = 0
    for blocks in texts(source, args):
        begins = True
        for piece in cut(blocks):
            yield begins, piece
            begins = False
        source.num_empty += begins
