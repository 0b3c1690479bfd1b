/* A family of processes that fork each other at random, write to what they share copy-on-write, some of it of a file, discard it,
 * map it anew and end: argv[2] is the seed; if that is odd, the root takes in orphans. SIGUSR1 asks for a round, in which each process of
 * the family has its turn, after which the root logs "round N". As in memory_storm, the test compares
 * the memory from outside with what the images say, so there is nothing to BREAK. */
#include "workload.h"

#define HEAP 600
#define AREA 64
#define BOOK 32
#define MAX 16

static struct member { pid_t pid, parent; uint64_t seed; } *family;
static uint64_t seed;
static char *heap, *area, *book;
static int turn[2];

static uint64_t rnd(void)
{
	seed ^= seed << 13, seed ^= seed >> 7, seed ^= seed << 17;
	return seed;
}

static void touch(char *p)
{
	*(volatile uint64_t *)p = rnd() | 1;
}

static void end_turn(void)
{
	NEED(write(turn[1], "t", 1) == 1);
}

static void wait_turn(void)
{
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	siginfo_t info;
	while (sigwaitinfo(&set, &info) < 0) ;
}

static void change_memory(void)
{
	for (int n = rnd() % 12; n > 0; n--) touch(heap + rnd() % HEAP * PAGE);
	if (rnd() % 3 == 0) madvise(heap + rnd() % (HEAP - 4) * PAGE, 4 * PAGE, MADV_DONTNEED);
	if (rnd() % 4 == 0) memset(heap + rnd() % HEAP * PAGE, 0, PAGE);
	/* A file's pages: dropped, and read or written again. */
	if (rnd() % 2) touch(book + rnd() % BOOK * PAGE);
	if (rnd() % 3 == 0) {
		size_t at = rnd() % (BOOK - 4) * PAGE;
		madvise(book + at, 4 * PAGE, MADV_DONTNEED);
		if (rnd() % 3) (void)*(volatile char *)(book + at);
		if (rnd() % 3) touch(book + at + PAGE);
	}
	switch (rnd() % 8) {
	case 0: /* another one at the same place */
		area = mmap(area, AREA * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
		NEED(area != MAP_FAILED);
		break;
	case 1: { /* the same at another place */
		char *to = mremap(area, AREA * PAGE, AREA * PAGE, MREMAP_MAYMOVE | MREMAP_DONTUNMAP, 0);
		if (to != MAP_FAILED) { munmap(area, AREA * PAGE); area = to; }
		break;
	}
	case 2: mprotect(heap + rnd() % (HEAP - 9) * PAGE, 9 * PAGE, PROT_READ | PROT_WRITE | (rnd() % 2 ? PROT_EXEC : 0)); break;
	}
	for (int n = rnd() % 4; n > 0; n--) touch(area + rnd() % AREA * PAGE);
}

static int has_children(pid_t pid)
{
	for (int i = 0; i < MAX; i++) if (family[i].pid && family[i].parent == pid) return 1;
	return 0;
}

/* In the child: its number. */
static int multiply(void)
{
	int slot = rnd() % MAX;
	if (!slot || family[slot].pid) return -1;
	pid_t parent = getpid(), pid = fork();
	NEED(pid >= 0);
	if (!pid) {
		while (!__atomic_load_n(&family[slot].seed, __ATOMIC_ACQUIRE)) usleep(50);
		seed = family[slot].seed;
		return slot;
	}
	family[slot].pid = pid;
	family[slot].parent = parent;
	__atomic_store_n(&family[slot].seed, rnd() | 1, __ATOMIC_RELEASE);
	/* What is written at once is written after the fork, and never was the child's. */
	if (rnd() % 2) change_memory();
	return -1;
}

/* Turns of a member that has been born. */
static void live(int self, int orphans)
{
	for (;;) {
		wait_turn();
		change_memory();
		if (rnd() % 5 == 0 && (orphans || !has_children(getpid()))) {
			for (int i = 0; i < MAX; i++) if (family[i].parent == getpid()) family[i].parent = family[0].pid;
			memset(&family[self], 0, sizeof family[self]);
			end_turn();
			_exit(0);
		}
		if (rnd() % 2) {
			int born = multiply();
			if (born >= 0) { self = born; continue; }
		}
		end_turn();
	}
}

int main(int argc, char **argv)
{
	begin(argc, argv);
	seed = (argc > 2 ? strtoull(argv[2], 0, 10) : 1) * 0x9e3779b97f4a7c15ull + 1;
	int orphans = argc > 2 && strtoull(argv[2], 0, 10) % 2;
	signal(SIGCHLD, SIG_IGN);
	NEED(!orphans || !prctl(PR_SET_CHILD_SUBREAPER, 1));
	NEED(!pipe(turn));
	family = mmap(0, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	NEED(family != MAP_FAILED);
	heap = map(HEAP * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE);
	area = map(AREA * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE);
	for (int i = 0; i < HEAP; i++) if (i % 7) fill(heap + i * PAGE, PAGE, seed + i);
	int file = open("book", O_RDWR | O_CREAT, 0600);
	NEED(file >= 0 && !ftruncate(file, BOOK * PAGE));
	book = mmap(0, BOOK * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0);
	NEED(book != MAP_FAILED);
	for (int i = 0; i < BOOK; i++) fill(book + i * PAGE, PAGE, seed - i);
	family[0].pid = getpid();
	ready();
	for (int round = 1;; round++) {
		wait_turn();
		change_memory();
		for (int n = 0; n < 2; n++) {
			int born = multiply();
			if (born >= 0) live(born, orphans);
		}
		for (int i = 1; i < MAX; i++) if (family[i].pid) {
			pid_t pid = family[i].pid;
			char c;
			kill(pid, SIGUSR1);
			NEED(read(turn[0], &c, 1) == 1);
			/* Gone is who has left the table. */
			if (!family[i].pid) NEED(SOON(kill(pid, 0)));
		}
		say("round %d", round);
	}
}
