"""scripts/evaluate.py: losses, log-likelihoods, forms of questions, resuming, and the Hub's rows.

Nothing is trained: a checkpoint has random weights, or those of which it is known what is right.
"""

import dataclasses
import functools
import hashlib
import json
import math
import os
import resource
import sys
from types import SimpleNamespace

import byte_run
import jax
import numpy as np
import pytest
from shards import documents, make_folder, shard_bytes

import train
from scripts import evaluate, questions, text
from scripts.questions import Task
from scripts.sample import open_checkpoint
from train import BYTES_META, GPT, UsageError

BYTES = text.open_tokenizer(BYTES_META, ".")
LETTERS = "".join(map(chr, range(128))) + "".join(map(chr, range(0x100, 0x180)))  # 1 or 2 bytes


@pytest.fixture(scope="module", autouse=True)
def few_compilations():
    """Programs are compiled quickly, and once for all tests."""
    eval_step = functools.cache(functools.partial(train.make_eval_step, GPT))

    def make_eval_step(model, mesh, cfg):
        return eval_step(mesh, train.replace(cfg, val_tokens=1))  # the program does not hang on it

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "make_scorer", functools.cache(evaluate.make_scorer))
        patch.setattr(train, "make_eval_step", make_eval_step)
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run whose weights are random."""
    return byte_run.make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def oracle(run):
    """oracle([(ids, first), ...]): of each of a text's ids from place `first` on the
    log-likelihood, and whether it is not the likeliest: by the whole forward pass."""
    trained = open_checkpoint(run)
    weights = trained.weights()
    logits_of = jax.jit(train.next_logits, static_argnums=2)

    def score(rows):
        tokens = np.zeros((48, 100), np.int32)  # what comes after a text, nothing sees
        for row, (ids, _) in zip(tokens, rows, strict=False):
            row[: len(ids) - 1] = ids[:-1]
        logits = np.asarray(logits_of(weights, tokens, trained.cfg))[..., :257]
        found = []
        for logits_TV, (ids, first) in zip(logits, rows, strict=False):
            z = np.float64(logits_TV[first - 1 : len(ids) - 1])
            likelihoods = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
            targets = ids[first:]
            chosen = likelihoods[np.arange(len(targets)), targets]
            found.append((chosen, z.argmax(axis=1) != targets))
        return found

    return score


def rig(tensors):
    """A space follows a colon, an a follows a space or an a.

    Nothing but a byte's own embedding reaches the head.
    """
    rng = np.random.default_rng(6)
    for name in tensors:
        last = name.split("/")[-1]
        if last in ("w_out", "w_down", "smear_mix", "x0_mix", "backout_mix"):
            tensors[name] *= 0
        if last == "x_mix":
            tensors[name] = np.ones_like(tensors[name])
    embed = tensors["embed"] = rng.standard_normal(tensors["embed"].shape).astype(np.float32)
    tensors["head"] *= 0
    for before, after in ((":", " "), (" ", "a"), ("a", "a")):
        tensors["head"][ord(after)] += embed[ord(before)] / np.linalg.norm(embed[ord(before)])


def lines_of(folder, **sets):
    folder.mkdir(exist_ok=True)
    for name, rows in sets.items():
        lines = [json.dumps(row) + "\n" for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return f"--tasks={folder}"


def alphabet(folder, characters=LETTERS):
    """A folder of shards of one's own 256 characters. Returns what their meta.json says."""
    make_folder(folder, "mine.json")
    (folder / "mine.json").write_text(json.dumps(characters))
    digest = hashlib.sha256((folder / "mine.json").read_bytes()).hexdigest()
    meta = BYTES_META | {"tokenizer": "mine.json", "tokenizer_sha256": digest}
    (folder / "meta.json").write_text(json.dumps(meta))
    return meta


def refused(words, *flags):
    with pytest.raises(UsageError, match=words) as caught:
        evaluate.main([*flags])
    assert "\n" not in str(caught.value)


# ---- Validation ----------------------------------------------------------------------------------


def test_the_loss_is_the_trainers(run, tmp_path, capsys):
    trained, mesh = open_checkpoint(run), train.make_mesh()
    cfg = trained.cfg
    params = jax.device_put(trained.params, train.state_shardings(GPT, mesh, cfg).params)
    rows = train.plan_val(train.open_shards(cfg.val_files), cfg)
    batch = train.to_devices(rows, cfg.val, mesh, cfg)
    wrote = train.evaluate(train.make_eval_step(GPT, mesh, cfg), params, batch, cfg)
    (run / "metrics.jsonl").write_text(json.dumps({"step": byte_run.STEP, "val_loss": wrote}))
    found = evaluate.main([f"--checkpoint={run}", f"--out={tmp_path / 'out'}"])
    assert found["val_loss"] == pytest.approx(wrote, abs=1e-6)
    assert f"the run wrote {wrote:.6f}" in capsys.readouterr().out

    # without the tokenizer's files there is the loss, and the reason why there are no bits
    meta = alphabet(tmp_path / "data")
    (tmp_path / "data/mine.json").unlink()
    other = byte_run.changed(run, tmp_path / "run", meta=meta)
    flags = [f"--checkpoint={other}", f"--val_files={tmp_path}/data/val_*.bin"]
    flags.append("--val_tokens=1000")
    unknown = evaluate.main(flags)
    assert unknown["bits_per_byte"] is None and unknown["val_loss"] == found["val_loss"]
    said = capsys.readouterr().out
    assert "no bits per byte" in said and "mine.json" in said
    refused("mine.json", *flags, f"--tokenizer={tmp_path}")


def test_bits_per_byte_count_text_alone_and_of_it_bytes(run, tmp_path):
    """Of 257 tokens that are likely alike each costs log2(257) = 8.00562 bits."""
    meta = alphabet(tmp_path / "data")
    shard = [256, 65, 66, 200, 256, 67]  # four tokens of five bytes, and a BOS
    (tmp_path / "data/val_000000.bin").write_bytes(shard_bytes(shard))
    flat = byte_run.changed(run, tmp_path / "flat", byte_run.flatten, meta=meta)
    flags = [f"--checkpoint={flat}", f"--val_files={tmp_path}/data/val_*.bin"]
    found = evaluate.main([*flags, f"--tokenizer={tmp_path}/data"])
    assert found["bits_per_byte"] == pytest.approx(4 * 8.0056245 / 5, abs=1e-5)
    assert found["val_loss"] == pytest.approx(5.5490761, abs=1e-5) and found["val_tokens"] == 5

    (tmp_path / "data/val_000000.bin").write_bytes(shard_bytes([256] * 9))  # no text at all
    assert evaluate.main([*flags, f"--tokenizer={tmp_path}/data"])["bits_per_byte"] is None
    spoilt = byte_run.changed(run, tmp_path / "spoilt", byte_run.spoil)
    with pytest.raises(train.NonFiniteLoss):
        evaluate.main([f"--checkpoint={spoilt}"])
    assert not (spoilt / "evaluate.jsonl").exists()


def test_a_tokenizer_is_told_by_its_hash_and_each_has_scores_of_its_own(run, tmp_path, monkeypatch):
    """Two alphabets of one name and size."""
    tokenizers, real = [], evaluate.judge

    def judge(task, chosen, shots, tokenizer, score, limits):
        tokenizers.append(tokenizer.encode("ab"))
        return real(task, chosen, shots, BYTES, lambda _, first: (0.0 * first, first), limits)

    monkeypatch.setattr(evaluate, "judge", judge)
    mine = alphabet(tmp_path / "mine")
    alphabet(tmp_path / "other", LETTERS[::-1])
    tasks = lines_of(tmp_path / "sets", one=[{"query": "a", "choices": ["b", "c"], "gold": 0}])
    new = f"--checkpoint={byte_run.changed(run, tmp_path / 'new', meta=mine)}"
    refused("val_000000.bin: of another tok", new, f"--val_files={tmp_path}/other/val_*.bin")
    flags = [tasks, "--val_tokens=0"]
    refused("other/meta.json: of another tok", new, *flags, f"--tokenizer={tmp_path}/other")
    assert not tokenizers
    evaluate.main([new, *flags, f"--tokenizer={tmp_path}/mine"])

    # a run of before the hash says its tokenizer in config.json, by name and sizes
    folder = byte_run.changed(run, tmp_path / "old")
    old = f"--checkpoint={folder}"
    manifest = next(folder.glob("ckpt/*/manifest.json"))
    about = json.loads(manifest.read_text())
    del about["meta"]
    manifest.write_text(json.dumps(about))
    meta = {"tokenizer": "mine.json", "vocab_size": 257, "bos_id": 256}
    (folder / "config.json").write_text(json.dumps({"meta": meta}))
    for name in ("mine", "other", "mine"):
        (tmp_path / name / "meta.json").unlink(missing_ok=True)
        evaluate.main([old, *flags, f"--tokenizer={tmp_path / name}"])
    assert tokenizers == [[97, 98], [97, 98], [158, 157]]


def test_of_other_shards_all_targets_are_scored_each_in_its_own_shard(run, oracle, tmp_path):
    data = [documents(11, 13), documents(12, 3)]
    make_folder(tmp_path / "data", "bytes")
    for i, tokens in enumerate(data):
        (tmp_path / f"data/other_{i}.bin").write_bytes(shard_bytes(tokens))
    rows = []
    for tokens in data:
        for begin in range(0, len(tokens) - 1, 32):  # a row scores 32 targets, after 32 tokens
            nothing = [256] * max(0, 32 - begin)  # read as BOS
            rows.append((nothing + tokens[max(0, begin - 32) : begin + 33].tolist(), 33))
    nats = -np.concatenate([likelihoods for likelihoods, _ in oracle(rows)])
    flags = [f"--checkpoint={run}", f"--val_files={tmp_path}/data/other_*.bin"]
    flags.append(f"--out={tmp_path / 'out'}")
    found = evaluate.main(flags)
    assert found["val_tokens"] == len(nats) == sum(map(len, data)) - 2
    assert found["val_loss"] == pytest.approx(nats.mean(), abs=1e-5)
    is_text = np.concatenate([tokens[1:] for tokens in data]) != 256
    assert found["bits_per_byte"] == pytest.approx(nats[is_text].mean() / math.log(2), abs=1e-5)
    count = len(data[0]) + 9  # ten of the second shard
    args = evaluate.parse([*flags, f"--val_tokens={count}"])
    parts, _ = evaluate.open_validation(open_checkpoint(run), args)
    assert [scored for _, _, scored in parts] == [len(data[0]) - 1, 10]


def test_what_cannot_be_scored_is_one_sentence(run, tmp_path):
    make_folder(tmp_path / "data", "test")
    checkpoint = f"--checkpoint={run}"
    shards = f"--val_files={tmp_path}/data/val_*.bin"
    refused("of another tokenizer: .*'test'.* wanted .*'bytes'", checkpoint, shards)
    refused("no shards match /nowhere/.*--val_tokens=0", checkpoint, "--val_files=/nowhere/*.bin")
    refused("too short for 9999999 targets; 2[0-9]* fit", checkpoint, "--val_tokens=9999999")
    old = byte_run.changed(run, tmp_path / "run")
    manifest = next(old.glob("ckpt/step-*/manifest.json"))
    manifest.write_text(manifest.read_text().replace('"format"', '"formerly"'))
    refused("e520f26", f"--checkpoint={old}")  # of an older train.py
    for words, *flags in (
        ("no checkpoint there", "--checkpoint=/nowhere"),
        ("want --tasks", checkpoint, "--fetch"),
        ("nothing to do", checkpoint, "--val_tokens=0"),
        ("--shots", checkpoint, "--shots=few"),
        (r"no \*.jsonl there; --fetch", checkpoint, "--tasks=/nowhere"),
        ("--typo", checkpoint, "--typo"),
    ):
        refused(words, *flags)


# ---- Log-likelihoods -----------------------------------------------------------------------------


def test_log_likelihoods_are_those_of_next_logits_however_rows_are_batched(run, oracle):
    trained, rng = open_checkpoint(run), np.random.default_rng(1)
    rows = []
    for count, first in ((3, 1), (32, 20), (32, 32), (90, 1), (90, 88)):
        rows.append(([256, *rng.integers(0, 256, count).tolist()], first))
    expected = oracle(rows)
    mesh = train.make_mesh()
    places = train.state_shardings(GPT, mesh, trained.cfg).params
    params = jax.device_put(trained.params, places)
    score, shapes = evaluate.make_scorer(mesh, trained.cfg), []

    def scored(tokens, first):
        shapes.append(tokens.shape)
        return score(params, tokens, first)

    limits = evaluate.Limits(100, 1, mesh.size)
    sums, missed = evaluate.log_likelihoods(rows * 3, scored, limits)
    assert shapes == [(8, 33), (8, 33), (8, 101)]
    wanted = [likelihoods.sum() for likelihoods, _ in expected]
    np.testing.assert_allclose(sums, wanted * 3, atol=2e-4)
    assert missed.tolist() == [misses.sum() for _, misses in expected] * 3
    larger = evaluate.batches(rows, limits._replace(batch_tokens=200))
    assert [tokens.shape for _, tokens, _ in larger] == [(48, 33), (16, 101)]


def test_weights_that_prefer_what_is_right_score_1_and_others_chance_in_every_form(run, tmp_path):
    few = ["--val_tokens=0", "--batch_tokens=32", f"--out={tmp_path / 'out'}"]
    tasks = lines_of(
        tmp_path / "sets",
        choice=[{"query": "see:", "choices": ["bbb", "aaa", "b"], "gold": 1}] * 2,
        schema=[{"context_options": ["this;", "that:"], "continuation": "aa", "gold": 1}],
        words=[
            {"context": "say:", "continuation": "aaa"},
            {"context": "say:", "continuation": "aba"},
        ],
    )
    rigged = byte_run.changed(run, tmp_path / "rigged", rig)
    found = evaluate.main([f"--checkpoint={rigged}", tasks, *few[:2]])
    assert found["sets"] == {"choice": 1.0, "schema": 1.0, "words": 0.5}
    assert found["mean_centered"] == pytest.approx((1 + 1 + 0.5) / 3)
    assert (rigged / "evaluate.jsonl").exists()

    rng = np.random.default_rng(3)
    rows = []
    for _ in range(200):
        query, *choices = ("".join(rng.choice([*"abcdefgh"], rng.integers(2, 9))) for _ in range(5))
        rows.append({"query": query, "choices": choices, "gold": int(rng.integers(4))})
    guesses = lines_of(tmp_path / "guesses", guesses=rows)
    found = evaluate.main([f"--checkpoint={run}", guesses, *few])
    accuracy = found["sets"]["guesses"]
    assert abs(accuracy - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 200)
    assert found["mean_centered"] == pytest.approx((accuracy - 0.25) / 0.75, abs=1e-5)

    flat = byte_run.changed(run, tmp_path / "flat", byte_run.flatten)  # all are best alike
    found = evaluate.main([f"--checkpoint={flat}", guesses, *few, "--max_per_task=50"])
    assert found["sets"]["guesses"] == 0.25 and found["mean_centered"] == 0


def task(name, *questions, form="multiple choice"):
    lines = [f"{name}.jsonl, line {2 * i}" for i in range(len(questions))]
    return Task(name, form, [*questions], lines, "")


def test_a_choice_is_judged_by_the_mean_of_its_tokens_and_a_completion_by_every_token():
    def score(tokens, first):
        """A token of a long word costs half a nat, of a short one a whole. z is a miss."""
        texts = [bytes(row[row < 256].astype(np.uint8)) for row in tokens]
        lengths = [len(text) + 1 - at for text, at in zip(texts, first, strict=True)]
        nats = [n * (0.5 if n > 4 else 1.0) for n in lengths]
        return -np.array(nats), np.array([text.count(b"z") for text in texts])

    def judged(task, score=score, tokenizer=BYTES):
        places = range(len(task.questions))
        return evaluate.judge(task, places, 0, tokenizer, score, evaluate.Limits(100, 64, 1))

    pairs = [("q:", "no"), ("q:", "certainly")]
    found = judged(task("mine", (pairs, 1), (pairs, 0), (pairs, 1)))
    assert found["accuracy"] == pytest.approx(2 / 3) and found["chance"] == 0.5
    assert found["centered"] == pytest.approx(1 / 3) and found["n"] == 3 and found["cut"] == 0
    assert found["stderr"] == pytest.approx(math.sqrt(2 / 27))
    words = task("mine", ([("a", "b")], 0), ([("a", "z")], 0), form="completion")
    assert judged(words)["accuracy"] == 0.5
    with pytest.raises(train.NonFiniteLoss):
        judged(words, lambda tokens, first: (np.full(len(first), np.nan), first))
    ab = dataclasses.replace(BYTES, encode=text.alphabet_encode("ab "))
    with pytest.raises(UsageError, match=r"mine.jsonl, line 2: 'z' \(U\+007A\)"):
        judged(words, tokenizer=ab)


# ---- Prompts -------------------------------------------------------------------------------------


def test_what_is_scored_begins_where_the_text_departs_from_its_contexts_encoding():
    def by_threes(words):
        return [words[i : i + 3] for i in range(0, len(words), 3)]

    odd = SimpleNamespace(bos_id=99, encode=by_threes)
    whole = [99, "abc", "def", "g"]  # d is part of another token than in "abcd"
    assert evaluate.encode_pair("abcd", "efg", odd, 100) == (whole, 2, False)
    assert evaluate.encode_pair("abc", "def", odd, 100) == ([99, "abc", "def"], 2, False)
    assert evaluate.encode_pair("", "def", odd, 100) == ([99, "def"], 1, False)
    # a long text is cut from the left behind its BOS
    for max_len, kept, first in ((10, b"xxxxxx yes", 7), (3, b"yes", 1)):
        ids, *rest = evaluate.encode_pair("x" * 50, " yes", BYTES, max_len)
        assert ids == [256, *kept] and rest == [first, True]


def test_a_space_or_the_sets_own_delimiter_joins_and_shots_are_other_questions_with_answers():
    context = "Question: why? \n"
    question = ([(context, "because "), (context, " not")], 0)
    wanted = [("Question: why?", " because"), ("Question: why?", " not")]
    assert evaluate.prompts(task("mine", question), 0, 0) == wanted
    assert evaluate.prompts(task("piqa", question), 0, 0)[1] == ("Question: why?\nAnswer:", " not")

    questions = [([(f"q{i}", f"right{i}"), (f"q{i}", f"wrong{i}")], 0) for i in range(9)]
    mine = task("mine", *questions)
    for i in range(9):
        (before, after), (also, _) = evaluate.prompts(mine, i, 3)
        *shots, last = before.split("\n\n")
        numbers = [shot[1] for shot in shots]
        assert last == f"q{i}" and after == f" right{i}" and before == also
        assert shots == [f"q{k} right{k}" for k in numbers] and len({*numbers, str(i)}) == 4
        assert evaluate.prompts(mine, i, 3)[0] == (before, after)
    before, _ = evaluate.prompts(mine, 2, 50)[0]
    assert len(before.split("\n\n")) == 9


# ---- Files, resuming -----------------------------------------------------------------------------


def test_a_damaged_set_is_one_sentence_with_its_line_and_exit_code_2(tmp_path, capsys):
    """Also where its name is no UTF-8. A byte order mark and CRLF are no damage."""
    path = tmp_path / "s\udcf6me.jsonl"
    shown = path.with_name("s\\udcf6me.jsonl")
    good = '{"query": "a", "choices": ["b", "c"], "gold": 1}'
    path.write_bytes(f"\ufeff{good}\r\n\r\n{good}\r\n".encode())
    (whole,) = questions.read_tasks(tmp_path, [])
    assert whole.questions == [([("a", "b"), ("a", "c")], 1)] * 2
    assert evaluate.prompts(whole, 0, 1)[0] == ("a c\n\na", " b")
    for line, words in (
        (good.replace("b", "b\\ud83d"), "surrogates not allowed"),
        (good.replace("b", "caf\udce9"), "invalid continuation byte"),
        ("[" * 100_000, "damaged"),
        ("7", "damaged"),
        (good[:-1], "damaged"),
        ('{"query": "a"}', "wanted the keys query"),
        (good.replace("1", "2"), "right one's place"),
        (good.replace('["b", "c"]', '"bc"'), "two to choose from"),
        (good.replace('"c"', '" "'), "no empty continuation"),
        ('{"context": "a", "continuation": "b"}', "wanted one form in a file"),
    ):
        path.write_bytes(f"{good}\n{line}\n".encode(errors="surrogateescape"))
        argv = ["--checkpoint=nowhere", f"--tasks={tmp_path}"]
        assert train.command(lambda argv=argv: evaluate.main(argv)) == 2
        said = capsys.readouterr().err
        said = said.replace("\udcf6", "\\udcf6")  # as a console shows it
        assert said.startswith(f"error: {shown}, line 2: ") and said.count("\n") == 1
        assert words in said


def test_a_second_invocation_scores_only_what_is_not_there(run, tmp_path, monkeypatch):
    rows = [{"query": f"{i}", "choices": ["yes", "no"], "gold": i % 2} for i in range(30)]
    tasks, out = lines_of(tmp_path / "sets", one=rows, two=rows[:7]), tmp_path / "out"
    argv = [f"--checkpoint={run}", tasks, f"--out={out}", "--max_per_task=20"]
    judged, real = [], evaluate.judge

    def judge(task, chosen, *rest):
        judged.append((task.name, len(chosen)))
        return real(task, chosen, *rest)

    def scorer(params, tokens, first):
        return -1.0 * first, first

    monkeypatch.setattr(evaluate, "judge", judge)
    monkeypatch.setattr(evaluate, "make_scorer", lambda mesh, cfg: scorer)
    first = evaluate.main(argv)
    assert judged == [("one", 20), ("two", 7)] and first["val_loss"] > 0
    monkeypatch.setattr(evaluate, "validate", None)
    judged.clear()
    assert evaluate.main(argv) == first and not judged
    evaluate.main([*argv, "--max_per_task=25"])
    assert judged.pop() == ("one", 25) and not judged
    other = byte_run.changed(run, tmp_path / "run", byte_run.flatten)
    for flag in ("--shots=1", f"--checkpoint={other}"):
        evaluate.main([*argv, "--val_tokens=0", "--only=two", flag])
        assert judged.pop() == ("two", 7) and not judged
    lines_of(tmp_path / "sets", two=rows[1:8])
    out.write_text(out.read_text() + '{"key": "cut sho')  # by a kill
    evaluate.main(argv)
    assert judged.pop() == ("two", 7) and not judged
    assert json.loads(out.read_text().splitlines()[-1])["name"] == "two"
    refused("no three.jsonl there, only one, two", *argv, "--only=three")


def test_what_a_user_has_in_out_stays_to_the_byte(run, tmp_path, monkeypatch, capsys):
    flags = [f"--checkpoint={run}", "--val_tokens=100"]
    whole = evaluate.main([*flags, f"--out={tmp_path / 'ours'}"])
    ours = (tmp_path / "ours").read_bytes()
    for name, blob in (
        ("notes.txt", b"# mine\r\n"),
        ("q.jsonl", b'{"query": "a", "choices": ["b", "c"], "gold": 1}\n'),
        ("caf\udce9[1].png", b"\x89PNG\r\n\x1a\n\0"),
    ):
        (tmp_path / name).write_bytes(blob)
        refused("begins with other lines", *flags, f"--out={tmp_path / name}")
        assert (tmp_path / name).read_bytes() == blob
    refused("wanted a file", *flags, "--out=/dev/null")
    refused("is no folder", *flags, f"--out={tmp_path}/none/out")

    # behind a line of ours what is not ours stays, a line that a kill cut too
    mine = ours[:-30] + b"\ncaf\xe9\r\n[[7]]\n" + b"[" * 100_000
    (tmp_path / "mixed").write_bytes(mine)
    (tmp_path / "link").symlink_to("mixed")
    assert evaluate.main([*flags, f"--out={tmp_path}/link"]) == whole
    now = (tmp_path / "mixed").read_bytes()
    assert (tmp_path / "link").is_symlink() and now.startswith(mine + b"\n")
    assert json.loads(now[len(mine) :])["val_loss"] == whole["val_loss"]

    # a disk that takes half a line keeps none of it
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(now) + 10, hard))
    try:
        refused("cannot be written", *flags[:1], "--val_tokens=90", f"--out={tmp_path}/mixed")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "mixed").read_bytes() == now

    # nobody reads what is printed: one sentence, and nothing is half there
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding="ascii") as nobody:
        monkeypatch.setattr(sys, "stdout", nobody)
        argv = [*flags, f"--out={tmp_path / 'new'}"]
        assert train.command(lambda: evaluate.main(argv)) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "new").exists()


# ---- The Hub -------------------------------------------------------------------------------------

MC = {"text": ["red", "blue"], "label": ["A", "B"]}
# a row as each dataset's card shows it, and the line that it becomes
# fmt: off
HUB = {
    "hellaswag": (
        {"ctx": "He", "endings": ["a", "b"], "label": "1"},
        {"query": "He", "choices": ["a", "b"], "gold": 1}),
    "lambada_openai": (
        {"text": "so he said no"},
        {"context": "so he said", "continuation": "no"}),
    "arc_easy": (
        {"question": "Which?", "choices": MC, "answerKey": "B"},
        {"query": "Question: Which?", "choices": ["red", "blue"], "gold": 1}),
    "piqa": (
        {"goal": "Sit", "sol1": "a", "sol2": "b", "label": 1},
        {"query": "Question: Sit\n", "choices": ["a", "b"], "gold": 1}),
    "winogrande": (
        {"sentence": "As _ was late.", "option1": "Al", "option2": "Bo", "answer": "2"},
        {"context_options": ["As Al", "As Bo"], "continuation": "was late.", "gold": 1}),
    "winograd_wsc": (
        {"text": "Joe saw Tom as he left.", "pronoun": "he", "pronoun_loc": 15,
         "options": ["Joe", "Tom"], "label": 0},
        {"context_options": ["Joe saw Tom as Joe", "Joe saw Tom as Tom"],
         "continuation": "left.", "gold": 0}),
    "copa": (
        {"premise": "It rained.", "choice1": "I got wet.", "choice2": "I sang.",
         "question": "effect", "label": 0},
        {"query": "It rained, therefore", "choices": ["i got wet.", "i sang."], "gold": 0}),
    "commonsense_qa": (
        {"question": "Where?", "choices": MC, "answerKey": "A"},
        {"query": "Question: Where?\nChoices:\nA. red\nB. blue\nAnswer:", "choices": ["A", "B"],
         "gold": 0}),
    "openbook_qa": (
        {"question_stem": "It is", "choices": MC, "answerKey": "B"},
        {"query": "It is", "choices": ["red", "blue"], "gold": 1}),
    "boolq": (
        {"passage": "Text.", "question": "is it", "answer": True},
        {"query": "Passage: Text.\nQuestion: is it?", "choices": ["no", "yes"], "gold": 1}),
}
# fmt: on


def test_fetching_writes_what_is_missing_in_a_documented_form_and_says_what_failed(
    tmp_path, monkeypatch
):
    wanted = "pip install -r scripts/requirements.txt"
    pyarrow = pytest.importorskip("pyarrow", reason=wanted)
    parquet = pytest.importorskip("pyarrow.parquet", reason=wanted)
    asked, names = [], {}
    for name, (repo, part, _) in questions.SETS.items():
        names[repo, f"{part}/0000.parquet"] = name.replace("challenge", "easy")

    def download(repo, file, repo_type, revision):
        assert repo_type == "dataset" and revision == "refs/convert/parquet"
        asked.append(repo)
        if repo == "google/boolq":
            raise OSError("no such file\nand a long explanation")
        table = pyarrow.Table.from_pylist([HUB[names[repo, file]][0]] * 3)
        parquet.write_table(table, tmp_path / "0000.parquet")
        return str(tmp_path / "0000.parquet")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    tasks = f"--tasks={tmp_path / 'sets'}"
    fetch = ["--checkpoint=/nowhere", tasks, "--fetch"]
    for _ in range(2):
        refused("1 sets could not be had, the first: boolq.* scores without --fetch", *fetch)
    assert len(asked) == 12  # the second time only what failed
    for name, (row, line) in HUB.items():
        if name == "boolq":
            assert questions.boolq(row) == line
        else:
            text = (tmp_path / f"sets/{name}.jsonl").read_text()
            assert text == (json.dumps(line) + "\n") * 3
    assert len(questions.read_tasks(tmp_path / "sets", [])) == 10
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    refused(wanted, *fetch)
