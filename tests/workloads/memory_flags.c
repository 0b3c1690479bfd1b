/* What mlock and madvise said about a mapping still holds. */
#include "workload.h"

/* The VmFlags of the mapping at `at` that someone asked for, as "lo rr ...". */
static void flags_at(void *at, char *out)
{
	static char smaps[1 << 20];
	unsigned long lo, hi;
	int inside = 0;
	out[0] = 0;
	NEED(slurp("/proc/self/smaps", smaps, sizeof smaps) > 0);
	for (char *l = strtok(smaps, "\n"); l; l = strtok(0, "\n")) {
		if (sscanf(l, "%lx-%lx ", &lo, &hi) == 2) inside = (unsigned long)at >= lo && (unsigned long)at < hi;
		if (!inside || strncmp(l, "VmFlags:", 8)) continue;
		for (const char *f = l + 8; *f; f += 3) {
			while (*f == ' ') f++;
			if (!*f) break;
			const char *kept = "lo rr sr dc wf dd hg nh mg gd nr ";
			char pair[4] = { f[0], f[1], ' ', 0 };
			if (strstr(kept, pair)) strcat(out, pair);
		}
	}
}

int main(int argc, char **argv)
{
	begin(argc, argv);
	static const struct { const char *name; int advice; int optional; } asked[] = {
		{ "dontfork", MADV_DONTFORK, 0 }, { "dontdump", MADV_DONTDUMP, 0 }, { "hugepage", MADV_HUGEPAGE, 1 },
		{ "nohugepage", MADV_NOHUGEPAGE, 1 }, { "wipeonfork", MADV_WIPEONFORK, 0 }, { "mergeable", MADV_MERGEABLE, 1 },
		{ "sequential", MADV_SEQUENTIAL, 0 }, { "random", MADV_RANDOM, 0 }, { "lock", 0, 0 }, { "onfault", 0, 0 },
	};
	enum { N = sizeof asked / sizeof *asked };
	char *at[N], before[N][128], after[128];
	for (int i = 0; i < N; i++) {
		/* PROT_NONE neighbours keep the regions from being merged. */
		at[i] = map(24 * PAGE, PROT_NONE, MAP_PRIVATE) + 4 * PAGE;
		NEED(!mprotect(at[i], 16 * PAGE, PROT_READ | PROT_WRITE));
		fill(at[i], 16 * PAGE, i);
		if (!strcmp(asked[i].name, "lock")) NEED(!mlock(at[i], 16 * PAGE));
		else if (!strcmp(asked[i].name, "onfault")) NEED(!mlock2(at[i], 16 * PAGE, MLOCK_ONFAULT));
		else NEED(!madvise(at[i], 16 * PAGE, asked[i].advice) || asked[i].optional);
		flags_at(at[i], before[i]);
		NEED(before[i][0] || asked[i].optional);
	}
	ready();
	wait_asked();
	BREAK("madvise") madvise(at[0], 16 * PAGE, MADV_DOFORK);
	BREAK("mlock") munlock(at[8], 16 * PAGE);
	BREAK("dump") madvise(at[1], 16 * PAGE, MADV_DODUMP);
	BREAK("wipe") madvise(at[4], 16 * PAGE, MADV_KEEPONFORK);
	for (int i = 0; i < N; i++) {
		flags_at(at[i], after);
		CHECK(!strcmp(before[i], after), "%s: flags '%s' became '%s'", asked[i].name, before[i], after);
		CHECK(filled(at[i], 16 * PAGE, i), "contents of %s", asked[i].name);
	}
	pid_t pid = fork();
	if (!pid) {
		if (msync(at[0], PAGE, MS_ASYNC) != -1) _exit(1); /* dontfork: not there */
		_exit(is_zero(at[4], 16 * PAGE) ? 0 : 2);         /* wipeonfork: empty */
	}
	int status;
	CHECK(waitpid(pid, &status, 0) == pid && status == 0, "a fork sees what madvise promised, status %#x", status);
	pass();
}
