/* Files in /proc that are open: of the process itself, of a child, of a thread, of nobody; half read, shared, in flight,
 * written to. */
#include "workload.h"
#include <sys/prctl.h>
#include <sys/socket.h>

static void *idle(void *tid) { *(volatile pid_t *)tid = gettid(); while (pause()) {} return 0; }

/* What is left of it, or all if from the start. */
static char *rest(int fd, int from_start)
{
	static char text[65536];
	int n = from_start ? pread(fd, text, sizeof text - 1, 0) : read(fd, text, sizeof text - 1);
	text[n < 0 ? 0 : n] = 0;
	return text;
}

int main(int argc, char **argv)
{
	begin(argc, argv);
	volatile pid_t tid = 0;
	pthread_t thread;
	NEED(!pthread_create(&thread, 0, idle, (void *)&tid) && SOON(tid));
	int up[2];
	NEED(!pipe(up));
	pid_t child = fork();
	if (!child) {
		prctl(PR_SET_NAME, "the child");
		NEED(write(up[1], "!", 1) == 1);
		for (;;) pause();
	}
	char c, path[64], half[64];
	NEED(child > 0 && read(up[0], &c, 1) == 1);
	int stat = open("/proc/self/stat", O_RDONLY | O_CLOEXEC), memory = open("/proc/self/mem", O_RDWR);
	int comm = open("/proc/thread-self/comm", O_RDWR), info = open("/proc/meminfo", O_RDONLY);
	snprintf(path, sizeof path, "/proc/%d/comm", child);
	int childs = open(path, O_RDONLY), twice = dup(childs), again = open(path, O_RDONLY | O_NONBLOCK);
	snprintf(path, sizeof path, "/proc/self/task/%d/status", tid);
	int threads = open(path, O_RDONLY), tasks = open("/proc/self/task", O_RDONLY | O_DIRECTORY);
	int handle = open("/proc/self/fd", O_PATH);
	NEED(stat >= 0 && memory >= 0 && comm >= 0 && info >= 0 && childs >= 0 && again >= 0 && threads >= 0 && tasks >= 0 && handle >= 0);
	int half_read = snprintf(half, sizeof half, "%d (pro", getpid());
	NEED(read(stat, path, half_read) == half_read && !memcmp(path, half, half_read) && read(childs, &c, 1) == 1);
	volatile long word = 1111;
	NEED(lseek(memory, (off_t)&word, SEEK_SET) == (off_t)&word);
	int s[2];
	NEED(!socketpair(AF_UNIX, SOCK_STREAM, 0, s));
	char control[CMSG_SPACE(sizeof(int))] = { 0 };
	struct iovec iov = { &c, 1 };
	struct msghdr m = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control };
	*(struct cmsghdr *)control = (struct cmsghdr){ .cmsg_len = CMSG_LEN(sizeof(int)), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS };
	memcpy(CMSG_DATA((struct cmsghdr *)control), &childs, sizeof childs);
	NEED(sendmsg(s[0], &m, 0) == 1);
	ready();
	wait_asked();
	BREAK("stat") lseek(stat, 0, SEEK_SET);
	BREAK("child") dup2(comm, childs);
	BREAK("shared") twice = again;
	BREAK("memory") lseek(memory, 4096, SEEK_SET);
	BREAK("thread") dup2(stat, threads);
	BREAK("flight") recvmsg(s[1], &m, MSG_DONTWAIT);
	CHECK(!strncmp(rest(stat, 0), "c_files)", 8), "the rest of stat: %.40s", rest(stat, 1));
	CHECK(fcntl(stat, F_GETFD) == FD_CLOEXEC, "close-on-exec");
	CHECK(!strcmp(rest(childs, 0), "he child\n"), "the rest of the child's name: %s", rest(childs, 1));
	CHECK(lseek(twice, 0, SEEK_CUR) == 10 && lseek(again, 0, SEEK_CUR) == 0, "which are one file");
	CHECK(fcntl(again, F_GETFL) & O_NONBLOCK && !strcmp(rest(again, 0), "the child\n"), "another of the same name");
	CHECK(write(comm, "renamed", 7) == 7 && !prctl(PR_GET_NAME, path) && !strcmp(path, "renamed"), "a new name: %s", path);
	long read_back = 0, written = 2222;
	CHECK(read(memory, &read_back, sizeof read_back) == sizeof read_back && read_back == 1111, "memory: %ld", read_back);
	CHECK(pwrite(memory, &written, sizeof written, (off_t)&word) == sizeof written && word == 2222, "memory written: %ld", word);
	snprintf(path, sizeof path, "\nPid:\t%d\n", tid);
	CHECK(strstr(rest(threads, 1), path) && strstr(rest(info, 1), "MemTotal:"), "a thread's, and nobody's");
	snprintf(path, sizeof path, "%d", tid);
	CHECK(!faccessat(tasks, path, F_OK, 0) && !faccessat(handle, "0", F_OK, 0), "directories");
	int flown = -1;
	m.msg_controllen = sizeof control;
	CHECK(recvmsg(s[1], &m, MSG_DONTWAIT) == 1 && CMSG_FIRSTHDR(&m), "in flight");
	memcpy(&flown, CMSG_DATA(CMSG_FIRSTHDR(&m)), sizeof flown);
	CHECK(syscall(SYS_kcmp, getpid(), getpid(), 0, flown, childs) == 0, "the same file in flight");
	CHECK(!kill(child, SIGKILL) && waitpid(child, 0, 0) == child, "the child");
	pass();
}
