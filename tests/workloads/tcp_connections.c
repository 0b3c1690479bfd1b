/* TCP connections with both ends in this process: over IPv4, IPv6 and IPv4 on IPv6 sockets, with queues both ways, large
 * ones too, in every state that an open socket can be in, with options. */
#include "workload.h"
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

#define BIG (3 << 20)

struct pair { int client, server; };

static int state(int fd)
{
	struct tcp_info info;
	socklen_t len = sizeof info;
	return getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &len) ? -1 : info.tcpi_state;
}

/* What the two ends have agreed on. */
static unsigned agreed(int fd)
{
	struct tcp_info info;
	socklen_t len = sizeof info;
	NEED(!getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &len));
	return info.tcpi_snd_wscale | info.tcpi_rcv_wscale << 8 | info.tcpi_options << 16;
}

static int option(int fd, int level, int name)
{
	int value = -1;
	socklen_t len = sizeof value;
	return getsockopt(fd, level, name, &value, &len) ? -1 : value;
}

static void set(int fd, int level, int name, int value)
{
	NEED(!setsockopt(fd, level, name, &value, sizeof value));
}

/* family of the sockets, and whether an IPv6 socket talks IPv4 */
static struct pair connected(int family, int mapped)
{
	struct sockaddr_in a4 = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	struct sockaddr_in6 a6 = { .sin6_family = AF_INET6, .sin6_addr = in6addr_loopback };
	if (mapped) inet_pton(AF_INET6, "::ffff:127.0.0.1", &a6.sin6_addr);
	struct sockaddr *a = family == AF_INET ? (void *)&a4 : (void *)&a6;
	socklen_t len = family == AF_INET ? sizeof a4 : sizeof a6;
	int l = socket(family, SOCK_STREAM, 0);
	struct pair p = { .client = socket(family, SOCK_STREAM, 0) };
	NEED(!bind(l, a, len) && !listen(l, 1) && !getsockname(l, a, &len) && !connect(p.client, a, len));
	NEED((p.server = accept(l, 0, 0)) >= 0);
	close(l);
	return p;
}

static int reads(int fd, const char *text)
{
	char b[64];
	size_t n = strlen(text), got = 0;
	while (got < n) {
		struct pollfd p = { .fd = fd, .events = POLLIN };
		if (poll(&p, 1, 5000) != 1) return 0;
		ssize_t r = read(fd, b + got, n - got);
		if (r <= 0) return 0;
		got += r;
	}
	return !memcmp(b, text, n);
}

static int ends(int fd)
{
	struct pollfd p = { .fd = fd, .events = POLLIN };
	char b;
	return poll(&p, 1, 5000) == 1 && read(fd, &b, 1) == 0;
}

static void says(int fd, const char *text) { NEED(write(fd, text, strlen(text)) == (ssize_t)strlen(text)); }

/* Fills both queues until nothing more goes in; returns how much that is. */
static size_t stuff(int fd, uint64_t seed)
{
	char *data = malloc(BIG);
	fill(data, BIG, seed);
	size_t n = 0;
	ssize_t r;
	for (int idle = 0; n < BIG && idle < 20; ) {
		r = send(fd, data + n, BIG - n, MSG_DONTWAIT);
		if (r > 0) { n += r; idle = 0; } else { NEED(errno == EAGAIN); idle++; usleep(1000); }
	}
	free(data);
	return n;
}

static int drains(int fd, size_t n, uint64_t seed)
{
	char *data = malloc(BIG);
	size_t got = 0;
	while (got < n) {
		struct pollfd p = { .fd = fd, .events = POLLIN };
		if (poll(&p, 1, 10000) != 1) { errno = ETIMEDOUT; return 0; }
		ssize_t r = read(fd, data + got, n - got);
		if (r <= 0) return 0;
		got += r;
	}
	int same = filled(data, n & ~7ul, seed);
	free(data);
	return same;
}

static void talk(struct pair p, const char *name)
{
	says(p.client, "ping");
	CHECK(reads(p.server, "ping"), "%s: client to server", name);
	says(p.server, "pong");
	CHECK(reads(p.client, "pong"), "%s: server to client", name);
}

int main(int argc, char **argv)
{
	begin(argc, argv);
	signal(SIGPIPE, SIG_IGN);
	struct pair v4 = connected(AF_INET, 0), v6 = connected(AF_INET6, 0), mapped = connected(AF_INET6, 1);
	says(v4.client, "hello"), says(v4.server, "world!");
	says(v6.client, "sechs"), says(mapped.server, "vier");
	says(v4.client, "skip"); NEED(reads(v4.server, "hel"));

	struct pair big = connected(AF_INET, 0);
	size_t there = stuff(big.client, 1), back = stuff(big.server, 2);
	NEED(there > 100000 && back > 100000);
	int unacked = 0;
	ioctl(big.client, TIOCOUTQ, &unacked);
	NEED(unacked > 0);

	/* one side shut down; with data on its way */
	struct pair half = connected(AF_INET6, 0);
	says(half.client, "last");
	NEED(!shutdown(half.client, SHUT_WR));
	NEED(SOON(state(half.client) == TCP_FIN_WAIT2 && state(half.server) == TCP_CLOSE_WAIT));
	/* shut down behind a full queue: FIN is not sent yet */
	struct pair stuck = connected(AF_INET, 0);
	size_t stuck_n = stuff(stuck.client, 3);
	NEED(!shutdown(stuck.client, SHUT_WR) && state(stuck.client) == TCP_FIN_WAIT1);
	/* both shut down */
	struct pair both = connected(AF_INET, 0);
	says(both.client, "c"), says(both.server, "s");
	NEED(!shutdown(both.client, SHUT_WR) && !shutdown(both.server, SHUT_WR));
	NEED(SOON(state(both.client) == TCP_CLOSE && state(both.server) == TCP_CLOSE));
	/* LAST_ACK: its FIN stands behind a full queue */
	struct pair last = connected(AF_INET, 0);
	NEED(!shutdown(last.client, SHUT_WR) && SOON(state(last.server) == TCP_CLOSE_WAIT));
	size_t last_n = stuff(last.server, 4);
	NEED(!shutdown(last.server, SHUT_WR) && state(last.server) == TCP_LAST_ACK);
	/* CLOSING: both FINs stand behind full queues */
	struct pair closing = connected(AF_INET, 0);
	size_t closing_c = stuff(closing.client, 5), closing_s = stuff(closing.server, 6);
	NEED(!shutdown(closing.client, SHUT_WR) && !shutdown(closing.server, SHUT_WR));
	/* the peer is gone: closed, or reset, with and without the error seen */
	struct pair gone = connected(AF_INET, 0), reset = connected(AF_INET, 0), seen = connected(AF_INET6, 0);
	says(gone.client, "bye"); close(gone.client);
	NEED(SOON(state(gone.server) == TCP_CLOSE_WAIT));
	struct linger now = { 1, 0 };
	says(reset.client, "crash"), says(seen.client, "crash");
	NEED(!setsockopt(reset.client, SOL_SOCKET, SO_LINGER, &now, sizeof now) && !close(reset.client));
	NEED(!setsockopt(seen.client, SOL_SOCKET, SO_LINGER, &now, sizeof now) && !close(seen.client));
	NEED(SOON(state(reset.server) == TCP_CLOSE && state(seen.server) == TCP_CLOSE));
	NEED(option(seen.server, SOL_SOCKET, SO_ERROR) == ECONNRESET);

	/* options */
	struct pair opts = connected(AF_INET, 0);
	int o = opts.server;
	set(o, SOL_SOCKET, SO_KEEPALIVE, 1), set(o, IPPROTO_TCP, TCP_KEEPIDLE, 77), set(o, IPPROTO_TCP, TCP_KEEPINTVL, 7);
	set(o, IPPROTO_TCP, TCP_KEEPCNT, 5), set(o, IPPROTO_TCP, TCP_NODELAY, 1), set(o, IPPROTO_TCP, TCP_USER_TIMEOUT, 12345);
	set(o, IPPROTO_TCP, TCP_LINGER2, 9), set(o, SOL_SOCKET, SO_REUSEADDR, 1), set(o, IPPROTO_IP, IP_TOS, 0x10);
	set(opts.client, IPPROTO_TCP, TCP_CORK, 1), set(opts.client, SOL_SOCKET, SO_RCVBUF, 50000);
	NEED(!setsockopt(o, SOL_SOCKET, SO_LINGER, &(struct linger){ 1, 4 }, sizeof now));
	NEED(!setsockopt(o, IPPROTO_TCP, TCP_CONGESTION, "reno", 4));
	says(opts.client, "corked");
	unsigned v4_agreed = agreed(v4.client), opts_agreed = agreed(o);
	ready();
	wait_asked();

	BREAK("queue") reads(v4.server, "l");
	BREAK("connection") { close(v6.client); v6 = connected(AF_INET6, 0); }
	BREAK("big") { char b; NEED(read(big.server, &b, 1) == 1); }
	BREAK("option") set(o, IPPROTO_TCP, TCP_KEEPIDLE, 78);
	BREAK("state") shutdown(half.server, SHUT_WR);
	BREAK("reset") option(reset.server, SOL_SOCKET, SO_ERROR);
	CHECK(agreed(v4.client) == v4_agreed && agreed(o) == opts_agreed, "window scales and options %#x %#x", agreed(v4.client), agreed(o));
	CHECK(reads(v4.server, "loskip") && reads(v4.client, "world!"), "queues over IPv4");
	CHECK(reads(v6.server, "sechs"), "queue over IPv6");
	CHECK(reads(mapped.client, "vier"), "queue over mapped addresses");
	talk(v4, "v4"), talk(v6, "v6"), talk(mapped, "mapped");

	CHECK(SOON(state(half.client) == TCP_FIN_WAIT2) && state(half.server) == TCP_CLOSE_WAIT,
	      "half shut down: states %d %d", state(half.client), state(half.server));
	CHECK(reads(half.server, "last") && ends(half.server), "half shut down: the end");
	CHECK(write(half.client, "x", 1) < 0 && errno == EPIPE, "half shut down: it can write");
	says(half.server, "answer");
	CHECK(reads(half.client, "answer"), "half shut down: the other way");
	close(half.server);
	CHECK(ends(half.client), "half shut down: the end of the other way");

	CHECK(state(stuck.client) == TCP_FIN_WAIT1, "stuck: state %d", state(stuck.client));
	CHECK(drains(stuck.server, stuck_n, 3) && ends(stuck.server), "stuck: data or its end");
	CHECK(SOON(state(stuck.client) == TCP_FIN_WAIT2), "stuck: FIN is acknowledged");

	CHECK(reads(both.client, "s") && ends(both.client) && reads(both.server, "c") && ends(both.server), "both shut down");
	CHECK(write(both.client, "x", 1) < 0 && errno == EPIPE, "both shut down: it can write");
	CHECK(state(both.client) == TCP_CLOSE && state(both.server) == TCP_CLOSE, "both shut down: states");

	CHECK(state(last.server) == TCP_LAST_ACK, "last ack: state %d", state(last.server));
	CHECK(drains(last.client, last_n, 4) && ends(last.client), "last ack: data or its end");
	CHECK(drains(closing.server, closing_c, 5) && ends(closing.server), "closing: to the server");
	CHECK(drains(closing.client, closing_s, 6) && ends(closing.client), "closing: to the client");

	CHECK(reads(gone.server, "bye") && ends(gone.server), "peer gone: data and end");
	CHECK(option(reset.server, SOL_SOCKET, SO_ERROR) == ECONNRESET, "reset: the error");
	CHECK(reads(reset.server, "crash") && ends(reset.server), "reset: data and end");
	CHECK(option(seen.server, SOL_SOCKET, SO_ERROR) == 0, "reset and seen: an error again");
	CHECK(reads(seen.server, "crash") && ends(seen.server), "reset and seen: data and end");
	CHECK(write(seen.server, "x", 1) < 0 && errno == EPIPE, "reset and seen: it can write");

	CHECK(option(o, SOL_SOCKET, SO_KEEPALIVE) == 1 && option(o, IPPROTO_TCP, TCP_KEEPIDLE) == 77, "keepalive");
	CHECK(option(o, IPPROTO_TCP, TCP_KEEPINTVL) == 7 && option(o, IPPROTO_TCP, TCP_KEEPCNT) == 5, "keepalive");
	CHECK(option(o, IPPROTO_TCP, TCP_NODELAY) == 1, "TCP_NODELAY");
	CHECK(option(o, IPPROTO_TCP, TCP_USER_TIMEOUT) == 12345 && option(o, IPPROTO_TCP, TCP_LINGER2) == 9, "timeouts");
	CHECK(option(o, SOL_SOCKET, SO_REUSEADDR) == 1 && option(v4.client, SOL_SOCKET, SO_REUSEADDR) == 0, "SO_REUSEADDR");
	CHECK(option(o, IPPROTO_IP, IP_TOS) == 0x10, "IP_TOS");
	CHECK(option(opts.client, SOL_SOCKET, SO_RCVBUF) == 100000, "SO_RCVBUF");
	char name[16] = "";
	socklen_t len = sizeof name;
	CHECK(!getsockopt(o, IPPROTO_TCP, TCP_CONGESTION, name, &len) && !strcmp(name, "reno"), "TCP_CONGESTION");
	struct linger linger = { 0, 0 };
	len = sizeof linger;
	CHECK(!getsockopt(o, SOL_SOCKET, SO_LINGER, &linger, &len) && linger.l_onoff && linger.l_linger == 4, "SO_LINGER");
	CHECK(option(opts.client, IPPROTO_TCP, TCP_CORK) == 1, "TCP_CORK");
	CHECK(reads(o, "corked"), "what was corked");

	CHECK(drains(big.server, there, 1), "large queue to the server");
	CHECK(drains(big.client, back, 2), "large queue to the client");
	talk(big, "after large queues");
	pass();
}
