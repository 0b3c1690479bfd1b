/* A process with argv[3] MiB of incompressible pages of 4 KiB: what the bench checkpoints. Its own checksum on SIGUSR1.
 * With argv[4] a second thread notes in that file (a shared mapping of three u64) the longest time, in microseconds,
 * for which it did not get to run: the freeze as the program itself feels it. On SIGUSR2 it forks and notes in a second
 * u64 there how long that took. If the third is 0 it notes there what the clock says. */
#include "workload.h"
#include <sys/socket.h>

static volatile uint64_t *gap;
static uint64_t now_us(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000ull + t.tv_nsec / 1000;
}
static void *tick(void *unused)
{
	for (uint64_t last = now_us();;) {
		usleep(200);
		uint64_t now = now_us();
		if (now - last > *gap) *gap = now - last;
		if (!gap[2]) gap[2] = now;
		last = now;
	}
	return unused;
}

static void on_usr2(int s)
{
	(void)s;
	uint64_t start = now_us();
	pid_t p = fork();
	if (!p) _exit(0);
	uint64_t took = now_us() - start;
	waitpid(p, 0, 0);
	gap[1] = took ? took : 1;
}

int main(int argc, char **argv)
{
	begin(argc, argv);
	size_t n = (argc > 3 ? strtoul(argv[3], 0, 10) : 64) << 20;
	uint64_t *m = mmap(0, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	NEED(m != MAP_FAILED && (!madvise(m, n, MADV_NOHUGEPAGE) || errno == EINVAL));
	uint64_t x = 88172645463325252ull, sum = 0;
	for (size_t i = 0; i < n / 8; i++) { x ^= x << 13; x ^= x >> 7; x ^= x << 17; m[i] = x; sum += x; }
	for (int i = argc > 5 ? atoi(argv[5]) : 0, pair[2]; i > 0; i--) NEED(!socketpair(AF_UNIX, SOCK_STREAM, 0, pair) && send(pair[0], "queued", 6, 0) == 6);
	if (argc > 4) {
		int fd = open(argv[4], O_RDWR | O_CREAT, 0600);
		pthread_t t;
		NEED(fd >= 0 && !ftruncate(fd, 24));
		gap = mmap(0, 24, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
		NEED(gap != MAP_FAILED && !pthread_create(&t, 0, tick, 0));
		signal(SIGUSR2, on_usr2);
	}
	ready();
	for (;;) {
		wait_asked();
		BREAK("byte") m[77]++;
		uint64_t again = 0;
		for (size_t i = 0; i < n / 8; i++) again += m[i];
		CHECK(again == sum, "checksum");
		say("PASS");
	}
}
