/* System V shared memory: ids, keys, owners, contents; who is attached; a segment that is removed already. */
#include "workload.h"
#include <sys/ipc.h>
#include <sys/shm.h>

#define SIZE (40 * PAGE + 100)

static int keyed = -1, gone;

/* Nothing of it stays, however this ends. */
#undef BROKEN
#define BROKEN(...) do { int wl_e = errno; char wl_b[400]; snprintf(wl_b, sizeof wl_b, __VA_ARGS__); \
	shmctl(keyed, IPC_RMID, 0); say("BROKEN %s (%s:%d pid %d errno %d)", wl_b, __FILE__, __LINE__, getpid(), wl_e); _exit(1); } while (0)

static struct shmid_ds stat_of(int id)
{
	struct shmid_ds ds;
	NEED(!shmctl(id, IPC_STAT, &ds));
	return ds;
}

static void check_stat(const char *name, int id, const struct shmid_ds *was)
{
	struct shmid_ds now = stat_of(id);
	CHECK(now.shm_perm.__key == was->shm_perm.__key, "%s: key %#x", name, now.shm_perm.__key);
	CHECK(now.shm_segsz == was->shm_segsz, "%s: size %zu", name, now.shm_segsz);
	CHECK(now.shm_perm.mode == was->shm_perm.mode, "%s: mode %#o, was %#o", name, now.shm_perm.mode, was->shm_perm.mode);
	CHECK(now.shm_perm.uid == was->shm_perm.uid && now.shm_perm.gid == was->shm_perm.gid, "%s: owner", name);
	CHECK(now.shm_perm.cuid == was->shm_perm.cuid && now.shm_perm.cgid == was->shm_perm.cgid, "%s: creator", name);
	CHECK(now.shm_nattch == was->shm_nattch, "%s: attached %lu, was %lu", name, now.shm_nattch, was->shm_nattch);
}

int main(int argc, char **argv)
{
	begin(argc, argv);
	key_t key = 0x43000000 | getpid();
	/* One that was killed with the same pid may have left its own. */
	while ((keyed = shmget(key, SIZE, IPC_CREAT | IPC_EXCL | 0640)) < 0 && errno == EEXIST) key += 1 << 24;
	gone = shmget(IPC_PRIVATE, 3 * PAGE, IPC_CREAT | 0600);
	int empty = shmget(IPC_PRIVATE, 1, IPC_CREAT | 0600);
	NEED(keyed >= 0 && gone >= 0 && empty >= 0);
	struct shmid_ds ds = stat_of(keyed);
	ds.shm_perm.mode = 0604;
	if (!getuid()) ds.shm_perm.uid = 7, ds.shm_perm.gid = 8;
	NEED(!shmctl(keyed, IPC_SET, &ds));
	NEED(!shmctl(gone, SHM_LOCK, 0) || errno == EPERM);
	char *a = shmat(keyed, 0, 0), *b = shmat(keyed, 0, SHM_RDONLY), *c = shmat(gone, 0, 0), *d = shmat(empty, 0, 0);
	NEED(a != (void *)-1 && b != (void *)-1 && c != (void *)-1 && d != (void *)-1);
	fill(a + 3 * PAGE, 2 * PAGE, 1);
	fill(a + 40 * PAGE, 96, 2);
	fill(c, 3 * PAGE, 3);
	NEED(!mprotect(a + 8 * PAGE, 4 * PAGE, PROT_NONE));
	NEED(!shmctl(gone, IPC_RMID, 0) && !shmctl(empty, IPC_RMID, 0));
	int up[2], down[2];
	NEED(!pipe(up) && !pipe(down));
	pid_t child = fork();
	NEED(child >= 0);
	char w;
	if (!child) {
		NEED(!shmdt(b) && write(up[1], "r", 1) == 1 && read(down[0], &w, 1) == 1);
		CHECK(a[20 * PAGE] == 55 && c[5] == 66, "what the parent wrote");
		a[21 * PAGE] = 77;
		NEED(write(up[1], "w", 1) == 1);
		for (;;) pause();
	}
	NEED(read(up[0], &w, 1) == 1);
	struct shmid_ds was = stat_of(keyed), was_gone = stat_of(gone);
	NEED(was_gone.shm_perm.mode & SHM_DEST && was_gone.shm_perm.__key == IPC_PRIVATE);
	say("segment %d", keyed);
	ready();
	wait_asked();
	BREAK("contents") a[4 * PAGE] ^= 1;
	BREAK("hole") a[30 * PAGE] = 1;
	BREAK("end") a[40 * PAGE + 95] ^= 1;
	BREAK("removed") c[PAGE] ^= 1;
	BREAK("mode") { ds.shm_perm.mode = 0600; shmctl(keyed, IPC_SET, &ds); }
	BREAK("attached") shmat(keyed, 0, 0);
	BREAK("key") shmctl(keyed, IPC_RMID, 0);
	BREAK("protection") mprotect(a + 8 * PAGE, PAGE, PROT_READ);
	check_stat("keyed", keyed, &was);
	check_stat("removed", gone, &was_gone);
	CHECK(shmget(key, 0, 0) == keyed, "its id by its key");
	for (int i = 0; i < 2; i++) {
		char *p = i ? b : a;
		CHECK(is_zero(p, 3 * PAGE) && filled(p + 3 * PAGE, 2 * PAGE, 1) && is_zero(p + 5 * PAGE, 3 * PAGE), "contents %d", i);
		CHECK(is_zero(p + 12 * PAGE, 28 * PAGE) && filled(p + 40 * PAGE, 96, 2), "contents %d, later", i);
	}
	CHECK(filled(c, 3 * PAGE, 3) && !*d, "contents of what was removed");
	CHECK(syscall(SYS_write, up[1], a + 9 * PAGE, 1) == -1 && errno == EFAULT, "protection of a part");
	CHECK(mprotect(b, PAGE, PROT_READ | PROT_WRITE) == -1 && errno == EACCES, "what is read-only stays so");
	a[20 * PAGE] = 55, c[5] = 66;
	CHECK(write(down[1], "g", 1) == 1 && read(up[0], &w, 1) == 1 && a[21 * PAGE] == 77, "what the child wrote");
	shmctl(keyed, IPC_RMID, 0);
	pass();
}
