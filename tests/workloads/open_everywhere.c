/* More open files than the table of one process holds: two processes share unix socketpairs of the three types with messages
 * queued both ways, pipes, and files that both have open. Each has one end of every pair. argv[3] (120) pairs, half as many
 * pipes and files. */
#include "workload.h"
#include <sys/socket.h>

#define MOST 40000
static const int types[] = { SOCK_STREAM, SOCK_DGRAM, SOCK_SEQPACKET };
static int mine[MOST], pairs, others, all;

static void give(int to, int fd)
{
	char c[CMSG_SPACE(sizeof fd)] = { 0 };
	struct iovec v = { "x", 1 };
	struct msghdr m = { .msg_iov = &v, .msg_iovlen = 1, .msg_control = c, .msg_controllen = sizeof c };
	*CMSG_FIRSTHDR(&m) = (struct cmsghdr){ .cmsg_len = CMSG_LEN(sizeof fd), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS };
	memcpy(CMSG_DATA(CMSG_FIRSTHDR(&m)), &fd, sizeof fd);
	NEED(sendmsg(to, &m, 0) == 1 && !close(fd));
	char b;
	NEED(read(to, &b, 1) == 1);
}

static int take(int from)
{
	char c[CMSG_SPACE(sizeof(int))], b;
	struct iovec v = { &b, 1 };
	struct msghdr m = { .msg_iov = &v, .msg_iovlen = 1, .msg_control = c, .msg_controllen = sizeof c };
	int fd = -1;
	NEED(recvmsg(from, &m, 0) == 1 && CMSG_FIRSTHDR(&m));
	memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&m)), sizeof fd);
	NEED(write(from, "x", 1) == 1);
	return fd;
}

/* What a process finds in its ends, and what it leaves there. */
static void examine(int child)
{
	char want[64], got[64];
	for (int i = 0; i < pairs; i++) {
		for (int number = 0; number < 2; number++) {
			int len = snprintf(want, sizeof want, "%05d %d %d", i, !child, number);
			CHECK(recv(mine[i], got, types[i % 3] == SOCK_STREAM ? len : (int)sizeof got, MSG_DONTWAIT) == len && !memcmp(want, got, len), "message %d of pair %d in process %d", number, i, child);
		}
		for (int number = 0; number < 2; number++) {
			int len = snprintf(want, sizeof want, "%05d %d %d", i, child, number);
			CHECK(send(mine[i], want, len, MSG_DONTWAIT) == len, "send over pair %d", i);
		}
	}
	for (int i = pairs; i < pairs + others; i++) {
		int len = snprintf(want, sizeof want, "pipe %05d", i);
		if (child) CHECK(write(mine[i], want, len) == len, "write to pipe %d", i);
		else CHECK(read(mine[i], got, sizeof got) == len && !memcmp(want, got, len), "pipe %d", i);
	}
	for (int i = pairs + others; i < all; i++) {
		int len = snprintf(want, sizeof want, "%05d ", i);
		CHECK(lseek(mine[i], 0, SEEK_CUR) == (child ? 2 : 1) * len, "position of file %d in process %d", i, child);
		if (child) CHECK(!lseek(mine[i], 0, SEEK_SET), "rewind");
		CHECK(write(mine[i], want, len) == len && pread(mine[i], got, len, 0) == len && !memcmp(want, got, len), "contents of file %d", i);
	}
}

int main(int argc, char **argv)
{
	begin(argc, argv);
	pairs = argc > 3 ? atoi(argv[3]) : 120;
	others = pairs / 2;
	all = pairs + 2 * others;
	NEED(all < MOST);
	int talk[2], both[2];
	char text[64], b;
	NEED(!socketpair(AF_UNIX, SOCK_STREAM, 0, talk));
	pid_t pid = fork();
	NEED(pid >= 0);
	if (!pid) {
		close(talk[0]);
		for (int i = 0; i < all; i++) mine[i] = take(talk[1]);
		while (read(talk[1], &b, 1) == 1) {
			examine(1);
			NEED(write(talk[1], "k", 1) == 1);
		}
		_exit(0);
	}
	close(talk[1]);
	for (int i = 0; i < pairs; i++) {
		NEED(!socketpair(AF_UNIX, types[i % 3], 0, both));
		for (int end = 0; end < 2; end++)
			for (int number = 0; number < 2; number++) {
				int len = snprintf(text, sizeof text, "%05d %d %d", i, end, number);
				NEED(send(both[end], text, len, MSG_DONTWAIT) == len);
			}
		mine[i] = both[0];
		give(talk[0], both[1]);
	}
	for (int i = pairs; i < pairs + others; i++) {
		NEED(!pipe(both));
		int len = snprintf(text, sizeof text, "pipe %05d", i);
		NEED(write(both[1], text, len) == len);
		mine[i] = both[0];
		give(talk[0], both[1]);
	}
	for (int i = pairs + others; i < all; i++) {
		snprintf(text, sizeof text, "%s.%d", argv[1], i);
		mine[i] = open(text, O_RDWR | O_CREAT, 0600);
		int len = snprintf(text, sizeof text, "%05d ", i);
		NEED(mine[i] >= 0 && write(mine[i], text, len) == len);
		give(talk[0], dup(mine[i]));
	}
	ready();
	for (;;) {
		wait_asked();
		BREAK("message") NEED(recv(mine[1], text, sizeof text, 0) > 0);
		BREAK("order") NEED(dup2(mine[3], mine[0]) == mine[0]);
		BREAK("pipe") NEED(read(mine[pairs], text, 1) == 1);
		BREAK("file") NEED(lseek(mine[all - 1], 1, SEEK_CUR) > 0);
		examine(0);
		NEED(write(talk[0], "x", 1) == 1);
		BREAK("child") kill(pid, SIGKILL);
		CHECK(read(talk[0], &b, 1) == 1, "the other process is content");
		say("PASS");
	}
}
