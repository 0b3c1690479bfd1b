/* Private anonymous memory in every shape keeps its bytes, its holes and its protection. */
#include "workload.h"

int main(int argc, char **argv)
{
	begin(argc, argv);
	const size_t n = 8 << 20, big = 64 << 20;
	char *full = map(n, PROT_READ | PROT_WRITE, MAP_PRIVATE);
	fill(full, n, 1);
	char *sparse = map(big, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE);
	for (size_t p = 0; p < big / PAGE; p += 37) fill(sparse + p * PAGE, PAGE, p);
	char *readonly = map(16 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE);
	fill(readonly, 16 * PAGE, 2);
	NEED(!mprotect(readonly, 16 * PAGE, PROT_READ));
	char *zeros = map(64 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE);
	NEED(is_zero(zeros, 32 * PAGE));          /* touched by reading: the shared zero page */
	memset(zeros + 32 * PAGE, 0, 8 * PAGE);   /* written with zeros */
	char *none = map(16 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE);
	fill(none, 16 * PAGE, 3);
	NEED(!mprotect(none, 16 * PAGE, PROT_NONE));
	char *code = map(2 * PAGE, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE);
	memcpy(code, "\xb8\x2a\x00\x00\x00\xc3", 6); /* mov $42, %eax; ret */
	NEED(!mprotect(code, PAGE, PROT_READ | PROT_EXEC));
	char *holed = map(64 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE);
	fill(holed, 64 * PAGE, 4);
	NEED(!madvise(holed + 16 * PAGE, 8 * PAGE, MADV_DONTNEED));
	char *moved = map(16 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE);
	fill(moved, 16 * PAGE, 5);
	char *place = map(64 * PAGE, PROT_NONE, MAP_PRIVATE);
	moved = mremap(moved, 16 * PAGE, 32 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, place);
	NEED(moved == place);
	char *many[64];
	for (int i = 0; i < 64; i++) {
		many[i] = map(2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE);
		fill(many[i], 2 * PAGE, 100 + i);
		if (i & 1) NEED(!mprotect(many[i], PAGE, PROT_READ));
	}
	NEED(!munmap(holed + 40 * PAGE, 4 * PAGE)); /* last: nothing else may be put there */
	long rss = status_number(0, "VmRSS");
	ready();
	wait_asked();
	BREAK("full") full[n - 5] ^= 1;
	BREAK("sparse") sparse[37 * PAGE * 3 + 9] ^= 1;
	BREAK("hole") sparse[PAGE] = 1;
	BREAK("readonly") { mprotect(readonly, PAGE, PROT_READ | PROT_WRITE); readonly[1] ^= 1; }
	BREAK("zeros") zeros[33 * PAGE] = 1;
	BREAK("none") { mprotect(none, PAGE, PROT_READ | PROT_WRITE); none[7] ^= 1; }
	BREAK("rss") memset(sparse + 1 * PAGE, 0, 36 * PAGE), memset(map(8 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE), 1, 8 << 20);
	BREAK("moved") moved[3] ^= 1;
	BREAK("many") many[63][2 * PAGE - 1] ^= 1;
	long grown = status_number(0, "VmRSS") - rss;
	CHECK(grown < 4096, "resident memory grew by %ld KiB", grown);
	CHECK(filled(full, n, 1), "full region");
	for (size_t p = 0; p < big / PAGE; p++)
		CHECK(p % 37 ? is_zero(sparse + p * PAGE, PAGE) : filled(sparse + p * PAGE, PAGE, p), "sparse page %zu", p);
	CHECK(filled(readonly, 16 * PAGE, 2), "read-only region");
	CHECK(is_zero(zeros, 64 * PAGE), "zero pages");
	CHECK(!mprotect(none, 16 * PAGE, PROT_READ) && filled(none, 16 * PAGE, 3), "contents behind PROT_NONE");
	CHECK(((int (*)(void))code)() == 42, "code");
	CHECK(filled(holed, 16 * PAGE, 4) && is_zero(holed + 16 * PAGE, 8 * PAGE), "hole punched by madvise");
	CHECK(!memcmp(holed + 44 * PAGE, &(uint64_t){ (44 * 512 + 4) * 0x9e3779b97f4a7c15ull + 4 }, 8), "behind the unmapped hole");
	CHECK(msync(holed + 40 * PAGE, PAGE, MS_ASYNC) < 0, "unmapped hole stays unmapped");
	CHECK(filled(moved, 16 * PAGE, 5) && is_zero(moved + 16 * PAGE, 16 * PAGE), "moved region");
	for (int i = 0; i < 64; i++) CHECK(filled(many[i], 2 * PAGE, 100 + i), "small region %d", i);
	moved[31 * PAGE] = full[n - 1] = holed[PAGE] = 1;
	pass();
}
