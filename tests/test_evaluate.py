"""scripts/evaluate.py: losses, log-likelihoods, forms of questions, resuming, and the Hub's rows.

One run of a tiny model is trained; most tests give its checkpoint other weights, so that what is
right is known.
"""

import contextlib
import io
import json
import math
import shutil
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import safetensors.numpy
from shards import documents, make_folder, shard_bytes

import train
from scripts import evaluate, text
from scripts.sample import open_checkpoint
from train import GPT, UsageError

BYTES = text.open_tokenizer(text.BYTES, ".")
FLAGS = """--preset=demo --steps=2 --num_layers=2 --model_dim=32 --num_heads=2 --head_dim=16
 --mlp_dim=64 --skips=((0,1),) --late_inputs=((0,1),) --backout=0 --offset_layers=1 --long_layers=1
 --compute_dtype=float32 --residual_dtype=none --stages.end=1 --stages.batch_tokens=512
 --stages.seq_len=32 --stages.short=16 --stages.long=24 --micro_tokens=65536 --val.seq_len=64
 --val.short=24 --val_tokens=1000 --val_context=32 --target_loss=0""".split()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run's folder."""
    jax.config.update("jax_disable_most_optimizations", True)
    folder = tmp_path_factory.mktemp("run")
    flags = [*FLAGS, f"--log_dir={folder / 'logs'}", *make_folder(folder / "data", "bytes")]
    with contextlib.redirect_stdout(io.StringIO()), pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "show_samples", lambda *_: None)
        yield train.main(flags)
    jax.config.update("jax_disable_most_optimizations", False)


def changed(run, folder, change):
    """A copy of the run whose weights went through change(tensors)."""
    shutil.copytree(run, folder)
    checkpoint = next(folder.glob("ckpt/step-*"))
    tensors = safetensors.numpy.load_file(checkpoint / "params.safetensors")
    change(tensors)
    safetensors.numpy.save_file(tensors, checkpoint / "params.safetensors")
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    digest = train.file_sha256(checkpoint / "params.safetensors")
    manifest["sha256"]["params.safetensors"] = digest
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    return folder


def randomize(tensors):
    rng = np.random.default_rng(5)
    for name in sorted(tensors):
        if tensors[name].ndim > 1:
            tensors[name] = 0.3 * rng.standard_normal(tensors[name].shape, np.float32)


def rig(tensors):
    """A space follows a colon, an a follows a space or an a.

    Nothing but a byte's own embedding reaches the head.
    """
    rng = np.random.default_rng(6)
    for name in tensors:
        if name.split("/")[-1] in ("w_out", "w_down", "smear_mix"):
            tensors[name] *= 0
    embed = tensors["embed"] = rng.standard_normal(tensors["embed"].shape).astype(np.float32)
    tensors["head"] *= 0
    for before, after in ((":", " "), (" ", "a"), ("a", "a")):
        tensors["head"][ord(after)] += embed[ord(before)] / np.linalg.norm(embed[ord(before)])


@pytest.fixture(scope="module")
def random_run(run, tmp_path_factory):
    return changed(run, tmp_path_factory.mktemp("random") / "run", randomize)


def lines_of(folder, **sets):
    folder.mkdir(exist_ok=True)
    for name, rows in sets.items():
        lines = [json.dumps(row) + "\n" for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return f"--tasks={folder}"


def refused(words, *flags):
    with pytest.raises(UsageError, match=words) as caught:
        evaluate.main([*flags])
    assert "\n" not in str(caught.value)


def oracle(trained, ids, first):
    """(log-likelihood, whether it is not the likeliest) of each of ids from place `first` on."""
    row = np.int32([ids[:-1] + [0] * (100 - len(ids))])  # what comes after, nothing sees
    logits = jax.jit(train.next_logits, static_argnums=2)(trained.weights(), row, trained.cfg)
    logits_TV = np.asarray(logits)[0, first - 1 : len(ids) - 1]
    targets = ids[first:]
    likelihood_TV = np.asarray(jax.nn.log_softmax(logits_TV))
    return likelihood_TV[np.arange(len(targets)), targets], logits_TV.argmax(axis=1) != targets


# ---- Validation ----------------------------------------------------------------------------------


def test_the_loss_is_the_one_that_the_run_wrote_and_bits_are_per_byte_of_text(
    run, tmp_path, capsys
):
    wrote = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["val_loss"]
    found = evaluate.main([f"--checkpoint={run}", f"--out={tmp_path / 'out'}"])
    assert found["val_loss"] == pytest.approx(wrote, abs=1e-6)
    num_bytes = (documents(3, 40)[1:1001] != 256).sum()
    bits = 1000 * found["val_loss"] / math.log(2) / num_bytes
    assert found["bits_per_byte"] == pytest.approx(bits, abs=1e-5)
    assert f"the run wrote {wrote:.6f}" in capsys.readouterr().out


def test_of_other_shards_all_targets_are_scored_each_in_its_own_shard(random_run, tmp_path):
    data = [documents(11, 6), documents(12, 3)]
    make_folder(tmp_path / "data", "bytes")
    for i, tokens in enumerate(data):
        (tmp_path / f"data/other_{i}.bin").write_bytes(shard_bytes(tokens))
    trained, nats = open_checkpoint(random_run), []
    for tokens in data:
        for begin in range(0, len(tokens) - 1, 32):  # a row scores 32 targets, after 32 tokens
            nothing = [256] * max(0, 32 - begin)  # read as BOS
            ids = nothing + tokens[max(0, begin - 32) : begin + 33].tolist()
            nats += (-oracle(trained, ids, 33)[0]).tolist()
    flags = [f"--checkpoint={random_run}", f"--val_files={tmp_path}/data/other_*.bin"]
    flags.append(f"--out={tmp_path / 'out'}")
    found = evaluate.main(flags)
    assert found["val_tokens"] == len(nats) == sum(map(len, data)) - 2
    assert found["val_loss"] == pytest.approx(np.mean(nats), abs=1e-5)
    count = len(data[0]) + 9  # ten of the second shard
    found = evaluate.main([*flags, f"--val_tokens={count}"])
    assert found["val_loss"] == pytest.approx(np.mean(nats[:count]), abs=1e-5)


def test_without_the_tokenizers_files_there_is_the_loss_and_the_reason(run, tmp_path, capsys):
    other = changed(run, tmp_path / "run", lambda tensors: None)
    about = json.loads((other / "config.json").read_text())
    about["meta"]["tokenizer"] = "mine.json"
    (other / "config.json").write_text(json.dumps(about))
    _, val_files = make_folder(tmp_path / "data", "mine.json")
    flags = [f"--checkpoint={other}", val_files]
    found = evaluate.main(flags)
    assert found["bits_per_byte"] is None and found["val_loss"] > 0
    said = capsys.readouterr().out
    assert "no bits per byte" in said and "mine.json" in said
    refused("mine.json", *flags, f"--tokenizer={tmp_path}")


def test_what_cannot_be_scored_is_one_sentence(run, tmp_path):
    make_folder(tmp_path / "data", "test")
    checkpoint = f"--checkpoint={run}"
    shards = f"--val_files={tmp_path}/data/val_*.bin"
    refused("made with .*'test'.* but the model with", checkpoint, shards)
    refused("no shards match /nowhere/.*--val_tokens=0", checkpoint, "--val_files=/nowhere/*.bin")
    refused("too short for 9999999 targets; 2[0-9]* fit", checkpoint, "--val_tokens=9999999")
    old = changed(run, tmp_path / "run", lambda tensors: None)
    manifest = next(old.glob("ckpt/step-*/manifest.json"))
    manifest.write_text(manifest.read_text().replace('"format"', '"formerly"'))
    refused("e79511b", f"--checkpoint={old}")  # of an older train.py
    refused("no checkpoint there", "--checkpoint=/nowhere")
    refused("want --tasks", checkpoint, "--fetch")
    refused("nothing to do", checkpoint, "--val_tokens=0")
    refused("--shots", checkpoint, "--shots=few")
    refused("--max_len=-1", checkpoint, "--max_len=-1")
    refused(r"no \*.jsonl there; --fetch", checkpoint, "--tasks=/nowhere")
    refused("--typo", checkpoint, "--typo")


# ---- Log-likelihoods -----------------------------------------------------------------------------


def test_log_likelihoods_are_those_of_next_logits_however_rows_are_batched(random_run):
    trained, rng = open_checkpoint(random_run), np.random.default_rng(1)
    rows, expected = [], []
    for count, first in ((3, 1), (32, 20), (32, 32), (90, 1), (90, 88)):
        ids = [256, *rng.integers(0, 256, count).tolist()]
        rows.append((ids, first))
        likelihoods, missed = oracle(trained, ids, first)
        expected.append((likelihoods.sum(), missed.sum()))
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
    np.testing.assert_allclose(sums, [total for total, _ in expected * 3], atol=2e-4)
    assert missed.tolist() == [wrong for _, wrong in expected * 3]
    larger = evaluate.batches(rows, limits._replace(batch_tokens=200))
    assert [tokens.shape for _, tokens, _ in larger] == [(48, 33), (16, 101)]


def test_weights_that_prefer_what_is_right_score_1_in_every_form_and_the_others_less(run, tmp_path):
    tasks = lines_of(
        tmp_path / "sets",
        choice=[{"query": "see:", "choices": ["bbb", "aaa", "b"], "gold": 1}] * 2,
        schema=[{"context_options": ["this;", "that:"], "continuation": "aa", "gold": 1}],
        words=[
            {"context": "say:", "continuation": "aaa"},
            {"context": "say:", "continuation": "aba"},
        ],
    )
    rigged = changed(run, tmp_path / "run", rig)
    found = evaluate.main([f"--checkpoint={rigged}", tasks, "--val_tokens=0"])
    assert found["sets"] == {"choice": 1.0, "schema": 1.0, "words": 0.5}
    assert found["mean_centered"] == pytest.approx((1 + 1 + 0.5) / 3)
    assert (rigged / "evaluate.jsonl").exists()


def test_random_weights_score_chance_and_equals_share(random_run, run, tmp_path):
    rng = np.random.default_rng(3)
    rows = []
    for _ in range(400):
        query, *choices = ("".join(rng.choice([*"abcdefgh"], rng.integers(2, 9))) for _ in range(5))
        rows.append({"query": query, "choices": choices, "gold": int(rng.integers(4))})
    flags = [lines_of(tmp_path / "sets", guesses=rows), "--val_tokens=0"]
    flags.append(f"--out={tmp_path / 'out'}")
    found = evaluate.main([f"--checkpoint={random_run}", *flags])
    accuracy = found["sets"]["guesses"]
    assert abs(accuracy - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 400)
    assert found["mean_centered"] == pytest.approx((accuracy - 0.25) / 0.75, abs=1e-5)
    flat = changed(run, tmp_path / "run", lambda tensors: tensors.update(head=0 * tensors["head"]))
    found = evaluate.main([f"--checkpoint={flat}", *flags, "--max_per_task=50"])
    assert found["sets"]["guesses"] == 0.25 and found["mean_centered"] == 0


def task(name, *questions, form="multiple choice"):
    return evaluate.Task(name, form, [*questions], "")


def test_a_choice_is_judged_by_the_mean_of_its_tokens_and_a_completion_by_every_token():
    def score(tokens, first):
        """A token of a long word costs half a nat, of a short one a whole. z is a miss."""
        texts = [bytes(row[row < 256].astype(np.uint8)) for row in tokens]
        lengths = [len(text) + 1 - at for text, at in zip(texts, first, strict=True)]
        nats = [n * (0.5 if n > 4 else 1.0) for n in lengths]
        return -np.array(nats), np.array([text.count(b"z") for text in texts])

    def judged(task, score=score):
        places = range(len(task.questions))
        return evaluate.judge(task, places, 0, BYTES, score, evaluate.Limits(100, 64, 1))

    pairs = [("q:", "no"), ("q:", "certainly")]
    found = judged(task("mine", (pairs, 1), (pairs, 0), (pairs, 1)))
    assert found["accuracy"] == pytest.approx(2 / 3) and found["chance"] == 0.5
    assert found["centered"] == pytest.approx(1 / 3) and found["n"] == 3 and found["cut"] == 0
    assert found["stderr"] == pytest.approx(math.sqrt(2 / 27))
    words = task("mine", ([("a", "b")], 0), ([("a", "z")], 0), form="completion")
    assert judged(words)["accuracy"] == 0.5
    with pytest.raises(train.NonFiniteLoss):
        judged(words, lambda tokens, first: (np.full(len(first), np.nan), first))


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


def test_a_space_or_the_sets_own_delimiter_joins_and_belongs_to_what_is_scored():
    context = "Question: why? \n"
    question = ([(context, "because "), (context, " not")], 0)
    wanted = [("Question: why?", " because"), ("Question: why?", " not")]
    assert evaluate.prompts(task("mine", question), 0, 0) == wanted
    assert evaluate.prompts(task("piqa", question), 0, 0)[1] == ("Question: why?\nAnswer:", " not")


def test_shots_are_other_questions_with_their_right_answers():
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
    path = tmp_path / "some.jsonl"
    good = '{"query": "a", "choices": ["b", "c"], "gold": 1}'
    for line, words in (
        (good[:-1], "damaged"),
        ('{"query": "a"}', "wanted the keys query"),
        (good.replace("1", "2"), "right one's place"),
        (good.replace('["b", "c"]', '"bc"'), "two to choose from"),
        (good.replace('"c"', '" "'), "no empty continuation"),
        ('{"context": "a", "continuation": "b"}', "wanted one form in a file"),
    ):
        path.write_text(f"{good}\n{line}\n")
        argv = ["--checkpoint=nowhere", f"--tasks={tmp_path}"]
        assert train.command(lambda argv=argv: evaluate.main(argv)) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"error: {path}, line 2: ") and said.count("\n") == 1
        assert words in said


def test_a_second_invocation_scores_only_what_is_not_there(random_run, run, tmp_path, monkeypatch):
    rows = [{"query": f"{i}", "choices": ["yes", "no"], "gold": i % 2} for i in range(30)]
    tasks, out = lines_of(tmp_path / "sets", one=rows, two=rows[:7]), tmp_path / "out"
    argv = [f"--checkpoint={random_run}", tasks, f"--out={out}", "--max_per_task=20"]
    judged, real = [], evaluate.judge

    def judge(task, chosen, *rest):
        judged.append((task.name, len(chosen)))
        return real(task, chosen, *rest)

    monkeypatch.setattr(evaluate, "judge", judge)
    first = evaluate.main(argv)
    assert judged == [("one", 20), ("two", 7)] and first["val_loss"] > 0
    monkeypatch.setattr(evaluate, "validate", None)
    judged.clear()
    assert evaluate.main(argv) == first and not judged
    evaluate.main([*argv, "--max_per_task=25"])
    assert judged.pop() == ("one", 25) and not judged
    for flag in ("--shots=1", f"--checkpoint={run}"):
        evaluate.main([*argv, "--val_tokens=0", "--only=two", flag])
        assert judged.pop() == ("two", 7) and not judged
    lines_of(tmp_path / "sets", two=rows[1:8])
    out.write_text(out.read_text() + '{"key": "cut sho')  # by a kill
    evaluate.main(argv)
    assert judged.pop() == ("two", 7) and not judged
    assert json.loads(out.read_text().splitlines()[-1])["name"] == "two"
    refused("no three.jsonl there, only one, two", *argv, "--only=three")


# ---- The Hub -------------------------------------------------------------------------------------

MC = {"text": ["red", "blue"], "label": ["A", "B"]}
# a row as each dataset's card shows it, and the line that it becomes
HUB = {
    "hellaswag": (
        {"ctx": "He", "endings": ["a", "b"], "label": "1"},
        {"query": "He", "choices": ["a", "b"], "gold": 1},
    ),
    "lambada_openai": (
        {"text": "so he said no"},
        {"context": "so he said", "continuation": "no"},
    ),
    "arc_easy": (
        {"question": "Which?", "choices": MC, "answerKey": "B"},
        {"query": "Question: Which?", "choices": ["red", "blue"], "gold": 1},
    ),
    "piqa": (
        {"goal": "Sit", "sol1": "a", "sol2": "b", "label": 1},
        {"query": "Question: Sit\n", "choices": ["a", "b"], "gold": 1},
    ),
    "winogrande": (
        {"sentence": "As _ was late.", "option1": "Al", "option2": "Bo", "answer": "2"},
        {"context_options": ["As Al", "As Bo"], "continuation": "was late.", "gold": 1},
    ),
    "winograd_wsc": (
        {
            "text": "Joe saw Tom as he left.",
            "pronoun": "he",
            "pronoun_loc": 15,
            "options": ["Joe", "Tom"],
            "label": 0,
        },
        {
            "context_options": ["Joe saw Tom as Joe", "Joe saw Tom as Tom"],
            "continuation": "left.",
            "gold": 0,
        },
    ),
    "copa": (
        {
            "premise": "It rained.",
            "choice1": "I got wet.",
            "choice2": "I sang.",
            "question": "effect",
            "label": 0,
        },
        {"query": "It rained, therefore", "choices": ["i got wet.", "i sang."], "gold": 0},
    ),
    "commonsense_qa": (
        {"question": "Where?", "choices": MC, "answerKey": "A"},
        {
            "query": "Question: Where?\nChoices:\nA. red\nB. blue\nAnswer:",
            "choices": ["A", "B"],
            "gold": 0,
        },
    ),
    "openbook_qa": (
        {"question_stem": "It is", "choices": MC, "answerKey": "B"},
        {"query": "It is", "choices": ["red", "blue"], "gold": 1},
    ),
    "boolq": (
        {"passage": "Text.", "question": "is it", "answer": True},
        {"query": "Passage: Text.\nQuestion: is it?", "choices": ["no", "yes"], "gold": 1},
    ),
}


def test_fetching_writes_what_is_missing_in_a_documented_form_and_says_what_failed(
    tmp_path, monkeypatch
):
    wanted = "pip install -r scripts/requirements.txt"
    pyarrow = pytest.importorskip("pyarrow", reason=wanted)
    parquet = pytest.importorskip("pyarrow.parquet", reason=wanted)
    asked, names = [], {}
    for name, (repo, part, _) in evaluate.SETS.items():
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
            assert evaluate.boolq(row) == line
        else:
            text = (tmp_path / f"sets/{name}.jsonl").read_text()
            assert text == (json.dumps(line) + "\n") * 3
    assert len(evaluate.read_tasks(tmp_path / "sets", [])) == 10
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    refused(wanted, *fetch)
