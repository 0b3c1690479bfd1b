/* A listening unix stream socket and one with a connection that waits to be accepted inside the tree's own program:
 *
 *     unix_listener LOG BREAK|- PATH
 *
 * When asked it accepts one connection on PATH (the tester connects) and echoes one line. Named in the file system
 * and once in the abstract namespace. */
#include "workload.h"
#include <sys/socket.h>
#include <sys/un.h>

static int listening(const char *name, int abstract, int backlog)
{
	struct sockaddr_un a = { .sun_family = AF_UNIX };
	socklen_t len = offsetof(struct sockaddr_un, sun_path) + strlen(name) + 1;
	snprintf(a.sun_path + abstract, sizeof a.sun_path - 1, "%s", name);
	int l = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
	if (!abstract) unlink(name);
	NEED(l >= 0 && !bind(l, (void *)&a, len) && !listen(l, backlog));
	return l;
}

static int reach(const char *name, int abstract, int server)
{
	struct sockaddr_un a = { .sun_family = AF_UNIX };
	socklen_t len = offsetof(struct sockaddr_un, sun_path) + strlen(name) + 1;
	snprintf(a.sun_path + abstract, sizeof a.sun_path - 1, "%s", name);
	int c = socket(AF_UNIX, SOCK_STREAM, 0), s;
	char b[8];
	if (connect(c, (void *)&a, len)) return 0;
	if ((s = accept(server, 0, 0)) < 0) return 0;
	int ok = send(c, "hello", 5, 0) == 5 && recv(s, b, 8, 0) == 5 && !memcmp(b, "hello", 5) && send(s, "back", 4, 0) == 4 && recv(c, b, 8, 0) == 4;
	return ok && !close(c) && !close(s);
}

int main(int argc, char **argv)
{
	begin(argc, argv);
	NEED(argc > 3);
	char abstract[64];
	snprintf(abstract, sizeof abstract, "ckpt-tests-%d", getpid());
	int named = listening(argv[3], 0, 7), hidden = listening(abstract, 1, 3);
	struct stat st;
	NEED(!chmod(argv[3], 0620) && !stat(argv[3], &st));
	ready();
	wait_asked();
	BREAK("gone") close(named);
	BREAK("mode") chmod(argv[3], 0600);
	BREAK("abstract") close(hidden);
	BREAK("blocking") fcntl(named, F_SETFL, 0);
	int v = 0;
	socklen_t len = sizeof v;
	CHECK(!getsockopt(named, SOL_SOCKET, SO_ACCEPTCONN, &v, &len) && v, "it listens");
	CHECK(fcntl(named, F_GETFL) & O_NONBLOCK && fcntl(named, F_GETFD) == FD_CLOEXEC, "flags");
	struct stat now;
	CHECK(!stat(argv[3], &now) && S_ISSOCK(now.st_mode) && now.st_mode == st.st_mode && now.st_uid == st.st_uid, "mode %o", now.st_mode);
	CHECK(reach(argv[3], 0, named), "a connection to %s", argv[3]);
	CHECK(reach(abstract, 1, hidden), "a connection to the abstract name");
	pass();
}
