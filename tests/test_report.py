"""scripts/report.py: runs as train.py writes them, their means, the page, and what is refused."""

import html.parser
import json
import re
import shutil
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from shards import TINY, make_folder

import train
from scripts import report
from scripts.report import find_runs, main, make_curves, series
from train import ROOT, command, replace

pytest.importorskip("matplotlib", reason="matplotlib, of scripts/requirements.txt, is missing")
HOSTILE = "<script>x()<∕script>&\"'$x^2$"  # ∕ is no slash: this is a folder's name


def make_run(folder, seed=0, upto=30, first=5, offset=0.0, second=0.5, **changes):
    """A run's folder as train.py itself writes it, without training: steps first to `upto`, and the
    end if that is the last. The same folder again is a run that is resumed."""
    folder.mkdir(parents=True, exist_ok=True)
    make_folder(folder.parent)
    files = [f"{folder.parent}/{split}_*.bin" for split in ("train", "val")]
    known = {"seed": seed, "vocab_size": 257, "bos_id": 256, "target_loss": 3.0}
    cfg = replace(train.parse_flags([TINY]), **known | changes)
    log = train.Log(folder, train.GPT.specs(cfg), cfg, {})
    source = (ROOT / "train.py").read_text()
    log.begin(source, "asked for", ["--preset=demo"], *map(train.open_shards, files), [])
    if first > 5:
        log.line(f"resumed: {folder}/ckpt/step-{first - 5:06d} at step {first - 5}")
        log.marked = first - 5, second * (first - 5)
    for step in range(first, upto + 1, 5):
        log.clock.total = np.array([second * step, 1.0])
        loss = 4 - step / 20 + offset
        log.step(step, loss, loss - 0.25 if step % 10 == 0 else None)
    if upto == cfg.steps:
        log.result()
        log.seal()
    return folder


class Page(html.parser.HTMLParser):
    """Tags with their attributes, and the text outside of styles."""

    def __init__(self, path):
        super().__init__()
        self.tags = []
        self.text = ""
        self.inside = ""
        self.feed(path.read_text())
        self.text = re.sub(r"\s+", " ", self.text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = tag

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside != "style":
            self.text += data + " "


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """Three seeds, another config in a folder that a user named, and a run that was cut off."""
    root = tmp_path_factory.mktemp("logs")
    for seed in range(3):
        folder = root / f"20260101T00000{seed}Z-00000{seed}"
        make_run(folder, seed, offset=0.01 * seed**2, second=0.5 + 0.1 * seed)
    make_run(root / HOSTILE, offset=-0.2, muon_lr=0.5)
    make_run(root / "20260101T000009Z-000009", 3, upto=20)
    return root


@pytest.fixture(scope="module")
def page(logs, tmp_path_factory):
    out = tmp_path_factory.mktemp("page") / "all.html"
    folders = sorted(path for path in logs.iterdir() if path.is_dir())
    main([*map(str, folders), f"--out={out}"])
    return out


def log_alone(folder):
    """The Run of its log, without the metrics that lie beside it."""
    (run,) = find_runs(shutil.copy(folder / "log.txt", folder / "seed0.txt"))
    (folder / "seed0.txt").unlink()
    return run


def test_a_log_alone_tells_what_the_metrics_beside_it_tell(logs):
    folder = logs / "20260101T000001Z-000001"
    from_log = log_alone(folder)
    (from_folder,) = find_runs(folder)
    written = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert from_log.done and from_folder.done and from_folder.rows == written[:-1]
    digits = {"train_loss": 4, "train_time_s": 3, "step_ms": 1, "tokens_per_s": -2}
    for mine, row in zip(from_log.rows, written[:-1], strict=True):
        assert (mine["step"], mine["tokens"]) == (row["step"], row["tokens"])
        for name, places in digits.items():
            assert mine[name] == pytest.approx(row[name], abs=0.51 * 10**-places)
        assert ("val_loss" in mine) == ("val_loss" in row)
    assert from_log.to_target == from_folder.to_target == pytest.approx(20 * 0.6)
    assert from_log.shared == from_folder.shared and from_log.config["seed"] == 1


def test_seeds_are_one_curve_of_their_mean_within_their_extremes(logs):
    runs = [run for folder in sorted(logs.glob("20*")) for run in find_runs(folder)]
    (curve,) = make_curves(runs)
    assert len(curve.runs) == 4 and [run.config["seed"] for run in curve.finished] == [0, 1, 2]
    tokens, seconds, losses = series(curve.finished, "val_loss")
    base = 4 - np.array([10, 20, 30]) / 20 - 0.25
    np.testing.assert_allclose(losses.T, [base, base + 0.01, base + 0.04], atol=1e-9)
    np.testing.assert_allclose(seconds.mean(1), [6, 12, 18])
    stage_0 = [10 * 512, 15 * 512 + 5 * 1024, 15 * 512 + 15 * 1024]
    np.testing.assert_allclose(tokens.mean(1), stage_0)


def test_runs_of_another_config_program_or_machine_are_other_curves(logs):
    (one,) = find_runs(logs / "20260101T000000Z-000000")
    again = one._replace(config=one.config | {"log_dir": "x", "seed": 7})
    others = [
        one._replace(config=one.config | {"steps": 29}),
        one._replace(facts=one.facts | {"program": "0"}),
        one._replace(facts=one.facts | {"devices": "8 x TPU"}),
    ]
    curves = make_curves([one, *others, again])
    assert [len(curve.runs) for curve in curves] == [2, 1, 1, 1]
    assert len({curve.color for curve in curves}) == 4


def test_the_page_asks_for_nothing_outside_itself_and_runs_nothing(page):
    text = page.read_text()
    tags = Page(page).tags
    for tag, attrs in tags:
        assert tag not in ("script", "link", "iframe", "img")
        assert not {"src", "srcset", "data", "action", "poster", "ping"} & {*attrs}
        assert all(attrs.get(name, "#")[0] == "#" for name in ("href", "xlink:href"))
    namespaces = r'(?!www\.w3\.org/(2000/svg|1999/xlink)")'
    assert not re.search(rf"@import|url\((?!#)|https?://{namespaces}", text)
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    assert ("meta", {"http-equiv": "Content-Security-Policy", "content": policy}) in tags
    assert HOSTILE in Page(page).text
    drawn = ElementTree.fromstring(page.with_suffix(".svg").read_text()).itertext()
    assert HOSTILE in " ".join(drawn)


def test_pictures_follow_the_readers_theme_and_share_no_ids(page):
    figures = re.findall(r"<svg.*?</svg>", page.read_text(), re.DOTALL)
    assert len(figures) == 2 + 3  # losses by time and tokens; learning rate, step time and speed
    ids = []
    for text in (*figures, page.with_suffix(".svg").read_text()):
        ElementTree.fromstring(text)
        drawn = re.sub("<style>.*?</style>", "", text)
        assert not re.search("#[0-9a-f]{6}", drawn) and "var(--c0)" in drawn
        assert {*re.findall(r"var\(--(\w+)\)", drawn)} <= report.COLORS.keys()
        mine = re.findall(r' id="([^"]*)"', text)
        assert {*re.findall(r"url\(#(\w+)\)", text)} <= {*mine}
        ids += mine
    assert len(ids) == len({*ids}) > 0
    for path in (page, page.with_suffix(".svg")):
        light, dark = path.read_text().split("prefers-color-scheme:dark")
        assert all(f"--{name}:#" in light and f"--{name}:#" in dark for name in report.COLORS)
    assert page.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_the_tables_tell_means_what_differs_and_what_is_unfinished(page):
    text = Page(page).text
    mean = 3.75 - 1.5 + 0.05 / 3
    # 0.0208 is the sd of 0, 0.01 and 0.04
    assert f"3 of 4 3.0 {mean:.4f} ± 0.0208 12.0 ± 2.0 18.0 ± 3.0" in text
    assert "20/30 unfinished" in text and "20260101T000000Z-000000, unfinished 2.7500" in text
    assert "What differs" in text and "muon_lr 0.023 0.5" in text and "num_layers" not in text


def test_a_line_that_is_being_written_is_not_yet_there(logs, tmp_path):
    folder = shutil.copytree(logs / "20260101T000009Z-000009", tmp_path / "run")
    for name in ("metrics.jsonl", "log.txt"):
        (folder / name).write_text((folder / name).read_text()[:-20])
    for run in (*find_runs(folder), log_alone(folder)):
        assert run.rows[-1]["step"] == 15


def test_of_a_step_that_a_resumed_run_wrote_again_the_last_row_counts(tmp_path):
    folder = make_run(tmp_path / "run", upto=25)
    make_run(folder, first=15, upto=20, offset=1)
    for run in (*find_runs(folder), log_alone(folder)):
        assert not run.done
        assert [row["step"] for row in run.rows] == [5, 10, 15, 20]  # 25 is of the run that was cut
        assert [row["train_loss"] for row in run.rows] == [3.75, 3.5, 4.25, 4]
    make_run(folder, first=25)
    (run,) = find_runs(folder)
    assert run.done and [row["step"] for row in run.rows][-2:] == [25, 30]


DAMAGE = [
    ("metrics.jsonl", '{"step": 15', '"step": 15', "line 3: .* is no JSON"),
    ("metrics.jsonl", "3.25,", "NaN,", "line 3: .* lacks a number"),
    ("metrics.jsonl", "3.25,", '"low",', "line 3: .* lacks a number"),
    ("metrics.jsonl", '"tokens"', '"tokns"', "line 1: .* lacks a number"),
    ("metrics.jsonl", '{"step": 5,', "[]\n", "line 1: .* lacks a number"),
    ("metrics.jsonl", '"step": 15', '"caf\udce9": 15', ", line 3: no UTF-8 text"),
    ("log.txt", "step:15/30 train_loss:3", "step:15/30 train_los:3", r"line \d{4}: "),
    ("log.txt", "config: {", "confg: {", "KeyError"),
    ("log.txt", '"steps": 30', '"steps": [30]', "words where numbers belong"),
    ("log.txt", "=" * 120, "=" * 119, "no log of train.py"),
]


def test_damage_and_what_is_no_run_are_one_sentence_and_exit_2(logs, tmp_path, capsys, monkeypatch):
    good = logs / "20260101T000000Z-000000"
    page = tmp_path / "a.html"

    def refused(words, path, out=page):
        assert command(lambda: main([str(path), f"--out={out}"])) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
        assert re.search(words, error), error
        assert not page.exists()

    for i, (name, old, new, words) in enumerate(DAMAGE):
        folder = shutil.copytree(good, tmp_path / str(i))
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_bytes(text.replace(old, new).encode(errors="surrogateescape"))
        refused(f"error: {folder / name}.*{words}", folder)
    refused("no run there", tmp_path)
    refused("no run there", tmp_path / "none")
    refused("no log of train.py", ROOT / "README.md")
    refused("no step is written yet", make_run(tmp_path / "run", upto=0))
    refused("none/", good, tmp_path / "none/a.html")
    refused("wanted a file named", good, tmp_path / "a.svg")
    monkeypatch.setattr(report, "matplotlib", None)
    refused("pip install -r scripts/requirements.txt", good)


def test_records_of_this_repository_show_the_numbers_of_their_readmes(tmp_path):
    folders = [ROOT / f"records/cpu/2026-11-21_{name}" for name in ("RecordRecipe", "Demo")]
    main([*map(str, folders), f"--out={tmp_path}/a.html"])
    text = Page(tmp_path / "a.html").text
    assert re.search(r"What differs RecordRecipe Demo program \w{8} \w{8} steps 540 750", text)
    for folder in folders:
        readme = (folder / "README.md").read_text()
        row = re.search(r"\| mean \(sd\) \| ([\d.]+) \(([\d.]+)\) \| ([\d.]+) \(([\d.]+)\)", readme)
        assert folder.name.partition("_")[2] in text
        assert f"{row[1]} ± {row[2]}" in text and f"{row[3]} ± {row[4]}" in text
