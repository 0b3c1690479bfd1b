/* unix socketpairs of the three types: queues both ways, message boundaries, a pair across processes, an end that
 * is shut down, an end that is closed with its last message still queued, options. */
#include "workload.h"
#include <sys/socket.h>

static int expect(int fd, const char *want)
{
	char b[256];
	ssize_t n = recv(fd, b, sizeof b, MSG_DONTWAIT);
	return n == (ssize_t)strlen(want) && !memcmp(b, want, n);
}

static int option(int fd, int name) { int v = -1; socklen_t n = sizeof v; getsockopt(fd, SOL_SOCKET, name, &v, &n); return v; }

int main(int argc, char **argv)
{
	begin(argc, argv);
	int st[2], sq[2], dg[2], shut[2], widow[2], shared[2], big[2];
	static char block[150000];
	signal(SIGPIPE, SIG_IGN);
	NEED(!socketpair(AF_UNIX, SOCK_STREAM, 0, st) && !socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK, 0, sq) && !socketpair(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0, dg));
	NEED(!socketpair(AF_UNIX, SOCK_STREAM, 0, shut) && !socketpair(AF_UNIX, SOCK_STREAM, 0, widow) && !socketpair(AF_UNIX, SOCK_STREAM, 0, shared) && !socketpair(AF_UNIX, SOCK_STREAM, 0, big));
	NEED(send(st[0], "to one", 6, 0) == 6 && send(st[1], "to zero", 7, 0) == 7 && send(st[1], " and more", 9, 0) == 9);
	NEED(send(sq[0], "packet 1", 8, 0) == 8 && send(sq[0], "", 0, 0) == 0 && send(sq[0], "packet 3", 8, 0) == 8 && send(sq[1], "back", 4, 0) == 4);
	NEED(send(dg[0], "datagram", 8, 0) == 8 && send(dg[0], "another", 7, 0) == 7 && send(dg[1], "reply", 5, 0) == 5);
	NEED(send(shut[0], "before", 6, 0) == 6 && !shutdown(shut[0], SHUT_WR));
	NEED(send(widow[0], "last words", 10, 0) == 10 && !close(widow[0]));
	NEED(!setsockopt(st[0], SOL_SOCKET, SO_SNDBUF, &(int){ 100000 }, 4) && !setsockopt(st[1], SOL_SOCKET, SO_RCVBUF, &(int){ 50000 }, 4));
	NEED(!setsockopt(shared[0], SOL_SOCKET, SO_PASSCRED, &(int){ 1 }, 4) && !setsockopt(st[1], SOL_SOCKET, SO_RCVTIMEO, &(struct timeval){ 9, 500000 }, sizeof(struct timeval)));
	NEED(!setsockopt(big[0], SOL_SOCKET, SO_SNDBUF, &(int){ 400000 }, 4));
	fill(block, sizeof block, 81);
	NEED(send(big[0], block, sizeof block, MSG_DONTWAIT) == sizeof block);
	pid_t child = fork();
	if (!child) {
		char b[64];
		ssize_t n;
		close(shared[0]);
		close(widow[1]);
		close(shut[0]);
		while ((n = recv(shared[1], b, sizeof b, 0)) > 0) NEED(send(shared[1], b, n, 0) == n);
		_exit(6);
	}
	NEED(!close(shared[1]));
	int sndbuf = option(st[0], SO_SNDBUF), rcvbuf = option(st[1], SO_RCVBUF);
	ready();
	wait_asked();
	char b[256];
	BREAK("stream") NEED(expect(st[1], "to one"));
	BREAK("boundaries") { NEED(expect(dg[1], "datagram") && expect(dg[1], "another") && send(dg[0], "datagramanother", 15, 0) == 15); }
	BREAK("seqpacket") NEED(send(sq[0], "packet 4", 8, 0) == 8);
	BREAK("shutdown") NEED(dup2(st[0], shut[1]) == shut[1]);
	BREAK("widow") NEED(dup2(st[0], widow[1]) == widow[1]);
	BREAK("option") setsockopt(shared[0], SOL_SOCKET, SO_PASSCRED, &(int){ 0 }, 4);
	BREAK("child") kill(child, SIGSTOP);
	BREAK("big") { NEED(recv(big[1], b, 100, 0) == 100); }
	BREAK("cloexec") fcntl(dg[0], F_SETFD, 0);
	CHECK(option(st[0], SO_SNDBUF) == sndbuf && option(st[1], SO_RCVBUF) == rcvbuf, "buffer sizes %d %d became %d %d", sndbuf, rcvbuf, option(st[0], SO_SNDBUF), option(st[1], SO_RCVBUF));
	CHECK(option(shared[0], SO_PASSCRED) == 1 && option(st[1], SO_PASSCRED) == 0, "SO_PASSCRED");
	struct timeval tv;
	socklen_t len = sizeof tv;
	CHECK(!getsockopt(st[1], SOL_SOCKET, SO_RCVTIMEO, &tv, &len) && tv.tv_sec == 9 && tv.tv_usec == 500000, "SO_RCVTIMEO %ld.%06ld", tv.tv_sec, tv.tv_usec);
	CHECK(option(st[0], SO_TYPE) == SOCK_STREAM && option(sq[0], SO_TYPE) == SOCK_SEQPACKET && option(dg[0], SO_TYPE) == SOCK_DGRAM, "types");
	CHECK(fcntl(sq[0], F_GETFL) & O_NONBLOCK && fcntl(dg[0], F_GETFD) == FD_CLOEXEC, "flags");
	CHECK(expect(st[1], "to one") && recv(st[1], b, 1, MSG_DONTWAIT) < 0, "stream queue");
	size_t got = 0;
	for (ssize_t n; (n = recv(st[0], b + got, sizeof b - got, MSG_DONTWAIT)) > 0;) got += n;
	CHECK(got == 16 && !memcmp(b, "to zero and more", 16), "stream queue the other way");
	CHECK(expect(sq[1], "packet 1") && recv(sq[1], b, 64, 0) == 0 && expect(sq[1], "packet 3") && recv(sq[1], b, 64, 0) < 0 && expect(sq[0], "back"), "packets, one of them empty");
	CHECK(expect(dg[1], "datagram") && expect(dg[1], "another") && recv(dg[1], b, 64, MSG_DONTWAIT) < 0 && expect(dg[0], "reply"), "datagrams");
	CHECK(expect(shut[1], "before") && recv(shut[1], b, 64, MSG_DONTWAIT) == 0, "the end after shutdown");
	CHECK(send(shut[0], "x", 1, MSG_NOSIGNAL) < 0 && errno == EPIPE && send(shut[1], "y", 1, 0) == 1 && expect(shut[0], "y"), "shut down one way only");
	CHECK(expect(widow[1], "last words") && recv(widow[1], b, 64, MSG_DONTWAIT) == 0 && send(widow[1], "x", 1, MSG_NOSIGNAL) < 0 && errno == EPIPE, "the closed end's last words, then the end");
	char *back = malloc(sizeof block);
	for (got = 0; got < sizeof block;) { ssize_t n = recv(big[1], back + got, sizeof block - got, MSG_DONTWAIT); CHECK(n > 0, "big queue at %zu", got); got += n; }
	CHECK(!memcmp(back, block, sizeof block), "contents of the big queue");
	CHECK(send(shared[0], "echo", 4, 0) == 4 && SOON(recv(shared[0], b, 4, MSG_DONTWAIT) == 4) && !memcmp(b, "echo", 4), "the child echoes");
	CHECK(send(st[0], "again", 5, 0) == 5 && expect(st[1], "again"), "still connected");
	int status;
	CHECK(!shutdown(shared[0], SHUT_WR) && waitpid(child, &status, 0) == child && WEXITSTATUS(status) == 6, "the child sees the end");
	pass();
}
