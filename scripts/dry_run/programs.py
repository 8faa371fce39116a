"""What dry_run compiles: the programs of a run, or a piece of one training step.

Also what to turn where one does not fit.
"""

import math
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import train
from train import UsageError, f32, tree_map


class Job(NamedTuple):
    name: str
    function: object  # jitted
    arguments: tuple  # their shapes
    mesh: object
    stage: object
    tokens: int  # of one call, all chips
    flops: float = 0.0  # of the model in one call, all chips; 0 where not counted
    steps: int = 0  # calls in a run; 0 of a piece
    chips: int = 0  # of a piece that one chip computes: how many share a step


# ---- Whole programs ------------------------------------------------------------------------------
def training_jobs(model, mesh, cfg, only=None):
    """The training program of each stage, or of the stage `only`."""
    listed = train.list_programs(model, mesh, cfg)
    specs = model.specs(cfg)
    jobs = []
    for i, (stage, first, last) in enumerate(cfg.spans):
        if only in (None, i):
            name = f"train_{i}"
            tokens = stage.batch_tokens
            flops = train.flops_per_token(stage, specs, cfg) * tokens
            jobs.append(Job(name, *listed[name], mesh, stage, tokens, flops, last - first))
    return jobs


def evaluation_job(model, mesh, cfg):
    program = train.list_programs(model, mesh, cfg)["eval"]
    calls = 1 + sum(bool(train.due(cfg.val_every, step)) for step in range(1, cfg.steps))
    rows = -(-cfg.val_tokens // (cfg.val.seq_len - cfg.val_context))
    tokens = rows * cfg.val.seq_len
    per_token = train.flops_per_token(cfg.val, model.specs(cfg), cfg) / 3  # forward only
    return Job("eval", *program, mesh, cfg.val, tokens, per_token * tokens, calls)


# ---- Pieces --------------------------------------------------------------------------------------
# Those for one chip take the shapes that a chip sees in a step.
def first_chip(mesh):
    return train.make_mesh(mesh.devices.flatten().tolist()[:1])


def shape(mesh, dtype, *dims):
    """Of an array that each chip has whole."""
    return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, P()))


def share_of(stage, mesh, cfg):
    """(B, T) of a micro-step on one chip."""
    _, num_rows, width = train.batch_shape(stage, mesh.size, cfg)
    return num_rows // mesh.size, width - 1


def layer_jobs(stage, model, mesh, cfg):
    """Two blocks, forward and backward, over two micro-steps."""
    one = first_chip(mesh)
    B, T = share_of(stage, mesh, cfg)
    plain = {"mlp_only": (), "skips": (), "late_inputs": (), "backout": ()}
    few = replace(cfg, num_layers=2, vocab_size=128, bos_id=0, **plain)
    specs = {name: spec for name, spec in model.specs(few).items() if name != "head"}

    def layer(params, tokens_ABT):
        weights = train.unstack(train.gather(params, specs, 1, few))

        def total(weights, tokens_BT):
            embedded_BTD = weights["embed"][tokens_BT]
            return train.forward(weights, tokens_BT, embedded_BTD, stage, few).astype(f32).sum()

        def add(sums, tokens_BT):
            grads = jax.grad(total)(weights, tokens_BT)
            return tree_map(lambda s, g: s + g.astype(f32), sums, grads), None

        zeros = tree_map(lambda w: jnp.zeros(w.shape, f32), weights)
        return jax.lax.scan(add, zeros, tokens_ABT)[0]

    params = tree_map(lambda spec: shape(one, f32, *spec.shape), specs)
    arguments = params, shape(one, jnp.int32, 2, B, T)
    function = train.on_devices(layer, one, P(), P())
    return [Job("layer", function, arguments, one, stage, 2 * B * T, chips=mesh.size)]


def attention_jobs(stage, model, mesh, cfg):
    """The core of attention, forward and backward, once for each window."""
    one = first_chip(mesh)
    B, T = share_of(stage, mesh, cfg)
    q = shape(one, cfg.compute_dtype, B, T, cfg.num_heads * cfg.head_dim)
    k = shape(one, cfg.compute_dtype, B, T, cfg.kv_heads * cfg.head_dim)
    gate_BTH = shape(one, f32, B, T, cfg.num_heads)
    document_BT = shape(one, jnp.int32, B, T)

    def core(window):
        def attention(q, k, v, gate_BTH, document_BT, g):
            table = train.rotary(T, stage, cfg)

            def attend(q, k, v, gate_BTH):
                attend = train.ATTENTION[cfg.attention]
                return attend(q, k, v, gate_BTH, document_BT, table, window, cfg)

            return jax.vjp(attend, q, k, v, gate_BTH)[1](g)

        return train.on_devices(attention, one, P(), P())

    jobs = []
    for window in sorted({train.window_of(i, stage, cfg) for i in range(cfg.num_layers)}):
        arguments = q, k, k, gate_BTH, document_BT, q
        name = f"attention_{window}"
        jobs.append(Job(name, core(window), arguments, one, stage, B * T, chips=mesh.size))
    return jobs


def copy_jobs(stage, model, mesh, cfg):
    """The copy pointer's sums, forward and backward. Raises UsageError where there is none."""
    train.require(cfg.copy_dim, "--piece=copy: this config has no copy pointer; wanted --copy_dim")
    one = first_chip(mesh)
    B, T = share_of(stage, mesh, cfg)

    def copy(q_BTQ, k_BTQ, targets_BT, first_BT, dsum_BT, dhit_BT):
        def sums(q_BTQ, k_BTQ):
            core = train.COPY_SUMS.get(cfg.attention, train.copy_sums_xla)
            return core(q_BTQ, k_BTQ, targets_BT, first_BT, train.COPY_WINDOW)

        found, pull = jax.vjp(sums, q_BTQ, k_BTQ)
        return found, pull((dsum_BT, dhit_BT))

    q_BTQ = shape(one, cfg.compute_dtype, B, T, cfg.copy_dim)
    ids_BT, d_BT = shape(one, jnp.int32, B, T), shape(one, f32, B, T)
    arguments = q_BTQ, q_BTQ, ids_BT, ids_BT, d_BT, d_BT
    function = train.on_devices(copy, one, P(), P())
    return [Job("copy", function, arguments, one, stage, B * T, chips=mesh.size)]


def head_jobs(stage, model, mesh, cfg):
    """The softmax over the vocabulary or the stage's candidates, with its gradients.

    Without the copy pointer's mixture, which is a number per token.
    """
    one = first_chip(mesh)
    B, T = share_of(stage, mesh, cfg)
    num_rows = stage.candidates or cfg.padded_vocab

    def head(x_ND, head_VD, weight_N):
        offset_V = jnp.zeros(num_rows) if stage.candidates else train.padding(cfg)
        terms = {"weight": weight_N}
        return train.softmax_nats(x_ND, head_VD, terms, train.plain_nats, cfg, offset_V)

    x_ND = shape(one, cfg.compute_dtype, B * T, cfg.model_dim)
    head_VD = shape(one, cfg.compute_dtype, num_rows, cfg.model_dim)
    arguments = x_ND, head_VD, shape(one, f32, B * T)
    loss = jax.value_and_grad(head, argnums=(0, 1))
    function = train.on_devices(loss, one, P(), P())
    return [Job("head", function, arguments, one, stage, B * T, chips=mesh.size)]


def optimizer_jobs(stage, model, mesh, cfg):
    """The update with its collectives, on all chips."""
    specs, rules = model.specs(cfg), model.rules(cfg)
    state = train.list_programs(model, mesh, cfg)["train_0"][1][0]
    parts = train.partition(train.state_shardings(model, mesh, cfg))

    def optimizer(state, grads):
        grads = train.reduce_grads(grads, specs, mesh.size, cfg)
        params, slots = model.update(state, grads, stage, specs, rules, mesh.size, cfg)
        copies = train.gather(params, specs, mesh.size, cfg)
        return train.State(state.step + 1, params, slots), copies

    grads = tree_map(lambda spec: shape(mesh, f32, *spec.shape), specs)
    function = train.on_devices(optimizer, mesh, (parts, P()), (parts, P()))
    return [Job("optimizer", function, (state, grads), mesh, stage, stage.batch_tokens)]


PIECES = {
    "layer": layer_jobs,
    "attention": attention_jobs,
    "copy": copy_jobs,
    "head": head_jobs,
    "optimizer": optimizer_jobs,
}


def list_jobs(model, mesh, cfg, number=None, piece=None):
    """All programs of a run; the one of the stage with this number; or a piece of its step.

    Raises UsageError for a stage that is not there.
    """
    last = len(cfg.stages) - 1
    if number is not None and not 0 <= number <= last:
        raise UsageError(f"--stage={number}: wanted 0 to {last}")
    if piece:
        stage = cfg.stages[last if number is None else number]
        return PIECES[piece](stage, model, mesh, cfg)
    jobs = training_jobs(model, mesh, cfg, number)
    if number is None:
        jobs.append(evaluation_job(model, mesh, cfg))
    return jobs


# ---- Memory --------------------------------------------------------------------------------------
def out_of_memory(job, need_gib, have_gib, cfg, whose="the chip's"):
    """UsageError that says by how much a program does not fit, and what three flags could become.

    Micro-steps are halved as often as the excess asks. Blocks of the head are such that logits and
    their gradient take a gibibyte. Rows become shorter, or the batch smaller.
    """
    evaluates = job.stage == cfg.val
    _, num_rows, width = train.batch_shape(job.stage, job.mesh.size, cfg)
    row = width - 1
    at_once = num_rows // job.mesh.size * row
    halvings = math.ceil(math.log2(need_gib / have_gib)) or 1
    block = min(cfg.head_block or at_once, at_once)
    room = 2 ** int(math.log2(2**30 / (8 * cfg.padded_vocab)))
    advice = {
        "micro_tokens": at_once >> halvings,
        "head_block": room if room < block else block // 2,
    }
    if advice["micro_tokens"] < row:  # a micro-step holds one row at least
        advice["val.seq_len" if evaluates else "stages.seq_len"] = row >> halvings
    elif evaluates:
        advice["val_tokens"] = cfg.val_tokens >> halvings
    else:
        advice["stages.batch_tokens"] = job.stage.batch_tokens >> halvings
    turns = ", ".join(f"--{name}={value}" for name, value in advice.items())
    return UsageError(
        f"{job.name} does not fit: it needs {need_gib:.2f} GiB of {whose} {have_gib:.2f}, "
        f"{need_gib - have_gib:.2f} too many. Turn one or more of these: {turns}"
    )
