/* Private memory of huge pages stays what it is; where there are none, ordinary memory stands for it. */
#include "workload.h"

#define HUGE (2ul << 20)

static long page_size(void *at)
{
	static char smaps[1 << 20];
	unsigned long lo, hi;
	int inside = 0;
	NEED(slurp("/proc/self/smaps", smaps, sizeof smaps) > 0);
	for (char *l = strtok(smaps, "\n"); l; l = strtok(0, "\n")) {
		if (sscanf(l, "%lx-%lx ", &lo, &hi) == 2) inside = (unsigned long)at >= lo && (unsigned long)at < hi;
		if (inside && !strncmp(l, "KernelPageSize:", 15)) return atol(l + 15);
	}
	return 0;
}

int main(int argc, char **argv)
{
	begin(argc, argv);
	char *at = mmap(0, 4 * HUGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB, -1, 0);
	if (at == MAP_FAILED) at = map(4 * HUGE, PROT_READ | PROT_WRITE, MAP_PRIVATE);
	fill(at + HUGE, HUGE, 1);
	fill(at + 3 * HUGE, HUGE, 2);
	NEED(!mprotect(at + 3 * HUGE, HUGE, PROT_READ));
	long size = page_size(at);
	NEED(size >= 4);
	ready();
	wait_asked();
	BREAK("contents") at[HUGE + 5000] ^= 1;
	BREAK("hole") at[2 * HUGE + 77] = 1;
	BREAK("size") size++;
	CHECK(page_size(at) == size && page_size(at + 3 * HUGE) == size, "size of its pages, %ld", page_size(at));
	CHECK(filled(at + HUGE, HUGE, 1) && filled(at + 3 * HUGE, HUGE, 2), "contents");
	CHECK(is_zero(at, HUGE) && is_zero(at + 2 * HUGE, HUGE), "what was not written");
	CHECK(syscall(SYS_getrandom, at + 3 * HUGE, 1, 0) == -1 && errno == EFAULT, "protection");
	fill(at, HUGE, 3);
	CHECK(filled(at, HUGE, 3), "what is written now");
	pass();
}
