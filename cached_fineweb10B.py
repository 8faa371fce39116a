"""Fetch FineWeb-10B as GPT-2 tokens, and prove that every byte arrived.

    python cached_fineweb10B.py            # the validation shard and the 8 training shards of the speedrun preset
    python cached_fineweb10B.py 103        # all there is: 104 files, 20.8 GB
    python cached_fineweb10B.py --verify   # hash what is here once more; downloads nothing

The shards are those of the dataset kjj0/fineweb10B-gpt2 on the Hugging Face Hub, 100M tokens each: a header of 256
little-endian int32 (magic number, version, token count, zeros), then one uint16 per token. A shard is written to
fineweb10B/.incoming and gets its own name only once header, size and SHA-256 agree with the hub. The hashes stay in
fineweb10B/SHA256SUMS, for `sha256sum -c` and for --verify without a network.

huggingface_hub names, authorizes and opens each file; the bytes are appended here, because its own hf_hub_download
compares no hashes (its issue #3643) and since 1.18 starts an interrupted file again from zero (its issue #4196).
"""

import argparse
import hashlib
import os
import re
import shutil
import struct
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from huggingface_hub import get_hf_file_metadata, get_session, hf_hub_url, hf_raise_for_status
from huggingface_hub.constants import HF_HUB_DOWNLOAD_TIMEOUT
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled  # HTTPError: the base of all its network errors
from huggingface_hub.utils import build_hf_headers, tqdm

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

REPO = "kjj0/fineweb10B-gpt2"
MAX_SHARDS = 103     # training shards in the repo
SPEEDRUN_SHARDS = 8  # what the speedrun preset of train.py reads
SHARD_MAGIC, SHARD_VERSION, HEADER_BYTES = 20240520, 1, 1024
RETRY_WAITS = (1, 2, 4, 8)                      # seconds between attempts that bring nothing new
PASSING = (None, 408, 429, 500, 502, 503, 504)  # HTTP statuses that may be gone in a moment; None: no answer


class Failed(Exception):
    """One sentence for the reader: what came, what was wanted, the way out. Exit status 3."""


# ---- Shards on disk ----

def shard_names(num_train):
    return ["fineweb_val_000000.bin", *(f"fineweb_train_{i:06d}.bin" for i in range(1, num_train + 1))]


def size_of(path):
    return path.stat().st_size if path.exists() else 0


def problem_with(path, hashes):
    """What is wrong with the shard at path, in a few words, or "". Its SHA-256 must equal all hashes, at least one."""
    if not path.exists():
        return "missing"
    with open(path, "rb") as file:
        magic, version, num_tokens = struct.unpack("<3i", file.read(12).ljust(12, b"\0"))
        if (magic, version) != (SHARD_MAGIC, SHARD_VERSION):
            return f"magic number {magic} and version {version}, expected {SHARD_MAGIC} and {SHARD_VERSION}"
        size, want = size_of(path), HEADER_BYTES + 2 * num_tokens
        if size != want:
            return f"{size} bytes, expected {want} for the {num_tokens} tokens of its header"
        file.seek(0)
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()  # reads in small pieces
    want = " and ".join(sorted(sha256[:16] for sha256 in hashes)) or "one in SHA256SUMS to compare it with"
    return "" if set(hashes) == {sha256} else f"SHA-256 {sha256[:16]}, expected {want}"


def read_sums(folder):
    """{name: SHA-256} from SHA256SUMS; empty if there is none."""
    path = folder / "SHA256SUMS"
    rows = re.findall(r"^([0-9a-f]{64}) [ *](\S+)$", path.read_text("latin-1") if path.exists() else "", re.MULTILINE)
    return {name: sha256 for sha256, name in rows}


def write_sums(folder, sums):
    draft = folder / ".incoming" / "SHA256SUMS"
    draft.write_text("".join(f"{sums[name]}  {name}\n" for name in sorted(sums)))
    os.replace(draft, folder / "SHA256SUMS")


def lock(folder):
    """Wait until no other download is at work in folder. The lock is on the directory, until os.close of the result.

    Without it (Windows, some network disks) two downloads hinder each other, but the hashes still guard the names.
    """
    if fcntl is None:
        return os.open(os.devnull, os.O_RDONLY)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"another download is at work in {folder}; waiting for it", flush=True)
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError:
        pass
    return handle


# ---- The hub ----

def status_of(error):
    return getattr(getattr(error, "response", None), "status_code", None)


def reason(error):
    return f"HTTP {status_of(error)}" if status_of(error) else f"{type(error).__name__}: {error}".splitlines()[0]


def patiently(call, progress=lambda: 0, silences=len(RETRY_WAITS)):
    """call(), again after an HTTP error that may pass, until all RETRY_WAITS in a row brought no progress().

    silences: how often no answer at all is borne. Without a network, one more second is enough.
    """
    failures, best = 0, progress()
    while True:
        try:
            return call()
        except HTTPError as error:
            if progress() > best:
                failures, best = 0, progress()
            tries = len(RETRY_WAITS) if status_of(error) else silences
            if failures >= tries or status_of(error) not in PASSING:
                raise
            time.sleep(RETRY_WAITS[failures])
            failures += 1


def ask_hub(name, revision, silences=len(RETRY_WAITS)):
    """The hub's metadata of one shard: size, etag (the SHA-256), commit_hash. ConnectionError: it is out of reach."""
    url = hf_hub_url(REPO, name, repo_type="dataset", revision=revision)
    try:
        facts = patiently(lambda: get_hf_file_metadata(url), silences=silences)
    except OfflineModeIsEnabled:
        raise ConnectionError("HF_HUB_OFFLINE is set") from None
    except HTTPError as error:
        if status_of(error) in PASSING:
            raise ConnectionError(reason(error)) from error
        raise Failed(f"{name}: the hub answered {reason(error)} for this file of the dataset {REPO} at revision "
                     f"{revision}; check --revision, HF_ENDPOINT and HF_TOKEN") from error
    if not (facts.size and facts.commit_hash and re.fullmatch("[0-9a-f]{64}", facts.etag or "")):
        raise Failed(f"{name}: the hub gave size {facts.size}, commit {facts.commit_hash} and etag {facts.etag}, "
                     "expected a size, a commit and a SHA-256; check HF_ENDPOINT")
    return facts


def append(url, part, size, bar):
    """Append to part the bytes of url it lacks. What came before a cut stays, and the next call goes on from there."""
    have = size_of(part)
    if have >= size:
        return
    headers = build_hf_headers(headers={"Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})})
    with get_session().stream("GET", url, headers=headers, timeout=HF_HUB_DOWNLOAD_TIMEOUT) as response:
        hf_raise_for_status(response)
        if have and response.status_code != 206:  # a server without ranges sends it all again
            bar.update(-have)
            have = 0
        with open(part, "ab" if have else "wb") as file:
            for chunk in response.iter_bytes():
                file.write(chunk)
                bar.update(len(chunk))
                if file.tell() > size:
                    break
            file.flush()
            os.fsync(file.fileno())  # its bytes are on the disk before its name is
    if size_of(part) < size:
        raise HTTPError(f"the transfer ended after {size_of(part)} of {size} bytes")


def fetch_shard(path, part, facts, bar):
    """Download one shard to part, prove it there, and only then let it bear its name."""
    url = hf_hub_url(REPO, path.name, repo_type="dataset", revision=facts.commit_hash)
    for _ in range(2):  # one that fails the proof is fetched once more, from its first byte
        try:
            patiently(lambda: append(url, part, facts.size, bar), progress=lambda: size_of(part))
        except HTTPError as error:
            raise Failed(f"{path.name}: {reason(error)} after {size_of(part)} of {facts.size} bytes of the dataset "
                         f"{REPO}; run the same command again, it goes on from there") from error
        problem = problem_with(part, [facts.etag])
        if not problem:
            return os.replace(part, path)
        bar.update(-size_of(part))
        part.unlink()
    raise Failed(f"{path.name}: fetched twice from the dataset {REPO} at {facts.commit_hash}, and wrong again "
                 f"({problem}); nothing of it was kept: try later, or check HF_ENDPOINT and any proxy on the way")


# ---- The two commands ----

def verify(folder, hub, offline, pool):
    """Check every shard that hub names against SHA256SUMS, and its metadata unless that is None. Writes nothing."""
    sums = read_sums(folder)
    hashes = {name: {sums.get(name), facts and facts.etag} - {None} for name, facts in hub.items()}
    checks = zip(hub, pool.map(lambda name: problem_with(folder / name, hashes[name]), hub))
    problems = {name: problem for name, problem in checks if problem}
    bad = [f"{name} ({problem})" for name, problem in problems.items() if problem != "missing"]
    if len(bad) < len(problems):  # counted, not named: they can be a hundred
        bad.append(f"{len(problems) - len(bad)} missing")
    against = f"SHA256SUMS; the hub could not be reached ({offline})" if offline else "SHA256SUMS and the hub"
    if problems:
        raise Failed(f"{len(problems)} of {len(hub)} shards in {folder} did not verify against {against}: "
                     f"{', '.join(bad)}; {'once it can be, ' if offline else ''}fetch again: "
                     f"python cached_fineweb10B.py {max(1, len(hub) - 1)}")
    print(f"all {len(hub)} shards verified against {against}")


def fetch(folder, hub, pool):
    """Bring every shard that hub names into folder, verified; skip only what verifies already."""
    began, staging, recorded, wanted = time.perf_counter(), folder / ".incoming", read_sums(folder), {}
    sums = {name: sha256 for name, sha256 in recorded.items() if (folder / name).exists()}
    checks = pool.map(lambda name: problem_with(folder / name, [hub[name].etag]), hub)
    for (name, facts), problem in zip(hub.items(), checks):
        if not problem:
            sums[name] = facts.etag
            print(f"{name}: here and verified, skipped", flush=True)
            continue
        wanted[name] = staging / f"{name}.{facts.etag[:16]}.part"
        if problem != "missing":
            (folder / name).unlink()
            sums.pop(name, None)
            print(f"{name}: {problem}; deleted, will be fetched again", flush=True)
    if wanted or sums != recorded:  # else write nothing: a complete folder may be read-only
        staging.mkdir(exist_ok=True)
        write_sums(folder, sums)

    total, have = sum(hub[name].size for name in wanted), sum(map(size_of, wanted.values()))
    free = shutil.disk_usage(folder).free
    if total - have > free:
        raise Failed(f"{folder}: {(total - have) / 1e9:.2f} GB to fetch but {free / 1e9:.2f} GB free; make room, or "
                     "choose another disk with --dir")
    with tqdm(total=total, initial=have, unit="B", unit_scale=True, disable=None) as bar:  # None: only on a terminal
        def bring(name):
            fetch_shard(folder / name, wanted[name], hub[name], bar)
            with bar.get_lock():
                sums[name] = hub[name].etag
                write_sums(folder, sums)
                bar.write(f"{name}: {hub[name].size / 1e6:.1f} MB fetched and verified")
                sys.stdout.flush()
        list(pool.map(bring, wanted))
    shutil.rmtree(staging, ignore_errors=True)
    print(f"all {len(hub)} shards ({sum(facts.size for facts in hub.values()) / 1e9:.2f} GB) verified in {folder}: "
          f"{len(wanted)} fetched, {len(hub) - len(wanted)} skipped, {(total - have) / 1e9:.2f} GB in "
          f"{time.perf_counter() - began:.1f} s")


def run(args):
    names = shard_names(int(args.N or SPEEDRUN_SHARDS))
    if args.verify and args.N is None:
        names = sorted(path.name for path in args.dir.glob("fineweb_*_??????.bin"))
        if not names:
            raise Failed(f"{args.dir}: no shards to verify; fetch some: python cached_fineweb10B.py {SPEEDRUN_SHARDS}")
    pool = ThreadPoolExecutor(args.workers)  # not in a with block: it would wait for the files under way
    try:
        first = ask_hub(names[0], args.revision, silences=1)
        others = pool.map(lambda name: ask_hub(name, first.commit_hash), names[1:])  # so that all are of one commit
        hub, offline = dict(zip(names, [first, *others])), None
        print(f"{REPO} at {args.revision} is commit {first.commit_hash}", flush=True)
    except ConnectionError as error:
        hub, offline = dict.fromkeys(names), error
    if args.verify or offline:
        return verify(args.dir, hub, offline, pool)
    args.dir.mkdir(parents=True, exist_ok=True)
    handle = lock(args.dir)
    try:
        fetch(args.dir, hub, pool)
    finally:
        os.close(handle)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=f"Fetch the validation shard and the first N training shards of {REPO}, each checked by header, "
                    "size and SHA-256. After an interruption run it again: what verifies is skipped, the rest goes on.",
        epilog="Exit status: 0 all verified, 2 wrong arguments, 3 something failed and one sentence says what, 130 "
               "Ctrl-C. HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE, HF_HUB_DISABLE_PROGRESS_BARS: see huggingface_hub.")
    parser.add_argument("N", nargs="?", help=f"training shards, 1 to {MAX_SHARDS}; default {SPEEDRUN_SHARDS}, what the "
                        "speedrun preset reads. With --verify: how many must be here; default: check what is")
    parser.add_argument("--verify", action="store_true",
                        help="compare the shards with SHA256SUMS and, if it can be reached, the hub; download nothing")
    parser.add_argument("--dir", type=Path, default=Path(__file__).resolve().parent / "fineweb10B", metavar="FOLDER",
                        help="where the shards lie; default: fineweb10B beside this script")
    parser.add_argument("--revision", default="main", help="branch, tag or commit of the dataset; default: main")
    parser.add_argument("--workers", type=int, default=8, help="files fetched or hashed at once; default: 8")
    args = parser.parse_args(argv)
    if args.N is not None and not (re.fullmatch("[0-9]{1,9}", args.N) and 1 <= int(args.N) <= MAX_SHARDS):
        parser.exit(2, f"N is {args.N}, expected a whole number from 1 to {MAX_SHARDS}, as in: "
                       f"python cached_fineweb10B.py {SPEEDRUN_SHARDS}\n")
    if args.workers < 1:
        parser.exit(2, f"--workers is {args.workers}, expected 1 or more\n")
    try:
        run(args)
        return 0
    except Failed as failure:
        print(failure, file=sys.stderr)
    except OSError as error:
        print(f"{error.filename or args.dir}: {error.strerror or error}; nothing unverified was given a shard's "
              "name: make room or allow access, or choose another folder with --dir, then try again", file=sys.stderr)
    return 3


if __name__ == "__main__":
    try:
        status = main()
    except KeyboardInterrupt:
        print("\nstopped; run the same command again, it goes on from there", file=sys.stderr)
        status = 130
    sys.stdout.flush()
    os._exit(status)  # sys.exit would wait for files still under way; the next run uses every byte of them
