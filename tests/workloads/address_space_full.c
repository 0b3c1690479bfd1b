/* A task whose RLIMIT_AS is used up to the last page: there is no room for anyone's code. */
#include "workload.h"
#include <sys/resource.h>

static unsigned long statm_pages(void)
{
	char b[256];
	NEED(slurp("/proc/self/statm", b, sizeof b) > 0);
	return strtoul(b, 0, 10);
}

int main(int argc, char **argv)
{
	begin(argc, argv);
	char *mine = map(1 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE);
	fill(mine, 1 << 20, 31);
	say("about to fill"); /* stdio is warm now */
	unsigned long pages = statm_pages();
	struct rlimit lim = { pages * PAGE, pages * PAGE }, now;
	NEED(!setrlimit(RLIMIT_AS, &lim));
	NEED(mmap(0, PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) == MAP_FAILED);
	ready();
	wait_asked();
	BREAK("contents") mine[5] ^= 1;
	BREAK("room") munmap(mine + (1 << 20) - PAGE, PAGE);
	BREAK("limit") { lim.rlim_cur -= PAGE; setrlimit(RLIMIT_AS, &lim); lim.rlim_cur += PAGE; }
	CHECK(!getrlimit(RLIMIT_AS, &now) && now.rlim_cur == lim.rlim_cur && now.rlim_max == lim.rlim_max, "limit");
	CHECK(statm_pages() == pages, "size was %lu pages and is %lu", pages, statm_pages());
	CHECK(mmap(0, PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) == MAP_FAILED, "still full");
	CHECK(filled(mine, 1 << 20, 31), "contents");
	pass();
}
