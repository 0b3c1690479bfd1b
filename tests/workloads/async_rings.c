/* Memory that the kernel shares with a program for asynchronous I/O (io_setup(2), io_uring_setup(2)): refused, each by name. */
#include "workload.h"
#include <linux/aio_abi.h>
#include <linux/io_uring.h>

int main(int argc, char **argv)
{
	begin(argc, argv);
	/* One of them, as argv[3] says. */
	int uring = argc > 3 && !strcmp(argv[3], "io_uring");
	aio_context_t aio = 0;
	struct io_uring_params params = { 0 };
	int fd = -1;
	char *sq = MAP_FAILED;
	if (uring) {
		fd = syscall(SYS_io_uring_setup, 4, &params);
		NEED(fd >= 0 && (sq = mmap(0, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, IORING_OFF_SQ_RING)) != MAP_FAILED);
	} else
		NEED(!syscall(SYS_io_setup, 8, &aio));
	ready();
	wait_asked();
	if (uring) {
		CHECK(syscall(SYS_io_uring_enter, fd, 0, 0, 0, 0, 0) == 0 && *(unsigned *)(sq + params.sq_off.ring_entries) == 4, "the ring");
	} else {
		char byte;
		int zero = open("/dev/zero", O_RDONLY);
		struct iocb read = { .aio_lio_opcode = IOCB_CMD_PREAD, .aio_fildes = zero, .aio_buf = (uintptr_t)&byte, .aio_nbytes = 1 }, *list = &read;
		struct io_event done;
		CHECK(syscall(SYS_io_submit, aio, 1, &list) == 1 && syscall(SYS_io_getevents, aio, 1, 1, &done, 0) == 1 && done.res == 1, "the ring");
	}
	pass();
}
