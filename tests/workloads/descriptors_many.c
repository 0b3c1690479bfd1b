/* All numbers up to 700 in use, by eventfds and timerfds in turn: what ckpt-restore opens has no place beside them where
 * the limit on open files is little more. */
#include "workload.h"
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <sys/timerfd.h>

enum { MOST = 700 };

static int is_timer(int fd) { return fd % 2 || fd % 7 == 0; }

int main(int argc, char **argv)
{
	begin(argc, argv);
	NEED(!setrlimit(RLIMIT_NOFILE, &(struct rlimit){ MOST + 100, MOST + 100 }));
	for (int fd = 0; fd < MOST; fd++) {
		if (fd == LOG_FD) continue;
		struct itimerspec every = { { 100000 + fd, 0 }, { 100000 + fd, 0 } };
		int new = is_timer(fd) ? timerfd_create(CLOCK_MONOTONIC, 0) : eventfd(fd + 1, EFD_NONBLOCK);
		NEED(new >= 0 && (!is_timer(fd) || !timerfd_settime(new, 0, &every, 0)));
		if (new == fd) { NEED(!fcntl(fd, F_SETFD, fd % 3 ? 0 : FD_CLOEXEC)); continue; }
		NEED(dup3(new, fd, fd % 3 ? 0 : O_CLOEXEC) == fd && !close(new));
	}
	NEED(dup2(10, MOST + 20) == MOST + 20);
	ready();
	wait_asked();
	BREAK("swapped") NEED(dup2(10, MOST) == MOST && dup2(12, 10) == 10 && dup2(MOST, 12) == 12 && !close(MOST));
	BREAK("flag") NEED(!fcntl(9, F_SETFD, 0));
	BREAK("more") NEED(dup2(10, MOST + 1) == MOST + 1);
	BREAK("copy") NEED(dup2(12, MOST + 20) == MOST + 20);
	for (int fd = 0; fd < MOST; fd++) {
		if (fd == LOG_FD) continue;
		struct itimerspec every;
		uint64_t n = 0;
		CHECK(is_timer(fd) ? !timerfd_gettime(fd, &every) && every.it_interval.tv_sec == 100000 + fd : read(fd, &n, 8) == 8 && n == fd + 1ul, "fd %d", fd);
		CHECK(fcntl(fd, F_GETFD) == (fd % 3 ? 0 : FD_CLOEXEC), "flag of fd %d", fd);
	}
	for (int fd = MOST; fd < 2 * MOST; fd++) CHECK(fd == MOST + 20 || fcntl(fd, F_GETFD) < 0, "fd %d is open", fd);
	uint64_t n = 77;
	CHECK(write(10, &n, 8) == 8 && read(MOST + 20, &n, 8) == 8 && n == 77, "a copy of fd 10");
	pass();
}
