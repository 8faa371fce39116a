"""The two older recipes: their forward passes in float64 numpy, their optimizer steps, and their way through the loop."""
import functools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import train
from scripts.baselines import MODELS, main, nanogpt_lr, newton_schulz, record_rotary
from train import gather, make_init, make_mesh, make_train_step, name_of, split_axis, state_shardings, to_devices, unstack

ROOT, ROWS, LENGTH = Path(train.__file__).parent, 2, 13
# On eight devices w_qkv (20 x 48) and the positions are whole; w_up, w_down, w_out, embed and head are split
SHAPE = ("--preset=demo --steps=40 --model_dim=20 --num_heads=2 --head_dim=8 --mlp_dim=40 --vocab_size=131 --bos_id=7 "
         "--stages.end=1 --stages.batch_tokens=312 --stages.seq_len=13 --val.seq_len=13 --val_context=3 --micro_tokens=26 "
         "--val_tokens=200 --compute_dtype=float32 --residual_dtype=none").split()
NAMES = ("record2025", "nanogpt")
each = pytest.mark.parametrize("name", NAMES)
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiles in half the time


def config(name, *flags):
    num_layers = {"record2025": 5, "nanogpt": 2}[name]
    return train.parse_flags([*SHAPE, f"--num_layers={num_layers}", *flags], presets=MODELS[name].presets)

def random_weights(name, cfg, seed=0):
    """None is zero, none like another, each large enough to matter."""
    rng = np.random.default_rng(seed)
    def draw(path, spec):
        leaf, shape = name_of(path).rpartition("/")[2], spec.shape
        if leaf.startswith("w_"):
            return 1.3 * shape[-2] ** -0.5 * rng.standard_normal(shape)
        return rng.standard_normal(shape) * 0.5 if leaf in ("embed", "head", "positions") else rng.uniform(0.3, 1.2, shape)
    return jax.tree.map_with_path(lambda path, spec: np.float32(draw(path, spec)), MODELS[name].specs(cfg))

def random_tokens(seed, rows=ROWS, length=LENGTH):
    return np.random.default_rng(seed).integers(0, 131, (rows, length))

def random_rows(seed, count=24):
    """Rows for to_devices: tokens that mostly follow from the one before."""
    tokens, rng = random_tokens(seed, count, LENGTH + 1), np.random.default_rng(seed)
    for t in range(1, LENGTH + 1):
        tokens[:, t] = np.where(rng.random(count) < 0.7, (tokens[:, t - 1] * 5 + 3) % 131, tokens[:, t])
    return [[row] for row in tokens.astype(np.uint16)]

def named(tree):
    return {name_of(path): np.float64(leaf) for path, leaf in jax.tree.leaves_with_path(tree)}

@functools.cache
def compiled(name, cfg):
    """(stacked weights, tokens, targets, target weights) -> (logits, loss, gradients)."""
    model = MODELS[name]
    def run(weights, tokens_BT, target_BT, weight_BT):
        batch = {"tokens": tokens_BT, "targets": target_BT, "weights": weight_BT}
        copies = lambda weights: unstack(gather(weights, model.specs(cfg), 1, cfg))
        def loss_of(weights):
            copied = copies(weights)
            rows = train.look_up(copied, batch, model)
            nats, total = model.loss(copied, batch | rows, None, cfg.stages[0], cfg)
            return nats, total
        (loss, total), grads = jax.value_and_grad(loss_of, has_aux=True)(weights)
        return model.logits(copies(weights), tokens_BT, cfg), loss, grads, total
    return jit(run)


# ---- The oracles: one row, one head, one query at a time -------------------------------------------------------------

def average(q, k, v, scale):
    """Causal softmax average of one head, [T, K]."""
    rows = []
    for t in range(len(q)):
        z = scale * k[:t + 1] @ q[t]
        e = np.exp(z - z.max())
        rows.append(e @ v[:t + 1] / e.sum())
    return np.array(rows)

def unit(x):
    return x / np.sqrt(np.mean(x ** 2, axis=-1, keepdims=True) + 1e-6)

def turned(x, cfg):
    """Dims j and j + K/2 of position t, as one complex number, turn by t * base^(-j / (K/4)); the second quarter does not."""
    quarter, z = cfg.head_dim // 4, x[:, :cfg.head_dim // 2] + 1j * x[:, cfg.head_dim // 2:]
    for t in range(len(x)):
        for j in range(quarter):
            z[t, j] *= np.exp(1j * t * 1024 ** (-j / quarter))
    return np.concatenate([z.real, z.imag], axis=1)

def heads_of(x, w_qkv, cfg):
    """Lists over heads of q, k and v: columns are q of all heads, then k, then v."""
    parts = np.split(x @ w_qkv, 3 * cfg.num_heads, axis=1)
    return parts[:cfg.num_heads], parts[cfg.num_heads:2 * cfg.num_heads], parts[2 * cfg.num_heads:]

def record2025_logits(weights, tokens, cfg):
    rows, blocks = [], weights["blocks"]
    for row in tokens:
        x0 = x = unit(weights["embed"][row])
        first, stack = None, []
        for i in range(cfg.num_layers):
            p = {key: w[i] for key, w in blocks.items()}
            if i >= cfg.num_layers // 2 and stack:
                x = x + weights["skip_mix"][i - cfg.num_layers // 2] * stack.pop()
            x = p["x_mix"] * x + p["x0_mix"] * x0
            q, k, v = heads_of(unit(x), p["w_qkv"], cfg)
            first = first or v
            v = [(1 - p["v_mix"]) * mine + p["v_mix"] * theirs for mine, theirs in zip(v, first)]
            y = [average(turned(unit(a), cfg), turned(unit(b), cfg), c, p["attn_scale"]) for a, b, c in zip(q, k, v)]
            x = x + np.concatenate(y, axis=1) @ p["w_out"]
            x = x + np.maximum(unit(x) @ p["w_up"], 0) ** 2 @ p["w_down"]
            if i < cfg.num_layers // 2:
                stack.append(x)
        rows.append(30 / (1 + np.exp(-unit(x) @ weights["head"][:131].T / 7.5)))
    return np.array(rows)

def nanogpt_logits(weights, tokens, cfg):
    def norm(x, weight):
        return weight * (x - x.mean(axis=1, keepdims=True)) / np.sqrt(x.var(axis=1, keepdims=True) + 1e-5)
    gelu = np.vectorize(lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2))))
    rows = []
    for row in tokens:
        x = weights["embed"][row] + weights["positions"][:len(row)]
        for i in range(cfg.num_layers):
            p = {key: w[i] for key, w in weights["blocks"].items()}
            y = [average(*qkv, 1 / math.sqrt(cfg.head_dim)) for qkv in zip(*heads_of(norm(x, p["norm_attention"]), p["w_qkv"], cfg))]
            x = x + np.concatenate(y, axis=1) @ p["w_out"]
            x = x + gelu(norm(x, p["norm_mlp"]) @ p["w_up"]) @ p["w_down"]
        rows.append(norm(x, weights["norm_final"]) @ weights["embed"][:131].T)
    return np.array(rows)

ORACLE = {"record2025": record2025_logits, "nanogpt": nanogpt_logits}

def oracle(name, weights, tokens, cfg):
    return ORACLE[name](jax.tree.map(np.float64, weights), tokens, cfg)

def nats(logits, targets):
    log_sum = np.log(np.exp(logits - logits.max()).sum(axis=-1)) + logits.max()
    return log_sum - np.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]


# ---- Models ----------------------------------------------------------------------------------------------------------

@each
def test_logits_and_loss_are_those_of_the_float64_recipe(name):
    cfg = config(name)
    weights, tokens, targets = random_weights(name, cfg), random_tokens(1), random_tokens(2)
    weight = np.random.default_rng(3).choice([0.0, 0.5, 1.0], tokens.shape).astype(np.float32)
    logits, loss, _, total = compiled(name, cfg)(weights, tokens, targets, weight)
    expected = oracle(name, weights, tokens, cfg)
    assert expected.std() > 0.5  # the comparison is not one of zeros
    constant = 15 if name == "record2025" else 0  # 30 sigmoid(z / 7.5) - 15 tanh(z / 15), which no softmax sees
    np.testing.assert_allclose(logits[..., :131] + constant, expected, atol=2e-4)
    assert np.all(logits[..., 131:] < -1e9)
    np.testing.assert_allclose(loss, (nats(expected, targets) * weight).sum(), rtol=1e-5)
    assert total == weight.sum()

@each
def test_the_gradient_of_every_weight_is_the_slope_of_the_float64_loss(name):
    cfg = config(name)
    weights, tokens, targets = random_weights(name, cfg), random_tokens(1), random_tokens(2)
    grads = compiled(name, cfg)(weights, tokens, targets, np.ones(tokens.shape, np.float32))[2]
    leaves, tree = jax.tree.flatten(weights)
    rng = np.random.default_rng(4)
    for i, (path, grad) in enumerate(jax.tree.leaves_with_path(grads)):
        direction = rng.standard_normal(grad.shape)
        def loss_at(distance):
            moved = [leaf + distance * direction if j == i else leaf for j, leaf in enumerate(leaves)]
            return nats(oracle(name, tree.unflatten(moved), tokens, cfg), targets).sum()
        slope, size = (loss_at(1e-5) - loss_at(-1e-5)) / 2e-5, np.linalg.norm(grad)
        assert size > 1e-3, name_of(path)
        np.testing.assert_allclose(np.vdot(grad, direction), slope, atol=1e-3 * size, err_msg=name_of(path))

@each
def test_bfloat16_stays_near_the_float64_recipe(name):
    """In the dtypes of the demo: matmuls in bfloat16, the stream in float32. What XLA cannot multiply on a CPU shows as it runs."""
    cfg = config(name, "--compute_dtype=bfloat16", "--residual_dtype=float32")
    weights, tokens, targets = random_weights(name, cfg), random_tokens(1), random_tokens(2)
    logits, loss, grads, _ = compiled(name, cfg)(weights, tokens, targets, np.ones(tokens.shape, np.float32))
    expected = oracle(name, weights, tokens, cfg)
    error = np.float64(logits[..., :131]) + (15 if name == "record2025" else 0) - expected
    assert np.sqrt(np.mean(error ** 2)) < 0.015 * expected.std()
    np.testing.assert_allclose(loss, nats(expected, targets).sum(), rtol=0.002)
    assert {grad.dtype.name for grad in jax.tree.leaves(grads)} == {"float32"}

@each
def test_a_later_token_cannot_change_an_earlier_logit(name):
    cfg = config(name)
    weights, tokens, ones = random_weights(name, cfg), random_tokens(1), np.ones((ROWS, LENGTH), np.float32)
    other = tokens.copy()
    other[:, 6] = (other[:, 6] + 1) % 131
    before, after = (np.array(compiled(name, cfg)(weights, x, x, ones)[0])[..., :131] for x in (tokens, other))
    assert np.array_equal(before[:, :6], after[:, :6]) and np.abs(before - after)[:, 6:].max(axis=2).min() > 1e-3

def test_rows_longer_than_the_learned_positions_can_be_sampled():
    cfg = config("nanogpt")
    weights, tokens = random_weights("nanogpt", cfg), random_tokens(1, 1, LENGTH + 5)
    assert weights["positions"].shape == (13, 20)
    logits = MODELS["nanogpt"].logits(unstack(jax.tree.map(jnp.asarray, weights)), tokens, cfg)
    np.testing.assert_allclose(logits[:, :LENGTH, :131], oracle("nanogpt", weights, tokens[:, :LENGTH], cfg), atol=2e-4)
    assert np.isfinite(logits).all()

def test_the_rotary_table_has_the_records_rates():
    """By its formula: inverse frequencies base^(-j / (K/4)), j < K/4, so that the slowest is not yet 1 / base."""
    cos, sin = record_rotary(7, config("record2025"))
    assert cos.shape == (7, 4)
    np.testing.assert_allclose(np.arctan2(sin[1], cos[1]), [1, 1024 ** -0.5, 0, 0], rtol=1e-6)

def test_first_values_are_those_of_the_recipes():
    first = {name: named(jit(lambda: train.init_params(jax.random.key(0), MODELS[name].specs(cfg)))())
             for name in NAMES for cfg in [config(name, "--model_dim=64", "--mlp_dim=256", "--num_heads=8")]}
    record, nano = first["record2025"], first["nanogpt"]
    for key, value in {"blocks/w_out": 0, "blocks/w_down": 0, "head": 0, "blocks/v_mix": 0.5, "blocks/attn_scale": 0.12, "blocks/x_mix": 1,
                       "blocks/x0_mix": 0, "skip_mix": 1}.items():
        np.testing.assert_allclose(record[key], value, rtol=1e-6, err_msg=key)
    assert record["blocks/w_qkv"].shape == (5, 64, 192) and record["skip_mix"].shape == (2,)
    for key in ("blocks/w_qkv", "blocks/w_up"):
        assert np.abs(record[key]).max() == pytest.approx((0.75 / 64) ** 0.5, rel=1e-3)
        assert record[key].std() == pytest.approx((0.75 / 64 / 3) ** 0.5, rel=0.02)
    assert record["embed"].std() == pytest.approx(1, rel=0.02)
    for key in ("embed", "positions", "blocks/w_qkv", "blocks/w_up"):
        assert nano[key].std() == pytest.approx(0.02, rel=0.06), key
    for key in ("blocks/w_out", "blocks/w_down"):
        assert nano[key].std() == pytest.approx(0.02 / math.sqrt(4), rel=0.03), key
    assert all((nano[key] == 1).all() for key in ("blocks/norm_attention", "blocks/norm_mlp", "norm_final")) and "head" not in nano


# ---- Optimizers ------------------------------------------------------------------------------------------------------

@functools.cache
def updater(name, num_devices, *flags):
    """(state on the devices at step 0 with random weights, (state, whole gradients) -> state)."""
    cfg, model, mesh = config(name, *flags), MODELS[name], make_mesh(jax.devices()[:num_devices])
    specs, rules, stage = model.specs(cfg), model.rules(cfg), cfg.stages[0]
    places = state_shardings(model, mesh, cfg)
    parts = train.partition(places)
    def step(state, grads):
        return train.State(state.step + 1, *model.update(state, grads, stage, specs, rules, num_devices, cfg))
    init = lambda: make_init(model, mesh, cfg)()._replace(params=jax.device_put(random_weights(name, cfg), places.params))
    return init, jit(train.on_devices(step, mesh, (parts, parts.params), parts)), cfg

def random_grads(name, cfg, step):
    """Norms from well under to well over the clip's threshold."""
    weights = random_weights(name, cfg, seed=100 + step)
    return jax.tree.map(lambda w: np.float32((w - w.mean()) * (0.002, 0.5)[step % 2]), weights)

@pytest.mark.parametrize("num_devices", [1, 8])
def test_the_nanogpt_step_is_adamw_with_clipping_and_cosine_as_by_optax(num_devices):
    init, step, cfg = updater("nanogpt", num_devices, "--steps=12", "--warmup_steps=4", "--adam_eps=1e-4")
    state, weights = init(), jax.tree.map(jnp.asarray, random_weights("nanogpt", cfg))
    schedule = optax.warmup_cosine_decay_schedule(1e-3 / 5, 1e-3, 4, 12, 1e-4)
    decays = lambda tree: jax.tree.map_with_path(lambda path, _: "norm" not in name_of(path), tree)
    peer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b1=0.9, b2=0.99, eps=1e-4, weight_decay=0.1, mask=decays))
    slots, clipped, peer_update = peer.init(weights), [], jit(peer.update)
    for i in range(12):
        grads = random_grads("nanogpt", cfg, i)
        clipped.append(float(np.sqrt(sum(np.sum(g ** 2) for g in jax.tree.leaves(grads)))) > 1)
        state = step(state, grads)
        updates, slots = peer_update(grads, slots, weights)
        weights = optax.apply_updates(weights, updates)
    assert sum(clipped) == 6
    before = named(random_weights("nanogpt", cfg))
    for key, weight in named(weights).items():
        moved = np.abs(weight - before[key]).max()
        assert moved > 1e-3, key
        np.testing.assert_allclose(named(state.params)[key], weight, atol=1e-3 * moved, err_msg=key)

def test_the_cosine_is_nanogpts():
    cfg = config("nanogpt", "--steps=50", "--warmup_steps=10", "--final_lr_scale=0.1")
    found = [float(nanogpt_lr(step, cfg)) for step in (0, 4, 9, 10, 20, 30, 50)]
    middle = lambda ratio: 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * ratio))
    np.testing.assert_allclose(found, [1 / 11, 5 / 11, 10 / 11, 1, middle(0.25), 0.55, 0.1], rtol=1e-6)

def svd_quintic(g):
    u, s, vt = np.linalg.svd(g, full_matrices=False)
    s = s / np.linalg.norm(s)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s ** 3 + 2.0315 * s ** 5
    return (u * s) @ vt

@pytest.mark.parametrize("num_devices", [1, 8])
def test_the_record_step_is_muon_and_adam_as_in_float64(num_devices):
    init, step, cfg = updater("record2025", num_devices, "--steps=20", "--adam_eps=1e-4")
    state, weights = init(), named(random_weights("record2025", cfg))
    assert {key for key, spec in zip(weights, jax.tree.leaves(MODELS["record2025"].specs(cfg))) if split_axis(spec, 8) is not None} == {
        "embed", "head", "blocks/w_out", "blocks/w_up", "blocks/w_down"}
    rate = {"embed": 0.6, "head": 0.008} | dict.fromkeys(["blocks/w_qkv", "blocks/w_out", "blocks/w_up", "blocks/w_down"], 0.04)
    factor = {"blocks/w_qkv": (48 / 20) ** 0.5, "blocks/w_out": 1, "blocks/w_up": 1, "blocks/w_down": 2 ** 0.5}
    m, v = ({key: np.zeros_like(w) for key, w in weights.items()} for _ in "mv")
    before = dict(weights)
    for i in range(20):
        grads = random_grads("record2025", cfg, i)
        state = step(state, grads)
        scale, momentum = min(1, 1 - 0.9 * (i - 12) / 8), 0.85 + 0.1 * min(1, i / 6)  # the last 40 %; the first 30 %, not 500 steps
        for key, g in named(grads).items():
            if key in factor:
                m[key] = momentum * m[key] + (1 - momentum) * g
                ahead = momentum * m[key] + (1 - momentum) * g
                direction = factor[key] * np.array([svd_quintic(one) for one in ahead])
            else:
                m[key], v[key] = 0.9 * m[key] + 0.1 * g, 0.95 * v[key] + 0.05 * g * g
                direction = m[key] / (1 - 0.9 ** (i + 1)) / (np.sqrt(v[key] / (1 - 0.95 ** (i + 1))) + 1e-4)
            weights[key] = weights[key] - scale * rate.get(key, 0.04) * direction
    for key, weight in weights.items():
        moved = np.abs(weight - before[key]).max()
        assert moved > 0.01, key
        np.testing.assert_allclose(named(state.params)[key], weight, atol=2e-3 * moved, err_msg=key)

def test_momentum_warms_up_over_500_steps_where_these_are_less_than_30_percent():
    """Of the first gradient the average keeps 1 - momentum."""
    for steps, momentum in ((2000, 0.85 + 0.1 * 100 / 500), (1000, 0.85 + 0.1 * 100 / 300)):
        cfg = config("record2025", f"--steps={steps}")
        _, slots = MODELS["record2025"].rules(cfg)["muon"].direction(3.0, {"momentum": 0.0}, 100, cfg)
        assert slots["momentum"] == pytest.approx(3 * (1 - momentum))

def test_newton_schulz_keeps_the_old_coefficients():
    cfg, g = config("record2025"), np.random.default_rng(0).standard_normal((3, 20, 37))
    for batch in (g, g.swapaxes(1, 2)):
        np.testing.assert_allclose(newton_schulz(jnp.float32(batch), cfg), [svd_quintic(one) for one in batch], atol=1e-4)


# ---- Through the loop ------------------------------------------------------------------------------------------------

@functools.cache
def trained(name, num_devices, *flags):
    """(losses, weights) of eight steps from random weights."""
    cfg, model, mesh = config(name, *flags), MODELS[name], make_mesh(jax.devices()[:num_devices])
    stage, places = cfg.stages[0], state_shardings(model, mesh, cfg)
    state = make_init(model, mesh, cfg)()._replace(params=jax.device_put(random_weights(name, cfg), places.params))
    batch = lambda seed: to_devices(random_rows(seed), stage, mesh, cfg)
    step = make_train_step(stage, model, mesh, cfg).lower(state, batch(0)).compile(compiler_options={"xla_backend_optimization_level": 0})
    losses = []
    for i in range(8):
        state, loss = step(state, batch(i))
        losses.append(float(loss))
    return losses, named(state.params)

@each
def test_eight_devices_learn_as_one(name):
    """eps: else Adam makes a whole step of the noise in a gradient that is almost zero."""
    flags = ("--num_layers=3", "--adam_eps=1e-3", "--adamw_lr=0.02", "--warmup_steps=0", "--muon_lr=0.01", "--adam_lr=0.001")
    one, eight = (trained(name, num_devices, *flags) for num_devices in (1, 8))
    assert one[0][-1] < one[0][0] - 0.3
    np.testing.assert_allclose(eight[0], one[0], rtol=2e-5)
    for key, weight in one[1].items():
        np.testing.assert_allclose(eight[1][key], weight, atol=1e-3 * np.abs(weight).max(), err_msg=key)

@each
def test_the_command_trains_a_small_model_from_end_to_end(name, tmp_path):
    small = ["--num_layers=2", "--model_dim=32", "--num_heads=2", "--head_dim=16", "--mlp_dim=64", "--stages.end=1", "--val.seq_len=64",
             "--stages.batch_tokens=1024", "--stages.seq_len=64", "--val_context=32", "--val_tokens=2048", "--warmup_steps=5"]
    command = [sys.executable, "-m", "scripts.baselines", name, "--preset=demo", "--steps=12", f"--log_dir={tmp_path}", *small]
    fast = {"JAX_NUM_CPU_DEVICES": "1", "XLA_FLAGS": "--xla_backend_optimization_level=0"}  # compiles sooner
    done = subprocess.run(command, cwd=ROOT, env=os.environ | fast, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folder, = tmp_path.iterdir()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 12 and rows[-1]["tokens"] == 12 * 1024
    assert rows[-1]["val_loss"] < math.log(257) - (1.5 if name == "record2025" else 0.3)
    assert "sample: def main(" in done.stdout

@each
def test_the_recipes_presets_are_configs_and_the_users_flags_win(name):
    for preset in ("demo", "speedrun"):
        cfg = train.parse_flags(["--adam_beta2=0.5", "--stages.seq_len=16", "--vocab_size=257"], preset, MODELS[name].presets)
        assert cfg.adam_beta2 == 0.5 and cfg.stages[0].seq_len == 16 and cfg.preset == preset and MODELS[name].specs(cfg)
    if name == "record2025":
        full = train.replace(MODELS[name].presets["speedrun"], vocab_size=50257)
        assert (full.steps, full.num_layers, full.model_dim) == (1675, 12, 1024)
        assert [(first, last, stage.batch_tokens, stage.seq_len) for stage, first, last in full.spans] == [
            (0, 838, 524288, 1024), (838, 1675, 524288, 2048)]
        count = train.count_params(MODELS[name].specs(full)) - 2 * (full.padded_vocab - 50304) * 1024  # its vocabulary was padded less
        assert count == pytest.approx(254.0e6, rel=2e-4)

@each
@pytest.mark.parametrize("flag", ["optimizer=adamw", "num_kv_heads=1", "skips=((0,2),)", "stages.doc_len=9", "val.short=3"])
def test_what_a_recipe_would_pass_over_in_silence_is_refused(name, flag):
    with pytest.raises(train.UsageError, match=f"--{flag.partition('=')[0]}="):
        MODELS[name].specs(config(name, f"--{flag}"))

def test_help_says_what_the_recipes_are_and_a_wrong_name_is_exit_code_2(capsys):
    assert main(["--help"]) is None and "python -m scripts.baselines nanogpt" in capsys.readouterr().out
    done = subprocess.run([sys.executable, "-m", "scripts.baselines", "nanogtp"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: nanogtp: wanted record2025 or nanogpt")
