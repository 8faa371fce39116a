"""scripts/report.py: reading runs as train.py writes them, their means, the page and what must not be in it, errors."""
import html.parser
import itertools
import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

import train
from scripts import report
from scripts.report import DARK, LIGHT, SERIES, find_runs, main, make_curves
from shards import TINY, make_folder
from train import ROOT, UsageError, command, replace

pytest.importorskip("matplotlib", reason="matplotlib, of scripts/requirements.txt, is not installed")
HOSTILE = "<script>x()<∕script>&\"'$x^2$"  # ∕ is no slash: this is a folder's name

def make_run(
    folder, seed=0, upto=30, loss=lambda step: 4 - step / 20, second=0.5, first=5, **changes
):
    """A run's folder as train.py itself writes it, without training: steps first to `upto`, and the
    end if that is the last. The same folder again is a run that is resumed."""
    make_folder(folder.parent)
    files = [f"{folder.parent}/{split}_*.bin" for split in ("train", "val")]
    known = {"seed": seed, "vocab_size": 257, "bos_id": 256, "target_loss": 3.0}
    cfg = replace(train.parse_flags([TINY]), **known | changes)
    log = train.Log(folder, train.GPT.specs(cfg), cfg, {})
    source, notes = (ROOT / "train.py").read_text(), ["parameters: 7"]
    log.begin(source, "asked for", ["--preset=demo"], *map(train.open_shards, files), notes)
    if first > 5:
        log.line(f"resumed: {folder}/ckpt/step-{first - 5:06d} at step {first - 5}")
        log.marked = first - 5, second * (first - 5)
    for step in range(first, upto + 1, 5):
        log.clock.total = np.array([second * step, 1.0])
        log.step(step, loss(step), loss(step) - 0.25 if step % 10 == 0 else None)
    if upto == cfg.steps:
        log.result()
        log.seal()
    return folder

class Page(html.parser.HTMLParser):
    """Tags with their attributes, and the text outside of scripts and styles."""
    def __init__(self, path):
        super().__init__()
        self.tags, self.text, self.inside = [], "", ""
        self.feed(path.read_text())
    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = tag
    def handle_endtag(self, tag): self.inside = ""
    def handle_data(self, data): self.text += data * (self.inside not in ("script", "style")) + " "

@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """Three seeds, a second config in a folder that is named, and a run that was cut off."""
    root = tmp_path_factory.mktemp("logs")
    for seed in range(3):
        make_run(root / f"20260101T00000{seed}Z-00000{seed}", seed, loss=lambda step: 4 - step / 20 + 0.01 * seed ** 2, second=0.5 + 0.1 * seed)
    make_run(root / HOSTILE, loss=lambda step: 3.8 - step / 20, muon_lr=0.5)
    make_run(root / "20260101T000009Z-000009", 3, upto=20)
    return root

@pytest.fixture(scope="module")
def page(logs, tmp_path_factory):
    out = tmp_path_factory.mktemp("page") / "all.html"
    board = out.with_name("board.md")
    board.write_text("| a |\n|---|\n| b |\n\n| time | who |\n|---|---|\n| **94.6 s** | [<b>me</b>](https://example.org) and `x` |\n\n| c | d |\n|---|---|\n")
    main([*(str(path) for path in sorted(logs.iterdir()) if path.is_dir()), f"--out={out}", f"--leaderboard={board}"])
    return out

def test_a_log_alone_tells_what_the_metrics_beside_it_tell(logs):
    folder = logs / "20260101T000001Z-000001"
    from_log, = find_runs(folder / "log.txt")
    from_folder, = find_runs(folder)
    written = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert from_log.done and from_folder.done and len(from_log.rows) == len(from_folder.rows) == 6
    for mine, theirs, row in zip(from_log.rows, from_folder.rows, written):
        assert row.items() <= theirs.items()
        assert mine["step"] == row["step"] and mine["tokens"] == row["tokens"] and mine["lr"] == pytest.approx(row["lr"], abs=1e-6)
        for name, digits in (("train_loss", 4), ("train_time_s", 3), ("step_ms", 1), ("tokens_per_s", -2)):
            assert mine[name] == pytest.approx(row[name], abs=0.51 * 10 ** -digits)
        assert ("val_loss" in mine) == ("val_loss" in row)
    assert from_log.reached == from_folder.reached == pytest.approx(20 * 0.6)
    assert from_log.config == from_folder.config and from_log.config["seed"] == "1"

def test_seeds_are_one_curve_of_their_mean_within_their_extremes(logs):
    curves = make_curves([run for folder in sorted(logs.glob("20*")) for run in find_runs(folder)])
    assert len(curves) == 1 and len(curves[0].runs) == 4 and [run.config["seed"] for run in curves[0].finished] == ["0", "1", "2"]
    tokens, seconds, mean, low, high = curves[0].series("val_loss")
    base = np.array([4 - step / 20 - 0.25 for step in (10, 20, 30)])
    np.testing.assert_allclose([mean, low, high], [base + 0.05 / 3, base, base + 0.04], atol=1e-9)
    np.testing.assert_allclose(seconds, [6, 12, 18])
    np.testing.assert_allclose(tokens, [10 * 512, 15 * 512 + 5 * 1024, 15 * 512 + 15 * 1024])
    assert curves[0].starts == [15 * 512]

def test_runs_of_another_config_program_or_machine_are_other_curves(logs, tmp_path):
    one, = find_runs(logs / "20260101T000000Z-000000")
    other = [one._replace(path=tmp_path / "log", config=one.config | {"steps": "29"}), one._replace(path=tmp_path / "a", facts=one.facts | {"program": "0"}),
             one._replace(path=tmp_path / "b", facts=one.facts | {"devices": "8 x TPU"}), one._replace(config=one.config | {"log_dir": "x", "seed": "7"})]
    curves = make_curves([one, *other])
    assert [len(curve.runs) for curve in curves] == [2, 1, 1, 1]
    assert len({curve.label for curve in curves}) == len({curve.color for curve in curves}) == 4

def test_the_page_asks_for_nothing_outside_itself(page):
    text, parsed = page.read_text(), Page(page)
    for _, attrs in parsed.tags:
        assert not {"src", "srcset", "data", "action", "poster", "ping"} & {*attrs}
        assert attrs.get("href", "#").startswith("#") and not attrs.get("xlink:href")
    assert not re.search(r"@import|url\((?!#)|https?://(?!www\.w3\.org/2000/svg\")|fetch\(|<link|<iframe", text)
    assert ("meta", {"http-equiv": "Content-Security-Policy", "content":
                     "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"}) in parsed.tags

def test_pictures_follow_the_readers_theme_and_share_no_ids(page):
    figures = re.findall(r"<svg.*?</svg>", page.read_text(), re.DOTALL)
    assert len(figures) == 2 * (2 + 3)  # axes; losses in two sizes, and learning rate, step time and speed
    for text in (*figures, page.with_suffix(".svg").read_text()):
        ElementTree.fromstring(text)
        assert not re.search("#[0-9a-f]{6}", re.sub("<style>.*?</style>", "", text)) and "var(--c0)" in text
    ids = [found for figure in figures for found in re.findall(r' id="([^"]*)"', figure)]
    assert len(ids) == len({*ids}) > 0
    assert all({*re.findall(r"url\(#(\w+)\)", figure)} <= {*re.findall(r' id="([^"]*)"', figure)} for figure in figures)
    assert LIGHT.keys() == DARK.keys() and page.with_suffix(".png").read_bytes().startswith(b"\x89PNG")

def test_a_run_named_as_a_script_is_text(page):
    parsed = Page(page)
    assert sum(tag == "script" for tag, _ in parsed.tags) == 1 and HOSTILE in parsed.text
    drawn = " ".join(ElementTree.fromstring(page.with_suffix(".svg").read_text()).itertext())
    assert HOSTILE in drawn

def test_a_leaderboard_is_the_first_table_with_times_as_plain_text(page):
    parsed = Page(page)
    assert "94.6 s" in parsed.text and "<b>me</b> and x" in parsed.text and "example.org" not in page.read_text()

def test_an_unfinished_run_is_shown_as_one_and_left_out_of_the_mean(page, logs):
    text = re.sub(r"\s+", " ", Page(page).text)
    assert "20/30 unfinished" in text and "1 unfinished" in text and "seed 3, unfinished" in text
    assert f"{3.75 - 1.5 + 0.05 / 3:.4f} ± 0.0208" in text  # sd of 0, 0.01, 0.04
    assert "target 3 in 12.0 ± 2.0 s" in text  # from step 20 on

def test_a_line_that_is_being_written_is_not_yet_there(logs, tmp_path):
    folder = shutil.copytree(logs / "20260101T000009Z-000009", tmp_path / "run")
    for name in ("metrics.jsonl", "log.txt"):
        (folder / name).write_text((folder / name).read_text()[:-20])
    assert [run.step for path in (folder, folder / "log.txt") for run in find_runs(path)] == [15, 15]

def test_of_a_step_that_a_resumed_run_wrote_again_the_last_row_counts(tmp_path):
    folder = make_run(tmp_path / "run", upto=25)
    make_run(folder, first=15, upto=20, loss=lambda step: step)
    for run in (*find_runs(folder), *find_runs(folder / "log.txt")):
        assert run.state == "unfinished, resumed"
        assert [row["step"] for row in run.rows] == [5, 10, 15, 20]  # 25 is of the run that was cut
        assert [row["train_loss"] for row in run.rows] == [3.75, 3.5, 15, 20]
    make_run(folder, first=25)
    run, = find_runs(folder)
    assert run.state == "finished, resumed" and [row["step"] for row in run.rows][-2:] == [25, 30]

def test_what_differs_is_told_and_a_folder_that_is_named_names_its_curve(page):
    text = re.sub(r"\s+", " ", Page(page).text)
    assert "muon_lr 0.023 0.5" in text and "What differs" in text and "num_layers" not in text

def test_the_same_run_twice_is_compared_loss_by_loss(logs, tmp_path):
    one, again = find_runs(logs / "20260101T000000Z-000000")[0], find_runs(make_run(tmp_path / "20260202T000000Z-000000", upto=20))[0]
    told, = report.twins_text(make_curves([one, again])[0])
    assert "largest difference of 6 losses at the same steps = 0" in told and "unfinished" in told
    again.rows[2]["train_loss"] += 0.125
    assert "= 0.125" in next(report.twins_text(make_curves([one, again])[0]))

@pytest.mark.parametrize("name, damage", [
    ("metrics.jsonl", lambda text: text.replace('{"step": 15', '"step": 15')), ("metrics.jsonl", lambda text: text.replace("3.25,", "NaN,")),
    ("metrics.jsonl", lambda text: text.replace('"tokens"', '"tokns"', 1)), ("metrics.jsonl", lambda text: "[]\n" + text),
    ("log.txt", lambda text: text.replace("step:15/30 train_loss:3", "step:15/30 train_los:3")),
    ("log.txt", lambda text: text.replace("config: {", "confg: {")), ("config.json", lambda text: text[:50])])
def test_damage_is_one_sentence_and_exit_2(name, damage, logs, tmp_path, capsys):
    folder = shutil.copytree(logs / "20260101T000000Z-000000", tmp_path / "run")
    text = (folder / name).read_text()
    assert damage(text) != text
    (folder / name).write_text(damage(text))
    if name == "config.json":
        (folder / "log.txt").unlink()
    assert command(lambda: main([str(folder), f"--out={tmp_path}/a.html"])) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith(f"error: {folder / name}")
    assert not (tmp_path / "a.html").exists()

def test_no_run_no_step_or_no_folder_to_write_in_is_exit_2(logs, tmp_path, capsys):
    fresh, good = make_run(tmp_path / "run", upto=0), str(logs / "20260101T000000Z-000000")
    for argv, words in (([str(tmp_path)], "no run there"), ([str(ROOT / "README.md")], "no log of train.py"), ([str(tmp_path / "x")], "no run there"),
                        ([str(fresh)], "no step is written yet"), ([good, f"--out={tmp_path}/none/a.html"], "cannot be written"),
                        ([good, f"--leaderboard={tmp_path}/none.md"], "cannot be read")):
        assert command(lambda: main(argv if len(argv) > 1 and "out" in argv[1] else [*argv, f"--out={tmp_path}/a.html"])) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1

def test_without_matplotlib_it_says_what_to_install(logs, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match="matplotlib is missing: pip install -r scripts/requirements.txt"):
        main([str(logs / "20260101T000000Z-000000")])

def test_records_of_this_repository_show_the_numbers_of_their_readmes(tmp_path):
    folders = sorted((ROOT / "records/cpu").glob("2026-11-21_*"))
    main([*map(str, folders), f"--out={tmp_path}/a.html", "--title=Records"])
    text = Page(tmp_path / "a.html").text
    for folder in folders:
        losses, times = re.search(r"\| mean \(sd\) \| ([\d.]+ \([\d.]+\)) \| ([\d.]+ \([\d.]+\))", (folder / "README.md").read_text()).groups()
        assert folder.name.partition("_")[2] in text
        assert losses.replace("(", "± ").strip(")") in text and times.replace("(", "± ").replace(")", " s") in text

def test_colours_stay_apart_for_colour_blind_eyes_and_from_the_page():
    linear = lambda color: (np.array([int(color[i:i + 2], 16) for i in (1, 3, 5)]) / 255) ** 2.2
    eyes = [np.eye(3), [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],   # and without red, green, blue cones:
            [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],               # Machado et al. 2009
            [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]]]
    to_lms = np.array([[0.4122, 0.5363, 0.0514], [0.2119, 0.6807, 0.1074], [0.0883, 0.2817, 0.6300]])
    to_lab = np.array([[0.2105, 0.7936, -0.0041], [1.9780, -2.4286, 0.4506], [0.0259, 0.7828, -0.8087]])  # OKLab
    seen = lambda color, eye: to_lab @ np.cbrt(to_lms @ np.clip(np.array(eye) @ linear(color), 0, 1))
    luminance = lambda color: 0.05 + linear(color) @ [0.2126, 0.7152, 0.0722]
    for theme in (LIGHT, DARK):
        colors = [theme[f"c{i}"] for i in range(len(SERIES))]
        assert all(max(a, b) / min(a, b) >= 3 for a, b in ((luminance(color), luminance(theme["surface"])) for color in colors))
        assert min(np.linalg.norm(seen(a, eye) - seen(b, eye)) for eye in eyes for a, b in itertools.combinations(colors, 2)) > 0.08

@pytest.mark.system
def test_a_browser_without_network_shows_the_tooltip(page, tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome") or pytest.skip("no Chromium here")
    probe = """const plot = document.querySelector("figure.wide.time .plot"), area = plot.getBoundingClientRect()
plot.dispatchEvent(new PointerEvent("pointermove", {clientX: area.left + area.width / 2, clientY: area.top + 9}))"""
    copy = tmp_path / "probe.html"
    copy.write_text(page.read_text().replace("</body>", f"<script>{probe}</script></body>"))
    shown = subprocess.run([browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile", "--dump-dom",
                            "--host-resolver-rules=MAP * ~NOTFOUND", f"file://{copy}"], capture_output=True, text=True, timeout=120).stdout
    assert re.search(r'<div class="tip" style="display: block[^>]*><i>[\d.]+ seconds of training</i><div style="--c:\s*var\(--c0\)', shown)
