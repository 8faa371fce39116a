"""How good is a trained model? Validation loss, bits per byte, accuracy on sets of questions.

    python -m scripts.evaluate --checkpoint=logs/RUN     the trainer's own validation loss once more
    python -m scripts.evaluate --checkpoint=logs/RUN --val_files='mine/val_*.bin'    other shards
    python -m scripts.evaluate --checkpoint=logs/RUN --tasks=evals --fetch    get and score 11 sets
    python -m scripts.evaluate --checkpoint=logs/RUN --tasks=evals --max_per_task=100 --val_tokens=0

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
22; CORE centers BoolQ at 0.62, the share of "yes". Results are lines of --out; what is there for
these weights, data and flags is kept.

--fetch gets HellaSwag, LAMBADA, ARC (two), PIQA, WinoGrande, WSC, COPA, CommonsenseQA, OpenBookQA
and BoolQ; it wants the package pyarrow.
"""

import contextlib
import hashlib
import itertools
import json
import math
import random
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

import train
from scripts.sample import open_checkpoint
from scripts.text import package, read_args, usage_errors
from train import GPT, UsageError, replace, require

SCORING = 1  # to be raised when a change of this file moves a score: older lines count no more
FORMS = {
    "multiple choice": ("query", "choices", "gold"),
    "schema": ("context_options", "continuation", "gold"),
    "completion": ("context", "continuation"),
}
ANSWER = ("arc_easy", "arc_challenge", "piqa", "boolq")  # whose answers follow "\nAnswer: "
CORE_SHOTS = dict.fromkeys((*ANSWER, "hellaswag", "commonsense_qa"), 10)  # 0 for the others
FLAGS = {
    "checkpoint": ("", "a run's folder, or its ckpt/step-NNNNNN"),
    "val_files": ("", "glob of validation shards; without it, the run's own"),
    "val_tokens": (
        -1,
        "targets to score, 0 for none; -1: as many as the run scores, of --val_files all",
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
    "out": ("", "where the lines are; without it, RUN/evaluate.jsonl"),
}

# ---- Sets of questions ---------------------------------------------------------------------------


class Task(NamedTuple):
    name: str
    form: str
    questions: list  # of ([(context, continuation), ...], the right one's place)
    sha256: str  # of the file


def parse_row(row):
    """(form, question) of a line. Raises ValueError."""
    forms = [form for form, keys in FORMS.items() if set(keys) <= set(row)]
    if not forms:
        wanted = ", or ".join(", ".join(keys) for keys in FORMS.values())
        raise ValueError(f"wanted the keys {wanted}")
    form = forms[0]
    if form == "completion":
        return form, ([text_pair(row["context"], row["continuation"])], 0)
    if form == "schema":
        many = row["context_options"]
        pairs = [text_pair(context, row["continuation"]) for context in many]
    else:
        many = row["choices"]
        pairs = [text_pair(row["query"], choice) for choice in many]
    gold = row["gold"]
    are_many = isinstance(many, list) and len(many) > 1
    if not are_many or type(gold) is not int or not 0 <= gold < len(many):
        raise ValueError("wanted two to choose from, and as gold the right one's place, from 0")
    return form, (pairs, gold)


def text_pair(context, continuation):
    are_texts = isinstance(context, str) and isinstance(continuation, str)
    if not are_texts or not continuation.strip():
        raise ValueError("wanted texts, and no empty continuation")
    return context, continuation


def read_task(path):
    """The Task of a .jsonl file. Raises UsageError, naming the line."""
    with usage_errors(f"{path}: cannot be read"):
        lines = path.read_text(encoding="utf-8").split("\n")
    questions = []
    the_form = None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        here = f"{path}, line {number}"
        with usage_errors(f"{here}: damaged"):
            form, question = parse_row(json.loads(line))
        the_form = the_form or form
        require(form == the_form, f"{here}: a {form}, wanted one form in a file, here {the_form}")
        questions.append(question)
    require(questions, f"{path}: holds no questions; delete it, and --fetch gets the Hub's")
    return Task(path.stem, the_form, questions, train.file_sha256(path))


def read_tasks(folder, names):
    """The named Tasks of a folder; without names, every one. Raises UsageError."""
    found = {path.stem: path for path in sorted(Path(folder).glob("*.jsonl"))}
    require(found, f"--tasks={folder}: no *.jsonl there; --fetch gets them from the Hub")
    for name in names:
        known = ", ".join(found)
        require(name in found, f"--tasks={folder}: no {name}.jsonl there, only {known}")
    return [read_task(found[name]) for name in names or found]


def prompts(task, place, shots):
    """[(before, after), ...] of the question at a place: what is scored is `after`.

    before: other questions of the set with their answers, then the context; no spaces at its end.
    """
    delimiter = "\nAnswer: " if task.name in ANSWER else " "
    count = len(task.questions)
    draw = random.Random(f"{task.name} {place}").sample(range(count), min(shots + 1, count))
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
    cfg = replace(cfg, attention="xla")
    specs = GPT.specs(cfg)

    def score(params, tokens_BT1, first_B):
        weights = train.unstack(train.gather(params, specs, mesh.size, cfg))
        batch = train.inputs_and_targets({"tokens": tokens_BT1}, cfg)
        tokens_BT = batch["tokens"]
        x_BTD = train.forward(weights, tokens_BT, weights["embed"][tokens_BT], cfg.val, cfg)
        place_1T = jnp.arange(1, tokens_BT1.shape[1])[None]
        scored_BT = (batch["weights"] > 0) & (place_1T >= first_B[:, None])

        def sums(row):  # one at a time: its logits fit into memory
            x_TD, target_T, scored_T = row
            logits_TV = train.softcapped_logits(x_TD, weights["head"], cfg)
            likelihood_TV = jax.nn.log_softmax(logits_TV)
            likelihood_T1 = jnp.take_along_axis(likelihood_TV, target_T[:, None], axis=1)
            missed_T = scored_T & (jnp.argmax(logits_TV, axis=1) != target_T)
            return jnp.sum(jnp.where(scored_T, likelihood_T1[:, 0], 0)), jnp.sum(missed_T)

        return lax.map(sums, (x_BTD, batch["targets"], scored_BT))

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
    """Score the questions of a task at the places `chosen`: a dict for --out."""
    rows = []
    num_cut = 0
    for place in chosen:
        for before, after in prompts(task, place, shots):
            ids, first, is_cut = encode_pair(before, after, tokenizer, limits.max_len)
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
    theirs, ours = shards.meta, trained.meta
    require(theirs == ours, f"{shards.paths[0]}: made with {theirs}, but the model with {ours}")
    asked = args.val_tokens
    if asked < 0:
        there = sum(len(tokens) - 1 for tokens in shards.tokens)
        asked = there if args.val_files else cfg.val_tokens
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

    bits_per_byte is None without token_bytes. Raises NonFiniteLoss.
    """
    cfg = replace(cfg, val_tokens=max(count for _, _, count in parts))  # of the largest, for its B
    step = train.make_eval_step(GPT, mesh, cfg)
    _, size, _ = train.batch_shape(cfg.val, mesh.size, cfg)
    micro_step = replace(cfg.val, batch_tokens=size * cfg.val.seq_len)
    rows = validation_rows(parts, cfg)
    nats, total = 0.0, 0
    while some := list(itertools.islice(rows, size)):
        more, scored = step(params, train.to_devices(some, micro_step, mesh, cfg))
        nats += float(more)
        total += int(scored)
    wanted = sum(count for _, _, count in parts)
    assert total == wanted, f"{total} targets scored, wanted {wanted}"
    loss = train.require_finite(nats / total, "the validation loss")
    bits = None
    if token_bytes is not None:
        num_bytes = sum(token_bytes[tokens[1 : count + 1]].sum() for _, tokens, count in parts)
        bits = nats / math.log(2) / max(1, int(num_bytes))
    return {"val_loss": loss, "val_tokens": total, "bits_per_byte": bits}


def loss_of_run(trained):
    """The validation loss that the run itself wrote at this step; None where it wrote none."""
    file = trained.folder.parent.parent / "metrics.jsonl"
    with contextlib.suppress(OSError, ValueError):
        for line in reversed(file.read_text().splitlines()):
            row = json.loads(line)
            if row["step"] == trained.step and "val_loss" in row:
                return row["val_loss"]
    return None


# ---- Results -------------------------------------------------------------------------------------


class Results:
    """The lines of --out. One that a kill cut short is passed over."""

    def __init__(self, path, weights, shared):
        """weights: their SHA-256. shared: what every new line says."""
        self.path, self.weights, self.shared = path, weights, shared
        self.lines = []
        if path.exists():
            with usage_errors(f"--out={path}: cannot be read"):
                written = path.read_text().splitlines()
            for line in written:
                with contextlib.suppress(ValueError, TypeError):
                    self.lines.append(dict(json.loads(line)))

    def get(self, name, what, compute):
        """(the line of these weights, this name and this, whether it was there).

        Where it was not, compute() makes its numbers.
        """
        key = [SCORING, self.weights, name, *what]
        for line in self.lines:
            if line.get("key") == key:
                return line, True
        began = time.perf_counter()
        numbers = compute()
        seconds = round(time.perf_counter() - began, 1)
        line = {"key": key, "name": name} | self.shared | numbers | {"seconds": seconds}
        self.lines.append(line)
        text = "".join(json.dumps(line) + "\n" for line in self.lines)
        with usage_errors(f"--out={self.path}: cannot be written"):
            train.write_file(self.path, text.encode())
        return line, False


def print_table(lines):
    print("\n| set | form | questions | accuracy | chance | centered | cut |")
    print("|---|---|---|---|---|---|---|")
    for row in lines:
        shots = f", {row['shots']} shots" if row["shots"] else ""
        accuracy = f"{row['accuracy']:.3f} ± {row['stderr']:.3f} | {row['chance']:.3f}"
        cut = f"{row['cut']} of {row['rows']}"
        what = f"{row['name']} | {row['form']}{shots} | {row['n']}"
        print(f"| {what} | {accuracy} | {row['centered']:+.3f} | {cut} |")


# ---- Sets of the Hub -----------------------------------------------------------------------------
# Read are the Parquet files that the Hub itself makes of a dataset; a row becomes a line of one of
# the three forms, its text put as CORE's sets have it. The datasets' own terms hold. Not yet run
# against the Hub, only against a stand-in: names of datasets and columns are as their cards give
# them.


def choice_line(query, choices, gold):
    return {"query": query, "choices": list(choices), "gold": int(gold)}


def schema_line(contexts, continuation, gold):
    return {"context_options": contexts, "continuation": continuation.strip(), "gold": int(gold)}


def by_label(row):
    """The place of the answer among the choices' labels."""
    return row["choices"]["label"].index(row["answerKey"])


def hellaswag(row):
    return choice_line(row["ctx"], row["endings"], row["label"])


def last_word(row):
    context, word = row["text"].rstrip().rsplit(" ", 1)
    return {"context": context, "continuation": word}


def arc(row):
    return choice_line(f"Question: {row['question']}", row["choices"]["text"], by_label(row))


def piqa(row):
    return choice_line(f"Question: {row['goal']}\n", [row["sol1"], row["sol2"]], row["label"])


def winogrande(row):
    before, after = row["sentence"].split("_")
    contexts = [before + row["option1"], before + row["option2"]]
    return schema_line(contexts, after, int(row["answer"]) - 1)


def winograd(row):
    begin = row["pronoun_loc"]
    end = begin + len(row["pronoun"])
    contexts = [row["text"][:begin] + option for option in row["options"]]
    return schema_line(contexts, row["text"][end:], row["label"])


def copa(row):
    word = {"cause": "because", "effect": "therefore"}[row["question"]]
    choices = [row[key][:1].lower() + row[key][1:] for key in ("choice1", "choice2")]
    return choice_line(f"{row['premise'].strip().rstrip('.')}, {word}", choices, row["label"])


def commonsense(row):
    """As it is asked there: which letter?"""
    labels = row["choices"]["label"]
    query = f"Question: {row['question']}\nChoices:\n"
    for label, words in zip(labels, row["choices"]["text"], strict=True):
        query += f"{label}. {words}\n"
    return choice_line(f"{query}Answer:", labels, by_label(row))


def openbook(row):
    return choice_line(row["question_stem"], row["choices"]["text"], by_label(row))


def boolq(row):
    query = f"Passage: {row['passage']}\nQuestion: {row['question']}?"
    return choice_line(query, ["no", "yes"], row["answer"])


SETS = {  # name: (dataset, its Parquet file, row of the dataset -> line of the set)
    "hellaswag": ("Rowan/hellaswag", "default/validation", hellaswag),
    "lambada_openai": ("EleutherAI/lambada_openai", "default/test", last_word),
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy/test", arc),
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge/test", arc),
    "piqa": ("ybisk/piqa", "plain_text/validation", piqa),
    "winogrande": ("allenai/winogrande", "winogrande_xl/validation", winogrande),
    "winograd_wsc": ("ErnestSDavis/winograd_wsc", "wsc273/test", winograd),
    "copa": ("aps/super_glue", "copa/validation", copa),
    "commonsense_qa": ("tau/commonsense_qa", "default/validation", commonsense),
    "openbook_qa": ("allenai/openbookqa", "main/test", openbook),
    "boolq": ("google/boolq", "default/validation", boolq),
}


def fetch_set(name, folder):
    """Write folder/NAME.jsonl, whole or not at all. Raises UsageError."""
    from huggingface_hub import hf_hub_download

    parquet = package("pyarrow.parquet", "--fetch")
    repo, part, convert = SETS[name]
    file = f"{part}/0000.parquet"
    with usage_errors(f"{name}: {file} of {repo}", Exception):
        made = "refs/convert/parquet"
        path = hf_hub_download(repo, file, repo_type="dataset", revision=made)
        rows = parquet.read_table(path).to_pylist()
        lines = [json.dumps(convert(row), ensure_ascii=False) + "\n" for row in rows]
    train.write_file(folder / f"{name}.jsonl", "".join(lines).encode())
    print(f"{name}: {len(lines)} questions of {repo}", flush=True)


def fetch(folder, names=tuple(SETS)):
    """Write the sets that a folder lacks. Raises UsageError where one failed, after all others."""
    folder.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in names:
        if not (folder / f"{name}.jsonl").exists():
            try:
                fetch_set(name, folder)
            except UsageError as error:
                print(error, flush=True)
                failed.append(str(error))
    said = f"{len(failed)} sets could not be had, the first: {''.join(failed[:1])}"
    require(not failed, f"{said}; what is in {folder} scores without --fetch")


# ---- Command line --------------------------------------------------------------------------------


def parse(argv):
    """Raises UsageError."""
    args = read_args(argv, __doc__, FLAGS)
    require(args.checkpoint, "--checkpoint: wanted a run's folder")
    is_shots = args.shots == "core" or args.shots.isdecimal()
    require(is_shots, f"--shots={args.shots}: wanted a number or core")
    lacks_tasks = not args.tasks and (args.fetch or args.only)
    require(not lacks_tasks, "--fetch and --only want --tasks=DIR, the folder of the sets")
    something = args.tasks or args.val_tokens
    require(something, "--val_tokens=0 without --tasks leaves nothing to do")
    return args


def report_validation(trained, params, mesh, results, args):
    """Print loss and bits per byte, computed or from --out. Returns them."""
    parts, digest = open_validation(trained, args)
    token_bytes, lacking = None, ""
    try:
        token_bytes = trained.tokenizer(args.tokenizer).token_bytes
    except UsageError as error:
        if args.tokenizer:
            raise
        lacking = str(error)

    def compute():
        return validate(parts, params, mesh, trained.cfg, token_bytes)

    what = [digest, sum(count for _, _, count in parts), not lacking]
    line, was_there = results.get("validation", what, compute)
    bits = f"no bits per byte ({lacking})"
    if not lacking:
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
        chosen = sorted(random.Random(task.name).sample(places, count))
        shots = CORE_SHOTS.get(task.name, 0) if args.shots == "core" else int(args.shots)

        def compute(task=task, chosen=chosen, shots=shots):
            return judge(task, chosen, shots, tokenizer, score, limits)

        what = [task.sha256, count, shots, max_len]
        line, was_there = results.get(task.name, what, compute)
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
    path = Path(args.out) if args.out else run / "evaluate.jsonl"
    weights = train.file_sha256(trained.folder / "params.safetensors")
    results = Results(path, weights, {"run": run.name, "step": trained.step})
    summary = {"checkpoint": str(trained.folder), "step": trained.step}
    if args.val_tokens != 0:
        summary |= report_validation(trained, params, mesh, results, args)
    if tasks:
        summary |= report_tasks(tasks, trained, params, mesh, results, args)
    print(json.dumps(summary), flush=True)
    return summary


if __name__ == "__main__":
    sys.exit(train.command(main))
