/* Changes its memory in every way there is, at random: argv[2] is the seed. SIGUSR1 asks for a round of ROUND
 * operations by every process of the tree, after which it logs "round N". It checks nothing: the test
 * compares its memory, from outside, with what the images say. Ways to go wrong are of the tracking, not ours,
 * so there is nothing to BREAK. With "huge" as argv[3] much of it is of huge pages, at most MOST_HUGE of them in use or promised. */
#include "workload.h"
#include "huge.h"
#include <sys/uio.h>

#define ROUND 150
#define REGIONS 48

struct region { char *at; size_t pages; int prot, huge; };
static struct region regions[REGIONS];
static uint64_t seed;
static int file, zero, depth;
static char *page_of_noise, *calm, *common;
#define CALM 1500
#define COMMON 64

#define ODD 64
static char *guarded, *split, *holey, *sysv;
/* Huge pages: of a memfd, shared and private; shared and anonymous; in regions. */
#define FEW 3
#define REGIONS_HUGE 3
#define PROCESSES 5
#define MOST_HUGE (2 * FEW + PROCESSES * (FEW + 2 * REGIONS_HUGE))
static char *huge_shared, *huge_private, *huge_common;
static int huge_fd = -1, huge_regions;
static char is_guard[ODD], is_read_only[ODD], is_hole[ODD];

static uint64_t rnd(void)
{
	seed ^= seed << 13, seed ^= seed >> 7, seed ^= seed << 17;
	return seed;
}

static void touch(char *p)
{
	*(volatile uint64_t *)p = rnd() | 1;
}

static void new_region(struct region *r)
{
	int what = rnd() % 9;
	r->pages = 1 + rnd() % 64;
	r->prot = PROT_READ | PROT_WRITE;
	if (what == 0) { /* room for a huge page, aligned */
		r->pages = 1024;
		char *p = mmap(0, 4 << 20, r->prot, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		if (p == MAP_FAILED) { r->at = 0; return; }
		r->at = p;
		madvise(p, 4 << 20, MADV_HUGEPAGE);
	} else if (what == 8 && huge_fd >= 0 && huge_regions < REGIONS_HUGE) {
		size_t n = 1 + rnd() % 2;
		int flags = MAP_PRIVATE | MAP_HUGETLB | (rnd() % 2 ? MAP_NORESERVE : 0) | (rnd() % 4 ? MAP_ANONYMOUS : 0);
		r->at = mmap(0, n * HUGE, r->prot, flags, flags & MAP_ANONYMOUS ? -1 : huge_fd, 0);
		if (r->at == MAP_FAILED) { r->at = 0; return; }
		r->pages = n * HUGE / PAGE;
		r->huge = 1;
		huge_regions++;
		touch(r->at + rnd() % r->pages * PAGE);
		return;
	} else if (what <= 2) {
		r->pages = 1 + rnd() % 16;
		r->at = mmap(0, r->pages * PAGE, r->prot, MAP_PRIVATE, file, (rnd() % 4) * PAGE);
	} else {
		r->at = mmap(0, r->pages * PAGE, r->prot, MAP_PRIVATE | MAP_ANONYMOUS | (rnd() % 2 ? MAP_NORESERVE : 0), -1, 0);
	}
	if (r->at == MAP_FAILED) { r->at = 0; return; }
	for (size_t i = 0; i < r->pages; i++) if (rnd() % 3) touch(r->at + i * PAGE);
}

static __attribute__((noinline)) uint64_t deep(int n)
{
	volatile char room[2000];
	room[rnd() % sizeof room] = n;
	return n ? deep(n - 1) + (uint64_t)room[3] : (uint64_t)room[1];
}

/* Areas of which each page is treated in a way of its own, so that mappings are cut and joined again. */
static void operate_oddly(void)
{
	size_t i = rnd() % ODD, n = 1 + rnd() % (ODD - i < 8 ? ODD - i : 8), k;
	switch (rnd() % 4) {
	case 0:
		if (rnd() % 2) { if (!madvise(guarded + i * PAGE, n * PAGE, 102 /* MADV_GUARD_INSTALL */)) memset(is_guard + i, 1, n); }
		else if (!madvise(guarded + i * PAGE, n * PAGE, 103 /* MADV_GUARD_REMOVE */)) memset(is_guard + i, 0, n);
		for (k = 0; k < ODD; k++) if (!is_guard[k] && rnd() % 8 == 0) touch(guarded + k * PAGE);
		break;
	case 1: {
		int ro = rnd() % 2;
		if (!mprotect(split + i * PAGE, n * PAGE, ro ? PROT_READ : PROT_READ | PROT_WRITE)) memset(is_read_only + i, ro, n);
		for (k = 0; k < ODD; k++) if (!is_read_only[k] && rnd() % 8 == 0) touch(split + k * PAGE);
		break;
	}
	case 2:
		/* Not unmapped: other mappings would come to lie there. */
		if (rnd() % 2) { mmap(holey + i * PAGE, n * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0); memset(is_hole + i, 1, n); }
		else {
			int flags = MAP_PRIVATE | MAP_FIXED | (rnd() % 4 ? MAP_ANONYMOUS : 0);
			mmap(holey + i * PAGE, n * PAGE, PROT_READ | PROT_WRITE, flags, flags & MAP_ANONYMOUS ? -1 : file, 0);
			memset(is_hole + i, 0, n);
		}
		for (k = 0; k < ODD; k++) if (!is_hole[k] && rnd() % 8 == 0) touch(holey + k * PAGE);
		break;
	case 3:
		if (rnd() % 2) { if (!mlock(split + i * PAGE, n * PAGE)) munlock(split + i * PAGE, n * PAGE); }
		else madvise(calm + i * PAGE, n * PAGE, 23 /* MADV_POPULATE_WRITE */);
		if (sysv) touch(sysv + rnd() % 16 * PAGE);
		break;
	}
}

static void operate_on_huge(struct region *r)
{
	size_t n = r->pages / (HUGE / PAGE);
	char *page = r->at + rnd() % n * HUGE;
	switch (rnd() % 10) {
	case 0: munmap(r->at, n * HUGE); memset(r, 0, sizeof *r); huge_regions--; break;
	case 1: case 2: madvise(page, HUGE, MADV_DONTNEED); if (rnd() % 2) touch(page + rnd() % 512 * PAGE); break;
	case 3: { /* moved to where there is room for it */
		char *room = mmap(0, (n + 1) * HUGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		char *to = (char *)(((uintptr_t)room + HUGE - 1) & ~(HUGE - 1));
		munmap(room, to - room), munmap(to + n * HUGE, room + HUGE - to);
		char *q = mremap(r->at, n * HUGE, n * HUGE, MREMAP_MAYMOVE | MREMAP_FIXED, to);
		if (q != MAP_FAILED) { r->at = q; break; }
		/* Of several mappings some may have been moved before one could not be. */
		munmap(to, n * HUGE), munmap(r->at, n * HUGE);
		memset(r, 0, sizeof *r), huge_regions--;
		break;
	}
	case 4: if (n > 1) { munmap(r->at + HUGE, HUGE); r->pages /= 2; } break;
	case 5: { /* another one in its place, or a part of it */
		int flags = MAP_PRIVATE | MAP_FIXED | MAP_HUGETLB | (rnd() % 3 ? MAP_ANONYMOUS : 0);
		mmap(page, HUGE, r->prot, flags, flags & MAP_ANONYMOUS ? -1 : huge_fd, 0);
		if (rnd() % 2) touch(page);
		break;
	}
	case 6: { /* a child that reads, and writes if a copy can be had */
		pid_t pid = fork();
		if (!pid) { touch(page); _exit(0); }
		waitpid(pid, 0, 0);
		touch(page + PAGE);
		break;
	}
	case 7: madvise(page, HUGE, 22 + rnd() % 2 /* MADV_POPULATE_READ, _WRITE */); break;
	default: touch(page + rnd() % 512 * PAGE); break;
	}
}

/* What the tree shares, and what each has of a file that all change. */
static void operate_on_shared_huge(void)
{
	size_t at = rnd() % FEW * HUGE;
	char *p = (rnd() % 2 ? huge_shared : huge_common) + at;
	switch (rnd() % 8) {
	case 0: madvise(p, HUGE, MADV_REMOVE); break;
	case 1: fallocate(huge_fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, at, HUGE); break;
	case 2: fallocate(huge_fd, 0, at, HUGE); break;
	case 3: madvise(huge_private + at, HUGE, MADV_DONTNEED); break;
	case 4: touch(huge_private + at + rnd() % 512 * PAGE); break;
	default: touch(p + rnd() % 512 * PAGE); break;
	}
}

static void operate(void)
{
	if (huge_fd >= 0 && rnd() % 4 == 0) { operate_on_shared_huge(); return; }
	if (rnd() % 6 == 0) { operate_oddly(); return; }
	struct region *r = &regions[rnd() % REGIONS];
	if (!r->at) { new_region(r); return; }
	if (r->huge) { operate_on_huge(r); return; }
	size_t i = rnd() % r->pages, n = 1 + rnd() % (r->pages - i);
	char *p = r->at + i * PAGE;
	switch (rnd() % 24) {
	case 0: case 1: case 2: case 3: case 4: case 5:
		if (r->prot & PROT_WRITE) for (size_t k = 0; k < n && k < 8; k++) touch(p + k * PAGE + 8 * (rnd() % 512));
		break;
	case 6: /* the whole of it */
		munmap(r->at, r->pages * PAGE);
		r->at = 0;
		break;
	case 7: /* another mapping at the same place */
		mmap(r->at, r->pages * PAGE, r->prot = PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
		if (rnd() % 2) touch(p);
		break;
	case 8: { /* moved, on top of a reserved place */
		char *to = mmap(0, r->pages * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		char *q = mremap(r->at, r->pages * PAGE, r->pages * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, to);
		if (q != MAP_FAILED) r->at = q;
		break;
	}
	case 9: { /* grown or moved as the kernel likes */
		size_t more = 1 + rnd() % 16;
		char *q = mremap(r->at, r->pages * PAGE, (r->pages + more) * PAGE, MREMAP_MAYMOVE);
		if (q != MAP_FAILED) { r->at = q; r->pages += more; if (rnd() % 2 && (r->prot & PROT_WRITE)) touch(q + (r->pages - 1) * PAGE); }
		break;
	}
	case 10: /* shrunk */
		if (r->pages > 1) { munmap(r->at + (r->pages - 1) * PAGE, PAGE); r->pages--; }
		break;
	case 11: case 12: madvise(p, n * PAGE, MADV_DONTNEED); if (rnd() % 2 && (r->prot & PROT_WRITE)) touch(p); break;
	case 13: madvise(p, n * PAGE, MADV_FREE); break;
	case 14: /* one protection for all of it, so that writes know */
		r->prot = rnd() % 4 ? PROT_READ | PROT_WRITE : PROT_READ;
		mprotect(r->at, r->pages * PAGE, r->prot);
		break;
	case 15: { /* written by the kernel */
		if (!(r->prot & PROT_WRITE)) break;
		struct iovec v = { p, (n < 4 ? n : 4) * PAGE };
		if (preadv(rnd() % 2 ? file : zero, &v, 1, 0) < 0) break;
		break;
	}
	case 16: { /* written by another process's call */
		if (!(r->prot & PROT_WRITE)) break;
		struct iovec from = { page_of_noise, PAGE }, to = { p, PAGE };
		memset(page_of_noise, rnd(), PAGE);
		process_vm_writev(getpid(), &from, 1, &to, 1, 0);
		break;
	}
	case 17: { char *b = sbrk(0); if (rnd() % 3) { if (sbrk((1 + rnd() % 8) * PAGE) != (void *)-1) touch((char *)(((uintptr_t)b + 15) & ~15ul)); } else sbrk(-(long)PAGE); break; }
	case 18: deep(rnd() % 200); break;
	case 19: { volatile char c = *(volatile char *)p; (void)c; break; }
	case 20: { /* a copy that is moved away from its page tables' place, which stays */
		char *q = mremap(r->at, r->pages * PAGE, r->pages * PAGE, MREMAP_MAYMOVE | MREMAP_DONTUNMAP, 0);
		if (q != MAP_FAILED) { munmap(r->at, r->pages * PAGE); r->at = q; }
		break;
	}
	case 21: { /* a child that writes and ends: pages shared for a while */
		pid_t pid = fork();
		if (!pid) { if (r->prot & PROT_WRITE) touch(p); _exit(0); }
		if (r->prot & PROT_WRITE) touch(p);
		waitpid(pid, 0, 0);
		break;
	}
	case 22: madvise(r->at, r->pages * PAGE, rnd() % 3 ? rnd() % 2 ? MADV_HUGEPAGE : MADV_NOHUGEPAGE : 25 /* MADV_COLLAPSE */); break;
	case 23: /* zeros written, zeros read */
		if (r->prot & PROT_WRITE) memset(p, 0, PAGE);
		break;
	}
}

static int children[4];

static void reap(int slot) { kill(children[slot], SIGKILL); waitpid(children[slot], 0, 0); children[slot] = 0; }

/* argv: LOG SEED [HOW]: "huge", or a number, which tells a child that has called exec. */
int main(int argc, char **argv)
{
	depth = argc > 3 ? atoi(argv[3]) : 0;
	if (depth) {
		sigset_t set;
		sigemptyset(&set);
		sigaddset(&set, SIGUSR1);
		sigprocmask(SIG_BLOCK, &set, 0);
	} else {
		begin(argc, argv);
	}
	seed = (argc > 2 ? strtoull(argv[2], 0, 10) : 1) * 0x9e3779b97f4a7c15ull + 1;
	file = open("noise", O_RDWR | O_CREAT, 0600);
	zero = open("/dev/zero", O_RDONLY);
	NEED(file >= 0 && zero >= 0 && !ftruncate(file, 64 << 20));
	sigset_t two;
	sigemptyset(&two);
	sigaddset(&two, SIGUSR2);
	sigprocmask(SIG_BLOCK, &two, 0);
	page_of_noise = map(PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE);
	/* Where little happens: most of it is in the parent, and some is not. */
	calm = map(CALM * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE);
	fill(calm, CALM * PAGE, seed);
	if (!depth) for (int i = 0; i < 24; i++) { memset(page_of_noise, i + 1, PAGE); NEED(pwrite(file, page_of_noise, PAGE, i * PAGE) == PAGE); }
	/* Shared by the tree, but for who calls exec. It is written, and given back, by all of them. */
	common = map(COMMON * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED);
	guarded = map(ODD * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE);
	split = map(ODD * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE);
	holey = map(ODD * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE);
	if (argc > 3 && !depth) {
		huge_fd = memfd_create("huge", MFD_HUGETLB);
		NEED(huge_fd >= 0 && !ftruncate(huge_fd, FEW * HUGE));
		huge_shared = mmap(0, FEW * HUGE, PROT_READ | PROT_WRITE, MAP_SHARED, huge_fd, 0);
		huge_private = mmap(0, FEW * HUGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, huge_fd, 0);
		huge_common = mmap(0, FEW * HUGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_HUGETLB, -1, 0);
		NEED(huge_shared != MAP_FAILED && huge_private != MAP_FAILED && huge_common != MAP_FAILED);
		say("needs %d", MOST_HUGE);
	}
	if (!depth) {
		int id = shmget(IPC_PRIVATE, 16 * PAGE, IPC_CREAT | 0600);
		NEED(id >= 0);
		sysv = shmat(id, 0, 0);
		NEED(sysv != (void *)-1 && !shmctl(id, IPC_RMID, 0));
		ready();
	}
	for (int round = 1;; round++) {
		sigset_t set;
		sigemptyset(&set);
		sigaddset(&set, SIGUSR1);
		siginfo_t info;
		while (sigwaitinfo(&set, &info) < 0) ;
		for (int i = 0; i < ROUND; i++) operate();
		for (int i = 0; i < 20; i++) touch(calm + rnd() % CALM * PAGE);
		for (int i = 0; i < 10; i++) touch(common + rnd() % COMMON * PAGE);
		madvise(common + rnd() % COMMON * PAGE, PAGE, rnd() % 2 ? MADV_REMOVE : MADV_DONTNEED);
		if (depth) { kill(getppid(), SIGUSR2); continue; }
		/* Children live for some rounds, each doing the same: born by fork, some call exec. */
		int slot = rnd() % 4;
		if (children[slot] && rnd() % 2) reap(slot);
		if (!children[slot]) {
			int exec = rnd() % 3 == 0;
			uint64_t s = rnd();
			pid_t pid = fork();
			if (!pid) {
				depth = 1;
				seed = s | 1;
				memset(children, 0, sizeof children);
				if (exec) { char text[32]; sprintf(text, "%lu", s); execl("/proc/self/exe", argv[0], argv[1], text, "1", NULL); _exit(98); }
				kill(getppid(), SIGUSR2);
				continue;
			}
			children[slot] = pid;
			if (!exec) while (sigwaitinfo(&two, &info) < 0) ;
		}
		for (int i = 0; i < 4; i++) if (children[i]) {
			kill(children[i], SIGUSR1);
			while (sigwaitinfo(&two, &info) < 0) ;
		}
		say("round %d", round);
	}
}
