/* Counts how often it was asked, and keeps the count in more and more memory. SIGUSR2 asks for nothing but keeps
 * it awake. SIGUSR1 logs "count N" and, when the log is asked for a verdict by the test, PASS: every page
 * that was written has what it should have. */
#include "workload.h"

#define PAGES 2048

int main(int argc, char **argv)
{
	begin(argc, argv);
	uint64_t *pages = map(PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE);
	uint64_t *last = map(PAGES * sizeof *last, PROT_READ | PROT_WRITE, MAP_PRIVATE);
	uint64_t count = 0, seed = 88172645463325252ull;
	for (size_t i = 0; i < PAGES; i += 2) pages[i * 512] = last[i] = i + 1;
	ready();
	for (;;) {
		wait_asked();
		count++;
		for (int k = 0; k < 20; k++) {
			seed ^= seed << 13, seed ^= seed >> 7, seed ^= seed << 17;
			size_t i = seed % PAGES;
			pages[i * 512] = last[i] = count << 16 | i;
			pages[i * 512 + 511] = count;
		}
		BREAK("page") pages[42 * 512] ^= 1;
		for (size_t i = 0; i < PAGES; i++) CHECK(pages[i * 512] == last[i], "page %zu", i);
		say("count %lu", count);
		say("PASS");
	}
}
