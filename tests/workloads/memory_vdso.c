/* Time and CPU read through the vdso go on: forwards, agreeing with the system call. */
#include "workload.h"
#include <sched.h>
#include <sys/auxv.h>

static volatile uint64_t rounds[2];
static volatile int backwards;
static void *watch(void *arg)
{
	intptr_t me = (intptr_t)arg;
	struct timespec a, b;
	clock_gettime(CLOCK_MONOTONIC, &a);
	for (;;) {
		unsigned cpu;
		clock_gettime(CLOCK_MONOTONIC, &b);
		if (b.tv_sec < a.tv_sec || (b.tv_sec == a.tv_sec && b.tv_nsec < a.tv_nsec)) backwards = 1;
		if (getcpu(&cpu, 0)) backwards = 2;
		a = b;
		if (++rounds[me] % 1000 == 0) usleep(500);
	}
	return 0;
}

int main(int argc, char **argv)
{
	begin(argc, argv);
	pthread_t t;
	for (intptr_t i = 0; i < 2; i++) NEED(!pthread_create(&t, 0, watch, (void *)i));
	NEED(SOON(rounds[0] > 5000 && rounds[1] > 5000));
	ready();
	wait_asked();
	uint64_t r0 = rounds[0], r1 = rounds[1];
	BREAK("backwards") backwards = 1;
	BREAK("stuck") r0 = UINT64_MAX;
	CHECK(SOON(rounds[0] > r0 && rounds[1] > r1), "the watching threads go on");
	CHECK(!backwards, "time or cpu went wrong (%d)", backwards);
	struct timespec v, s;
	syscall(SYS_clock_gettime, CLOCK_REALTIME, &s);
	clock_gettime(CLOCK_REALTIME, &v);
	double apart = (v.tv_sec - s.tv_sec) + (v.tv_nsec - s.tv_nsec) / 1e9;
	CHECK(apart >= 0 && apart < 1, "vdso and kernel differ by %f s", apart);
	static char maps[1 << 16];
	char want[64];
	snprintf(want, sizeof want, "%lx-", getauxval(AT_SYSINFO_EHDR));
	NEED(slurp("/proc/self/maps", maps, sizeof maps) > 0);
	char *line = strstr(maps, want);
	CHECK(line && memmem(line, strcspn(line, "\n"), "[vdso]", 6), "AT_SYSINFO_EHDR is not where [vdso] is mapped");
	CHECK(!memcmp((void *)getauxval(AT_SYSINFO_EHDR), "\177ELF", 4), "vdso contents");
	pass();
}
