/* Takes all huge pages there are, none of which was promised to it, and writes to them all the time; so does a child, which has
 * inherited some. Whoever holds on to one of them for a moment would end it: copying takes another one. */
#include "workload.h"
#include "huge.h"

#define MOST 64
static char *pages[MOST];
static int count;
static volatile int stopped;

static void *write_all(void *unused)
{
	(void)unused;
	for (char c = 1; !stopped; c++) for (int i = 0; i < count; i++) pages[i][8] = c;
	return 0;
}

static void take(int populate)
{
	char *at = mmap(0, HUGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | (huge ? MAP_HUGETLB : 0), -1, 0);
	NEED(at != MAP_FAILED);
	if (!populate || !madvise(at, HUGE, 23 /* MADV_POPULATE_WRITE */)) pages[count++] = at;
}

int main(int argc, char **argv)
{
	begin(argc, argv);
	may_have_huge_pages(argc, argv);
	take(0), take(0);
	int up[2];
	NEED(!pipe(up));
	pid_t child = fork();
	NEED(child >= 0);
	for (int i = 0; i < count; i++) pages[i][0] = 1 + i;
	if (!child) NEED(write(up[1], "r", 1) == 1);
	else {
		char c;
		NEED(read(up[0], &c, 1) == 1);
		for (int before = -1; count < MOST && count > before;) { before = count; take(1); if (count > before) pages[before][0] = 1 + before; }
	}
	pthread_t thread;
	NEED(!pthread_create(&thread, 0, write_all, 0));
	if (!child) for (;;) pause();
	ready();
	wait_asked();
	BREAK("contents") pages[1][0] ^= 1;
	siginfo_t info;
	BREAK("child") NEED(!kill(child, SIGKILL) && !waitid(P_PID, child, &info, WEXITED | WNOWAIT));
	stopped = 1;
	for (int i = 0; i < count; i++) CHECK(pages[i][0] == 1 + i, "page %d of %d", i, count);
	CHECK(waitpid(child, 0, WNOHANG) == 0, "the child");
	pass();
}
