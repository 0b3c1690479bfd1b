/* argv[3] (9) unix socketpairs of the three types, 250 in a process, with two messages queued in each end: what the bench
 * of sockets checkpoints. Each check takes all messages, compares them, and sends them again. */
#include "workload.h"
#include <sys/socket.h>

#define EACH 250
static const int types[] = { SOCK_STREAM, SOCK_DGRAM, SOCK_SEQPACKET };
static volatile int *done;
static int pairs[EACH][2];

static int message(char *to, int child, int pair, int end, int number)
{
	return snprintf(to, 64, "%05d %05d %d %d", child, pair, end, number);
}

static void fill_queues(int child, int n)
{
	char b[64];
	for (int i = 0; i < n; i++)
		for (int end = 0; end < 2; end++)
			for (int number = 0; number < 2; number++) {
				int len = message(b, child, i, end, number);
				NEED(send(pairs[i][end], b, len, MSG_DONTWAIT) == len);
			}
}

static void crowd(int child, int n)
{
	char want[128], got[128];
	for (int i = 0; i < n; i++) NEED(!socketpair(AF_UNIX, types[i % 3], 0, pairs[i]));
	fill_queues(child, n);
	__atomic_add_fetch(done, 1, __ATOMIC_SEQ_CST);
	for (;;) {
		wait_asked();
		BREAK("boundary") NEED(child || recv(pairs[1][0], got, 1, 0) == 1);
		BREAK("order") NEED(child || (recv(pairs[2][0], got, 64, 0) > 0 && send(pairs[2][1], got, 17, 0) == 17));
		BREAK("mixed") { int fd = pairs[0][0]; pairs[0][0] = pairs[0][1]; pairs[0][1] = fd; }
		for (int i = 0; i < n; i++)
			for (int end = 0; end < 2; end++)
				for (int number = 0, len; number < 2; number++) {
					len = message(want, child, i, 1 - end, number);
					CHECK(recv(pairs[i][end], got, types[i % 3] == SOCK_STREAM ? len : (int)sizeof got, MSG_DONTWAIT) == len && !memcmp(got, want, len),
						"message %d of pair %d end %d of process %d", number, i, end, child);
				}
		fill_queues(child, n);
		__atomic_add_fetch(done, 1, __ATOMIC_SEQ_CST);
	}
}

int main(int argc, char **argv)
{
	begin(argc, argv);
	int n = argc > 3 ? atoi(argv[3]) : 9, children = 0;
	static pid_t pid[1024];
	done = mmap(0, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	NEED(done != MAP_FAILED && n > 0 && n <= 1024 * EACH);
	for (int left = n; left > 0; left -= EACH, children++) {
		pid[children] = fork();
		NEED(pid[children] >= 0);
		if (!pid[children]) crowd(children, left < EACH ? left : EACH);
	}
	NEED(SOON(*done == children));
	ready();
	for (;;) {
		wait_asked();
		*done = 0;
		for (int i = 0; i < children; i++) kill(pid[i], SIGUSR1);
		BREAK("child") kill(pid[0], SIGKILL);
		CHECK(SOON(*done == children), "%d of %d processes found their messages", *done, children);
		say("PASS");
	}
}
