/* Blocked signals wait with their siginfo and in their order: for the process, for each thread, queued and plain. */
#include "workload.h"

static volatile pid_t tids[2];
static volatile int asked, answered;
static sigset_t all;

static void expect(const char *who, int sig, int code, int value, int has_value)
{
	siginfo_t si;
	sigset_t one;
	sigemptyset(&one);
	sigaddset(&one, sig);
	memset(&si, 0, sizeof si);
	/* The raw call: glibc turns SI_TKILL into SI_USER. */
	int got = syscall(SYS_rt_sigtimedwait, &one, &si, &(struct timespec){ 0, 0 }, 8);
	CHECK(got == sig, "%s: signal %d is pending (got %d)", who, sig, got);
	CHECK(si.si_code == code, "%s: signal %d has code %d, wanted %d", who, sig, si.si_code, code);
	CHECK(si.si_pid == getpid() && si.si_uid == getuid(), "%s: signal %d is from pid %d uid %d", who, sig, si.si_pid, si.si_uid);
	CHECK(!has_value || si.si_value.sival_int == value, "%s: signal %d carries %d, wanted %d", who, sig, si.si_value.sival_int, value);
}

static void expect_none(const char *who)
{
	siginfo_t si;
	int got = sigtimedwait(&all, &si, &(struct timespec){ 0, 0 });
	CHECK(got < 0, "%s: signal %d came from nowhere", who, got);
}

static void queue_to(pid_t tid, int sig, int value)
{
	siginfo_t si = { .si_signo = sig, .si_code = SI_QUEUE };
	si.si_pid = getpid();
	si.si_uid = getuid();
	si.si_value.sival_int = value;
	NEED(!syscall(SYS_rt_tgsigqueueinfo, getpid(), tid, sig, &si));
}

static void *run(void *arg)
{
	intptr_t me = (intptr_t)arg;
	char who[32];
	snprintf(who, sizeof who, "thread %ld", (long)me);
	tids[me] = syscall(SYS_gettid);
	while (asked != me + 1) usleep(1000);
	for (int i = 0; i < 4; i++) expect(who, SIGRTMIN + 3, SI_QUEUE, 100 * me + i, 1);
	expect(who, SIGUSR2, SI_TKILL, 0, 0);
	answered = me + 1;
	for (;;) pause();
	return 0;
}

int main(int argc, char **argv)
{
	begin(argc, argv);
	sigfillset(&all);
	sigdelset(&all, SIGUSR1);
	NEED(!pthread_sigmask(SIG_BLOCK, &all, 0));
	pthread_t t;
	for (intptr_t i = 0; i < 2; i++) NEED(!pthread_create(&t, 0, run, (void *)i));
	NEED(SOON(tids[0] && tids[1]));
	for (int i = 0; i < 5; i++) NEED(!sigqueue(getpid(), SIGRTMIN + 1, (union sigval){ .sival_int = 1000 + i }));
	NEED(!sigqueue(getpid(), SIGHUP, (union sigval){ .sival_int = 77 }));
	NEED(!kill(getpid(), SIGTERM) && !kill(getpid(), SIGTERM) && !kill(getpid(), SIGWINCH));
	for (int th = 0; th < 2; th++) {
		for (int i = 0; i < 4; i++) queue_to(tids[th], SIGRTMIN + 3, 100 * th + i);
		NEED(!syscall(SYS_tgkill, getpid(), tids[th], SIGUSR2));
	}
	queue_to(getpid(), SIGRTMIN + 2, 9);
	ready();
	wait_asked();
	BREAK("shared") { siginfo_t si; sigset_t s; sigemptyset(&s); sigaddset(&s, SIGTERM); sigwaitinfo(&s, &si); }
	BREAK("order") { siginfo_t si; sigset_t s; sigemptyset(&s); sigaddset(&s, SIGRTMIN + 1); sigwaitinfo(&s, &si); sigqueue(getpid(), SIGRTMIN + 1, si.si_value); }
	BREAK("extra") kill(getpid(), SIGCHLD);
	BREAK("thread") syscall(SYS_tgkill, getpid(), tids[1], SIGRTMIN + 3), tids[1] = 0, asked = 1;
	BREAK("leader") { siginfo_t si; sigset_t s; sigemptyset(&s); sigaddset(&s, SIGRTMIN + 2); sigwaitinfo(&s, &si); }
	for (int i = 0; i < 5; i++) expect("process", SIGRTMIN + 1, SI_QUEUE, 1000 + i, 1);
	expect("process", SIGHUP, SI_QUEUE, 77, 1);
	expect("process", SIGTERM, SI_USER, 0, 0);
	expect("process", SIGWINCH, SI_USER, 0, 0);
	expect("leader", SIGRTMIN + 2, SI_QUEUE, 9, 1);
	expect_none("process and leader");
	for (int th = 0; th < 2; th++) {
		asked = th + 1;
		CHECK(SOON(answered == th + 1), "thread %d answers", th);
	}
	BREAK("thread") BROKEN("a signal too many for thread 1 %d", kill(getpid(), 0));
	pass();
}
