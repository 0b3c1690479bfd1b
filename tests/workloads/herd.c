/* argv[3] processes, each with argv[4] KiB of pages of its own: what `bench scaling` checkpoints. Asked on SIGUSR1, the
 * parent has every child look at its pages. */
#include "workload.h"

enum { MOST = 4096 };
static struct shared { volatile int up, right; } *sh;
static void *pages;
static size_t bytes;

static void child(int number)
{
	sigset_t asked;
	int signal;
	sigemptyset(&asked);
	sigaddset(&asked, SIGUSR2);
	NEED(!sigprocmask(SIG_BLOCK, &asked, 0));
	fill(pages, bytes, number);
	__sync_fetch_and_add(&sh->up, 1);
	for (;;) {
		NEED(!sigwait(&asked, &signal));
		CHECK(filled(pages, bytes, number), "pages of child %d", number);
		__sync_fetch_and_add(&sh->right, 1);
	}
}

int main(int argc, char **argv)
{
	static pid_t pids[MOST];
	begin(argc, argv);
	int count = argc > 3 ? atoi(argv[3]) : 20;
	bytes = (argc > 4 ? strtoul(argv[4], 0, 10) : 256) << 10;
	NEED(count > 0 && count < MOST);
	sh = map(sizeof *sh, PROT_READ | PROT_WRITE, MAP_SHARED);
	pages = map(bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE);
	for (int i = 0; i < count; i++) {
		pids[i] = fork();
		NEED(pids[i] >= 0);
		if (!pids[i]) child(i);
	}
	NEED(SOON(sh->up == count));
	ready();
	for (;;) {
		wait_asked();
		sh->right = 0;
		for (int i = 0; i < count; i++) NEED(!kill(pids[i], SIGUSR2));
		BREAK("one") sh->right--;
		CHECK(SOON(sh->right == count), "%d of %d children answered right", sh->right, count);
		say("PASS");
	}
}
