/* Memory whose pages may be missing while the program goes on (ckpt-restore --lazy). It starts its checks on SIGUSR1, or as
 * soon as the first byte of the file argv[4] is not 0, which somebody can see to while there is no process. Everything
 * that a program can do to a page which has not come: touch it from several threads in any order, have the kernel read
 * and write it, move, protect, discard, unmap and replace it, fork, exec and exit with it missing.
 * argv[3]: MiB for each of the areas. argv[5]: "hurry" ends as soon as it has begun; "stray" does nothing but leave a
 * process behind that is nobody's child, which touches a page when the flag is 2. */
#include "workload.h"
#include <sys/uio.h>
#include <spawn.h>

extern char **environ;

enum { TOUCH, DISCARD, MOVE, REPLACE, FORK, KERNEL, PROTECT, HOLES, GROW, AREAS };
static char *area[AREAS];
static size_t size;

static size_t missing(void)
{
	size_t absent = 0;
	int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	for (int i = 0; i < AREAS; i++)
		for (size_t at = 0; at < size; at += PAGE * 512) {
			uint64_t entries[512];
			NEED(pread(fd, entries, sizeof entries, ((uintptr_t)area[i] + at) / PAGE * 8) == sizeof entries);
			for (int k = 0; k < 512; k++) absent += !(entries[k] >> 62);
		}
	close(fd);
	return absent;
}

static char *page_of(int which, size_t n) { return area[which] + n * PAGE; }
static int whole(int which, const char *at, size_t n) { return filled(at, PAGE, which * 1000003ul + n); }

/* Every page of an area, in an order of its own; `step` is odd, so that all are met. */
static void all_pages(int which, const char *base, size_t step, size_t start)
{
	size_t pages = size / PAGE;
	for (size_t i = 0, n = start % pages; i < pages; i++, n = (n + step) % pages)
		CHECK(whole(which, base + n * PAGE, n), "area %d page %zu", which, n);
}

static void *toucher(void *arg)
{
	size_t seed = (size_t)arg;
	all_pages(TOUCH, area[TOUCH], 2 * seed * 3571 + 1, seed * 977);
	return 0;
}

static void *discarder(void *arg)
{
	(void)arg;
	size_t pages = size / PAGE;
	/* Three of four go: by one call for two pages, then one of a page that may have come just now. */
	for (size_t n = 0; n < pages; n += 4) {
		NEED(!madvise(page_of(DISCARD, n), 2 * PAGE, MADV_DONTNEED));
		if (n & 4) CHECK(whole(DISCARD, page_of(DISCARD, n + 2), n + 2), "page %zu before it is discarded", n + 2);
		NEED(!madvise(page_of(DISCARD, n + 2), PAGE, MADV_DONTNEED));
	}
	for (size_t n = 0; n < pages; n++)
		CHECK(n % 4 == 3 ? whole(DISCARD, page_of(DISCARD, n), n) : is_zero(page_of(DISCARD, n), PAGE), "page %zu after discarding", n);
	return 0;
}

static void *mover(void *arg)
{
	(void)arg;
	char *to = mmap(0, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	NEED(to != MAP_FAILED);
	size_t half = size / 2;
	/* The halves change places. */
	NEED(mremap(area[MOVE], half, half, MREMAP_MAYMOVE | MREMAP_FIXED, to + half) == to + half);
	NEED(mremap(area[MOVE] + half, half, half, MREMAP_MAYMOVE | MREMAP_FIXED, to) == to);
	for (size_t n = size / PAGE; n-- > 0;) {
		size_t was = n * PAGE < half ? n + half / PAGE : n - half / PAGE;
		CHECK(whole(MOVE, to + n * PAGE, was), "page %zu after moving", was);
	}
	/* And back, for whoever asks again. */
	NEED(mremap(to + half, half, half, MREMAP_MAYMOVE | MREMAP_FIXED, area[MOVE]) == area[MOVE]);
	NEED(mremap(to, half, half, MREMAP_MAYMOVE | MREMAP_FIXED, area[MOVE] + half) == area[MOVE] + half);
	return 0;
}

static void *replacer(void *arg)
{
	(void)arg;
	size_t part = size / 4;
	NEED(!munmap(area[REPLACE], part));
	char *fresh = mmap(area[REPLACE], part, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
	NEED(fresh == area[REPLACE]);
	/* Over what is mapped. */
	fresh = mmap(area[REPLACE] + part, part, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
	NEED(fresh == area[REPLACE] + part);
	CHECK(is_zero(area[REPLACE], 2 * part), "old contents in a new mapping");
	for (size_t n = 2 * part / PAGE; n < size / PAGE; n++) CHECK(whole(REPLACE, page_of(REPLACE, n), n), "page %zu beside new mappings", n);
	return 0;
}

static void *kernel(void *arg)
{
	(void)arg;
	int p[2];
	char buf[PAGE];
	NEED(!pipe2(p, O_CLOEXEC));
	for (size_t n = 0; n + 4 < size / PAGE; n += 5) {
		/* Written to the pipe by the kernel, then read over another missing page, half of it. */
		NEED(write(p[1], page_of(KERNEL, n), PAGE) == PAGE);
		NEED(read(p[0], buf, PAGE) == PAGE);
		CHECK(whole(KERNEL, buf, n), "write(2) of page %zu", n);
		NEED(write(p[1], buf, PAGE / 2) == PAGE / 2);
		NEED(read(p[0], page_of(KERNEL, n + 1), PAGE / 2) == PAGE / 2);
		CHECK(!memcmp(page_of(KERNEL, n + 1), buf, PAGE / 2), "read(2) into page %zu", n + 1);
		fill(buf, PAGE, KERNEL * 1000003ul + n + 1);
		CHECK(!memcmp(page_of(KERNEL, n + 1) + PAGE / 2, buf + PAGE / 2, PAGE / 2), "the rest of page %zu", n + 1);
		fill(page_of(KERNEL, n + 1), PAGE, KERNEL * 1000003ul + n + 1);
		struct iovec to = { buf, PAGE }, from = { page_of(KERNEL, n + 2), PAGE };
		NEED(process_vm_readv(getpid(), &to, 1, &from, 1, 0) == PAGE);
		CHECK(whole(KERNEL, buf, n + 2), "process_vm_readv of page %zu", n + 2);
		NEED(write(p[1], "12345678", 8) == 8);
		struct iovec part = { page_of(KERNEL, n + 3) + 8, 8 };
		NEED(readv(p[0], &part, 1) == 8);
		fill(buf, PAGE, KERNEL * 1000003ul + n + 3);
		memcpy(buf + 8, "12345678", 8);
		CHECK(!memcmp(page_of(KERNEL, n + 3), buf, PAGE), "page %zu after readv", n + 3);
		fill(page_of(KERNEL, n + 3), PAGE, KERNEL * 1000003ul + n + 3);
		NEED(syscall(SYS_futex, page_of(KERNEL, n + 4), 128 /* WAIT_PRIVATE */, 0x1, 0, 0, 0) == -1 && errno == EAGAIN);
		CHECK(whole(KERNEL, page_of(KERNEL, n + 4), n + 4), "page %zu after futex", n + 4);
	}
	close(p[0]), close(p[1]);
	return 0;
}

static void *protector(void *arg)
{
	(void)arg;
	for (size_t n = 0; n < size / PAGE; n += 3) {
		NEED(!mprotect(page_of(PROTECT, n), PAGE, n % 2 ? PROT_READ : PROT_NONE));
		if (n % 2) CHECK(whole(PROTECT, page_of(PROTECT, n), n), "read-only page %zu", n);
	}
	NEED(!mprotect(area[PROTECT], size, PROT_READ | PROT_WRITE));
	all_pages(PROTECT, area[PROTECT], 4099, 7);
	return 0;
}

static void *holes(void *arg)
{
	(void)arg;
	for (size_t n = size / PAGE; n-- > 0;)
		CHECK(n % 2 ? is_zero(page_of(HOLES, n), PAGE) : whole(HOLES, page_of(HOLES, n), n), "page %zu among holes", n);
	/* The mapping grows and shrinks where it is, or wherever there is room. */
	char *grown = mremap(area[GROW], size, size + 64 * PAGE, MREMAP_MAYMOVE);
	NEED(grown != MAP_FAILED);
	CHECK(is_zero(grown + size, 64 * PAGE), "the grown part");
	memset(grown + size, 1, PAGE);
	all_pages(GROW, grown, 8191, 3);
	NEED(mremap(grown, size + 64 * PAGE, size, 0) == grown);
	if (grown != area[GROW]) NEED(mremap(grown, size, size, MREMAP_MAYMOVE | MREMAP_FIXED, area[GROW]) == area[GROW]);
	return 0;
}

static void ends_well(pid_t pid, const char *what)
{
	int status;
	NEED(pid > 0 && waitpid(pid, &status, 0) == pid);
	CHECK(status == 0, "%s: status %#x", what, status);
}

static void *forker(void *arg)
{
	(void)arg;
	/* The parent's pages, the child's and the grandchild's, each of whom writes its own. */
	pid_t child = fork();
	if (!child) {
		size_t last = size / PAGE - 1;
		fill(page_of(FORK, last), PAGE, 5);
		NEED(!madvise(page_of(FORK, 1), PAGE, MADV_DONTNEED));
		pid_t grandchild = fork();
		if (!grandchild) {
			CHECK(filled(page_of(FORK, last), PAGE, 5), "what the child wrote before it forked");
			CHECK(is_zero(page_of(FORK, 1), PAGE), "what the child discarded before it forked");
			for (size_t n = 2; n < last; n++) CHECK(whole(FORK, page_of(FORK, n), n), "page %zu in the grandchild", n);
			_exit(0);
		}
		for (size_t n = last; n-- > 2;) CHECK(whole(FORK, page_of(FORK, n), n), "page %zu in the child", n);
		ends_well(grandchild, "the grandchild");
		_exit(0);
	}
	for (int i = 0; i < 8; i++) {
		char *args[] = { "true", 0 };
		pid_t other;
		if (i % 2) {
			other = fork();
			if (!other) execv("/bin/true", args), _exit(9);
		} else NEED(!posix_spawn(&other, "/bin/true", 0, 0, args, environ));
		ends_well(other, "exec");
		other = fork();
		if (!other) _exit(0);
		ends_well(other, "exit");
	}
	all_pages(FORK, area[FORK], 12289, 11);
	ends_well(child, "the child");
	return 0;
}

int main(int argc, char **argv)
{
	begin(argc, argv);
	size = (argc > 3 ? strtoul(argv[3], 0, 10) : 2) << 20;
	volatile char *flag = "";
	if (argc > 4) {
		int fd = open(argv[4], O_RDWR | O_CREAT | O_CLOEXEC, 0600);
		NEED(fd >= 0 && !ftruncate(fd, 1));
		flag = mmap(0, 1, PROT_READ, MAP_SHARED, fd, 0);
		NEED(flag != MAP_FAILED);
		close(fd);
	}
	for (int i = 0; i < AREAS; i++) {
		area[i] = map(size, PROT_READ | PROT_WRITE, MAP_PRIVATE);
		for (size_t n = 0; n < size / PAGE; n += 1 + (i == HOLES)) fill(page_of(i, n), PAGE, i * 1000003ul + n);
	}
	ready();
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	struct timespec moment = { 0, 1000000 };
	while (!*flag && sigtimedwait(&set, 0, &moment) < 0) ;
	BREAK("page") area[TOUCH][12345]++;
	BREAK("discarded") area[DISCARD][3 * PAGE]++;
	BREAK("moved") area[MOVE][0]++;
	BREAK("beside") area[REPLACE][size - 1]++;
	BREAK("forked") area[FORK][2 * PAGE]++;
	BREAK("written") area[KERNEL][0]++;
	BREAK("protected") area[PROTECT][PAGE]++;
	BREAK("hole") area[HOLES][PAGE]++;
	BREAK("grown") area[GROW][1]++;
	if (argc > 4) say("missing %zu", missing());
	if (argc > 5 && !strcmp(argv[5], "hurry")) _exit(3);
	if (argc > 5 && !strcmp(argv[5], "stray")) {
		pid_t child = fork();
		if (!child) {
			if (fork()) _exit(0);
			while (getppid() == child) usleep(100);
			say("stray %d", getpid());
			while (*flag != 2) usleep(500);
			all_pages(PROTECT, area[PROTECT], 1, 0);
			_exit(0);
		}
		ends_well(child, "the child");
		for (;;) pause();
	}
	void *(*work[])(void *) = { toucher, toucher, toucher, discarder, mover, replacer, kernel, protector, holes, forker };
	pthread_t threads[sizeof work / sizeof *work];
	for (size_t i = 0; i < sizeof work / sizeof *work; i++) NEED(!pthread_create(&threads[i], 0, work[i], (void *)i));
	for (size_t i = 0; i < sizeof work / sizeof *work; i++) NEED(!pthread_join(threads[i], 0));
	/* Whatever was done: what is still there is what it was. */
	all_pages(TOUCH, area[TOUCH], 1, 0);
	all_pages(MOVE, area[MOVE], 1, 0);
	all_pages(FORK, area[FORK], 1, 0);
	all_pages(PROTECT, area[PROTECT], 1, 0);
	say("PASS");
	for (;;) {
		wait_asked();
		all_pages(TOUCH, area[TOUCH], 1, 0);
		all_pages(MOVE, area[MOVE], 1, 0);
		all_pages(FORK, area[FORK], 1, 0);
		CHECK(whole(DISCARD, page_of(DISCARD, 3), 3) && is_zero(page_of(DISCARD, 0), PAGE), "discarded pages later on");
		say("PASS");
	}
}
