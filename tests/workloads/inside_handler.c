/* Stopped in the middle of a signal handler that runs on the alternate stack, nested in a second one, over
 * an interrupted read() that SA_RESTART has to resume. */
#include "workload.h"

static char *altstack;
static volatile int depth, go, on_alt, returned, result;
static volatile double before_fp = 3.25;
static int pipe_fds[2];

static void handler(int s, siginfo_t *si, void *ctx)
{
	(void)si; (void)ctx;
	char here;
	on_alt += &here >= altstack && &here < altstack + 65536;
	if (++depth == 1) raise(SIGRTMIN + 1);
	else while (!go) usleep(1000);
	BREAK("stack") on_alt = 0;
	stack_t now;
	sigaltstack(0, &now);
	if (!(now.ss_flags & SS_ONSTACK) || now.ss_sp != altstack) on_alt = -s;
	returned++;
}

static void *reader(void *arg)
{
	stack_t st = { .ss_sp = altstack, .ss_size = 65536 };
	NEED(!sigaltstack(&st, 0));
	struct sigaction sa = { .sa_sigaction = handler, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART };
	NEED(!sigaction(SIGRTMIN, &sa, 0) && !sigaction(SIGRTMIN + 1, &sa, 0));
	*(volatile pid_t *)arg = syscall(SYS_gettid);
	char c = 0;
	double x = before_fp * 2;
	int n = read(pipe_fds[0], &c, 1);
	result = n == 1 && c == 'r' && x == 6.5 ? 1 : -1;
	return 0;
}

int main(int argc, char **argv)
{
	begin(argc, argv);
	altstack = map(65536, PROT_READ | PROT_WRITE, MAP_PRIVATE);
	NEED(!pipe(pipe_fds));
	pthread_t t;
	volatile pid_t tid = 0;
	NEED(!pthread_create(&t, 0, reader, (void *)&tid));
	NEED(SOON(tid) && SOON(state_of(tid) == 'S'));
	NEED(!syscall(SYS_tgkill, getpid(), tid, SIGRTMIN));
	NEED(SOON(depth == 2));
	ready();
	wait_asked();
	BREAK("stack") on_alt = 0;
	CHECK(on_alt == 2 && !returned, "both handlers are on the alternate stack (%d)", on_alt);
	go = 1;
	CHECK(SOON(returned == 2), "both handlers return (%d)", returned);
	CHECK(on_alt == 2, "the alternate stack was in use to the end (%d)", on_alt);
	CHECK(!result, "read() returned before there was anything to read");
	BREAK("read") NEED(write(pipe_fds[1], "q", 1) == 1);
	CHECK(write(pipe_fds[1], "r", 1) == 1 && SOON(result == 1), "the interrupted read() goes on");
	pass();
}
