/* argv[3] workers (default 8) forked by one process over argv[4] MiB (default 32) that it has filled, as pre-forking
 * servers are. Each has changed some pages, discarded some, mapped some, and the first has a worker of its own. Asked, all check
 * every byte; argv[5]: 1 leaves the check to the first page of each MiB, so that nobody touches more than that. */
#include "workload.h"
#include <sys/socket.h>

enum { MAX = 256 };
static int n, quick;
static size_t bytes;
static char *heap, *code;
static int ask[MAX + 1], go[MAX + 1];

/* Which page of the heap worker w (1...) has changed, and which run it has discarded. */
static size_t changed(int w) { return w * 37 % (bytes / PAGE); }
static size_t gone(int w) { return (w * 101 + 5) % (bytes / PAGE - 3); }

static int whole(int w)
{
	for (size_t p = 0; p < bytes / PAGE; p += quick ? 256 : 1) {
		char *at = heap + p * PAGE;
		if (w && p == changed(w)) { if (!filled(at, PAGE, 1000000 + w)) return 0; }
		else if (w && p >= gone(w) && p < gone(w) + 3) { if (!is_zero(at, PAGE)) return 0; }
		else if (!filled(at, PAGE, p)) return 0;
	}
	return filled(code, PAGE, 77 + w % 2);
}
static void change(int w)
{
	for (int i = 0; i < 3; i++) NEED(!madvise(heap + (gone(w) + i) * PAGE, PAGE, MADV_DONTNEED));
	fill(heap + changed(w) * PAGE, PAGE, 1000000 + w);
	if (w % 2) fill(code, PAGE, 78);
}
static void work(int w)
{
	char c, *own = map(4 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE);
	change(w);
	fill(own, 4 * PAGE, w);
	if (w == 3) NEED(!mprotect(heap, bytes, PROT_READ));
	pid_t deeper = 0;
	if (w == 1 && !(deeper = fork())) { own[0] ^= 1; for (;;) pause(); }
	NEED(write(ask[w], "r", 1) == 1);
	while (read(ask[w], &c, 1) == 1) {
		int ok = whole(w) && filled(own, 4 * PAGE, w) && (!deeper || !kill(deeper, 0));
		if (write(ask[w], ok ? "y" : "n", 1) != 1) _exit(1);
	}
	_exit(0);
}

int main(int argc, char **argv)
{
	begin(argc, argv);
	n = argc > 3 ? atoi(argv[3]) : 8;
	bytes = (argc > 4 ? strtoul(argv[4], 0, 10) : 32) << 20;
	quick = argc > 5;
	NEED(n >= 1 && n <= MAX);
	heap = map(bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE);
	NEED(!madvise(heap, bytes, MADV_NOHUGEPAGE) || errno == EINVAL);
	for (size_t p = 0; p < bytes / PAGE; p++) fill(heap + p * PAGE, PAGE, p);
	/* A private mapping of a file, changed before the fork. */
	int fd = open(argv[0], O_RDONLY);
	code = mmap(0, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
	NEED(fd >= 0 && code != MAP_FAILED);
	close(fd);
	fill(code, PAGE, 77);
	for (int w = 1; w <= n; w++) {
		int pair[2];
		NEED(!socketpair(AF_UNIX, SOCK_STREAM, 0, pair));
		pid_t p = fork();
		NEED(p >= 0);
		ask[w] = pair[1];
		if (!p) {
			close(pair[0]);
			for (int o = 1; o < w; o++) close(go[o]);
			work(w);
		}
		go[w] = pair[0];
		close(pair[1]);
		char c;
		NEED(read(go[w], &c, 1) == 1 && c == 'r');
	}
	ready();
	for (;;) {
		wait_asked();
		BREAK("parent") heap[bytes / 2] ^= 1;
		CHECK(quick || whole(0), "the parent's memory");
		for (int w = 1; w <= n; w++) {
			char c = 0;
			BREAK("worker") if (w == 2) { close(go[w]); go[w] = ask[1]; }
			CHECK(write(go[w], "?", 1) == 1 && read(go[w], &c, 1) == 1 && c == 'y', "worker %d says %c", w, c);
		}
		say("PASS");
	}
}
