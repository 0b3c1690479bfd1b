/* inotify: watches on directories and files keep their numbers, masks and names; one instance has none. */
#include "workload.h"
#include <sys/inotify.h>

/* Whether the next event is this one. */
static int event(int fd, int wd, unsigned mask, const char *name)
{
	char b[1024];
	struct inotify_event *e = (void *)b;
	struct { struct inotify_event e; char name[256]; } one;
	if (!SOON(read(fd, &one, sizeof one.e + 16) > 0)) return 0;
	memcpy(b, &one, sizeof one);
	return e->wd == wd && e->mask == mask && !strcmp(e->len ? e->name : "", name);
}

static int nothing(int fd) { char b[1024]; return read(fd, b, sizeof b) < 0 && errno == EAGAIN; }

int main(int argc, char **argv)
{
	begin(argc, argv);
	char dir[64], file[80], late[80];
	snprintf(dir, sizeof dir, "watched-%d", getpid());
	snprintf(file, sizeof file, "%s/file", dir);
	snprintf(late, sizeof late, "%s/late", dir);
	NEED(!mkdir(dir, 0700));
	int data = open(file, O_CREAT | O_RDWR, 0600), fd = inotify_init1(IN_NONBLOCK), plain = inotify_init1(IN_CLOEXEC);
	NEED(data >= 0 && fd >= 0 && plain >= 0);
	/* Numbers with gaps: what was watched in between is not any more. */
	for (int i = 0; i < 3; i++) NEED(!inotify_rm_watch(fd, inotify_add_watch(fd, "/proc/self/status", IN_MODIFY)));
	int wd = inotify_add_watch(fd, dir, IN_CREATE | IN_DELETE | IN_ONLYDIR);
	NEED(wd == 4 && !inotify_rm_watch(fd, inotify_add_watch(fd, "/proc/self/status", IN_MODIFY)));
	int wf = inotify_add_watch(fd, file, IN_MODIFY), once = inotify_add_watch(fd, argv[1], IN_ATTRIB | IN_ONESHOT);
	NEED(wf == 6 && once == 7);
	while (!nothing(fd));
	ready();
	wait_asked();
	BREAK("watch") { close(fd); fd = inotify_init1(IN_NONBLOCK); }
	BREAK("mask") NEED(inotify_add_watch(fd, file, IN_ATTRIB) == wf);
	BREAK("number") NEED(!inotify_rm_watch(fd, wd) && inotify_add_watch(fd, dir, IN_CREATE | IN_DELETE) > wf && !nothing(fd));
	BREAK("flags") NEED(!fcntl(plain, F_SETFD, 0));
	CHECK(nothing(fd), "no event yet");
	close(open(late, O_CREAT | O_RDWR, 0600));
	CHECK(event(fd, wd, IN_CREATE, "late"), "a file is made");
	CHECK(write(data, "x", 1) == 1 && event(fd, wf, IN_MODIFY, ""), "a file is written");
	CHECK(!fchmod(data, 0640) && nothing(fd), "only that is watched");
	CHECK(!unlink(late) && event(fd, wd, IN_DELETE, "late"), "a file is deleted");
	CHECK(fcntl(plain, F_GETFD) == FD_CLOEXEC && !(fcntl(plain, F_GETFL) & O_NONBLOCK) && fcntl(fd, F_GETFL) & O_NONBLOCK, "flags");
	CHECK(inotify_add_watch(plain, dir, IN_CREATE) == 1, "the other instance has no watches");
	pass();
}
