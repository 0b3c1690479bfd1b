/* pidfds of a child, of a thread, of one that has ended, of one that is gone, of the parent; shared, polled, waited by, in
 * flight between other messages. */
#include "workload.h"
#include <poll.h>
#include <sys/epoll.h>
#include <sys/socket.h>

#ifndef P_PIDFD
#define P_PIDFD 3
#endif
#define THREAD O_EXCL

static int open_pid(pid_t pid, int flags) { return syscall(SYS_pidfd_open, pid, flags); }
static int signal_to(int fd, int signal) { return syscall(SYS_pidfd_send_signal, fd, signal, 0, 0); }

/* The number in fdinfo. */
static int stands_for(int fd)
{
	char path[64], text[1024];
	snprintf(path, sizeof path, "/proc/self/fdinfo/%d", fd);
	if (slurp(path, text, sizeof text) < 0) return -2;
	char *line = strstr(text, "\nPid:");
	return line ? atoi(line + 5) : -2;
}

static int readable(int fd)
{
	struct pollfd p = { fd, POLLIN, 0 };
	return poll(&p, 1, 0) == 1;
}

static int post(int s, const char *text, int fd)
{
	char control[CMSG_SPACE(sizeof(int))] = { 0 };
	struct iovec iov = { (char *)text, strlen(text) };
	struct msghdr m = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control, .msg_controllen = fd < 0 ? 0 : sizeof control };
	*(struct cmsghdr *)control = (struct cmsghdr){ .cmsg_len = CMSG_LEN(sizeof(int)), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS };
	memcpy(CMSG_DATA((struct cmsghdr *)control), &fd, sizeof fd);
	return sendmsg(s, &m, 0) == (int)strlen(text);
}

/* The next message; the descriptor that came with it, or -1; -2 if it is another message. */
static int fetch(int s, const char *text)
{
	char control[CMSG_SPACE(sizeof(int))], b[16];
	struct iovec iov = { b, sizeof b };
	struct msghdr m = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control };
	int n = recvmsg(s, &m, MSG_DONTWAIT), fd = -1;
	if (n != (int)strlen(text) || memcmp(b, text, n)) return -2;
	if (CMSG_FIRSTHDR(&m)) memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&m)), sizeof fd);
	return fd;
}

static void *idle(void *tid) { *(volatile pid_t *)tid = gettid(); while (pause()) {} return 0; }

int main(int argc, char **argv)
{
	begin(argc, argv);
	int up[2], down[2];
	NEED(!pipe(up) && !pipe(down));
	volatile pid_t tid = 0;
	pthread_t thread;
	NEED(!pthread_create(&thread, 0, idle, (void *)&tid) && SOON(tid));
	pid_t living = fork();
	NEED(living >= 0);
	if (!living) for (;;) pause();
	pid_t ended = fork();
	if (!ended) _exit(7);
	pid_t gone = fork();
	if (!gone) _exit(8);
	siginfo_t info;
	NEED(!waitid(P_PID, ended, &info, WEXITED | WNOWAIT));
	int fd_living = open_pid(living, 0), fd_ended = open_pid(ended, O_NONBLOCK), fd_gone = open_pid(gone, 0);
	int fd_self = open_pid(getpid(), 0), fd_thread = open_pid(tid, THREAD);
	NEED(fd_living >= 0 && fd_ended >= 0 && fd_gone >= 0 && fd_self >= 0);
	NEED(!fcntl(fd_self, F_SETFD, 0));
	NEED(waitpid(gone, 0, 0) == gone && stands_for(fd_gone) == -1);
	int again = open_pid(living, 0), twice = dup(fd_living), far = fcntl(fd_living, F_DUPFD_CLOEXEC, 50);
	int set = epoll_create1(0);
	struct epoll_event event = { EPOLLIN, { .u64 = 11 } }, got;
	NEED(!epoll_ctl(set, EPOLL_CTL_ADD, fd_living, &event));
	int packets[2], bytes[2];
	NEED(!socketpair(AF_UNIX, SOCK_SEQPACKET, 0, packets) && !socketpair(AF_UNIX, SOCK_STREAM, 0, bytes));
	int alone = open_pid(getpid(), O_NONBLOCK);
	NEED(post(packets[0], "one", -1) && post(packets[0], "two", fd_living) && post(packets[0], "three", alone) && post(packets[0], "four", -1));
	NEED(post(bytes[0], "five", fd_gone) && post(bytes[0], "six", fd_self) && !shutdown(bytes[0], SHUT_WR) && !close(alone));
	/* One that has its parent's, and shares all others. */
	pid_t friend = fork();
	NEED(friend >= 0);
	if (!friend) {
		char c;
		NEED(write(up[1], "r", 1) == 1 && read(down[0], &c, 1) == 1);
		CHECK(stands_for(fd_self) == getppid() && !signal_to(fd_self, 0), "the parent");
		CHECK(fcntl(fd_living, F_GETFL) & O_NONBLOCK, "what the parent set on the file that both have");
		CHECK(waitid(P_PIDFD, fd_living, &info, WEXITED | WNOHANG) == -1 && errno == ECHILD, "no child of this one");
		_exit(3);
	}
	char c;
	NEED(read(up[0], &c, 1) == 1);
	int flags_self = fcntl(fd_self, F_GETFD);
	ready();
	wait_asked();
	BREAK("living") dup2(fd_self, fd_living);
	BREAK("ended") waitpid(ended, 0, 0);
	BREAK("gone") dup2(fd_self, fd_gone);
	BREAK("thread") dup2(fd_self, fd_thread);
	BREAK("flags") fcntl(fd_self, F_SETFD, FD_CLOEXEC);
	BREAK("shared") fd_living = far = twice = open_pid(living, 0);
	BREAK("epoll") epoll_ctl(set, EPOLL_CTL_DEL, fd_living, 0);
	BREAK("flight") fetch(packets[1], "one"), fetch(packets[1], "two");
	BREAK("bytes") fetch(bytes[1], "five");
	int flown, end;
	CHECK(fetch(packets[1], "one") == -1 && (flown = fetch(packets[1], "two")) >= 0 && stands_for(flown) == living, "the living, in flight");
	CHECK(syscall(SYS_kcmp, getpid(), getpid(), 0, flown, fd_living) == 0, "the same file in flight");
	CHECK((end = fetch(packets[1], "three")) >= 0 && stands_for(end) == getpid() && fcntl(end, F_GETFL) & O_NONBLOCK, "one that was in flight only");
	CHECK(fetch(packets[1], "four") == -1 && fetch(packets[1], "") == -2, "the messages behind");
	close(flown), close(end);
	CHECK((flown = fetch(bytes[1], "five")) >= 0 && stands_for(flown) == -1 && (end = fetch(bytes[1], "six")) >= 0 && stands_for(end) == getpid(), "in a stream");
	CHECK(recv(bytes[1], &c, 1, MSG_DONTWAIT) == 0, "the end of the stream");
	close(flown), close(end);
	CHECK(stands_for(fd_living) == living && stands_for(again) == living && stands_for(far) == living, "the living");
	CHECK(stands_for(fd_self) == getpid() && stands_for(fd_ended) == ended && stands_for(fd_gone) == -1, "the others");
	CHECK(fd_thread < 0 || stands_for(fd_thread) == tid, "the thread");
	CHECK(fcntl(fd_self, F_GETFD) == flags_self && fcntl(far, F_GETFD) == FD_CLOEXEC, "close-on-exec");
	CHECK(!readable(fd_living) && readable(fd_ended) && readable(fd_gone), "who is there");
	CHECK(signal_to(fd_gone, 0) == -1 && errno == ESRCH, "nobody is there");
	CHECK(fcntl(fd_ended, F_GETFL) & O_NONBLOCK && !(fcntl(again, F_GETFL) & O_NONBLOCK), "O_NONBLOCK");
	CHECK(!fcntl(fd_living, F_SETFL, O_RDWR | O_NONBLOCK) && fcntl(twice, F_GETFL) & O_NONBLOCK && !(fcntl(again, F_GETFL) & O_NONBLOCK),
	      "which are one file");
	NEED(write(down[1], "g", 1) == 1);
	int status;
	CHECK(waitpid(friend, &status, 0) == friend && WEXITSTATUS(status) == 3, "the friend, %#x", status);
	CHECK(!waitid(P_PIDFD, fd_ended, &info, WEXITED) && info.si_pid == ended && info.si_status == 7, "the one that has ended");
	CHECK(epoll_wait(set, &got, 1, 0) == 0 && !signal_to(twice, SIGKILL), "a signal");
	CHECK(epoll_wait(set, &got, 1, 5000) == 1 && got.data.u64 == 11, "the end of the living is told");
	CHECK(!waitid(P_PIDFD, far, &info, WEXITED) && info.si_pid == living && info.si_status == SIGKILL, "the living");
	pass();
}
