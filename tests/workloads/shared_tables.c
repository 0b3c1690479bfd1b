/* Processes that share descriptors and directories without being threads of one another (CLONE_FILES, CLONE_FS): a child
 * and a grandchild that share both, a child that shares descriptors alone, one that shares directories alone, and one that
 * shares nothing. A record lock belongs to the table, and tells who has taken it. */
#include "workload.h"
#include <sched.h>

enum { BOTH, GRANDCHILD, FILES, FS, NOTHING, PROCESSES };
static struct { volatile char order; volatile int arg, answer; } *desk;
static int lock_file;

static int obey(char order, int arg)
{
	struct stat st;
	switch (order) {
	case 'o': return open("/dev/null", O_RDONLY);
	case 'h': return fcntl(arg, F_GETFD) >= 0;
	case 'c': return close(arg);
	case 'd': return chdir(arg ? "/proc" : "/");
	case 'p': return !stat("self", &st);
	case 'm': return umask(arg);
	case 'f': return unshare(CLONE_FILES);
	case 's': return unshare(CLONE_FS);
	case 'l': return fcntl(lock_file, F_SETLK, &(struct flock){ .l_type = F_WRLCK, .l_start = 5, .l_len = 9 });
	case 'u': return fcntl(lock_file, F_SETLK, &(struct flock){ .l_type = F_UNLCK });
	}
	return -1;
}

static int tell(int who, char order, int arg)
{
	desk[who].arg = arg, desk[who].order = order;
	NEED(SOON(!desk[who].order));
	return desk[who].answer;
}

static void serve(int who)
{
	for (;;) {
		while (!desk[who].order) usleep(500);
		desk[who].answer = obey(desk[who].order, desk[who].arg), desk[who].order = 0;
	}
}

static pid_t spawn(int flags) { pid_t p = syscall(SYS_clone, flags | SIGCHLD, 0, 0, 0, 0); NEED(p >= 0); return p; }

int main(int argc, char **argv)
{
	begin(argc, argv);
	desk = map(PROCESSES * sizeof *desk, PROT_READ | PROT_WRITE, MAP_SHARED);
	lock_file = open("locked", O_RDWR | O_CREAT, 0600);
	int event = open("/dev/zero", O_RDONLY | O_CLOEXEC);
	NEED(lock_file >= 0 && event >= 0 && !chdir("/") && (umask(027), 1));
	pid_t both = spawn(CLONE_FILES | CLONE_FS);
	if (!both) { if (!spawn(CLONE_FILES | CLONE_FS)) serve(GRANDCHILD); serve(BOTH); }
	if (!spawn(CLONE_FILES)) serve(FILES);
	if (!spawn(CLONE_FS)) serve(FS);
	if (!spawn(0)) serve(NOTHING);
	NEED(tell(BOTH, 'l', 0) == 0 && tell(GRANDCHILD, 'd', 1) == 0);
	ready();
	wait_asked();
	BREAK("files") tell(GRANDCHILD, 'f', 0);
	BREAK("directories") tell(BOTH, 's', 0);
	BREAK("lock") tell(FILES, 'u', 0);
	BREAK("umask") umask(022);
	/* Opened by one, seen by all that share the table and by nobody else. */
	int fd = tell(GRANDCHILD, 'o', 0);
	CHECK(fd > event, "a new descriptor has number %d", fd);
	CHECK(fcntl(fd, F_GETFD) >= 0 && tell(BOTH, 'h', fd) == 1 && tell(FILES, 'h', fd) == 1, "descriptors are not shared");
	CHECK(tell(FS, 'h', fd) == 0 && tell(NOTHING, 'h', fd) == 0, "descriptors are shared with everybody");
	CHECK(tell(FILES, 'c', fd) == 0 && fcntl(fd, F_GETFD) < 0, "one descriptor, closed by another");
	CHECK(fcntl(event, F_GETFD) == FD_CLOEXEC && tell(NOTHING, 'h', event) == 1, "descriptors of before");
	/* All that share directories are where the grandchild went, and follow. */
	struct stat st;
	CHECK(!stat("self", &st) && tell(BOTH, 'p', 0) == 1 && tell(FS, 'p', 0) == 1, "the working directory");
	CHECK(tell(FILES, 'p', 0) == 0 && tell(NOTHING, 'p', 0) == 0, "the working directory of the others");
	CHECK(tell(FS, 'd', 0) == 0 && stat("self", &st) < 0 && tell(BOTH, 'p', 0) == 0 && tell(GRANDCHILD, 'p', 0) == 0, "directories are not shared");
	CHECK(tell(BOTH, 'm', 077) == 027 && tell(FS, 'm', 027) == 077, "umask is not shared");
	/* The lock is the table's. */
	struct flock lock = { .l_type = F_WRLCK };
	CHECK(!fcntl(lock_file, F_GETLK, &lock) && lock.l_type == F_UNLCK, "the lock is somebody else's");
	pid_t probe = fork();
	if (!probe) {
		struct flock theirs = { .l_type = F_WRLCK };
		_exit(!fcntl(lock_file, F_GETLK, &theirs) && theirs.l_type == F_WRLCK && theirs.l_start == 5 && theirs.l_len == 9 && theirs.l_pid == both ? 7 : 8);
	}
	int status;
	CHECK(waitpid(probe, &status, 0) == probe && WEXITSTATUS(status) == 7, "the lock, or who has taken it");
	pass();
}
