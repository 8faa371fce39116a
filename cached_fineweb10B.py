"""Fetch FineWeb-10B as GPT-2 tokens, and prove that every byte arrived.

    python cached_fineweb10B.py            # the validation shard and 8 training shards, 1.8 GB
    python cached_fineweb10B.py 103        # all there is: 104 files, 20.8 GB
    python cached_fineweb10B.py --verify   # check the shards that are here, download none

The shards are those of the dataset kjj0/fineweb10B-gpt2 on the Hugging Face Hub, 100M tokens each:
256 little-endian int32 (magic number, version, token count, zeros), then one uint16 per token.
huggingface_hub downloads to fineweb10B/.incoming. A shard gets its place only when header, size and
SHA-256 are right; hf_hub_download compares no hashes itself (its issue #3643).

After an interruption run the same command again. What verifies is skipped, the rest is fetched.
"""

import argparse
import contextlib
import hashlib
import os
import re
import shlex
import signal
import struct
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

try:
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HTTPError  # the base of its network errors
    from huggingface_hub.utils import WeakFileLock
except (ImportError, ValueError) as error:  # ValueError: HF_ENDPOINT or an HF_HUB_..._TIMEOUT
    print(
        f"error: huggingface_hub cannot be loaded: {error}; pip install -r requirements.txt, or "
        "mend the environment's HF_ variables",
        file=sys.stderr,
    )
    sys.exit(2)

REPO = "kjj0/fineweb10B-gpt2"
MAX_SHARDS = 103  # training shards in the dataset
SPEEDRUN_SHARDS = 8  # what the speedrun preset of train.py reads
SHARD_BEGIN = (20240520, 1)  # magic number, version
HEADER_BYTES = 1024
FILES_AT_ONCE = 8
CUT_OFF = re.compile(r"[\w=-]{28}\.[0-9a-f]{64}\.[0-9a-f]{8}\.incomplete")  # a download's name
# What huggingface_hub raises: for files, the network, Xet, URLs and proxies.
HUB_ERRORS = (OSError, HTTPError, RuntimeError, ValueError, ImportError)
HUB_ERRORS += (sys.modules[HTTPError.__module__].InvalidURL,)
NO_LISTING = (LookupError, TypeError, AttributeError)  # and for JSON that is no list of files


class Failed(Exception):
    """One sentence for the reader: what came, what was wanted, the way out. Exit code 2."""


def shard_names(num_train):
    training = [f"fineweb_train_{i:06d}.bin" for i in range(1, num_train + 1)]
    return ["fineweb_val_000000.bin", *training]


def failure(error):
    """Failed, of an error of huggingface_hub."""
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return Failed(f"{reason}; mend it (network, HF_ENDPOINT, HF_TOKEN, disk) and run this again")


def problem_with(path, sha256):
    """What is wrong with the shard at path, in a few words, or ""."""
    if not path.is_file():  # a pipe would never end
        return "no file" if path.exists() else "missing"
    with open(path, "rb") as file:
        magic, version, num_tokens = struct.unpack("<3i", file.read(12).ljust(12, b"\0"))
        if (magic, version) != SHARD_BEGIN:
            return f"begins with {[magic, version]}, wanted {list(SHARD_BEGIN)}"
        size = path.stat().st_size
        wanted = HEADER_BYTES + 2 * num_tokens
        if size != wanted:
            return f"{size} bytes, wanted {wanted} for the {num_tokens} tokens of its header"
        file.seek(0)
        found = hashlib.file_digest(file, "sha256").hexdigest()
    return "" if found == sha256 else f"SHA-256 {found[:16]}, wanted {sha256[:16]}"


def problems_in(folder, hashes, pool):
    """{name: what is wrong with it} of the shards that do not verify."""
    found = pool.map(lambda name: problem_with(folder / name, hashes[name]), hashes)
    return {name: problem for name, problem in zip(hashes, found, strict=True) if problem}


def ask_hub(names):
    """{name: SHA-256}, as the hub states them."""
    try:
        files = HfApi().get_paths_info(REPO, names, repo_type="dataset")
    except (*HUB_ERRORS, *NO_LISTING) as error:
        raise failure(error) from error
    hashes = {file.path: str(file.lfs.sha256) for file in files if getattr(file, "lfs", None)}
    for name in names:
        if name not in hashes:
            raise Failed(f"{name}: the hub has no SHA-256 of it in {REPO}; check HF_ENDPOINT")
    return {name: hashes[name] for name in names}


def verify(folder, hashes, pool):
    problems = problems_in(folder, hashes, pool)
    if problems:
        listed = ", ".join(f"{name} ({problem})" for name, problem in problems.items())
        last = max(int(name[-10:-4]) for name in problems)
        raise Failed(
            f"{len(problems)} of {len(hashes)} shards do not verify: {listed}; fetch them again: "
            f"python cached_fineweb10B.py {max(1, last)} {shlex.quote(f'--dir={folder}')}"
        )
    print(f"all {len(hashes)} shards in {folder} verified")


def fetch_shard(folder, name, sha256):
    """Download a shard to the staging folder, prove it there, and only then give it its place."""
    staging = folder / ".incoming"
    if (staging / name).is_symlink():
        raise Failed(f"{staging / name} is a link to elsewhere; take it away")
    try:
        staged = Path(hf_hub_download(REPO, name, repo_type="dataset", local_dir=staging))
    except HUB_ERRORS as error:
        raise failure(error) from error
    problem = problem_with(staged, sha256)
    if problem:
        staged.unlink()
        raise Failed(f"{name} came wrong from {REPO}: {problem}; try again, or check any proxy")
    os.replace(staged, folder / name)
    print(f"{name}: fetched and verified", flush=True)


def remove_cut_off(staging):
    """Delete downloads that nobody goes on with: huggingface_hub names each one anew."""
    for path in staging.glob(".cache/huggingface/download/*.incomplete"):
        if CUT_OFF.fullmatch(path.name) and path.is_file() and not path.is_symlink():
            path.unlink()


def fetch(folder, hashes, pool):
    """Bring all shards into folder. Raises Failed where another download is at work there."""
    staging = folder / ".incoming"
    staging.mkdir(parents=True, exist_ok=True)
    lock = staging / "lock"
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(WeakFileLock(lock, timeout=1))
        except TimeoutError:
            raise Failed(f"{lock} is held: wait for the other download into {folder}") from None
        remove_cut_off(staging)
        wanted = problems_in(folder, hashes, pool)
        list(pool.map(lambda name: fetch_shard(folder, name, hashes[name]), wanted))
    skipped = len(hashes) - len(wanted)
    print(f"all {len(hashes)} shards in {folder} verified: {len(wanted)} new, {skipped} skipped")


def parse(argv):
    def fail(message):
        raise Failed(f"{message}; see python cached_fineweb10B.py --help")

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = fail
    folder = Path(__file__).resolve().parent / "fineweb10B"
    add = parser.add_argument
    add("N", nargs="?", type=int, help=f"training shards, 1 to {MAX_SHARDS} ({SPEEDRUN_SHARDS})")
    add("--verify", action="store_true", help="check N shards, or those that are here")
    add("--dir", type=Path, default=folder, help="where the shards lie (fineweb10B, beside this)")
    args = parser.parse_args(argv)
    if args.N is not None and not 1 <= args.N <= MAX_SHARDS:
        fail(f"N is {args.N}, wanted 1 to {MAX_SHARDS}")
    return args


def run(argv):
    args = parse(argv)
    names = shard_names(args.N or SPEEDRUN_SHARDS)
    if args.verify and args.N is None:
        names = [name for name in shard_names(MAX_SHARDS) if (args.dir / name).exists()]
        if not names:
            raise Failed(f"{args.dir} has no shards; fetch some: python cached_fineweb10B.py")
    hashes = ask_hub(names)
    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        act = verify if args.verify else fetch
        act(args.dir, hashes, pool)


def main(argv=None):
    """Returns the exit code."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(errors="backslashreplace")  # a console may not know all characters
    code = 0
    try:
        run(argv)
    except SystemExit as leaving:  # of --help
        code = leaving.code
    except (Failed, OSError) as error:
        code = 2
        print(f"error: {error}", file=sys.stderr)
    try:
        print(end="", flush=True)
    except OSError:  # nobody reads it any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 2
    return code


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C does not wait for files under way
    sys.exit(main())
