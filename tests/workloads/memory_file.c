/* File mappings: private ones keep their own pages and see the file's elsewhere, shared ones write through. */
#include "workload.h"

int main(int argc, char **argv)
{
	begin(argc, argv);
	const size_t n = 64 * PAGE;
	static char buf[64 * PAGE];
	fill(buf, n, 7);
	int priv_fd = open("private.data", O_RDWR | O_CREAT | O_TRUNC, 0600), shared_fd = open("shared.data", O_RDWR | O_CREAT | O_TRUNC, 0600);
	NEED(write(priv_fd, buf, n) == (ssize_t)n && write(shared_fd, buf, n) == (ssize_t)n);
	char *priv = mmap(0, n, PROT_READ | PROT_WRITE, MAP_PRIVATE, priv_fd, 0);
	char *late = mmap(0, 8 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, priv_fd, 32 * PAGE);
	char *shared = mmap(0, n, PROT_READ | PROT_WRITE, MAP_SHARED, shared_fd, 0);
	char *reading = mmap(0, n, PROT_READ, MAP_SHARED, shared_fd, 0);
	NEED(priv != MAP_FAILED && late != MAP_FAILED && shared != MAP_FAILED && reading != MAP_FAILED);
	for (size_t p = 0; p < 64; p += 5) fill(priv + p * PAGE, PAGE, 1000 + p);
	memset(late + PAGE, 'L', PAGE);
	NEED(!mprotect(priv + 10 * PAGE, PAGE, PROT_READ));
	memset(shared + 3 * PAGE, 'S', 100);
	/* One private mapping whose file has no descriptor any more. */
	NEED(!close(priv_fd));
	ready();
	wait_asked();
	BREAK("modified") priv[5 * PAGE] ^= 1;
	BREAK("untouched") priv[6 * PAGE] ^= 1;
	BREAK("late") late[PAGE] = 0;
	BREAK("shared") shared = mmap(shared, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED, shared_fd, 0);
	for (size_t p = 0; p < 64; p++)
		CHECK(p % 5 ? !memcmp(priv + p * PAGE, buf + p * PAGE, PAGE) : filled(priv + p * PAGE, PAGE, 1000 + p), "private page %zu", p);
	CHECK(late[PAGE] == 'L' && late[2 * PAGE - 1] == 'L' && !memcmp(late, buf + 32 * PAGE, PAGE), "private page at an offset");
	CHECK(shared[3 * PAGE + 99] == 'S', "shared page");
	char *mark = shared + 40 * PAGE, back = 0;
	*mark = *mark + 1;
	CHECK(pread(shared_fd, &back, 1, 40 * PAGE) == 1 && back == *mark, "a write to the shared mapping reaches the file");
	CHECK(reading[40 * PAGE] == *mark, "both shared mappings are of the same file");
	priv[63 * PAGE] = 1;
	int check = open("private.data", O_RDONLY);
	CHECK(pread(check, &back, 1, 63 * PAGE) == 1 && back == buf[63 * PAGE], "private writes stay private");
	pass();
}
