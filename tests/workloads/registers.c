/* Every register of a thread that never enters the kernel by itself: general, x87, mxcsr, and as much of
 * xmm/ymm/zmm/k as the processor has. The loop loads them once and then touches none of them, so whatever
 * a checkpoint did to one of them at any instant is still there when it ends. */
#include "workload.h"

uint64_t spins, spin_stop, in_gpr[16], out_gpr[16], in_k[8], out_k[8], out_flags, spin_rsp;
uint8_t in_v[32][64] __attribute__((aligned(64))), out_v[32][64] __attribute__((aligned(64)));
uint32_t in_mxcsr, out_mxcsr;
uint16_t in_cw, out_cw;
double in_x87[8], out_x87[8];
void spin512(void), spin256(void), spin128(void);

#define SPIN(name, nv, width, mov, reg) \
	".globl " name "\n" name ":\n" \
	"	push %rbx\n push %rbp\n push %r12\n push %r13\n push %r14\n push %r15\n" \
	"	mov %rsp, spin_rsp(%rip)\n" \
	"	ldmxcsr in_mxcsr(%rip)\n	fninit\n	fldcw in_cw(%rip)\n" \
	"	.irp i,7,6,5,4,3,2,1,0\n	fldl in_x87+8*\\i(%rip)\n	.endr\n" \
	"	.irp i," nv "\n	" mov " in_v+64*\\i(%rip), %" reg "\\i\n	.endr\n" \
	"	.if " width " == 64\n	.irp i,0,1,2,3,4,5,6,7\n	kmovq in_k+8*\\i(%rip), %k\\i\n	.endr\n	.endif\n" \
	"	mov in_gpr+0(%rip), %rax\n	mov in_gpr+8(%rip), %rbx\n	mov in_gpr+16(%rip), %rcx\n	mov in_gpr+24(%rip), %rdx\n" \
	"	mov in_gpr+32(%rip), %rsi\n	mov in_gpr+40(%rip), %rdi\n	mov in_gpr+48(%rip), %rbp\n" \
	"	.irp i,8,9,10,11,12,13,14,15\n	mov in_gpr+8*\\i(%rip), %r\\i\n	.endr\n" \
	"	std\n" /* the direction flag is a register too */ \
	"1:	incq spins(%rip)\n	cmpl $0, spin_stop(%rip)\n	je 1b\n" \
	"	mov %rsp, out_gpr+56(%rip)\n	mov spin_rsp(%rip), %rsp\n" \
	"	mov %rax, out_gpr+0(%rip)\n	pushf\n	pop %rax\n	mov %rax, out_flags(%rip)\n	cld\n" \
	"	mov %rbx, out_gpr+8(%rip)\n	mov %rcx, out_gpr+16(%rip)\n	mov %rdx, out_gpr+24(%rip)\n" \
	"	mov %rsi, out_gpr+32(%rip)\n	mov %rdi, out_gpr+40(%rip)\n	mov %rbp, out_gpr+48(%rip)\n" \
	"	.irp i,8,9,10,11,12,13,14,15\n	mov %r\\i, out_gpr+8*\\i(%rip)\n	.endr\n" \
	"	.if " width " == 64\n	.irp i,0,1,2,3,4,5,6,7\n	kmovq %k\\i, out_k+8*\\i(%rip)\n	.endr\n	.endif\n" \
	"	.irp i," nv "\n	" mov " %" reg "\\i, out_v+64*\\i(%rip)\n	.endr\n" \
	"	fnstcw out_cw(%rip)\n	stmxcsr out_mxcsr(%rip)\n" \
	"	.irp i,0,1,2,3,4,5,6,7\n	fstpl out_x87+8*\\i(%rip)\n	.endr\n" \
	"	fninit\n	push $0x1f80\n	ldmxcsr (%rsp)\n	pop %rax\n" \
	"	.if " width " >= 32\n	vzeroupper\n	.endif\n" \
	"	pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbp\n pop %rbx\n	ret\n"
#define V16 "0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15"
asm(".text\n" SPIN("spin512", V16 ",16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31", "64", "vmovdqu64", "zmm")
	SPIN("spin256", V16, "32", "vmovdqu", "ymm") SPIN("spin128", V16, "16", "movdqu", "xmm"));

static int width, vectors;
static void *run(void *unused)
{
	sigset_t all;
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, 0);
	if (width == 64) spin512();
	else if (width == 32) spin256();
	else spin128();
	return unused;
}

int main(int argc, char **argv)
{
	begin(argc, argv);
	__builtin_cpu_init();
	width = __builtin_cpu_supports("avx512bw") ? 64 : __builtin_cpu_supports("avx") ? 32 : 16;
	vectors = width == 64 ? 32 : 16;
	fill(in_gpr, sizeof in_gpr, 41);
	fill(in_v, sizeof in_v, 42);
	fill(in_k, sizeof in_k, 43);
	in_mxcsr = 0x1f80 | 0x8040 | 0x6000; /* flush to zero, denormals are zero, round to zero */
	in_cw = 0x0e7f;                     /* double precision, round to zero, all masked */
	for (int i = 0; i < 8; i++) in_x87[i] = 1.0 / (i + 3);
	pthread_t t;
	NEED(!pthread_create(&t, 0, run, 0));
	NEED(SOON(*(volatile uint64_t *)&spins > 1000));
	ready();
	wait_asked();
	uint64_t before = *(volatile uint64_t *)&spins;
	BREAK("stuck") before = UINT64_MAX;
	CHECK(SOON(*(volatile uint64_t *)&spins > before), "the loop goes on");
	*(volatile uint64_t *)&spin_stop = 1;
	CHECK(!pthread_join(t, 0), "join");
	BREAK("general") out_gpr[12] ^= 1;
	BREAK("vector") out_v[vectors - 1][width - 1] ^= 1;
	BREAK("mask") out_k[7] ^= 1, width = 64;
	BREAK("x87") out_x87[3] = 0;
	BREAK("mxcsr") out_mxcsr = 0x1f80;
	BREAK("flags") out_flags = 0x202;
	for (int i = 0; i < 16; i++)
		CHECK(out_gpr[i] == (i == 7 ? spin_rsp : in_gpr[i]), "general register %d: %#lx", i, out_gpr[i]);
	for (int i = 0; i < vectors; i++) CHECK(!memcmp(in_v[i], out_v[i], width), "vector register %d of %d bytes", i, width);
	for (int i = 0; i < 8 && width == 64; i++) CHECK(in_k[i] == out_k[i], "mask register k%d", i);
	for (int i = 0; i < 8; i++) CHECK(in_x87[i] == out_x87[i], "x87 register %d", i);
	CHECK(in_cw == out_cw, "x87 control word %#x", out_cw);
	CHECK(in_mxcsr == out_mxcsr, "mxcsr %#x", out_mxcsr);
	CHECK(out_flags & 0x400, "direction flag, flags are %#lx", out_flags);
	pass();
}
