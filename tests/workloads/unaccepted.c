/* Data in connections that nobody has accepted: unix streams and sequenced packets, with credentials, shut down; TCP over
 * IPv4 and IPv6, more than a receive queue takes, with its end. And messages of no bytes behind others, which
 * MSG_PEEK shows once. Asked again and again, it makes all of it anew, so that a restored one can be checkpointed too. */
#include "workload.h"
#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>

enum { LARGE = 150000, MORE = 600000 };
static char large[MORE], got[MORE + 1];
static int stream, packets, v4, v6;
/* Clients of each. */
static int plain, ended, creds, mails, small, full, closed6;
static int pair[2], from, to;
static long sent;

static int unix_listener(int type, const char *name)
{
	struct sockaddr_un a = { .sun_family = AF_UNIX };
	snprintf(a.sun_path, sizeof a.sun_path, "%s", name);
	unlink(name);
	int l = socket(AF_UNIX, type, 0);
	NEED(l >= 0 && !bind(l, (void *)&a, sizeof a) && !listen(l, 8));
	return l;
}

static int unix_client(int type, const char *name)
{
	struct sockaddr_un a = { .sun_family = AF_UNIX };
	snprintf(a.sun_path, sizeof a.sun_path, "%s", name);
	int c = socket(AF_UNIX, type, 0);
	NEED(c >= 0 && !connect(c, (void *)&a, sizeof a));
	return c;
}

static int tcp_listener(int family)
{
	struct sockaddr_in6 a = { .sin6_family = family };
	if (family == AF_INET6) a.sin6_addr = in6addr_loopback; else ((struct sockaddr_in *)&a)->sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	int l = socket(family, SOCK_STREAM, 0);
	NEED(l >= 0 && !bind(l, (void *)&a, family == AF_INET6 ? sizeof a : sizeof(struct sockaddr_in)) && !listen(l, 8));
	return l;
}

static int tcp_client(int listener)
{
	struct sockaddr_in6 a;
	socklen_t len = sizeof a;
	NEED(!getsockname(listener, (void *)&a, &len));
	int c = socket(a.sin6_family, SOCK_STREAM, 0);
	NEED(c >= 0 && !connect(c, (void *)&a, len));
	return c;
}

static void begin_all(void)
{
	plain = unix_client(SOCK_STREAM, "stream"), ended = unix_client(SOCK_STREAM, "stream"), creds = unix_client(SOCK_STREAM, "stream");
	mails = unix_client(SOCK_SEQPACKET, "packets");
	NEED(!setsockopt(plain, SOL_SOCKET, SO_SNDBUF, &(int){ 400000 }, sizeof(int)));
	NEED(send(plain, large, 5, 0) == 5 && send(plain, large + 5, LARGE - 5, 0) == LARGE - 5);
	NEED(send(ended, "last", 4, 0) == 4 && !shutdown(ended, SHUT_WR));
	NEED(!setsockopt(creds, SOL_SOCKET, SO_PASSCRED, &(int){ 1 }, sizeof(int)) && send(creds, "mine", 4, 0) == 4);
	NEED(send(mails, "one", 3, 0) == 3 && send(mails, "", 0, 0) == 0 && send(mails, "three", 5, 0) == 5);
	small = tcp_client(v4), full = tcp_client(v4), closed6 = tcp_client(v6);
	NEED(send(small, "small", 5, 0) == 5);
	for (sent = 0; sent < MORE;) {
		long n = send(full, large + sent, MORE - sent, MSG_DONTWAIT);
		if (n <= 0) break;
		sent += n;
	}
	NEED(sent > 10000);
	NEED(send(closed6, "six", 3, 0) == 3 && !shutdown(closed6, SHUT_WR));
	/* In a pair, and from one that is bound to one that is. */
	for (int i = 0; i < 2; i++) {
		int s = i ? from : pair[0];
		NEED(send(s, "1", 1, 0) == 1 && send(s, "", 0, 0) == 0 && send(s, "333", 3, 0) == 3 && send(s, "", 0, 0) == 0);
	}
}

static int takes(int s, const char *want, int len)
{
	char b[16];
	int n = recv(s, b, sizeof b, MSG_DONTWAIT);
	return n == len && !memcmp(b, want, len);
}

/* All that there is to be read, which takes until the end if there is one. */
static long all(int s, long want)
{
	long n = 0, r;
	struct pollfd p = { s, POLLIN, 0 };
	while (n < want && poll(&p, 1, 5000) == 1 && (r = recv(s, got + n, sizeof got - n, 0)) > 0) n += r;
	return n;
}

static int accepted(int listener)
{
	struct pollfd p = { listener, POLLIN, 0 };
	return poll(&p, 1, 0) == 1 ? accept(listener, 0, 0) : -1;
}

int main(int argc, char **argv)
{
	begin(argc, argv);
	fill(large, sizeof large, 7);
	stream = unix_listener(SOCK_STREAM, "stream"), packets = unix_listener(SOCK_SEQPACKET, "packets");
	v4 = tcp_listener(AF_INET), v6 = tcp_listener(AF_INET6);
	struct sockaddr_un a = { .sun_family = AF_UNIX, .sun_path = "from" }, b = { .sun_family = AF_UNIX, .sun_path = "to" };
	unlink("from"), unlink("to");
	from = socket(AF_UNIX, SOCK_DGRAM, 0), to = socket(AF_UNIX, SOCK_DGRAM, 0);
	NEED(!bind(from, (void *)&a, sizeof a) && !bind(to, (void *)&b, sizeof b) && !connect(from, (void *)&b, sizeof b));
	NEED(!socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pair));
	begin_all();
	ready();
	for (int s, n = 0;;) {
		char text[64], control[64];
		wait_asked();
		BREAK("plain") close(accepted(stream));
		BREAK("packets") { s = accepted(packets), recv(s, got, 9, 0), close(s); }
		BREAK("tcp") close(accepted(v4));
		BREAK("empty") { char c; recv(pair[1], &c, 1, 0), recv(pair[1], &c, 1, 0); }
		BREAK("end") close(accepted(v6));
		CHECK((s = accepted(stream)) >= 0 && all(s, LARGE) == LARGE && !memcmp(got, large, LARGE), "bytes of a stream");
		CHECK(send(s, "back", 4, 0) == 4 && takes(plain, "back", 4) && send(plain, "on", 2, 0) == 2 && takes(s, "on", 2), "the stream goes on");
		close(s), close(plain);
		CHECK((s = accepted(stream)) >= 0 && takes(s, "last", 4) && recv(s, text, 1, MSG_DONTWAIT) == 0, "the end of a stream");
		CHECK(send(s, "back", 4, 0) == 4 && takes(ended, "back", 4), "half a stream");
		close(s), close(ended);
		CHECK((s = accepted(stream)) >= 0 && !setsockopt(s, SOL_SOCKET, SO_PASSCRED, &(int){ 1 }, sizeof(int)), "the third one");
		struct iovec iov = { text, sizeof text };
		struct msghdr m = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control };
		CHECK(recvmsg(s, &m, MSG_DONTWAIT) == 4 && CMSG_FIRSTHDR(&m), "a message with credentials");
		struct ucred who;
		memcpy(&who, CMSG_DATA(CMSG_FIRSTHDR(&m)), sizeof who);
		CHECK(who.pid == getpid() && who.uid == getuid(), "credentials of %d", who.pid);
		close(s), close(creds);
		CHECK(accepted(stream) < 0, "a fourth one");
		CHECK((s = accepted(packets)) >= 0 && takes(s, "one", 3) && takes(s, "", 0) && takes(s, "three", 5), "packets");
		close(s), close(mails);
		CHECK((s = accepted(v4)) >= 0 && all(s, 5) == 5 && !memcmp(got, "small", 5), "bytes over TCP");
		CHECK(send(s, "back", 4, 0) == 4 && SOON(takes(small, "back", 4)), "TCP goes on");
		close(s), close(small);
		CHECK((s = accepted(v4)) >= 0 && (n = all(s, sent)) == sent && !memcmp(got, large, sent), "%d of %ld bytes over TCP", n, sent);
		close(s), close(full);
		CHECK((s = accepted(v6)) >= 0 && all(s, 4) == 3 && !memcmp(got, "six", 3), "bytes and end over TCP");
		CHECK(send(s, "back", 4, 0) == 4 && SOON(takes(closed6, "back", 4)), "half a TCP connection");
		close(s), close(closed6);
		for (int i = 0; i < 2; i++) {
			s = i ? to : pair[1];
			CHECK(takes(s, "1", 1) && takes(s, "", 0) && takes(s, "333", 3) && takes(s, "", 0), "messages of no bytes, %d", i);
			CHECK(recv(s, text, 1, MSG_DONTWAIT) < 0 && errno == EAGAIN, "nothing more");
		}
		begin_all();
		say("PASS");
	}
}
