/* What every workload shares.
 *
 * A workload builds some kernel state, writes "ready PID" to its log (argv[1]), waits for SIGUSR1,
 * checks all of that state from within and appends "PASS" or "BROKEN what". It can't tell whether it was
 * checkpointed, restored or left alone in between: that is the point.
 *
 * Each check has to be able to fail. argv[2] names one BREAK("name") block, which damages the state
 * between "ready" and the check, the way a bad restore would. The harness reads the names from the
 * source and expects "BROKEN" for every one of them.
 */
#ifndef WORKLOAD_H
#define WORKLOAD_H
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define UNUSED __attribute__((unused))
#define PAGE 4096ul
/* Above what workloads open themselves, so that their own numbers stay small and known. */
#define LOG_FD 60

static const char *wl_break;

static UNUSED void say(const char *fmt, ...)
{
	char line[512];
	va_list ap;
	va_start(ap, fmt);
	int n = vsnprintf(line, sizeof line - 1, fmt, ap);
	va_end(ap);
	if (n < 0) n = 0;
	if (n > (int)sizeof line - 2) n = sizeof line - 2;
	line[n++] = '\n';
	if (write(LOG_FD, line, n) != n) _exit(99);
}

#define BROKEN(...) do { int wl_e = errno; char wl_b[400]; snprintf(wl_b, sizeof wl_b, __VA_ARGS__); \
	say("BROKEN %s (%s:%d pid %d errno %d)", wl_b, __FILE__, __LINE__, getpid(), wl_e); _exit(1); } while (0)
#define CHECK(cond, ...) do { errno = 0; if (!(cond)) BROKEN(__VA_ARGS__); } while (0)
/* Set-up that must work for the workload to mean anything. */
#define NEED(cond) do { errno = 0; if (!(cond)) BROKEN("set-up: %s", #cond); } while (0)
#define BREAK(name) if (wl_break && !strcmp(wl_break, name))
/* Waits for a condition without missing the deadline's failure. */
#define SOON(cond) ({ int wl_ok = 0; for (int wl_i = 0; wl_i < 5000 && !(wl_ok = !!(cond)); wl_i++) usleep(1000); wl_ok; })

/* Opens the log, blocks SIGUSR1 and starts a session, so that nothing of the tree belongs to anyone outside. */
static UNUSED void begin(int argc, char **argv)
{
	if (argc < 2) { fprintf(stderr, "usage: %s LOG [BREAK]\n", argv[0]); _exit(2); }
	syscall(SYS_close_range, 3, ~0u, 0); /* whatever a careless parent left open */
	int fd = open(argv[1], O_WRONLY | O_CREAT | O_APPEND, 0666);
	if (fd < 0 || dup3(fd, LOG_FD, O_CLOEXEC) < 0) { perror(argv[1]); _exit(2); }
	close(fd);
	wl_break = argc > 2 ? argv[2] : 0;
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	sigprocmask(SIG_BLOCK, &set, 0);
	setsid();
	alarm(0);
}

static UNUSED void ready(void) { say("ready %d", getpid()); }

static UNUSED void wait_asked(void)
{
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	while (sigwaitinfo(&set, 0) != SIGUSR1) if (errno != EINTR) BROKEN("sigwaitinfo");
}

/* The verdict; the process stays for whoever wants to look at it. */
static UNUSED void pass(void)
{
	say("PASS");
	for (;;) pause();
}

static UNUSED void fill(void *at, size_t bytes, uint64_t seed)
{
	uint64_t *p = at;
	for (size_t i = 0; i < bytes / 8; i++) p[i] = (i + seed) * 0x9e3779b97f4a7c15ull + seed;
}

static UNUSED int filled(const void *at, size_t bytes, uint64_t seed)
{
	const uint64_t *p = at;
	for (size_t i = 0; i < bytes / 8; i++)
		if (p[i] != (i + seed) * 0x9e3779b97f4a7c15ull + seed) return 0;
	return 1;
}

static UNUSED int is_zero(const void *at, size_t bytes)
{
	const uint64_t *p = at;
	for (size_t i = 0; i < bytes / 8; i++) if (p[i]) return 0;
	return 1;
}

static UNUSED void *map(size_t bytes, int prot, int flags)
{
	void *p = mmap(0, bytes, prot, MAP_ANONYMOUS | flags, -1, 0);
	NEED(p != MAP_FAILED);
	return p;
}

/* Contents of a small file, NUL-terminated; the length, or -1. */
static UNUSED int slurp(const char *path, char *buf, size_t size)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC), n = 0, r;
	if (fd < 0) return -1;
	while (n < (int)size - 1 && (r = read(fd, buf + n, size - 1 - n)) > 0) n += r;
	close(fd);
	buf[n] = 0;
	return n;
}

/* A line of /proc/self/status (of `task` if not 0), without its name. */
static UNUSED void status_line(pid_t task, const char *name, char *out, size_t size)
{
	char path[64], buf[8192];
	snprintf(path, sizeof path, task ? "/proc/%d/status" : "/proc/thread-self/status", task);
	out[0] = 0;
	if (slurp(path, buf, sizeof buf) < 0) return;
	size_t len = strlen(name);
	for (char *l = buf; l; l = strchr(l, '\n') ? strchr(l, '\n') + 1 : 0)
		if (!strncmp(l, name, len) && l[len] == ':') {
			snprintf(out, size, "%.*s", (int)strcspn(l + len + 1, "\n"), l + len + 1);
			return;
		}
}

static UNUSED long status_number(pid_t task, const char *name)
{
	char line[256];
	status_line(task, name, line, sizeof line);
	return atol(line);
}

static UNUSED char state_of(pid_t pid)
{
	char path[64], buf[1024];
	snprintf(path, sizeof path, "/proc/%d/stat", pid);
	if (slurp(path, buf, sizeof buf) <= 0) return '?';
	char *p = strrchr(buf, ')');
	return p ? p[2] : '?';
}

static UNUSED uint64_t now_ms(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000ull + t.tv_nsec / 1000000;
}
#endif
