/* A program on a terminal, as a job of a shell: its standard descriptors are the terminal, which is not its own. */
#include "workload.h"
#include <sys/ioctl.h>
#include <termios.h>

int main(int argc, char **argv)
{
	if (argc < 2) return 2;
	int fd = open(argv[1], O_WRONLY | O_CREAT | O_APPEND, 0666);
	if (fd < 0 || dup3(fd, LOG_FD, O_CLOEXEC) < 0) return 2;
	close(fd);
	wl_break = argc > 2 ? argv[2] : 0;
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	sigprocmask(SIG_BLOCK, &set, 0);
	NEED(isatty(0) && isatty(1) && isatty(2));
	struct winsize w, w2;
	struct termios t, t2;
	NEED(!ioctl(0, TIOCGWINSZ, &w) && !tcgetattr(0, &t));
	const int seen = ~0100000; /* all but O_LARGEFILE, which nobody can set or see the effect of */
	int flags = fcntl(1, F_GETFL) & seen;
	ready();
	wait_asked();
	BREAK("closed") close(1);
	BREAK("echo") { t.c_lflag ^= ECHO; }
	BREAK("size") w.ws_row++;
	CHECK(isatty(0) && isatty(1) && isatty(2), "the standard descriptors are a terminal");
	CHECK(!ioctl(0, TIOCGWINSZ, &w2) && w2.ws_row == w.ws_row && w2.ws_col == w.ws_col, "window size %dx%d", w2.ws_row, w2.ws_col);
	CHECK(!tcgetattr(0, &t2) && t2.c_lflag == t.c_lflag && t2.c_iflag == t.c_iflag, "terminal settings");
	CHECK((fcntl(1, F_GETFL) & seen) == flags, "flags %#o became %#o", flags, fcntl(1, F_GETFL));
	CHECK(write(1, "hello terminal\r\n", 16) == 16, "output");
	pass();
}
