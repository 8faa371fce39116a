"""Continue a text with a trained model.

    python -m scripts.sample --checkpoint=logs/RUN --prompt="def main("
    python -m scripts.sample --checkpoint=logs/RUN --prompt=FILE:story.txt --num_samples=4 --seed=1
    python -m scripts.sample --checkpoint=logs/RUN --interactive    a prompt a line, pipes too
    python -m scripts.sample --bench    how much sooner does a token come with the cache?

logs/RUN is the folder that train.py named. One forward pass reads the prompt; then one token at a
time is made from cached keys and values. Text goes to stdout, all else to stderr. Several samples
are made at once, in one batch: the first is shown while it is made, the others after it. A sample
ends with its document (the model says BOS) or after --max_new_tokens. A seed gives the same texts
again, and its first text however many there are.

Prompts are UTF-8, whatever the console says. A prompt that is none, or that has a character which
the model lacks, ends the command with one sentence and exit code 2; --interactive says so and goes
on to the next one, and has that exit code in the end.
"""

import codecs
import contextlib
import functools
import json
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple, get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax import lax

import train
from scripts.text import READING, open_tokenizer, read_args, usage_errors
from train import GPT, Config, NonFiniteLoss, Stage, UsageError, replace, require, window_of

FLAGS = {
    "checkpoint": ("", "a run's folder, of which the newest; or its ckpt/step-NNNNNN"),
    "prompt": ("", "what to continue, FILE:PATH that of a file; nothing: a document begins"),
    "interactive": (
        False,
        "read prompts from stdin, to its end (Ctrl-D); the n-th has the seed --seed + n - 1",
    ),
    "num_samples": (1, "continuations of each prompt", 1, 1 << 16),
    "max_new_tokens": (256, "tokens of each at most", 1, 1 << 24),
    "temperature": (0.7, "divides the logits; 0: always the likeliest token", 0, 1e6),
    "top_k": (0, "draw from the K likeliest tokens only; 0: from all", 0, 1 << 20),
    "top_p": (1.0, "of these from the likeliest few that reach P together; 1: all", 1e-6, 1),
    "seed": (0, "of the draws", 0, (1 << 31) - 1),
    "tokenizer": ("", "folder of the tokenizer's files; without it, the run's shards'"),
    "bench": (
        0,
        "time a row of N tokens, 1024 where N is not said; without --checkpoint in the demo's "
        "shape, of random weights",
        0,
        1 << 20,
    ),
}

# ---- A trained model -----------------------------------------------------------------------------
# Files are read as train.py reads them: hashes of the manifest first, safetensors only, names and
# shapes held against the weight table of the config. The optimizer's state is only hashed.

MALFORMED = (*READING, AttributeError, OverflowError)  # JSON of another shape than ours


class Trained(NamedTuple):
    folder: Path  # .../RUN/ckpt/step-NNNNNN
    step: int
    cfg: Config  # the run's, its attention chosen for this machine
    meta: dict  # of its training shards, as train.GPT2_META
    params: dict  # float32 by the weight table, on the first device

    def weights(self):
        """Compute copies, layers unstacked, as forward takes them."""
        return train.unstack(train.gather(self.params, GPT.specs(self.cfg), 1, self.cfg))

    def tokenizer_folder(self, folder=""):
        """Where the tokenizer's files are sought, by default beside the run's training shards.

        Raises UsageError for one that is not there.
        """
        require(not folder or Path(folder).is_dir(), f"--tokenizer={folder}: no such folder")
        shards = train.find_shards(self.cfg.train_files) or [Path(self.cfg.train_files)]
        return Path(folder or shards[0].parent)

    def tokenizer(self, folder=""):
        """The Tokenizer in tokenizer_folder.

        Raises UsageError where it is missing or another one than the model was trained with.
        """
        meta = self.meta
        place = self.tokenizer_folder(folder)
        file = place / "meta.json"
        is_bytes = meta["tokenizer"] == "bytes"  # which has no files
        if folder if is_bytes else file.exists():
            found = train.read_meta(file)
            train.check_same_tokenizer(file, found, meta)
            meta = meta if meta["tokenizer_sha256"] else found
        return open_tokenizer(meta, place)


def checkpoint_folder(path):
    """A checkpoint's folder: path, or the newest of the run at path. Raises UsageError."""
    path = Path(os.path.realpath(path))
    is_one = (path / "manifest.json").is_file()
    folders = [path] if is_one else train.checkpoints_in(path)
    wanted = "a run's folder, as logs/20260101T000000Z-abcdef, or its ckpt/step-NNNNNN"
    require(folders, f"--checkpoint={path}: no checkpoint there; wanted {wanted}")
    return folders[-1]


def as_tuples(x):
    return tuple(map(as_tuples, x)) if isinstance(x, list) else x


def as_row(kind, values):
    """A Config or a Stage of its fields' values. Raises TypeError where one is of another type."""
    row = kind(**{name: as_tuples(value) for name, value in values.items()})
    for name, wanted in get_type_hints(kind).items():
        kinds = get_args(wanted) or (wanted,)
        if float in kinds:
            kinds += (int,)
        value = getattr(row, name)
        if type(value) not in kinds:
            raise TypeError(f"{name} is {value!r}")
    return row


def as_config(saved):
    """The Config that train.as_json wrote. Raises MALFORMED for what no run can have."""
    stages = [as_row(Stage, stage) for stage in saved["stages"]]
    rows = {"stages": stages, "val": as_row(Stage, saved["val"])}
    cfg = as_row(Config, saved | rows)
    for flag, holds, wanted in train.rules(cfg):
        if not holds:
            raise ValueError(f"{flag}: wanted {wanted}")
    hash(cfg)  # else no compiled program can be found by it
    return cfg


def as_meta(found):
    """What is said of the tokenizer, as train.GPT2_META. Raises MALFORMED."""
    found = {"tokenizer_sha256": ""} | found  # which older runs lack
    meta = {name: type(value)(found[name]) for name, value in train.GPT2_META.items()}
    if Path(meta["tokenizer"]).name != meta["tokenizer"]:
        raise ValueError(f"{meta['tokenizer']!r} is no bare name")
    return meta


def open_checkpoint(path):
    """The Trained at a run's folder or a checkpoint's.

    Raises UsageError where there is none, where it is damaged or not of train.py's own model.
    """
    folder = checkpoint_folder(path)
    about = folder / "manifest.json"
    with usage_errors(f"{about}: its config cannot be read", MALFORMED):
        manifest = json.loads(about.read_text(encoding="utf-8"))
        is_ours = manifest.get("format") == train.CHECKPOINT_FORMAT
        require(is_ours, f"{folder}: it is of an older train.py; {train.OLD_FORMATS}")
        cfg = as_config(manifest["config"])
        step = int(manifest["step"])
    train.read_manifest(folder, cfg)
    if "meta" not in manifest:  # of an older train.py
        about = folder.parent.parent / "config.json"
    with usage_errors(f"{about}: wanted the tokenizer of the run's shards, as meta", MALFORMED):
        meta = as_meta(json.loads(about.read_text(encoding="utf-8"))["meta"])
    cfg = start_jax(cfg)
    mesh = train.make_mesh(jax.devices()[:1])
    places = train.state_shardings(GPT, mesh, cfg).params

    def wanted(spec, place):
        return jax.ShapeDtypeStruct(spec.shape, jnp.float32, sharding=place)

    like = jax.tree.map(wanted, GPT.specs(cfg), places)
    params = train.load_tensors(folder / "params.safetensors", like)
    return Trained(folder, step, cfg, meta, params)


def start_jax(cfg):
    """The Config with this machine's attention, once JAX is set up for it. Raises UsageError."""
    train.start_devices(replace(cfg, cpu_devices=1, multihost=""))
    cfg = replace(cfg, attention="auto", micro_tokens=None)  # these were the training machine's
    cfg = train.choose_attention(cfg, *train.this_machine())
    train.set_up_jax(cfg)
    return cfg


@contextlib.contextmanager
def memory_errors(way_out):
    """Out of memory, on the device or for numpy, becomes a UsageError."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UsageError(f"out of memory; {way_out}") from error


# ---- Cache ---------------------------------------------------------------------------------------
# It comes in by forward's attend. A layer keeps as many positions as its window and the token
# itself, or the capacity where that is less: position p lies in slot p % S of its S slots. N are
# the B rows' G heads in one axis: of two batch axes XLA would drop one of size 1 for its matmul,
# and copy what it keeps.


class Cache(NamedTuple):
    """What the next token needs of those before it."""

    keys: dict  # {layer: [N, S, K]} as the scores take them: offset, normed and turned
    values: dict  # {layer: [N, S, K]}
    raw_keys: dict  # {layer: [B, 1, GK]} of the last token, where keys are offset
    copy_keys_BSQ: jax.Array | None  # of the copy pointer
    copy_next_BS: jax.Array | None  # the token that followed each
    token_B: jax.Array  # the last token
    start_B: jax.Array  # where its document begins
    position: jax.Array  # how many tokens there are


def as_heads(z_BTN, cfg):
    return rearrange(z_BTN, "B T (H K) -> B T H K", K=cfg.head_dim)


def turned(z_BTN, table, cfg):
    """Queries or keys as the scores take them, [B, T, H, K]. table: cos and sin of T positions."""
    return train.rotate(train.rms_norm(as_heads(z_BTN, cfg)), *table)


def as_slots(z_BSGK, cfg):
    """[N, S, K] rounded to compute_dtype.

    On a CPU they are stored as float32, to which XLA would widen all slots on each step to write
    one in bfloat16.
    """
    z_NSK = rearrange(z_BSGK, "B S G K -> (B G) S K").astype(cfg.compute_dtype)
    return z_NSK.astype(jnp.float32) if jax.default_backend() == "cpu" else z_NSK


def held(last, num_slots):
    """The position in each slot when `last` is the last; below 0: none yet."""
    return last - (last - jnp.arange(num_slots)) % num_slots


def put_at(slots, new, slot):
    return lax.dynamic_update_slice_in_dim(slots, new.astype(slots.dtype), slot, axis=1)


def put(slots_NSK, z_B1GK, position, cfg):
    """The slots with what belongs to a position."""
    return put_at(slots_NSK, as_slots(z_B1GK, cfg), position % slots_NSK.shape[1])


def starts_document(tokens, cfg):
    return (tokens == cfg.bos_id) & cfg.is_packed


def prefill(weights, tokens_BT, length, capacity, cfg):
    """(float32 logits_BV of what follows the first `length` of the tokens, their Cache).

    The other tokens may be anything; length is traced. capacity: positions that the cache can
    hold, at least length.
    """
    cfg = replace(cfg, attention="xla")
    whole_row = train.attend_row(tokens_BT, cfg.val, cfg)
    *table, _ = train.rotary(tokens_BT.shape[1], cfg.val, cfg)
    last = length - 1
    position_1T = jnp.arange(tokens_BT.shape[1])[None]
    start_BT = lax.cummax(jnp.where(starts_document(tokens_BT, cfg), position_1T, 0), axis=1)
    keys, values, raw_keys = {}, {}, {}

    def at_last(z_BT):
        return lax.dynamic_index_in_dim(z_BT, last, axis=1, keepdims=False)

    def attend(layer, q_BTN, k_BTN, v_BTN, gate_BTH):
        y_BTN = whole_row(layer, q_BTN, k_BTN, v_BTN, gate_BTH)
        if layer in cfg.offset_layers:
            raw_keys[layer] = lax.dynamic_slice_in_dim(k_BTN, last, 1, axis=1)
            k_BTN = train.offset_keys(k_BTN, start_BT == position_1T, cfg)
        k_BTGK = turned(k_BTN, table, cfg)
        v_BTGK = as_heads(v_BTN, cfg)
        place_S = held(last, min(window_of(layer, cfg.val, cfg) + 1, capacity))
        keys[layer] = as_slots(jnp.take(k_BTGK, place_S, axis=1, mode="clip"), cfg)
        values[layer] = as_slots(jnp.take(v_BTGK, place_S, axis=1, mode="clip"), cfg)
        return y_BTN

    x_BTD = train.forward(weights, tokens_BT, weights["embed"][tokens_BT], cfg.val, cfg, attend)
    last_B, start_B = at_last(tokens_BT), at_last(start_BT)
    x_B1D = at_last(x_BTD)[:, None]
    pointer = None, None
    if cfg.copy_dim:
        x_BTD = x_BTD.astype(weights["head"].dtype)
        _, k_BTQ = train.copy_queries_and_keys(x_BTD, weights, cfg)
        place_S = held(last, min(train.COPY_WINDOW + 1, capacity))
        next_BT = jnp.roll(tokens_BT, -1, axis=1)
        pointer = (jnp.take(z, place_S, axis=1, mode="clip") for z in (k_BTQ, next_BT))
    cache = Cache(keys, values, raw_keys, *pointer, last_B, start_B, length)
    return head_logits(x_B1D, weights, cache, cfg), cache


def head_logits(x_B1D, weights, cache, cfg):
    """[B, V] of what follows the last token, whose activations are x_B1D."""
    x_B1D = x_B1D.astype(weights["head"].dtype)
    logits_BV = train.softcapped_logits(x_B1D[:, 0], weights["head"], cfg)
    if not cfg.copy_dim:
        return logits_BV
    q_B1Q, _ = train.copy_queries_and_keys(x_B1D, weights, cfg)
    sink_B1, pointer_B1 = train.copy_sink_and_logit(q_B1Q, x_B1D, weights, cfg)
    place_1S = held(cache.position - 1, cache.copy_keys_BSQ.shape[1])[None]
    visible_BS = (place_1S >= cache.start_B[:, None]) & (place_1S < cache.position - 1)
    score_BS = train.matmul("BTQ,BSQ->BTS", q_B1Q, cache.copy_keys_BSQ, jnp.float32)[:, 0]
    exp_BS = jnp.where(visible_BS, jnp.exp(score_BS), 0)
    pointer = exp_BS, cache.copy_next_BS, sink_B1[:, 0], pointer_B1[:, 0]
    return train.copy_log_probs(logits_BV, *pointer)


def attend_slots(q_B1HK, k_NSK, v_NSK, visible_BS, cfg):
    """One query per row against the visible slots, [B, 1, HK]."""
    q_N1R1K = rearrange(q_B1HK, "B 1 (G R) K -> (B G) 1 R 1 K", G=cfg.kv_heads)
    q_N1R1K = q_N1R1K.astype(cfg.compute_dtype)
    visible_NS = jnp.repeat(visible_BS, cfg.kv_heads, axis=0)
    y_N1R1K = train.softmax_average(q_N1R1K, k_NSK[:, None], v_NSK[:, None], visible_NS[:, None])
    return rearrange(y_N1R1K, "(B G) 1 R 1 K -> B 1 (G R K)", G=cfg.kv_heads)


def put_pointer(x_B1D, token_B, weights, cache, cfg):
    """(keys, next tokens) of the copy pointer with a token's key; the token followed the last."""
    if not cfg.copy_dim:
        return None, None
    x_B1D = x_B1D.astype(weights["head"].dtype)
    _, k_B1Q = train.copy_queries_and_keys(x_B1D, weights, cfg)
    size = cache.copy_keys_BSQ.shape[1]
    keys_BSQ = put_at(cache.copy_keys_BSQ, k_B1Q, cache.position % size)
    next_BS = put_at(cache.copy_next_BS, token_B[:, None], (cache.position - 1) % size)
    return keys_BSQ, next_BS


def decode(weights, cache, token_B, capacity, cfg):
    """(float32 logits_BV of what follows token_B, the next of each row; the Cache with it).

    capacity: as of prefill, above the cache's position.
    """
    position = cache.position
    is_start_B = starts_document(token_B, cfg)
    start_B = jnp.where(is_start_B, position, cache.start_B)
    *table, scale = train.rotary(capacity, cfg.val, cfg)
    table = [lax.dynamic_slice_in_dim(jnp.asarray(z), position, 1) for z in table]
    keys, values, raw_keys = {}, {}, {}

    def attend(layer, q_BTN, k_BTN, v_BTN, gate_BTH):
        q_B1N, k_B1N, v_B1N = (z[:, -1:] for z in (q_BTN, k_BTN, v_BTN))
        if layer in cache.raw_keys:
            raw_keys[layer] = k_B1N
            pair_BTN = jnp.concatenate([cache.raw_keys[layer], k_B1N], axis=1)
            starts_BT = jnp.stack([is_start_B, is_start_B], axis=1)
            k_B1N = train.offset_keys(pair_BTN, starts_BT, cfg)[:, 1:]
        q_B1HK, k_B1GK = turned(q_B1N, table, cfg), turned(k_B1N, table, cfg)
        k_NSK = put(cache.keys[layer], k_B1GK, position, cfg)
        v_NSK = put(cache.values[layer], as_heads(v_B1N, cfg), position, cfg)
        keys[layer], values[layer] = k_NSK, v_NSK
        # what a slot holds is within the window
        visible_BS = held(position, k_NSK.shape[1])[None] >= start_B[:, None]
        y_B1N = attend_slots(q_B1HK * scale, k_NSK, v_NSK, visible_BS, cfg)
        y_B1N = train.gated(y_B1N, gate_BTH[:, -1:])
        return jnp.pad(y_B1N, ((0, 0), (q_BTN.shape[1] - 1, 0), (0, 0)))

    # smear reads the embedding of the token before: it is there for that alone, and nobody looks
    # at what becomes of it
    tokens_BT = jnp.stack([cache.token_B, token_B] if cfg.smear else [token_B], axis=1)
    x_BTD = train.forward(weights, tokens_BT, weights["embed"][tokens_BT], cfg.val, cfg, attend)
    x_B1D = x_BTD[:, -1:]
    pointer = put_pointer(x_B1D, token_B, weights, cache, cfg)
    cache = Cache(keys, values, raw_keys, *pointer, token_B, start_B, position + 1)
    return head_logits(x_B1D, weights, cache, cfg), cache


# ---- Choice of a token ---------------------------------------------------------------------------


class Choice(NamedTuple):
    temperature: float  # 0: the likeliest
    top_k: int  # 0: all
    top_p: float  # 1: all


def choose(logits_BV, key, position, choice):
    """token_B, drawn from softmax of logits / temperature.

    Of its top_k likeliest, scaled to sum to 1, stay the likeliest few that reach top_p together,
    the one that reaches it included. Of equally likely tokens the lower id goes first. The draw of
    row b hangs on key, b and position. Where a logit is no number, or infinite, the token is -1.
    """
    fits_B = jnp.isfinite(jnp.max(logits_BV, axis=1))
    if choice.temperature < 1e-6:
        return jnp.where(fits_B, jnp.argmax(logits_BV, axis=1), -1)
    z_BV = logits_BV / choice.temperature
    is_cut = choice.top_k or choice.top_p < 1
    if is_cut:
        count = min(choice.top_k or z_BV.shape[1], z_BV.shape[1])
        z_BV, ids_BV = lax.top_k(z_BV, count)
        p_BV = jax.nn.softmax(z_BV, axis=1)
        before_BV = jnp.cumsum(p_BV, axis=1) - p_BV
        z_BV = jnp.where(before_BV < choice.top_p, z_BV, -jnp.inf)

    def draw(row, z_V):
        row_key = jax.random.fold_in(jax.random.fold_in(key, row), position)
        return jax.random.categorical(row_key, z_V)

    chosen_B = jax.vmap(draw)(jnp.arange(len(z_BV)), z_BV)
    if is_cut:
        chosen_B = jnp.take_along_axis(ids_BV, chosen_B[:, None], axis=1)[:, 0]
    return jnp.where(fits_B, chosen_B, -1)


# ---- Generation ----------------------------------------------------------------------------------


def random_weights(cfg):
    specs = GPT.specs(cfg)
    params = train.init_params(jax.random.key(0), specs)
    return train.unstack(train.gather(params, specs, 1, cfg))


def round_up(count):
    """To a power of two, so that few programs serve all lengths."""
    return max(32, 1 << (count - 1).bit_length())


def on_host(token_B):
    """Tokens of choose, waited for. Raises NonFiniteLoss."""
    token_B = np.asarray(token_B)
    if token_B.min() < 0:
        raise NonFiniteLoss("a logit is not finite, so the weights are damaged or far too large")
    return token_B


@functools.cache
def compile_programs(length, capacity, num_samples, choice, cfg):
    """(first, following): compiled, they make the first token of each sample and the next one.

    length: of the one prompt, padded. capacity: of the cache.
    """

    def repeat(z):
        return jnp.concatenate([z] * num_samples) if z.ndim else z

    def first(weights, tokens_1T, num_tokens, key):
        made = prefill(weights, tokens_1T, num_tokens, capacity, cfg)
        logits_BV, cache = jax.tree.map(repeat, made)
        return choose(logits_BV, key, cache.position, choice), cache

    def following(weights, cache, token_B, key):
        logits_BV, cache = decode(weights, cache, token_B, capacity, cfg)
        return choose(logits_BV, key, cache.position, choice), cache

    first = jax.jit(first)
    following = jax.jit(following, donate_argnums=1)
    if jax.config.jax_disable_jit:  # which a compiled program would refuse
        return first, following
    weights = jax.eval_shape(functools.partial(random_weights, cfg))
    key = jax.eval_shape(functools.partial(jax.random.key, 0))
    tokens_1T = jax.ShapeDtypeStruct((1, length), jnp.int32)
    first = first.lower(weights, tokens_1T, jax.ShapeDtypeStruct((), jnp.int32), key)
    token_B, cache = first.out_info
    following = following.lower(weights, cache, token_B, key)
    return first.compile(), following.compile()


def generate(weights, ids, num_tokens, num_samples, choice, seed, cfg):
    """Compile, then return an iterator of num_tokens arrays [B]: the next token of each sample.

    ids: of the prompt, at least one. The iterator raises NonFiniteLoss.
    """
    length, capacity = round_up(len(ids)), round_up(len(ids) + num_tokens)
    first, following = compile_programs(length, capacity, num_samples, choice, cfg)
    tokens_1T = np.zeros((1, length), np.int32)
    tokens_1T[0, : len(ids)] = ids
    key = jax.random.key(seed)

    def steps():
        token_B, cache = first(weights, tokens_1T, np.int32(len(ids)), key)
        for _ in range(num_tokens - 1):
            next_B, cache = following(weights, cache, token_B, key)
            yield on_host(token_B)  # while the next one is made
            token_B = next_B
        yield on_host(token_B)

    return steps()


def write_texts(steps, prompt, tokenizer, num_samples, write):
    """Write the texts of an iterator of tokens [B]: the first as it comes, the others after it.

    A character is written when it is whole. Returns the number of steps, the seconds until the
    first and of the others.
    """
    pieces = dict(enumerate(tokenizer.pieces))  # a model may have more ids than its tokenizer
    decoders = [codecs.getincrementaldecoder("utf-8")("replace") for _ in range(num_samples)]
    texts, ended = [prompt] * num_samples, [False] * num_samples
    titles = [f"--- {b + 1} of {num_samples} ---\n" for b in range(num_samples)]
    if num_samples == 1:
        titles = [""]
    write(titles[0] + prompt)
    shown = len(prompt)
    count = 0
    began = at_first = time.perf_counter()
    for token_B in steps:
        count += 1
        if count == 1:
            at_first = time.perf_counter()
        for b, token in enumerate(token_B.tolist()):
            if not ended[b]:
                ended[b] = token == tokenizer.bos_id
                texts[b] += decoders[b].decode(pieces.get(token, b""), final=ended[b])
        write(texts[0][shown:])
        shown = len(texts[0])
        if all(ended):
            break
    seconds = time.perf_counter() - at_first
    write("\n")
    for title, text in zip(titles[1:], texts[1:], strict=True):
        write(f"{title}{text}\n")
    return count, at_first - began, seconds


# ---- Bench ---------------------------------------------------------------------------------------


def bench(weights, cfg, num_tokens, choice, seed):
    """What a token of a row costs, with the cache and by a forward pass over the whole row."""
    size = train.count_params(GPT.specs(cfg))
    said = f"{size} parameters, {cfg.compute_dtype}, a row of {num_tokens} tokens; compiling ..."
    tell(said)
    steps = generate(weights, [cfg.bos_id], num_tokens - 1, 1, choice, seed, cfg)
    began = time.perf_counter()
    made = [int(token_B[0]) for token_B in steps]
    cached_ms = 1e3 * (time.perf_counter() - began) / len(made)
    row = np.array([[cfg.bos_id, *made]], np.int32)

    @jax.jit
    def likeliest(weights, ids_1T, last):
        return jnp.argmax(train.next_logits(weights, ids_1T, cfg)[0, last])

    times = []
    for _ in range(7):
        began = time.perf_counter()
        jax.block_until_ready(likeliest(weights, row, len(made)))
        times.append(1e3 * (time.perf_counter() - began))
    whole_ms = float(np.median(times[1:]))  # the first one compiles
    print(f"with the cache:  {cached_ms:8.2f} ms per token, mean over the row")
    print(f"from whole rows: {whole_ms:8.2f} ms per token, median of {len(times) - 1}")
    print(f"with the cache a token takes {cached_ms / whole_ms:.3f} of the time")


# ---- Command line --------------------------------------------------------------------------------


def parse(argv):
    """Raises UsageError."""
    argv = ["--bench=1024" if word == "--bench" else word for word in argv]
    args = read_args(argv, __doc__, FLAGS)
    wanted = "wanted a run's folder, as logs/20260101T000000Z-abcdef"
    require(args.checkpoint or args.bench, f"--checkpoint={args.checkpoint}: {wanted}")
    is_one = not (args.prompt and args.interactive)
    require(is_one, "--prompt and --interactive: wanted one of them")
    require(args.bench not in (1, 2), f"--bench={args.bench}: wanted at least 3 tokens")
    return args


def as_text(blob, where, first_line=1):
    """UTF-8 as text, without a byte order mark. Raises UsageError."""
    try:
        return blob.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = first_line + error.object.count(b"\n", 0, error.start)
        raise UsageError(f"{where}, line {line}: wanted UTF-8 text ({error.reason})") from error


def read_prompt(text):
    """What --prompt says; the lines of a file end in \\n. Raises UsageError."""
    if not text.startswith("FILE:"):
        return as_text(text.encode(errors="surrogatepass"), "--prompt")
    file = text.removeprefix("FILE:")
    with usage_errors(f"--prompt={text}: wanted a file of UTF-8 text", (OSError, ValueError)):
        return as_text(Path(file).read_bytes(), file).replace("\r\n", "\n")


def read_lines():
    """Yield the lines of stdin, as bytes. Raises UsageError."""
    require(sys.stdin, "--interactive: stdin is closed, wanted a prompt a line")
    while True:
        if sys.stdin.isatty():
            tell("prompt> ", end="")
        line = sys.stdin.buffer.readline()
        if not line:  # its end, at a terminal Ctrl-D
            return
        yield line.rstrip(b"\r\n")


def tell(text, end="\n"):
    if sys.stderr:  # it may be closed, and print would take stdout
        print(text, end=end, file=sys.stderr, flush=True)


def write(text):
    print(text, end="", flush=True)


def answer(prompt, seed, choice, weights, tokenizer, args, cfg):
    """Write the continuations of a prompt.

    Raises UsageError for a character that is unknown and for want of memory, and NonFiniteLoss.
    """
    ids = [cfg.bos_id, *tokenizer.encode(prompt)]
    samples = args.num_samples
    with memory_errors(f"--num_samples={samples} or --max_new_tokens={args.max_new_tokens}: fewer"):
        steps = generate(weights, ids, args.max_new_tokens, samples, choice, seed, cfg)
        count, prefill_s, decode_s = write_texts(steps, prompt, tokenizer, samples, write)
    made = samples * (count - 1)
    tell(f"prefill: {len(ids)} tokens in {prefill_s:.3f} s, {len(ids) / prefill_s:.0f} tokens/s")
    tell(f"decode: {made} tokens in {decode_s:.3f} s, {made / decode_s:.0f} tokens/s")


def converse(answer_to, seed):
    """Answer the prompts of stdin; one that cannot be is named. Raises UsageError in the end."""
    number = failed = 0
    for number, line in enumerate(read_lines(), 1):
        try:
            answer_to(as_text(line, "stdin", number), seed + number - 1)
        except UsageError as error:
            failed += 1
            tell(f"error: {error}")
    require(not failed, f"{failed} of {number} prompts had no answer")


def main(argv=None):
    """Raises UsageError and NonFiniteLoss."""
    args = parse(sys.argv[1:] if argv is None else argv)
    choice = Choice(args.temperature, args.top_k, args.top_p)
    too_long = f"--bench={args.bench}: fewer tokens"
    if not args.checkpoint:
        cfg = start_jax(replace(train.DEMO, vocab_size=257, bos_id=256))
        with memory_errors(too_long):
            return bench(random_weights(cfg), cfg, args.bench, choice, args.seed)
    prompt = "" if args.interactive or args.bench else read_prompt(args.prompt)
    trained = open_checkpoint(args.checkpoint)
    cfg, weights = trained.cfg, trained.weights()
    if args.bench:
        with memory_errors(too_long):
            return bench(weights, cfg, args.bench, choice, args.seed)
    with contextlib.redirect_stdout(sys.stderr):  # warnings are no text
        tokenizer = trained.tokenizer(args.tokenizer)
    size = train.count_params(GPT.specs(cfg))
    tell(f"{trained.folder}, step {trained.step}: {size} parameters, tokenizer {tokenizer.name}")

    def answer_to(prompt, seed):
        answer(prompt, seed, choice, weights, tokenizer, args, cfg)

    if args.interactive:
        converse(answer_to, args.seed)
    else:
        answer_to(prompt, args.seed)


if __name__ == "__main__":
    sys.exit(train.command(main))
