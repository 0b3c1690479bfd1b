/* The client of the demo: asks over a unix stream socket, one message after the other, and prints what it hears.
 *
 *     asking connect PATH FIRST COUNT      connects to the server's socket
 *     asking listen PATH FIRST COUNT       waits for the server to come: the other half of a re-established connection
 *
 * It goes on to the next message when a line comes on standard input, so that whoever runs it sets the pace. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	if (argc < 5) { fprintf(stderr, "usage: asking connect|listen PATH FIRST COUNT\n"); return 2; }
	struct sockaddr_un a = { .sun_family = AF_UNIX };
	snprintf(a.sun_path, sizeof a.sun_path, "%s", argv[2]);
	int s = socket(AF_UNIX, SOCK_STREAM, 0), first = atoi(argv[3]), count = atoi(argv[4]);
	if (!strcmp(argv[1], "listen")) {
		if (bind(s, (void *)&a, sizeof a) || listen(s, 1)) { perror(argv[2]); return 1; }
		printf("listening\n");
		fflush(stdout);
		if ((s = accept(s, 0, 0)) < 0) { perror("accept"); return 1; }
	} else if (connect(s, (void *)&a, sizeof a)) { perror(argv[2]); return 1; }
	for (int i = first; i < first + count; i++) {
		char pace[16], line[256];
		if (!fgets(pace, sizeof pace, stdin)) return 1;
		size_t have = 0;
		dprintf(s, "question %d\n", i);
		while (!memchr(line, '\n', have)) {
			ssize_t n = recv(s, line + have, sizeof line - have, 0);
			if (n <= 0) { printf("connection lost\n"); return 1; }
			have += n;
		}
		printf("%.*s\n", (int)have - 1, line);
		fflush(stdout);
	}
	return 0;
}
