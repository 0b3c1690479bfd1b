/* Regular files, directories and devices: offsets, flags, who shares an open file with whom, owners of SIGIO. */
#include "workload.h"
#include <dirent.h>

static int flags_of(int fd) { return fcntl(fd, F_GETFL); }
static long pos_of(int fd) { return lseek(fd, 0, SEEK_CUR); }

int main(int argc, char **argv)
{
	begin(argc, argv);
	char text[4096], b[64];
	for (size_t i = 0; i < sizeof text; i++) text[i] = 'a' + i % 26;
	int rw = open("rw", O_RDWR | O_CREAT | O_TRUNC, 0640);
	NEED(write(rw, text, sizeof text) == sizeof text && lseek(rw, 1234, SEEK_SET) == 1234);
	int ro = open("rw", O_RDONLY | O_CLOEXEC | O_NOATIME | O_NONBLOCK), wo = open("rw", O_WRONLY | O_DSYNC);
	NEED(lseek(ro, 77, SEEK_SET) == 77 && lseek(wo, 4096, SEEK_SET) == 4096);
	int app = open("append", O_WRONLY | O_CREAT | O_TRUNC | O_APPEND, 0600);
	NEED(write(app, "start", 5) == 5);
	int twin = dup(rw), high = fcntl(rw, F_DUPFD_CLOEXEC, 900);
	int dir = open(".", O_RDONLY | O_DIRECTORY), path = open("rw", O_PATH), null = open("/dev/null", O_RDWR), zero = open("/dev/zero", O_RDONLY), full = open("/dev/full", O_WRONLY);
	int random_fd = open("/dev/urandom", O_RDONLY);
	NEED(!mkdir("strange \n name (deleted)", 0700) || errno == EEXIST);
	int odd = open("strange \n name (deleted)/\xff\xfe", O_RDWR | O_CREAT, 0600);
	int sparse = open("sparse", O_RDWR | O_CREAT | O_TRUNC, 0600);
	NEED(!ftruncate(sparse, 5ll << 32) && lseek(sparse, 4ll << 32, SEEK_SET) > 0);
	NEED(rw >= 0 && ro >= 0 && wo >= 0 && app >= 0 && twin >= 0 && high == 900 && dir >= 0 && path >= 0 && null >= 0 && zero >= 0 && full >= 0 && random_fd >= 0 && odd >= 0 && sparse >= 0);
	for (int i = 0; i < 50; i++) { snprintf(b, sizeof b, "entry-%02d", i); close(open(b, O_CREAT | O_RDWR, 0600)); }
	NEED(!fcntl(rw, F_SETOWN, getpid()) && !fcntl(rw, F_SETSIG, SIGRTMIN + 4));
	struct f_owner_ex own = { F_OWNER_TID, getpid() };
	NEED(!fcntl(null, F_SETOWN_EX, &own));
	int pipe_fds[2], child_says[2];
	NEED(!pipe(pipe_fds) && !pipe(child_says));
	pid_t child = fork();
	if (!child) { /* shares rw's offset: moves it when asked, and says where it found it */
		char c;
		long at;
		close(pipe_fds[1]);
		close(wo);
		while (read(pipe_fds[0], &c, 1) == 1) {
			at = pos_of(rw);
			NEED(lseek(rw, 2000, SEEK_SET) == 2000 && write(child_says[1], &at, sizeof at) == sizeof at);
		}
		_exit(0);
	}
	ready();
	wait_asked();
	BREAK("offset") NEED(lseek(rw, 1, SEEK_SET) == 1);
	BREAK("flags") fcntl(ro, F_SETFL, O_NONBLOCK);
	BREAK("append") fcntl(app, F_SETFL, 0);
	BREAK("shared") { int other = open("rw", O_RDWR); lseek(other, 1234, SEEK_SET); dup2(other, twin); }
	BREAK("cloexec") fcntl(ro, F_SETFD, 0);
	BREAK("owner") fcntl(rw, F_SETOWN, 0);
	BREAK("signal") fcntl(rw, F_SETSIG, 0);
	BREAK("closed") close(odd);
	BREAK("extra") NEED(dup2(null, 901) == 901);
	BREAK("path") NEED(dup2(ro, path) == path);
	CHECK(pos_of(rw) == 1234 && pos_of(ro) == 77 && pos_of(wo) == 4096, "offsets %ld %ld %ld", pos_of(rw), pos_of(ro), pos_of(wo));
	CHECK(pos_of(sparse) == 4ll << 32, "an offset beyond 4 GiB");
	CHECK((flags_of(rw) & O_ACCMODE) == O_RDWR && (flags_of(wo) & (O_ACCMODE | O_DSYNC)) == (O_WRONLY | O_DSYNC), "access modes");
	CHECK((flags_of(ro) & (O_ACCMODE | O_NONBLOCK | O_NOATIME)) == (O_RDONLY | O_NONBLOCK | O_NOATIME), "flags %#o", flags_of(ro));
	CHECK(fcntl(ro, F_GETFD) == FD_CLOEXEC && fcntl(rw, F_GETFD) == 0 && fcntl(high, F_GETFD) == FD_CLOEXEC, "close-on-exec");
	CHECK(flags_of(app) & O_APPEND, "O_APPEND");
	struct stat st;
	CHECK(!fstat(app, &st) && lseek(app, 0, SEEK_SET) == 0 && write(app, "more", 4) == 4 && pos_of(app) == st.st_size + 4, "appending appends");
	CHECK(lseek(twin, 1500, SEEK_SET) == 1500 && pos_of(rw) == 1500 && pos_of(high) == 1500, "duplicates share the offset");
	long at = 0;
	CHECK(write(pipe_fds[1], "?", 1) == 1 && read(child_says[0], &at, sizeof at) == sizeof at && at == 1500, "the child shares the offset (it saw %ld)", at);
	CHECK(pos_of(rw) == 2000, "the parent sees the child's seek");
	CHECK(pread(rw, b, 26, 26) == 26 && !memcmp(b, text, 26), "contents");
	CHECK(flags_of(path) & O_PATH && read(path, b, 1) < 0 && errno == EBADF, "O_PATH");
	CHECK(fcntl(rw, F_GETOWN) == getpid() && fcntl(rw, F_GETSIG) == SIGRTMIN + 4, "F_SETOWN, F_SETSIG (%d, %d)", fcntl(rw, F_GETOWN), fcntl(rw, F_GETSIG));
	CHECK(!fcntl(null, F_GETOWN_EX, &own) && own.type == F_OWNER_TID && own.pid == getpid(), "F_SETOWN_EX");
	CHECK(read(null, b, 1) == 0 && read(zero, b, 1) == 1 && !b[0] && write(full, "x", 1) < 0 && errno == ENOSPC && read(random_fd, b, 8) == 8, "devices");
	CHECK(write(odd, "odd", 3) == 3, "a file with a strange name");
	CHECK(openat(dir, "rw", O_RDONLY) >= 0, "directory");
	DIR *d = fdopendir(dir);
	int entries = 0;
	for (struct dirent *e; (e = readdir(d));) entries += !strncmp(e->d_name, "entry-", 6);
	CHECK(entries == 50, "%d of 50 entries", entries);
	int open_fds = 0;
	for (int fd = 0; fd < 1000; fd++) open_fds += fcntl(fd, F_GETFD) >= 0 && fd < 905;
	CHECK(fcntl(901, F_GETFD) < 0 && fcntl(899, F_GETFD) < 0, "descriptors that were never opened");
	CHECK(open("next", O_RDWR | O_CREAT, 0600) < 40, "low numbers are free");
	pass();
}
