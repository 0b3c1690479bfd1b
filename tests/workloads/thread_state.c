/* Threads: ids, names, masks, alternate stacks, scheduling, timer slack, fs and gs bases, rseq, robust
 * lists, and the word that the kernel clears when one ends (pthread_join waits for it). */
#include "workload.h"
#include <asm/prctl.h>
#include <linux/rseq.h>
#include <sched.h>
#include <sys/resource.h>
#include <sys/rseq.h>

enum { N = 6 };
static struct seen {
	pid_t tid;
	char name[32];
	sigset_t mask;
	stack_t stack;
	int policy, priority, nice;
	long slack, fs, gs;
	void *robust;
	size_t robust_len;
	char blocked[64];
} before[N], after[N];
static volatile int built, asked, broken_lock_held;
static pthread_mutex_t robust;
static __thread uint64_t own = 0x1234567890abcdef;

static void look(struct seen *s)
{
	struct sched_param p;
	memset(s, 0, sizeof *s);
	s->tid = syscall(SYS_gettid);
	prctl(PR_GET_NAME, s->name);
	pthread_sigmask(SIG_SETMASK, 0, &s->mask);
	sigaltstack(0, &s->stack);
	s->policy = sched_getscheduler(0);
	sched_getparam(0, &p);
	s->priority = p.sched_priority;
	s->nice = (int)syscall(SYS_getpriority, 0, 0);
	s->slack = prctl(PR_GET_TIMERSLACK);
	syscall(SYS_arch_prctl, ARCH_GET_FS, &s->fs);
	syscall(SYS_arch_prctl, ARCH_GET_GS, &s->gs);
	syscall(SYS_get_robust_list, 0, &s->robust, &s->robust_len);
	status_line(0, "SigBlk", s->blocked, sizeof s->blocked);
}

/* rseq: the kernel keeps the CPU number in the area up to date, and knows the area. */
static void check_rseq(int me)
{
	struct rseq *r = (void *)((char *)__builtin_thread_pointer() + __rseq_offset);
	if (!__rseq_size) return;
	cpu_set_t all, one;
	CHECK(!sched_getaffinity(0, sizeof all, &all), "affinity");
	for (int c = 0; c < CPU_SETSIZE; c++) {
		if (!CPU_ISSET(c, &all)) continue;
		CPU_ZERO(&one);
		CPU_SET(c, &one);
		CHECK(!sched_setaffinity(0, sizeof one, &one), "set affinity");
		BREAK("rseq") r->cpu_id = 77;
		int cpu = *(volatile __u32 *)&r->cpu_id;
		CHECK(cpu == c, "thread %d: rseq says cpu %d on cpu %d", me, cpu, c);
	}
	sched_setaffinity(0, sizeof all, &all);
	CHECK(syscall(SYS_rseq, r, 32, 0, RSEQ_SIG) == -1 && errno == EBUSY, "thread %d: rseq is not registered as it was", me);
}

static void *run(void *arg)
{
	intptr_t me = (intptr_t)arg;
	char name[16];
	sigset_t set;
	own += me;
	snprintf(name, sizeof name, "worker %ld)x", (long)me);
	prctl(PR_SET_NAME, name);
	sigfillset(&set);
	sigdelset(&set, SIGRTMIN + me);
	pthread_sigmask(SIG_SETMASK, &set, 0);
	if (me & 1) {
		stack_t s = { .ss_sp = malloc(65536), .ss_size = 65536 - me * 16 };
		NEED(!sigaltstack(&s, 0));
		syscall(SYS_arch_prctl, ARCH_SET_GS, 0x700000001000 + me);
	}
	struct sched_param p = { 0 };
	if (me == 2) NEED(!sched_setscheduler(0, SCHED_BATCH, &p));
	if (me == 3) { p.sched_priority = 5; NEED(!sched_setscheduler(0, SCHED_RR | SCHED_RESET_ON_FORK, &p)); }
	if (me == 4) NEED(!sched_setscheduler(0, SCHED_IDLE, &p));
	if (me == 5) NEED(!setpriority(PRIO_PROCESS, 0, 11));
	prctl(PR_SET_TIMERSLACK, 100000 + me);
	if (me == 1) NEED(!pthread_mutex_lock(&robust));
	look(&before[me]);
	__sync_fetch_and_add(&built, 1);
	while (!asked) usleep(2000);
	BREAK("name") prctl(PR_SET_NAME, "lost");
	BREAK("mask") { sigaddset(&set, SIGRTMIN + me); pthread_sigmask(SIG_SETMASK, &set, 0); }
	BREAK("altstack") { stack_t s = { .ss_flags = SS_DISABLE }; sigaltstack(&s, 0); }
	BREAK("sched") { p.sched_priority = 0; sched_setscheduler(0, SCHED_OTHER, &p); }
	BREAK("nice") setpriority(PRIO_PROCESS, 0, 3);
	BREAK("slack") prctl(PR_SET_TIMERSLACK, 7);
	BREAK("gs") syscall(SYS_arch_prctl, ARCH_SET_GS, 0);
	BREAK("robust") syscall(SYS_set_robust_list, (void *)before[me].robust - 8, 24);
	BREAK("tls") own = 0;
	look(&after[me]);
	CHECK(own == 0x1234567890abcdef + (uint64_t)me, "thread-local storage of thread %ld", (long)me);
	check_rseq(me);
	__sync_fetch_and_add(&built, 1);
	return (void *)(me * 3); /* thread 1 ends with the robust mutex locked */
}

int main(int argc, char **argv)
{
	begin(argc, argv);
	pthread_mutexattr_t attr;
	pthread_mutexattr_init(&attr);
	pthread_mutexattr_setrobust(&attr, PTHREAD_MUTEX_ROBUST);
	pthread_mutex_init(&robust, &attr);
	pthread_t t[N];
	for (intptr_t i = 1; i < N; i++) NEED(!pthread_create(&t[i], 0, run, (void *)i));
	prctl(PR_SET_NAME, "leader\n");
	prctl(PR_SET_TIMERSLACK, 99999);
	look(&before[0]);
	NEED(SOON(built == N - 1));
	ready();
	wait_asked();
	look(&after[0]);
	asked = 1;
	CHECK(SOON(built == 2 * N - 2), "all threads go on");
	for (int i = 0; i < N; i++) {
		struct seen *b = &before[i], *a = &after[i];
		CHECK(a->tid == b->tid, "thread %d: tid %d became %d", i, b->tid, a->tid);
		CHECK(!strcmp(a->name, b->name), "thread %d: name '%s' became '%s'", i, b->name, a->name);
		CHECK(!memcmp(&a->mask, &b->mask, 8) && !strcmp(a->blocked, b->blocked), "thread %d: mask %s became %s", i, b->blocked, a->blocked);
		CHECK(a->stack.ss_sp == b->stack.ss_sp && a->stack.ss_size == b->stack.ss_size && a->stack.ss_flags == b->stack.ss_flags, "thread %d: altstack", i);
		CHECK(a->policy == b->policy && a->priority == b->priority, "thread %d: policy %d/%d became %d/%d", i, b->policy, b->priority, a->policy, a->priority);
		CHECK(a->nice == b->nice, "thread %d: nice %d became %d", i, 20 - b->nice, 20 - a->nice);
		CHECK(a->slack == b->slack, "thread %d: timer slack %ld became %ld", i, b->slack, a->slack);
		CHECK(a->fs == b->fs && a->gs == b->gs, "thread %d: fs or gs base", i);
		CHECK(a->robust == b->robust && a->robust_len == b->robust_len, "thread %d: robust list", i);
	}
	for (intptr_t i = 1; i < N; i++) {
		void *got = 0;
		struct timespec until;
		clock_gettime(CLOCK_REALTIME, &until);
		until.tv_sec += 5;
		CHECK(!pthread_timedjoin_np(t[i], &got, &until) && got == (void *)(i * 3), "thread %ld can be joined", (long)i);
	}
	CHECK(pthread_mutex_lock(&robust) == EOWNERDEAD, "the robust mutex of a dead thread");
	pass();
}
