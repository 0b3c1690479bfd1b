/* memfds: contents, offset, seals, name; mapped and shared with a child; a sealed one; one of huge sparse size. */
#include "workload.h"

static int sealed(int fd) { return fcntl(fd, F_GET_SEALS); }
int main(int argc, char **argv)
{
	begin(argc, argv);
	char b[64], link[128];
	int plain = memfd_create("plain name", MFD_ALLOW_SEALING), closed = memfd_create("sealed", MFD_ALLOW_SEALING | MFD_CLOEXEC), none = memfd_create("", 0);
	NEED(plain >= 0 && closed >= 0 && none >= 0);
	NEED(write(plain, "memfd contents", 14) == 14 && lseek(plain, 6, SEEK_SET) == 6);
	NEED(write(closed, "for ever", 8) == 8 && !fcntl(closed, F_ADD_SEALS, F_SEAL_WRITE | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL));
	NEED(!ftruncate(none, 1l << 32) && pwrite(none, "far away", 8, 3l << 30) == 8);
	NEED(!ftruncate(plain, 16 * PAGE));
	char *m = mmap(0, 16 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, plain, 0);
	NEED(m != MAP_FAILED);
	fill(m + 8 * PAGE, PAGE, 71);
	pid_t child = fork();
	if (!child) for (;;) { usleep(1000); if (m[PAGE] == '?') { NEED(pwrite(plain, "child", 5, 2 * PAGE) == 5); m[PAGE] = '!'; } }
	struct stat st;
	long blocks = !fstat(none, &st) ? st.st_blocks : 0;
	ready();
	wait_asked();
	BREAK("contents") m[8 * PAGE] ^= 1;
	BREAK("seals") NEED(!fcntl(plain, F_ADD_SEALS, F_SEAL_SHRINK));
	BREAK("offset") NEED(!lseek(plain, 0, SEEK_SET));
	BREAK("size") NEED(!ftruncate(none, 1l << 31));
	BREAK("unsealed") { closed = memfd_create("sealed", MFD_ALLOW_SEALING); NEED(write(closed, "for ever", 8) == 8); }
	BREAK("child") kill(child, SIGKILL);
	CHECK(lseek(plain, 0, SEEK_CUR) == 6 && read(plain, b, 8) == 8 && !memcmp(b, "contents", 8), "contents at the offset");
	CHECK(filled(m + 8 * PAGE, PAGE, 71), "mapped contents");
	CHECK(sealed(plain) == 0 && sealed(closed) == (F_SEAL_WRITE | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) && sealed(none) == F_SEAL_SEAL, "seals %d %d %d", sealed(plain), sealed(closed), sealed(none));
	CHECK(pread(closed, b, 64, 0) == 8 && !memcmp(b, "for ever", 8) && write(closed, "x", 1) < 0, "sealed memfd");
	CHECK(!fstat(none, &st) && st.st_size == 1l << 32 && st.st_blocks <= blocks + 64, "size %ld, %ld blocks", (long)st.st_size, (long)st.st_blocks);
	CHECK(pread(none, b, 8, 3l << 30) == 8 && !memcmp(b, "far away", 8), "contents far away");
	snprintf(b, sizeof b, "/proc/self/fd/%d", plain);
	ssize_t n = readlink(b, link, sizeof link - 1);
	CHECK(n > 0 && (link[n] = 0, !strcmp(link, "/memfd:plain name (deleted)")), "name %s", link);
	m[PAGE] = '?';
	CHECK(SOON(*(volatile char *)(m + PAGE) == '!') && !memcmp(m + 2 * PAGE, "child", 5), "shared with the child");
	pass();
}
