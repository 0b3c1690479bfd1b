/* A process with argv[3] MiB of incompressible pages of 4 KiB: what the bench checkpoints. Its own checksum on SIGUSR1. */
#include "workload.h"

int main(int argc, char **argv)
{
	begin(argc, argv);
	size_t n = (argc > 3 ? strtoul(argv[3], 0, 10) : 64) << 20;
	uint64_t *m = mmap(0, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	NEED(m != MAP_FAILED && (!madvise(m, n, MADV_NOHUGEPAGE) || errno == EINVAL));
	uint64_t x = 88172645463325252ull, sum = 0;
	for (size_t i = 0; i < n / 8; i++) { x ^= x << 13; x ^= x >> 7; x ^= x << 17; m[i] = x; sum += x; }
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
