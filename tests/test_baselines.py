"""The two older recipes: forward and gradient in float64 numpy, optimizer steps, the loop."""

import functools
import json
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import train
from scripts.baselines import MODELS, main
from train import ROOT, make_mesh, name_of, unstack

ROWS = 2
LENGTH = 13
# On eight devices w_qkv (20 x 48) and the positions are whole; w_up, w_down, w_out, embed and head
# are split.
SHAPE = (
    "--preset=demo --steps=40 --model_dim=20 --num_heads=2 --head_dim=8 --mlp_dim=40 "
    "--vocab_size=131 --bos_id=7 --stages.end=1 --stages.batch_tokens=312 --stages.seq_len=13 "
    "--val.seq_len=13 --val_context=3 --micro_tokens=26 --val_tokens=200 --compute_dtype=float32 "
    "--residual_dtype=none"
).split()
NUM_LAYERS = {"record2025": 5, "nanogpt": 2}
SOON = {"xla_backend_optimization_level": 0}  # compiles in half the time
each = pytest.mark.parametrize("name", ["record2025", "nanogpt"])


def config(name, *flags):
    argv = [*SHAPE, f"--num_layers={NUM_LAYERS[name]}", *flags]
    return train.parse_flags(argv, presets=MODELS[name].presets)


def random_weights(name, cfg, seed=0):
    """None is zero, none like another, each large enough to matter."""
    rng = np.random.default_rng(seed)

    def draw(path, spec):
        leaf = name_of(path).rpartition("/")[2]
        if leaf.startswith("w_"):
            return np.float32(1.3 * spec.shape[-2] ** -0.5 * rng.standard_normal(spec.shape))
        if leaf in ("embed", "head", "positions"):
            return np.float32(0.5 * rng.standard_normal(spec.shape))
        return np.float32(rng.uniform(0.3, 1.2, spec.shape))

    return jax.tree.map_with_path(draw, MODELS[name].specs(cfg))


def random_tokens(seed):
    return np.random.default_rng(seed).integers(0, 131, (ROWS, LENGTH))


def named(tree):
    return {name_of(path): np.float64(leaf) for path, leaf in jax.tree.leaves_with_path(tree)}


# ---- The oracles: one row, one head, one query at a time -----------------------------------------


def average(q, k, v, scale):
    """Causal softmax average of one head, [T, K]."""
    rows = []
    for t in range(len(q)):
        z = scale * k[: t + 1] @ q[t]
        e = np.exp(z - z.max())
        rows.append(e @ v[: t + 1] / e.sum())
    return np.array(rows)


def unit(x):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6)


def turned(x, cfg):
    """Dims j and j + K/2 of position t, as one complex number, turn by t * 1024^(-j / (K/4)).

    The second quarter of the dims does not turn.
    """
    quarter = cfg.head_dim // 4
    z = x[:, : 2 * quarter] + 1j * x[:, 2 * quarter :]
    for t in range(len(x)):
        for j in range(quarter):
            z[t, j] *= np.exp(1j * t * 1024 ** (-j / quarter))
    return np.concatenate([z.real, z.imag], axis=1)


def heads_of(x, w_qkv, cfg):
    """Lists over heads of q, k and v: columns are q of all heads, then k, then v."""
    parts = np.split(x @ w_qkv, 3 * cfg.num_heads, axis=1)
    H = cfg.num_heads
    return parts[:H], parts[H : 2 * H], parts[2 * H :]


def record2025_row(weights, row, cfg):
    x0 = x = unit(weights["embed"][row])
    half = cfg.num_layers // 2
    first = None
    stack = []
    for i in range(cfg.num_layers):
        p = {key: w[i] for key, w in weights["blocks"].items()}
        if i >= half and stack:
            x = x + weights["skip_mix"][i - half] * stack.pop()
        x = p["x_mix"] * x + p["x0_mix"] * x0
        y = []
        q, k, v = heads_of(unit(x), p["w_qkv"], cfg)
        first = first or v
        for a, b, mine, theirs in zip(q, k, v, first, strict=True):
            mixed = (1 - p["v_mix"]) * mine + p["v_mix"] * theirs
            y.append(average(turned(unit(a), cfg), turned(unit(b), cfg), mixed, p["attn_scale"]))
        x = x + np.concatenate(y, axis=1) @ p["w_out"]
        x = x + np.maximum(unit(x) @ p["w_up"], 0) ** 2 @ p["w_down"]
        if i < half:
            stack.append(x)
    return 30 / (1 + np.exp(-unit(x) @ weights["head"][:131].T / 7.5))


def nanogpt_row(weights, row, cfg):
    def norm(x, weight):
        centred = x - x.mean(axis=1, keepdims=True)
        return weight * centred / np.sqrt(x.var(axis=1, keepdims=True) + 1e-5)

    def gelu(x):
        return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))

    last = len(weights["positions"]) - 1  # at which longer rows, of samples, stay
    x = weights["embed"][row] + weights["positions"][np.minimum(np.arange(len(row)), last)]
    for i in range(cfg.num_layers):
        p = {key: w[i] for key, w in weights["blocks"].items()}
        heads = zip(*heads_of(norm(x, p["norm_attention"]), p["w_qkv"], cfg), strict=True)
        y = [average(q, k, v, 1 / math.sqrt(cfg.head_dim)) for q, k, v in heads]
        x = x + np.concatenate(y, axis=1) @ p["w_out"]
        x = x + gelu(norm(x, p["norm_mlp"]) @ p["w_up"]) @ p["w_down"]
    return norm(x, weights["norm_final"]) @ weights["embed"][:131].T


def oracle(name, weights, tokens, cfg):
    weights = jax.tree.map(np.float64, weights)
    row_of = {"record2025": record2025_row, "nanogpt": nanogpt_row}[name]
    return np.array([row_of(weights, row, cfg) for row in tokens])


def nats(logits, targets):
    log_sum = np.log(np.exp(logits - logits.max()).sum(axis=-1)) + logits.max()
    return log_sum - np.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]


# ---- Models --------------------------------------------------------------------------------------


@each
def test_logits_loss_and_every_gradient_are_those_of_the_float64_recipe(name):
    cfg = config(name)
    model = MODELS[name]
    weights, tokens, targets = random_weights(name, cfg), random_tokens(1), random_tokens(2)
    weight = np.random.default_rng(3).choice([0.0, 0.5, 1.0], tokens.shape).astype(np.float32)
    batch = {"tokens": tokens, "targets": targets, "weights": weight}
    longer = np.concatenate([tokens, random_tokens(5)], axis=1)  # than the learned positions

    def run(weights):
        def copies(weights):
            return unstack(train.gather(weights, model.specs(cfg), 1, cfg))

        def loss_of(weights):
            copied = copies(weights)
            rows = train.look_up(copied, batch, model)
            return model.loss(copied, batch | rows, None, cfg.stages[0], cfg)

        loss, grads = jax.value_and_grad(loss_of, has_aux=True)(weights)
        return model.logits(copies(weights), longer, cfg), loss, grads

    logits, (loss, total), grads = jax.jit(run, compiler_options=SOON)(weights)
    expected = oracle(name, weights, longer, cfg)
    assert expected.std() > 0.5  # the comparison is not one of zeros
    # 30 sigmoid(z / 7.5) - 15 tanh(z / 15), which no softmax sees
    constant = 15 if name == "record2025" else 0
    np.testing.assert_allclose(logits[..., :131] + constant, expected, atol=2e-4)
    assert np.all(logits[..., 131:] < -1e9)
    expected = expected[:, :LENGTH]
    np.testing.assert_allclose(loss, (nats(expected, targets) * weight).sum(), rtol=1e-5)
    assert total == weight.sum()

    leaves, tree = jax.tree.flatten(weights)
    rng = np.random.default_rng(4)
    for i, (path, grad) in enumerate(jax.tree.leaves_with_path(grads)):
        direction = rng.standard_normal(grad.shape)
        losses = []
        for distance in (1e-5, -1e-5):
            moved = list(leaves)
            moved[i] = leaves[i] + distance * direction
            moved_logits = oracle(name, tree.unflatten(moved), tokens, cfg)
            losses.append((nats(moved_logits, targets) * weight).sum())
        slope = (losses[0] - losses[1]) / 2e-5
        size = np.linalg.norm(grad)
        assert size > 1e-3, name_of(path)
        error = np.vdot(grad, direction) - slope
        np.testing.assert_allclose(error, 0, atol=1e-3 * size, err_msg=name_of(path))


def test_first_values_are_those_of_the_recipes():
    first = {}
    for name in MODELS:
        cfg = config(name, "--model_dim=64", "--mlp_dim=256", "--num_heads=8")
        init = functools.partial(train.init_params, specs=MODELS[name].specs(cfg))
        first[name] = named(jax.jit(init, compiler_options=SOON)(jax.random.key(0)))
    record, nano = first["record2025"], first["nanogpt"]
    constants = {"w_out": 0, "w_down": 0, "v_mix": 0.5, "attn_scale": 0.12, "x_mix": 1, "x0_mix": 0}
    for key, value in constants.items():
        np.testing.assert_allclose(record[f"blocks/{key}"], value, rtol=1e-6, err_msg=key)
    assert (record["head"] == 0).all() and record["skip_mix"].tolist() == [1, 1]
    for key in ("blocks/w_qkv", "blocks/w_up"):
        assert np.abs(record[key]).max() == pytest.approx((0.75 / 64) ** 0.5, rel=1e-3)
        assert record[key].std() == pytest.approx((0.75 / 64 / 3) ** 0.5, rel=0.02)
    assert record["embed"].std() == pytest.approx(1, rel=0.02)
    for key in ("embed", "positions", "blocks/w_qkv", "blocks/w_up"):
        assert nano[key].std() == pytest.approx(0.02, rel=0.06), key
    for key in ("blocks/w_out", "blocks/w_down"):
        assert nano[key].std() == pytest.approx(0.02 / math.sqrt(4), rel=0.03), key
    for key in ("blocks/norm_attention", "blocks/norm_mlp", "norm_final"):
        assert (nano[key] == 1).all(), key


# ---- Optimizers ----------------------------------------------------------------------------------


def updater(name, *flags):
    """(state on eight devices with random weights, (state, gradients) -> state, Config)."""
    cfg = config(name, *flags)
    model = MODELS[name]
    mesh = make_mesh()
    specs, rules = model.specs(cfg), model.rules(cfg)
    places = train.state_shardings(model, mesh, cfg)
    parts = train.partition(places)

    def step(state, grads):
        new = model.update(state, grads, cfg.stages[0], specs, rules, mesh.size, cfg)
        return train.State(state.step + 1, *new)

    shapes = jax.eval_shape(train.make_init(model, mesh, cfg)).opt_state
    slots = jax.tree.map(lambda slot: np.zeros(slot.shape, slot.dtype), shapes)
    state = train.State(np.int32(0), random_weights(name, cfg), slots)
    step = train.on_devices(step, mesh, (parts, parts.params), parts)
    return jax.device_put(state, places), jax.jit(step, compiler_options=SOON), cfg


def random_grads(name, cfg, step):
    """Norms from well under to well over the clip's threshold."""
    weights = random_weights(name, cfg, seed=100 + step)
    scale = (0.002, 0.5)[step % 2]
    return jax.tree.map(lambda w: np.float32((w - w.mean()) * scale), weights)


def assert_moved_alike(params, weights, before, share):
    for key, weight in weights.items():
        moved = np.abs(weight - before[key]).max()
        assert moved > 1e-3, key
        np.testing.assert_allclose(params[key], weight, atol=share * moved, err_msg=key)


def test_the_nanogpt_step_is_adamw_with_clipping_and_cosine_as_by_optax_on_eight_devices():
    flags = ("--steps=12", "--warmup_steps=4", "--adam_eps=1e-4")
    state, step, cfg = updater("nanogpt", *flags)
    weights = jax.tree.map(jnp.asarray, random_weights("nanogpt", cfg))
    schedule = optax.warmup_cosine_decay_schedule(1e-3 / 5, 1e-3, 4, 12, 1e-4)
    decays = jax.tree.map_with_path(lambda path, _: "norm" not in name_of(path), weights)
    adamw = optax.adamw(schedule, b1=0.9, b2=0.99, eps=1e-4, weight_decay=0.1, mask=decays)
    peer = optax.chain(optax.clip_by_global_norm(1.0), adamw)
    slots = peer.init(weights)

    @functools.partial(jax.jit, compiler_options=SOON)
    def peer_step(weights, slots, grads):
        updates, slots = peer.update(grads, slots, weights)
        return optax.apply_updates(weights, updates), slots

    num_clipped = 0
    for i in range(12):
        grads = random_grads("nanogpt", cfg, i)
        num_clipped += sum(np.sum(g**2) for g in jax.tree.leaves(grads)) > 1
        state = step(state, grads)
        weights, slots = peer_step(weights, slots, grads)
    assert num_clipped == 6
    before = named(random_weights("nanogpt", cfg))
    assert_moved_alike(named(state.params), named(weights), before, 1e-3)


def svd_quintic(g):
    """Newton-Schulz on the singular values: five quintic steps with the old coefficients."""
    u, s, vt = np.linalg.svd(g, full_matrices=False)
    s = s / np.linalg.norm(s)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (u * s) @ vt


def test_the_record_step_is_muon_and_adam_as_in_float64_on_eight_devices():
    state, step, cfg = updater("record2025", "--steps=20", "--adam_eps=1e-4")
    before = named(random_weights("record2025", cfg))
    weights = dict(before)
    rate = {"embed": 0.6, "head": 0.008}  # the others' is 0.04
    larger = {"w_qkv": (48 / 20) ** 0.5, "w_out": 1, "w_up": 1, "w_down": 2**0.5}
    larger = {f"blocks/{key}": factor for key, factor in larger.items()}
    m = {key: np.zeros_like(w) for key, w in weights.items()}
    v = {key: np.zeros_like(w) for key, w in weights.items()}
    for i in range(20):
        grads = random_grads("record2025", cfg, i)
        state = step(state, grads)
        scale = min(1, 1 - 0.9 * (i - 12) / 8)  # down over the last 40 %
        momentum = 0.85 + 0.1 * min(1, i / 6)  # up over the first 30 %, not 500 steps
        for key, g in named(grads).items():
            if key in larger:
                m[key] = momentum * m[key] + (1 - momentum) * g
                ahead = momentum * m[key] + (1 - momentum) * g
                direction = larger[key] * np.array([svd_quintic(one) for one in ahead])
            else:
                m[key] = 0.9 * m[key] + 0.1 * g
                v[key] = 0.95 * v[key] + 0.05 * g * g
                root = np.sqrt(v[key] / (1 - 0.95 ** (i + 1)))
                direction = m[key] / (1 - 0.9 ** (i + 1)) / (root + 1e-4)
            weights[key] = weights[key] - scale * rate.get(key, 0.04) * direction
    assert_moved_alike(named(state.params), weights, before, 2e-3)


def test_momentum_warms_up_over_500_steps_where_these_are_less_than_30_percent():
    """Of the first gradient the average keeps 1 - momentum."""
    for steps, momentum in ((2000, 0.85 + 0.1 * 100 / 500), (1000, 0.85 + 0.1 * 100 / 300)):
        cfg = config("record2025", f"--steps={steps}")
        rule = MODELS["record2025"].rules(cfg)["muon"]
        _, slots = rule.direction(3.0, {"momentum": 0.0}, 100, cfg)
        assert slots["momentum"] == pytest.approx(3 * (1 - momentum))


# ---- Through the loop ----------------------------------------------------------------------------


@each
@pytest.mark.system
def test_the_command_trains_a_small_model_on_eight_devices_from_end_to_end(name, tmp_path):
    small = (
        "--preset=demo --steps=12 --num_layers=2 --model_dim=32 --num_heads=2 --head_dim=16 "
        "--mlp_dim=64 --stages.end=1 --val.seq_len=64 --stages.batch_tokens=1024 "
        "--stages.seq_len=64 --val_context=32 --val_tokens=2048 --warmup_steps=5"
    ).split()
    argv = [sys.executable, "-m", "scripts.baselines", name, f"--log_dir={tmp_path}", *small]
    fast = {"JAX_NUM_CPU_DEVICES": "8", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    done = subprocess.run(argv, cwd=ROOT, env=os.environ | fast, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (folder,) = tmp_path.iterdir()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 12 and rows[-1]["tokens"] == 12 * 1024
    assert rows[-1]["val_loss"] < math.log(257) - (1.5 if name == "record2025" else 0.3)
    assert "sample: def main(" in done.stdout


def test_the_recipes_presets_are_configs_and_the_users_flags_win():
    flags = ["--adam_beta2=0.5", "--stages.seq_len=16", "--vocab_size=257"]
    for model in MODELS.values():
        for preset in ("demo", "speedrun"):
            cfg = train.parse_flags(flags, preset, model.presets)
            assert cfg.adam_beta2 == 0.5 and cfg.stages[0].seq_len == 16 and cfg.preset == preset
            assert model.specs(cfg)
    model = MODELS["record2025"]
    full = train.replace(model.presets["speedrun"], vocab_size=50257)
    assert [(first, last, stage.seq_len) for stage, first, last in full.spans] == [
        (0, 838, 1024),
        (838, 1675, 2048),
    ]
    count = train.count_params(model.specs(full))
    count -= 2 * (full.padded_vocab - 50304) * 1024  # its vocabulary was padded less
    assert count == pytest.approx(254.0e6, rel=2e-4)


def test_what_a_recipe_would_pass_over_in_silence_and_a_wrong_name_are_refused(capsys):
    flags = ["optimizer=adamw", "num_kv_heads=1", "skips=((0,2),)", "stages.doc_len=9"]
    for name, model in MODELS.items():
        for flag in [*flags, "val.short=3"]:
            cfg = config(name, "--num_layers=3", f"--{flag}")
            with pytest.raises(train.UsageError, match=f"--{flag.partition('=')[0]}="):
                model.specs(cfg)
    main(["--help"])
    assert "python -m scripts.baselines nanogpt" in capsys.readouterr().out
    with pytest.raises(train.UsageError, match="nanogtp: wanted record2025 or nanogpt"):
        main(["nanogtp"])
