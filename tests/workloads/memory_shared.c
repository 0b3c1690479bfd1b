/* Anonymous shared memory and a mapped memfd without a descriptor stay shared between three generations. */
#include "workload.h"
#include <linux/futex.h>

static void wait_for(volatile uint32_t *at, uint32_t value)
{
	CHECK(SOON(*at >= value), "a relative answers through shared memory (wanted %u, have %u)", value, *at);
}

int main(int argc, char **argv)
{
	begin(argc, argv);
	const size_t n = 256 * PAGE;
	char *sh = map(n, PROT_READ | PROT_WRITE, MAP_SHARED);
	volatile uint32_t *turn = (void *)sh;
	fill(sh + 16 * PAGE, 16 * PAGE, 11);
	int m = memfd_create("lone", MFD_CLOEXEC);
	NEED(m >= 0 && !ftruncate(m, 32 * PAGE));
	char *lone = mmap(0, 32 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, m, 0);
	char *part = mmap(0, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, m, 8 * PAGE);
	NEED(lone != MAP_FAILED && part != MAP_FAILED && !close(m));
	fill(lone, 32 * PAGE, 12);
	pid_t child = fork();
	if (!child) {
		pid_t grandchild = fork();
		for (uint32_t seen = 0;;) { /* each adds its own mark when the root asks for round `turn[0]` */
			usleep(1000);
			if (turn[0] == seen) continue;
			seen = turn[0];
			CHECK(filled(sh + 16 * PAGE, 16 * PAGE, 11), "shared page as a relative sees it");
			if (grandchild) strcpy(lone + 31 * PAGE, "child was here"), turn[1] = seen;
			else strcpy(sh + 255 * PAGE, "grandchild was here"), turn[2] = seen;
		}
	}
	turn[0] = 1;
	wait_for(turn + 1, 1);
	wait_for(turn + 2, 1);
	fill(lone + 31 * PAGE, PAGE, 0);
	memset(sh + 255 * PAGE, 0, PAGE);
	ready();
	wait_asked();
	BREAK("contents") sh[17 * PAGE] ^= 1;
	BREAK("memfd") lone[PAGE] ^= 1;
	BREAK("unshared") {
		char *copy = map(n, PROT_READ | PROT_WRITE, MAP_PRIVATE);
		memcpy(copy, sh, n);
		mremap(copy, n, n, MREMAP_MAYMOVE | MREMAP_FIXED, sh);
	}
	CHECK(filled(sh + 16 * PAGE, 16 * PAGE, 11), "shared pages");
	CHECK(is_zero(sh + 40 * PAGE, 100 * PAGE), "untouched shared pages");
	CHECK(filled(lone, 31 * PAGE, 12), "memfd without a descriptor");
	turn[0] = 2;
	wait_for(turn + 1, 2);
	wait_for(turn + 2, 2);
	CHECK(!strcmp(lone + 31 * PAGE, "child was here"), "the child's write");
	CHECK(!strcmp(sh + 255 * PAGE, "grandchild was here"), "the grandchild's write");
	part[5] = 'P';
	CHECK(lone[8 * PAGE + 5] == 'P', "two mappings of one memfd");
	pass();
}
