"""Training and evaluation steps on one and on eight simulated devices."""

import functools
import itertools
import math
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import numpy_gpt
import pytest
from jaxprs import equations
from shards import make_folder

import train
from train import (
    GPT,
    NO_TOKEN,
    Adam,
    Model,
    Shards,
    Spec,
    Stage,
    axis_sizes,
    batch_shape,
    flops_per_token,
    gather,
    inputs_and_targets,
    log_partition,
    make_eval_step,
    make_init,
    make_mesh,
    make_train_step,
    matmul,
    named,
    normal,
    param_specs,
    plan_val,
    replace,
    softcap,
    split_axis,
    state_shardings,
    sum_rows,
    to_devices,
    with_shapes,
)

BOS, LENGTH = 7, 16
STAGE = Stage(1.0, 24 * LENGTH, LENGTH, doc_len=LENGTH, short=5, long=11, ahead=(0.5, 0.25))
# On eight devices heads and vocabulary are held split, the mlp (20 x 37) is not.
# adam_eps: else Adam makes a whole step of the noise in a gradient that is almost zero.
CFG = train.Config(
    steps=200,
    num_layers=2,
    model_dim=20,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=37,
    vocab_size=131,
    bos_id=BOS,
    mlp_only=(),
    skips=((0, 1),),
    late_inputs=((0, 1),),
    backout=(0,),
    offset_layers=(1,),
    long_layers=(1,),
    gate_dims=5,
    softcap=(9.0, 10.0, 2.0),
    attn_scale=0.25,
    compute_dtype="float32",
    stages=(STAGE,),
    micro_tokens=LENGTH,
    adam_lr=0.03,
    adam_wd=0.05,
    adam_eps=1e-3,
    val=Stage(seq_len=LENGTH, short=4, long=9),
    val_tokens=200,
    val_context=5,
)
config = functools.partial(replace, CFG)
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def random_rows(count, seed=0):
    """Rows of tokens that mostly follow from the one before, a BOS now and then."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, CFG.vocab_size, (count, LENGTH + 1))
    for t in range(1, LENGTH + 1):
        follows = (tokens[:, t - 1] * 5 + 3) % CFG.vocab_size
        tokens[:, t] = np.where(rng.random(count) < 0.7, follows, tokens[:, t])
    tokens[rng.random(tokens.shape) < 0.1] = BOS
    return [[row] for row in tokens.astype(np.uint16)]


def compiled(function, *arguments):
    """In half the time, for it is not optimized."""
    return function.lower(*arguments).compile(compiler_options=FAST)


@functools.cache
def build(cfg, num_devices, brings_weights=False):
    """The compiled training step of the first stage, and what goes with it."""
    mesh, stage = make_mesh(jax.devices()[:num_devices]), cfg.stages[0]
    weights = numpy_gpt.random_weights(cfg, jax.tree.map(lambda spec: spec.shape, param_specs(cfg)))

    def batch(rows, scores=1.0):
        """scores: weights of the targets, for a program whose batches bring them."""
        found = to_devices(rows, stage, mesh, cfg)
        if brings_weights:
            num_micro, num_rows, _ = batch_shape(stage, num_devices, cfg)
            scores = np.broadcast_to(np.float32(scores), (num_micro * num_rows, LENGTH))
            scores = scores.reshape(num_micro, num_rows, LENGTH)
            found["weights"] = jax.device_put(scores, found["tokens"].sharding)
        return found

    def random_state(**changes):
        """Step 0 with weights of which none is zero."""
        places = state_shardings(GPT, mesh, cfg).params
        return init()._replace(params=jax.device_put(weights | changes, places))

    init = compiled(make_init(GPT, mesh, cfg))
    step = compiled(make_train_step(stage, GPT, mesh, cfg), init(), batch([]))
    return SimpleNamespace(
        init=init, step=step, batch=batch, random_state=random_state, weights=weights
    )


def eight():
    return build(CFG, 8, brings_weights=True)  # three micro-steps of eight rows


def one():
    return build(config(micro_tokens=6 * LENGTH), 1)  # four of six


def arrays(tree):
    return jax.tree.map(np.asarray, named(tree))


def few_steps(built, rows, count=2, scores=1.0, **changes):
    """(last loss, optimizer state, weights) of some steps from random weights on the same rows."""
    state = built.random_state(**changes)
    for _ in range(count):
        state, loss = built.step(state, built.batch(rows, scores))
    assert int(state.step) == count
    return float(loss), arrays(state.opt_state), arrays(state.params)


def assert_same_update(found, expected):
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    for name, slot in expected[1].items():
        atol = 2e-4 * np.abs(slot).max() + 1e-9
        np.testing.assert_allclose(found[1][name], slot, rtol=1e-3, atol=atol, err_msg=name)
    for name, weight in expected[2].items():
        np.testing.assert_allclose(found[2][name], weight, atol=1e-4, err_msg=name)


def oracle_nats(weights, rows, ahead=(0.5, 0.25), scores=None):
    """Float64 nats of each row's targets and of those after them. scores: weights of targets."""
    shares = [1, *ahead]
    for i, row in enumerate(rows):
        tokens = np.concatenate(row).astype(int)[None]
        if tokens.size < 2:
            continue
        num_targets = tokens.size - 1
        logits = numpy_gpt.logits(weights, tokens[:, :-1], (5, 11), (), CFG, packed=True)
        score = np.ones(num_targets) if scores is None else scores[i]
        total = 0
        for k, share in enumerate(shares):
            nats = numpy_gpt.nats(logits[:, : max(0, num_targets - k)], tokens[:, 1 + k :])[0]
            total += share / sum(shares) * np.pad(score[k:] * nats, (0, num_targets - len(nats)))
        yield total


# ---- One update, however it is split ----


def test_the_training_loss_is_the_float64_mean_over_the_targets_that_are_there():
    rows = random_rows(24)
    rows[3], rows[10] = [rows[3][0][:9]], [rows[10][0][:1]]  # one half empty, one without a target
    rows = rows[:22]  # and two that are not there
    nats = np.concatenate(list(oracle_nats(one().weights, rows)))
    assert len(nats) == 20 * LENGTH + 8
    assert few_steps(one(), rows, 1)[0] == pytest.approx(nats.mean(), rel=1e-5)


def test_the_last_of_the_later_tokens_leaves_the_loss_as_the_schedule_says():
    rows = random_rows(4)
    for step, share in ((100, 0.125), (200, 0.0)):
        state = one().random_state()._replace(step=jnp.int32(step))
        _, loss = one().step(state, one().batch(rows))
        nats = np.concatenate(list(oracle_nats(one().weights, rows, (0.5, share))))
        assert float(loss) == pytest.approx(nats.mean(), rel=1e-5)


def test_the_first_gradients_are_the_slopes_of_the_float64_mean_loss():
    rows = random_rows(5)
    _, slots, _ = few_steps(one(), rows, 1)

    def loss_at(name, change):
        weights = jax.tree.map_with_path(
            lambda path, w: w + change if train.name_of(path) == name else w, one().weights
        )
        return np.concatenate(list(oracle_nats(weights, rows))).mean()

    for name, scale in {
        "head/m": 0.5,
        "embed/m": 0.5,
        "attention/w_v/momentum": 0.15,
        "smear_mix/m": 0.1,
        "attention/gate/m": 0.1,
        "attention/x0_mix/m": 0.1,
        "blocks/w_down/momentum": 0.15,
        "skip_gate/m": 0.1,
        "blocks/x_mix/m": 0.1,
    }.items():
        direction = np.random.default_rng(0).standard_normal(slots[name].shape)
        ahead, back = (loss_at(name.rpartition("/")[0], d * direction) for d in (1e-5, -1e-5))
        slope, grad = (ahead - back) / 2e-5, slots[name] / scale
        atol = 1e-3 * np.linalg.norm(grad)
        np.testing.assert_allclose(np.vdot(grad, direction), slope, atol=atol, err_msg=name)


def test_accumulated_micro_steps_make_the_same_update_as_the_whole_batch():
    rows, cfg = random_rows(24), config(micro_tokens=65536)
    assert batch_shape(STAGE, 1, cfg) == (1, 24, LENGTH + 1)
    assert batch_shape(STAGE, 1, config(micro_tokens=6 * LENGTH)) == (4, 6, LENGTH + 1)
    assert_same_update(few_steps(one(), rows), few_steps(build(cfg, 1), rows))


@pytest.mark.parametrize("count", [24, 11])  # with 11 some devices have fewer rows than others
def test_eight_devices_make_the_same_update_as_one(count):
    rows = random_rows(count)
    assert_same_update(few_steps(eight(), rows), few_steps(one(), rows))


def test_empty_rows_add_nothing():
    rows, nothing = random_rows(12), [np.full(LENGTH + 1, NO_TOKEN, np.uint16)]
    spread = list(itertools.chain(*zip(rows, itertools.repeat(nothing))))
    assert_same_update(few_steps(one(), spread), few_steps(one(), rows * 2))


def test_over_fifty_steps_one_device_and_eight_lose_the_same():
    losses = []
    for built in (one(), eight()):
        state, series = built.init(), []
        for step in range(50):
            state, loss = built.step(state, built.batch(random_rows(24, seed=step)))
            series.append(float(loss))
        losses.append(np.array(series))
    there = 1 - (0.5 * 1 + 0.25 * 2) / 1.75 / LENGTH  # a row's last have no later next tokens
    assert losses[0][0] == pytest.approx(math.log(CFG.vocab_size) * there, rel=1e-3)
    assert losses[0][-1] < losses[0][0] - 0.5
    np.testing.assert_allclose(losses[0], losses[1], atol=1e-5)


def test_a_batch_may_bring_a_weight_for_each_target():
    """A row of zeros is as no row; others weigh in the mean of the loss and of the gradients."""
    rows = random_rows(24)
    scores = np.random.default_rng(1).choice([0.0, 0.5, 2.0], (24, LENGTH))
    nats = np.concatenate(list(oracle_nats(eight().weights, rows, scores=scores)))
    loss, _, _ = few_steps(eight(), rows, 1, scores)
    assert loss == pytest.approx(nats.sum() / scores.sum(), rel=1e-5)
    scores = 2.0 * (np.arange(24) < 12)[:, None]
    assert_same_update(few_steps(eight(), rows, scores=scores), few_steps(one(), rows[:12]))


# ---- Embedding and head, first one table, then two ----

TIED = config(stages=(replace(STAGE, end=0.5, tied=True), STAGE))
TABLES = ("embed", "head")


def test_while_they_are_tied_the_embedding_is_the_head_and_its_gradient_that_of_both_uses():
    rows, tied = random_rows(24), build(TIED, 8)
    head, other = tied.weights["head"], tied.weights["embed"]
    apart = few_steps(eight(), rows, 1, embed=head)  # as two tables that are alike
    both = apart[1]["head/m"] + apart[1]["embed/m"]  # each half of its gradient
    assert min(np.abs(apart[1][f"{name}/m"]).max() for name in TABLES) > 0.05 * np.abs(both).max()
    for embed in (head, other):  # what stands in the embedding does not count
        loss, slots, _ = few_steps(tied, rows, 1, embed=embed)
        assert loss == pytest.approx(apart[0], rel=1e-6)
        np.testing.assert_allclose(slots["head/m"], both, atol=1e-6 * np.abs(both).max())
        for name, slot in slots.items():
            if not name.startswith(TABLES):
                atol = 1e-5 * np.abs(slot).max() + 1e-9
                np.testing.assert_allclose(slot, apart[1][name], rtol=1e-3, atol=atol, err_msg=name)


def test_after_tied_steps_there_is_one_table_with_one_state_and_then_each_goes_its_own_way():
    tied, loose, rows = build(TIED, 8), eight(), random_rows(24)
    state = tied.random_state()
    for _ in range(2):
        state, _ = tied.step(state, tied.batch(rows))
    start = {name: arrays((state.params[name], state.opt_state[name])) for name in TABLES}
    for name, array in start["head"].items():
        assert array.any() and np.array_equal(start["embed"][name], array), name
    assert not np.array_equal(start["head"]["0"], tied.weights["head"])
    state, _ = loose.step(state, loose.batch(rows))  # m is half of each gradient
    new = {name: 2 * np.asarray(state.opt_state[name]["m"]) - start[name]["1/m"] for name in TABLES}
    assert np.abs(new["embed"] - new["head"]).max() > 0.1 * np.abs(new["head"]).max() > 0
    inputs = [row[0][:-1] for row in rows]
    assert not new["embed"][np.setdiff1d(np.arange(CFG.vocab_size), inputs)].any()
    assert not np.array_equal(state.params["embed"], state.params["head"])


# ---- Learning ----


def test_every_weight_of_every_layer_moves_within_two_steps():
    """The smear's gate only after its scalar, which starts at 0."""
    built, rows = eight(), random_rows(24)
    state = built.init()
    before = arrays(state.params)
    for _ in range(2):
        state, _ = built.step(state, built.batch(rows))
    for name, weight in arrays(state.params).items():
        moved = (weight != before[name]).reshape(len(weight), -1).any(axis=1)
        expected = np.full(len(moved), True)
        if name == "embed":
            expected = np.isin(np.arange(len(moved)), [row[0][:-1] for row in rows])
        if name == "head":
            expected = np.arange(len(moved)) < CFG.vocab_size  # the padding stays
        assert np.array_equal(moved, expected), name


# ---- The gradient of a lookup ----


@pytest.mark.parametrize(
    "count, num_rows, dtype",
    [
        (1, 5, "float32"),
        (256, 300, "float32"),
        (257, 11, "float32"),
        (1000, 131, "bfloat16"),
        (700, 1, "float32"),
    ],
)
def test_the_rows_of_a_lookup_are_summed_as_by_float64_numpy(count, num_rows, dtype):
    """Ids come unsorted, some often and some never."""
    rng = np.random.default_rng(count)
    ids = np.minimum(rng.geometric(min(1, 3 / num_rows), count) - 1, num_rows - 1)
    g = np.asarray(rng.standard_normal((count, 20)), dtype)
    expected = np.zeros((num_rows, 20))
    np.add.at(expected, ids, np.float64(g))
    found = jax.jit(sum_rows, static_argnums=2)(ids, g, num_rows)
    assert found.dtype == jnp.float32
    atol = 2e-7 * np.abs(np.float64(g)).sum(axis=0).max()  # of the running sums
    np.testing.assert_allclose(found, expected, atol=atol)


def test_rows_of_one_sign_do_not_cancel_in_the_sum_of_an_id_that_occurs_once():
    rng, size = np.random.default_rng(0), 65536
    ids = rng.permutation(size)
    g = np.asarray(1 + 0.3 * rng.standard_normal((size, 4)), jnp.bfloat16)
    expected = np.zeros((size, 4))
    expected[ids] = np.float64(g)
    found = np.float64(jax.jit(sum_rows, static_argnums=2)(ids, g, size))
    error = np.abs(found / expected - 1)
    assert np.mean(error) < 2e-5 and np.quantile(error, 0.99) < 1e-4


# ---- Where the state lives ----

LOCAL_SHAPES = {
    "embed": (32, 20),
    "head": (32, 20),
    "skip_mix": (1,),
    "skip_gate": (5, 1),
    "smear_mix": (1,),
    "smear_gate": (5, 1),
    "backout_mix": (1,),
    "blocks/x_mix": (2,),
    "blocks/y_mix": (2,),
    "attention/x_mix": (2,),
    "attention/y_mix": (2,),
    "attention/x0_mix": (2,),
    "attention/gate": (2, 5, 6),
    "attention/w_q": (2, 20, 6),
    "attention/w_k": (2, 20, 2),
    "attention/w_v": (2, 20, 2),
    "attention/w_out": (2, 6, 20),
    "blocks/w_up": (2, 20, 37),
    "blocks/w_down": (2, 37, 20),
}
SQUARES = {  # one number for each unit
    "attention/w_q": (2, 1, 6),
    "attention/w_k": (2, 1, 2),
    "attention/w_v": (2, 1, 2),
    "attention/w_out": (2, 6, 1),
    "blocks/w_up": (2, 1, 37),
    "blocks/w_down": (2, 37, 1),
}
SPLIT = {"embed", "head", "attention/w_q", "attention/w_k", "attention/w_v", "attention/w_out"}
SLOT_SHAPES = {
    f"{name}/{slot}": SQUARES[name] if slot == "square" else shape
    for name, shape in LOCAL_SHAPES.items()
    for slot in (("momentum", "square") if name in SQUARES else ("m", "v"))
}


def test_weights_and_optimizer_state_are_split_over_eight_devices_stay_so_and_are_donated():
    built = eight()
    first, batch = built.init(), built.batch(random_rows(24))
    places = jax.tree.map(lambda leaf: leaf.sharding, first)
    after, _ = built.step(first, batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first))
    assert not batch["tokens"].is_deleted()
    for state in (built.init(), after):
        found = {}
        for name, leaf in (named(state.params) | named(state.opt_state)).items():
            assert leaf.dtype == jnp.float32
            (found[name],) = {shard.data.shape for shard in leaf.addressable_shards}
            distinct = {str(shard.index) for shard in leaf.addressable_shards}
            is_split = name in SPLIT or name.rpartition("/")[0] in SPLIT
            assert len(distinct) == (8 if is_split else 1), name
        assert found == LOCAL_SHAPES | SLOT_SHAPES
    same = jax.tree.map(lambda x, place: x.sharding.is_equivalent_to(place, x.ndim), after, places)
    assert all(jax.tree.leaves(same))
    numbers = sum(map(math.prod, (LOCAL_SHAPES | SLOT_SHAPES).values())) + 1
    assert built.step.memory_analysis().alias_size_in_bytes == 4 * numbers


def test_first_weights_do_not_depend_on_the_number_of_devices():
    single = arrays(one().init().params)
    for name, weight in arrays(eight().init().params).items():
        assert np.array_equal(single[name], weight), name


def test_a_weight_is_split_along_the_axis_its_row_names_or_each_device_has_a_copy():
    def axes(n, **changes):
        specs = named(param_specs(config(**changes)))
        return {name: split_axis(spec, n) for name, spec in specs.items()}

    eighths = {
        "embed": 0,
        "head": 0,
        "attention/w_q": 2,
        "attention/w_k": 2,
        "attention/w_v": 2,
        "attention/w_out": 1,
    }
    assert {name: axis for name, axis in axes(8).items() if axis is not None} == eighths
    wide = axes(8, mlp_dim=40)
    assert (wide["blocks/w_up"], wide["blocks/w_down"]) == (2, 1)
    assert set(axes(5).values()) == {None}  # though D divides


# ---- What the compiled step exchanges ----

COLLECTIVE = re.compile(
    r"= (.*?) (all-reduce|reduce-scatter|all-gather|all-to-all|collective-permute)(?:-start)?\("
)
CALLS = re.compile(
    r"(?:calls|to_apply|body|condition|\w+_computations?)=\{?((?:%[\w.\-]+(?:, )?)+)"
)


def computations(hlo):
    """{name: its lines} of a module's text."""
    found, name = {}, None
    for line in hlo.splitlines():
        if header := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            name = header[1]
            found[name] = []
        elif name:
            found[name].append(line)
    return found


def reachable(names, found):
    """These computations and all that they call."""
    seen, left = set(), list(names)
    while left:
        name = left.pop()
        if name not in seen:
            seen.add(name)
            for group in CALLS.findall("\n".join(found[name])):
                left += re.findall(r"%([\w.\-]+)", group)
    return seen


def exchanged(lines):
    """{kind: sorted numbers of elements} of the results of the collectives in these lines."""
    result = {}
    for line in lines:
        if match := COLLECTIVE.search(line):
            shapes = re.findall(r"\w+\[([\d,]*)\]", match[1])
            sizes = [math.prod(map(int, filter(None, dims.split(",")))) for dims in shapes]
            result[match[2]] = sorted(result.get(match[2], []) + sizes)
    return result


@pytest.fixture(scope="module")
def program():
    """(the loop's lines, all other lines) of the eight-device step with three micro-steps."""
    assert batch_shape(STAGE, 8, CFG) == (3, 8, LENGTH + 1)
    found = computations(eight().step.as_text())
    every_line = "\n".join(itertools.chain(*found.values()))
    inside = reachable(re.findall(r" while\(.*body=%([\w.\-]+)", every_line), found)
    parts = [], []
    for name, lines in found.items():
        parts[name not in inside].extend(lines)
    return parts


def sizes_of(shapes, names):
    return sorted(math.prod(shapes[name]) for name in names)


def test_nothing_is_exchanged_inside_the_accumulation_loop(program):
    inside, _ = program
    assert any(re.search(r" (dot|custom-call)\(", line) for line in inside)  # the model is in it
    assert exchanged(inside) == {}


def test_each_gradient_is_reduced_once_and_each_split_weight_gathered_once(program):
    found = exchanged(program[1])
    whole = {name: spec.shape for name, spec in named(param_specs(CFG)).items()}
    assert set(found) == {"all-gather", "reduce-scatter", "all-reduce", "all-to-all"}
    assert found["reduce-scatter"] == sizes_of(LOCAL_SHAPES, SPLIT)
    assert found["all-gather"] == sizes_of(whole, SPLIT)
    norms = 4 * 2 * [2]  # of the split matrices of two layers, before and after NorMuon
    loss_and_weight = [1, 1]
    copies = sizes_of(LOCAL_SHAPES, set(LOCAL_SHAPES) - SPLIT)
    assert found["all-reduce"] == sorted(copies + loss_and_weight + norms)
    # w_q and w_out: four matrices of 20 x 48, padded to eight; w_k and w_v: four of 20 x 16.
    # An eighth of each goes there and back.
    assert sum(found["all-to-all"]) == 2 * (8 * 20 * 48 // 8 + 8 * 20 * 16 // 8)


def test_the_tied_step_reduces_one_table_and_gathers_one():
    found = exchanged(build(TIED, 8).step.as_text().splitlines())
    whole = {name: spec.shape for name, spec in named(param_specs(CFG)).items()}
    assert found["reduce-scatter"] == sizes_of(LOCAL_SHAPES, SPLIT - {"embed"})
    assert found["all-gather"] == sizes_of(whole, SPLIT - {"embed"})


# ---- Precision ----


def test_with_bfloat16_matmuls_masters_and_sums_are_float32_and_bfloat16_travels():
    cfg, mesh = config(compute_dtype="bfloat16"), make_mesh()
    function, arguments = train.list_programs(GPT, mesh, cfg)["train_0"]
    jaxpr, out = jax.make_jaxpr(function, return_shape=True)(*arguments)

    def kinds(tree):
        return jax.tree.map(lambda x: (x.shape, x.dtype), tree)

    assert kinds(out[0]) == kinds(arguments[0])
    found = list(equations(jaxpr.jaxpr))
    (loop,) = (e for e in found if e.primitive.name == "scan" and e.params["length"] == 3)
    sums = [v for v in loop.outvars if v.aval.shape[:1] != (3,)]  # the others: of each micro-step
    assert len(sums) == 7 + 2 * 12 + 2 and {v.aval.dtype.name for v in sums} == {"float32"}
    counts = {"dot_general": 0, "all_to_all": 4, "reduce_scatter": 6, "all_gather": 6}
    for name, count in counts.items():
        inputs = [v for e in found if e.primitive.name == name for v in e.invars]
        assert {v.aval.dtype.name for v in inputs if hasattr(v, "aval")} == {"bfloat16"}
        assert not count or len(inputs) == count, name


def test_compute_copies_of_tables_and_matrices_are_bfloat16_and_of_scalars_float32():
    cfg = config(compute_dtype="bfloat16")
    params = jax.eval_shape(make_init(GPT, make_mesh(jax.devices()[:1]), cfg)).params
    copies = named(jax.eval_shape(lambda params: gather(params, param_specs(cfg), 1, cfg), params))
    single = {name for name, leaf in copies.items() if leaf.dtype == jnp.float32}
    assert single == {name for name in LOCAL_SHAPES if name.endswith("_mix")}


# ---- Evaluation ----


@pytest.mark.parametrize("num_devices", [8, 1])
def test_evaluation_scores_each_target_once_after_the_context_it_should_see(num_devices):
    cfg, mesh = config(micro_tokens=2 * LENGTH), make_mesh(jax.devices()[:num_devices])
    tokens = np.concatenate([row[0] for row in random_rows(14, seed=9)])  # more than are read
    rows = to_devices(plan_val(Shards([], [tokens], {}), cfg), cfg.val, mesh, cfg)
    # 19 rows of 11 targets, some places empty
    assert rows["tokens"].shape == ((2, 16, 17) if num_devices == 8 else (10, 2, 17))
    weights = one().weights
    params = jax.device_put(weights, state_shardings(GPT, mesh, cfg).params)
    nats, count = compiled(make_eval_step(GPT, mesh, cfg), params, rows)(params, rows)
    expected = []
    for start in range(0, 200, 11):
        stop = min(start + 11, 200)
        context = tokens[start - 5 : start] if start else [BOS] * 5
        row = np.concatenate([context, tokens[start:stop]]).astype(int)[None]
        logits = numpy_gpt.logits(weights, row, (4, 9), (), CFG, packed=True)[0, 5:]
        expected += numpy_gpt.nats(logits, tokens[start + 1 : stop + 1].astype(int)).tolist()
    assert len(expected) == int(count) == 200
    assert float(nats) == pytest.approx(sum(expected), rel=1e-5)


# ---- Batches and rows ----


def test_a_batch_shape_holds_every_row_in_as_few_micro_steps_as_the_limit_allows():
    for num_rows, devices, micro_rows in itertools.product((1, 11, 24, 40), (1, 3, 8), (1, 5, 99)):
        cfg = config(micro_tokens=micro_rows * 16)
        stage = replace(STAGE, batch_tokens=num_rows * 16)
        num_micro, rows, width = batch_shape(stage, devices, cfg)
        per_device = math.ceil(num_rows / devices)
        limit = min(micro_rows, per_device)
        assert width == 17 and rows % devices == 0 and num_micro * rows >= num_rows
        assert rows // devices <= limit and num_micro == math.ceil(per_device / limit)
    assert batch_shape(STAGE, 8, config(micro_tokens=3)) == (3, 8, 17)  # at least a row


def test_targets_are_the_next_tokens_and_what_is_not_there_weighs_nothing():
    tokens = jnp.array([[5, 6, 8, 9], [5] + 3 * [NO_TOKEN], 2 * [NO_TOKEN] + [3, 4]], jnp.uint16)
    batch = inputs_and_targets({"tokens": tokens, "more": 1}, CFG)
    assert batch["tokens"].tolist() == [[5, 6, 8], [5, BOS, BOS], [BOS, BOS, 3]]
    assert batch["targets"].tolist() == [[6, 8, 9], [BOS, BOS, BOS], [BOS, 3, 4]]
    assert batch["weights"].tolist() == [[1, 1, 1], [0, 0, 0], [0, 1, 1]] and batch["more"] == 1
    given = jnp.array([[0, 0.5, 1]] * 3)
    weighed = inputs_and_targets({"tokens": tokens, "weights": given}, CFG)["weights"]
    assert weighed.tolist() == [[0, 0.5, 1], [0, 0, 0], [0, 0.5, 1]]
    assert weighed.dtype == batch["weights"].dtype == jnp.float32


def test_flops_per_token_are_counted_as_by_hand():
    stage = replace(STAGE, seq_len=32, short=5, long=0)
    cfg = config(stages=(stage,), num_layers=3)
    matrices = 3 * (20 * 48 + 2 * 20 * 16 + 48 * 20 + 2 * 20 * 37) + 256 * 20  # the head once
    matrices += 3 * 5 * 6 + 5 + 5  # gates of the heads, of the skip, of the smear
    attention = []
    for window in (5, 31, 5):
        pairs = sum(1 for t in range(32) for s in range(32) if t - window <= s <= t)
        # heads; q.k and p.v; 2 per dim; mean per token; forward, two backward
        attention.append(6 * 2 * (2 * 8) * pairs / 32 * 3)

    def count(cfg, stage=stage):
        return flops_per_token(stage, param_specs(cfg), cfg)

    assert count(cfg) == pytest.approx(6 * matrices + sum(attention), rel=1e-9)
    gone = 6 * (20 * 48 + 2 * 20 * 16 + 48 * 20 + 5 * 6) + attention[1]
    assert count(replace(cfg, mlp_only=(1,))) == pytest.approx(count(cfg) - gone, rel=1e-9)
    assert count(cfg, replace(stage, long=1000)) == count(cfg)  # past the row: no window


# ---- Another architecture ----


def bigram_specs(cfg):
    specs = {
        "embed": Spec("V D", "V", normal(1.0), "embed"),
        "blocks": {"w_mix": Spec("L D M", "M", normal(0.1), "muon")},
        "head": Spec("V D", "V", normal(0.1), "head"),
    }
    return with_shapes(specs, axis_sizes(cfg) | {"M": cfg.model_dim})


def bigram_hidden(weights, x_ND):
    layers = weights["blocks"]
    return sum(jnp.tanh(matmul("ND,DM->NM", x_ND, layer["w_mix"])) for layer in layers)


def bigram_loss(weights, batch, key, stage, cfg):
    """Only the inputs are looked up; the head's whole gradient comes from the loss."""
    weight_N = batch["weights"].ravel()
    y_ND = bigram_hidden(weights, batch["inputs"].reshape(-1, cfg.model_dim))
    label_N = softcap(jnp.sum(y_ND * weights["head"][batch["targets"].ravel()], axis=-1), cfg)
    nats = log_partition(y_ND, weights["head"], weight_N, cfg) - jnp.sum(weight_N * label_N)
    return nats, jnp.sum(weight_N)


def plain_loss(weights, batch, key, stage, cfg):
    """Without lookups: the gradients of both tables come from the loss."""
    batch = batch | {"inputs": weights["embed"][batch["tokens"]]}
    return bigram_loss(weights, batch, key, stage, cfg)


INPUTS = {"inputs": ("embed", "tokens")}
RULES = {"embed": Adam(0.1, beta1=0.5), "head": Adam(0.1, beta1=0.5), "muon": Adam(0.01)}
BIGRAM = Model({}, bigram_specs, lambda cfg: RULES, bigram_loss, None, lookups=INPUTS)


def test_tied_tables_get_the_gradients_of_both_uses_also_from_a_model_without_lookups():
    mesh, means = make_mesh(jax.devices()[:1]), []
    for model in (BIGRAM, BIGRAM._replace(loss=plain_loss, lookups={})):
        step = make_train_step(TIED.stages[0], model, mesh, TIED)
        batch = to_devices(random_rows(24), TIED.stages[0], mesh, TIED)
        state = make_init(model, mesh, TIED)()
        state, _ = compiled(step, state, batch)(state, batch)
        means.append(np.asarray(state.opt_state["head"]["m"]))
    inputs = np.unique([row[0][:-1] for row in random_rows(24)])
    assert np.abs(means[0][inputs]).max() > 0
    np.testing.assert_allclose(means[1], means[0], atol=1e-5 * np.abs(means[0]).max())


def test_a_models_loss_and_update_are_told_stage_batch_and_a_key_of_each_micro_step():
    cfg, mesh = config(stages=(replace(STAGE, end=0.2, tied=True), STAGE)), make_mesh()
    told, keys = [], []

    def loss(weights, batch, key, stage, cfg):
        told.append((stage, tuple(sorted(batch)), batch["tokens"].shape))
        jax.debug.callback(
            lambda step, data: keys.append((int(step), *data.tolist())),
            batch["step"],
            jax.random.key_data(key),
        )
        return bigram_loss(weights, batch, key, stage, cfg)

    def update(state, grads, stage, specs, rules, num_devices, cfg):
        told.append((stage, rules, num_devices))
        return state.params, state.opt_state

    model = BIGRAM._replace(loss=loss, update=update)
    for function, arguments in train.list_programs(model, mesh, cfg).values():
        jax.eval_shape(function, *arguments)
    rows = ("inputs", "step", "targets", "tokens", "weights")
    first, second = cfg.stages
    wanted = [
        (first, rows, (1, 16)),
        (first, RULES, 8),
        (second, rows, (1, 16)),
        (second, RULES, 8),
        (cfg.val, rows, (1, 16)),
    ]
    found = [call for i, call in enumerate(told) if call not in told[:i]]
    assert found == wanted  # a loop's body may be traced more than once

    batch = to_devices(random_rows(24), second, mesh, cfg)
    init = compiled(make_init(model, mesh, cfg))
    step = compiled(make_train_step(second, model, mesh, cfg), init(), batch)
    for _ in range(2):  # the same keys again in another run
        state = init()
        for _ in range(2):
            state, _ = step(state, batch)
        jax.effects_barrier()
    counts = [keys.count(key) for key in set(keys)]
    assert len(counts) == 2 * 3 * 8 and set(counts) == {2}  # steps, micro-steps, devices
    assert {step for step, *_ in keys} == {0, 1}


def test_another_model_trains_through_main_from_its_own_first_state(tmp_path):
    """The first loss is that of a head of zeros."""

    def first_state(state, cfg):
        assert int(state.step) == 0
        head = jnp.zeros_like(state.params["head"])
        return state._replace(params=state.params | {"head": head})

    stages = Stage(0.2, 128, 16), Stage(1.0, 64, 8)
    cfg = replace(
        CFG,
        preset="demo",
        stages=stages,
        steps=30,
        vocab_size=None,
        bos_id=None,
        val_every=0,
        log_every=1,
        target_loss=0.0,
        log_dir=str(tmp_path / "logs"),
    )
    model = BIGRAM._replace(presets={"demo": cfg}, first_state=first_state)
    seen = []
    run = train.main(make_folder(tmp_path / "data"), model, seen.append)
    assert seen == list(range(1, 31))
    log = (run / "log.txt").read_text()
    losses = re.findall(r"^step:\d+/30 train_loss:(\S+)", log, re.MULTILINE)
    losses = [float(loss) for loss in losses]
    assert len(losses) == 30 and losses[0] == pytest.approx(math.log(257), abs=1e-3)
    assert losses[-1] < losses[0] - 1
    compiled = re.findall(r"^compiled: (\w+)", log, re.MULTILINE)
    assert compiled == ["init", "train_0", "train_1", "eval"]
