/* What ckpt-scan --snapshot must not be noticed by: a process that counts its children in every way, and memory that
 * changes all the time, so that pages read at different instants do not fit together. argv[3]: bits; 1: only one process may
 * be had (RLIMIT_NPROC), 2: adopts orphans. The other end of a socketpair is a child, which tells when it sees the end. */
#include "workload.h"
#include <sys/resource.h>
#include <sys/socket.h>

enum { AREA = 32 << 20, KEPT = 64 * PAGE };
static volatile sig_atomic_t chld;
static volatile int noticed;
static pid_t known;

static void on_chld(int s) { (void)s; chld++; }
static void *wait_any(void *x) /* blocks in wait4 for clone children and others */
{
	for (;;) {
		int st;
		pid_t p = waitpid(-1, &st, __WALL);
		if (p > 0 && p != known) noticed = p;
		if (p == known) for (;;) pause();
	}
	return x;
}
static void *poll_any(void *x)
{
	for (;;) {
		siginfo_t si = { 0 };
		pid_t p = waitpid(-1, 0, __WCLONE | WNOHANG);
		if (p != -1 || errno != ECHILD) noticed = 1;
		if (!waitid(P_ALL, 0, &si, WEXITED | WNOHANG | WNOWAIT) && si.si_pid && si.si_pid != known) noticed = 2;
		usleep(50);
	}
	return x;
}
/* One word per page, all brought to the next number in turn: at any one instant, the first k pages are one ahead. */
static void *turn(void *x)
{
	volatile uint64_t *m = x;
	const size_t step = PAGE / 8, words = AREA / 8;
	for (uint64_t n = 0;; n++)
		for (size_t i = 0; i < words; i += step) {
			if (m[i] != n || m[i + 1] != ~n) BROKEN("torn: page %zu holds %lu, %lu in round %lu", i / step, m[i], ~m[i + 1], n);
			m[i] = n + 1;
			m[i + 1] = ~(n + 1);
		}
}

int main(int argc, char **argv)
{
	begin(argc, argv);
	int how = argc > 3 ? atoi(argv[3]) : 0;
	uint64_t *m = map(AREA, PROT_READ | PROT_WRITE, MAP_PRIVATE);
	for (size_t i = 0; i < AREA / 8; i += PAGE / 8) m[i + 1] = ~0ull;
	char *missing = map(KEPT, PROT_READ | PROT_WRITE, MAP_PRIVATE), *wiped = map(KEPT, PROT_READ | PROT_WRITE, MAP_PRIVATE);
	char *closed = map(KEPT, PROT_READ | PROT_WRITE, MAP_PRIVATE), *shared = map(KEPT, PROT_READ | PROT_WRITE, MAP_SHARED);
	fill(missing, KEPT, 1);
	fill(wiped, KEPT, 2);
	fill(closed, KEPT, 3);
	fill(shared, KEPT, 4);
	NEED(!madvise(missing, KEPT, MADV_DONTFORK) && !madvise(wiped, KEPT, MADV_WIPEONFORK));
	NEED(!mprotect(missing, KEPT, PROT_READ) && !mprotect(closed, KEPT, PROT_NONE));
	int pair[2];
	NEED(!socketpair(AF_UNIX, SOCK_STREAM, 0, pair));
	signal(SIGCHLD, on_chld);
	known = fork();
	if (!known) {
		char c;
		close(pair[0]);
		while (read(pair[1], &c, 1) == 1) if (write(pair[1], "!", 1) != 1) break;
		say("closed");
		for (;;) pause();
	}
	close(pair[1]);
	pthread_t t;
	if (how & 1) {
		/* As nobody, who has no other process: root is not limited. The threads count too. */
		NEED(!setgid(54321) && !setuid(54321) && !prctl(PR_SET_DUMPABLE, 1));
	}
	if (how & 2) NEED(!prctl(PR_SET_CHILD_SUBREAPER, 1));
	NEED(!pthread_create(&t, 0, wait_any, 0) && !pthread_create(&t, 0, poll_any, 0) && !pthread_create(&t, 0, turn, m));
	if (how & 1) NEED(!setrlimit(RLIMIT_NPROC, &(struct rlimit){ 1, 1 }));
	ready();
	for (int open = 1;;) {
		wait_asked();
		BREAK("missing") { mprotect(missing, KEPT, PROT_READ | PROT_WRITE); missing[5] ^= 1; }
		BREAK("wiped") wiped[5] ^= 1;
		BREAK("closed") { mprotect(closed, KEPT, PROT_READ | PROT_WRITE); closed[5] ^= 1; }
		BREAK("shared") shared[5] ^= 1;
		BREAK("torn") { m[AREA / 8 - PAGE / 8]++; usleep(100000); }
		BREAK("child") { if (!fork()) _exit(0); usleep(100000); }
		CHECK(filled(missing, KEPT, 1), "MADV_DONTFORK memory");
		CHECK(filled(wiped, KEPT, 2), "MADV_WIPEONFORK memory");
		NEED(!mprotect(closed, KEPT, PROT_READ));
		CHECK(filled(closed, KEPT, 3), "PROT_NONE memory");
		NEED(!mprotect(closed, KEPT, PROT_NONE));
		CHECK(filled(shared, KEPT, 4), "shared memory");
		CHECK(!noticed, "a child that it has not made: %d", noticed);
		CHECK(!chld, "SIGCHLD, %d times", chld);
		char c;
		if (open) CHECK(write(pair[0], "?", 1) == 1 && read(pair[0], &c, 1) == 1 && c == '!', "the child answers");
		BREAK("close") { close(pair[0]); open = 0; CHECK(0, "closed"); }
		if (how & 4) { close(pair[0]); open = 0; }
		say("PASS");
	}
}
