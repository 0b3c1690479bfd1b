/* A process with argv[3] MiB of pages of 4 KiB that writes to argv[4] of them, at random, each time it is sent SIGUSR2:
 * what the bench makes increments of. On SIGUSR1 it checks that each page has what was written last. */
#include "workload.h"

int main(int argc, char **argv)
{
	begin(argc, argv);
	size_t pages = (argc > 3 ? strtoul(argv[3], 0, 10) : 16) << 8, dirt = argc > 4 ? strtoul(argv[4], 0, 10) : 20;
	uint64_t *m = map(pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE), *last = map(pages * 8, PROT_READ | PROT_WRITE, MAP_PRIVATE);
	madvise(m, pages * PAGE, MADV_NOHUGEPAGE);
	uint64_t x = 88172645463325252ull;
	for (size_t i = 0; i < pages * 512; i++) { x ^= x << 13; x ^= x >> 7; x ^= x << 17; m[i] = x; }
	for (size_t i = 0; i < pages; i++) last[i] = m[i * 512];
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	sigaddset(&set, SIGUSR2);
	sigprocmask(SIG_BLOCK, &set, 0);
	ready();
	for (int rounds = 0;;) {
		int s = sigwaitinfo(&set, 0);
		if (s == SIGUSR2) {
			for (size_t k = 0; k < dirt; k++) {
				x ^= x << 13; x ^= x >> 7; x ^= x << 17;
				size_t i = x % pages;
				m[i * 512] = last[i] = x;
			}
			say("dirty %d", ++rounds);
		} else if (s == SIGUSR1) {
			BREAK("page") m[512] ^= 1;
			for (size_t i = 0; i < pages; i++) CHECK(m[i * 512] == last[i], "page %zu", i);
			say("PASS");
		}
	}
}
