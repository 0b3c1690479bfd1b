/* Private memory of huge pages stays what it is; unless it is told to have some, ordinary memory stands for it. */
#include "workload.h"
#include "huge.h"

int main(int argc, char **argv)
{
	begin(argc, argv);
	may_have_huge_pages(argc, argv);
	int flags = huge ? MAP_HUGETLB : 0;
	char *at = map(4 * HUGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | flags);
	char *unpromised = map(2 * HUGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE | flags);
	fill(at + HUGE, HUGE, 1);
	fill(at + 3 * HUGE, HUGE, 2);
	fill(unpromised, HUGE, 4);
	NEED(!mprotect(at + 3 * HUGE, HUGE, PROT_READ));
	long size = page_kib(at);
	NEED(size >= 4);
	ready();
	wait_asked();
	BREAK("contents") at[HUGE + 5000] ^= 1;
	BREAK("hole") at[2 * HUGE + 77] = 1;
	BREAK("size") size++;
	BREAK("reservation") unpromised = memcpy(map(2 * HUGE, PROT_READ | PROT_WRITE, MAP_PRIVATE), unpromised, HUGE);
	CHECK(page_kib(at) == size && page_kib(at + 3 * HUGE) == size, "size of its pages, %ld", page_kib(at));
	CHECK(has_flag(unpromised, " nr") && !has_flag(at, " nr"), "reservations");
	CHECK(filled(at + HUGE, HUGE, 1) && filled(at + 3 * HUGE, HUGE, 2) && filled(unpromised, HUGE, 4), "contents");
	CHECK(is_zero(at, HUGE) && is_zero(at + 2 * HUGE, HUGE), "what was not written");
	CHECK(syscall(SYS_getrandom, at + 3 * HUGE, 1, 0) == -1 && errno == EFAULT, "protection");
	fill(at, HUGE, 3);
	CHECK(filled(at, HUGE, 3), "what is written now");
	pass();
}
