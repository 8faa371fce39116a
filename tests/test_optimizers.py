"""Schedules and optimizers, against an SVD, float64 numpy and optax."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from jaxprs import dots

from train import (
    GPT,
    Adam,
    Config,
    Muon,
    Stage,
    State,
    equalize_units,
    lr_scale,
    make_mesh,
    muon_momentum,
    name_of,
    optimizer_rules,
    orthogonalize,
    orthogonalize_all,
    param_specs,
    parse_flags,
    partition,
    replace,
    split_axis,
    stage_at,
    state_shardings,
    tokens_before,
    update,
)

# D < HK, D > GK is tall, D == F is square: every orientation Muon meets
FLAGS = """
--preset=demo --steps=9 --num_layers=3 --model_dim=20 --num_heads=3 --num_kv_heads=1 --head_dim=12
--mlp_dim=20 --vocab_size=131 --bos_id=7 --skips=((0,2),) --backout=1 --offset_layers=
--gate_dims=5 --compute_dtype=float32 --stages.end=0.5,1 --stages.lr=0.7,0.4 --muon_lr=0.03
--muon_wd=0.4 --muon_momentum=0.8,0.95,3,2 --adam_lr=0.3 --scalar_lr=0.02 --adamw_lr=0.01
--adam_beta1=0.7 --adam_beta2=0.9 --adam_eps=1e-3 --adam_wd=0.3 --warmup_steps=2
--cooldown_frac=0.5 --final_lr_scale=0.1
"""
CFG = replace(parse_flags(FLAGS.split()), final_frac=1 / 9)
config = functools.partial(replace, CFG)
FAST = {"xla_backend_optimization_level": 0}  # compiles in half the time
jit = functools.partial(jax.jit, compiler_options=FAST)


def random(shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def named(tree):
    return {name_of(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


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


# ---- Schedules -----------------------------------------------------------------------------------


def test_the_learning_rate_warms_up_stays_falls_to_its_last_share_and_stays_there():
    cfg = config(
        steps=110, final_frac=1 / 11, warmup_steps=4, cooldown_frac=0.25, final_lr_scale=0.2
    )
    steps = (0, 1, 3, 4, 50, 75, 80, 99, 100, 105, 109)
    found = [lr_scale(step, Stage(lr=1.0), cfg) for step in steps]
    wanted = [0.2, 0.4, 0.8, 1, 1, 1, 0.84, 0.232, 0.2, 0.2, 0.2]
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    cfg = config(warmup_steps=0, cooldown_frac=0.0, final_frac=0.0)
    assert {float(lr_scale(step, Stage(lr=1.5), cfg)) for step in range(cfg.steps)} == {1.5}


def test_the_speedruns_learning_rate_is_what_its_table_gives_by_hand():
    """From 0.4 of 1866 steps on, w = (1 - x) / 0.6 of the stage's rate and 1 - w of 0.15."""
    cfg = Config()
    spans = [(first, last, stage.lr) for stage, first, last in cfg.spans]
    assert spans == [(0, 622, 1), (622, 1244, 1.52), (1244, 1866, 1.73), (1866, 1906, 1.73)]
    for step, wanted in [
        (0, 1),
        (621, 1),
        (622, 1.52),
        (0.4 * 1866, 1.52),
        (933, 1.52 * 5 / 6 + 0.15 / 6),
        (0.8 * 1866, 1.73 / 3 + 0.15 * 2 / 3),
        (1866, 0.15),
        (1905, 0.15),
    ]:
        stage = cfg.stages[stage_at(step, cfg)]
        assert float(lr_scale(step, stage, cfg)) == pytest.approx(wanted, rel=5e-5), step


def test_muons_momentum_rises_linearly_stays_and_goes_the_way_back_at_the_end():
    def values(steps, total, momentum=(0.85, 0.95, 300, 50)):
        cfg = replace(Config(), steps=total, muon_momentum=momentum)
        return [pytest.approx(float(muon_momentum(step, cfg))) for step in steps]

    wanted = [0.85, 0.9, 0.95, 0.95, 0.9, 0.85]
    assert values((0, 150, 300, 1856, 1881, 1906), 1906) == wanted
    assert values((0, 10, 20, 95), 100, (0.95, 0.85, 20, 10)) == [0.95, 0.9, 0.85, 0.9]
    assert values((3, 99), 100, (0.85, 0.95, 0, 0)) == [0.95, 0.95]
    short = [0.85, 0.875, 0.85 + 0.1 / 3, 0.9 - 0.1 / 3]  # shorter than the rise
    assert values((0, 75, 100, 150), 150) == short


def test_every_step_belongs_to_one_stage_and_tokens_add_up():
    ends, tokens = (0.3, 0.7, 1.0), (64, 128, 256)
    cfg = config(steps=11, stages=tuple(map(Stage, ends, tokens)))
    assert [stage_at(step, cfg) for step in range(11)] == [0] * 3 + [1] * 5 + [2] * 3
    seen = 0
    for step in range(12):
        assert tokens_before(step, cfg) == seen
        seen += tokens[stage_at(step, cfg)] if step < 11 else 0
    short = replace(cfg, steps=1)
    assert short.bounds[-1] == 1 and short.bounds[stage_at(0, short) + 1] == 1


# ---- Orthogonalize -------------------------------------------------------------------------------


@functools.cache
def compiled_orthogonalize(dtype="float32"):
    return jit(lambda *matrices: [orthogonalize(g, jnp.dtype(dtype)) for g in matrices])


MATRICES = [np.float32(random(axes)) for axes in [(3, 7, 19), (2, 2, 23, 5), (13, 13), (1, 17)]]


def test_orthogonalize_maps_singular_values_by_the_polynomials_whatever_the_scale():
    expected = list(map(svd_orthogonalize, MATRICES))
    for scale, tolerance in ((1, 1e-4), (1e-2, 1e-2), (1e12, 1e-4)):
        scaled = [np.float32(scale) * g for g in MATRICES]
        for found, wanted in zip(compiled_orthogonalize()(*scaled), expected, strict=True):
            np.testing.assert_allclose(found, wanted, atol=tolerance)
    assert not any(map(np.any, compiled_orthogonalize()(*map(np.zeros_like, MATRICES))))


def test_orthogonalize_multiplies_by_the_smaller_of_the_two_gram_matrices():
    products = dots(lambda g: orthogonalize(g, jnp.float32), np.zeros((23, 5), np.float32))
    sizes = [product.outvars[0].aval.size for product in products]
    assert sizes == [5 * 5, 5 * 5, 5 * 23] * 5


def landed(rest, dtype):
    """Singular values, after, of some matrices with these and one that makes their norm 1."""
    values = np.r_[np.sqrt(1 - np.sum(np.square(rest))), rest]
    size = len(values)
    matrices = []
    for rows, columns in ((size, 41), (41, size), (size, size)):
        u, v = np.linalg.qr(random((rows, size)))[0], np.linalg.qr(random((columns, size)))[0]
        matrices.append(np.float32((u * values) @ v.T))
    for x in compiled_orthogonalize(dtype)(*matrices):
        assert x.dtype == dtype
        yield np.linalg.svd(np.float64(x), compute_uv=False)


def test_singular_values_above_a_thousandth_of_the_norm_land_in_the_stated_range():
    every = polynomials(np.geomspace(0.00102, 1, 100_000))
    assert 0.858 <= every.min() < 0.859 and 1.141 < every.max() <= 1.142
    assert polynomials(0.00100) < 0.85
    for values in (np.full(20, 0.00102), np.geomspace(0.3, 0.00102, 20)):
        for found in landed(values, "float32"):
            assert 0.858 <= found.min() and found.max() <= 1.142
    for values in (np.full(20, 0.002), np.geomspace(0.3, 0.002, 20), np.full(20, 0.18)):
        for found in landed(values, "bfloat16"):
            assert 0.8 <= found.min() and found.max() <= 1.15


def test_over_eight_devices_each_orthogonalizes_its_share_as_one_would_all():
    """A batch of 11 + 5 matrices of one shape, 2 each; one of 9 square ones; one not split."""
    axes = [(11, 7, 24), (5, 7, 24), (3, 16, 16), (6, 16, 16), (3, 11, 13)]
    matrices, are_split = [np.float32(random(shape)) for shape in axes], [True] * 4 + [False]
    parts = [P(None, None, "data") if is_split else P() for is_split in are_split]
    mapped = jax.shard_map(
        lambda *matrices: orthogonalize_all(matrices, are_split, jnp.float32),
        mesh=make_mesh(),
        in_specs=tuple(parts),
        out_specs=parts,
        check_vma=False,
    )
    for g, found in zip(matrices, jit(mapped)(*matrices), strict=True):
        assert found.shape == g.shape and found.dtype == jnp.float32
        np.testing.assert_allclose(found, svd_orthogonalize(g), atol=2e-5)
    assert str(jax.make_jaxpr(mapped)(*matrices)).count("all_to_all[") == 2 * 2
    counts = [dot.outvars[0].aval.shape[0] for dot in dots(mapped, *matrices)]
    assert counts == [2] * 15 + [2] * 15 + [3] * 15


# ---- NorMuon -------------------------------------------------------------------------------------


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
    run = jit(lambda x, square: equalize_units(x, square, is_split=False))
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
        if step == 0:  # the units' own squares alone: all come out alike
            sizes = np.linalg.norm(found, axis=-2)
            np.testing.assert_allclose(sizes, sizes[:, :1].repeat(7, axis=1), rtol=1e-5)
    x[0, :, 2], x[1] = 0, 0  # a unit without a step, a matrix without one
    found, square = map(np.asarray, run(np.float32(x), np.zeros((3, 1, 7), np.float32)))
    assert np.isfinite(found).all() and found[0, :, :2].all() and square[0, 0, 0] > 0
    assert not found[0, :, 2].any() and not found[1].any() and not square[1].any()


def test_a_unit_is_a_hidden_unit_of_the_mlp_or_a_dim_of_a_head_and_has_one_number():
    wanted = {
        "attention/w_q": [(3, 20, 36), (3, 1, 36)],
        "attention/w_k": [(3, 20, 12), (3, 1, 12)],
        "attention/w_v": [(3, 20, 12), (3, 1, 12)],
        "attention/w_out": [(3, 36, 20), (3, 36, 1)],
        "blocks/w_up": [(3, 20, 20), (3, 1, 20)],
        "blocks/w_down": [(3, 20, 20), (3, 20, 1)],
    }
    rules, found = optimizer_rules(CFG), {}
    for name, spec in named(param_specs(CFG)).items():
        slots = rules[spec.group].slots(spec)
        if isinstance(rules[spec.group], Muon):
            found[name] = [slots["momentum"].shape, slots["square"].shape]
        else:
            assert slots == {"m": spec, "v": spec}
    assert found == wanted


# ---- Updates -------------------------------------------------------------------------------------


def compiled_update(num_devices, rules, cfg):
    """(state, gradients, the stage's rate) -> (weights, slots), each device with its share."""
    mesh = make_mesh(jax.devices()[:num_devices])
    specs = param_specs(cfg)
    parts = partition(state_shardings(GPT._replace(rules=lambda cfg: rules), mesh, cfg))

    def run(state, grads, stage_lr):
        stage = replace(cfg.stages[0], lr=stage_lr)
        return update(state, grads, stage, specs, rules, num_devices, cfg)

    inputs, outputs = (parts, parts.params, P()), (parts.params, parts.opt_state)
    return jit(jax.shard_map(run, mesh=mesh, in_specs=inputs, out_specs=outputs, check_vma=False))


def fill(make, cfg):
    """{weight: make(its name, its shape)} in float32, as a tree."""
    return jax.tree.map_with_path(
        lambda path, spec: np.float32(make(name_of(path), spec.shape)), param_specs(cfg)
    )


def fill_slots(make, rules, cfg):
    def slots(spec):
        return {name: make(s.shape) for name, s in rules[spec.group].slots(spec).items()}

    return jax.tree.map(slots, param_specs(cfg))


def test_eight_devices_update_weights_and_state_as_one():
    """Heads are split over them; the MLP, of 20, is not."""
    cfg = config(model_dim=24, head_dim=16)
    rules, specs = optimizer_rules(cfg), named(param_specs(cfg))
    axes = {name.split("/")[1]: split_axis(specs[name], 8) for name in specs if "/w_" in name}
    whole = {"w_up": None, "w_down": None}
    assert axes == {"w_q": 2, "w_k": 2, "w_v": 2, "w_out": 1} | whole
    params, grads = (
        fill(lambda name, shape, seed=seed: random(shape, seed + len(name)), cfg) for seed in (1, 2)
    )
    slots = fill_slots(lambda shape: np.float32(np.abs(random(shape))), rules, cfg)
    state = State(np.int32(3), params, slots)
    one, eight = (
        named(compiled_update(num_devices, rules, cfg)(state, grads, np.float32(0.7)))
        for num_devices in (1, 8)
    )
    for name, leaf in one.items():
        np.testing.assert_allclose(eight[name], leaf, rtol=1e-4, atol=1e-5, err_msg=name)


class Trained:
    """`update` run over the whole weight table, with a new random gradient at each step.

    params, grads and slots: {name: float64 array} before each step, at it, and after it.
    """

    def __init__(self, rules, steps, cfg):
        self.groups = {name: spec.group for name, spec in named(param_specs(cfg)).items()}
        self.params, self.grads, self.slots = [], [], []
        run = compiled_update(1, rules, cfg)
        params = fill(lambda name, shape: random(shape, len(name)), cfg)
        slots = fill_slots(lambda shape: np.zeros(shape, np.float32), rules, cfg)
        for step in range(steps):
            grads = fill(lambda name, shape, step=step: random(shape, 100 + step), cfg)
            self.keep(self.params, params)
            self.keep(self.grads, grads)
            stage_lr = np.float32(cfg.stages[stage_at(step, cfg)].lr)
            params, slots = run(State(np.int32(step), params, slots), grads, stage_lr)
            self.keep(self.slots, slots)
        self.keep(self.params, params)

    def keep(self, kept, tree):
        kept.append({name: np.float64(leaf) for name, leaf in named(tree).items()})

    def names(self, group):
        return [name for name, its in self.groups.items() if its == group]


def lr_scale_by_hand(step):
    """CFG's: two steps of warmup; 0.7 until round(4.5), then 0.4; from half of 8 steps on down to
    a tenth, where the ninth stays."""
    share = min(1, 1 - (step - 4) / 4)
    return min(1, (step + 1) / 3) * ((0.7 if step < 4 else 0.4) * share + 0.1 * (1 - share))


RULES = {
    "muon": Muon(0.03, 40.0),
    "muon_down": Muon(0.05, 15.0),
    "embed": Adam(0.3, 2.0, 0.7, 0.9, 1e-3),
    "head": Adam(0.05, 70.0, 0.85, 0.97, 1e-5),
    "scalar": Adam(0.02, 0.0, 0.5, 0.8, 1e-1),
    "stream": Adam(0.03, 0.0, 0.65, 0.85, 1e-2),
    "mix": Adam(0.04, 0.6, 0.5, 0.8, 1e-1, cautious=False),
    "gate": Adam(0.02, 9.0, 0.6, 0.9, 1e-2),
    "skip_gate": Adam(0.07, 0.0, 0.5, 0.9, 1e-2),
    "smear_gate": Adam(0.06, 0.0, 0.5, 0.9, 1e-2),
}
IS_MUON = {group: isinstance(rule, Muon) for group, rule in RULES.items()}


@pytest.fixture(scope="module")
def trained():
    return Trained(RULES, 9, CFG)


def assert_moved(found, w, step, lr, decay, words):
    """found is w less lr of the step and, where that shrinks it, less decay of w.

    What is nearly zero may have either sign.
    """
    expected = w - lr * step - np.where(step * w >= 0, decay * w, 0)
    doubt = np.where(np.abs(step) < 1e-5, np.abs(decay * w), 0)
    assert np.all(np.abs(found - expected) <= 3e-6 + doubt), words


@pytest.mark.parametrize("group", ["muon", "muon_down"])
def test_muon_is_its_definition_in_float64_for_tall_wide_and_square_matrices(trained, group):
    shapes = {trained.params[0][name].shape[1:] for name in trained.names(group)}
    wanted = {"muon": {(20, 36), (36, 20), (20, 12), (20, 20)}, "muon_down": {(20, 20)}}
    assert shapes == wanted[group]
    rule = RULES[group]
    for name in trained.names(group):
        over = -1 if name.endswith(("w_out", "w_down")) else -2
        average, square, kept = 0, np.zeros(3), 0
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
    shapes = {"wide": (20, 36), "tall": (36, 20), "square": (20, 20)}
    coefficients = np.array(POLYNOMIALS)
    coefficients[0] /= 1.02 ** np.array([1, 3, 5])  # they start from the norm itself
    muon = optax.contrib.muon(1.0, beta=0.9, nesterov=False, ns_coeffs=coefficients)
    zeros = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    slots = {name: {"momentum": zero} for name, zero in zeros.items()}
    state, rule, cfg = muon.init(zeros), Muon(1.0), config(muon_momentum=(0.9, 0.9, 0, 0))

    @jit
    def both(grads, slots, state):
        found = {}
        for name, grad in grads.items():
            _, slots[name] = rule.direction(grad, slots[name], jnp.int32(0), cfg)
            rows, columns = grad.shape
            stretch = max(1, columns / rows) ** 0.5
            found[name] = -stretch * orthogonalize(slots[name]["momentum"], jnp.float32)
        return found, slots, muon.update(grads, state, zeros)

    for step in range(4):
        grads = {name: np.float32(random(shape, step)) for name, shape in shapes.items()}
        found, slots, (expected, state) = both(grads, slots, state)
        for name in shapes:
            np.testing.assert_allclose(found[name], expected[name], atol=1e-4)


@pytest.mark.parametrize("group", [group for group in RULES if not IS_MUON[group]])
def test_every_group_follows_its_own_rates_betas_eps_and_decay(trained, group):
    rule = RULES[group]
    assert trained.names(group)
    for name in trained.names(group):
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
            if rule.cautious:
                assert_moved(after, w, direction, lr, lr * lr * rule.wd, words)
            else:
                expected = w - lr * (direction + rule.wd * w)
                np.testing.assert_allclose(after, expected, atol=5e-6, err_msg=words)


def test_the_flags_reach_the_rules():
    table, small = (0.7, 0.9, 1e-3), (0.9, 0.99, 1e-3)
    mixed = (0.9, 0.95, 1e-3)
    assert optimizer_rules(CFG) == {
        "muon": Muon(0.03, 0.4),
        "muon_down": Muon(0.06, 0.2),
        "embed": Adam(0.3, 0.3, *table),
        "head": Adam(0.3, 0.3, *table),
        "gate": Adam(0.3, 0.3 / 150, *small),
        "skip_gate": Adam(0.3 / 20, 0.0, *small),
        "smear_gate": Adam(0.3 / 100, 0.0, *small),
        "scalar": Adam(0.02, 0.0, *small),
        "stream": Adam(0.02, 0.0, *mixed),
        "mix": Adam(0.004, 0.0, *mixed),
    }
    groups = {spec.group for spec in jax.tree.leaves(param_specs(CFG))}
    assert groups == set(optimizer_rules(CFG))
    rules = optimizer_rules(config(optimizer="adamw"))
    for group in groups:
        decay = 0.3 if IS_MUON[group] or group in ("embed", "head") else 0.0
        assert rules[group] == Adam(0.01, decay, 0.7, 0.9, 1e-3, cautious=False)


def test_adams_direction_is_that_of_optax():
    rule = Adam(lr=1.0, beta1=0.8, beta2=0.95, eps=1e-10)
    adam, zeros = optax.scale_by_adam(b1=0.8, b2=0.95, eps=1e-10), jnp.zeros((5, 7))
    state, slots = adam.init(zeros), {"m": zeros, "v": zeros}

    @jit
    def both(g, state, slots, step):
        return adam.update(g, state), rule.direction(g, slots, step, CFG)

    for step in range(6):
        g = np.float32(random((5, 7), step)) * np.float32(10.0 ** (step - 3))
        (expected, state), (found, slots) = both(g, state, slots, np.int32(step))
        np.testing.assert_allclose(found, expected, rtol=2e-5)


def test_adamw_for_everything_is_optaxs_adamw():
    cfg = config(optimizer="adamw")
    run = Trained(optimizer_rules(cfg), 6, cfg)
    rates = jnp.array([0.01 * lr_scale_by_hand(step) for step in range(6)])
    decays = {
        name: IS_MUON[group] or group in ("embed", "head") for name, group in run.groups.items()
    }
    params = jax.tree.map(np.float32, run.params[0])
    adamw = optax.adamw(
        lambda count: rates[count], b1=0.7, b2=0.9, eps=1e-3, weight_decay=0.3, mask=decays
    )

    @jit
    def step_of_optax(params, grads, state):
        updates, state = adamw.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = adamw.init(params)
    for grads, slots, expected in zip(run.grads, run.slots, run.params[1:], strict=True):
        params, state = step_of_optax(params, jax.tree.map(np.float32, grads), state)
        for name in params:
            np.testing.assert_allclose(expected[name], params[name], atol=2e-6, err_msg=name)
        assert set(slots) == {f"{name}/{slot}" for name in params for slot in "mv"}
