/* What a process is called and how it is treated: command line, environment, auxv, exe, working directory,
 * personality, scheduling, nice, disk priority, umask, dumpable, what core dumps hold, subreaper, oom score, timer
 * slack, huge pages off. */
#include "workload.h"
#include <sched.h>
#include <sys/personality.h>
#include <sys/resource.h>

static const char *const files[] = { "cmdline", "environ", "auxv", "comm", "oom_score_adj", "personality", "timerslack_ns", "coredump_filter" };
static const char *const links[] = { "exe", "cwd", "root" };
enum { NF = sizeof files / sizeof *files, NL = sizeof links / sizeof *links };
struct seen {
	int length[NF];
	char file[NF][8192], link[NL][1024];
	int policy, nice, ioprio, dumpable, subreaper, pdeathsig, thp, nnp;
	unsigned persona;
	mode_t mask;
	long slack;
	char thp_line[64];
};
static struct seen before, after;

static void look(struct seen *s)
{
	char path[64];
	for (int i = 0; i < NF; i++) {
		snprintf(path, sizeof path, "/proc/self/%s", files[i]);
		s->length[i] = slurp(path, s->file[i], sizeof s->file[i]);
	}
	for (int i = 0; i < NL; i++) {
		snprintf(path, sizeof path, "/proc/self/%s", links[i]);
		NEED(readlink(path, s->link[i], sizeof s->link[i] - 1) > 0);
	}
	s->policy = sched_getscheduler(0);
	s->nice = getpriority(PRIO_PROCESS, 0);
	s->ioprio = (int)syscall(SYS_ioprio_get, 1, 0);
	s->dumpable = prctl(PR_GET_DUMPABLE);
	prctl(PR_GET_CHILD_SUBREAPER, &s->subreaper);
	prctl(PR_GET_PDEATHSIG, &s->pdeathsig);
	s->thp = prctl(PR_GET_THP_DISABLE, 0, 0, 0, 0);
	s->nnp = prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0);
	s->persona = personality(0xffffffff);
	s->mask = umask(0);
	umask(s->mask);
	s->slack = prctl(PR_GET_TIMERSLACK);
}

int main(int argc, char **argv)
{
	begin(argc, argv);
	NEED(personality(ADDR_NO_RANDOMIZE | UNAME26) >= 0);
	NEED(!mkdir("a dir\nwith (deleted)", 0755) || errno == EEXIST);
	NEED(!chdir("a dir\nwith (deleted)"));
	memcpy(argv[0], "R", 1); /* like setproctitle: cmdline shows the stack as it is */
	setenv("LATER", "added after exec", 1);
	prctl(PR_SET_NAME, "name with) (x");
	int fd = open("/proc/self/oom_score_adj", O_WRONLY);
	NEED(write(fd, "321", 3) == 3 && !close(fd));
	struct sched_param p = { 0 };
	NEED(!sched_setscheduler(0, SCHED_BATCH, &p) && !setpriority(PRIO_PROCESS, 0, 7));
	NEED(!syscall(SYS_ioprio_set, 1, 0, 2 << 13 | 6));
	fd = open("/proc/self/coredump_filter", O_WRONLY);
	NEED(write(fd, "0x7f", 4) == 4 && !close(fd));
	umask(0126);
	NEED(!prctl(PR_SET_CHILD_SUBREAPER, 1) && !prctl(PR_SET_PDEATHSIG, SIGCONT) && !prctl(PR_SET_TIMERSLACK, 123456));
	NEED(!prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0));
	NEED(!prctl(PR_SET_DUMPABLE, 1));
	look(&before);
	ready();
	wait_asked();
	BREAK("cmdline") argv[0][1] = '#';
	BREAK("comm") prctl(PR_SET_NAME, "x");
	BREAK("oom") { fd = open("/proc/self/oom_score_adj", O_WRONLY); NEED(write(fd, "322", 3) == 3); }
	BREAK("corefilter") { fd = open("/proc/self/coredump_filter", O_WRONLY); NEED(write(fd, "0x33", 4) == 4); }
	BREAK("ioprio") syscall(SYS_ioprio_set, 1, 0, 3 << 13);
	BREAK("cwd") NEED(!chdir(".."));
	BREAK("sched") sched_setscheduler(0, SCHED_OTHER, &p);
	BREAK("nice") setpriority(PRIO_PROCESS, 0, 8);
	BREAK("umask") umask(022);
	BREAK("subreaper") prctl(PR_SET_CHILD_SUBREAPER, 0);
	BREAK("slack") prctl(PR_SET_TIMERSLACK, 50000);
	BREAK("thp") prctl(PR_SET_THP_DISABLE, 0, 0, 0, 0);
	BREAK("personality") personality(0);
	BREAK("dumpable") prctl(PR_SET_DUMPABLE, 0);
	BREAK("pdeathsig") prctl(PR_SET_PDEATHSIG, 0);
	look(&after);
	for (int i = 0; i < NF; i++)
		CHECK(before.length[i] == after.length[i] && !memcmp(before.file[i], after.file[i], before.length[i] > 0 ? before.length[i] : 0), "/proc/self/%s: %d '%s' became %d '%s'",
			files[i], before.length[i], before.file[i], after.length[i], after.file[i]);
	for (int i = 0; i < NL; i++) CHECK(!strcmp(before.link[i], after.link[i]), "%s: '%s' became '%s'", links[i], before.link[i], after.link[i]);
#define SAME(field) CHECK(before.field == after.field, #field ": %ld became %ld", (long)before.field, (long)after.field)
	SAME(policy); SAME(nice); SAME(ioprio); SAME(dumpable); SAME(subreaper); SAME(pdeathsig); SAME(thp); SAME(nnp); SAME(persona); SAME(mask); SAME(slack);
	pass();
}
