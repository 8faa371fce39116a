"""How good is a trained model? Validation loss, bits per byte, accuracy on sets of questions.

    python -m scripts.evaluate --checkpoint=logs/RUN     the trainer's own validation loss once more
    python -m scripts.evaluate --checkpoint=logs/RUN --val_files='mine/val_*.bin'    other shards
    python -m scripts.evaluate --checkpoint=logs/RUN --tasks=evals --fetch    get and score 11 sets
    python -m scripts.evaluate --checkpoint=logs/RUN --tasks=evals --max_per_task=100 --val_tokens=0

Validation loss is the mean over all targets. Bits per byte count text alone: the nats of the
targets that stand for bytes, by these bytes. A BOS stands for none, so neither it nor its nats
count (nanochat's way).

A set is DIR/NAME.jsonl, one question per line, every line of a file in the same of three forms:

    multiple choice  {"query": "...", "choices": ["...", "..."], "gold": 0}
        right: of all choices, the tokens of this one have the greatest mean log-likelihood
    schema           {"context_options": ["...", "..."], "continuation": "...", "gold": 0}
        right: the continuation's mean log-likelihood is the greatest after this context
    completion       {"context": "...", "continuation": "..."}
        right: each token of the continuation is the likeliest

A context without the spaces at its end, a delimiter and the continuation are encoded as one text
behind a BOS. Scored are the tokens from where it departs from the context's own encoding. The
delimiter is a space; before the answers of ARC, PIQA and BoolQ it is "\\nAnswer: ". Of several
choices that are best alike each gets its share. --shots=N puts N other questions of the set with
their answers before each; --shots=core as many as CORE does (arXiv:2406.11794): 10, but none for
COPA, OpenBookQA, LAMBADA, WSC and WinoGrande. What is longer than --max_len is cut from the left,
and counted.

Centered accuracy is (accuracy - chance) / (1 - chance): chance is one by the number of choices, 0
for a completion. The mean over the sets is in the manner of CORE, but of these sets and not of its
22; CORE centers BoolQ at 0.62, the share of "yes". Results are lines added to --out; what is there
for these weights, tokenizer, data and flags is not computed again.

--fetch gets HellaSwag, LAMBADA, ARC (two), PIQA, WinoGrande, WSC, COPA, CommonsenseQA, OpenBookQA
and BoolQ; it wants the package pyarrow.
"""

import contextlib
import errno
import hashlib
import itertools
import json
import math
import os
import random
import re
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

import train
from scripts.questions import fetch, read_tasks
from scripts.sample import memory_errors, open_checkpoint
from scripts.text import READING, read_args, usage_errors
from train import GPT, UsageError, replace, require

SCORING = 2  # to be raised when a change of this file moves a score: older lines count no more
ANSWER = ("arc_easy", "arc_challenge", "piqa", "boolq")  # whose answers follow "\nAnswer: "
CORE_SHOTS = dict.fromkeys((*ANSWER, "hellaswag", "commonsense_qa"), 10)  # 0 for the others
FLAGS = {
    "checkpoint": ("", "a run's folder, or its ckpt/step-NNNNNN"),
    "val_files": ("", "glob of validation shards; without it, the run's own"),
    "val_tokens": (
        -1,
        "targets to score, 0: none; -1: as many as the run scores, of --val_files all; BOS among "
        "them count for the loss, not for bits per byte",
        -1,
        1 << 40,
    ),
    "tokenizer": ("", "folder of the tokenizer's files; without it, the run's training shards'"),
    "tasks": ("", "folder of sets of questions, NAME.jsonl; without it, validation only"),
    "only": ("", "A,B: only these sets"),
    "fetch": (False, "first get the sets that the folder lacks from the Hugging Face Hub"),
    "max_per_task": (0, "questions of each set, always the same ones; 0: all", 0, 1 << 31),
    "shots": ("0", "solved questions before each, a number or core"),
    "max_len": (0, "tokens of a row at most; 0: the run's val.seq_len", 0, 1 << 20),
    "batch_tokens": (0, "of a batch, on each device; 0: 4096 on a CPU, else 65536", 0, 1 << 31),
    "out": ("", "file to which lines are added; without it, RUN/evaluate.jsonl"),
}

# ---- Prompts -------------------------------------------------------------------------------------


def seeded(text):
    """A file's name may be no UTF-8, of which random makes no seed."""
    return random.Random(text.encode(errors="surrogateescape"))


def prompts(task, place, shots):
    """[(before, after), ...] of the question at a place: what is scored is `after`.

    before: other questions of the set with their answers, then the context; no spaces at its end.
    """
    delimiter = "\nAnswer: " if task.name in ANSWER else " "
    count = len(task.questions)
    draw = seeded(f"{task.name} {place}").sample(range(count), min(shots + 1, count))
    shown = ""
    for other in [other for other in draw if other != place][:shots]:
        pairs, gold = task.questions[other]
        context, after = pairs[gold]
        shown += f"{context.rstrip()}{delimiter}{after.strip()}\n\n"
    found = []
    pairs, _ = task.questions[place]
    for context, after in pairs:
        whole = shown + context.rstrip() + delimiter
        before = whole.rstrip(" ")
        found.append((before, whole[len(before) :] + after.strip()))
    return found


def encode_pair(before, after, tokenizer, max_len):
    """(ids from BOS on, place of the first that is scored, whether it was cut).

    A long text is cut to BOS and its last max_len ids.
    """
    context = tokenizer.encode(before)
    whole = tokenizer.encode(before + after)
    first = 0
    while first < min(len(context), len(whole) - 1) and context[first] == whole[first]:
        first += 1
    over = max(0, len(whole) - max_len)
    return [tokenizer.bos_id, *whole[over:]], 1 + max(0, first - over), over > 0


# ---- Log-likelihoods -----------------------------------------------------------------------------


class Limits(NamedTuple):
    """How rows are put into batches."""

    max_len: int  # tokens of a row
    batch_tokens: int  # on each device
    num_devices: int


def make_scorer(mesh, cfg):
    """(params, tokens uint16 [B, T + 1], first [B]) -> (log-likelihood, misses), each [B].

    They are sums over the tokens of a row from place `first` on. A miss is not the likeliest.
    """
    specs = GPT.specs(cfg)

    def score(params, tokens_BT1, first_B):
        weights = train.unstack(train.gather(params, specs, mesh.size, cfg))
        batch = train.inputs_and_targets({"tokens": tokens_BT1}, cfg)
        tokens_BT = batch["tokens"]
        place_1T = jnp.arange(1, tokens_BT1.shape[1])[None]
        scored_BT = (batch["weights"] > 0) & (place_1T >= first_B[:, None])

        def sums(logits_TV, target_T, scored_T):
            likelihood_TV = jax.nn.log_softmax(logits_TV)
            likelihood_T1 = jnp.take_along_axis(likelihood_TV, target_T[:, None], axis=1)
            missed_T = scored_T & (jnp.argmax(logits_TV, axis=1) != target_T)
            return jnp.sum(jnp.where(scored_T, likelihood_T1[:, 0], 0)), jnp.sum(missed_T)

        return train.map_logits(sums, weights, tokens_BT, (batch["targets"], scored_BT), cfg)

    shares = train.partition(train.state_shardings(GPT, mesh, cfg).params)
    inputs = shares, P("data"), P("data")
    return train.on_devices(score, mesh, inputs, (P("data"), P("data")))


def batches(rows, limits):
    """Yield (places of rows, tokens uint16 [B, T + 1], first [B]) of rows (ids, first).

    Rows of about one length go together; B is the same for a T, and there are few T.
    """
    lengths = [32]
    while lengths[-1] < limits.max_len:
        lengths.append(min(2 * lengths[-1], limits.max_len))
    waiting = {length: [] for length in lengths}
    for place, (ids, _) in enumerate(rows):
        length = next(length for length in lengths if len(ids) - 1 <= length)
        waiting[length].append(place)
    for length, places in waiting.items():
        size = max(1, limits.batch_tokens // length) * limits.num_devices
        for start in range(0, len(places), size):
            chosen = places[start : start + size]
            tokens = np.full((size, length + 1), train.NO_TOKEN, np.uint16)
            first = np.zeros(size, np.int32)
            for i, place in enumerate(chosen):
                ids, first[i] = rows[place]
                tokens[i, : len(ids)] = ids
            yield chosen, tokens, first


def log_likelihoods(rows, score, limits):
    """(summed log-likelihoods, misses) of rows (ids, first), each [len(rows)].

    Raises NonFiniteLoss.
    """
    sums = np.zeros(len(rows))
    missed = np.zeros(len(rows), int)
    done = 0
    said = time.perf_counter()
    for chosen, tokens, first in batches(rows, limits):
        likelihood_B, missed_B = score(tokens, first)
        sums[chosen] = np.asarray(likelihood_B)[: len(chosen)]
        missed[chosen] = np.asarray(missed_B)[: len(chosen)]
        done += len(chosen)
        if time.perf_counter() - said > 30:
            said = time.perf_counter()
            print(f"{done} of {len(rows)} rows", flush=True)
    train.require_finite(sums.sum(), "a log-likelihood")
    return sums, missed


def judge(task, chosen, shots, tokenizer, score, limits):
    """Score the questions of a task at the places `chosen`: a dict for --out.

    Raises UsageError for a character that the tokenizer lacks, and NonFiniteLoss.
    """
    rows = []
    num_cut = 0
    of_shots = " or one shown before it" if shots else ""
    for place in chosen:
        for before, after in prompts(task, place, shots):
            try:
                ids, first, is_cut = encode_pair(before, after, tokenizer, limits.max_len)
            except UsageError as error:
                raise UsageError(f"{task.places[place]}{of_shots}: {error}") from error
            rows.append((ids, first))
            num_cut += is_cut
    sums, missed = log_likelihoods(rows, score, limits)
    means = sums / [len(ids) - first for ids, first in rows]
    right, chances = [], []
    begin = 0
    for place in chosen:
        pairs, gold = task.questions[place]
        own = means[begin : begin + len(pairs)]
        is_best = own == own.max()
        if task.form == "completion":
            right.append(float(missed[begin] == 0))
            chances.append(0.0)
        else:
            right.append(is_best[gold] / is_best.sum())
            chances.append(1 / len(pairs))
        begin += len(pairs)
    accuracy, chance = float(np.mean(right)), float(np.mean(chances))
    return {
        "form": task.form,
        "shots": shots,
        "n": len(chosen),
        "accuracy": accuracy,
        "chance": chance,
        "stderr": math.sqrt(accuracy * (1 - accuracy) / len(chosen)),
        "centered": (accuracy - chance) / (1 - chance),
        "rows": len(rows),
        "cut": num_cut,
    }


# ---- Validation ----------------------------------------------------------------------------------


def open_validation(trained, args):
    """([(path, tokens, targets)], SHA-256 of the tokens): what is scored. Raises UsageError.

    By default that is what the run itself scores; of --val_files all, or the first --val_tokens.
    """
    cfg = trained.cfg
    pattern = args.val_files or cfg.val_files or train.embedded_corpus()[1]
    wanted = "give others with --val_files, or --val_tokens=0 with --tasks"
    require(train.find_shards(pattern), f"no shards match {pattern}; {wanted}")
    shards = train.open_shards(pattern)
    train.check_same_tokenizer(shards.paths[0], shards.meta, trained.meta)
    asked = args.val_tokens
    if asked < 0:
        there = sum(len(tokens) - 1 for tokens in shards.tokens)
        asked = there if args.val_files else cfg.val_tokens
    require(asked, f"{shards.paths[0]}: holds no targets, wanted two tokens or more")
    left = asked
    parts = []
    digest = hashlib.sha256()
    for path, tokens, _ in shards.rows():
        count = min(left, len(tokens) - 1)
        if count:
            largest = int(tokens[: count + 1].max())
            outside = f"{path}: holds token {largest}, the model's vocabulary has {cfg.vocab_size}"
            require(largest < cfg.vocab_size, outside)
            digest.update(tokens[: count + 1])
            parts.append((path, tokens, count))
            left -= count
    said = f"{shards.paths[0]}: too short for {asked} targets; {asked - left} fit"
    require(not left, f"{said}: --val_tokens={asked - left}")
    return parts, digest.hexdigest()


def validation_rows(parts, cfg):
    """Yield the rows of each part as the trainer cuts them."""
    for path, tokens, count in parts:
        shard = train.Shards([path], [tokens], {})
        yield from train.plan_val(shard, replace(cfg, val_tokens=count))


def validate(parts, params, mesh, cfg, token_bytes=None):
    """A dict for --out: nats per target by the trainer's evaluation step, bits per byte of text.

    bits_per_byte is None without token_bytes, and where no target is text. Raises NonFiniteLoss.
    """
    cfg = replace(cfg, val_tokens=max(count for _, _, count in parts))  # of the largest, for its B
    options = train.compiler_options(mesh, cfg)  # as the trainer rounds
    step = jax.jit(train.make_eval_step(GPT, mesh, cfg), compiler_options=options)
    _, size, _ = train.batch_shape(cfg.val, mesh.size, cfg)
    micro_step = replace(cfg.val, batch_tokens=size * cfg.val.seq_len)

    def add_up(weight_V):
        """(summed nats, number) of the targets of all rows, each by its id's weight, 0 or 1."""
        rows = validation_rows(parts, cfg)
        nats, total = 0.0, 0
        while some := list(itertools.islice(rows, size)):
            batch = train.to_devices(some, micro_step, mesh, cfg)
            weights = weight_V[np.asarray(batch["tokens"])[..., 1:]]
            batch["weights"] = jax.device_put(weights, batch["tokens"].sharding)
            more, scored = step(params, batch)
            nats += float(more)
            total += int(scored)
        return train.require_finite(nats, "the validation loss"), total

    num_ids = 1 << 16
    nats, total = add_up(np.ones(num_ids, np.float32))
    wanted = sum(count for _, _, count in parts)
    assert total == wanted, f"{total} targets scored, wanted {wanted}"
    bits = None
    if token_bytes is not None:
        bytes_V = np.zeros(num_ids, int)
        bytes_V[: len(token_bytes)] = token_bytes
        num_bytes = sum(int(bytes_V[tokens[1 : count + 1]].sum()) for _, tokens, count in parts)
        if num_bytes:
            text_nats, _ = add_up(np.float32(bytes_V > 0))
            bits = text_nats / math.log(2) / num_bytes
    return {"val_loss": nats / total, "val_tokens": total, "bits_per_byte": bits}


def loss_of_run(trained):
    """The validation loss that the run itself wrote at this step; None where it wrote none."""
    file = trained.folder.parent.parent / "metrics.jsonl"
    with contextlib.suppress(*READING):
        for line in reversed(file.read_text(encoding="utf-8").splitlines()):
            row = json.loads(line)
            if row["step"] == trained.step and "val_loss" in row:
                return float(row["val_loss"])
    return None


# ---- Results -------------------------------------------------------------------------------------


BEGIN = b'{"key": ['  # of each line that evaluate writes
LOSSES = {"val_loss": float, "val_tokens": int, "bits_per_byte": float | None}
SCORES = {"form": str} | dict.fromkeys(("shots", "n", "rows", "cut"), int)
SCORES |= dict.fromkeys(("accuracy", "chance", "stderr", "centered"), float)


class Results:
    """The lines of --out. New ones are added behind what is there, of which nothing changes."""

    def __init__(self, path, weights, shared):
        """weights: their SHA-256. shared: what every new line says. Raises UsageError."""
        self.path, self.weights, self.shared = path, weights, shared
        self.lines = []
        require(path.parent.is_dir(), f"--out={path}: {path.parent} is no folder")
        if not path.exists():
            return
        require(path.is_file(), f"--out={path}: wanted a file")
        with usage_errors(f"--out={path}: cannot be read", OSError):
            blob = path.read_bytes()
        is_ours = BEGIN.startswith(blob[: len(BEGIN)])
        require(is_ours, f"--out={path}: begins with other lines than evaluate's, so it is left")
        for line in blob.split(b"\n"):
            with contextlib.suppress(*READING):  # a kill may have cut one
                self.lines.append(dict(json.loads(line)))

    def get(self, name, what, kinds, compute):
        """(the line of these weights, this name and this, whether it was there).

        Where it was not, compute() makes its numbers, of these kinds.
        """
        key = [SCORING, self.weights, name, *what]
        kinds = kinds | {"seconds": float}
        for line in self.lines:
            are_ours = (isinstance(line.get(field), kind) for field, kind in kinds.items())
            if line.get("key") == key and all(are_ours):
                return line | {"name": name}, True
        began = time.perf_counter()
        numbers = compute()
        seconds = round(time.perf_counter() - began, 1)
        line = {"key": key, "name": name} | self.shared | numbers | {"seconds": seconds}
        self.lines.append(line)
        with usage_errors(f"--out={self.path}: cannot be written", OSError):
            add_line(self.path, json.dumps(line))
        return line, False


def add_line(path, text):
    """Add a line to a file, whole or not at all. Raises OSError."""
    with open(path, "a+b", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 1))
        is_cut = file.read(1) not in (b"", b"\n")  # by a kill
        blob = b"\n" * is_cut + text.encode() + b"\n"
        if file.write(blob) < len(blob):
            file.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def print_table(lines):
    print("\n| set | form | questions | accuracy | chance | centered | cut |")
    print("|---|---|---|---|---|---|---|")
    for row in lines:
        shots = f", {row['shots']} shots" if row["shots"] else ""
        accuracy = f"{row['accuracy']:.3f} ± {row['stderr']:.3f} | {row['chance']:.3f}"
        cut = f"{row['cut']} of {row['rows']}"
        what = f"{row['name']} | {row['form']}{shots} | {row['n']}"
        print(f"| {what} | {accuracy} | {row['centered']:+.3f} | {cut} |")


# ---- Command line --------------------------------------------------------------------------------


def parse(argv):
    """Raises UsageError."""
    args = read_args(argv, __doc__, FLAGS)
    require(args.checkpoint, "--checkpoint: wanted a run's folder")
    is_shots = re.fullmatch(r"core|\d{1,4}", args.shots)
    require(is_shots, f"--shots={args.shots}: wanted a number below 10,000 or core")
    lacks_tasks = not args.tasks and (args.fetch or args.only)
    require(not lacks_tasks, "--fetch and --only want --tasks=DIR, the folder of the sets")
    something = args.tasks or args.val_tokens
    require(something, "--val_tokens=0 without --tasks leaves nothing to do")
    return args


def report_validation(trained, params, mesh, results, args):
    """Print loss and bits per byte, computed or from --out. Returns them."""
    parts, digest = open_validation(trained, args)
    token_bytes, identity = None, None
    lacking = "no target is text"
    try:
        tokenizer = trained.tokenizer(args.tokenizer)
        token_bytes, identity = tokenizer.token_bytes, tokenizer.sha256
    except UsageError as error:
        file = trained.tokenizer_folder(args.tokenizer) / trained.meta["tokenizer"]
        is_missing = isinstance(error.__cause__, ImportError) or not os.path.lexists(file)
        if args.tokenizer or not is_missing:
            raise
        lacking = str(error)

    def compute():
        return validate(parts, params, mesh, trained.cfg, token_bytes)

    what = [identity, digest, sum(count for _, _, count in parts)]
    line, was_there = results.get("validation", what, LOSSES, compute)
    bits = f"no bits per byte ({lacking})"
    if line["bits_per_byte"] is not None:
        bits = f"{line['bits_per_byte']:.6f} bits per byte"
    of_what = f"of {line['val_tokens']} targets in {line['seconds']} s"
    said = " (was there)" if was_there else ""
    before = loss_of_run(trained)
    if before is not None and not args.val_files and args.val_tokens < 0:
        said += f"; the run wrote {before:.6f}"
    print(f"validation: {line['val_loss']:.6f} nats per token, {bits}, {of_what}{said}", flush=True)
    return {name: line[name] for name in ("val_loss", "bits_per_byte", "val_tokens")}


def report_tasks(tasks, trained, params, mesh, results, args):
    """Print a line per set and the table of all. Returns accuracies and their centered mean."""
    tokenizer = trained.tokenizer(args.tokenizer)
    scorer = make_scorer(mesh, trained.cfg)
    batch_tokens = 4096 if jax.default_backend() == "cpu" else 65536
    max_len = args.max_len or trained.cfg.val.seq_len
    limits = Limits(max_len, args.batch_tokens or batch_tokens, mesh.size)

    def score(tokens, first):
        return scorer(params, tokens, first)

    lines = []
    for task in tasks:
        places = range(len(task.questions))
        count = min(args.max_per_task or len(places), len(places))
        chosen = sorted(seeded(task.name).sample(places, count))
        shots = CORE_SHOTS.get(task.name, 0) if args.shots == "core" else int(args.shots)

        def compute(task=task, chosen=chosen, shots=shots):
            return judge(task, chosen, shots, tokenizer, score, limits)

        what = [tokenizer.sha256, task.sha256, count, shots, max_len]
        line, was_there = results.get(task.name, what, SCORES, compute)
        said = "was there" if was_there else f"{line['seconds']} s"
        print(f"{task.name}: accuracy {line['accuracy']:.3f} of {line['n']}, {said}", flush=True)
        lines.append(line)
    print_table(lines)
    mean = sum(line["centered"] for line in lines) / len(lines)
    print(f"| **mean** of {len(lines)} | | | | | **{mean:+.4f}** | |\n")
    return {"mean_centered": mean, "sets": {line["name"]: line["accuracy"] for line in lines}}


def main(argv=None):
    """Returns the summary that is printed last. Raises UsageError and NonFiniteLoss."""
    args = parse(sys.argv[1:] if argv is None else argv)
    if args.fetch:
        fetch(Path(args.tasks))
    names = [name for name in args.only.split(",") if name]
    tasks = read_tasks(args.tasks, names) if args.tasks else []
    trained = open_checkpoint(args.checkpoint)
    mesh = train.make_mesh()
    params = jax.device_put(trained.params, train.state_shardings(GPT, mesh, trained.cfg).params)
    print(f"{trained.folder}, on {mesh.size} x {jax.devices()[0].device_kind}", flush=True)
    run = trained.folder.parent.parent
    is_in_run = trained.folder.parent.name == "ckpt"
    require(args.out or is_in_run, f"{trained.folder}: in no run's folder; wanted --out=FILE")
    path = Path(args.out) if args.out else run / "evaluate.jsonl"
    weights = train.file_sha256(trained.folder / "params.safetensors")
    results = Results(path, weights, {"run": run.name, "step": trained.step})
    summary = {"checkpoint": str(trained.folder), "step": trained.step}
    if args.val_tokens != 0:
        with memory_errors("the run's rows are too large here; --val_tokens=0 leaves them out"):
            summary |= report_validation(trained, params, mesh, results, args)
    if tasks:
        with memory_errors("lower --batch_tokens, down to one row of --max_len"):
            summary |= report_tasks(tasks, trained, params, mesh, results, args)
    print(json.dumps(summary), flush=True)
    return summary


if __name__ == "__main__":
    sys.exit(train.command(main))
