"""The sets of questions that scripts/evaluate.py scores, from the Hugging Face Hub into its three forms (`--fetch`).

Read are the Parquet files that the Hub itself makes of a dataset, at its revision refs/convert/parquet; texts are put as
CORE's sets have them. The datasets' own terms hold. Not yet run against the Hub, only against a stand-in: names of datasets
and columns are as their cards give them, and a set that is not to be had is told of.
"""
import json, os

from scripts.text import package, usage_errors
from train import UsageError

def by_label(row):  # place of the answer among the choices' labels
    return row["choices"]["label"].index(row["answerKey"])

def copa(row):
    word = {"cause": "because", "effect": "therefore"}[row["question"]]
    choices = [row[key][:1].lower() + row[key][1:] for key in ("choice1", "choice2")]
    return {"query": f"{row['premise'].strip().rstrip('.')}, {word}", "choices": choices, "gold": row["label"]}

def lettered(row):  # as CommonsenseQA is asked: which letter
    labels, texts = row["choices"]["label"], row["choices"]["text"]
    listed = "\n".join(f"{label}. {words}" for label, words in zip(labels, texts))
    return {"query": f"Question: {row['question']}\nChoices:\n{listed}\nAnswer:", "choices": [*labels], "gold": by_label(row)}

def winograd(row):
    at = row["pronoun_loc"]
    before, after = row["text"][:at], row["text"][at + len(row["pronoun"]):]
    return {"context_options": [before + option for option in row["options"]], "continuation": after.strip(), "gold": row["label"]}

def winogrande(row):
    before, after = row["sentence"].split("_")
    return {"context_options": [before + row[key] for key in ("option1", "option2")], "continuation": after.strip(),
            "gold": int(row["answer"]) - 1}

def last_word(row):
    context, word = row["text"].rstrip().rsplit(" ", 1)
    return {"context": context, "continuation": word}

def arc(row): return {"query": "Question: " + row["question"], "choices": [*row["choices"]["text"]], "gold": by_label(row)}

# name: (dataset, configuration, split, row of the dataset -> line of the set)
SETS = {
    "hellaswag": ("Rowan/hellaswag", "default", "validation",
                  lambda row: {"query": row["ctx"], "choices": [*row["endings"]], "gold": int(row["label"])}),
    "lambada_openai": ("EleutherAI/lambada_openai", "default", "test", last_word),
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy", "test", arc),
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge", "test", arc),
    "piqa": ("ybisk/piqa", "plain_text", "validation",
             lambda row: {"query": f"Question: {row['goal']}\n", "choices": [row["sol1"], row["sol2"]], "gold": row["label"]}),
    "winogrande": ("allenai/winogrande", "winogrande_xl", "validation", winogrande),
    "winograd_wsc": ("ErnestSDavis/winograd_wsc", "wsc273", "test", winograd),
    "copa": ("aps/super_glue", "copa", "validation", copa),
    "commonsense_qa": ("tau/commonsense_qa", "default", "validation", lettered),
    "openbook_qa": ("allenai/openbookqa", "main", "test",
                    lambda row: {"query": row["question_stem"], "choices": [*row["choices"]["text"]], "gold": by_label(row)}),
    "boolq": ("google/boolq", "default", "validation", lambda row: {
        "query": f"Passage: {row['passage']}\nQuestion: {row['question']}?", "choices": ["no", "yes"], "gold": int(row["answer"])}),
}

def fetch(folder, sets=SETS):
    """Writes folder/NAME.jsonl for the sets that it lacks, each whole or not at all; what fails is told of once the others are there.
    Raises UsageError, without pyarrow too."""
    missing, failed = [name for name in sets if not (folder / f"{name}.jsonl").exists()], []
    if missing:
        package("pyarrow", "--fetch")
        import pyarrow.parquet
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import LocalEntryNotFoundError
        with usage_errors(f"{folder}: cannot be made"):
            folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(missing, 1):
        repo, configuration, split, convert = sets[name]
        file, final = f"{configuration}/{split}/0000.parquet", folder / f"{name}.jsonl"
        try:
            with usage_errors(f"{name}: {file} of {repo}", Exception):
                rows = pyarrow.parquet.read_table(hf_hub_download(
                    repo, file, repo_type="dataset", revision="refs/convert/parquet")).to_pylist()
                lines = [json.dumps(convert(row), ensure_ascii=False) for row in rows]
            staging = final.with_suffix(f".{os.getpid()}")
            staging.write_text("\n".join(lines) + "\n", encoding="utf-8")
            staging.replace(final)
            print(f"[{i}/{len(missing)}] {name}: {len(lines)} questions of {repo}", flush=True)
        except UsageError as error:
            failed.append(str(error))
            print(f"[{i}/{len(missing)}] {failed[-1]}", flush=True)
            if isinstance(error.__cause__, LocalEntryNotFoundError):  # the Hub cannot be reached at all
                break
    if failed:
        raise UsageError(f"{len(failed)} of {len(missing)} sets could not be had, the first: {failed[0]}; what is in {folder} "
                        "scores without --fetch")
