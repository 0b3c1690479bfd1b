/* A task whose root is a directory of its own, with a working directory below it. */
#include "workload.h"

int main(int argc, char **argv)
{
	begin(argc, argv);
	struct stat here, root, cwd, again;
	NEED(!mkdir("jail", 0755) && !mkdir("jail/work", 0755));
	int fd = open("jail/work/mark", O_RDWR | O_CREAT, 0600);
	NEED(fd >= 0 && write(fd, "inside", 6) == 6);
	NEED(!stat("jail", &here) && !chroot("jail") && !chdir("/work") && !stat("/", &root) && !stat(".", &cwd) && root.st_ino == here.st_ino);
	ready();
	wait_asked();
	char b[16] = "";
	BREAK("cwd") NEED(!chdir("/"));
	BREAK("root") NEED(!chroot("/work"));
	CHECK(!stat("/", &again) && again.st_ino == root.st_ino && again.st_dev == root.st_dev, "root");
	CHECK(!stat(".", &again) && again.st_ino == cwd.st_ino, "working directory");
	CHECK(pread(fd, b, 6, 0) == 6 && !strcmp(b, "inside"), "open file");
	CHECK(open("/work/mark", O_RDONLY) >= 0 && open("/etc/passwd", O_RDONLY) < 0, "paths resolve inside");
	pass();
}
