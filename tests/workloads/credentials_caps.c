/* A task with some capabilities of each kind, securebits, and different credentials in a second thread. */
#include "workload.h"
#include <linux/capability.h>
#include <linux/securebits.h>

static const char *const lines[] = { "Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs" };
enum { N = sizeof lines / sizeof *lines };
static char before[2][N][256], after[2][N][256];
static int bits[2][2];
static volatile int built, asked;

static void look(char out[N][256]) { for (int i = 0; i < N; i++) status_line(0, lines[i], out[i], 256); }

static void set_caps(uint64_t effective, uint64_t permitted, uint64_t inheritable)
{
	struct __user_cap_header_struct h = { _LINUX_CAPABILITY_VERSION_3, 0 };
	struct __user_cap_data_struct d[2] = { { effective, permitted, inheritable }, { effective >> 32, permitted >> 32, inheritable >> 32 } };
	NEED(!syscall(SYS_capset, &h, d));
}

static void *second(void *unused)
{
	/* Raw calls change this thread only. */
	NEED(!syscall(SYS_setresgid, 31, 32, 33));
	NEED(!syscall(SYS_setresuid, 21, 22, 23));
	look(before[1]);
	bits[0][1] = prctl(PR_GET_SECUREBITS);
	built = 1;
	while (!asked) usleep(1000);
	BREAK("second") syscall(SYS_setresuid, 22, 22, 22);
	look(after[1]);
	bits[1][1] = prctl(PR_GET_SECUREBITS);
	built = 2;
	for (;;) pause();
	return unused;
}

int main(int argc, char **argv)
{
	begin(argc, argv);
	NEED(!chmod(".", 0777));
	const uint64_t keep = 1ull << CAP_NET_RAW | 1ull << CAP_CHOWN | 1ull << CAP_SYS_NICE | 1ull << CAP_SETUID | 1ull << CAP_SETGID | 1ull << CAP_SETPCAP;
	NEED(!prctl(PR_CAPBSET_DROP, CAP_SYS_BOOT) && !prctl(PR_CAPBSET_DROP, CAP_MKNOD));
	pthread_t t;
	NEED(!pthread_create(&t, 0, second, 0));
	NEED(SOON(built == 1));
	NEED(!prctl(PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP | SECBIT_NO_SETUID_FIXUP_LOCKED | SECBIT_KEEP_CAPS));
	NEED(!syscall(SYS_setresuid, 11, 12, 13));
	set_caps(1ull << CAP_NET_RAW | 1ull << CAP_SETPCAP, keep, 1ull << CAP_NET_RAW | 1ull << CAP_CHOWN);
	NEED(!prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, CAP_NET_RAW, 0, 0));
	look(before[0]);
	bits[0][0] = prctl(PR_GET_SECUREBITS);
	ready();
	wait_asked();
	BREAK("effective") set_caps(1ull << CAP_SETPCAP, keep, 1ull << CAP_NET_RAW | 1ull << CAP_CHOWN);
	BREAK("ambient") prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);
	BREAK("bounding") prctl(PR_CAPBSET_DROP, CAP_SYSLOG);
	BREAK("securebits") prctl(PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP | SECBIT_NO_SETUID_FIXUP_LOCKED);
	look(after[0]);
	bits[1][0] = prctl(PR_GET_SECUREBITS);
	asked = 1;
	CHECK(SOON(built == 2), "the second thread answers");
	for (int th = 0; th < 2; th++) {
		for (int i = 0; i < N; i++)
			CHECK(!strcmp(before[th][i], after[th][i]), "thread %d %s:%s became%s", th, lines[i], before[th][i], after[th][i]);
		CHECK(bits[0][th] == bits[1][th], "thread %d: securebits %#x became %#x", th, bits[0][th], bits[1][th]);
	}
	pass();
}
