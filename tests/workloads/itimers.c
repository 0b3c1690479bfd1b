/* The three interval timers of a process: intervals, what is left, and that they fire. */
#include "workload.h"

static volatile sig_atomic_t real_ticks, virtual_ticks;
static void on_alarm(int s) { (void)s; real_ticks++; }
static void on_virtual(int s) { (void)s; virtual_ticks++; }

static long left_us(int which)
{
	struct itimerval it;
	NEED(!getitimer(which, &it));
	return it.it_value.tv_sec * 1000000 + it.it_value.tv_usec;
}

int main(int argc, char **argv)
{
	begin(argc, argv);
	signal(SIGALRM, on_alarm);
	signal(SIGVTALRM, on_virtual);
	signal(SIGPROF, SIG_IGN);
	NEED(!setitimer(ITIMER_REAL, &(struct itimerval){ { 0, 20000 }, { 0, 20000 } }, 0));
	NEED(!setitimer(ITIMER_VIRTUAL, &(struct itimerval){ { 0, 10000 }, { 0, 10000 } }, 0));
	NEED(!setitimer(ITIMER_PROF, &(struct itimerval){ { 3000, 7 }, { 5000, 500000 } }, 0));
	NEED(SOON(real_ticks > 1));
	ready();
	wait_asked();
	BREAK("interval") setitimer(ITIMER_REAL, &(struct itimerval){ { 0, 30000 }, { 0, 20000 } }, 0);
	BREAK("dead") setitimer(ITIMER_REAL, &(struct itimerval){ { 0, 20000 }, { 0, 0 } }, 0);
	BREAK("virtual") setitimer(ITIMER_VIRTUAL, &(struct itimerval){ { 0, 10000 }, { 10, 0 } }, 0);
	BREAK("prof") setitimer(ITIMER_PROF, &(struct itimerval){ { 3000, 7 }, { 5002, 0 } }, 0);
	struct itimerval it;
	CHECK(!getitimer(ITIMER_REAL, &it) && it.it_interval.tv_usec >= 19000 && it.it_interval.tv_usec <= 21000, "real interval %ld us", it.it_interval.tv_usec);
	CHECK(!getitimer(ITIMER_PROF, &it) && it.it_interval.tv_sec == 3000, "profiling interval %ld s", it.it_interval.tv_sec);
	long left = left_us(ITIMER_PROF);
	CHECK(left > 4990 * 1000000l && left <= 5001 * 1000000l, "profiling timer has %ld us left", left);
	CHECK(left_us(ITIMER_VIRTUAL) <= 20000, "virtual timer has %ld us left", left_us(ITIMER_VIRTUAL));
	int ticks = real_ticks, vticks = virtual_ticks;
	CHECK(SOON(real_ticks > ticks + 2), "the real timer ticks");
	uint64_t end = now_ms() + 3000;
	while (virtual_ticks < vticks + 3 && now_ms() < end);
	CHECK(virtual_ticks >= vticks + 3, "the virtual timer ticks");
	pass();
}
