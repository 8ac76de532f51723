"""Shuffles under conditions that lanes decide for themselves are found in PTX, and only those."""

import pytest

from bench.machine_code.convergence import divergent_shuffles

OWN = "shfl.sync.idx.b32 %r9, %r8, %r1, 0x100f, 0xffffffff;"
SHUFFLE = f"""
	// begin inline asm
	{OWN}
	// end inline asm
"""
BUTTERFLY = """
	and.b32 %r10, %r1, {bits};
	ld.shared.b32 %r11, [%r10];
	shfl.sync.bfly.b32 %r12, %r11, 2, 31, -1;
	add.s32 %r13, %r11, %r12;
	shfl.sync.bfly.b32 %r15, %r13, 1, 31, -1;
	add.s32 %r14, %r13, %r15;
"""


def kernel(body):
    return f"""
//
.version 8.0
.target sm_80
.visible .entry kernel(
	.param .u64 .ptr .global .align 16 kernel_param_0,
	.param .u32 kernel_param_1
)
.reqntid 128
{{
	.reg .pred %p<9>;
	.reg .b32 %r<20>;
	.loc	1 10 0
	mov.u32 	%r1, %tid.x;
	mov.u32 	%r2, %ctaid.x;
	ld.param.b32 %r3, [kernel_param_1];
	ld.param.b64 %rd1, [kernel_param_0];
{body}
$L__func_end0:
	ret;
}}
"""


def under(condition, inside=SHUFFLE):
    return kernel(f"""
	{condition}
	@%p1 bra 	$L__BB0_2;
// %bb.1:
	{inside}
$L__BB0_2:
	st.global.b32 [%rd1], %r9;""")


FOUND = {
    "a branch by thread": under("setp.lt.u32 %p1, %r1, 7;"),
    "by lane": under("mov.u32 %r5, %laneid;\n setp.eq.b32 %p1, %r5, 0;"),
    "by shifted bits of the lane": under("shl.b32 %r6, %r1, 2;\n and.b32 %r5, %r6, 192;\n setp.eq.b32 %p1, %r5, 0;"),
    "by a bit at the lane's place": under("shl.b32 %r5, 1, %r1;\n setp.eq.b32 %p1, %r5, 0;"),
    "by bits of the lane": under("and.b32 %r5, %r1, 48;\n setp.eq.b32 %p1, %r5, 0;"),
    "by too few bits": under("shr.u32 %r5, %r1, 4;\n setp.eq.b32 %p1, %r5, 0;"),
    "by what a lane loaded": under(
        "mul.wide.u32 %rd2, %r1, 4;\n add.s64 %rd3, %rd1, %rd2;\n ld.global.b32 { %r5 }, [ %rd3 + 0 ];\n"
        " setp.eq.b32 %p1, %r5, 0;"
    ),
    "by what a lane got from others": under(f"{SHUFFLE}\n setp.eq.b32 %p1, %r9, 0;"),
    "by a sum over those that lanes choose": under("redux.sync.add.s32 %r5, %r2, %r1;\n setp.eq.b32 %p1, %r5, 0;"),
    "by a sum over half of the lanes that differ": under(BUTTERFLY.format(bits=7) + " setp.eq.b32 %p1, %r14, 0;"),
    "by a difference from the lane beside": under(
        BUTTERFLY.format(bits=1).replace("add.s32 %r14", "sub.s32 %r14") + " setp.eq.b32 %p1, %r14, 0;"
    ),
    "by an election": under("elect.sync %r5|%p1, 0xffffffff;"),
    "a predicate on the shuffle": kernel(
        f"setp.lt.u32 %p1, %r1, 7;\n// begin inline asm\n @!%p1 {OWN}\n// end inline asm"
    ),
    "a branch in a branch": under(
        "setp.lt.u32 %p1, %r1, 7;",
        f"setp.lt.u32 %p2, %r2, 7;\n @%p2 bra $L__BB0_3;\n {SHUFFLE}\n$L__BB0_3:\n mov.b32 %r4, 0;",
    ),
    "a loop that lanes leave one by one": kernel(f"""
	mov.b32 %r5, 0;
$L__BB0_1:
	{SHUFFLE}
	add.s32 %r5, %r5, 1;
	setp.lt.u32 %p1, %r5, %r1;
	@%p1 bra $L__BB0_1;"""),
    "a number written under such a branch": kernel(f"""
	mov.b32 %r5, 0;
	setp.lt.u32 %p1, %r1, 7;
	@%p1 bra $L__BB0_1;
	mov.b32 %r5, 1;
$L__BB0_1:
	setp.eq.b32 %p2, %r5, 1;
	@%p2 bra $L__BB0_2;
	{SHUFFLE}
$L__BB0_2:
	mov.b32 %r4, 0;"""),
    "after lanes have left the kernel": kernel(f"setp.lt.u32 %p1, %r1, 7;\n @%p1 ret;\n {SHUFFLE}"),
}
FINE = {
    "no branch": kernel(SHUFFLE),
    "before and behind a branch by lane": kernel(f"""
	{SHUFFLE}
	setp.lt.u32 %p1, %r1, 7;
	@%p1 bra $L__BB0_1;
	st.global.b32 [%rd1], %r9;
$L__BB0_1:
	{SHUFFLE}"""),
    "the compiler's own shuffle": under("setp.lt.u32 %p1, %r1, 7;", OWN),
    "by program": under("setp.lt.u32 %p1, %r2, 7;"),
    "by an argument": under("setp.lt.s32 %p1, %r3, 7;"),
    "by warp": under("shr.u32 %r5, %r1, 5;\n setp.eq.b32 %p1, %r5, 2;"),
    "by shifted bits of the warp": under("shl.b32 %r6, %r1, 2;\n and.b32 %r5, %r6, 384;\n setp.eq.b32 %p1, %r5, 0;"),
    "by bits of the warp": under("and.b32 %r5, %r1, 96;\n setp.eq.b32 %p1, %r5, 0;"),
    "by what all lanes loaded": under("ld.global.b32 { %r5 }, [ %rd1 + 0 ];\n setp.eq.b32 %p1, %r5, 0;"),
    "by one lane's value": under("shfl.sync.idx.b32 %r5, %r1, 0, 31, -1;\n setp.eq.b32 %p1, %r5, 0;"),
    "by a sum over all lanes that differ": under(BUTTERFLY.format(bits=3) + " setp.eq.b32 %p1, %r14, 0;"),
    "by a sum over the warp": under("redux.sync.add.s32 %r5, %r1, -1;\n setp.eq.b32 %p1, %r5, 0;"),
    "a loop of as many turns for all": kernel(f"""
	mov.b32 %r5, 0;
	setp.lt.s32 %p2, %r3, 1;
	@%p2 bra $L__BB0_2;
$L__BB0_1:                              // =>This Inner Loop Header: Depth=1
$L__tmp2:
	{SHUFFLE}
	add.s32 %r5, %r5, 1;
	setp.lt.u32 %p1, %r5, %r3;
	@%p1 bra $L__BB0_1;
$L__BB0_2:"""),
    "between waits of one name": kernel(f"""
	{{
	.reg .pred complete;
	waitLoop:
	mbarrier.try_wait.parity.shared::cta.b64 complete, [%r3], %r2;
	@!complete bra.uni waitLoop;
	}}
	{SHUFFLE}
	{{
	.reg .pred complete;
	waitLoop:
	mbarrier.try_wait.parity.shared::cta.b64 complete, [%r3], %r2;
	@!complete bra.uni waitLoop;
	}}"""),
    "beside a branch by lane": under(
        "setp.lt.u32 %p1, %r2, 7;",
        f"setp.lt.u32 %p2, %r1, 7;\n @%p2 bra $L__BB0_3;\n mov.b32 %r6, 1;\n$L__BB0_3:\n {SHUFFLE}",
    ),
}


@pytest.mark.parametrize("text", FOUND.values(), ids=FOUND)
def test_what_lanes_may_disagree_on_is_found(text):
    assert divergent_shuffles(text)


@pytest.mark.parametrize("text", FINE.values(), ids=FINE)
def test_what_a_warp_agrees_on_is_not(text):
    assert divergent_shuffles(text) == []


def test_text_that_is_no_instruction_is_refused():
    with pytest.raises(ValueError, match="not an instruction"):
        divergent_shuffles(kernel("1 + 1;"))
