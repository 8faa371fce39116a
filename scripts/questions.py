"""Sets of questions for scripts/evaluate.py: their three forms, their files, and the Hub's sets."""

import codecs
import hashlib
import json
import os
from pathlib import Path
from typing import NamedTuple

import train
from scripts.text import READING, hub_errors, package, usage_errors
from train import UsageError, require

FORMS = {
    "multiple choice": ("query", "choices", "gold"),
    "schema": ("context_options", "continuation", "gold"),
    "completion": ("context", "continuation"),
}

# ---- Files ---------------------------------------------------------------------------------------


class Task(NamedTuple):
    name: str
    form: str
    questions: list  # of ([(context, continuation), ...], the right one's place)
    places: list  # of each question its file and line
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
    (context + continuation).encode()  # JSON may hold half a character, which no text does
    return context, continuation


def read_task(path):
    """The Task of a .jsonl file. Raises UsageError, naming the line."""
    require(path.is_file(), f"{path}: wanted a file")  # a pipe never ends
    with usage_errors(f"{path}: cannot be read", OSError):
        blob = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    questions, places = [], []
    the_form = None
    for number, line in enumerate(blob.split(b"\n"), 1):
        if not line.strip():
            continue
        here = f"{path}, line {number}"
        with usage_errors(f"{here}: damaged"):
            form, question = parse_row(json.loads(line.decode()))
        the_form = the_form or form
        require(form == the_form, f"{here}: a {form}, wanted one form in a file, here {the_form}")
        questions.append(question)
        places.append(here)
    require(questions, f"{path}: holds no questions; delete it, and --fetch gets the Hub's")
    return Task(path.stem, the_form, questions, places, hashlib.sha256(blob).hexdigest())


def read_tasks(folder, names):
    """The named Tasks of a folder; without names, every one. Raises UsageError."""
    found = {path.stem: path for path in sorted(Path(folder).glob("*.jsonl"))}
    require(found, f"--tasks={folder}: no *.jsonl there; --fetch gets them from the Hub")
    for name in names:
        known = ", ".join(found)
        require(name in found, f"--tasks={folder}: no {name}.jsonl there, only {known}")
    return [read_task(found[name]) for name in names or found]


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
    hub = package("huggingface_hub", "--fetch")
    parquet = package("pyarrow.parquet", "--fetch")
    arrow = package("pyarrow", "--fetch")
    repo, part, convert = SETS[name]
    file = f"{part}/0000.parquet"
    here = f"{name}: {file} of {repo}"
    with hub_errors(here):
        made = "refs/convert/parquet"
        path = hub.hf_hub_download(repo, file, repo_type="dataset", revision=made)
    with usage_errors(here, (*READING, arrow.ArrowException)):
        rows = parquet.read_table(path).to_pylist()
    lines = []
    for number, row in enumerate(rows, 1):
        with usage_errors(f"{here}, row {number}", (*READING, AttributeError)):
            line = convert(row)
            parse_row(line)
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    train.write_file(folder / f"{name}.jsonl", "".join(lines).encode())
    print(f"{name}: {len(lines)} questions of {repo}", flush=True)


def fetch(folder, names=tuple(SETS)):
    """Write the sets that a folder lacks. Raises UsageError where one failed, after all others."""
    folder.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in names:
        if not os.path.lexists(folder / f"{name}.jsonl"):
            try:
                fetch_set(name, folder)
            except UsageError as error:
                print(error, flush=True)
                failed.append(str(error))
    said = f"{len(failed)} sets could not be had, the first: {''.join(failed[:1])}"
    require(not failed, f"{said}; what is in {folder} scores without --fetch")
