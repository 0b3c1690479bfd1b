/* A tree with sessions and groups, some of whose leaders are dead, zombies of two kinds, a stopped child, an
 * orphan that came back to the root, and threads in a child. Everyone keeps ids, parent, group and session. */
#include "workload.h"

enum { MAX = 32, ROUNDS = 64 };
struct member { volatile pid_t pid, ppid, pgid, sid; volatile int answered; char name[16]; };
static struct shared { volatile int members, asked; struct member m[MAX]; } *sh;

static struct member *enrol(const char *name)
{
	struct member *m = &sh->m[__sync_fetch_and_add(&sh->members, 1)];
	snprintf(m->name, sizeof m->name, "%s", name);
	prctl(PR_SET_NAME, name);
	return m;
}

/* Says who it is whenever the root asks. */
static void serve(struct member *m, pid_t parent_should_be)
{
	while (parent_should_be && getppid() != parent_should_be) usleep(1000);
	m->pid = getpid(), m->ppid = getppid(), m->pgid = getpgid(0), m->sid = getsid(0);
	m->answered = -1;
	for (;;) {
		usleep(2000);
		int asked = sh->asked;
		if (!asked || m->answered == asked) continue;
		CHECK(m->pid == getpid(), "%s: pid %d became %d", m->name, m->pid, getpid());
		CHECK(m->ppid == getppid(), "%s: parent %d became %d", m->name, m->ppid, getppid());
		CHECK(m->pgid == getpgid(0), "%s: group %d became %d", m->name, m->pgid, getpgid(0));
		CHECK(m->sid == getsid(0), "%s: session %d became %d", m->name, m->sid, getsid(0));
		CHECK(m->pid == syscall(SYS_getpid), "%s: getpid", m->name);
		m->answered = asked;
	}
}

static pid_t spawn(void) { pid_t p = fork(); NEED(p >= 0); return p; }
static void *idle(void *x) { for (;;) pause(); return x; }

int main(int argc, char **argv)
{
	begin(argc, argv);
	sh = map(sizeof *sh, PROT_READ | PROT_WRITE, MAP_SHARED);
	NEED(!prctl(PR_SET_CHILD_SUBREAPER, 1));
	pid_t root = getpid();
	if (!spawn()) serve(enrol("plain"), root);
	if (!spawn()) { setpgid(0, 0); struct member *m = enrol("leads group"); if (!spawn()) serve(enrol("in its group"), 0); serve(m, root); }
	if (!spawn()) { setsid(); struct member *m = enrol("leads session"); if (!spawn()) { setpgid(0, 0); serve(enrol("group there"), 0); } serve(m, root); }
	/* A session whose leader is gone, and a group of which only a member is left; both come back to us. */
	if (!spawn()) { setsid(); if (!spawn()) serve(enrol("leaderless sid"), root); _exit(0); }
	if (!spawn()) { setpgid(0, 0); if (!spawn()) serve(enrol("leaderless pgid"), root); _exit(0); }
	/* An orphan that came back to the root, with a child of its own. */
	if (!spawn()) { if (!spawn()) { struct member *m = enrol("orphan"); if (!spawn()) serve(enrol("orphan's child"), 0); serve(m, root); } _exit(0); }
	if (!spawn()) { pthread_t t; struct member *m = enrol("threaded"); for (int i = 0; i < 3; i++) pthread_create(&t, 0, idle, 0); serve(m, root); }
	/* Five generations. */
	if (!spawn()) for (int i = 0;; i++) { char n[16]; snprintf(n, sizeof n, "generation %d", i); struct member *m = enrol(n); if (i == 4 || spawn()) serve(m, 0); }
	enum { WANT = 15 };
	NEED(SOON(({ int up = 0; for (int i = 0; i < sh->members; i++) up += sh->m[i].answered == -1; up == WANT; })));
	/* The dead helpers in between are reaped here, the zombies below are kept. */
	for (int i = 0; i < 3; i++) NEED(wait(0) > 0);
	pid_t exited = spawn();
	if (!exited) _exit(7);
	pid_t killed = spawn();
	if (!killed) { kill(getpid(), SIGKILL); for (;;) pause(); }
	pid_t zombie_leader = spawn(); /* a zombie that leads a session with a living member */
	if (!zombie_leader) { setsid(); if (!spawn()) serve(enrol("zombie's heir"), root); usleep(20000); _exit(3); }
	pid_t stopped = spawn();
	if (!stopped) { struct member *m = enrol("stopped"); raise(SIGSTOP); serve(m, root); }
	siginfo_t si;
	NEED(!waitid(P_PID, stopped, &si, WSTOPPED | WNOWAIT) && si.si_code == CLD_STOPPED);
	NEED(!waitid(P_PID, exited, &si, WEXITED | WNOWAIT) && !waitid(P_PID, killed, &si, WEXITED | WNOWAIT) && !waitid(P_PID, zombie_leader, &si, WEXITED | WNOWAIT));
	NEED(SOON(sh->members == WANT + 2 && ({ int up = 0; for (int i = 0; i < sh->members; i++) up += sh->m[i].answered == -1; up == WANT + 1; })));
	ready();
	wait_asked();
	BREAK("member") kill(sh->m[0].pid, SIGKILL);
	BREAK("group")
		for (int i = 0; i < sh->members; i++)
			if (!strcmp(sh->m[i].name, "plain")) setpgid(sh->m[i].pid, sh->m[i].pid);
	BREAK("zombie") waitpid(exited, 0, 0);
	BREAK("stopped") kill(stopped, SIGCONT), usleep(20000);
	BREAK("ids") sh->m[2].ppid = 1;
	CHECK(getpid() == root && getsid(0) == root && getpgid(0) == root, "the root's own ids");
	CHECK(state_of(stopped) == 'T', "the stopped child is in state %c", state_of(stopped));
	sh->asked = 1;
	for (int i = 0; i < sh->members; i++)
		CHECK(!strcmp(sh->m[i].name, "stopped") || SOON(sh->m[i].answered == 1), "%s (pid %d) does not answer", sh->m[i].name, sh->m[i].pid);
	CHECK(state_of(stopped) == 'T', "the stopped child ran on by itself");
	int status = -1;
	CHECK(waitpid(exited, &status, WNOHANG) == exited && WIFEXITED(status) && WEXITSTATUS(status) == 7, "zombie's status %#x", status);
	CHECK(waitpid(killed, &status, WNOHANG) == killed && WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL, "killed zombie's status %#x", status);
	CHECK(waitpid(zombie_leader, &status, WNOHANG) == zombie_leader && WIFEXITED(status) && WEXITSTATUS(status) == 3, "zombie leader's status %#x", status);
	CHECK(!kill(stopped, SIGCONT), "SIGCONT");
	CHECK(waitpid(stopped, &status, WCONTINUED) == stopped && WIFCONTINUED(status), "the parent hears of SIGCONT");
	for (int i = 0; i < sh->members; i++)
		if (!strcmp(sh->m[i].name, "stopped")) CHECK(SOON(sh->m[i].answered == 1), "the stopped child goes on after SIGCONT");
	CHECK(waitpid(-1, &status, WNOHANG) == 0, "nobody else ended");
	pass();
}
