/* 1 TiB of private memory of which 10 MiB are populated, page by page, far from each other. */
#include "workload.h"

int main(int argc, char **argv)
{
	begin(argc, argv);
	const size_t all = 1ul << 40, pages = (10 << 20) / PAGE, step = all / pages / PAGE * PAGE;
	char *m = map(all, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE);
	NEED(!madvise(m, all, MADV_NOHUGEPAGE) || errno == EINVAL);
	for (size_t i = 0; i < pages; i++) fill(m + i * step, PAGE, i);
	ready();
	for (;;) {
		wait_asked();
		BREAK("byte") m[77 * step + 5] ^= 1;
		BREAK("hole") m[77 * step + PAGE] = 1;
		for (size_t i = 0; i < pages; i++) {
			unsigned char there;
			CHECK(filled(m + i * step, PAGE, i), "page %zu", i);
			CHECK(!mincore(m + i * step + PAGE, PAGE, &there) && !there, "memory behind page %zu is untouched", i);
		}
		say("PASS");
	}
}
