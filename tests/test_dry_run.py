"""scripts/dry_run: what the TPU programs of train.py must and must not hold, read off the
compiler's output. No TPU is used."""

import contextlib
import importlib.util
import io
import json
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

import train
from scripts.baselines import log_partition
from scripts.dry_run import command as dry_run
from scripts.dry_run.estimate import CHIPS, Row, Walk, estimate
from scripts.dry_run.hlo import Module
from scripts.dry_run.programs import Job
from train import GPT, ROOT, UsageError

HAS_COMPILER = importlib.util.find_spec("libtpu") is not None
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason='pip install "jax[tpu]"')

# Sizes that tell axes apart. The vocabulary is 1536 with its padding.
ROW, MICRO, VOCAB, LAYERS = 512, 1024, 1536, 2
SMALL = """
--num_layers=2 --model_dim=128 --num_heads=1 --head_dim=128 --mlp_dim=384 --vocab_size=1500
--bos_id=0 --mlp_only= --skips=((0,1),) --late_inputs=((0,1),) --backout=0 --offset_layers=1
--long_layers=1 --stages.end=1 --stages.batch_tokens=16384 --stages.seq_len=512
--stages.doc_len=512 --stages.short=128 --stages.long=256 --stages.lr=1 --micro_tokens=1024
--head_block=256 --steps=100 --val.seq_len=1024 --val.short=128 --val.long=512
--val_tokens=32768 --val_context=256 --stages.candidates=0
""".split()
ONE_LAYER = "--num_layers=1 --skips= --late_inputs= --backout= --offset_layers= --long_layers="
TOY = [*SMALL, *ONE_LAYER.split()]


# ---- The properties: each function lists what breaks one ----
def arrays_of(module):
    """(instruction, array) of each result that exists in memory: none inside of fusions."""
    fused = set()
    for computation in module.computations.values():
        fused |= {i.called("calls") for i in computation.values() if i.op == "fusion"}
    for name, computation in module.computations.items():
        if name not in fused:
            for i in computation.values():
                yield from ((i, array) for array in i.arrays)


def float32_matmuls(module):
    bad = []
    for computation in module.computations.values():
        for i in computation.values():
            if i.op in ("convolution", "dot"):
                operands = [computation[name] for name in i.operands if name in computation]
                if any(array.dtype == "f32" for each in operands for array in each.arrays):
                    bad.append(i.name)
    return bad


def whole_scores(module):
    return [i.name for i, array in arrays_of(module) if array.dims.count(ROW) >= 2]


def whole_logits(module):
    found = [(i, array) for i, array in arrays_of(module) if array.dtype == "f32"]
    return [i.name for i, array in found if {VOCAB, MICRO} <= set(array.dims)]


def rows_of(module):
    return list(Walk(module, CHIPS["v6e"]).rows(module.entry))


def collectives_in_loops(module, largest=4096):
    rows = [row for row in rows_of(module) if row.op and row.in_loop]
    return [row.name for row in rows if row.sent_bytes > largest]


def newton_schulz_flops(module):
    """Of one chip: beside the sums of rows, nothing else is multiplied outside of the loops."""
    total = 0
    for row in rows_of(module):
        if not row.in_loop and "MN,CND->CMD" not in row.source:
            total += row.flops * row.calls
    return total


def wanted_newton_schulz_flops(num_devices):
    """5 iterations of X X^T, its square, a polynomial times X; shares of chips are rounded up."""

    def per_matrix(m, n):
        return 5 * (2 * 2 * m * m * n + 2 * m**3)

    square, oblong = -(-4 * LAYERS // num_devices), -(-2 * LAYERS // num_devices)
    return square * per_matrix(128, 128) + oblong * per_matrix(128, 384)


# ---- Programs ----
def run(folder, *flags):
    """(result, {program: Module}) of a dry run."""
    result = dry_run.main([*flags, f"--dump={folder}", f"--json={folder}/rows.json"])
    return result, {path.stem: Module(path.read_text()) for path in folder.glob("*.hlo")}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """(folder, result, modules, what it printed) of both programs on eight chips."""
    folder = tmp_path_factory.mktemp("dry")
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        result, modules = run(folder, "v6e:2x4", *SMALL)
    return folder, result, modules, said.getvalue()


@needs_compiler
@pytest.mark.system
@pytest.mark.parametrize("program", ["train_0", "eval"])
def test_matmuls_are_bf16_and_neither_scores_nor_logits_exist_as_a_whole(compiled, program):
    module = compiled[2][program]
    assert float32_matmuls(module) == []
    assert whole_scores(module) == []
    assert whole_logits(module) == []


@needs_compiler
@pytest.mark.system
def test_gradients_are_reduced_once_a_step_and_muon_is_spread_over_the_chips(compiled, tmp_path):
    _, result, modules, _ = compiled
    assert collectives_in_loops(modules["train_0"]) == []
    assert result["programs"][0]["collective_bytes"] > 0
    assert newton_schulz_flops(modules["train_0"]) == wanted_newton_schulz_flops(8)
    alone = run(tmp_path, "v6e:1x1", "--piece=optimizer", *SMALL)[1]["optimizer"]
    assert newton_schulz_flops(alone) == wanted_newton_schulz_flops(1)


@needs_compiler
@pytest.mark.system
def test_memory_is_that_of_the_state_and_little_more(compiled):
    params = train.count_params(train.param_specs(dry_run.config(SMALL)))
    for row in compiled[1]["programs"]:
        assert 4 * params / 8 < row["peak_hbm_gib"] * 2**30 < 64 << 20


def inserted(text, instruction):
    """An HLO text with one more instruction in the body of its loop over micro-steps.

    VALUE in it becomes the name of a float32 array that is there.
    """
    loop = re.search(r" while\(.*body=%?([\w.\-]+)", text)[1]
    start = re.search(rf"^%?{re.escape(loop)} \(.*\{{", text, re.MULTILINE).start()
    at = text.index("\n", start) + 1
    value = re.search(r"%([\w.\-]+) = f32\[", text[at:])[1]
    return f"{text[:at]}  {instruction.replace('VALUE', value)}\n{text[at:]}"


@needs_compiler
@pytest.mark.system
@pytest.mark.parametrize(
    "breaks, instruction",
    [
        (float32_matmuls, "%bad = f32[8,8]{1,0} dot(%VALUE, %VALUE), lhs_contracting_dims={1}"),
        (whole_scores, "%bad = bf16[2,1,512,512]{3,2,1,0} exponential(%g)"),
        (whole_logits, "%bad = f32[1024,1536]{1,0} tanh(%g)"),
        (collectives_in_loops, "%bad = f32[384,128]{1,0} all-reduce(%g), replica_groups={{0,1}}"),
    ],
)
def test_a_program_that_breaks_a_property_is_seen(compiled, breaks, instruction):
    text = (compiled[0] / "train_0.hlo").read_text()
    assert breaks(Module(inserted(text, instruction))) == ["bad"]


@needs_compiler
@pytest.mark.system
def test_the_numbers_and_the_projection_follow_from_the_programs(compiled):
    folder, result, _, said = compiled
    assert json.loads((folder / "rows.json").read_text()) == result
    step, scoring = result["programs"]
    assert (step["name"], step["steps"], step["tokens_per_step"]) == ("train_0", 100, 16384)
    assert (scoring["name"], scoring["steps"]) == ("eval", 1)
    for row in (step, scoring):
        assert 0 < row["low_ms"] < row["est_ms"] < row["high_ms"]
    assert result["tokens"] == 100 * 16384
    assert result["projected_train_s"] == pytest.approx(0.1 * step["est_ms"])
    cfg = dry_run.config(SMALL)
    flops = train.flops_per_token(cfg.stages[0], train.param_specs(cfg), cfg) * 16384
    assert step["mfu"] == pytest.approx(flops / (8 * 918e12) / (1e-3 * step["est_ms"]))
    assert "8 x TPU v6 lite" in said and "nothing below was measured" in said
    assert re.search(r"all-gather, (a?synchronous)", said)
    assert re.search(r"projection: .* on 1638400 tokens \(the whole schedule\)", said)
    assert "A projection is no measurement" in said


@needs_compiler
@pytest.mark.system
@pytest.mark.parametrize(
    "piece, names",
    [
        ("layer", ["layer"]),
        ("attention", ["attention_128", "attention_256"]),
        ("copy", ["copy"]),
        ("head", ["head"]),
        ("optimizer", ["optimizer"]),
    ],
)
def test_a_piece_compiles_alone(piece, names, tmp_path):
    small = [*SMALL, "--stages.seq_len=256", "--micro_tokens=256"]
    result, modules = run(tmp_path, "v6e:2x4", f"--piece={piece}", *small)
    assert [row["name"] for row in result["programs"]] == names == sorted(modules)
    if piece == "optimizer":
        assert newton_schulz_flops(modules["optimizer"]) == wanted_newton_schulz_flops(8)
        assert result["programs"][0]["collective_bytes"] > 0
    if piece == "head":  # three matmuls, not four
        assert estimate(modules["head"]).flops == 3 * 2 * 256 * 128 * VOCAB


# ---- Kernels ----
def chain(work):
    """x -> x by a kernel that does `work` in the first step of a row, twice that in the others."""

    def body(x, out):
        for b in range(2):

            @pl.when(jnp.minimum(pl.program_id(1), 1) == b)
            def _(b=b):
                y = x[...]
                for _ in range(work * (b + 1)):
                    y = jnp.tanh(y) + x[...]
                out[...] = y

    block = pl.BlockSpec((1, 64, 128), lambda b, i: (b, i, 0))

    def call(x):
        cost = pl.CostEstimate(
            flops=x.size * work, bytes_accessed=8 * x.size, transcendentals=x.size * work
        )
        return pl.pallas_call(
            body,
            out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
            grid=(len(x), x.shape[1] // 64),
            in_specs=[block],
            out_specs=block,
            name="band_fwd",
            cost_estimate=cost,
        )(x)

    return call


def chained_loss(weights, batch, key, stage, cfg):
    """Of a model without blocks, which compiles in a second, with four kernels, two alike."""
    x_BTD = train.rms_norm(jax.lax.stop_gradient(weights["embed"][batch["targets"]]))
    for work in (8, 8, 16, 32):
        x_BTD = jax.lax.stop_gradient(chain(work)(jax.lax.stop_gradient(x_BTD)))
    x_ND = x_BTD.reshape(-1, cfg.model_dim)
    nats = log_partition(x_ND, weights["head"], batch["weights"].ravel(), cfg)
    return nats, batch["weights"].sum()


@needs_compiler
@pytest.mark.system
def test_twice_the_work_in_a_kernel_is_twice_the_bundles_beside_those_of_its_pipeline(capsys):
    flags = ["v6e:1x1", "--stage=0", *TOY, "--stages.batch_tokens=1024"]
    dry_run.main(flags, GPT._replace(loss=chained_loss, lookups={}))
    said = capsys.readouterr().out
    found = re.findall(r"kernel band_fwd: grid \(2, 8\), (\d+) bundles per grid step", said)
    few, more, most = sorted(map(int, found))  # alike kernels are counted once
    assert most - more == pytest.approx(2 * (more - few), rel=0.05)
    assert more - few > few / 2
    assert "in 4 calls, by their bundles" in said


def test_kernels_whose_bundles_could_not_be_counted_are_told():
    rows = [Row("band_fwd.1", "kernel", 3, est_s=1e-3), Row("band_bwd.1", "kernel", 2, est_s=1e-3)]
    cost = estimate(Module("ENTRY %main () -> f32[] {\n}\n"))._replace(rows=rows, kernel_s=5e-3)
    both = {"band_fwd.1", "band_bwd.1"}
    said = dry_run.describe_kernels(cost, both)
    assert said == "  kernels 5.00 ms in 5 calls, by their bundles"
    said = dry_run.describe_kernels(cost, {"band_fwd.1"})
    assert "5 calls, 3 of them by their bundles, the others by their cost_estimate" in said


# ---- Errors ----
@needs_compiler
def test_a_wrong_flag_is_an_error_before_anything_compiles():
    for argv, words in (
        (["v6e:3x5"], "v6e:3x5: no such topology.*v6e:1x1, .*v6e:2x4"),
        (["tpu9:2x2"], "v5p:2x2x1"),
        ([], "TOPOLOGY"),
        (["v6e:1x1", "--num_layer=2"], "--num_layers"),
        (["v6e:1x1", "--piece=tail"], "--piece"),
        (["v6e:1x1", "--stage=7"], "--stage=7: wanted 0 to 3"),
    ):
        with pytest.raises(UsageError, match=words):
            dry_run.main(argv)


def test_without_the_compiler_the_error_names_the_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r'pip install "jax\[tpu\]'):
        dry_run.main(["v6e:1x1"])


def test_what_does_not_fit_says_by_how_much_and_what_to_turn():
    cfg = dry_run.config([])
    mesh = train.make_mesh(jax.devices()[:8])
    stage = cfg.stages[0]
    job = Job("train_0", None, (), mesh, stage, stage.batch_tokens)
    advice = "--micro_tokens=1024, --head_block=2048, --stages.seq_len=1024"
    assert str(dry_run.out_of_memory(job, 100.0, 31.25, cfg)) == (
        "train_0 does not fit: it needs 100.00 GiB of the chip's 31.25, 68.75 too many. "
        f"Turn one or more of these: {advice}"
    )


@needs_compiler
@pytest.mark.system
def test_a_program_that_does_not_fit_is_one_sentence_and_exit_code_2():
    many = ["--head_block=262144", "--micro_tokens=262144", "--stages.batch_tokens=262144"]
    flags = ["v6e:1x1", "--stage=0", *TOY, *many, "--vocab_size=50257"]
    command = [sys.executable, "-m", "scripts.dry_run", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    numbers = r"it needs ([\d.]+) GiB of the chip's (31.2[45]), ([\d.]+) too many"
    flags = r"--micro_tokens=\d+, --head_block=\d+, --stages.batch_tokens=\d+\n"
    said = re.fullmatch(f"error: train_0 does not fit: {numbers}. .*: {flags}", done.stderr)
    needed, there, over = map(float, said.groups())
    assert needed - there == pytest.approx(over, abs=0.02)


def test_presets_need_no_data():
    cfg = dry_run.config([])
    assert (cfg.vocab_size, cfg.bos_id, cfg.attention) == (50257, 50256, "band")
    demo = dry_run.config(["--preset=demo"])
    assert (demo.vocab_size, demo.bos_id, demo.attention) == (257, 256, "xla")
