/* What unix sockets carry besides bytes: a pipe and a file in flight and nowhere else, the sender's credentials, and
 * who made a pair (SO_PEERCRED). */
#include "workload.h"
#include <sys/socket.h>

static int get(int s, char *text, int *fds, struct ucred *who)
{
	char control[256];
	struct iovec iov = { text, 64 };
	struct msghdr m = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control };
	int n = recvmsg(s, &m, MSG_DONTWAIT);
	for (struct cmsghdr *c = CMSG_FIRSTHDR(&m); n >= 0 && c; c = CMSG_NXTHDR(&m, c)) {
		if (c->cmsg_type == SCM_RIGHTS) memcpy(fds, CMSG_DATA(c), c->cmsg_len - CMSG_LEN(0));
		if (c->cmsg_type == SCM_CREDENTIALS) memcpy(who, CMSG_DATA(c), sizeof *who);
	}
	return n;
}

int main(int argc, char **argv)
{
	begin(argc, argv);
	int s[2], p[2], fds[2] = { -1, -1 }, child;
	struct ucred who = { 0 };
	char text[64], control[CMSG_SPACE(2 * sizeof(int))] = { 0 };
	NEED(!socketpair(AF_UNIX, SOCK_SEQPACKET, 0, s) && !pipe(p));
	int file = open("/proc/self/exe", O_RDONLY);
	NEED(!setsockopt(s[1], SOL_SOCKET, SO_PASSCRED, &(int){ 1 }, 4) && write(p[1], "in the pipe", 11) == 11 && lseek(file, 1, SEEK_SET) == 1);
	child = fork();
	if (!child) _exit(send(s[0], "from the child", 14, 0) != 14);
	NEED(waitpid(child, 0, 0) == child);
	struct iovec iov = { "files", 5 };
	struct msghdr m = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control };
	struct cmsghdr *c = CMSG_FIRSTHDR(&m);
	*c = (struct cmsghdr){ .cmsg_len = CMSG_LEN(2 * sizeof(int)), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS };
	memcpy(CMSG_DATA(c), (int[]){ p[0], file }, 2 * sizeof(int));
	NEED(sendmsg(s[0], &m, 0) == 5 && !close(p[0]) && !close(file));
	ready();
	wait_asked();
	BREAK("creds") { NEED(recv(s[1], text, 64, 0) == 14 && recv(s[1], text, 64, 0) == 5); }
	socklen_t len = sizeof who;
	CHECK(!getsockopt(s[1], SOL_SOCKET, SO_PEERCRED, &who, &len) && who.pid == getpid(), "SO_PEERCRED says %d", who.pid);
	CHECK(get(s[1], text, fds, &who) == 14 && who.pid == child && who.uid == getuid(), "credentials of %d, not %d", who.pid, child);
	BREAK("rights") { NEED(recv(s[1], text, 64, 0) == 5); }
	CHECK(get(s[1], text, fds, &who) == 5 && who.pid == getpid() && fds[0] >= 0, "descriptors");
	CHECK(read(fds[0], text, 64) == 11 && write(p[1], "x", 1) == 1 && read(fds[0], text, 64) == 1, "the pipe");
	CHECK(read(fds[1], text, 3) == 3 && !memcmp(text, "ELF", 3), "the file and its position");
	pass();
}
