/* Names of unix sockets, and who is told by a signal: relative names whose directory is no more the current one, deleted
 * ones, an owner and a mode, a datagram socket that keeps its name when it is connected no more, two that have had the
 * same name, three whose files were moved, SO_PEEK_OFF, F_SETOWN, F_SETSIG and O_ASYNC on sockets of every family. */
#include "workload.h"
#include <arpa/inet.h>
#include <linux/if_packet.h>
#include <linux/netlink.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/un.h>

static struct sockaddr_un addr(const char *name, socklen_t *len)
{
	struct sockaddr_un a = { .sun_family = AF_UNIX };
	snprintf(a.sun_path, sizeof a.sun_path, "%s", name);
	*len = offsetof(struct sockaddr_un, sun_path) + strlen(name) + 1;
	return a;
}

static int bound(int type, const char *name)
{
	socklen_t len;
	struct sockaddr_un a = addr(name, &len);
	int fd = socket(AF_UNIX, type, 0);
	NEED(fd >= 0 && !bind(fd, (void *)&a, len));
	return fd;
}

static int reach(int fd, const char *name)
{
	socklen_t len;
	struct sockaddr_un a = addr(name, &len);
	return !connect(fd, (void *)&a, len);
}

static int is_named(int fd, const char *name)
{
	struct sockaddr_un a = { 0 };
	socklen_t len = sizeof a;
	return !getsockname(fd, (void *)&a, &len) && !strcmp(a.sun_path, name);
}

static int hears(int fd, const char *text)
{
	char b[64];
	return recv(fd, b, sizeof b, MSG_DONTWAIT) == (ssize_t)strlen(text) && !memcmp(b, text, strlen(text));
}

/* A connection to a listener, in both directions. */
static int answers(int listener, const char *name)
{
	int c = socket(AF_UNIX, SOCK_STREAM, 0), s, good;
	if (!reach(c, name) || (s = accept(listener, 0, 0)) < 0) return 0;
	good = send(c, "there", 5, 0) == 5 && hears(s, "there") && send(s, "back", 4, 0) == 4 && hears(c, "back");
	return !close(c) && !close(s) && good;
}

enum { FAMILIES = 7 };

/* Sends something to a socket that has asked to be told, and waits for its signal. */
static int told(int n, int fd, int (*poke)[2])
{
	sigset_t set;
	siginfo_t info;
	sigemptyset(&set);
	sigaddset(&set, SIGRTMIN + 1 + n);
	struct sockaddr_storage a;
	socklen_t len = sizeof a;
	if (poke[n][0] >= 0) {
		if (poke[n][1]) { if (getsockname(fd, (void *)&a, &len) || sendto(poke[n][0], "x", 1, 0, (void *)&a, len) != 1) return 0; }
		else if (send(poke[n][0], "x", 1, 0) != 1) return 0;
	}
	return sigtimedwait(&set, &info, &(struct timespec){ 5, 0 }) == SIGRTMIN + 1 + n && info.si_fd == fd;
}

int main(int argc, char **argv)
{
	begin(argc, argv);
	char cwd[64];
	sigset_t all;
	sigemptyset(&all);
	for (int n = 0; n < FAMILIES; n++) sigaddset(&all, SIGRTMIN + 1 + n);
	sigprocmask(SIG_BLOCK, &all, 0);
	snprintf(cwd, sizeof cwd, "names-%d", getpid());
	NEED(!mkdir(cwd, 0700) && !chdir(cwd) && !mkdir("a", 0755) && !mkdir("b", 0755));
	/* By a path from a directory that was the current one then. */
	NEED(!chdir("a"));
	int relative = bound(SOCK_STREAM, "server"), upwards = bound(SOCK_STREAM, "../b/upwards");
	NEED(!chdir("..") && !listen(relative, 5) && !listen(upwards, 5));
	NEED(!chmod("a/server", 0421) && !chown("a/server", 7, 8));
	struct stat before, now;
	NEED(!stat("a/server", &before));
	/* Deleted; another one has the name now. */
	int deleted = bound(SOCK_STREAM, "gone");
	NEED(!listen(deleted, 5) && !unlink("gone"));
	/* Bound elsewhere, and moved to where clients look when all was set: by rename(2), by link(2), and by a relative name. */
	char here[80], full[3][100], made[2][108];
	NEED(getcwd(here, sizeof here));
	for (int i = 0; i < 3; i++) strcat(strcpy(full[i], here), (char *[]){ "/renamed", "/linked", "/b/taken" }[i]);
	for (int i = 0; i < 2; i++) strcat(strcpy(made[i], full[i]), ".new");
	int renamed = bound(SOCK_STREAM, made[0]), linked = bound(SOCK_STREAM, made[1]), taken = bound(SOCK_STREAM, "a/taken");
	NEED(!listen(renamed, 5) && !listen(linked, 5) && !listen(taken, 5) && !chmod(made[0], 0604));
	NEED(!rename(made[0], full[0]) && !link(made[1], full[1]) && !unlink(made[1]) && !rename("a/taken", full[2]));
	int first = bound(SOCK_DGRAM, "twice");
	NEED(!unlink("twice"));
	int second = bound(SOCK_DGRAM, "twice");
	/* Each connected to the other while it had the name. */
	int to_second = socket(AF_UNIX, SOCK_DGRAM, 0);
	NEED(reach(to_second, "twice") && send(to_second, "to the second", 13, 0) == 13);
	/* Connected once, and no more: it keeps its name. */
	int loose = bound(SOCK_DGRAM, "loose");
	NEED(reach(loose, "twice") && send(loose, "from loose", 10, 0) == 10 && !connect(loose, &(struct sockaddr){ .sa_family = AF_UNSPEC }, sizeof(struct sockaddr)));
	int self = bound(SOCK_DGRAM, "self");
	NEED(reach(self, "self") && send(self, "to myself", 9, 0) == 9);
	/* A look at the queue goes on behind what was seen. */
	int peek[2];
	char b[64];
	NEED(!socketpair(AF_UNIX, SOCK_STREAM, 0, peek) && send(peek[0], "seen and unseen", 15, 0) == 15);
	NEED(!setsockopt(peek[1], SOL_SOCKET, SO_PEEK_OFF, &(int){ 0 }, 4) && recv(peek[1], b, 9, MSG_PEEK) == 9);
	/* Told by signals of their own. */
	int pair[2], sq[2], tcp[2], poke[FAMILIES][2], fds[FAMILIES];
	struct sockaddr_in in = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	socklen_t len = sizeof in;
	NEED(!socketpair(AF_UNIX, SOCK_STREAM, 0, pair) && !socketpair(AF_UNIX, SOCK_SEQPACKET, 0, sq));
	int l = socket(AF_INET, SOCK_STREAM, 0);
	NEED(!bind(l, (void *)&in, sizeof in) && !listen(l, 1) && !getsockname(l, (void *)&in, &len));
	NEED((tcp[0] = socket(AF_INET, SOCK_STREAM, 0)) >= 0 && !connect(tcp[0], (void *)&in, len) && (tcp[1] = accept(l, 0, 0)) >= 0);
	int udp = socket(AF_INET, SOCK_DGRAM, 0), udp_sender = socket(AF_INET, SOCK_DGRAM, 0);
	in.sin_port = 0;
	NEED(!bind(udp, (void *)&in, sizeof in));
	int nl = socket(AF_NETLINK, SOCK_RAW, NETLINK_USERSOCK), nl_sender = socket(AF_NETLINK, SOCK_RAW, NETLINK_USERSOCK);
	NEED(!bind(nl, (void *)&(struct sockaddr_nl){ .nl_family = AF_NETLINK }, sizeof(struct sockaddr_nl)));
	int dg[2];
	NEED(!socketpair(AF_UNIX, SOCK_DGRAM, 0, dg));
	int raw = socket(AF_INET, SOCK_RAW, 251), raw_sender = socket(AF_INET, SOCK_RAW, 251);
	in.sin_addr.s_addr = htonl(0x7f000000 | (getpid() & 0xffffff));
	NEED(!bind(raw, (void *)&in, sizeof in));
	int table[FAMILIES][3] = { { pair[1], pair[0], 0 }, { sq[1], sq[0], 0 }, { dg[1], dg[0], 0 }, { tcp[1], tcp[0], 0 }, { udp, udp_sender, 1 }, { nl, nl_sender, 1 }, { raw, raw_sender, 1 } };
	for (int n = 0; n < FAMILIES; n++) {
		fds[n] = table[n][0], poke[n][0] = table[n][1], poke[n][1] = table[n][2];
		struct f_owner_ex me = { F_OWNER_TID, getpid() };
		NEED(!fcntl(fds[n], F_SETOWN_EX, &me) && !fcntl(fds[n], F_SETSIG, SIGRTMIN + 1 + n));
		NEED(!fcntl(fds[n], F_SETFL, fcntl(fds[n], F_GETFL) | O_ASYNC));
	}
	ready();
	wait_asked();
	BREAK("mode") chmod("a/server", 0400);
	BREAK("relative") close(relative);
	BREAK("upwards") close(upwards);
	BREAK("renamed") unlink(full[0]);
	BREAK("linked") NEED(!link(full[1], made[1]));
	BREAK("taken") NEED(!rename(full[2], "a/taken"));
	BREAK("queue") NEED(hears(second, "to the second"));
	BREAK("loose") NEED(reach(loose, "twice"));
	BREAK("peek") NEED(!setsockopt(peek[1], SOL_SOCKET, SO_PEEK_OFF, &(int){ 0 }, 4));
	BREAK("async") fcntl(fds[2], F_SETFL, 0);
	BREAK("signal") fcntl(fds[4], F_SETSIG, 0);
	BREAK("owner") fcntl(fds[5], F_SETOWN, 0);
	CHECK(!stat("a/server", &now) && now.st_mode == before.st_mode && now.st_uid == 7 && now.st_gid == 8, "mode %o of %d %d", now.st_mode, now.st_uid, now.st_gid);
	CHECK(is_named(relative, "server") && is_named(upwards, "../b/upwards") && is_named(deleted, "gone") && is_named(first, "twice") && is_named(second, "twice") && is_named(loose, "loose"), "names");
	CHECK(answers(relative, "a/server") && answers(upwards, "b/upwards"), "relative names");
	CHECK(is_named(renamed, made[0]) && is_named(linked, made[1]) && is_named(taken, "a/taken"), "names under which they were bound");
	CHECK(answers(renamed, full[0]) && answers(linked, full[1]) && answers(taken, full[2]), "where their files were moved");
	CHECK(!stat(full[0], &now) && (now.st_mode & 07777) == 0604, "mode %o of the renamed file", now.st_mode);
	CHECK(access(made[0], F_OK) && access(made[1], F_OK) && access("a/taken", F_OK), "the old names are there again");
	CHECK(stat("gone", &now) && errno == ENOENT, "the deleted name is there");
	CHECK(hears(second, "to the second") && hears(second, "from loose") && recv(second, b, 1, MSG_DONTWAIT) < 0 && recv(first, b, 1, MSG_DONTWAIT) < 0, "the queue of the second");
	CHECK(send(to_second, "more", 4, 0) == 4 && hears(second, "more"), "still connected to the second");
	CHECK(send(loose, "x", 1, 0) < 0 && errno == ENOTCONN, "connected to nobody");
	CHECK(hears(self, "to myself") && send(self, "again", 5, 0) == 5 && hears(self, "again"), "connected to itself");
	int off = 0;
	len = 4;
	CHECK(!getsockopt(peek[1], SOL_SOCKET, SO_PEEK_OFF, &off, &len) && off == 9, "SO_PEEK_OFF %d", off);
	CHECK(recv(peek[1], b, 64, MSG_PEEK) == 6 && !memcmp(b, "unseen", 6) && hears(peek[1], "seen and unseen"), "a look and a read");
	for (int n = 0; n < FAMILIES; n++) {
		struct f_owner_ex who = { 0 };
		CHECK(fcntl(fds[n], F_GETFL) & O_ASYNC && fcntl(fds[n], F_GETSIG) == SIGRTMIN + 1 + n, "O_ASYNC and F_SETSIG of socket %d", n);
		CHECK(!fcntl(fds[n], F_GETOWN_EX, &who) && who.type == F_OWNER_TID && who.pid == getpid(), "owner of socket %d", n);
		CHECK(told(n, fds[n], poke), "the signal of socket %d", n);
	}
	pass();
}
