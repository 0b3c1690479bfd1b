/* Memory of huge pages (hugetlbfs), for workloads that have some if their third argument is "huge": whoever says so holds the
 * kernel's pool. */
#ifndef HUGE_H
#define HUGE_H
#include <sys/ipc.h>
#include <sys/shm.h>

#define HUGE (2ul << 20)

static int huge;

static UNUSED void may_have_huge_pages(int argc, char **argv)
{
	huge = argc > 3 && !strcmp(argv[3], "huge");
}

/* The line of smaps that begins with `name`, of the mapping at `at`. */
static UNUSED const char *smaps_line(const void *at, const char *name)
{
	static char smaps[1 << 20];
	unsigned long lo, hi;
	int inside = 0;
	NEED(slurp("/proc/self/smaps", smaps, sizeof smaps) > 0);
	for (char *l = strtok(smaps, "\n"); l; l = strtok(0, "\n")) {
		if (sscanf(l, "%lx-%lx ", &lo, &hi) == 2) inside = (unsigned long)at >= lo && (unsigned long)at < hi;
		if (inside && !strncmp(l, name, strlen(name))) return l + strlen(name);
	}
	return "";
}

static UNUSED long page_kib(const void *at) { return atol(smaps_line(at, "KernelPageSize:")); }
static UNUSED int has_flag(const void *at, const char *flag) { return !!strstr(smaps_line(at, "VmFlags:"), flag); }
#endif
