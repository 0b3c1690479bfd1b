/* 1 TiB of private memory of which 10 MiB are populated, far from each other: each page alone, or so many in a row. */
#include "workload.h"

int main(int argc, char **argv)
{
	begin(argc, argv);
	const size_t row = argc > 3 ? atoi(argv[3]) : 1, rows = (10 << 20) / PAGE / row;
	const size_t all = 1ul << 40, step = all / rows / PAGE * PAGE;
	char *m = map(all, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE);
	NEED(!madvise(m, all, MADV_NOHUGEPAGE) || errno == EINVAL);
	for (size_t i = 0; i < rows; i++) fill(m + i * step, row * PAGE, i);
	ready();
	for (;;) {
		wait_asked();
		BREAK("byte") m[7 * step + 5] ^= 1;
		BREAK("hole") m[7 * step + row * PAGE] = 1;
		for (size_t i = 0; i < rows; i++) {
			unsigned char there;
			CHECK(filled(m + i * step, row * PAGE, i), "row %zu", i);
			CHECK(!mincore(m + i * step + row * PAGE, PAGE, &there) && !there, "memory behind row %zu is untouched", i);
		}
		say("PASS");
	}
}
