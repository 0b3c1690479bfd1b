/* Dispositions of all 64 signals: handler, mask, flags, restorer; and the handlers work. */
#include "workload.h"

struct kernel_action { void *handler; unsigned long flags; void *restorer; uint64_t mask; };
static volatile sig_atomic_t plain_runs, info_value, mask_seen;

static void on_plain(int s) { plain_runs += s; }
static void on_info(int s, siginfo_t *si, void *ctx)
{
	(void)ctx;
	sigset_t now;
	sigprocmask(SIG_SETMASK, 0, &now);
	mask_seen = sigismember(&now, SIGTERM) && sigismember(&now, s);
	info_value = si->si_value.sival_int;
}

static void all_actions(struct kernel_action *a)
{
	memset(a, 0, 65 * sizeof *a);
	for (int s = 1; s <= 64; s++) NEED(!syscall(SYS_rt_sigaction, s, 0, &a[s], 8));
}

int main(int argc, char **argv)
{
	begin(argc, argv);
	static struct kernel_action before[65], after[65];
	struct sigaction sa;
	memset(&sa, 0, sizeof sa);
	sa.sa_handler = on_plain;
	sa.sa_flags = SA_RESTART | SA_NODEFER;
	NEED(!sigaction(SIGUSR2, &sa, 0));
	sa.sa_flags = SA_RESETHAND | SA_ONSTACK;
	NEED(!sigaction(SIGHUP, &sa, 0));
	sa.sa_sigaction = on_info;
	sa.sa_flags = SA_SIGINFO;
	sigaddset(&sa.sa_mask, SIGTERM);
	for (int s = SIGRTMIN; s <= SIGRTMAX; s += 3) { sigaddset(&sa.sa_mask, s); NEED(!sigaction(s, &sa, 0)); }
	signal(SIGPIPE, SIG_IGN);
	signal(SIGTTOU, SIG_IGN);
	sa.sa_handler = SIG_DFL;
	sa.sa_flags = SA_NOCLDWAIT | SA_NOCLDSTOP;
	NEED(!sigaction(SIGCHLD, &sa, 0));
	all_actions(before);
	ready();
	wait_asked();
	BREAK("handler") signal(SIGUSR2, SIG_IGN);
	BREAK("ignored") signal(SIGPIPE, SIG_DFL);
	BREAK("mask") { sa.sa_sigaction = on_info; sa.sa_flags = SA_SIGINFO; sigemptyset(&sa.sa_mask); sigaction(SIGRTMIN, &sa, 0); }
	BREAK("flags") { sigaction(SIGHUP, 0, &sa); sa.sa_flags &= ~SA_ONSTACK; sigaction(SIGHUP, &sa, 0); }
	all_actions(after);
	for (int s = 1; s <= 64; s++)
		CHECK(!memcmp(&before[s], &after[s], sizeof *before), "signal %d: handler %p flags %#lx mask %#lx restorer %p", s,
			after[s].handler, after[s].flags, after[s].mask, after[s].restorer);
	CHECK(!raise(SIGUSR2) && plain_runs == SIGUSR2, "a handler runs");
	CHECK(!sigqueue(getpid(), SIGRTMIN, (union sigval){ .sival_int = 4242 }) && info_value == 4242 && mask_seen, "a handler gets its siginfo and mask");
	CHECK(!raise(SIGHUP) && signal(SIGHUP, SIG_DFL) == SIG_DFL, "SA_RESETHAND");
	pass();
}
