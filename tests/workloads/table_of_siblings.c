/* Two processes that share a descriptor table which their parent does not have any more: nobody can fork them so again. */
#include "workload.h"
#include <sched.h>

int main(int argc, char **argv)
{
	begin(argc, argv);
	volatile int *fds = map(PAGE, PROT_READ | PROT_WRITE, MAP_SHARED);
	pid_t first = syscall(SYS_clone, CLONE_FILES | SIGCHLD, 0, 0, 0, 0);
	if (!first) { while (!fds[0]) usleep(500); fds[1] = open("/dev/null", O_RDONLY); for (;;) pause(); }
	pid_t second = syscall(SYS_clone, CLONE_FILES | SIGCHLD, 0, 0, 0, 0);
	if (!second) { while (!fds[1]) usleep(500); fds[2] = fcntl(fds[1], F_GETFD) >= 0 ? 1 : -1; for (;;) pause(); }
	NEED(first > 0 && second > 0 && !unshare(CLONE_FILES));
	ready();
	wait_asked();
	BREAK("gone") { kill(second, SIGKILL); waitpid(second, 0, 0); }
	fds[0] = 1;
	CHECK(SOON(fds[2]) && fds[2] == 1, "they do not share their descriptors");
	CHECK(fcntl(fds[1], F_GETFD) < 0, "their parent has one too");
	pass();
}
