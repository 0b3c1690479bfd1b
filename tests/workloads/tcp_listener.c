/* A TCP listener over IPv4 and one over IPv6, a bound socket, one that is not: accepts connections after a restore,
 * with the options and addresses that it had. */
#include "workload.h"
#include <netinet/in.h>
#include <arpa/inet.h>
#include <sys/socket.h>

static struct sockaddr_in6 local(int fd)
{
	struct sockaddr_in6 name = { 0 };
	socklen_t len = sizeof name;
	NEED(!getsockname(fd, (void *)&name, &len));
	return name;
}

static int option(int fd, int level, int name)
{
	int value = -1;
	socklen_t len = sizeof value;
	NEED(!getsockopt(fd, level, name, &value, &len));
	return value;
}

static void serve(int listener)
{
	struct sockaddr_in6 name = local(listener);
	int client = socket(name.sin6_family, SOCK_STREAM, 0);
	socklen_t len = name.sin6_family == AF_INET ? sizeof(struct sockaddr_in) : sizeof name;
	CHECK(!connect(client, (void *)&name, len), "connect");
	int server = accept(listener, 0, 0);
	char byte = 0;
	CHECK(server >= 0 && write(client, "x", 1) == 1 && read(server, &byte, 1) == 1 && byte == 'x', "serve");
	close(client);
	close(server);
}

int main(int argc, char **argv)
{
	begin(argc, argv);
	int one = 1, v4 = socket(AF_INET, SOCK_STREAM, 0), v6 = socket(AF_INET6, SOCK_STREAM, 0);
	int bound = socket(AF_INET, SOCK_STREAM, 0), loose = socket(AF_INET6, SOCK_STREAM, 0);
	struct sockaddr_in a4 = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	struct sockaddr_in6 a6 = { .sin6_family = AF_INET6, .sin6_addr = in6addr_loopback };
	NEED(!setsockopt(v4, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one));
	NEED(!setsockopt(v6, IPPROTO_IPV6, IPV6_V6ONLY, &one, sizeof one));
	NEED(!bind(v4, (void *)&a4, sizeof a4) && !listen(v4, 7));
	NEED(!bind(v6, (void *)&a6, sizeof a6) && !listen(v6, 3));
	NEED(!bind(bound, (void *)&a4, sizeof a4));
	/* A server that closes first is remembered at the listener's port for a while (TIME_WAIT). */
	struct sockaddr_in6 name4 = local(v4);
	int shortly = socket(AF_INET, SOCK_STREAM, 0), waiting = socket(AF_INET, SOCK_STREAM, 0), server;
	char byte;
	NEED(!connect(shortly, (void *)&name4, sizeof a4) && (server = accept(v4, 0, 0)) >= 0 && !close(server) && read(shortly, &byte, 1) == 0 && !close(shortly));
	/* Not accepted yet. */
	NEED(!connect(waiting, (void *)&name4, sizeof a4));
	struct sockaddr_in6 who = { 0 };
	struct sockaddr_in6 names[3] = { local(v4), local(v6), local(bound) };
	ready();
	wait_asked();
	BREAK("address") { close(bound); bound = socket(AF_INET, SOCK_STREAM, 0); }
	BREAK("option") { int zero = 0; setsockopt(v4, SOL_SOCKET, SO_REUSEADDR, &zero, sizeof zero); }
	BREAK("listening") { close(v6); v6 = socket(AF_INET6, SOCK_STREAM, 0); }
	int fds[3] = { v4, v6, bound };
	for (int i = 0; i < 3; i++) {
		struct sockaddr_in6 now = local(fds[i]);
		CHECK(!memcmp(&now, &names[i], sizeof now), "address of socket %d", i);
	}
	CHECK(option(v4, SOL_SOCKET, SO_REUSEADDR) == 1, "SO_REUSEADDR is gone");
	CHECK(option(bound, SOL_SOCKET, SO_REUSEADDR) == 0, "SO_REUSEADDR from nowhere");
	CHECK(option(v6, IPPROTO_IPV6, IPV6_V6ONLY) == 1, "IPV6_V6ONLY");
	CHECK(option(v4, SOL_SOCKET, SO_ACCEPTCONN) == 1, "not listening");
	CHECK(option(loose, SOL_SOCKET, SO_DOMAIN) == AF_INET6, "family");
	BREAK("waiting") { close(waiting); waiting = socket(AF_INET, SOCK_STREAM, 0); }
	struct sockaddr_in6 waiter = local(waiting);
	socklen_t len = sizeof who;
	CHECK((server = accept(v4, (void *)&who, &len)) >= 0 && !memcmp(&who, &waiter, sizeof a4), "the connection that was waiting");
	CHECK(write(waiting, "w", 1) == 1 && read(server, &byte, 1) == 1 && byte == 'w' && write(server, "v", 1) == 1 && read(waiting, &byte, 1) == 1, "its bytes");
	serve(v4);
	serve(v6);
	pass();
}
