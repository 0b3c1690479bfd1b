/* Guard regions (MADV_GUARD_INSTALL) are where they were and nowhere else, in memory of every kind, in a child too. */
#include "workload.h"
#include <setjmp.h>

#define GUARD_INSTALL 102
#define GUARD_REMOVE 103
#define PAGES 64

static sigjmp_buf out;
static void fault(int signal) { (void)signal; siglongjmp(out, 1); }

static int faults(volatile char *at)
{
	if (sigsetjmp(out, 1)) return 1;
	(void)*at;
	return 0;
}

/* What has guards: whether a page has one is by a pattern. */
enum { ANON, STACK, NONE, WIPED, NOFORK, OF_FILE, SHARED, LOCKED, N };
static const char *name[N] = { "anonymous", "a stack", "PROT_NONE", "wipeonfork", "dontfork", "file", "shared", "locked" };
static char *at[N];
static int guarded(int kind, int page) { return page % (kind + 3) == 1 || page / 8 == 3; }

/* Shared memory and what mmap gave are whole or have a pattern; `fresh`: what a fork wiped. */
static void look(int kind, int fresh)
{
	for (int page = 0; page < PAGES; page++) {
		char *p = at[kind] + page * PAGE;
		int guard = guarded(kind, page) && !fresh;
		CHECK(faults(p) == guard, "%s: page %d %s a guard", name[kind], page, guard ? "has lost" : "has got");
		if (!guard && kind != OF_FILE)
			CHECK(fresh ? is_zero(p, PAGE) : page % 5 ? filled(p, PAGE, kind + page) : is_zero(p, PAGE),
			      "%s: contents of page %d", name[kind], page);
	}
}

static void look_at_all(int child)
{
	CHECK(!mprotect(at[NONE], PAGES * PAGE, PROT_READ | PROT_WRITE), "mprotect");
	for (int kind = 0; kind < N; kind++)
		if (!child || kind != NOFORK) look(kind, child && kind == WIPED);
	/* A guard goes by itself alone, and leaves an empty page. */
	char *p = at[ANON] + PAGE;
	CHECK(!madvise(p, PAGE, GUARD_REMOVE) && is_zero(p, PAGE) && faults(at[ANON] + 4 * PAGE), "one guard less");
}

int main(int argc, char **argv)
{
	begin(argc, argv);
	signal(SIGSEGV, fault);
	char path[256];
	snprintf(path, sizeof path, "%s.data", argv[1]);
	int file = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	NEED(file >= 0 && !ftruncate(file, PAGES * PAGE));
	for (int kind = 0; kind < N; kind++) {
		int flags = kind == SHARED ? MAP_SHARED : MAP_PRIVATE;
		if (kind == STACK) flags |= MAP_STACK | MAP_NORESERVE;
		if (kind == OF_FILE) NEED((at[kind] = mmap(0, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0)) != MAP_FAILED);
		else at[kind] = map(PAGES * PAGE, PROT_READ | PROT_WRITE, flags);
		for (int page = 0; page < PAGES; page++) {
			char *p = at[kind] + page * PAGE;
			if (page % 5) fill(p, PAGE, kind + page);
			if (guarded(kind, page) && madvise(p, PAGE, GUARD_INSTALL)) {
				/* A kernel without them, or without them here. */
				NEED(kind != ANON);
				NEED(kind == OF_FILE || kind == SHARED);
			}
		}
	}
	NEED(!madvise(at[WIPED], PAGES * PAGE, MADV_WIPEONFORK) && !madvise(at[NOFORK], PAGES * PAGE, MADV_DONTFORK));
	NEED(!mprotect(at[NONE], PAGES * PAGE, PROT_NONE));
	NEED(!mlock2(at[LOCKED], PAGES * PAGE, MLOCK_ONFAULT));
	int lost = 0;
	BREAK("removed") lost = 1;
	BREAK("more") lost = 2;
	int up[2], down[2];
	NEED(!pipe(up) && !pipe(down));
	pid_t child = fork();
	NEED(child >= 0);
	if (!child) {
		char c;
		NEED(write(up[1], "r", 1) == 1 && read(down[0], &c, 1) == 1);
		BREAK("child") madvise(at[STACK], PAGES * PAGE, GUARD_REMOVE);
		look_at_all(1);
		NEED(write(up[1], "p", 1) == 1);
		_exit(0);
	}
	char c;
	NEED(read(up[0], &c, 1) == 1);
	ready();
	wait_asked();
	if (lost == 1) madvise(at[STACK] + PAGE, PAGE, GUARD_REMOVE);
	if (lost == 2) madvise(at[SHARED], PAGE, GUARD_INSTALL);
	BREAK("contents") at[LOCKED][9] ^= 1;
	look_at_all(0);
	NEED(write(down[1], "g", 1) == 1);
	CHECK(read(up[0], &c, 1) == 1 && c == 'p', "the child");
	int status;
	CHECK(waitpid(child, &status, 0) == child && !status, "the child's end, %#x", status);
	pass();
}
