"""scripts/evaluate.py and eval_sets.py: the trainer's loss, bits per byte, log-likelihoods, forms, resuming, and the Hub's rows.

One run of the tiny model is trained; most tests give its checkpoint other weights, so that what is right is known.
"""
import contextlib
import io
import json
import math
import shutil
import types

import jax
import numpy as np
import pytest
import safetensors.numpy

import train
from scripts import eval_sets, evaluate, text
from scripts.checkpoint import open_checkpoint
from shards import documents, make_folder, shard_bytes
from train import GPT, UsageError

BYTES = text.open_tokenizer(text.BYTES, ".")
FLAGS = """--preset=demo --steps=2 --num_layers=2 --model_dim=32 --num_heads=2 --head_dim=16 --mlp_dim=64
 --skips=((0,1),) --late_inputs=((0,1),) --backout=0 --offset_layers=1 --long_layers=1 --compute_dtype=float32
 --residual_dtype=none --stages.end=1 --stages.batch_tokens=512 --stages.seq_len=32 --stages.short=16 --stages.long=24
 --micro_tokens=65536 --val.seq_len=64 --val.short=24 --val_tokens=1000 --val_context=32 --target_loss=0""".split()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run's folder."""
    jax.config.update("jax_disable_most_optimizations", True)
    folder = tmp_path_factory.mktemp("run")
    with contextlib.redirect_stdout(io.StringIO()), pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "show_samples", lambda *_: None)
        yield train.main([*FLAGS, f"--log_dir={folder / 'logs'}", *make_folder(folder / "data", "bytes")])
    jax.config.update("jax_disable_most_optimizations", False)


def changed(run, folder, change):
    """A copy of the run whose weights went through change(tensors)."""
    shutil.copytree(run, folder)
    checkpoint = next(folder.glob("ckpt/step-*"))
    tensors = safetensors.numpy.load_file(checkpoint / "params.safetensors")
    change(tensors)
    safetensors.numpy.save_file(tensors, checkpoint / "params.safetensors")
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["sha256"]["params.safetensors"] = train.file_sha256(checkpoint / "params.safetensors")
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    return folder


def randomize(tensors):
    rng = np.random.default_rng(5)
    for name in sorted(tensors):
        if tensors[name].ndim > 1:
            tensors[name] = 0.3 * rng.standard_normal(tensors[name].shape, np.float32)


FOLLOWS = {":": " ", " ": "a", "a": "a"}
def rig(tensors):
    """Every byte's most likely successor is that of FOLLOWS: nothing but its own embedding reaches the head."""
    rng = np.random.default_rng(6)
    for name in tensors:
        if name.split("/")[-1] in ("w_out", "w_down", "smear_mix"):
            tensors[name] *= 0
    embed = tensors["embed"] = rng.standard_normal(tensors["embed"].shape).astype(np.float32)
    tensors["head"] *= 0
    for before, after in FOLLOWS.items():
        tensors["head"][ord(after)] += embed[ord(before)] / np.linalg.norm(embed[ord(before)])


@pytest.fixture(scope="module")
def random_run(run, tmp_path_factory):
    return changed(run, tmp_path_factory.mktemp("random") / "run", randomize)


def lines_of(folder, **sets):
    folder.mkdir(exist_ok=True)
    for name, rows in sets.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"--tasks={folder}"


def final_loss(run):
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["val_loss"]


# ---- Validation ----

def test_the_loss_is_the_one_that_the_run_wrote_and_bits_are_per_byte_of_text(run, tmp_path, capsys):
    found = evaluate.main([f"--checkpoint={run}", f"--out={tmp_path / 'out'}"])
    assert found["val_loss"] == pytest.approx(final_loss(run), abs=1e-6)
    tokens = documents(3, 40)[1:1001]
    assert found["bits_per_byte"] == pytest.approx(1000 * found["val_loss"] / math.log(2) / (tokens != 256).sum(), abs=1e-5)
    assert f"the run wrote {final_loss(run):.6f}" in capsys.readouterr().out


def test_of_other_shards_all_targets_are_scored_each_in_its_own_shard(random_run, tmp_path, capsys):
    data = [documents(11, 6), documents(12, 3)]
    make_folder(tmp_path / "data", "bytes")
    for i, tokens in enumerate(data):
        (tmp_path / f"data/other_{i}.bin").write_bytes(shard_bytes(tokens))
    found = evaluate.main([f"--checkpoint={random_run}", f"--out={tmp_path / 'out'}", f"--val_files={tmp_path}/data/other_*.bin"])
    trained, nats, oracle = open_checkpoint(random_run), [], jax.jit(train.next_logits, static_argnums=2)
    for tokens in data:
        for begin in range(0, len(tokens) - 1, 32):  # a row scores 32 targets, after the 32 tokens before them
            row = np.r_[np.full(max(0, 32 - begin), 256), tokens[max(0, begin - 32):begin + 33]]  # nothing is read as BOS
            inputs = np.pad(row[:-1], (0, 65 - len(row)))  # what comes after, nothing sees
            logits_TV = oracle(trained.weights(), np.int32(inputs[None]), trained.cfg)[0]
            nats += (-np.asarray(jax.nn.log_softmax(logits_TV))[np.arange(len(row) - 1), row[1:]])[32:].tolist()
    assert found["val_tokens"] == len(nats) == sum(map(len, data)) - 2
    assert found["val_loss"] == pytest.approx(np.mean(nats), abs=1e-5)
    assert "other tokens than the run itself scored" in capsys.readouterr().out
    flags = [f"--val_files={tmp_path}/data/other_*.bin", f"--val_tokens={len(data[0]) + 9}"]  # ten of the second shard
    found = evaluate.main([f"--checkpoint={random_run}", f"--out={tmp_path / 'out'}", *flags])
    assert found["val_loss"] == pytest.approx(np.mean(nats[:len(data[0]) + 9]), abs=1e-5)


def test_without_the_tokenizers_files_there_is_the_loss_and_the_reason(run, tmp_path, capsys):
    def strange(path):
        made = json.loads(path.read_text())
        made.get("meta", made)["tokenizer"] = "mine.json"
        path.write_text(json.dumps(made))
    other = changed(run, tmp_path / "run", lambda tensors: None)
    strange(other / "config.json")
    flags = make_folder(tmp_path / "data", "mine.json")
    found = evaluate.main([f"--checkpoint={other}", flags[1]])
    assert found["bits_per_byte"] is None and found["val_loss"] > 0
    assert "no bits per byte" in (said := capsys.readouterr().out) and "mine.json" in said
    with pytest.raises(UsageError, match="mine.json"):
        evaluate.main([f"--checkpoint={other}", flags[1], f"--tokenizer={tmp_path}"])


def test_shards_of_another_tokenizer_or_too_few_tokens_are_one_sentence(run, tmp_path):
    make_folder(tmp_path / "data", "test")
    with pytest.raises(UsageError, match="made with .*'test'.* but the model with"):
        evaluate.main([f"--checkpoint={run}", f"--val_files={tmp_path}/data/val_*.bin"])
    with pytest.raises(UsageError, match="no shards match /nowhere/.*--val_tokens=0 with --tasks"):
        evaluate.main([f"--checkpoint={run}", "--val_files=/nowhere/*.bin"])
    with pytest.raises(UsageError, match="too short for 9999999 targets; 2[0-9]* fit"):
        evaluate.main([f"--checkpoint={run}", "--val_tokens=9999999"])


def test_a_checkpoint_of_an_older_train_py_is_refused_and_the_commit_named(run, tmp_path):
    old = changed(run, tmp_path / "run", lambda tensors: None)
    manifest = next(old.glob("ckpt/step-*/manifest.json"))
    manifest.write_text(manifest.read_text().replace('"format"', '"formerly"'))
    with pytest.raises(UsageError, match="e79511b"):
        open_checkpoint(old)


# ---- Log-likelihoods ----

def test_log_likelihoods_are_those_of_next_logits_however_rows_are_batched_and_padded(random_run):
    trained, rng, oracle = open_checkpoint(random_run), np.random.default_rng(1), jax.jit(train.next_logits, static_argnums=2)
    rows = [([256, *rng.integers(0, 256, n).tolist()], first) for n, first in ((3, 1), (32, 20), (32, 32), (90, 1), (90, 88))]
    expected = []
    for ids, first in rows:
        row = np.int32([ids[:-1] + [0] * (100 - len(ids))])  # what comes after, nothing sees
        logits_TV = np.asarray(oracle(trained.weights(), row, trained.cfg))[0, first - 1:len(ids) - 1]
        of_targets = np.asarray(jax.nn.log_softmax(logits_TV))[np.arange(len(ids) - first), ids[first:]]
        expected.append((of_targets.sum(), (logits_TV.argmax(axis=1) != ids[first:]).sum()))
    mesh = train.make_mesh()
    params = jax.device_put(trained.params, train.state_shardings(GPT, mesh, trained.cfg).params)
    score, shapes = evaluate.make_scorer(mesh, trained.cfg), []
    def scored(tokens, first):
        shapes.append(tokens.shape)
        return score(params, tokens, first)
    sums, missed = evaluate.log_likelihoods(rows * 3, scored, 100, 1, mesh.size)
    assert shapes == [(8, 33), (8, 33), (8, 101)]
    np.testing.assert_allclose(sums, [total for total, _ in expected * 3], atol=2e-4)
    assert missed.tolist() == [wrong for _, wrong in expected * 3]
    sizes = [tokens.shape for _, tokens, _ in evaluate.batches(rows, 100, 200, mesh.size)]
    assert sizes == [(48, 33), (16, 101)]


def test_weights_that_prefer_what_is_right_score_1_in_every_form_and_the_others_less(run, tmp_path):
    tasks = lines_of(tmp_path / "sets", choice=[{"query": "see:", "choices": ["bbb", "aaa", "b"], "gold": 1}] * 2,
                     hella=[{"ctx": "see: ", "endings": ["aa", "bbb"], "label": 0, "ind": 7}],
                     schema=[{"context_options": ["this;", "that:"], "continuation": "aa", "gold": 1}],
                     words=[{"context": "say:", "continuation": "aaa"}, {"context": "say:", "continuation": "aba"}])
    rigged = changed(run, tmp_path / "run", rig)
    found = evaluate.main([f"--checkpoint={rigged}", tasks, "--val_tokens=0"])
    assert found["sets"] == {"choice": 1.0, "hella": 1.0, "schema": 1.0, "words": 0.5}
    assert found["mean_centered"] == pytest.approx((1 + 1 + 1 + 0.5) / 4)
    assert (rigged / "evaluate.jsonl").exists()


def test_random_weights_score_chance_and_equals_share(random_run, run, tmp_path, capsys):
    rng = np.random.default_rng(3)
    word = lambda: "".join(rng.choice([*"abcdefgh"], rng.integers(2, 9)))
    rows = [{"query": word(), "choices": [word() for _ in range(4)], "gold": int(rng.integers(4))} for _ in range(400)]
    tasks = lines_of(tmp_path / "sets", guesses=rows)
    found = evaluate.main([f"--checkpoint={random_run}", tasks, "--val_tokens=0", f"--out={tmp_path / 'out'}"])
    assert abs(found["sets"]["guesses"] - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 400)
    assert found["mean_centered"] == pytest.approx((found["sets"]["guesses"] - 0.25) / 0.75, abs=1e-5)
    flat = changed(run, tmp_path / "run", lambda tensors: tensors.update(head=0 * tensors["head"]))
    found = evaluate.main([f"--checkpoint={flat}", tasks, "--val_tokens=0", "--max_per_task=50"])
    assert found["sets"]["guesses"] == 0.25 and found["mean_centered"] == 0


def test_a_choice_is_judged_by_the_mean_of_its_tokens_and_a_completion_by_every_token():
    def score(tokens, first):  # a token of a long word costs half a nat, of a short one a whole; z is never the likeliest
        texts = [bytes(row[row < 256].astype(np.uint8)) for row in tokens]
        lengths = [len(text) + 1 - at for text, at in zip(texts, first)]
        return np.array([-n * (0.5 if n > 4 else 1.0) for n in lengths]), np.array([text.count(b"z") for text in texts])
    pairs = [("q:", "no"), ("q:", "certainly")]
    options = (0, 100, 64, 1)
    found = evaluate.judge(task("mine", (pairs, 1), (pairs, 0), (pairs, 1)), [0, 1, 2], options, BYTES, score)
    assert found["accuracy"] == pytest.approx(2 / 3) and found["centered"] == pytest.approx(1 / 3) and found["chance"] == 0.5
    assert found["nats_per_token"] == pytest.approx((0.5 + 1.0 + 0.5) / 3) and found["n"] == 3 and found["cut"] == 0
    assert found["tokens"] == 3 * (len("q: no") + len("q: certainly")) and found["stderr"] == pytest.approx(math.sqrt(2 / 27))
    words = evaluate.Task("mine", "completion", [([("a", "b")], 0), ([("a", "z")], 0)], "")
    assert evaluate.judge(words, [0, 1], options, BYTES, score)["accuracy"] == 0.5
    with pytest.raises(train.NonFiniteLoss):
        evaluate.judge(words, [0, 1], options, BYTES, lambda tokens, first: (np.full(len(first), np.nan), first))


# ---- Prompts ----

def task(name, *questions):
    return evaluate.Task(name, "multiple choice", [*questions], "")


def test_what_is_scored_begins_where_the_text_departs_from_its_contexts_encoding():
    odd = types.SimpleNamespace(bos_id=99, encode=lambda words: [words[i:i + 3] for i in range(0, len(words), 3)])  # three letters a token
    assert evaluate.encode_pair("abcd", "efg", odd, 100) == ([99, "abc", "def", "g"], 2, False)  # d is part of another token than in "abcd"
    assert evaluate.encode_pair("abc", "def", odd, 100) == ([99, "abc", "def"], 2, False)
    assert evaluate.encode_pair("", "def", odd, 100) == ([99, "def"], 1, False)


def test_a_long_text_is_cut_from_the_left_behind_its_bos():
    ids, first, cut = evaluate.encode_pair("x" * 50, " yes", BYTES, 10)
    assert (bytes(ids[1:]), ids[0], first, cut) == (b"xxxxxx yes", 256, 7, True)
    ids, first, cut = evaluate.encode_pair("x" * 50, " yes", BYTES, 3)
    assert (bytes(ids[1:]), first, cut) == (b"yes", 1, True)


def test_a_space_or_the_sets_own_delimiter_joins_and_belongs_to_what_is_scored():
    question = ([("Question: why? \n", "because "), ("Question: why? \n", " not")], 0)
    assert evaluate.prompts(task("mine", question), 0, 0) == [("Question: why?", " because"), ("Question: why?", " not")]
    assert evaluate.prompts(task("piqa", question), 0, 0)[1] == ("Question: why?\nAnswer:", " not")


def test_shots_are_other_questions_with_their_right_answers():
    questions = [([(f"q{i}", f"right{i}"), (f"q{i}", f"wrong{i}")], 0) for i in range(9)]
    for i in range(9):
        (before, after), (also, _) = evaluate.prompts(task("mine", *questions), i, 3)
        *shots, last = before.split("\n\n")
        numbers = [shot[1] for shot in shots]
        assert last == f"q{i}" and after == f" right{i}" and before == also
        assert shots == [f"q{k} right{k}" for k in numbers] and len({*numbers, str(i)}) == 4
        assert evaluate.prompts(task("mine", *questions), i, 3)[0] == (before, after)
    assert len(evaluate.prompts(task("mine", *questions), 2, 50)[0][0].split("\n\n")) == 9


# ---- Files, resuming ----

@pytest.mark.parametrize("line, words", [
    ('{"query": "a", "choices": ["b", "c"], "gold": 0', "line 2: damaged"), ('{"query": "a"}', "wanted the keys query"),
    ('{"query": "a", "choices": ["b", "c"], "gold": 2}', "right one's place"), ('{"query": "a", "choices": ["b", " "], "gold": 0}', "no empty continuation"),
    ('{"context": "a", "continuation": "b"}', "wanted one form in a file")])
def test_a_damaged_set_is_one_sentence_with_its_line_and_exit_code_2(tmp_path, capsys, line, words):
    path = tmp_path / "some.jsonl"
    path.write_text('{"query": "a", "choices": ["b", "c"], "gold": 1}\n' + line + "\n")
    assert train.command(lambda: evaluate.main(["--checkpoint=nowhere", f"--tasks={tmp_path}"])) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {path}, line 2: ") and words in said and said.count("\n") == 1


@pytest.mark.parametrize("flags, words", [
    (["--fetch"], "want --tasks"), (["--val_tokens=0"], "nothing to do"), (["--shots=few"], "--shots"), (["--max_len=-1"], "--max_len"),
    (["--checkpoint=/nowhere"], "no checkpoint there"), (["--tasks=/nowhere"], r"no \*.jsonl there; --fetch"), (["--typo"], "--typo")])
def test_wrong_flags_are_one_sentence(flags, words):
    with pytest.raises(UsageError, match=words) as caught:
        evaluate.main(["--checkpoint=/nowhere", *flags])
    assert "\n" not in str(caught.value)


def test_a_second_invocation_scores_only_what_is_not_there(random_run, run, tmp_path, monkeypatch, capsys):
    rows = [{"query": f"{i}", "choices": ["yes", "no"], "gold": i % 2} for i in range(30)]
    tasks = lines_of(tmp_path / "sets", one=rows, two=rows[:7])
    argv, judged, real = [f"--checkpoint={random_run}", tasks, f"--out={tmp_path / 'out'}", "--max_per_task=20"], [], evaluate.judge
    monkeypatch.setattr(evaluate, "judge", lambda task, chosen, *rest: judged.append((task.name, len(chosen))) or real(task, chosen, *rest))
    first = evaluate.main(argv)
    assert judged == [("one", 20), ("two", 7)] and first["val_loss"] > 0
    monkeypatch.setattr(evaluate, "validate", None)
    assert evaluate.main(argv) == first and len(judged) == 2 and "0 of 2 sets to do" in capsys.readouterr().out
    evaluate.main([*argv, "--max_per_task=25"])
    assert judged[2:] == [("one", 25)]
    for i, flags in enumerate((["--shots=1"], [f"--checkpoint={run}"])):
        evaluate.main([*argv, "--val_tokens=0", "--only=two", *flags])
        assert judged[3 + i:] == [("two", 7)]
    lines_of(tmp_path / "sets", two=rows[1:8])
    (tmp_path / "out").write_text((tmp_path / "out").read_text() + '{"key": "cut sho')
    evaluate.main(argv)
    assert judged[5:] == [("two", 7)]
    assert [json.loads(line)["name"] for line in (tmp_path / "out").read_text().splitlines()[-1:]] == ["two"]
    with pytest.raises(UsageError, match="no three.jsonl there, only one, two"):
        evaluate.main([*argv, "--only=three"])


# ---- The Hub ----

MC = {"text": ["red", "blue"], "label": ["A", "B"]}
HUB = {  # a row as each dataset's card shows it, the line it becomes
    "hellaswag": ({"ctx": "He", "endings": ["a", "b"], "label": "1"}, {"query": "He", "choices": ["a", "b"], "gold": 1}),
    "lambada_openai": ({"text": "so he said no"}, {"context": "so he said", "continuation": "no"}),
    "arc_easy": ({"question": "Which?", "choices": MC, "answerKey": "B"}, {"query": "Question: Which?", "choices": ["red", "blue"], "gold": 1}),
    "piqa": ({"goal": "Sit", "sol1": "a", "sol2": "b", "label": 1}, {"query": "Question: Sit\n", "choices": ["a", "b"], "gold": 1}),
    "winogrande": ({"sentence": "As _ was late.", "option1": "Al", "option2": "Bo", "answer": "2"},
                   {"context_options": ["As Al", "As Bo"], "continuation": "was late.", "gold": 1}),
    "winograd_wsc": ({"text": "Joe saw Tom as he left.", "pronoun": "he", "pronoun_loc": 15, "options": ["Joe", "Tom"], "label": 0},
                     {"context_options": ["Joe saw Tom as Joe", "Joe saw Tom as Tom"], "continuation": "left.", "gold": 0}),
    "copa": ({"premise": "It rained.", "choice1": "I got wet.", "choice2": "I sang.", "question": "effect", "label": 0},
             {"query": "It rained, therefore", "choices": ["i got wet.", "i sang."], "gold": 0}),
    "commonsense_qa": ({"question": "Where?", "choices": MC, "answerKey": "A"},
                       {"query": "Question: Where?\nChoices:\nA. red\nB. blue\nAnswer:", "choices": ["A", "B"], "gold": 0}),
    "openbook_qa": ({"question_stem": "It is", "choices": MC, "answerKey": "B"}, {"query": "It is", "choices": ["red", "blue"], "gold": 1}),
    "boolq": ({"passage": "Text.", "question": "is it", "answer": True},
              {"query": "Passage: Text.\nQuestion: is it?", "choices": ["no", "yes"], "gold": 1})}


@pytest.mark.parametrize("name", eval_sets.SETS)
def test_a_row_of_the_hub_becomes_a_line_of_a_documented_form(name):
    row, line = HUB[name.replace("challenge", "easy")]
    assert eval_sets.SETS[name][3](row) == line
    evaluate.parse_row(line)


def test_fetching_writes_what_is_missing_and_says_what_failed(tmp_path, monkeypatch, capsys):
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow"), pytest.importorskip("pyarrow")
    asked = []
    def download(repo, file, repo_type, revision):
        asked.append((repo, file, repo_type, revision))
        if repo == "google/boolq":
            raise OSError("no such file\nand a long explanation")
        parquet.write_table(pyarrow.Table.from_pylist([HUB["copa" if "copa" in file else "hellaswag"][0]] * 3), tmp_path / "0000.parquet")
        return str(tmp_path / "0000.parquet")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    sets = {name: eval_sets.SETS[name] for name in ("hellaswag", "boolq", "copa")}
    for already in ((), ("hellaswag", "copa")):
        with pytest.raises(UsageError, match=f"1 of {3 - len(already)} sets could not be had, the first: boolq.*what is in .* scores without --fetch") as caught:
            eval_sets.fetch(tmp_path / "sets", sets)
        assert "\n" not in str(caught.value)
    assert asked[0] == ("Rowan/hellaswag", "default/validation/0000.parquet", "dataset", "refs/convert/parquet") and len(asked) == 4
    assert [len(task.questions) for task in evaluate.read_tasks(tmp_path / "sets", [])] == [3, 3]
    capsys.readouterr()
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(UsageError, match="pip install -r scripts/requirements.txt"):
        eval_sets.fetch(tmp_path / "sets", sets)
