/* A task under a seccomp filter that kills it for any call it does not make itself: whoever runs a system call
 * in its name has to suspend the filter. */
#include "workload.h"
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>

int main(int argc, char **argv)
{
	begin(argc, argv);
	static const int allowed[] = { SYS_write, SYS_rt_sigtimedwait, SYS_pause, SYS_exit_group, SYS_restart_syscall, SYS_getpid };
	enum { N = sizeof allowed / sizeof *allowed };
	struct sock_filter f[N + 3] = { BPF_STMT(BPF_LD | BPF_W | BPF_ABS, 0) };
	for (int i = 0; i < N; i++) f[1 + i] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, allowed[i], N - i, 0);
	f[N + 1] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS);
	f[N + 2] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
	struct sock_fprog prog = { N + 3, f };
	say("about to filter");
	NEED(!prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
	NEED(!syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &prog));
	ready();
	wait_asked();
	BREAK("verdict") BROKEN("as asked");
	pass();
}
