/* A program with the whole terminal for itself, like an editor: single keys without echo, and it draws again when
 * the window changes. It logs each key, its size when it draws, and that it goes on after a stop. */
#include "workload.h"
#include <sys/ioctl.h>
#include <termios.h>

static volatile sig_atomic_t changed = 1, continued;
static void on_signal(int s) { if (s == SIGWINCH) changed = 1; else continued = 1; }

int main(int argc, char **argv)
{
	if (argc < 2) return 2;
	int fd = open(argv[1], O_WRONLY | O_CREAT | O_APPEND, 0666);
	if (fd < 0 || dup3(fd, LOG_FD, O_CLOEXEC) < 0) return 2;
	close(fd);
	struct sigaction sa = { .sa_handler = on_signal };
	NEED(!sigaction(SIGWINCH, &sa, 0) && !sigaction(SIGCONT, &sa, 0));
	struct termios saved, raw;
	NEED(!tcgetattr(0, &saved));
	raw = saved;
	raw.c_lflag &= ~(ICANON | ECHO);
	raw.c_cc[VMIN] = 1;
	NEED(!tcsetattr(0, TCSADRAIN, &raw));
	ready();
	for (;;) {
		char key;
		if (changed) {
			struct winsize w;
			changed = 0;
			NEED(!ioctl(0, TIOCGWINSZ, &w));
			say("drawn %dx%d", w.ws_row, w.ws_col);
		}
		if (continued) {
			continued = 0;
			NEED(!tcsetattr(0, TCSADRAIN, &raw));
			say("continued in the %s", tcgetpgrp(0) == getpgrp() ? "foreground" : "background");
		}
		ssize_t n = read(0, &key, 1);
		if (n < 0 && errno == EINTR) continue;
		NEED(n == 1);
		say("key %c", key);
		if (key == 'q') break;
	}
	tcsetattr(0, TCSADRAIN, &saved);
	return 42;
}
