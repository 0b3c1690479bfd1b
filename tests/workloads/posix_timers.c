/* POSIX timers keep their ids (with gaps), clocks, notification, intervals and what was left of them. */
#include "workload.h"
#include <sys/auxv.h>

static volatile pid_t tid;
static volatile int thread_ticks, thread_value;
static volatile sig_atomic_t signal_ticks, signal_timer = -1;

static void on_signal(int s, siginfo_t *si, void *ctx) { (void)s; (void)ctx; signal_ticks++; signal_timer = si->si_timerid; }

static void *waiter(void *unused)
{
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, SIGRTMIN + 1);
	pthread_sigmask(SIG_BLOCK, &set, 0);
	tid = syscall(SYS_gettid);
	for (;;) {
		siginfo_t si;
		if (sigwaitinfo(&set, &si) < 0) continue;
		if (si.si_code == SI_TIMER) thread_ticks++, thread_value = si.si_value.sival_int;
	}
	return unused;
}

static int create(clockid_t clock, int notify, int sig, int value)
{
	struct sigevent ev = { .sigev_notify = notify, .sigev_signo = sig, .sigev_value.sival_int = value };
	if (notify == SIGEV_THREAD_ID) ev._sigev_un._tid = tid;
	int id = -1;
	NEED(!syscall(SYS_timer_create, clock, &ev, &id));
	return id;
}

static void arm(int id, long ms, long interval_ms)
{
	struct itimerspec it = { { interval_ms / 1000, interval_ms % 1000 * 1000000 }, { ms / 1000, ms % 1000 * 1000000 } };
	NEED(!syscall(SYS_timer_settime, id, 0, &it, 0));
}

int main(int argc, char **argv)
{
	begin(argc, argv);
	pthread_t t;
	NEED(!pthread_create(&t, 0, waiter, 0));
	NEED(SOON(tid));
	struct sigaction sa = { .sa_sigaction = on_signal, .sa_flags = SA_SIGINFO | SA_RESTART };
	NEED(!sigaction(SIGRTMIN, &sa, 0));
	int gone[3], ids[5];
	gone[0] = create(CLOCK_MONOTONIC, SIGEV_NONE, 0, 0);
	ids[0] = create(CLOCK_MONOTONIC, SIGEV_SIGNAL, SIGRTMIN, 5);
	gone[1] = create(CLOCK_MONOTONIC, SIGEV_NONE, 0, 0);
	gone[2] = create(CLOCK_MONOTONIC, SIGEV_NONE, 0, 0);
	ids[1] = create(CLOCK_REALTIME, SIGEV_THREAD_ID, SIGRTMIN + 1, 6);
	ids[2] = create(CLOCK_BOOTTIME, SIGEV_NONE, 0, 7);
	ids[3] = create(CLOCK_PROCESS_CPUTIME_ID, SIGEV_SIGNAL, SIGRTMIN + 2, 8);
	ids[4] = create(CLOCK_MONOTONIC, SIGEV_SIGNAL, SIGRTMIN + 3, 9); /* never armed */
	for (int i = 0; i < 3; i++) NEED(!syscall(SYS_timer_delete, gone[i]));
	signal(SIGRTMIN + 2, SIG_IGN);
	arm(ids[0], 30, 30);
	arm(ids[1], 40, 40);
	arm(ids[2], 500000, 700000);
	arm(ids[3], 900000, 0);
	NEED(SOON(signal_ticks && thread_ticks));
	ready();
	wait_asked();
	BREAK("ids") syscall(SYS_timer_delete, ids[2]);
	BREAK("gap") gone[1] = create(CLOCK_MONOTONIC, SIGEV_NONE, 0, 0);
	BREAK("stopped") arm(ids[1], 0, 0);
	BREAK("left") arm(ids[2], 1000, 700000);
	BREAK("armed") arm(ids[4], 100000, 0);
	struct itimerspec it;
	for (int i = 0; i < 5; i++) CHECK(!syscall(SYS_timer_gettime, ids[i], &it), "timer %d is there", ids[i]);
	for (int i = 0; i < 3; i++) CHECK(syscall(SYS_timer_gettime, gone[i], &it) < 0, "timer %d is not there", gone[i]);
	syscall(SYS_timer_gettime, ids[4], &it);
	CHECK(!it.it_value.tv_sec && !it.it_value.tv_nsec, "the timer that was never armed");
	syscall(SYS_timer_gettime, ids[2], &it);
	CHECK(it.it_interval.tv_sec == 700 && it.it_value.tv_sec > 400 && it.it_value.tv_sec < 500, "%ld s left of 500", it.it_value.tv_sec);
	syscall(SYS_timer_gettime, ids[3], &it);
	CHECK(it.it_value.tv_sec > 890 && it.it_value.tv_sec < 900 && !it.it_interval.tv_sec, "cpu timer: %ld s left of 900", it.it_value.tv_sec);
	int a = signal_ticks, b = thread_ticks;
	signal_timer = -1;
	CHECK(SOON(signal_ticks > a + 1), "the signalling timer ticks");
	CHECK(signal_timer == ids[0], "si_timerid %d is not %d", signal_timer, ids[0]);
	CHECK(SOON(thread_ticks > b + 1) && thread_value == 6, "the timer that signals a thread ticks");
	int next = create(CLOCK_MONOTONIC, SIGEV_NONE, 0, 0);
	CHECK(next > ids[4], "a new timer's id %d is fresh", next);
	pass();
}
