/* A server whose whole state is in its memory: program A of the story that ckpt-tools comes from.
 *
 *     remembering LOG BREAK|- SOCKET
 *
 * Listens on SOCKET, accepts one connection and answers each line with "N DIGEST": how many lines there
 * have been, and a digest (FNV-1a) of all their bytes. Nobody can know the answer who has not heard the same lines. */
#include "workload.h"
#include <sys/socket.h>
#include <sys/un.h>

int main(int argc, char **argv)
{
	begin(argc, argv);
	NEED(argc > 3);
	struct sockaddr_un a = { .sun_family = AF_UNIX };
	snprintf(a.sun_path, sizeof a.sun_path, "%s", argv[3]);
	int l = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0), c;
	NEED(!bind(l, (void *)&a, sizeof a) && !listen(l, 16));
	signal(SIGPIPE, SIG_IGN);
	uint64_t digest = 0xcbf29ce484222325ull;
	int count = 0;
	ready();
	while ((c = accept4(l, 0, 0, SOCK_CLOEXEC)) >= 0) {
		char b[512], reply[64];
		ssize_t n;
		say("connected");
		while ((n = recv(c, b, sizeof b, 0)) > 0)
			for (ssize_t i = 0; i < n; i++) {
				digest = (digest ^ (unsigned char)b[i]) * 0x100000001b3ull;
				if (b[i] != '\n') continue;
				int r = snprintf(reply, sizeof reply, "%d %016llx\n", ++count, (unsigned long long)digest);
				if (send(c, reply, r, 0) != r) break;
			}
		close(c);
	}
	BROKEN("accept");
}
