/* Files whose name is gone: contents only reachable through descriptors and mappings; one that still has another
 * link; a deleted directory's file; a name that was taken by another file since. */
#include "workload.h"

static int make(const char *name, const char *contents)
{
	int fd = open(name, O_RDWR | O_CREAT | O_TRUNC, 0604);
	NEED(fd >= 0 && write(fd, contents, strlen(contents)) == (ssize_t)strlen(contents));
	return fd;
}

static int holds(int fd, const char *contents)
{
	char b[128] = "";
	return pread(fd, b, sizeof b - 1, 0) == (ssize_t)strlen(contents) && !strcmp(b, contents);
}

int main(int argc, char **argv)
{
	begin(argc, argv);
	int gone = make("gone", "gone contents"), gone_ro = open("gone", O_RDONLY), gone_again = open("gone", O_RDWR);
	NEED(lseek(gone_again, 5, SEEK_SET) == 5 && !unlink("gone"));
	int linked = make("first name", "linked contents");
	NEED((!link("first name", "second name") || errno == EEXIST) && !unlink("first name"));
	NEED(!mkdir("lost", 0700));
	int lost = make("lost/inside", "lost contents");
	NEED(!unlink("lost/inside") && !rmdir("lost"));
	int replaced = make("replaced", "old contents");
	NEED(!unlink("replaced"));
	close(make("replaced", "NEW contents of another file"));
	int mapped = make("mapped", "x");
	NEED(!ftruncate(mapped, 8 * PAGE));
	char *m = mmap(0, 8 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, mapped, 0), *p = mmap(0, 8 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, mapped, 0);
	NEED(m != MAP_FAILED && p != MAP_FAILED && !unlink("mapped") && !close(mapped));
	fill(m, 4 * PAGE, 51);
	memset(p + 5 * PAGE, 'P', PAGE);
	int big = make("big", "");
	static char block[1 << 16]; /* small enough for the default limit on deleted files */
	fill(block, sizeof block, 52);
	for (int i = 0; i < 8; i++) NEED(pwrite(big, block, sizeof block, (off_t)i << 22) == sizeof block);
	NEED(!unlink("big"));
	int tmp = open(".", O_TMPFILE | O_RDWR, 0600);
	NEED(tmp < 0 || write(tmp, "never named", 11) == 11);
	ready();
	wait_asked();
	BREAK("contents") NEED(pwrite(gone, "X", 1, 0) == 1);
	BREAK("apart") { int fd = make("other", "gone contents"); unlink("other"); dup2(fd, gone_ro); }
	BREAK("linked") NEED(dup2(gone, linked) == linked);
	BREAK("replaced") { int fd = open("replaced", O_RDWR); dup2(fd, replaced); }
	BREAK("mapped") m[2 * PAGE] ^= 1;
	BREAK("private") p[5 * PAGE] ^= 1;
	BREAK("big") NEED(pwrite(big, "X", 1, 7l << 22) == 1);
	BREAK("named") close(make("gone", "back"));
	struct stat st, named;
	CHECK(holds(gone, "gone contents") && holds(gone_ro, "gone contents"), "deleted file");
	CHECK(lseek(gone_again, 0, SEEK_CUR) == 5, "its offset");
	CHECK(pwrite(gone_again, "GONE", 4, 0) == 4 && holds(gone, "GONE contents") && holds(gone_ro, "GONE contents"), "three descriptors, one deleted file");
	CHECK(pwrite(gone_again, "gone", 4, 0) == 4, "back");
	CHECK(!fstat(gone, &st) && st.st_nlink == 0 && (st.st_mode & 0777) == 0604, "links %ld mode %o", (long)st.st_nlink, st.st_mode);
	CHECK(access("gone", F_OK) < 0, "the name is gone");
	CHECK(holds(linked, "linked contents") && !fstat(linked, &st) && !stat("second name", &named) && st.st_ino == named.st_ino, "the file with another link is that file");
	CHECK(access("first name", F_OK) < 0, "its first name is gone");
	CHECK(holds(lost, "lost contents"), "a file in a directory that is gone");
	CHECK(holds(replaced, "old contents"), "a file whose name another one took");
	int fd = open("replaced", O_RDONLY);
	CHECK(holds(fd, "NEW contents of another file"), "the other file is as it was");
	CHECK(filled(m, 4 * PAGE, 51) && p[5 * PAGE] == 'P' && p[6 * PAGE - 1] == 'P', "mappings of a deleted file");
	m[7 * PAGE] = 'Q';
	CHECK(p[7 * PAGE] == 'Q', "both mappings are of one file");
	char *back = malloc(sizeof block);
	for (int i = 0; i < 8; i++) CHECK(pread(big, back, sizeof block, (off_t)i << 22) == sizeof block && !memcmp(back, block, sizeof block), "block %d of a big deleted file", i);
	CHECK(!fstat(big, &st) && st.st_blocks < 8 * 128 + 512, "a sparse file stays sparse (%ld blocks)", (long)st.st_blocks);
	CHECK(tmp < 0 || holds(tmp, "never named"), "O_TMPFILE");
	pass();
}
