"""Continue a text with a trained model: one forward pass over the prompt, then one token at a time from cached keys and values.

    python -m scripts.sample --checkpoint=logs/RUN --prompt="def main("     (logs/RUN: the folder that train.py named)
    python -m scripts.sample --checkpoint=logs/RUN --prompt=FILE:story.txt --num_samples=4 --top_p=0.95 --seed=1
    python -m scripts.sample --checkpoint=logs/RUN --interactive            (a prompt a line, up to an empty one; pipes too)
    python -m scripts.sample --bench                                        (how much sooner a token comes with the cache)

Text goes to stdout while it is made, all else to stderr. Several samples are made at once, in one batch, and shown one after the
other: the first as it comes, each next one from where it is by then. A sample ends with its document (the model says BOS) or after
--max_new_tokens. A seed gives the same texts again, and its first text however many there are.
Positions have no limit, only the memory of the cache: but where text grows past the rows that the model was trained on (--stages.seq_len
of the run), blocks without a window meet distances that they never saw, and the text gets worse.
"""
import argparse, codecs, collections, functools, os, sys, time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from scripts.checkpoint import open_checkpoint
from scripts.text import folder_of_run, open_tokenizer, usage_errors
from train import (DEMO, UsageError, attend_row, choose_attention, command, count_params, forward, gated,
                   gather, init_params, next_logits, offset_keys, param_specs, replace, rms_norm, rotary,
                   rotate, softcapped_logits, softmax_average, unstack, window_of)

# ---- Cache ----
# The seam is forward's attend. Position p of a layer lies in slot p % S of its S slots: window + 1, or the capacity where that is less.
# N are the B rows' G heads in one axis: of two batch axes XLA would drop one of size 1 for its matmul, and copy what it keeps.

class Cache(NamedTuple):
    """What the next token needs of those before it, of B rows. keys are as the scores take them: offset, normed and turned."""
    keys: dict           # {layer: [N, S, K]}
    values: dict         # {layer: [N, S, K]}
    raw_keys: dict       # {layer: [B, 1, GK]} of the last token, where keys are offset
    token_B: jax.Array   # the last token
    start_B: jax.Array   # where its document begins
    position: jax.Array  # how many tokens there are

def heads_of(z_BTN, cfg): return rearrange(z_BTN, "B T (H K) -> B T H K", K=cfg.head_dim)
def starts_document(token_B, cfg): return (token_B == cfg.bos_id) & any(stage.doc_len for stage in cfg.stages)
def kept(z, cfg):
    """Rounded to compute_dtype; on a CPU in float32, to which XLA would widen all slots on each step to write one in bfloat16."""
    return z.astype(cfg.compute_dtype).astype(jnp.float32 if jax.default_backend() == "cpu" else cfg.compute_dtype)

def prefill(weights, tokens_BT, length, capacity, cfg):
    """(float32 logits_BV of what follows the first `length` of the tokens, their Cache). The others may be anything; length is traced.
    capacity: positions that the cache can hold, at least length."""
    stage, cfg, num_tokens = cfg.val, replace(cfg, attention="xla"), tokens_BT.shape[1]
    whole_row, (*table, _), last = attend_row(tokens_BT, stage, cfg), rotary(num_tokens, stage, cfg), length - 1
    place_BT = jnp.broadcast_to(jnp.arange(num_tokens)[None], tokens_BT.shape)
    start_BT = jax.lax.cummax(jnp.where(starts_document(tokens_BT, cfg), place_BT, 0), axis=1)
    keys, values, raw_keys = {}, {}, {}
    def attend(layer, q_BTN, k_BTN, v_BTN, gate_BTH):
        y_BTN, window = whole_row(layer, q_BTN, k_BTN, v_BTN, gate_BTH), window_of(layer, stage, cfg)
        if layer in cfg.offset_layers:
            raw_keys[layer] = jax.lax.dynamic_slice_in_dim(k_BTN, last, 1, axis=1)
            k_BTN = offset_keys(k_BTN, start_BT == place_BT, cfg)
        slot_S = jnp.arange(min(window + 1, capacity))
        held_S = last - (last - slot_S) % len(slot_S)  # the position in each slot; below 0: none yet
        keys[layer], values[layer] = (
            rearrange(kept(jnp.take(z_BTGK, held_S, axis=1, mode="clip"), cfg), "B S G K -> (B G) S K")
            for z_BTGK in (rotate(rms_norm(heads_of(k_BTN, cfg)), *table), heads_of(v_BTN, cfg)))
        return y_BTN
    x_BTD = forward(weights, tokens_BT, weights["embed"][tokens_BT], stage, cfg, attend)
    at_last = lambda z_BT: jax.lax.dynamic_index_in_dim(z_BT, last, axis=1, keepdims=False)
    logits_BV = softcapped_logits(at_last(x_BTD), weights["head"], cfg)
    return logits_BV, Cache(keys, values, raw_keys, at_last(tokens_BT), at_last(start_BT), length)

def decode(weights, cache, token_B, capacity, cfg):
    """(float32 logits_BV of what follows token_B, the next of each row; the Cache with it). capacity: as of prefill, above position."""
    stage, position, is_start_B = cfg.val, cache.position, starts_document(token_B, cfg)
    start_B, (*table, scale) = jnp.where(is_start_B, position, cache.start_B), rotary(capacity, stage, cfg)
    table = [jax.lax.dynamic_slice_in_dim(jnp.asarray(z), position, 1) for z in table]
    keys, values, raw_keys = {}, {}, {}
    def attend(layer, q_BTN, k_BTN, v_BTN, gate_BTH):
        (q_B1N, k_B1N, v_B1N), size = (z[:, -1:] for z in (q_BTN, k_BTN, v_BTN)), cache.keys[layer].shape[1]
        if layer in cache.raw_keys:
            raw_keys[layer], pair_BTN = k_B1N, jnp.concatenate([cache.raw_keys[layer], k_B1N], axis=1)
            k_B1N = offset_keys(pair_BTN, jnp.stack([is_start_B, is_start_B], axis=1), cfg)[:, 1:]
        q_B1HK, k_B1GK = (rotate(rms_norm(heads_of(z, cfg)), *table) for z in (q_B1N, k_B1N))
        keys[layer], values[layer] = (jax.lax.dynamic_update_slice_in_dim(
            slots[layer], rearrange(kept(z, cfg), "B 1 G K -> (B G) 1 K"), position % size, axis=1)
            for slots, z in ((cache.keys, k_B1GK), (cache.values, heads_of(v_B1N, cfg))))
        held_S = position - (position - jnp.arange(size)) % size  # as in prefill; all within the window
        visible_N1S = jnp.repeat(held_S[None, None] >= start_B[:, None, None], cfg.kv_heads, axis=0)
        # the query heads of a key head stand where softmax_average has the queries of a row: they see the same keys
        q_N11RK = rearrange((q_B1HK * scale).astype(cfg.compute_dtype), "B 1 (G R) K -> (B G) 1 1 R K", G=cfg.kv_heads)
        y_N11RK = softmax_average(q_N11RK, keys[layer][:, None], values[layer][:, None], visible_N1S)
        y_B1N = gated(rearrange(y_N11RK, "(B G) 1 1 R K -> B 1 (G R K)", G=cfg.kv_heads), gate_BTH[:, -1:])
        return jnp.pad(y_B1N, ((0, 0), (q_BTN.shape[1] - 1, 0), (0, 0)))
    tokens_BT = jnp.stack([cache.token_B, token_B][1 - cfg.smear:], axis=1)
    # smear reads the embedding of the token before, which is there for that alone: nobody looks at what becomes of it
    x_BTD = forward(weights, tokens_BT, weights["embed"][tokens_BT], stage, cfg, attend)
    return softcapped_logits(x_BTD[:, -1], weights["head"], cfg), Cache(keys, values, raw_keys, token_B, start_B, position + 1)

# ---- Choice of a token ----

class Choice(NamedTuple):
    temperature: float  # 0: the likeliest
    top_k: int          # 0: all
    top_p: float        # 1: all

def choose(logits_BV, key, position, choice):
    """token_B. Softmax of logits / temperature; of its top_k likeliest, scaled to sum to 1; of these the likeliest few that reach
    top_p together, the one that reaches it included. Of equally likely tokens the lower id goes first. Row b's draw hangs on key, b
    and position."""
    if not choice.temperature:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    z_BV, ids_BV = logits_BV / choice.temperature, None
    if choice.top_k or choice.top_p < 1:
        z_BV, ids_BV = jax.lax.top_k(z_BV, min(choice.top_k or z_BV.shape[1], z_BV.shape[1]))
        p_BV = jax.nn.softmax(z_BV, axis=-1)
        z_BV = jnp.where(jnp.cumsum(p_BV, axis=-1) - p_BV < choice.top_p, z_BV, -jnp.inf)
    draw = lambda row, z_V: jax.random.categorical(jax.random.fold_in(jax.random.fold_in(key, row), position), z_V)
    chosen_B = jax.vmap(draw)(jnp.arange(len(z_BV)), z_BV)
    return (chosen_B if ids_BV is None else jnp.take_along_axis(ids_BV, chosen_B[:, None], axis=1)[:, 0]).astype(jnp.int32)

# ---- Generation ----

def round_up(count): return max(32, 1 << (count - 1).bit_length())  # few programs serve all lengths

@functools.cache
def compile_programs(length, capacity, num_samples, choice, cfg):
    """(first, following): the first tokens of num_samples continuations of one prompt padded to `length`, and those after."""
    def first(weights, tokens_1T, num_tokens, key):
        logits_1V, cache = prefill(weights, tokens_1T, num_tokens, capacity, cfg)
        logits_BV, cache = jax.tree.map(lambda z: jnp.concatenate([z] * num_samples) if z.ndim else z, (logits_1V, cache))
        return choose(logits_BV, key, cache.position, choice), cache
    def following(weights, cache, token_B, key):
        logits_BV, cache = decode(weights, cache, token_B, capacity, cfg)
        return choose(logits_BV, key, cache.position, choice), cache
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.int32)
    weights, key = jax.eval_shape(lambda: random_weights(cfg)), jax.eval_shape(lambda: jax.random.key(0))
    first = jax.jit(first).lower(weights, shape(1, length), shape(), key)
    following = jax.jit(following, donate_argnums=1).lower(weights, first.out_info[1], first.out_info[0], key)
    return first.compile(), following.compile()

def random_weights(cfg, seed=0):
    specs = param_specs(cfg)
    return unstack(gather(init_params(jax.random.key(seed), specs), specs, 1, cfg))

def generate(weights, ids, num_tokens, num_samples, choice, seed, cfg):
    """Compile, then return an iterator of num_tokens int32 arrays [B]: the next token of each continuation of ids, at least one id.
    A step is under way while the token before it is looked at."""
    length, capacity = round_up(len(ids)), round_up(len(ids) + num_tokens)
    first, following = compile_programs(length, capacity, num_samples, choice, cfg)
    tokens_1T, key = np.zeros((1, length), np.int32), jax.random.key(seed)
    tokens_1T[0, :len(ids)] = ids
    def run():
        token_B, cache = first(weights, tokens_1T, np.int32(len(ids)), key)
        yield np.asarray(token_B)
        pending = collections.deque()
        for _ in range(num_tokens - 1):
            token_B, cache = following(weights, cache, token_B, key)
            pending.append(token_B)
            if len(pending) > 1:
                yield np.asarray(pending.popleft())
        yield from map(np.asarray, pending)
    return run()

def write_texts(tokens, prompt, tokenizer, num_samples, write):
    """Write the texts of an iterator of tokens [B], one after the other, each as far as it is; a character when it is whole.
    Returns (tokens of the first step, tokens of the others, seconds to the first, seconds from there); none count after a text's end."""
    decoders = [codecs.getincrementaldecoder("utf-8")("replace") for _ in range(num_samples)]
    pieces, texts, ended, shown = dict(enumerate(tokenizer.pieces)), [prompt] * num_samples, [False] * num_samples, 0
    title = lambda: write(f"--- {shown + 1} of {num_samples} ---\n") if 1 < num_samples > shown else None
    def show():
        nonlocal shown
        while shown < num_samples:
            write(texts[shown])
            texts[shown] = ""
            if not ended[shown]:
                return
            write("\n")
            shown += 1
            title()
    title()
    counts, times = [], [time.perf_counter()]
    for token_B in tokens:
        times[1:] = times[1:] or [time.perf_counter()]
        counts.append(ended.count(False))
        for b, token in enumerate(token_B.tolist()):
            if not ended[b]:
                ended[b] = token == tokenizer.bos_id
                texts[b] += decoders[b].decode(pieces.get(token, b""), final=ended[b])
        show()
        if all(ended):
            break
    ended = [True] * num_samples
    show()
    return counts[0], sum(counts[1:]), times[1] - times[0], time.perf_counter() - times[1]

# ---- Bench ----

def bench(weights, cfg, num_tokens, choice, seed):
    """What a token of a row of num_tokens costs, with the cache and from a forward pass over the whole row, as train.sample has it."""
    print(f"{count_params(param_specs(cfg))} parameters, {cfg.compute_dtype}, a row of {num_tokens} tokens; compiling ...",
          file=sys.stderr)
    tokens = generate(weights, [cfg.bos_id], num_tokens - 1, 1, choice, seed, cfg)
    whole = jax.jit(lambda weights, ids_1T, last: jnp.argmax(next_logits(weights, ids_1T, cfg)[0, last]))
    def timed(work):
        start = time.perf_counter()
        result = work()
        return result, time.perf_counter() - start
    row, cached_s = timed(lambda: np.array([[cfg.bos_id, *(int(token_B[0]) for token_B in tokens)]], np.int32))
    whole_s = [timed(lambda: whole(weights, row, num_tokens - 2).item())[1] for _ in range(7)][1:]  # the first compiles
    cached_ms, whole_ms = 1e3 * cached_s / (num_tokens - 1), 1e3 * float(np.median(whole_s))
    print(f"with the cache:    {cached_ms:8.2f} ms per token (mean over the row), {1e3 / cached_ms:.0f} tokens/s\n"
          f"from whole rows:   {whole_ms:8.2f} ms per token (median of {len(whole_s)}; all cost the same)\n"
          f"the cache is {whole_ms / cached_ms:.1f} times faster")

# ---- Command line ----

def parse(argv):
    """Raises UsageError."""
    def fail(message):
        raise UsageError(f"{message} (python -m scripts.sample --help lists all flags)")
    parser = argparse.ArgumentParser(usage="python -m scripts.sample --checkpoint=PATH [--FLAG=VALUE ...]", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error, flag = fail, parser.add_argument
    flag("--checkpoint", metavar="PATH", help="a run's folder, of which the newest, or one checkpoint's, .../ckpt/step-NNNNNN")
    flag("--prompt", metavar="TEXT", help="what to continue, FILE:PATH that of a file; nothing: a document from its beginning")
    flag("--interactive", action="store_true", help="read prompts from stdin; the n-th has the seed --seed + n - 1")
    flag("--num_samples", type=int, default=1, metavar="N", help="continuations of each prompt (default: %(default)s)")
    flag("--max_new_tokens", type=int, default=256, metavar="N", help="tokens of each at most (default: %(default)s)")
    flag("--temperature", type=float, default=0.7, metavar="T",
         help="divides the logits; 0: always the likeliest token (default: %(default)s)")
    flag("--top_k", type=int, default=0, metavar="K", help="draw from the K likeliest tokens only; 0: from all (default: %(default)s)")
    flag("--top_p", type=float, default=1.0, metavar="P",
         help="of these only from the likeliest few that have probability P together; 1: from all (default: %(default)s)")
    flag("--seed", type=int, default=0, metavar="N", help="of the draws (default: %(default)s)")
    flag("--tokenizer", metavar="DIR", help="folder of the tokenizer's files (default: that of the run's shards)")
    flag("--bench", type=int, nargs="?", const=1024, metavar="N",
         help="time a row of N tokens, 1024 if not said; without --checkpoint of the demo's shape, random weights")
    args = parser.parse_args(argv)
    def need(ok, name, wanted):
        if not ok:
            fail(f"--{name}={getattr(args, name)}: wanted {wanted}")
    need(args.checkpoint or args.bench, "checkpoint", "a run's folder, as logs/20260101T000000Z-abcdef")
    need(args.prompt is None or not args.interactive, "prompt", "it or --interactive, not both")
    for name in ("num_samples", "max_new_tokens"):
        need(getattr(args, name) >= 1, name, "at least 1")
    need(args.temperature == 0 or 1e-6 <= args.temperature < float("inf"), "temperature", "0, or at least 1e-6")
    need(args.top_k >= 0, "top_k", "0 or more")
    need(0 < args.top_p <= 1, "top_p", "more than 0, at most 1")
    need(0 <= args.seed < 1 << 31, "seed", "0 or more, below 2^31")
    need(args.bench is None or args.bench >= 3, "bench", "at least 3 tokens")
    return args

def prompts(args):
    """Raises UsageError for a file that cannot be read."""
    if not args.interactive:
        text = args.prompt or ""
        with usage_errors(f"--prompt={text}: wanted a file of UTF-8 text"):
            yield Path(text[len("FILE:"):]).read_text(encoding="utf-8") if text.startswith("FILE:") else text
    while args.interactive:
        if sys.stdin.isatty():
            print("prompt> ", end="", file=sys.stderr, flush=True)
        if not (line := sys.stdin.readline().rstrip("\n")):
            return
        yield line

def main(argv=None):
    """Raises UsageError."""
    args = parse(sys.argv[1:] if argv is None else argv)
    choice, tell = Choice(args.temperature, args.top_k, args.top_p), functools.partial(print, file=sys.stderr, flush=True)
    if not args.checkpoint:
        cfg = choose_attention(replace(DEMO, vocab_size=257, bos_id=256), jax.default_backend())
        return bench(random_weights(cfg), cfg, args.bench, choice, args.seed)
    trained = open_checkpoint(args.checkpoint)
    cfg, weights = trained.cfg, trained.weights()
    if args.bench:
        return bench(weights, cfg, args.bench, choice, args.seed)
    tokenizer = open_tokenizer(trained.meta, args.tokenizer or folder_of_run(cfg))
    tell(f"{trained.folder}, step {trained.step}: {count_params(param_specs(cfg))} parameters, tokenizer {tokenizer.name}")
    def write(text):
        print(text, end="", flush=True)
    longest = max(stage.seq_len for stage in (*cfg.stages, cfg.val))
    try:
        for i, prompt in enumerate(prompts(args)):
            try:
                ids = [cfg.bos_id, *tokenizer.encode(prompt)]
            except UsageError as error:  # a character that the model's alphabet lacks
                if not args.interactive:
                    raise
                tell(f"error: {error}")
                continue
            if len(ids) + args.max_new_tokens > longest:
                tell(f"note: {len(ids)} tokens and {args.max_new_tokens} more pass {longest}, the longest row of this run, "
                     "from where the text may get worse")
            tokens = generate(weights, ids, args.max_new_tokens, args.num_samples, choice, args.seed + i, cfg)
            _, others, prefill_s, decode_s = write_texts(tokens, prompt, tokenizer, args.num_samples, write)
            tell(f"prefill: {len(ids)} tokens in {prefill_s:.3f} s, {len(ids) / prefill_s:.0f} tokens/s; "
                 f"decode: {others} tokens in {decode_s:.3f} s, {others / decode_s:.0f} tokens/s")
    except BrokenPipeError:  # as by `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter complains when it flushes

if __name__ == "__main__":
    sys.exit(command(main))
