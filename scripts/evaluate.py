"""How good is a trained model? Validation loss and bits per byte on any shards, and accuracy on sets of questions.

    python -m scripts.evaluate --checkpoint=logs/RUN     the trainer's own validation loss once more, in bits per byte too
    python -m scripts.evaluate --checkpoint=logs/RUN --val_files='mine/val_*.bin'     all targets of other shards
    python -m scripts.evaluate --checkpoint=logs/RUN --tasks=evals --fetch     get eleven sets into evals/, score them all
    python -m scripts.evaluate --checkpoint=logs/RUN --tasks=evals --max_per_task=100 --val_tokens=0     a quick look

A set is DIR/NAME.jsonl, one question per line, every line of a file in the same one of three forms:
    multiple choice  {"query": "...", "choices": ["...", "..."], "gold": 0}
                     right: of all choices, the tokens of this one have the greatest mean log-likelihood after the query.
                     HellaSwag's own keys ctx, endings, label will do
    schema           {"context_options": ["...", "..."], "continuation": "...", "gold": 0}
                     right: the continuation's mean log-likelihood is the greatest after this context
    completion       {"context": "...", "continuation": "..."}
                     right: each token of the continuation is the likeliest
A context without the spaces at its end, a delimiter and the continuation are encoded as one text behind a BOS; scored are
the tokens from where it departs from the context's own encoding. The delimiter is a space, before the answers of ARC, PIQA
and BoolQ "\\nAnswer: ". Of several choices that are best alike each gets its share. --shots=N puts N other questions of the
set with their answers before each; --shots=core as many as CORE does (arXiv:2406.11794): 10, but none for COPA, OpenBookQA,
LAMBADA, WSC and WinoGrande. What is longer than --max_len is cut from the left, and counted.

Centered accuracy is (accuracy - chance) / (1 - chance), chance one by the number of choices, 0 for a completion. The mean
over the sets is in the manner of CORE, but of these sets and not of its 22; CORE centers BoolQ at 0.62, the share of "yes".
Results are lines of --out, by default RUN/evaluate.jsonl; what is there for these weights, data and flags is kept.
Exit codes: 0, 2 flags, data or checkpoint, 5 a loss that is not finite, 130 interrupted.
"""
import argparse, contextlib, hashlib, json, math, random, sys, time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.sharding import PartitionSpec as P

import train
from scripts import eval_sets, text
from scripts.checkpoint import open_checkpoint
from scripts.text import usage_errors
from train import GPT, NonFiniteLoss, UsageError, replace

SCORING = 1  # to be raised when a change of this file moves a score: older lines of --out count no more
FORMS = {"multiple choice": ("query", "choices", "gold"), "schema": ("context_options", "continuation", "gold"),
         "completion": ("context", "continuation")}
HELLASWAG = {"ctx": "query", "endings": "choices", "label": "gold"}
ANSWER = ("arc_easy", "arc_challenge", "piqa", "boolq")  # sets whose answers follow "\nAnswer: "
CORE_SHOTS = dict.fromkeys((*ANSWER, "hellaswag", "hellaswag_val", "commonsense_qa"), 10)  # 0 for the others

class Task(NamedTuple):
    """questions: ([(context, continuation), ...], the right one's place). sha256: of the file."""
    name: str
    form: str
    questions: list
    sha256: str

# ---- Sets of questions ----

def parse_row(row):
    """(form, question) of a line. Raises ValueError."""
    def need(ok, wanted):
        if not ok:
            raise ValueError(wanted)
    need(isinstance(row, dict), "wanted an object")
    row = {HELLASWAG.get(key, key): value for key, value in row.items()}
    form = next((form for form, keys in FORMS.items() if row.keys() >= {*keys}), None)
    need(form, "wanted the keys " + ", or ".join(", ".join(keys) for keys in FORMS.values()))
    many = row.get("choices" if form == "multiple choice" else "context_options", [""])
    need(isinstance(many, list), "wanted a list of choices or contexts")
    pairs = {"multiple choice": lambda: [(row["query"], choice) for choice in many],
             "schema": lambda: [(context, row["continuation"]) for context in many],
             "completion": lambda: [(row["context"], row["continuation"])]}[form]()
    need(all(isinstance(part, str) for pair in pairs for part in pair) and all(after.strip() for _, after in pairs),
         "wanted texts, and no empty continuation")
    gold = row.get("gold", 0)
    need(form == "completion" or len(pairs) > 1 and type(gold) is int and 0 <= gold < len(pairs),
         "wanted at least two to choose from, and as gold or label the right one's place, from 0")
    return form, (pairs, 0 if form == "completion" else gold)

def read_task(path):
    """The Task of a .jsonl file. Raises UsageError, naming the line."""
    with usage_errors(f"{path}: cannot be read"):
        lines = path.read_text(encoding="utf-8").split("\n")
    forms, questions = [], []
    for number, line in enumerate(lines, 1):
        if line.strip():
            with usage_errors(f"{path}, line {number}: damaged"):
                form, question = parse_row(json.loads(line))
            if forms and form != forms[0]:
                raise UsageError(f"{path}, line {number}: a {form}, but the lines before are {forms[0]}; wanted one form in a file")
            forms.append(form)
            questions.append(question)
    if not questions:
        raise UsageError(f"{path}: holds no questions; delete it, and --fetch gets the sets that the Hub has")
    return Task(path.stem, forms[0], questions, train.file_sha256(path))

def read_tasks(folder, names):
    """Every Task of a folder, or the named ones. Raises UsageError."""
    found = {path.stem: path for path in sorted(Path(folder).glob("*.jsonl"))}
    if not found or (unknown := sorted({*names} - {*found})):
        raise UsageError(f"--tasks={folder}: no {unknown[0] if found else '*'}.jsonl there"
                         + (f", only {', '.join(found)}" if found else "; --fetch gets them from the Hub"))
    return [read_task(found[name]) for name in names or found]

def prompts(task, i, shots):
    """[(before, after), ...] of question i: the text before, other questions of the set with their answers first, has no
    spaces at its end, and after is what is scored."""
    delimiter, count = "\nAnswer: " if task.name in ANSWER else " ", len(task.questions)
    others = random.Random(f"{task.name} {i}").sample(range(count), min(shots + 1, count))
    solved = [task.questions[j][0][task.questions[j][1]] for j in [j for j in others if j != i][:shots]]
    shown = "".join(f"{context.rstrip()}{delimiter}{after.strip()}\n\n" for context, after in solved)
    before = [shown + context.rstrip() + delimiter for context, _ in task.questions[i][0]]
    return [(text.rstrip(" "), text[len(text.rstrip(" ")):] + after.strip()) 
            for text, (_, after) in zip(before, task.questions[i][0])]

def encode_pair(before, after, tokenizer, max_len):
    """(ids from BOS on, place of the first that is scored, whether it was cut to BOS and the last max_len ids)."""
    whole = tokenizer.encode(before + after)
    same = [a == b for a, b in zip(tokenizer.encode(before), whole)]
    first = min(same.index(False) if False in same else len(same), len(whole) - 1)
    over = max(0, len(whole) - max_len)
    return [tokenizer.bos_id, *whole[over:]], 1 + max(0, first - over), over > 0

# ---- Log-likelihoods ----

def make_scorer(mesh, cfg):
    """(params, tokens uint16 [B, T + 1], first [B]) -> (summed log-likelihood of the tokens from place `first` of the row on,
    how many of them are not the likeliest), each [B]. Only what is scored gets logits."""
    cfg, size = replace(cfg, attention="xla"), 256
    def score_on_device(params, tokens_BT1, first_B):
        weights = train.unstack(train.gather(params, train.param_specs(cfg), mesh.size, cfg))
        batch = train.inputs_and_targets({"tokens": tokens_BT1}, cfg)
        tokens_BT, target_BT = batch["tokens"], batch["targets"]
        length = tokens_BT.shape[1]
        x_BTD = train.forward(weights, tokens_BT, weights["embed"][tokens_BT], cfg.val, cfg)
        x_ND = rearrange(x_BTD, "B T D -> (B T) D")
        scored_N = ((batch["weights"] > 0) & (jnp.arange(1, length + 1)[None] >= first_B[:, None])).ravel()
        place_N = jnp.nonzero(scored_N, size=len(scored_N) + size, fill_value=0)[0]
        def block(i, totals):
            at_N = jax.lax.dynamic_slice(place_N, [i * size], [size])
            here_N = i * size + jnp.arange(size) < scored_N.sum()
            logits_NV, target_N = train.softcapped_logits(x_ND[at_N], weights["head"], cfg), target_BT.ravel()[at_N]
            likelihood_N = jax.nn.log_softmax(logits_NV)[jnp.arange(size), target_N]
            missed_N = jnp.argmax(logits_NV, axis=1) != target_N
            return tuple(total_B.at[at_N // length].add(jnp.where(here_N, z_N, 0))
                         for total_B, z_N in zip(totals, (likelihood_N, missed_N.astype(jnp.int32))))
        zeros = jnp.zeros(len(first_B)), jnp.zeros(len(first_B), jnp.int32)
        return jax.lax.fori_loop(0, -(-scored_N.sum() // size), block, zeros)
    shares = train.partition(train.state_shardings(GPT, mesh, cfg).params), P("data"), P("data")
    return train.on_devices(score_on_device, mesh, shares, (P("data"), P("data")))

def lengths(max_len):
    """The few lengths of row that programs are compiled for."""
    return [32 << i for i in range(max_len.bit_length()) if 32 << i < max_len] + [max_len]

def batches(rows, max_len, batch_tokens, num_devices):
    """Yield (places of rows, tokens uint16 [B, T + 1], first [B]): rows (ids, first) of about one length, B the same for a T."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    for shorter, length in zip([0, *lengths(max_len)], lengths(max_len)):
        inside = [i for i in order if shorter < len(rows[i][0]) - 1 <= length]
        size = max(1, batch_tokens // length) * num_devices
        for start in range(0, len(inside), size):
            chosen = inside[start:start + size]
            tokens = np.full((size, length + 1), train.NO_TOKEN, np.uint16)
            first = np.zeros(size, np.int32)
            for place, i in enumerate(chosen):
                tokens[place, :len(rows[i][0])], first[place] = rows[i]
            yield chosen, tokens, first

def log_likelihoods(rows, score, max_len, batch_tokens, num_devices, tick=lambda share: None):
    """(summed log-likelihoods, targets that are not the likeliest) of rows (ids, first), each [len(rows)]. Raises NonFiniteLoss."""
    sums, missed, done = np.zeros(len(rows)), np.zeros(len(rows), int), 0
    for chosen, tokens, first in batches(rows, max_len, batch_tokens, num_devices):
        sums[chosen], missed[chosen] = (np.asarray(z)[:len(chosen)] for z in score(tokens, first))
        done += len(chosen)
        tick(done / len(rows))
    if not np.isfinite(sums).all():
        raise NonFiniteLoss("a log-likelihood is not finite: the weights of this checkpoint are of no use")
    return sums, missed

def judge(task, chosen, options, tokenizer, score, tick=lambda share: None):
    """Scores the questions of a task at the places `chosen`: a dict of numbers for --out. options: shots, max_len,
    batch_tokens, num_devices."""
    shots, max_len, *shape = options
    coded = [encode_pair(*pair, tokenizer, max_len) for i in chosen for pair in prompts(task, i, shots)]
    rows = [(ids, first) for ids, first, _ in coded]
    sums, missed = log_likelihoods(rows, score, max_len, *shape, tick)
    means, right, nats, at = sums / [len(ids) - first for ids, first in rows], [], [], 0
    for pairs, gold in (task.questions[i] for i in chosen):
        own = means[at:at + len(pairs)]
        is_best = own == own.max()
        right.append(float(missed[at] == 0) if task.form == "completion" else is_best[gold] / is_best.sum())
        nats.append(-own[gold])
        at += len(pairs)
    chance = 0.0 if task.form == "completion" else float(np.mean([1 / len(task.questions[i][0]) for i in chosen]))
    accuracy = float(np.mean(right))
    return {"form": task.form, "n": len(chosen), "accuracy": accuracy, "chance": chance,
            "stderr": math.sqrt(accuracy * (1 - accuracy) / len(chosen)),
            "centered": (accuracy - chance) / (1 - chance), "nats_per_token": float(np.mean(nats)),
            "cut": sum(cut for *_, cut in coded), "rows": len(rows), "tokens": sum(len(ids) - 1 for ids, _ in rows)}

# ---- Validation ----

def open_validation(trained, args):
    """(Config of the evaluation, [(path, tokens, targets), ...], SHA-256 of the scored tokens). By default what the run itself
    scores; of --val_files all targets, or the first --val_tokens. Raises UsageError."""
    cfg = trained.cfg
    pattern = args.val_files or cfg.val_files or train.embedded_corpus()[1]
    if not train.find_shards(pattern):
        raise UsageError(f"no shards match {pattern}; give others with --val_files, or --val_tokens=0 with --tasks")
    shards = train.open_shards(pattern)
    if shards.meta != trained.meta:
        raise UsageError(f"{shards.paths[0]}: made with {shards.meta}, but the model with {trained.meta}")
    asked = args.val_tokens or (sum(len(tokens) - 1 for tokens in shards.tokens) if args.val_files else cfg.val_tokens)
    left, parts, digest = asked, [], hashlib.sha256()
    for path, tokens in zip(shards.paths, shards.tokens):
        if count := min(left, len(tokens) - 1):
            if (largest := int(tokens[:count + 1].max())) >= trained.cfg.vocab_size:
                raise UsageError(f"{path}: holds token {largest}, but the model's vocabulary has {trained.cfg.vocab_size}")
            parts, left = [*parts, (path, tokens, count)], left - count
            digest.update(tokens[:count + 1])
    if left:
        raise UsageError(f"{shards.paths[0]}: too short for {asked} targets; {asked - left} fit: --val_tokens={asked - left}")
    return replace(cfg, val_tokens=max(count for *_, count in parts)), parts, digest.hexdigest()

def validate(parts, params, mesh, cfg, token_bytes, tick=lambda share: None):
    """{"val_loss", "val_tokens", "bits_per_byte", "bytes"}: mean nats of the targets by the trainer's evaluation step, a
    micro-step at a time, and bits per byte of the text that they are, None without token_bytes. Raises NonFiniteLoss."""
    step, size = train.make_eval_step(GPT, mesh, cfg), train.batch_shape(cfg.val, mesh.size, cfg)[1]
    stage, nats, total, num_bytes = replace(cfg.val, batch_tokens=size * cfg.val.seq_len), 0.0, 0, 0
    wanted = sum(count for *_, count in parts)
    for path, tokens, count in parts:
        rows = train.plan_val(train.Shards([path], [tokens], {}), replace(cfg, val_tokens=count))
        for start in range(0, len(rows), size):
            more, scored = step(params, train.to_devices(rows[start:start + size], stage, mesh, cfg))
            nats, total = nats + float(more), total + int(scored)
            tick(total / wanted)
        num_bytes += 0 if token_bytes is None else int(token_bytes[tokens[1:count + 1]].sum())
    assert total == wanted, f"{total} targets scored, wanted {wanted}"
    if not math.isfinite(nats):
        raise NonFiniteLoss(f"the validation loss is {nats / wanted}")
    return {"val_loss": nats / wanted, "val_tokens": wanted, "bytes": num_bytes or None,
            "bits_per_byte": nats / math.log(2) / num_bytes if num_bytes else None}

def of_the_run(trained, scored_sha256):
    """What the run itself says of the loss of these tokens at this step, or that it scored others."""
    run = trained.folder.parent.parent
    with contextlib.suppress(OSError, ValueError):
        if scored_sha256 not in (run / "log.txt").read_text(errors="replace").rsplit("=" * 120)[-1]:
            return "other tokens than the run itself scored"
        rows = [row for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "val_loss" in row]
        return next((f"the run wrote {row['val_loss']:.6f}" for row in reversed(rows) if row["step"] == trained.step), "")
    return ""

# ---- Results ----

class Results:
    """The lines of --out. A line that a kill cut short is passed over."""
    def __init__(self, path, weights, shared):
        self.path, self.weights, self.shared, self.lines = path, weights, shared, {}
        with usage_errors(f"--out={path}: cannot be read"):
            there = path.read_text() if path.exists() else ""
        for line in there.splitlines():
            with contextlib.suppress(ValueError, TypeError, KeyError):
                self.lines[json.loads(line)["key"]] = json.loads(line)
        self.cut = there[-1:] not in ("", "\n")
    def get(self, name, *what):
        """(the line that is there for these weights and this, or None, the key to add it by)."""
        key = hashlib.sha256(json.dumps([SCORING, self.weights, name, *what]).encode()).hexdigest()[:16]
        return self.lines.get(key), key
    def add(self, key, name, numbers):
        line = {"key": key, "name": name} | self.shared
        line |= {name: round(x, 6) if isinstance(x, float) else x for name, x in numbers.items()}
        with usage_errors(f"--out={self.path}: cannot be written"), open(self.path, "a") as file:
            file.write("\n" * self.cut + json.dumps(line) + "\n")
        self.lines[key], self.cut = line, False
        return line

class Progress:
    """tick(share of what is being done): on a terminal a passing line, elsewhere one every half minute. work: of each piece to come."""
    def __init__(self, work):
        self.total, self.done, self.start, self.said = sum(work), 0.0, time.perf_counter(), time.perf_counter()
    def of(self, name, work):
        def tick(share):
            now, terminal = time.perf_counter(), sys.stdout.isatty()
            self.done += work if share >= 1 else 0
            done = self.done + (work * share if share < 1 else 0)
            if terminal or now - self.said > 30:
                left = (now - self.start) / done * (self.total - done)
                print(("\r\x1b[K" if terminal else "") + f"{name}: {share:.0%}, {left / 60:.1f} min left for all",
                      end="\r" if terminal else "\n", flush=True)
                self.said = now
        return tick

def table_of(lines):
    """Markdown of the sets' lines."""
    out = ["| set | form | questions | accuracy | chance | centered | cut |", "|---|---|---|---|---|---|---|"]
    for x in lines:
        shots = f", {x['shots']} shots" if x["shots"] else ""
        out.append(f"| {x['name']} | {x['form']}{shots} | {x['n']} | {x['accuracy']:.3f} ± {x['stderr']:.3f} | {x['chance']:.3f} "
                   f"| {x['centered']:+.3f} | {x['cut']} of {x['rows']} |")
    mean = sum(x["centered"] for x in lines) / len(lines)
    return "\n".join([*out, f"| **mean** of {len(lines)} | | | | | **{mean:+.4f}** | |"]), mean

# ---- Command line ----

def parse(argv):
    """Raises UsageError."""
    def fail(message):
        raise UsageError(f"{message} (python -m scripts.evaluate --help)")
    parser = argparse.ArgumentParser(usage="python -m scripts.evaluate --checkpoint=RUN|PATH [--FLAG=VALUE ...]", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error, flag = fail, parser.add_argument
    flag("--checkpoint", required=True, metavar="RUN|PATH", help="a run's folder, or its ckpt/step-NNNNNN")
    flag("--val_files", metavar="GLOB", help="validation shards (default: the run's own)")
    flag("--val_tokens", type=int, metavar="N", help="targets to score (default: the run's number, of --val_files all); 0: none")
    flag("--tokenizer", metavar="FOLDER", help="with the tokenizer's files (default: that of the run's training shards)")
    flag("--tasks", metavar="DIR", help="a folder of sets of questions, NAME.jsonl (default: validation only)")
    flag("--only", default="", metavar="A,B", help="only these sets")
    flag("--fetch", action="store_true", help="first get the sets that DIR lacks from the Hub: " + ", ".join(eval_sets.SETS))
    flag("--max_per_task", type=int, default=0, metavar="N", help="of each set N questions, always the same ones (default: all)")
    flag("--shots", default="0", metavar="N|core", help="solved questions before each (default: %(default)s)")
    flag("--max_len", type=int, default=0, metavar="T", help="tokens of a row at most (default: the run's val.seq_len)")
    flag("--batch_tokens", type=int, default=0, metavar="N", help="of a batch, on each device (default: 4096 on a CPU, else 65536)")
    flag("--out", metavar="FILE", help="where the lines are (default: RUN/evaluate.jsonl)")
    args = parser.parse_args(argv)
    if not (args.shots == "core" or args.shots.isdecimal()):
        fail(f"--shots={args.shots}: wanted a number or core")
    for name in ("val_tokens", "max_per_task", "max_len", "batch_tokens"):
        if (getattr(args, name) or 0) < 0:
            fail(f"--{name}={getattr(args, name)}: wanted at least 0")
    if not args.tasks and (args.fetch or args.only):
        fail("--fetch and --only want --tasks=DIR, the folder of the sets")
    if args.val_tokens == 0 and not args.tasks:
        fail("--val_tokens=0 without --tasks leaves nothing to do")
    return args

def report_validation(trained, params, mesh, tokenizer, lacking, results, args):
    """Prints loss and bits per byte, computed or from --out. Returns them."""
    cfg, parts, digest = open_validation(trained, args)
    line, key = results.get("validation", digest, sum(count for *_, count in parts), tokenizer is not None)
    known, start = " (was there)" if line else "", time.perf_counter()
    if not line:
        numbers = validate(parts, params, mesh, cfg, tokenizer and tokenizer.token_bytes, Progress([1]).of("validation", 1))
        line = results.add(key, "validation", numbers | {"seconds": time.perf_counter() - start})
    bits = f"{line['bits_per_byte']:.6f} bits per byte" if tokenizer else f"no bits per byte ({lacking})"
    print(f"validation: {line['val_loss']:.6f} nats per token, {bits}, of {line['val_tokens']} targets in {line['seconds']:.1f} s"
          + known + "".join(f"; {said}" for said in [of_the_run(trained, digest)] if said), flush=True)
    return {name: line[name] for name in ("val_loss", "bits_per_byte", "val_tokens")}

def report_tasks(tasks, trained, params, mesh, tokenizer, results, args):
    """Prints a line per set that is not in --out, which gets it, and the table of all. Returns accuracies and their mean."""
    max_len, lines, todo = args.max_len or trained.cfg.val.seq_len, [], []
    batch_tokens = args.batch_tokens or (4096 if jax.default_backend() == "cpu" else 65536)
    for place, task in enumerate(tasks):
        count = len(task.questions)
        chosen = sorted(random.Random(task.name).sample(range(count), min(args.max_per_task or count, count)))
        shots = CORE_SHOTS.get(task.name, 0) if args.shots == "core" else int(args.shots)
        line, key = results.get(task.name, task.sha256, len(chosen), shots, max_len)
        lines.append(line)
        if not line:
            work = sum(len(context) + len(after) for i in chosen for context, after in task.questions[i][0])
            todo.append((place, task, chosen, shots, key, work * (1 + shots)))
    print(f"{len(todo)} of {len(tasks)} sets to do; results are in {results.path}", flush=True)
    scorer, progress = make_scorer(mesh, trained.cfg), Progress([work for *_, work in todo])
    for place, task, chosen, shots, key, work in todo:
        start, options = time.perf_counter(), (shots, max_len, batch_tokens, mesh.size)
        score = lambda tokens, first: scorer(params, tokens, first)
        numbers = judge(task, chosen, options, tokenizer, score, progress.of(task.name, work))
        seconds = time.perf_counter() - start
        lines[place] = line = results.add(key, task.name, numbers | {"shots": shots, "seconds": seconds})
        print(f"{task.name}: accuracy {line['accuracy']:.3f} of {line['n']}, {line['tokens'] / seconds:.0f} tokens/s, "
              f"{seconds:.1f} s", flush=True)
    table, mean = table_of(lines)
    print(f"\n{table}\n")
    return {"mean_centered": round(mean, 6), "sets": {line["name"]: line["accuracy"] for line in lines}}

def main(argv=None):
    """Returns the summary that is printed last. Raises UsageError and NonFiniteLoss."""
    args = parse(sys.argv[1:] if argv is None else argv)
    if args.fetch:
        eval_sets.fetch(Path(args.tasks))
    tasks = read_tasks(args.tasks, [*filter(None, args.only.split(","))]) if args.tasks else []
    trained = open_checkpoint(args.checkpoint)
    tokenizer, lacking = None, ""
    try:
        folder = Path(args.tokenizer) if args.tokenizer else text.folder_of_run(trained.cfg)
        tokenizer = text.open_tokenizer(trained.meta, folder)
    except UsageError as error:
        if tasks or args.tokenizer:
            raise
        lacking = str(error)
    mesh = train.make_mesh()
    params = jax.device_put(trained.params, train.state_shardings(GPT, mesh, trained.cfg).params)
    print(f"{trained.folder}, on {mesh.size} x {jax.devices()[0].device_kind}", flush=True)
    run, manifest = trained.folder.parent.parent, json.loads((trained.folder / "manifest.json").read_text())
    results = Results(Path(args.out) if args.out else run / "evaluate.jsonl", manifest["sha256"]["params.safetensors"],
                      {"run": run.name, "step": trained.step})
    summary = {"checkpoint": str(trained.folder), "step": trained.step}
    if args.val_tokens != 0:
        summary |= report_validation(trained, params, mesh, tokenizer, lacking, results, args)
    if tasks:
        summary |= report_tasks(tasks, trained, params, mesh, tokenizer, results, args)
    print(json.dumps(summary), flush=True)
    return summary

if __name__ == "__main__":
    sys.exit(train.command(main))
