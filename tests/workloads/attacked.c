/* What the invariants' attackers aim at: two processes with threads that sleep, spin, wait and count, pending
 * signals, a ticking timer, a pipe with bytes, shared memory. It notices stops only by the clock; any lost signal,
 * interrupted call, changed byte or killed thread it reports - also long after. */
#include "workload.h"
#include <linux/futex.h>
#include <poll.h>

static volatile int *sh; /* 0: stop, 1: child's rounds, 2: child's damage */
static volatile uint64_t spins, naps;
static volatile uint32_t word;
static volatile sig_atomic_t ticks;
static int quiet[2];
static volatile int futex_left, poll_left, early;

static void on_alarm(int s) { (void)s; ticks++; }
static void block_all(void) { sigset_t s; sigfillset(&s); pthread_sigmask(SIG_SETMASK, &s, 0); }
static void *spin(void *x)
{
	block_all();
	for (;;) {
		uint64_t a = 0x5555555555555555, b = ~a;
		double d = 1.25;
		for (int i = 0; i < 1000; i++) asm volatile("" : "+r"(a), "+r"(b), "+x"(d));
		if (a != 0x5555555555555555 || b != ~a || d != 1.25) early |= 1;
		spins++;
		usleep(100);
	}
	return x;
}
static void *nap(void *x)
{
	block_all();
	for (;;) { struct timespec t = { 0, 3000000 }; if (nanosleep(&t, 0)) early |= 2; naps++; }
	return x;
}
static void *wait_futex(void *x)
{
	block_all();
	if (syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, 0, 0, 0, 0)) early |= 4;
	futex_left = 1;
	for (;;) pause();
	return x;
}
static void *wait_poll(void *x)
{
	block_all();
	struct pollfd f = { quiet[0], POLLIN, 0 };
	if (poll(&f, 1, 86400000) != 1) early |= 8;
	poll_left = 1;
	for (;;) pause();
	return x;
}

int main(int argc, char **argv)
{
	begin(argc, argv);
	const size_t n = 16 << 20;
	char *mem = map(n, PROT_READ | PROT_WRITE, MAP_PRIVATE);
	for (size_t p = 0; p < n / PAGE; p++) fill(mem + p * PAGE, PAGE, p);
	sh = map(PAGE, PROT_READ | PROT_WRITE, MAP_SHARED);
	int bytes[2];
	NEED(!pipe(quiet) && !pipe(bytes) && write(bytes[1], "kept", 4) == 4);
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, SIGRTMIN + 1);
	sigprocmask(SIG_BLOCK, &set, 0);
	for (int i = 0; i < 4; i++) NEED(!sigqueue(getpid(), SIGRTMIN + 1, (union sigval){ .sival_int = i }));
	pid_t child = fork();
	if (!child) {
		pthread_t t;
		pthread_create(&t, 0, nap, 0);
		while (!sh[0]) { usleep(1500); if (!filled(mem + (sh[1] % 4096) * PAGE, PAGE, sh[1] % 4096)) sh[2] = sh[1] % 4096 + 1; sh[1]++; }
		_exit(sh[2] || early ? 1 : 8);
	}
	pthread_t t;
	NEED(!pthread_create(&t, 0, spin, 0) && !pthread_create(&t, 0, nap, 0) && !pthread_create(&t, 0, wait_futex, 0) && !pthread_create(&t, 0, wait_poll, 0));
	signal(SIGALRM, on_alarm);
	NEED(!setitimer(ITIMER_REAL, &(struct itimerval){ { 0, 10000 }, { 0, 10000 } }, 0));
	NEED(SOON(spins > 3 && naps > 3 && sh[1] > 3 && ticks > 2));
	ready();
	for (;;) { /* answers as often as it is asked */
		wait_asked();
		BREAK("memory") mem[5] ^= 1;
		BREAK("call") early |= 2;
		BREAK("signal") { siginfo_t si; sigwaitinfo(&set, &si); }
		BREAK("child") kill(child, SIGKILL);
		BREAK("timer") setitimer(ITIMER_REAL, &(struct itimerval){ { 0, 0 }, { 0, 0 } }, 0);
		for (size_t p = 0; p < n / PAGE; p++) CHECK(filled(mem + p * PAGE, PAGE, p), "memory, page %zu", p);
		CHECK(!early, "something was disturbed: %s%s%s%s", early & 1 ? "registers " : "", early & 2 ? "nanosleep " : "", early & 4 ? "futex " : "", early & 8 ? "poll" : "");
		CHECK(!futex_left && !poll_left, "a waiting thread came back");
		uint64_t s = spins, k = naps;
		int c = sh[1], a = ticks;
		CHECK(SOON(spins > s && naps > k && sh[1] > c && ticks > a), "all threads, the child and the timer go on (%d%d%d%d)", spins > s, naps > k, sh[1] > c, ticks > a);
		CHECK(!sh[2] && !kill(child, 0), "the child");
		for (int i = 0; i < 4; i++) {
			siginfo_t si;
			CHECK(sigtimedwait(&set, &si, &(struct timespec){ 0, 0 }) > 0 && si.si_value.sival_int == i, "pending signal %d", i);
		}
		for (int i = 0; i < 4; i++) NEED(!sigqueue(getpid(), SIGRTMIN + 1, (union sigval){ .sival_int = i }));
		char b[8];
		CHECK(read(bytes[0], b, 8) == 4 && !memcmp(b, "kept", 4) && write(bytes[1], "kept", 4) == 4, "the pipe");
		say("PASS");
	}
}
