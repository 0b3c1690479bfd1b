/* Pipes and FIFOs: bytes in flight, sizes, flags, packets, ends in different processes and ends that are closed. */
#include "workload.h"

int main(int argc, char **argv)
{
	begin(argc, argv);
	int plain[2], full[2], packets[2], to_child[2], from_child[2], closed[2], empty[2], nb[2];
	static char block[300000], back[300000];
	char b[64];
	fill(block, sizeof block, 61);
	NEED(!pipe(plain) && !pipe2(full, O_NONBLOCK) && !pipe2(packets, O_DIRECT) && !pipe(to_child) && !pipe(from_child) && !pipe(closed) && !pipe(empty) && !pipe2(nb, O_NONBLOCK | O_CLOEXEC));
	NEED(write(plain[1], "in flight", 9) == 9);
	NEED(fcntl(full[1], F_SETPIPE_SZ, 1 << 18) == 1 << 18 && write(full[1], block, sizeof block) == 1 << 18);
	NEED(write(closed[1], "last words", 10) == 10 && !close(closed[1]));
	signal(SIGPIPE, SIG_IGN);
	NEED(!mkfifo("fifo", 0600) || errno == EEXIST);
	int fifo_rw = open("fifo", O_RDWR), fifo_r = open("fifo", O_RDONLY | O_NONBLOCK);
	NEED(fifo_rw >= 0 && fifo_r >= 0 && write(fifo_rw, "through the fifo", 16) == 16);
	pid_t child = fork();
	if (!child) {
		close(to_child[1]);
		close(from_child[0]);
		ssize_t n;
		while ((n = read(to_child[0], b, sizeof b)) > 0) NEED(write(from_child[1], b, n) == n);
		_exit(n ? 1 : 4);
	}
	NEED(!close(to_child[0]) && !close(from_child[1]));
	ready();
	wait_asked();
	BREAK("bytes") NEED(read(plain[0], b, 1) == 1);
	BREAK("size") fcntl(full[1], F_SETPIPE_SZ, 1 << 19);
	BREAK("packets") fcntl(packets[1], F_SETFL, 0);
	BREAK("fifo") NEED(read(fifo_r, b, 1) == 1);
	BREAK("child") kill(child, SIGSTOP);
	BREAK("writer") NEED(dup2(plain[1], closed[0]) == closed[0]);
	BREAK("flags") fcntl(nb[0], F_SETFL, 0);
	BREAK("empty") NEED(write(empty[1], "x", 1) == 1);
	CHECK(read(plain[0], b, 64) == 9 && !memcmp(b, "in flight", 9), "bytes in flight");
	CHECK(fcntl(full[0], F_GETPIPE_SZ) == 1 << 18, "size %d", fcntl(full[0], F_GETPIPE_SZ));
	CHECK(write(full[1], "x", 1) < 0 && errno == EAGAIN, "a full pipe is full");
	for (size_t at = 0; at < 1 << 18;) { ssize_t n = read(full[0], back + at, sizeof back - at); CHECK(n > 0, "full pipe at %zu", at); at += n; }
	CHECK(!memcmp(block, back, 1 << 18), "contents of the full pipe");
	CHECK(write(packets[1], "one", 3) == 3 && write(packets[1], "second", 6) == 6, "write packets");
	CHECK(read(packets[0], b, 64) == 3 && !memcmp(b, "one", 3) && read(packets[0], b, 64) == 6 && !memcmp(b, "second", 6), "packets keep their boundaries");
	CHECK(fcntl(packets[1], F_GETFL) & O_DIRECT, "O_DIRECT");
	CHECK(read(closed[0], b, 64) == 10 && !memcmp(b, "last words", 10) && read(closed[0], b, 64) == 0, "bytes of a writer that closed, then the end");
	CHECK(fcntl(nb[0], F_GETFL) & O_NONBLOCK && fcntl(nb[0], F_GETFD) == FD_CLOEXEC && read(nb[0], b, 1) < 0 && errno == EAGAIN, "an empty pipe that does not block");
	fcntl(empty[0], F_SETFL, O_NONBLOCK);
	CHECK(read(empty[0], b, 1) < 0 && errno == EAGAIN, "an empty pipe is empty");
	CHECK(fcntl(fifo_r, F_GETFL) & O_NONBLOCK && read(fifo_r, b, 64) == 16 && !memcmp(b, "through the fifo", 16), "bytes in the fifo");
	int late = open("fifo", O_WRONLY | O_NONBLOCK);
	CHECK(late >= 0 && write(late, "late", 4) == 4 && read(fifo_rw, b, 64) == 4, "a newcomer reaches the fifo by its name");
	CHECK(write(to_child[1], "echo", 4) == 4, "write to the child");
	for (int i = 0; i < 2000 && fcntl(from_child[0], F_SETFL, O_NONBLOCK) == 0; i++) { ssize_t n = read(from_child[0], b, 64); if (n == 4) break; usleep(1000); CHECK(i < 1999, "the child does not echo"); }
	CHECK(!memcmp(b, "echo", 4) && !close(to_child[1]), "echo");
	int status;
	CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 4, "the child sees the end of its input, status %#x", status);
	CHECK(read(from_child[0], b, 64) == 0, "the parent sees the end of the child's output");
	CHECK(!close(plain[0]) && write(plain[1], "x", 1) < 0 && errno == EPIPE, "nobody else holds an end");
	pass();
}
