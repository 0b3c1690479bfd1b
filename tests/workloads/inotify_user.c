/* Holds an inotify descriptor, which can't be checkpointed: the refusal has to name it and leave it working. */
#include "workload.h"
#include <sys/inotify.h>

int main(int argc, char **argv)
{
	begin(argc, argv);
	int fd = inotify_init1(IN_NONBLOCK);
	NEED(fd >= 0 && inotify_add_watch(fd, ".", IN_CREATE) >= 0);
	ready();
	wait_asked();
	BREAK("watch") { close(fd); fd = inotify_init1(IN_NONBLOCK); }
	char b[1024];
	close(open("made", O_CREAT | O_RDWR, 0600));
	CHECK(SOON(read(fd, b, sizeof b) > 0), "the watch works");
	pass();
}
