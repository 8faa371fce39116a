"""scripts/dry_run: estimate.py, hlo.py and bundles.py: against costs counted by hand."""

import re

import pytest

from scripts.dry_run import bundles
from scripts.dry_run.bundles import count, one_of_chain, one_of_chain_then_last
from scripts.dry_run.estimate import CHIPS, Row, UncostedKernel, estimate, main, waits
from scripts.dry_run.hlo import Module, valid_positions
from train import command

CHIP = CHIPS["v6e"]


def exactly(value):
    return pytest.approx(value, rel=1e-9)


# ---- Programs ----
# fmt: off
PROGRAM = """HloModule jit_f, is_scheduled=true

%fused_matmul (p0: bf16[256,512], p1: bf16[512,384]) -> bf16[256,384] {
  %p0 = bf16[256,512]{1,0} parameter(0)
  %p1 = bf16[512,384]{1,0} parameter(1)
  ROOT %convolution.1 = bf16[256,384]{1,0} convolution(%p0, %p1), dim_labels=bf_io->bf
}

%fused_slice (p0.1: f32[64,1024], p1.1: s32[]) -> f32[1,1024] {
  %p0.1 = f32[64,1024]{1,0} parameter(0)
  %p1.1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice.1 = f32[1,1024]{1,0} dynamic-slice(%p0.1, %p1.1, %zero), dynamic_slice_sizes={1,1024}
}

%body (s: (s32[], bf16[256,512], bf16[512,384])) -> (s32[], bf16[256,512], bf16[512,384]) {
  %s = (s32[], bf16[256,512]{1,0}, bf16[512,384]{1,0:S(1)}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = bf16[256,512]{1,0} get-tuple-element(%s), index=1
  %w = bf16[512,384]{1,0:S(1)} get-tuple-element(%s), index=2
  %fusion.1 = bf16[256,384]{1,0:S(1)} fusion(%x, %w), calls=%fused_matmul, backend_config={"estimated_cycles":"7000"}
  %all-reduce.1 = f32[1024]{0} all-reduce(%big), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %t = (s32[], bf16[256,512]{1,0}, bf16[512,384]{1,0:S(1)}) tuple(%i, %x, %w)
}

%condition (c: (s32[], bf16[256,512], bf16[512,384])) -> pred[] {
  %c = (s32[], bf16[256,512]{1,0}, bf16[512,384]{1,0:S(1)}) parameter(0)
  %limit = s32[] constant(5)
  %n = s32[] get-tuple-element(%c), index=0
  ROOT %less = pred[] compare(%n, %limit), direction=LT
}

ENTRY %main (a: f32[64,1024], b: s32[]) -> f32[1,1024] {
  %a = f32[64,1024]{1,0} parameter(0)
  %b = s32[] parameter(1)
  %loop = (s32[], bf16[256,512]{1,0}, bf16[512,384]{1,0:S(1)}) while(%start), condition=%condition, body=%body
  %copy-start.1 = (f32[64,1024]{1,0:S(1)}, f32[64,1024]{1,0}, u32[]) copy-start(%a)
  %gather.1 = f32[512,64]{1,0} all-gather(%part), replica_groups=[1,8]<=[8], dimensions={0}
  ROOT %fusion.2 = f32[1,1024]{1,0} fusion(%a, %b), kind=kLoop, calls=%fused_slice
}
"""  # noqa: E501
# fmt: on


def test_a_program_costs_what_a_count_by_hand_says():
    cost = estimate(Module(PROGRAM))
    flops = 2 * 256 * 512 * 384
    x_bytes = 2 * 256 * 512  # w and the result lie in VMEM
    matmul_low = max(flops / CHIP.flops, x_bytes / CHIP.bandwidth)
    matmul_high = 7000 / CHIP.clock
    slice_bytes = 2 * 4096 + 4  # one row read, one written, the index
    slice_s = slice_bytes / CHIP.bandwidth
    prefetch = 4 * 64 * 1024
    reduce_sent = 2 * 3 / 4 * 4096
    gather_sent = 7 / 8 * 4 * 512 * 64
    sync = 5 * (reduce_sent / (2 * CHIP.link) + 3e-6) + gather_sent / (2 * CHIP.link) + 3e-6
    hbm_bytes = 5 * x_bytes + slice_bytes + prefetch
    low = max(5 * matmul_low + slice_s, hbm_bytes / CHIP.bandwidth) + sync
    high = max(5 * matmul_high + slice_s, hbm_bytes / CHIP.bandwidth) + sync
    assert cost.flops == 5 * flops
    assert cost.hbm_bytes == hbm_bytes and cost.prefetch_bytes == prefetch
    assert cost.sent_bytes == exactly(5 * reduce_sent + gather_sent)
    assert cost.sync_s == exactly(sync)
    assert (cost.low_s, cost.high_s) == (exactly(low), exactly(high))
    assert cost.est_s == exactly((low + high) / 2)
    assert [row.name for row in cost.rows if row.in_loop] == ["fusion.1", "all-reduce.1"]
    assert estimate(Module(PROGRAM), "v5e").est_s > cost.est_s  # a chip with less of everything


def test_products_of_int8_have_a_peak_of_their_own():
    int8 = PROGRAM.replace("bf16[256,512]", "s8[256,512]").replace("bf16[512,384]", "s8[512,384]")
    mixed = PROGRAM.replace("bf16[256,512]", "s8[256,512]")  # one operand of bf16: no int8
    seconds = 2 * 256 * 512 * 384 / 1836e12
    for text, wanted in ((int8, seconds), (mixed, 2 * seconds), (PROGRAM, 2 * seconds)):
        text = text.replace("[256,512]{1,0}", "[256,512]{1,0:S(1)}")  # no HBM bytes
        (matmul,) = (row for row in estimate(Module(text)).rows if row.kind == "matmul")
        assert matmul.low_s == exactly(wanted)
        assert matmul.high_s == exactly(7000 / CHIP.clock)


CONVOLUTION = """HloModule m
ENTRY %main (x: f32[2,INPUTS,3], w: f32[SIZE,3,5]) -> f32[2,OUTPUTS,5] {
  %x = f32[2,INPUTS,3]{2,1,0} parameter(0)
  %w = f32[SIZE,3,5]{2,1,0} parameter(1)
  ROOT %y = f32[2,OUTPUTS,5]{2,1,0} convolution(%x, %w), window={WINDOW}, dim_labels=b0f_0io->b0f
}
"""


def test_a_convolution_counts_the_products_with_elements_that_exist():
    for axis, inputs, outputs in (
        ((4, 1, 1, 1, 0), 16, 13),
        ((4, 1, 1, 1, 3), 16, 16),
        ((4, 1, 1, 1, 1), 8, 8),  # padded on both sides
        ((8, 7, 1, 8, 0), 8, 8),  # how a batch is written as an axis of a convolution
        ((3, 2, 2, 3, -1), 9, 10),
        ((5, 3, 2, 3, 4), 7, 6),
    ):
        size, stride, dilation, in_dilation, pad = axis
        real = {place * in_dilation for place in range(inputs)}
        places = [o * stride + k * dilation - pad for o in range(outputs) for k in range(size)]
        wanted = sum(place in real for place in places)
        assert valid_positions(axis, inputs, outputs) == wanted
        window = f"size={size} stride={stride} pad={pad}_0 rhs_dilate={dilation}"
        text = CONVOLUTION.replace("WINDOW", f"{window} lhs_dilate={in_dilation}")
        for name, value in (("INPUTS", inputs), ("OUTPUTS", outputs), ("SIZE", size)):
            text = text.replace(name, str(value))
        assert estimate(Module(text)).flops == 2 * 2 * 3 * 5 * wanted


KERNEL = """HloModule m
ENTRY %main (x: f32[1024,1024]) -> f32[1024,1024] {
  %x = f32[1024,1024]{1,0} parameter(0)
  ROOT %band.3 = f32[1024,1024]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", CONFIG
}
"""
STATED = '{"flops":"4000000000","transcendentals":"0","bytes_accessed":"8388608"}'
CONFIG = f'backend_config={{"custom_call_config":{{"body":"TUzv","cost_estimate":{STATED}}}}}'


def test_a_kernel_counts_by_its_bundles_but_not_below_its_roofline():
    module = Module(KERNEL.replace("CONFIG", CONFIG))
    transfer = 8388608 / CHIP.bandwidth
    roofline = max(4e9 / CHIP.flops, transfer)
    plain = estimate(module)
    assert plain.low_s == exactly(roofline)
    assert plain.kernel_s == exactly(max(4e9 / (0.7 * CHIP.flops), transfer))
    counted = estimate(module, bundles={"band.3": 20e-6})
    assert counted.kernel_s == counted.est_s == exactly(23e-6)
    assert (counted.low_s, counted.high_s) == (exactly(20e-6), exactly(26e-6))
    assert estimate(module, bundles={"band.3": 1e-9}).est_s == exactly(roofline)
    seconds = {bundles.identity(next(module.kernels())): 1e-3}
    assert bundles.by_instruction(module, seconds) == {"band.3": 1e-3}


def test_a_kernel_without_a_cost_estimate_is_an_error():
    with pytest.raises(UncostedKernel, match="band.3 has no cost_estimate"):
        estimate(Module(KERNEL.replace("CONFIG", "")))


def test_an_asynchronous_collective_is_waited_for_as_far_as_nothing_computes_meanwhile():
    def start(name, seconds):
        return Row(name, "async collective", link_s=seconds)

    def work(seconds):
        return Row("f", "fusion", low_s=seconds, high_s=seconds)

    def done(name):
        return Row(name, "done")

    assert waits([start("a", 5.0), work(2.0), done("a")]) == 3.0
    assert waits([start("a", 5.0), work(7.0), done("a")]) == 0.0
    both = [start("a", 5.0), start("b", 4.0), work(6.0), done("a"), done("b")]
    assert waits(both) == 3.0  # one after the other on the links


def test_the_command_prints_the_dearest_instructions_and_refuses_in_one_sentence(tmp_path, capsys):
    (tmp_path / "step.hlo").write_text(PROGRAM)

    def run(*arguments):
        code = command(lambda: main(list(map(str, arguments))))
        return code, *capsys.readouterr()

    code, out, _ = run(tmp_path / "step.hlo", "v5e")
    assert code == 0 and "fusion.1" in out
    windows = PROGRAM.replace("\n", "\r\n").encode("utf-8-sig")
    (tmp_path / "windows.hlo").write_bytes(windows)
    assert run(tmp_path / "windows.hlo", "v5e") == (0, out, "")
    half = PROGRAM.rstrip("}\n")  # the last computation does not end
    in_a_line = PROGRAM.replace(" = s32[] get-tuple-element(%s), index=0", " = s32[]get", 1)
    strange = {
        "half.hlo": (half.encode(), rf"line {half.count(chr(10)) + 1}: it ends before the ENTRY"),
        "line.hlo": (in_a_line.encode(), r"line 18: no instruction: '  %i = s32\[\]get'"),
        "none.hlo": (b"", "line 1: it ends before"),
        "latin.hlo": (b"\n\xe9" + windows, "line 2: no UTF-8 text"),
    }
    for name, (blob, _) in strange.items():
        (tmp_path / name).write_bytes(blob)
    refused = [((tmp_path / name,), f"{name}, {words}") for name, (_, words) in strange.items()]
    refused += [((tmp_path / "no.hlo",), "No such file"), ((tmp_path / "step.hlo", "v9"), "v9")]
    for arguments, words in refused:
        code, _, err = run(*arguments)
        assert code == 2 and err.startswith("error: ") and err.count("\n") == 1
        assert re.search(words, err), err


# ---- Bundles ----
class Writer:
    """Writes the text of a kernel's bundles."""

    def __init__(self):
        self.lines = []

    def add(self, number, words="", comment=""):
        """Bundles, the first one with words and a comment."""
        for k in range(number):
            address = hex(len(self.lines)) if self.lines else "   0"
            first = f"{words} }} {comment}" if k == 0 else "}"
            self.lines.append(f"  {address}   : > {{ {first}")


def listing(inner_loop=False):
    """10 bundles; a loop of 5, a guarded body of 20 and a chain of branches, and 7 behind it."""
    text = Writer()
    text.add(10)
    text.add(5, comment="/* Start region 3 */")
    text.add(5, words="%185 = sbr.rel (%p182_p1) target = $region58")  # and its delay slots
    text.add(20, comment="/* Start region 55 */")
    for k, size in enumerate([70, 80, 90]):
        text.add(1, words=f"%p9{k} = scmp.ne.s32.totalorder %s938_s25, {k}")
        text.add(5, words=f"%25{k} = sbr.rel (%p9{k}) target = $region10{k}")
        text.add(size, comment=f"/* End region 9 :: Start region 20{k} */")
        text.add(1, comment=f"/* Start/End empty region 10{k} :: Start region 67 */")
    if inner_loop:
        text.add(6, comment="/* Start region 77 */")
        text.add(5, words="%9 = sbr.rel (!%p8_p3) target = $region77")
    text.add(2, comment="/* Start/End empty region 58 */")
    text.add(5, words="%10 = sbr.rel (!%p8_p3) target = $region3")
    return bundles.parse("\n".join(text.lines))


FIXED = 5 + 5 + 20 + 3 * 7 + 7  # of the grid loop, without the bodies of the chain


def test_bundles_of_a_grid_step_are_those_of_the_loop_as_often_as_they_run():
    assert listing().num_bundles == 10 + FIXED + 240
    assert count(listing()) == FIXED + 240
    assert count(listing(), lambda branches: [0.5, 0, 0.25]) == FIXED + 35 + 22.5
    assert count(listing(), lambda branches: [0]) == FIXED + 170
    assert count(listing(), one_of_chain(8)) == FIXED + (70 + 80 + 90 * 6) / 8
    wanted = FIXED + (70 + 80 * 8 + 90) / 9
    assert count(listing(), one_of_chain_then_last(9)) == exactly(wanted)
    assert count(listing(inner_loop=True), trips=[3]) == FIXED + 240 + 3 * 11
    assert one_of_chain_then_last(1)([]) == [] == one_of_chain(1)([])  # rows of one step


def test_a_branch_or_loop_that_nobody_described_is_an_error():
    with pytest.raises(ValueError, match="4 weights for 3 branches"):
        count(listing(), lambda branches: [1] * 4)
    with pytest.raises(ValueError, match="1 loops inside the kernel, but 0 trip counts"):
        count(listing(inner_loop=True))
