/* Files on a file system of huge pages, in directory argv[3]: mapped, open, deleted. Without that they are ordinary files. */
#include "workload.h"
#include "huge.h"

static const char *dir = ".";

static int make(const char *name, int flags)
{
	char path[500];
	snprintf(path, sizeof path, "%s/%s", dir, name);
	int fd = open(path, flags | O_RDWR, 0640);
	NEED(fd >= 0 && !ftruncate(fd, 4 * HUGE));
	return fd;
}

static char *map_fd(int fd, int flags)
{
	char *at = mmap(0, 4 * HUGE, PROT_READ | PROT_WRITE, flags, fd, 0);
	NEED(at != MAP_FAILED);
	return at;
}

static long blocks(int fd)
{
	struct stat st;
	NEED(!fstat(fd, &st) && st.st_size == 4 * HUGE);
	return st.st_blocks;
}

int main(int argc, char **argv)
{
	begin(argc, argv);
	if (argc > 3) dir = argv[3];
	int named = make("named", O_CREAT | O_TRUNC), gone = make("gone", O_CREAT | O_EXCL), never = make("", O_TMPFILE);
	char *a = map_fd(named, MAP_SHARED), *p = map_fd(named, MAP_PRIVATE), *g = map_fd(gone, MAP_SHARED), *n = map_fd(never, MAP_SHARED);
	fill(a + HUGE, HUGE, 1);
	fill(p + 2 * HUGE, 4096, 2);
	fill(g + 3 * HUGE, HUGE, 3);
	for (int i = 0; i < 4; i++) fill(n + i * HUGE, 4096, 4 + i);
	NEED(!munmap(n, 4 * HUGE) && lseek(named, HUGE, SEEK_SET) == HUGE);
	char path[500];
	snprintf(path, sizeof path, "%s/gone", dir);
	NEED(!unlink(path));
	long size = page_kib(a), had[] = { blocks(gone), blocks(never) };
	NEED(argc <= 3 || size == 2048);
	ready();
	wait_asked();
	BREAK("contents") a[HUGE] ^= 1;
	BREAK("private") p[2 * HUGE] ^= 1;
	BREAK("deleted") g[3 * HUGE] ^= 1;
	BREAK("hole") g[0] = 1;
	BREAK("unnamed") NEED(pwrite(never, "x", 1, 0) == 1);
	BREAK("position") NEED(!lseek(named, 0, SEEK_SET));
	BREAK("size") size++;
	CHECK(page_kib(a) == size && page_kib(p) == size && page_kib(g) == size, "size of pages, %ld", page_kib(a));
	char *b = malloc(HUGE);
	CHECK(lseek(named, 0, SEEK_CUR) == HUGE && read(named, b, HUGE) == HUGE && filled(b, HUGE, 1), "contents at the position");
	CHECK(is_zero(a, HUGE) && filled(a + HUGE, HUGE, 1) && is_zero(a + 2 * HUGE, HUGE), "mapped contents");
	CHECK(filled(p + HUGE, HUGE, 1) && filled(p + 2 * HUGE, 4096, 2), "private contents");
	CHECK(filled(g + 3 * HUGE, HUGE, 3) && is_zero(g, HUGE), "contents of the deleted file");
	for (int i = 0; i < 4; i++) CHECK(pread(never, b, 4096, i * HUGE) == 4096 && filled(b, 4096, 4 + i), "contents of the file without a name, %d", i);
	CHECK(blocks(never) <= had[1] + 64, "pages of the file without a name");
	a[0] = 5;
	CHECK(p[0] == 5, "one file");
	a[0] = 0;
	CHECK(blocks(gone) <= had[0] + (long)HUGE / 512, "holes of the deleted file: %ld, had %ld", blocks(gone), had[0]);
	pass();
}
