"""scripts/estimate.py and scripts/bundles.py: against costs counted by hand."""
import pytest

from scripts import bundles
from scripts.bundles import Span, count, one_of_chain, one_of_chain_then_last
from scripts.estimate import CHIPS, Row, UncostedKernel, estimate, report, waits

CHIP = CHIPS["v6e"]

def ms(seconds): return pytest.approx(seconds, rel=1e-12)

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
  %fusion.1 = bf16[256,384]{1,0:S(1)} fusion(%x, %w), kind=kOutput, calls=%fused_matmul, metadata={op_name="jit(f)/while/body/dot"}, backend_config={"estimated_cycles":"7000"}
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
"""

def test_a_program_costs_what_a_count_by_hand_says():
    result = estimate(PROGRAM)
    flops, x_bytes = 2 * 256 * 512 * 384, 2 * 256 * 512  # w and the result lie in VMEM
    matmul_low, matmul_high = max(flops / CHIP.flops, x_bytes / CHIP.bandwidth), 7000 / CHIP.clock
    slice_s, prefetch = 2 * 4096 / CHIP.bandwidth, 4 * 64 * 1024  # one row read, one written
    reduce_sent, gather_sent = 2 * 3 / 4 * 4096, 7 / 8 * 4 * 512 * 64
    sync = 5 * (reduce_sent / (2 * CHIP.link) + 3e-6) + gather_sent / (2 * CHIP.link) + 3e-6
    hbm = 5 * x_bytes + 8192 + prefetch + 4  # and the index
    low, high = max(5 * matmul_low + slice_s, hbm / CHIP.bandwidth), max(5 * matmul_high + slice_s, hbm / CHIP.bandwidth)
    assert result["flops"] == 5 * flops
    assert result["hbm_bytes"] == pytest.approx(hbm) and result["prefetch_bytes"] == prefetch
    assert result["sent_bytes"] == ms(5 * reduce_sent + gather_sent) and result["sync_s"] == ms(sync)
    assert result["low_s"] == pytest.approx(low + sync, rel=1e-6) and result["high_s"] == pytest.approx(high + sync, rel=1e-6)
    assert result["est_s"] == pytest.approx((low + high) / 2 + sync, rel=1e-6)
    assert [row.name for row in result["rows"] if row.in_loop] == ["fusion.1", "all-reduce.1"]
    assert "fusion.1" in report(result)

def test_a_chip_with_half_the_peak_takes_longer():
    assert estimate(PROGRAM, "v5e")["est_s"] > estimate(PROGRAM)["est_s"]

@pytest.mark.parametrize("attributes, taps", [("window={size=4 pad=0_0}", 13 * 4), ("window={size=4 pad=3_0}", 4 * 16 - 6)])
def test_a_convolution_counts_only_the_taps_that_meet_its_input(attributes, taps):
    out = 13 if "0_0" in attributes else 16
    text = f"""HloModule m
ENTRY %main (x: f32[2,16,3], w: f32[4,3,5]) -> f32[2,{out},5] {{
  %x = f32[2,16,3]{{2,1,0}} parameter(0)
  %w = f32[4,3,5]{{2,1,0}} parameter(1)
  ROOT %y = f32[2,{out},5]{{2,1,0}} convolution(%x, %w), {attributes}, dim_labels=b0f_0io->b0f
}}
"""
    assert estimate(text)["flops"] == 2 * 2 * 3 * 5 * taps

KERNEL = """HloModule m
ENTRY %main (x: f32[1024,1024]) -> f32[1024,1024] {
  %x = f32[1024,1024]{1,0} parameter(0)
  ROOT %band_fwd.3 = f32[1024,1024]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"body":"TUzv"COST}}
}
"""
COST = ',"cost_estimate":{"flops":"4000000000","transcendentals":"0","bytes_accessed":"8388608"}'

def test_a_kernel_without_a_cost_estimate_is_an_error():
    with pytest.raises(UncostedKernel, match="band_fwd.3 has no cost_estimate"):
        estimate(KERNEL.replace("COST", ""))

def test_a_kernel_counts_by_its_bundles_but_not_below_its_roofline():
    text = KERNEL.replace("COST", COST)
    plain, roofline = estimate(text), max(4e9 / CHIP.flops, 8388608 / CHIP.bandwidth)
    assert plain["low_s"] == ms(roofline) and plain["kernel_s"] == ms(max(4e9 / (0.7 * CHIP.flops), 8388608 / CHIP.bandwidth))
    counted = estimate(text, bundles={"band_fwd.3": 20e-6})
    assert counted["kernel_s"] == counted["est_s"] == ms(23e-6) and counted["low_s"] == ms(20e-6) and counted["high_s"] == ms(26e-6)
    assert estimate(text, bundles={"band_fwd.3": 1e-9})["est_s"] == ms(roofline)

# ---- Bundles ----
def listing(inner_loop=False, chain=(70, 80, 90)):
    """A kernel's text: 10 bundles, a loop of 5, a guarded body of 20 and the chain's branches, and 7 behind it."""
    lines, address = [], 0
    def bundle(words="", comment=""):
        nonlocal address
        lines.append(f"  {hex(address) if address else '   0'} {'LB' if 'region 3' in comment else '  '}: > {{ {words} }} {comment}")
        address += 1
    def bundles_of(number, **first):
        for k in range(number):
            bundle(**(first if k == 0 else {}))
    bundles_of(10)
    bundles_of(5, comment="/* Start region 3 */")
    bundles_of(5, words="%185 = sbr.rel (%p182_p1) target = $region58")  # and its delay slots
    bundles_of(20, comment="/* Start region 55 */")
    for k, size in enumerate(chain):
        bundle(words=f"%p9{k} = scmp.ne.s32.totalorder %s938_s25, {k}")
        bundles_of(5, words=f"%25{k} = sbr.rel (%p9{k}) target = $region10{k}")
        bundles_of(size, comment=f"/* End region 9 :: Start region 20{k} */")
        bundles_of(1, comment=f"/* Start/End empty region 10{k} :: Start region 67 */")
    if inner_loop:
        bundles_of(6, comment="/* Start region 77 */")
        bundles_of(5, words="%9 = sbr.rel (!%p8_p3) target = $region77")
    bundles_of(2, comment="/* Start/End empty region 58 */")
    bundles_of(5, words="%10 = sbr.rel (!%p8_p3) target = $region3")
    return bundles.parse("\n".join(lines))

FIXED = 5 + 5 + 20 + 3 * 7 + 7  # of the grid loop, without the chain's bodies

def test_bundles_of_a_grid_step_are_those_of_the_loop():
    assert listing().num_bundles == 10 + FIXED + 240 and count(listing()) == FIXED + 240

def test_a_branch_counts_as_often_as_it_runs():
    assert count(listing(), [0.5, 0, 0.25]) == FIXED + 35 + 22.5
    assert count(listing(), [0]) == FIXED + 170
    assert count(listing(), one_of_chain(8)) == FIXED + 70 / 8 + 80 / 8 + 90 * 6 / 8
    assert count(listing(), one_of_chain_then_last(9)) == pytest.approx(FIXED + (70 + 80 * 8 + 90) / 9)

def test_in_a_row_of_one_step_there_are_no_branches_left_to_weigh():
    assert one_of_chain_then_last(1)([]) == [] == one_of_chain(1)([])

def test_a_branch_or_loop_that_nobody_described_is_an_error():
    with pytest.raises(ValueError, match="4 weights for 3 branches"):
        count(listing(), [1] * 4)
    with pytest.raises(ValueError, match="1 counted loops inside the kernel, but 0 trip counts"):
        count(listing(inner_loop=True))
    assert count(listing(inner_loop=True), trips=[3]) == FIXED + 240 + 3 * 11

def test_a_span_holds_those_inside_it_but_not_itself():
    assert Span(0, 10).holds(Span(2, 10)) and not Span(0, 10).holds(Span(0, 10)) and not Span(0, 10).holds(Span(5, 11))


def test_an_asynchronous_collective_is_waited_for_as_far_as_nothing_computes_between_its_start_and_its_end():
    start = lambda name, seconds: Row(name, "async collective", 1, link_s=seconds)
    work, done = lambda seconds: Row("f", "fusion", 1, low_s=seconds, high_s=seconds), lambda name: Row(name, "done", 1)
    assert waits([start("a", 5.0), work(2.0), done("a")]) == 3.0
    assert waits([start("a", 5.0), work(7.0), done("a")]) == 0.0
    assert waits([start("a", 5.0), start("b", 4.0), work(6.0), done("a"), done("b")]) == 3.0  # one after the other on the links
