/* A parent inside vfork(2), uninterruptible until its child, which shares its memory, ends. */
#include "workload.h"

static volatile int seen;
int main(int argc, char **argv)
{
	begin(argc, argv);
	pid_t child = vfork();
	if (!child) {
		seen = 1;
		say("ready %d", getppid());
		/* The harness asks the child: the parent can't run. */
		wait_asked();
		seen++;
		BREAK("lost") seen = 9;
		_exit(5);
	}
	int status;
	CHECK(child > 0 && seen == 2, "the parent runs when the child has ended, not before (%d)", seen);
	CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 5, "status %#x", status);
	pass();
}
