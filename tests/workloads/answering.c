/* Answers messages over a unix stream socket: the program of the demo, and of every test of an external connection.
 *
 *     answering LOG BREAK|- SOCKET [CONNECTIONS]
 *
 * Listens on SOCKET, accepts one connection and answers each line "NAME" with "answer N to NAME"; N counts in memory.
 * What it is asked while another connection waits is answered when the first one ends. On SIGUSR1 it reports how
 * many messages it has answered. */
#include "workload.h"
#include <poll.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/un.h>

int main(int argc, char **argv)
{
	begin(argc, argv);
	NEED(argc > 3);
	struct sockaddr_un a = { .sun_family = AF_UNIX };
	snprintf(a.sun_path, sizeof a.sun_path, "%s", argv[3]);
	int l = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0), c = -1, count = 0;
	unlink(a.sun_path);
	NEED(!bind(l, (void *)&a, sizeof a) && !listen(l, 16));
	signal(SIGPIPE, SIG_IGN);
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	int sfd = signalfd(-1, &set, SFD_CLOEXEC);
	char line[512], reply[640];
	size_t have = 0;
	ready();
	for (;;) {
		struct pollfd f[2] = { { c >= 0 ? c : l, POLLIN, 0 }, { sfd, POLLIN, 0 } };
		if (poll(f, 2, -1) < 0) { if (errno != EINTR) BROKEN("poll"); continue; }
		if (f[1].revents) {
			struct signalfd_siginfo si;
			NEED(read(sfd, &si, sizeof si) == sizeof si);
			BREAK("count") count = -1;
			CHECK(count >= 0, "count is %d", count);
			say("answered %d", count);
			say("PASS");
			continue;
		}
		if (!f[0].revents) continue;
		if (c < 0) { c = accept4(l, 0, 0, SOCK_CLOEXEC); have = 0; say("connected"); continue; }
		ssize_t n = recv(c, line + have, sizeof line - 1 - have, 0);
		if (n <= 0) { close(c); c = -1; say("disconnected"); continue; }
		have += n;
		for (char *end; (end = memchr(line, '\n', have));) {
			int r = snprintf(reply, sizeof reply, "answer %d to %.*s\n", ++count, (int)(end - line), line);
			have -= end + 1 - line;
			memmove(line, end + 1, have);
			CHECK(send(c, reply, r, MSG_NOSIGNAL) == r, "send");
		}
	}
}
