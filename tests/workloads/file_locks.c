/* Locks on files: POSIX record locks of both kinds on ranges, flock, open file description locks; with owners that
 * conflict with a second process as before. */
#include "workload.h"
#include <sys/file.h>

/* Whether another process could take this lock: 0 if not, and who is in the way. */
static pid_t in_the_way(int fd, int type, off_t start, off_t len)
{
	struct flock l = { .l_type = type, .l_whence = SEEK_SET, .l_start = start, .l_len = len };
	CHECK(!fcntl(fd, F_GETLK, &l), "F_GETLK");
	return l.l_type == F_UNLCK ? 0 : l.l_pid;
}

static int flocked(const char *name, int how)
{
	int fd = open(name, O_RDWR), r = flock(fd, how | LOCK_NB);
	close(fd);
	return r < 0 && errno == EWOULDBLOCK;
}

int main(int argc, char **argv)
{
	begin(argc, argv);
	int fd = open("posix", O_RDWR | O_CREAT, 0600), ex = open("exclusive", O_RDWR | O_CREAT, 0600), sh = open("shared", O_RDWR | O_CREAT, 0600), ofd = open("ofd", O_RDWR | O_CREAT, 0600);
	NEED(!ftruncate(fd, 1000));
	struct flock write_lock = { .l_type = F_WRLCK, .l_start = 100, .l_len = 50 }, read_lock = { .l_type = F_RDLCK, .l_start = 500, .l_len = 0 };
	NEED(!fcntl(fd, F_SETLK, &write_lock) && !fcntl(fd, F_SETLK, &read_lock));
	NEED(!flock(ex, LOCK_EX) && !flock(sh, LOCK_SH));
	struct flock own = { .l_type = F_WRLCK, .l_start = 10, .l_len = 10 };
	NEED(!fcntl(ofd, F_OFD_SETLK, &own));
	int to[2], from[2];
	NEED(!pipe(to) && !pipe(from));
	pid_t child = fork();
	if (!child) {
		pid_t parent = getppid();
		char c;
		struct flock mine = { .l_type = F_WRLCK, .l_start = 300, .l_len = 1 };
		NEED(!fcntl(fd, F_SETLK, &mine));
		while (write(from[1], "r", 1) == 1 && read(to[0], &c, 1) == 1) {
			CHECK(in_the_way(fd, F_RDLCK, 120, 1) == parent, "the parent's write lock");
			CHECK(in_the_way(fd, F_WRLCK, 700, 1) == parent && !in_the_way(fd, F_RDLCK, 700, 1), "the parent's read lock");
			CHECK(!in_the_way(fd, F_WRLCK, 0, 100) && !in_the_way(fd, F_WRLCK, 150, 150), "ranges without a lock");
		}
		_exit(0);
	}
	char c;
	NEED(read(from[0], &c, 1) == 1);
	ready();
	wait_asked();
	BREAK("posix") { write_lock.l_type = F_UNLCK; fcntl(fd, F_SETLK, &write_lock); }
	BREAK("exclusive") flock(ex, LOCK_UN);
	BREAK("shared") flock(sh, LOCK_EX);
	BREAK("child") kill(child, SIGKILL), waitpid(child, 0, 0);
	BREAK("ofd") { own.l_type = F_UNLCK; own.l_pid = 0; fcntl(ofd, F_OFD_SETLK, &own); }
	CHECK(in_the_way(fd, F_WRLCK, 300, 1) == child, "the child's lock");
	CHECK(write(to[1], "?", 1) == 1 && SOON(({ int r; fcntl(from[0], F_SETFL, O_NONBLOCK); r = read(from[0], &c, 1) == 1; r; })), "the child finds our locks");
	CHECK(flocked("exclusive", LOCK_SH) && flocked("shared", LOCK_EX) && !flocked("shared", LOCK_SH), "flock");
	struct flock l = { .l_type = F_RDLCK, .l_start = 15, .l_len = 1 };
	int other = open("ofd", O_RDWR);
	CHECK(!fcntl(other, F_OFD_GETLK, &l) && l.l_type == F_WRLCK && l.l_start == 10 && l.l_len == 10, "open file description lock");
	pass();
}
