/* Shared memory of huge pages: memfds, mapped and not, shared by two processes, mapped as private memory, sealed; anonymous;
 * of System V. Unless it is told to have such pages, ordinary ones stand for them. */
#include "workload.h"
#include "huge.h"

#define ALL_SEALS (F_SEAL_WRITE | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)

static int memfd(const char *name, size_t size)
{
	int fd = memfd_create(name, MFD_ALLOW_SEALING | (huge ? MFD_HUGETLB | 21u << 26 : 0));
	NEED(fd >= 0 && !ftruncate(fd, size));
	return fd;
}

static char *map_fd(int fd, size_t size, int flags)
{
	char *at = mmap(0, size, PROT_READ | PROT_WRITE, flags, fd, 0);
	NEED(at != MAP_FAILED);
	return at;
}

static long blocks(int fd)
{
	struct stat st;
	NEED(!fstat(fd, &st));
	return st.st_blocks;
}

int main(int argc, char **argv)
{
	begin(argc, argv);
	may_have_huge_pages(argc, argv);
	int open_fd = memfd("open", 4 * HUGE), alone = memfd("nowhere mapped", 64 * HUGE), sealed = memfd("sealed", 2 * HUGE), empty = memfd("", 0);
	char *a = map_fd(open_fd, 4 * HUGE, MAP_SHARED), *p = map_fd(open_fd, 4 * HUGE, MAP_PRIVATE | MAP_NORESERVE);
	fill(a + HUGE, HUGE, 1);
	*(volatile char *)(a + 3 * HUGE) = 0; /* there, and zeros */
	fill(p + 2 * HUGE, HUGE, 2);
	char *m = map_fd(alone, 64 * HUGE, MAP_SHARED | MAP_NORESERVE);
	fill(m + 50 * HUGE, HUGE, 3);
	NEED(!munmap(m, 64 * HUGE));
	m = map_fd(sealed, 2 * HUGE, MAP_SHARED);
	fill(m + HUGE, HUGE, 4);
	NEED(!munmap(m, 2 * HUGE) && !fcntl(sealed, F_ADD_SEALS, ALL_SEALS) && !fcntl(alone, F_ADD_SEALS, F_SEAL_SHRINK));
	NEED(lseek(open_fd, HUGE + 4096, SEEK_SET) == HUGE + 4096);
	char *anon = mmap(0, 2 * HUGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | (huge ? MAP_HUGETLB | 21 << 26 : 0), -1, 0);
	NEED(anon != MAP_FAILED);
	fill(anon + HUGE, HUGE, 5);
	int id = shmget(IPC_PRIVATE, HUGE + 5000, IPC_CREAT | 0600 | (huge ? SHM_HUGETLB | 21 << 26 : 0));
	NEED(id >= 0);
	char *v = shmat(id, 0, 0);
	NEED(v != (void *)-1);
	fill(v + HUGE, 4096, 6);
	/* Of huge pages all of the last one can be used. */
	size_t end = huge ? 2 * HUGE - 4096 : HUGE + 4096;
	fill(v + end, 4096, 7);
	NEED(!shmctl(id, IPC_RMID, 0));
	/* No gigantic pages are needed to map such a file. */
	char *giant = 0;
	int giant_fd = huge ? memfd_create("giant", MFD_HUGETLB | 30u << 26) : -1;
	if (giant_fd >= 0) { NEED(!ftruncate(giant_fd, 1ul << 30)); giant = map_fd(giant_fd, 1ul << 30, MAP_SHARED | MAP_NORESERVE); }
	int up[2], down[2];
	NEED(!pipe(up) && !pipe(down));
	pid_t child = fork();
	NEED(child >= 0);
	char w;
	if (!child) {
		NEED(read(down[0], &w, 1) == 1);
		CHECK(a[0] == 11 && anon[0] == 12 && v[0] == 13, "what the parent wrote: %d %d %d", a[0], anon[0], v[0]);
		CHECK(filled(p + 2 * HUGE, HUGE, 2) && p[0] == 11, "the child's private mapping");
		a[4096] = 21, anon[4096] = 22, v[4096] = 23;
		NEED(write(up[1], "w", 1) == 1);
		for (;;) pause();
	}
	long size = page_kib(a), had[] = { blocks(open_fd), blocks(alone), blocks(sealed), blocks(empty) };
	NEED(!huge || size == 2048);
	NEED(!giant || page_kib(giant) == 1 << 20);
	ready();
	wait_asked();
	BREAK("contents") a[HUGE + 5000] ^= 1;
	BREAK("private") p[2 * HUGE + 5000] ^= 1;
	BREAK("alone") *(map_fd(alone, 64 * HUGE, MAP_SHARED | MAP_NORESERVE) + 50 * HUGE) ^= 1;
	BREAK("holes") fill(map_fd(alone, 64 * HUGE, MAP_SHARED | MAP_NORESERVE) + 2 * HUGE, 4096, 1);
	BREAK("seals") NEED(!fcntl(alone, F_ADD_SEALS, F_SEAL_GROW));
	BREAK("position") NEED(!lseek(open_fd, 0, SEEK_SET));
	BREAK("anonymous") anon[HUGE] ^= 1;
	BREAK("System V") v[end] ^= 1;
	BREAK("size") size++;
	BREAK("name") { int other = memfd("other", 0); NEED(dup2(other, empty) == empty); }
	BREAK("reservation") p = map_fd(open_fd, 4 * HUGE, MAP_PRIVATE);
	BREAK("child") kill(child, SIGKILL);
	CHECK(page_kib(a) == size && page_kib(p) == size && page_kib(anon) == size && page_kib(v) == size, "size of pages, %ld", page_kib(a));
	CHECK(!giant || page_kib(giant) == 1 << 20, "size of gigantic pages, %ld", page_kib(giant));
	CHECK(has_flag(p, " nr") && !has_flag(a, " nr"), "reservations");
	CHECK(blocks(open_fd) == had[0] && blocks(alone) == had[1] && blocks(sealed) <= had[2] && blocks(empty) == had[3],
		"holes: %ld %ld %ld, were %ld %ld %ld", blocks(open_fd), blocks(alone), blocks(sealed), had[0], had[1], had[2]);
	char *b = malloc(HUGE), link[100] = "";
	CHECK(lseek(open_fd, 0, SEEK_CUR) == HUGE + 4096 && read(open_fd, b, 4096) == 4096 && !memcmp(b, a + HUGE + 4096, 4096), "contents at the position");
	CHECK(is_zero(a, HUGE) && filled(a + HUGE, HUGE, 1) && is_zero(a + 2 * HUGE, 2 * HUGE), "mapped contents");
	CHECK(filled(p + HUGE, HUGE, 1) && filled(p + 2 * HUGE, HUGE, 2), "private contents");
	CHECK(pread(alone, b, HUGE, 50 * HUGE) == HUGE && filled(b, HUGE, 3), "contents that are mapped nowhere");
	CHECK(pread(sealed, b, HUGE, HUGE) == HUGE && filled(b, HUGE, 4), "sealed contents");
	CHECK(fcntl(sealed, F_GET_SEALS) == ALL_SEALS && fcntl(alone, F_GET_SEALS) == F_SEAL_SHRINK && fcntl(open_fd, F_GET_SEALS) == 0, "seals");
	char place[40];
	snprintf(place, sizeof place, "/proc/self/fd/%d", empty);
	CHECK(readlink(place, link, sizeof link - 1) > 0 && !strcmp(link, "/memfd: (deleted)"), "name %s", link);
	CHECK(is_zero(anon, HUGE) && filled(anon + HUGE, HUGE, 5), "anonymous contents");
	CHECK(is_zero(v, HUGE) && filled(v + HUGE, 4096, 6) && filled(v + end, 4096, 7), "System V contents");
	a[0] = 11, anon[0] = 12, v[0] = 13;
	CHECK(p[0] == 11, "what is not written yet of the private mapping is the file's");
	CHECK(write(down[1], "g", 1) == 1 && SOON(a[4096] == 21) && read(up[0], &w, 1) == 1 && anon[4096] == 22 && v[4096] == 23, "what the child wrote");
	pass();
}
