/* Answers lines over TCP, for any number of clients at once.
 *
 *     tcp_answering LOG BREAK|- PORT
 *
 * Listens on PORT of all addresses (0 for any: the log says "port N"). Each line "NAME" of a client is answered with "answer N to NAME"; N counts all lines.
 * "big NAME" adds a megabyte to the answer; "count" tells N in the log. On SIGUSR1 it says PASS. */
#include "workload.h"
#include <netinet/in.h>
#include <poll.h>
#include <sys/signalfd.h>
#include <sys/socket.h>

#define MOST 64
#define BIG (1 << 20)

struct client { int fd; size_t have, due, done; char line[512]; char *reply; };

int main(int argc, char **argv)
{
	begin(argc, argv);
	NEED(argc > 3 || !strcmp(argv[2], "-") || wl_break);
	int one = 1, port = argc > 3 ? atoi(argv[3]) : 0, count = 0;
	struct sockaddr_in6 a = { .sin6_family = AF_INET6, .sin6_port = htons(port) };
	socklen_t len = sizeof a;
	int l = socket(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC, 0);
	NEED(!setsockopt(l, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one));
	NEED(!bind(l, (void *)&a, len) && !listen(l, 64) && !getsockname(l, (void *)&a, &len));
	signal(SIGPIPE, SIG_IGN);
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	int sfd = signalfd(-1, &set, SFD_CLOEXEC);
	static struct client c[MOST];
	for (int i = 0; i < MOST; i++) c[i].fd = -1;
	say("port %d", ntohs(a.sin6_port));
	ready();
	for (;;) {
		struct pollfd f[MOST + 2] = { { l, POLLIN, 0 }, { sfd, POLLIN, 0 } };
		for (int i = 0; i < MOST; i++)
			f[i + 2] = (struct pollfd){ c[i].fd, c[i].due > c[i].done ? POLLOUT : POLLIN, 0 };
		if (poll(f, MOST + 2, -1) < 0) { if (errno != EINTR) BROKEN("poll"); continue; }
		if (f[1].revents) {
			struct signalfd_siginfo si;
			NEED(read(sfd, &si, sizeof si) == sizeof si);
			BREAK("count") count = -1;
			CHECK(count >= 0, "count is %d", count);
			say("answered %d", count);
			say("PASS");
		}
		if (f[0].revents)
			for (int i = 0; i < MOST; i++)
				if (c[i].fd < 0) {
					c[i].fd = accept4(l, 0, 0, SOCK_CLOEXEC | SOCK_NONBLOCK);
					c[i].have = c[i].due = c[i].done = 0;
					break;
				}
		for (int i = 0; i < MOST; i++) {
			struct client *k = &c[i];
			if (k->fd < 0 || f[i + 2].fd != k->fd || !f[i + 2].revents) continue;
			ssize_t n;
			if (k->due > k->done) {
				n = send(k->fd, k->reply + k->done, k->due - k->done, MSG_NOSIGNAL);
				if (n > 0 && (k->done += n) == k->due) { free(k->reply); k->reply = 0; k->due = k->done = 0; }
				if (n >= 0 || errno == EAGAIN) continue;
			} else {
				n = recv(k->fd, k->line + k->have, sizeof k->line - 1 - k->have, 0);
				if (n < 0 && errno == EAGAIN) continue;
				if (n > 0) {
					k->have += n;
					char *end = memchr(k->line, '\n', k->have);
					if (!end) continue;
					size_t big = strncmp(k->line, "big ", 4) ? 0 : BIG;
					k->reply = malloc(big + 600);
					memset(k->reply, 'x', big);
					k->due = big + sprintf(k->reply + big, "answer %d to %.*s\n", ++count, (int)(end - k->line), k->line);
					k->have -= end + 1 - k->line;
					memmove(k->line, end + 1, k->have);
					continue;
				}
			}
			say("lost a client: %s", n == 0 ? "it closed" : strerror(errno));
			close(k->fd);
			k->fd = -1;
			free(k->reply);
			k->reply = 0;
			k->due = k->done = 0;
		}
	}
}
