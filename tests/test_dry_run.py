"""scripts/dry_run.py: what a TPU program of this file must and must not hold, read off the compiler's output. No TPU is used."""
import collections
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
from scripts import dry_run
from scripts.estimate import CHIPS, Module, Row, Walk
from train import GPT, ROOT, UsageError

pytestmark = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason='no TPU compiler: pip install "jax[tpu]"')

# Sizes that tell axes apart: rows of 512, micro-steps of 1024, blocks of the head of 256, a vocabulary of 1536 with its padding.
SMALL = """--num_layers=2 --model_dim=128 --num_heads=1 --head_dim=128 --mlp_dim=384 --vocab_size=1500 --bos_id=0
 --mlp_only= --skips=((0,1),) --late_inputs=((0,1),) --backout=0 --offset_layers=1 --long_layers=1
 --stages.end=1 --stages.batch_tokens=16384 --stages.seq_len=512 --stages.doc_len=512 --stages.short=128
 --stages.long=256 --stages.lr=1 --micro_tokens=1024 --head_block=256 --steps=100
 --val.seq_len=1024 --val.short=128 --val.long=512 --val_tokens=32768 --val_context=256""".split()
ROW, MICRO, VOCAB, LAYERS = 512, 1024, 1536, 2
TOY = [*SMALL, *"--num_layers=1 --skips= --late_inputs= --backout= --offset_layers= --long_layers=".split()]

# ---- The properties: each function lists what breaks one ----
def executed(module):
    """Instructions whose results exist in memory: all but those inside fusions."""
    fused = {i.called("calls") for computation in module.computations.values() for i in computation.values() if i.op == "fusion"}
    return [i for name, computation in module.computations.items() if name not in fused for i in computation.values()]

def float32_matmuls(module):
    return [i.name for computation in module.computations.values() for i in computation.values() if i.op in ("convolution", "dot")
            and any(a.dtype == "f32" for name in i.operands if name in computation for a in computation[name].arrays)]

def whole_scores(module):
    return [i.name for i in executed(module) if any(sum(d >= ROW for d in a.dims) >= 2 and a.dims.count(ROW) >= 2 for a in i.arrays)]

def whole_logits(module):
    return [i.name for i in executed(module) for a in i.arrays if a.dtype == "f32" and VOCAB in a.dims and MICRO in a.dims]

def collectives_in_loops(module, largest=4096):
    return [row.name for row in Walk(module, CHIPS["v6e"], None).rows(module.entry) if row.op and row.in_loop and row.sent_bytes > largest]

def newton_schulz_flops(module):
    """Of one chip: beside the sums of rows, nothing else is multiplied outside the loop over micro-steps."""
    return sum(row.flops * row.calls for row in Walk(module, CHIPS["v6e"], None).rows(module.entry)
               if not row.in_loop and "MN,CND->CMD" not in row.source)

def wanted_newton_schulz_flops(num_devices):
    """5 iterations of X X^T, its square, and the polynomial times X; each chip its share of matrices, rounded up."""
    per_matrix = lambda m, n: 5 * (2 * 2 * m * m * n + 2 * m ** 3)
    share = lambda count: -(-count // num_devices)
    return share(4 * LAYERS) * per_matrix(128, 128) + share(2 * LAYERS) * per_matrix(128, 384)

# ---- What holds ----
def run(folder, *flags):
    """(result, {program: Module}) of a dry run."""
    result = dry_run.main([*flags, f"--dump={folder}", f"--json={folder}/rows.json"])
    return result, {path.stem: Module(path.read_text()) for path in folder.glob("*.hlo")}

@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    folder, said = tmp_path_factory.mktemp("dry"), io.StringIO()
    with contextlib.redirect_stdout(said):
        return folder, *run(folder, "v6e:2x4", *SMALL), said

@pytest.mark.parametrize("program", ["train_0", "eval"])
def test_every_matmul_has_bf16_operands(compiled, program):
    assert float32_matmuls(compiled[2][program]) == []

def test_no_gradient_is_reduced_inside_the_accumulation_loop(compiled):
    assert collectives_in_loops(compiled[2]["train_0"]) == []
    assert compiled[1]["programs"][0]["collective_bytes"] > 0

def test_muon_spreads_its_matrices_over_the_chips(compiled, tmp_path):
    alone = run(tmp_path, "v6e:1x1", "--piece=optimizer", *SMALL)[1]["optimizer"]
    assert newton_schulz_flops(compiled[2]["train_0"]) == wanted_newton_schulz_flops(8)
    assert newton_schulz_flops(alone) == wanted_newton_schulz_flops(1)

@pytest.mark.parametrize("program", ["train_0", "eval"])
def test_neither_scores_nor_logits_exist_as_a_whole(compiled, program):
    assert whole_scores(compiled[2][program]) == [] and whole_logits(compiled[2][program]) == []

def test_memory_is_that_of_the_state_and_little_more(compiled):
    cfg = dry_run.config(SMALL)
    params = train.count_params(train.param_specs(cfg))
    for row in compiled[1]["programs"]:
        assert 4 * params / 8 < row["peak_hbm_gib"] * 2**30 < 64 << 20

# ---- What does not hold is seen ----
def inserted(text, instruction):
    """An HLO text with one more instruction in the body of its loop over micro-steps."""
    loop = re.search(r" while\(.*body=%?([\w.\-]+)", text)[1]
    at = text.index("\n", re.search(rf"^%?{re.escape(loop)} \(.*\{{", text, re.M).start()) + 1
    return f"{text[:at]}  {instruction}\n{text[at:]}"

@pytest.mark.parametrize("breaks, instruction", [
    (whole_scores, "%bad.9999 = bf16[2,1,512,512]{3,2,1,0} exponential(%g)"),
    (whole_logits, "%bad.9999 = f32[1024,1536]{1,0} tanh(%g)"),
    (collectives_in_loops, "%bad.9999 = f32[384,128]{1,0} all-reduce(%g), replica_groups={{0,1,2,3,4,5,6,7}}")])
def test_what_does_not_hold_is_seen(compiled, breaks, instruction):
    text = (compiled[0] / "train_0.hlo").read_text()
    assert breaks(Module(inserted(text, instruction))) == ["bad.9999"]

def test_float32_matmuls_are_seen(tmp_path):
    assert float32_matmuls(run(tmp_path, "v6e:1x1", "--piece=head", *SMALL, "--compute_dtype=float32")[1]["head"])
    jax.config.update("jax_default_matmul_precision", None)

# ---- Numbers ----
def test_the_json_holds_the_programs_and_their_sum(compiled):
    folder, result, *_ = compiled
    assert json.loads((folder / "rows.json").read_text()) == result
    assert list(result) == ["topology", "preset", "tokens", "projected_train_s", "low_s", "high_s", "programs"]
    for row in result["programs"]:
        assert list(row) == ["name", "steps", "tokens_per_step", "est_ms", "low_ms", "high_ms", "mfu", "peak_hbm_gib", "compile_s",
                             "collective_bytes", "sync_collective_ms"]
        assert 0 < row["low_ms"] < row["est_ms"] < row["high_ms"] and 0 < row["mfu"] < 1
    step, scoring = result["programs"]
    assert (step["name"], step["steps"], step["tokens_per_step"]) == ("train_0", 100, 16384)
    assert (scoring["name"], scoring["steps"]) == ("eval", 1)
    assert result["tokens"] == 100 * 16384 and result["projected_train_s"] == pytest.approx(0.1 * step["est_ms"])
    cfg = dry_run.config(SMALL)
    flops = train.flops_per_token(cfg.stages[0], train.param_specs(cfg), cfg) * 16384
    assert step["mfu"] == pytest.approx(flops / (8 * 918e12) / (1e-3 * step["est_ms"]))

def test_the_output_calls_a_projection_a_projection(compiled):
    said = compiled[3].getvalue()
    assert "8 x TPU v6 lite" in said and "nothing below was measured" in said and "A projection is no measurement" in said
    assert re.search(r"projection: .* on 1638400 tokens \(the whole schedule\); .* s per 505M tokens", said)
    assert re.search(r"all-gather, (a?synchronous)", said)

@pytest.mark.parametrize("piece, names", [("layer", ["layer"]), ("attention", ["attention_128", "attention_256"]),
                                          ("head", ["head"]), ("optimizer", ["optimizer"])])
def test_a_piece_compiles_alone(piece, names, tmp_path):
    small = [*SMALL, "--stages.seq_len=256", "--micro_tokens=256"]
    result, modules = run(tmp_path, "v6e:2x4", f"--piece={piece}", *small)
    assert [row["name"] for row in result["programs"]] == names and set(modules) == set(names)
    if piece == "optimizer":
        assert newton_schulz_flops(modules["optimizer"]) == wanted_newton_schulz_flops(8)
        assert result["programs"][0]["collective_bytes"] > 0
    if piece == "head":  # three matmuls, not four
        flops = sum(row.flops * row.calls for row in Walk(modules["head"], CHIPS["v6e"], None).rows(modules["head"].entry))
        assert flops == 3 * 2 * 256 * 128 * VOCAB

# ---- Kernels ----
def chain(work):
    """x -> x through a kernel of which the first step of a row does `work` units and each other one twice that."""
    def body(x, out):
        for b in range(2):
            @pl.when(jnp.minimum(pl.program_id(1), 1) == b)
            def _():
                y = x[...]
                for _ in range(work * (b + 1)):
                    y = jnp.tanh(y) + x[...]
                out[...] = y
    block = pl.BlockSpec((1, 64, 128), lambda b, i: (b, i, 0))
    def call(x):
        cost = pl.CostEstimate(flops=x.size * work, bytes_accessed=8 * x.size, transcendentals=x.size * work)
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return pl.pallas_call(body, out_shape=shape, grid=(len(x), x.shape[1] // 64), in_specs=[block], out_specs=block,
                              name="band_fwd", cost_estimate=cost)(x)
    return call

def head_loss(kernels, weights, batch, cfg):
    """A model without blocks, so that it compiles in a second."""
    x_BTD = train.rms_norm(jax.lax.stop_gradient(weights["embed"][batch["targets"]]))
    for kernel in kernels:
        x_BTD = jax.lax.stop_gradient(kernel(jax.lax.stop_gradient(x_BTD)))
    x_ND = x_BTD.reshape(-1, cfg.model_dim)
    nats = train.log_partition(x_ND, weights["head"], batch["weights"].ravel(), cfg)
    return nats, batch["weights"].sum()

def costed_loss(weights, batch, key, stage, cfg):
    return head_loss([chain(8), chain(8), chain(16), chain(32)], weights, batch, cfg)

def test_twice_the_work_in_a_kernel_is_twice_the_bundles_beside_those_of_its_pipeline(capsys):
    dry_run.main(["v6e:1x1", "--stage=0", *TOY, "--stages.batch_tokens=1024"], GPT._replace(loss=costed_loss, lookups={}))
    said = capsys.readouterr().out
    counts = sorted(int(n) for n in re.findall(r"kernel band_fwd: grid \(2, 8\), (\d+) bundles per grid step", said))
    assert len(counts) == 3 and "in 4 calls, by their bundles" in said  # alike kernels are counted once
    assert counts[2] - counts[1] == pytest.approx(2 * (counts[1] - counts[0]), rel=0.05) and counts[1] - counts[0] > counts[0] / 2

def test_kernels_whose_bundles_could_not_be_counted_are_told():
    rows = [Row("band_fwd.1", "kernel", 3, est_s=1e-3), Row("band_bwd.1", "kernel", 2, est_s=1e-3)]
    cost = collections.defaultdict(float, rows=rows, kernel_s=5e-3, unknown_trip_counts=[])
    job = dry_run.Job("train_0", None, (), None, 1, 8, 0.0, None)
    said = lambda *counted: dry_run.describe(job, collections.defaultdict(float), cost, cost, dict.fromkeys(counted, 1e-3), CHIPS["v6e"])
    assert "kernels 5.00 ms in 5 calls, by their bundles\n" in said("band_fwd.1", "band_bwd.1")
    assert "5 calls, 3 of them by their bundles, the others by their cost_estimate" in said("band_fwd.1")

# ---- Errors ----
@pytest.mark.parametrize("argv, words", [
    (["v6e:3x5"], "v6e:1x1, .*v6e:2x4"), (["tpu9:2x2"], "v5p:2x2x1"), ([], "TOPOLOGY"), (["v6e:1x1", "--num_layer=2"], "--num_layers"),
    (["v6e:1x1", "--piece=tail"], "--piece"), (["v6e:1x1", "--stage=7"], "--stage=7: wanted 0 to 3")])
def test_a_wrong_flag_is_an_error_before_anything_compiles(argv, words):
    with pytest.raises(UsageError, match=words):
        dry_run.main(argv)

def test_without_the_compiler_the_error_names_the_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r'pip install "jax\[tpu\]'):
        dry_run.main(["v6e:1x1"])

def test_what_does_not_fit_says_by_how_much_and_what_to_turn():
    with pytest.raises(UsageError) as raised:
        dry_run.main(["v6e:1x1", "--stage=0", *TOY, "--head_block=262144", "--micro_tokens=262144", "--stages.batch_tokens=262144",
                      "--vocab_size=50257"])
    said = re.fullmatch(r"train_0 does not fit: it needs ([\d.]+) GiB of the chip's (31.2[45]), ([\d.]+) too many. Turn one or more of these: "
                        r"--micro_tokens=(\d+), --head_block=(\d+), --stages.batch_tokens=(\d+)", str(raised.value))
    assert said and float(said[1]) - float(said[2]) == pytest.approx(float(said[3]), abs=0.02)
    assert 512 <= int(said[4]) < 262144 and int(said[5]) < 262144 and int(said[6]) < 262144

def test_an_error_is_one_sentence_and_exit_code_2():
    done = subprocess.run([sys.executable, "-m", "scripts.dry_run", "v6e:3x5"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and done.stderr.startswith("error: v6e:3x5: no such topology") and done.stderr.count("\n") == 1

def test_presets_need_no_data():
    assert (dry_run.config([]).vocab_size, dry_run.config([]).bos_id) == (50257, 50256)
    demo = dry_run.config(["--preset=demo"])
    assert (demo.vocab_size, demo.bos_id, demo.attention) == (257, 256, "xla")
