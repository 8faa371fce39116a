"""Schedules and optimizers, against an SVD, float64 numpy and optax."""

import functools
import math
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from jaxprs import dots

import train
from train import Adam, Muon, Stage, State, named, replace

# D < HK, D > GK is tall, D == F is square: every orientation Muon meets.
# Over eight devices the heads and the vocabulary are split, the MLP is not.
# Of five layers there are more matrices of a shape than devices.
FLAGS = """
--preset=demo --steps=9 --num_layers=5 --model_dim=20 --num_heads=3 --num_kv_heads=1 --head_dim=16
--mlp_dim=20 --vocab_size=131 --bos_id=7 --skips=((0,2),) --backout=1 --offset_layers=
--gate_dims=5 --compute_dtype=float32 --stages.end=0.5,1 --stages.lr=0.7,0.4 --muon_lr=0.03
--muon_wd=40 --muon_momentum=0.8,0.95,3,2 --adam_lr=0.3 --scalar_lr=0.1 --adamw_lr=0.01
--adam_beta1=0.7 --adam_beta2=0.9 --adam_eps=1e-2 --adam_wd=3 --warmup_steps=2
--cooldown_frac=0.5 --final_lr_scale=0.1 --copy_dim=8
"""
CFG = replace(train.parse_flags(FLAGS.split()), final_frac=1 / 9)
config = functools.partial(replace, CFG)
FAST = {"xla_backend_optimization_level": 0}  # compiles in half the time
jit = functools.partial(jax.jit, compiler_options=FAST)


def random(shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


POLYNOMIALS = [  # of Polar Express, as the recipe has them
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]


def polynomials(s):
    """What becomes of a singular value, given as a share of the Frobenius norm."""
    s = s / 1.02
    for a, b, c in POLYNOMIALS:
        s = a * s + b * s**3 + c * s**5
    return s


def svd_orthogonalize(g):
    """The iteration on the singular values alone, in float64."""
    u, s, vt = np.linalg.svd(np.float64(g), full_matrices=False)
    size = np.linalg.norm(s, axis=-1, keepdims=True)
    return (u * polynomials(s / np.where(size, size, 1))[..., None, :]) @ vt


# ---- Schedules ----


def test_the_speedruns_learning_rate_is_what_its_table_gives_by_hand():
    """From 0.4 of 1664.3 = 0.979 * 1700 steps on it falls, over 0.6 of them, to 0.15."""
    cfg = train.Config()
    late = 1.73 - (1.73 - 0.15) * (1331 / 1664.3 - 0.4) / 0.6
    middle = 1.52 - (1.52 - 0.15) * (832 / 1664.3 - 0.4) / 0.6
    by_hand = [(554, 1), (555, 1.52), (665, 1.52), (832, middle), (1331, late)]
    for step, wanted in [*by_hand, (1665, 0.15), (1699, 0.15)]:
        stage = cfg.stages[train.stage_at(step, cfg)]
        assert float(train.lr_scale(step, stage, cfg)) == pytest.approx(wanted, rel=1e-5), step
    cfg = config(warmup_steps=0, cooldown_frac=0.0, final_frac=0.0)
    assert {float(train.lr_scale(step, Stage(lr=1.5), cfg)) for step in range(cfg.steps)} == {1.5}


def test_muons_momentum_rises_linearly_stays_and_goes_the_way_back_at_the_end():
    def values(steps, total, momentum=(0.85, 0.95, 300, 50)):
        cfg = replace(train.Config(), steps=total, muon_momentum=momentum)
        return [pytest.approx(float(train.muon_momentum(step, cfg))) for step in steps]

    wanted = [0.85, 0.9, 0.95, 0.95, 0.9, 0.85]
    assert values((0, 150, 300, 1650, 1675, 1700), 1700) == wanted
    assert values((0, 10, 20, 95), 100, (0.95, 0.85, 20, 10)) == [0.95, 0.9, 0.85, 0.9]
    assert values((3, 99), 100, (0.85, 0.95, 0, 0)) == [0.95, 0.95]
    shorter_than_the_rise = [0.85, 0.875, 0.85 + 0.1 / 3, 0.9 - 0.1 / 3]
    assert values((0, 75, 100, 150), 150) == shorter_than_the_rise


def test_every_step_belongs_to_one_stage_and_tokens_add_up():
    ends, tokens = (0.3, 0.7, 1.0), (64, 128, 256)
    cfg = config(steps=11, stages=tuple(map(Stage, ends, tokens)))
    assert [train.stage_at(step, cfg) for step in range(11)] == [0] * 3 + [1] * 5 + [2] * 3
    seen = [train.tokens_before(step, cfg) for step in range(12)]
    assert np.diff(seen).tolist() == [64] * 3 + [128] * 5 + [256] * 3 and seen[0] == 0
    short = replace(cfg, steps=1)
    assert short.bounds[-1] == 1 and short.bounds[train.stage_at(0, short) + 1] == 1


# ---- Orthogonalize ----


@functools.cache
def compiled_orthogonalize(dtype="float32"):
    return jit(lambda *matrices: [train.orthogonalize(g, jnp.dtype(dtype)) for g in matrices])


def test_orthogonalize_maps_singular_values_by_the_polynomials_whatever_the_scale():
    shapes = [(3, 7, 19), (2, 2, 23, 5), (13, 13), (1, 17)]
    matrices = [np.float32(random(shape)) for shape in shapes]
    expected = list(map(svd_orthogonalize, matrices))
    for scale, tolerance in ((1, 1e-4), (1e-2, 1e-2), (1e12, 1e-4)):
        scaled = [np.float32(scale) * g for g in matrices]
        for found, wanted in zip(compiled_orthogonalize()(*scaled), expected, strict=True):
            np.testing.assert_allclose(found, wanted, atol=tolerance)
    assert not any(map(np.any, compiled_orthogonalize()(*map(np.zeros_like, matrices))))


def test_orthogonalize_multiplies_by_the_smaller_of_the_two_gram_matrices():
    products = dots(lambda g: train.orthogonalize(g, jnp.float32), np.zeros((23, 5), np.float32))
    sizes = [product.outvars[0].aval.size for product in products]
    assert sizes == [5 * 5, 5 * 5, 5 * 23] * 5


def landed(rest):
    """Singular values, after, of a bfloat16 matrix with these and one that makes its norm 1."""
    values = np.r_[np.sqrt(1 - np.sum(np.square(rest))), rest]
    u, v = (np.linalg.qr(random((rows, len(values))))[0] for rows in (len(values), 41))
    (x,) = compiled_orthogonalize("bfloat16")(np.float32((u * values) @ v.T))
    assert x.dtype == "bfloat16"
    return np.linalg.svd(np.float64(x), compute_uv=False)


def test_singular_values_above_a_thousandth_of_the_norm_land_in_the_stated_range():
    every = polynomials(np.geomspace(0.00102, 1, 100_000))
    assert 0.858 <= every.min() < 0.859 and 1.141 < every.max() <= 1.142
    assert polynomials(0.00100) < 0.85
    for values in (np.full(20, 0.002), np.geomspace(0.3, 0.002, 20), np.full(20, 0.18)):
        found = landed(values)
        assert 0.8 <= found.min() and found.max() <= 1.15


def test_over_eight_devices_each_orthogonalizes_its_share():
    """A batch of 11 + 5 matrices of one shape, 2 each; one of 9 square ones; one not split."""
    shapes = [(11, 7, 24), (5, 7, 24), (3, 16, 16), (6, 16, 16), (3, 11, 13)]
    matrices, are_split = [np.zeros(shape, np.float32) for shape in shapes], [True] * 4 + [False]
    parts = [P(None, None, "data") if is_split else P() for is_split in are_split]

    def shares(*matrices):
        return train.orthogonalize_all(matrices, are_split, jnp.float32)

    mapped = train.on_devices(shares, train.make_mesh(), tuple(parts), parts)
    assert str(jax.make_jaxpr(mapped)(*matrices)).count("all_to_all[") == 2 * 2
    counts = [dot.outvars[0].aval.shape[0] for dot in dots(mapped, *matrices)]
    assert counts == [2] * 15 + [2] * 15 + [3] * 15


def test_matrices_that_fill_whole_devices_in_float32_compile():
    """XLA on a CPU of two devices refused slices of a batch that were whole members of it."""
    mesh, split = train.make_mesh(jax.devices()[:2]), P(None, None, "data")

    def both(*matrices):
        return train.orthogonalize_all(matrices, [True, True], "float32")

    up = np.float32(random((2, 16, 32)))
    got = train.on_devices(both, mesh, (split, split), [split, split])(up, -up)
    np.testing.assert_allclose(got[0], -got[1], atol=1e-5)
    np.testing.assert_allclose(got[0], svd_orthogonalize(up), atol=2e-5)


# ---- NorMuon ----


def equalize_by_hand(x, square, over):
    """NorMuon in float64, one matrix at a time: (step, mean squares)."""
    steps, squares = [], []
    for matrix, old in zip(np.float64(x), np.float64(square), strict=True):
        new = 0.9 * old + 0.1 * np.mean(matrix**2, axis=over, keepdims=True)
        r = 1 / np.sqrt(np.maximum(new, 1e-10))
        steps.append(matrix * r * np.linalg.norm(matrix) / np.linalg.norm(matrix * r))
        squares.append(new)
    return np.array(steps), np.array(squares)


def test_units_are_evened_out_by_the_root_of_their_mean_square_and_the_norm_stays():
    run = jit(lambda x, square: train.equalize_units(x, square, is_split=False))
    x = random((3, 11, 7)) * np.geomspace(0.01, 10, 77).reshape(11, 7)  # of very different sizes
    square = np.zeros((3, 1, 7))
    for step in range(3):
        x = x + random(x.shape, step)
        expected, wanted = equalize_by_hand(x, square, -2)
        found, square = map(np.asarray, run(np.float32(x), np.float32(square)))
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        np.testing.assert_allclose(square, wanted, rtol=1e-5)
        norms = (np.linalg.norm(matrix, axis=(1, 2)) for matrix in (found, x))
        np.testing.assert_allclose(*norms, rtol=1e-5)
    x[0, :, 2], x[1] = 0, 0  # a unit without a step, a matrix without one
    found, square = map(np.asarray, run(np.float32(x), np.zeros((3, 1, 7), np.float32)))
    assert np.isfinite(found).all() and found[0, :, :2].all() and square[0, 0, 0] > 0
    assert not found[0, :, 2].any() and not found[1].any() and not square[1].any()
    sizes = np.linalg.norm(found[2], axis=0)  # of their own squares alone: all come out alike
    np.testing.assert_allclose(sizes, sizes[:1].repeat(7), rtol=1e-5)


# ---- Updates ----


def compiled_update(num_devices, cfg):
    """(state, gradients, the stage's rate) -> (weights, slots), each device with its share."""
    mesh = train.make_mesh(jax.devices()[:num_devices])
    specs, rules = train.param_specs(cfg), train.optimizer_rules(cfg)
    parts = train.partition(train.state_shardings(train.GPT, mesh, cfg))

    def run(state, grads, stage_lr):
        stage = replace(cfg.stages[0], lr=stage_lr)
        return train.update(state, grads, stage, specs, rules, num_devices, cfg)

    inputs, outputs = (parts, parts.params, P()), (parts.params, parts.opt_state)
    return jit(jax.shard_map(run, mesh=mesh, in_specs=inputs, out_specs=outputs, check_vma=False))


def numbers(tree):
    return {name: np.float64(leaf) for name, leaf in named(tree).items()}


def fill(seed):
    """Random float32 numbers for every weight of CFG."""

    def draw(path, spec):
        return np.float32(random(spec.shape, seed + zlib.crc32(train.name_of(path).encode())))

    return jax.tree.map_with_path(draw, train.param_specs(CFG))


class Trained:
    """`update` run over the whole weight table, with a new random gradient at each step.

    params, grads and slots: {name: float64 array} before each step, at it, and after it.
    """

    def __init__(self, num_devices, steps, cfg):
        rules, specs = train.optimizer_rules(cfg), train.param_specs(cfg)
        run = compiled_update(num_devices, cfg)
        self.params, self.grads, self.slots = [], [], []

        def zeros(spec):
            slots = rules[spec.group].slots(spec)
            return {name: np.zeros(slot.shape, np.float32) for name, slot in slots.items()}

        params, slots = fill(0), jax.tree.map(zeros, specs)
        for step in range(steps):
            grads = fill(100 + step)
            stage_lr = np.float32(cfg.stages[train.stage_at(step, cfg)].lr)
            state = State(np.int32(step), params, slots)
            self.params.append(numbers(params))
            self.grads.append(numbers(grads))
            params, slots = jax.device_get(run(state, grads, stage_lr))
            self.slots.append(numbers(slots))
        self.params.append(numbers(params))


def lr_scale_by_hand(step):
    """CFG's: two steps of warmup; 0.7 until round(4.5), then 0.4; from half of 8 steps on down to
    a tenth, where the ninth stays."""
    share = min(1, 1 - (step - 4) / 4)
    return min(1, (step + 1) / 3) * ((0.7 if step < 4 else 0.4) * share + 0.1 * (1 - share))


TABLE = Adam(0.3, 3.0, 0.7, 0.9, 1e-2)
SMALL = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-2}
RULES = {  # what the flags should make
    "muon": Muon(0.03, 40.0),
    "muon_down": Muon(0.06, 20.0),
    "embed": TABLE,
    "head": TABLE,
    "gate": Adam(0.3, 3.0 / 150, **SMALL),
    "skip_gate": Adam(0.3 / 20, **SMALL),
    "smear_gate": Adam(0.3 / 100, **SMALL),
    "copy": Adam(0.3, **SMALL),
    "scalar": Adam(0.1, **SMALL),
    "stream": Adam(0.1, beta1=0.9, beta2=0.95, eps=1e-2),
    "mix": Adam(0.02, beta1=0.9, beta2=0.95, eps=1e-2),
}
GROUPS = {name: spec.group for name, spec in named(train.param_specs(CFG)).items()}
MATRICES = [name for name, group in GROUPS.items() if group in ("muon", "muon_down")]


@pytest.fixture(scope="module")
def trained():
    return Trained(8, 9, CFG)


def assert_moved(found, w, step, lr, decay, words):
    """found is w less lr of the step and, where that shrinks it, less decay of w.

    What is nearly zero may have either sign.
    """
    expected = w - lr * step - np.where(step * w >= 0, decay * w, 0)
    doubt = np.where(np.abs(step) < 1e-5, np.abs(decay * w), 0)
    assert np.all(np.abs(found - expected) <= 3e-6 + doubt), words


def test_muon_is_its_definition_in_float64_for_tall_wide_and_square_matrices(trained):
    """Over eight devices, where some are split."""
    specs = named(train.param_specs(CFG))
    assert {specs[name].shape[1:] for name in MATRICES} == {(20, 48), (48, 20), (20, 16), (20, 20)}
    axes = {name.split("/")[1]: train.split_axis(specs[name], 8) for name in MATRICES}
    whole = {"w_up": None, "w_down": None}
    assert axes == {"w_q": 2, "w_k": 2, "w_v": 2, "w_out": 1} | whole
    for name in MATRICES:
        rule = RULES[GROUPS[name]]
        over = -1 if name.endswith(("w_out", "w_down")) else -2
        average, square, kept = 0, np.zeros(5), 0
        for step, grads in enumerate(trained.grads):
            momentum = 0.8 + 0.15 * min(step / 3, 1) - 0.15 * max(0, (step - 7) / 2)
            average = momentum * average + (1 - momentum) * grads[name]
            ahead = momentum * average + (1 - momentum) * grads[name]
            direction, square = equalize_by_hand(svd_orthogonalize(ahead), square, over)
            slots = trained.slots[step]
            np.testing.assert_allclose(slots[f"{name}/momentum"], average, atol=1e-6)
            np.testing.assert_allclose(slots[f"{name}/square"], square, rtol=1e-4)
            now = rule.lr * lr_scale_by_hand(step)
            shorter, longer = sorted(direction.shape[1:])
            lr, w = now * math.sqrt(longer / shorter), trained.params[step][name]
            decay, words = rule.wd * now * lr, f"{name}, step {step}"
            assert_moved(trained.params[step + 1][name], w, direction, lr, decay, words)
            kept += np.mean(direction * w < 0)
        assert 2 < kept < 7  # of nine steps, about half of the weights do not decay


def test_muons_averaged_gradient_points_where_optaxs_does():
    shapes = {"wide": (20, 36), "tall": (36, 20)}
    coefficients = np.array(POLYNOMIALS)
    coefficients[0] /= 1.02 ** np.array([1, 3, 5])  # they start from the norm itself
    muon = optax.contrib.muon(1.0, beta=0.9, nesterov=False, ns_coeffs=coefficients)
    zeros = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    slots = {name: {"momentum": zero} for name, zero in zeros.items()}
    state, rule, cfg = muon.init(zeros), Muon(1.0), config(muon_momentum=(0.9, 0.9, 0, 0))

    @jit
    def both(grads, slots, state):
        found = {}
        for name, grad in grads.items():
            _, slots[name] = rule.direction(grad, slots[name], jnp.int32(0), cfg)
            rows, columns = grad.shape
            stretch = max(1, columns / rows) ** 0.5
            found[name] = -stretch * train.orthogonalize(slots[name]["momentum"], jnp.float32)
        return found, slots, muon.update(grads, state, zeros)

    for step in range(4):
        grads = {name: np.float32(random(shape, step)) for name, shape in shapes.items()}
        found, slots, (expected, state) = both(grads, slots, state)
        for name in shapes:
            np.testing.assert_allclose(found[name], expected[name], atol=1e-4)


def test_every_other_group_follows_its_own_rates_betas_eps_and_decay(trained):
    for name in GROUPS.keys() - set(MATRICES):
        rule = RULES[GROUPS[name]]
        m, v = 0, 0
        for step, grads in enumerate(trained.grads):
            grad, slots = grads[name], trained.slots[step]
            m = rule.beta1 * m + (1 - rule.beta1) * grad
            v = rule.beta2 * v + (1 - rule.beta2) * grad**2
            np.testing.assert_allclose(slots[f"{name}/m"], m, atol=1e-6)
            np.testing.assert_allclose(slots[f"{name}/v"], v, rtol=1e-5, atol=1e-7)
            m_hat, v_hat = m / (1 - rule.beta1 ** (step + 1)), v / (1 - rule.beta2 ** (step + 1))
            direction = m_hat / (np.sqrt(v_hat) + rule.eps)
            lr, words = rule.lr * lr_scale_by_hand(step), f"{name}, step {step}"
            w, after = trained.params[step][name], trained.params[step + 1][name]
            assert_moved(after, w, direction, lr, lr * lr * rule.wd, words)


def test_the_flags_reach_the_rules():
    assert train.optimizer_rules(CFG) == RULES and RULES.keys() == set(GROUPS.values())


def test_adamw_for_everything_is_optaxs_adamw():
    cfg = config(optimizer="adamw")
    run = Trained(1, 6, cfg)
    rates = np.float32([0.01 * lr_scale_by_hand(step) for step in range(6)])
    decays = {name: name in (*MATRICES, "embed", "head") for name in GROUPS}
    adamw = optax.adamw(
        lambda count: jnp.array(rates)[count],
        b1=0.7,
        b2=0.9,
        eps=1e-2,
        weight_decay=3.0,
        mask=decays,
    )

    @jit
    def step_of_optax(params, grads, state):
        updates, state = adamw.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(np.float32, run.params[0])
    state = jax.jit(adamw.init)(params)
    for grads, slots, expected in zip(run.grads, run.slots, run.params[1:], strict=True):
        params, state = step_of_optax(params, jax.tree.map(np.float32, grads), state)
        for name in params:
            np.testing.assert_allclose(expected[name], params[name], atol=2e-6, err_msg=name)
        assert set(slots) == {f"{name}/{slot}" for name in params for slot in "mv"}
