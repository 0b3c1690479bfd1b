/* A chain of seccomp filters that three threads share, since the newest one was given to all of them (TSYNC): each
 * answers its own call with its own error, and a filter for all threads can still be added. */
#include "workload.h"
#include <linux/filter.h>
#include <linux/seccomp.h>

static volatile int asked, answers[3];

/* From now on `nr` fails with `error`. Long enough that no page of instructions will do. */
static void deny(int nr, int error, unsigned flags)
{
	static struct sock_filter f[1200];
	int n = 0;
	f[n++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, 0);
	while (n < 1000) f[n++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, 0);
	f[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, nr, 0, 1);
	f[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | error);
	f[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
	struct sock_fprog prog = { n, f };
	NEED(!syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, &prog));
}

static int error_of(int nr)
{
	errno = 0;
	return syscall(nr, -1, 0, 0) < 0 ? errno : 0;
}

static void *run(void *arg)
{
	intptr_t me = (intptr_t)arg;
	answers[me] = 1;
	while (!asked) usleep(1000);
	if (error_of(SYS_getppid) == 71 && error_of(SYS_getpgid) == 72) answers[me] = 2;
	while (asked < 2) usleep(1000);
	if (error_of(SYS_getsid) == 73) answers[me] = 3;
	for (;;) pause();
	return 0;
}

int main(int argc, char **argv)
{
	begin(argc, argv);
	pthread_t t;
	NEED(!prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
	deny(SYS_getppid, 71, 0);
	for (intptr_t i = 1; i < 3; i++) NEED(!pthread_create(&t, 0, run, (void *)i));
	NEED(SOON(answers[1] && answers[2]));
	deny(SYS_getpgid, 72, SECCOMP_FILTER_FLAG_TSYNC | SECCOMP_FILTER_FLAG_LOG);
	ready();
	wait_asked();
	BREAK("first") deny(SYS_getppid, 74, 0);
	BREAK("second") deny(SYS_getpgid, 74, SECCOMP_FILTER_FLAG_TSYNC);
	CHECK(error_of(SYS_getppid) == 71, "the first filter says %d", error_of(SYS_getppid));
	asked = 1;
	CHECK(SOON(answers[1] == 2 && answers[2] == 2), "the filters of the threads: %d %d", answers[1], answers[2]);
	deny(SYS_getsid, 73, SECCOMP_FILTER_FLAG_TSYNC);
	BREAK("count") deny(SYS_times, 75, 0);
	asked = 2;
	CHECK(SOON(answers[1] == 3 && answers[2] == 3), "a filter for all threads: %d %d", answers[1], answers[2]);
	char filters[64];
	status_line(0, "Seccomp_filters", filters, sizeof filters);
	CHECK(atoi(filters) == 3, "%s filters", filters);
	pass();
}
