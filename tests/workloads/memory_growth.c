/* Heap and stack keep their contents and can still grow. */
#include "workload.h"

static uint64_t __attribute__((noinline)) deep(int n)
{
	volatile char frame[4096];
	frame[0] = n;
	frame[4095] = n >> 8;
	return n ? deep(n - 1) + (unsigned char)frame[0] : (unsigned char)frame[0];
}

int main(int argc, char **argv)
{
	begin(argc, argv);
	char *start = sbrk(0);
	char *heap = sbrk(1 << 20);
	NEED(heap == start);
	fill(heap, 1 << 20, 21);
	char *small[100];
	for (int i = 0; i < 100; i++) { small[i] = malloc(1000); fill(small[i], 1000, i); }
	NEED(deep(100));
	char *down = map(16 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_GROWSDOWN);
	NEED(!munmap(down, 8 * PAGE)); /* room to grow into */
	fill(down + 15 * PAGE, PAGE, 22);
	ready();
	wait_asked();
	char *top = sbrk(0);
	BREAK("heap") heap[77] ^= 1;
	BREAK("malloc") small[50][3] ^= 1;
	BREAK("top") start += PAGE;
	BREAK("down") down[15 * PAGE] ^= 1;
	CHECK(filled(heap, 1 << 20, 21), "heap");
	CHECK(top >= start + (1 << 20) && (start == heap), "break");
	char *more = sbrk(4 << 20);
	CHECK(more == top, "the heap grows at its end");
	fill(more, 4 << 20, 23);
	CHECK(filled(more, 4 << 20, 23), "new heap");
	for (int i = 0; i < 100; i++) { CHECK(filled(small[i], 1000, i), "malloc'd block %d", i); free(small[i]); }
	for (int i = 0; i < 1000; i++) { char *p = malloc(4000); CHECK(p, "malloc"); memset(p, i, 4000); if (i % 3) free(p); }
	CHECK(deep(1200), "the stack grows");
	CHECK(filled(down + 15 * PAGE, PAGE, 22), "growing region");
	*(volatile char *)(down + 7 * PAGE + 100) = 1; /* just below its start: the kernel extends it */
	pass();
}
