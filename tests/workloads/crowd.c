/* Many: 40 processes with 5 threads each, all of them busy in a small way, in a tree three levels deep. */
#include "workload.h"

enum { BRANCHES = 3, TWIGS = 12, THREADS = 4, MAX = BRANCHES * (TWIGS + 1) + 1 };
static struct shared { volatile int members, beat[MAX * (THREADS + 1)]; volatile pid_t tid[MAX * (THREADS + 1)]; } *sh;

static void *beat(void *arg)
{
	int slot = (intptr_t)arg;
	sh->tid[slot] = syscall(SYS_gettid);
	for (;;) {
		usleep(20000);
		if (sh->tid[slot] != syscall(SYS_gettid)) BROKEN("tid of slot %d", slot);
		sh->beat[slot]++;
	}
	return 0;
}

static void member(int forever)
{
	int me = __sync_fetch_and_add(&sh->members, 1);
	pthread_t t;
	for (int i = 1; i <= THREADS; i++) NEED(!pthread_create(&t, 0, beat, (void *)(intptr_t)(me * (THREADS + 1) + i)));
	if (forever) beat((void *)(intptr_t)(me * (THREADS + 1)));
	NEED(!pthread_create(&t, 0, beat, (void *)(intptr_t)(me * (THREADS + 1))));
}

int main(int argc, char **argv)
{
	begin(argc, argv);
	sh = map(sizeof *sh, PROT_READ | PROT_WRITE, MAP_SHARED);
	pid_t first = 0;
	for (int b = 0; b < BRANCHES; b++) {
		pid_t p = fork();
		NEED(p >= 0);
		if (!first) first = p;
		if (p) continue;
		for (int t = 0; t < TWIGS; t++) if (!fork()) member(1);
		member(1);
	}
	member(0);
	NEED(SOON(sh->members == MAX));
	for (int i = 0; i < MAX * (THREADS + 1); i++) NEED(SOON(sh->beat[i] > 0));
	ready();
	wait_asked();
	BREAK("one") kill(first, SIGSTOP);
	BREAK("tid") sh->tid[7]++;
	static int before[MAX * (THREADS + 1)];
	for (int i = 0; i < MAX * (THREADS + 1); i++) before[i] = sh->beat[i];
	for (int i = 0; i < MAX * (THREADS + 1); i++) CHECK(SOON(sh->beat[i] > before[i]), "thread %d of %d stands still", i, MAX * (THREADS + 1));
	pass();
}
