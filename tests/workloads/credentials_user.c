/* A task of another user with groups of its own, no privileges, lowered limits and no dumps: all of it stays,
 * and nothing comes back that it gave up. */
#include "workload.h"
#include <grp.h>
#include <sys/fsuid.h>
#include <sys/resource.h>

static const char *const lines[] = { "Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp", "Umask" };
enum { N = sizeof lines / sizeof *lines };
static char before[N][256], after[N][256];

static void look(char out[N][256]) { for (int i = 0; i < N; i++) status_line(0, lines[i], out[i], 256); }

static void *thread(void *unused) { for (;;) pause(); return unused; }

int main(int argc, char **argv)
{
	begin(argc, argv);
	gid_t groups[] = { 77, 4242, 100000 };
	struct rlimit lim[RLIM_NLIMITS], now;
	NEED(!chmod(".", 0777));
	for (int i = 0; i < RLIM_NLIMITS; i++) {
		NEED(!getrlimit(i, &lim[i]));
		if (i == RLIMIT_NOFILE) lim[i].rlim_cur = 333, lim[i].rlim_max = 777;
		if (i == RLIMIT_CORE) lim[i].rlim_cur = 0, lim[i].rlim_max = 4096 * 10;
		if (i == RLIMIT_DATA) lim[i].rlim_cur = 1ul << 33;
		if (i == RLIMIT_MSGQUEUE) lim[i].rlim_cur = 4097;
		NEED(!setrlimit(i, &lim[i]));
	}
	NEED(!setgroups(3, groups) && !setresgid(20001, 20002, 20003));
	setfsgid(20001);
	for (int cap = 0; cap < 64; cap += 7) prctl(PR_CAPBSET_DROP, cap);
	NEED(!setresuid(10001, 10001, 10003));
	NEED(!prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
	NEED(!prctl(PR_SET_DUMPABLE, 0));
	NEED(!prctl(PR_SET_PDEATHSIG, SIGWINCH));
	umask(0157);
	pthread_t t;
	NEED(!pthread_create(&t, 0, thread, 0));
	look(before);
	int loaned = open("/etc/shadow", O_RDONLY | O_CLOEXEC);
	NEED(loaned < 0 && strstr(before[0], "10001\t10001\t10003\t10001"));
	ready();
	wait_asked();
	BREAK("uid") setresuid(-1, 10003, -1);
	BREAK("umask") umask(022);
	BREAK("dumpable") prctl(PR_SET_DUMPABLE, 1);
	BREAK("pdeathsig") prctl(PR_SET_PDEATHSIG, 0);
	BREAK("limit") setrlimit(RLIMIT_NOFILE, &(struct rlimit){ 333, 776 });
	BREAK("gid") setresgid(-1, 20003, -1);
	look(after);
	for (int i = 0; i < N; i++) CHECK(!strcmp(before[i], after[i]), "%s:%s became%s", lines[i], before[i], after[i]);
	for (int i = 0; i < RLIM_NLIMITS; i++)
		CHECK(!getrlimit(i, &now) && now.rlim_cur == lim[i].rlim_cur && now.rlim_max == lim[i].rlim_max, "limit %d: %lu/%lu became %lu/%lu",
			i, lim[i].rlim_cur, lim[i].rlim_max, now.rlim_cur, now.rlim_max);
	CHECK(prctl(PR_GET_DUMPABLE) == 0, "dumpable %d", prctl(PR_GET_DUMPABLE));
	int sig = 0;
	CHECK(!prctl(PR_GET_PDEATHSIG, &sig) && sig == SIGWINCH, "parent death signal %d", sig);
	CHECK(open("/etc/shadow", O_RDONLY) < 0 && setuid(0) < 0, "privileges came back");
	pass();
}
