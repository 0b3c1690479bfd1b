/* One thread in each kind of blocking system call. None of them may notice anything: each returns what it would
 * have returned, and only when it would have returned. signal(7) lists the calls that fail with EINTR after any
 * stop, even without a handler (epoll_wait, sigtimedwait, semop, a socket with a timeout): those may try again. */
#include "workload.h"
#include <linux/futex.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/ipc.h>
#include <sys/select.h>
#include <sys/socket.h>

static int p_read[2], p_poll[2], p_ppoll[2], p_select[2], p_epoll[2], p_write[2], p_full[2], sp[2], ev, ep;
static volatile uint32_t word, timed_word;
static pid_t child;
static uint64_t started;
enum { SLEEP_MS = 60000, POLL_MS = 50000 };
static char big[200000];

#define TRY_AGAIN(expr) ({ long wl_r; do wl_r = (expr); while (wl_r == -1 && errno == EINTR); wl_r; })
static long t_read(void) { char c = 0; return read(p_read[0], &c, 1) == 1 && c == 'x'; }
static long t_poll(void) { struct pollfd f = { p_poll[0], POLLIN, 0 }; return poll(&f, 1, POLL_MS) == 1 && f.revents == POLLIN; }
static long t_poll_forever(void) { struct pollfd f = { p_poll[0], POLLIN, 0 }; return poll(&f, 1, -1) == 1 && f.revents == POLLIN; }
static long t_ppoll(void) { struct pollfd f = { p_ppoll[0], POLLIN, 0 }; struct timespec ts = { POLL_MS / 1000, 0 }; return ppoll(&f, 1, &ts, 0) == 1; }
static long t_select(void) { fd_set s; FD_ZERO(&s); FD_SET(p_select[0], &s); struct timeval tv = { POLL_MS / 1000, 0 }; return select(p_select[0] + 1, &s, 0, 0, &tv) == 1 && FD_ISSET(p_select[0], &s); }
static long t_epoll(void) { struct epoll_event e; return epoll_wait(ep, &e, 1, -1) == 1 && e.data.u64 == 4711; }
static long t_futex(void) { return syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, 0, 0, 0, 0) == 0; }
static long t_futex_timed(void) { struct timespec ts = { POLL_MS / 1000, 0 }; return syscall(SYS_futex, &timed_word, FUTEX_WAIT_PRIVATE, 0, &ts, 0, 0) == 0; }
static long t_eventfd(void) { uint64_t v; return read(ev, &v, 8) == 8 && v == 3; }
static long t_recv(void) { char b[8]; return recv(sp[0], b, 8, 0) == 5 && !memcmp(b, "hello", 5); }
/* The pipe is full before: a write that has got rid of its first bytes returns short after any stop. */
static long t_write(void) { return write(p_full[1], "tail", 4) == 4; }
static long t_wait4(void) { int st; return waitpid(child, &st, 0) == child && WIFEXITED(st) && WEXITSTATUS(st) == 9; }
static long t_sigwait(void) { sigset_t s; siginfo_t si; sigemptyset(&s); sigaddset(&s, SIGRTMIN + 5); return TRY_AGAIN(sigwaitinfo(&s, &si)) == SIGRTMIN + 5 && si.si_value.sival_int == 55; }
/* These two end by a handler, so EINTR is what they have to return - then, and with the right time left. */
static volatile int handled;
static void on_poke(int s) { (void)s; handled++; }
static long t_pause(void) { errno = 0; int r = pause(); return r == -1 && errno == EINTR && handled > 0; }
static long t_nanosleep(void)
{
	struct timespec want = { SLEEP_MS / 1000, 0 }, left = { 0, 0 };
	int r = nanosleep(&want, &left);
	long left_ms = left.tv_sec * 1000 + left.tv_nsec / 1000000, gone = now_ms() - started;
	return r == -1 && errno == EINTR && left_ms > SLEEP_MS - gone - 2000 && left_ms <= SLEEP_MS - 0;
}
static long t_clock_nanosleep(void)
{
	struct timespec until;
	clock_gettime(CLOCK_MONOTONIC, &until);
	until.tv_sec += SLEEP_MS / 1000;
	return clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, 0) == EINTR;
}
static struct call { const char *name; long (*run)(void); int poked; volatile pid_t tid; volatile int ended; volatile long result, error; } calls[] = {
	{ .name = "read of a pipe", .run = t_read }, { .name = "poll with a timeout", .run = t_poll }, { .name = "poll without", .run = t_poll_forever },
	{ .name = "ppoll", .run = t_ppoll }, { .name = "select", .run = t_select }, { .name = "epoll_wait", .run = t_epoll },
	{ .name = "futex", .run = t_futex }, { .name = "futex with a timeout", .run = t_futex_timed }, { .name = "read of an eventfd", .run = t_eventfd },
	{ .name = "recv", .run = t_recv }, { .name = "write to a full pipe", .run = t_write }, { .name = "wait4", .run = t_wait4 },
	{ .name = "sigwaitinfo", .run = t_sigwait }, { .name = "pause", .run = t_pause, .poked = 1 }, { .name = "nanosleep", .run = t_nanosleep, .poked = 1 },
	{ .name = "clock_nanosleep", .run = t_clock_nanosleep, .poked = 1 },
};
enum { N = sizeof calls / sizeof *calls };

static void *thread(void *arg)
{
	struct call *c = arg;
	c->tid = syscall(SYS_gettid);
	c->result = c->run();
	c->error = errno;
	c->ended = 1;
	for (;;) pause();
	return 0;
}

int main(int argc, char **argv)
{
	begin(argc, argv);
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, SIGRTMIN + 5);
	sigprocmask(SIG_BLOCK, &set, 0);
	struct sigaction sa = { .sa_handler = on_poke };
	sigaction(SIGRTMIN + 6, &sa, 0);
	NEED(!pipe(p_read) && !pipe(p_poll) && !pipe(p_ppoll) && !pipe(p_select) && !pipe(p_epoll) && !pipe(p_full) && !pipe(p_write));
	NEED(!socketpair(AF_UNIX, SOCK_STREAM, 0, sp));
	ev = eventfd(0, 0);
	ep = epoll_create1(0);
	struct epoll_event e = { .events = EPOLLIN, .data.u64 = 4711 };
	NEED(!epoll_ctl(ep, EPOLL_CTL_ADD, p_epoll[0], &e));
	memset(big, 'b', sizeof big);
	NEED(fcntl(p_full[1], F_SETPIPE_SZ, 1 << 16) == 1 << 16 && write(p_full[1], big, 1 << 16) == 1 << 16);
	child = fork();
	if (!child) { /* ends with status 9 when the parent's pipe says so */
		char c;
		while (read(p_write[0], &c, 1) != 1) BROKEN("the child's read");
		_exit(9);
	}
	started = now_ms();
	pthread_t t;
	for (int i = 0; i < N; i++) NEED(!pthread_create(&t, 0, thread, &calls[i]));
	for (int i = 0; i < N; i++) NEED(SOON(calls[i].tid) && SOON(state_of(calls[i].tid) == 'S'));
	ready();
	wait_asked();
	BREAK("early") syscall(SYS_tgkill, getpid(), calls[13].tid, SIGRTMIN + 6), usleep(50000);
	for (int i = 0; i < N; i++) CHECK(!calls[i].ended, "%s returned %ld errno %ld before its time", calls[i].name, calls[i].result, calls[i].error);
	handled = 0;
	for (int i = 0; i < N; i++) if (calls[i].poked) CHECK(!syscall(SYS_tgkill, getpid(), calls[i].tid, SIGRTMIN + 6), "poke");
	CHECK(write(p_read[1], "x", 1) == 1 && write(p_poll[1], "x", 1) == 1 && write(p_ppoll[1], "x", 1) == 1 && write(p_select[1], "x", 1) == 1, "write");
	CHECK(write(p_epoll[1], "x", 1) == 1 && write(p_write[1], "x", 1) == 1, "write");
	word = timed_word = 1;
	syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, 10, 0, 0, 0);
	syscall(SYS_futex, &timed_word, FUTEX_WAKE_PRIVATE, 10, 0, 0, 0);
	CHECK(write(ev, &(uint64_t){ 3 }, 8) == 8 && send(sp[1], "hello", 5, 0) == 5, "write");
	CHECK(!sigqueue(getpid(), SIGRTMIN + 5, (union sigval){ .sival_int = 55 }), "sigqueue");
	size_t drained = 0;
	static char sink[sizeof big];
	while (drained < (1 << 16) + 4) {
		ssize_t n = read(p_full[0], sink, sizeof sink);
		CHECK(n > 0, "reading the full pipe");
		for (ssize_t i = 0; i < n && drained + i < 1 << 16; i++) CHECK(sink[i] == 'b', "contents of the full pipe");
		drained += n;
	}
	for (int i = 0; i < N; i++) {
		CHECK(SOON(calls[i].ended), "%s does not return", calls[i].name);
		BREAK("result") calls[N - 1].result = 0;
		CHECK(calls[i].result == 1, "%s: wrong result, errno %ld", calls[i].name, calls[i].error);
	}
	pass();
}
