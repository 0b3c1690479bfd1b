/* Pseudo-terminals whose masters are in the tree: a session on one, with a job in its foreground, and ends without the other. */
#include "workload.h"
#include <poll.h>
#include <pty.h>
#include <sys/ioctl.h>
#include <termios.h>

static int number(int master) { int n = -1; return ioctl(master, TIOCGPTN, &n) ? -1 : n; }

static int new_master(void)
{
	int fd = posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC);
	NEED(fd >= 0);
	return fd;
}

/* Answers each line with what it finds of its terminal, in capitals. */
static void serve(void)
{
	char line[64], answer[64];
	for (;;) {
		ssize_t n = read(0, line, sizeof line - 1);
		if (n <= 0) _exit(0);
		line[n] = 0;
		int tty = open("/dev/tty", O_RDWR | O_CLOEXEC);
		n = snprintf(answer, sizeof answer, "%s%s%s%s\n", !strcmp(line, "how\n") ? "HEARD" : "LOST", tty >= 0 ? " TTY" : "",
			     tcgetpgrp(0) == getpgrp() ? " FRONT" : "", tcgetsid(0) == getsid(0) ? " SESSION" : "");
		if (tty >= 0) close(tty);
		if (write(1, answer, n) != n) _exit(1);
	}
}

/* What comes out of the master, until a line's end. */
static int answers(int master, const char *wanted)
{
	char got[256];
	size_t n = 0;
	if (write(master, "how\n", 4) != 4) return 0;
	while (n < sizeof got - 1) {
		struct pollfd p = { master, POLLIN, 0 };
		if (poll(&p, 1, 20000) != 1 || read(master, got + n, 1) != 1) return 0;
		if (got[n++] == '\n') break;
	}
	got[n] = 0;
	return !strcmp(got, wanted);
}

int main(int argc, char **argv)
{
	begin(argc, argv);
	struct winsize size = { 31, 97, 5, 6 }, w;
	struct termios t, t2;
	/* a session leader, and a job of it that has the foreground and is the one that reads */
	int master;
	pid_t child = forkpty(&master, 0, 0, &size);
	NEED(child >= 0);
	if (!child) {
		signal(SIGTTOU, SIG_IGN);
		pid_t job = fork();
		if (!job) {
			setpgid(0, 0);
			tcsetpgrp(0, getpid());
			serve();
		}
		setpgid(job, job);
		while (waitpid(job, 0, 0) < 0) {}
		_exit(0);
	}
	NEED(!tcgetattr(master, &t));
	t.c_lflag &= ~(ECHO | ISIG);
	t.c_oflag &= ~ONLCR;
	t.c_iflag |= IXANY;
	t.c_cc[VEOL2] = '!';
	t.c_cc[VINTR] = 5;
	cfsetspeed(&t, B9600);
	NEED(!tcsetattr(master, TCSANOW, &t));
	NEED(SOON(answers(master, "HEARD TTY FRONT SESSION\n")));

	/* a pair in packet mode whose ends are both ours, the slave three times open; exclusive */
	int own = new_master(), on = 1;
	NEED(!grantpt(own) && !unlockpt(own));
	int a = ioctl(own, TIOCGPTPEER, O_RDWR | O_NOCTTY), b = ioctl(own, TIOCGPTPEER, O_WRONLY | O_NOCTTY | O_NONBLOCK), c = dup(a);
	NEED(a >= 0 && b >= 0 && !ioctl(own, TIOCPKT, &on) && !ioctl(a, TIOCEXCL) && !fcntl(own, F_SETFL, O_NONBLOCK));
	struct stat before, after;
	NEED(!fchown(a, getuid() ? getuid() : 1234, -1) && !fstat(a, &before));
	/* never opened and still locked; open once and no more; a slave without its master */
	int fresh = new_master(), over = new_master(), lost = new_master();
	NEED(!unlockpt(over) && !unlockpt(lost));
	int gone = ioctl(over, TIOCGPTPEER, O_RDWR | O_NOCTTY), orphan = ioctl(lost, TIOCGPTPEER, O_RDWR | O_NOCTTY);
	NEED(gone >= 0 && orphan >= 0 && !close(gone) && !close(lost));
	int numbers[] = { number(master), number(own), number(fresh), number(over) };
	ready();
	wait_asked();

	BREAK("settings") { t.c_cc[VINTR] = 3; }
	BREAK("size") size.ws_col++;
	BREAK("foreground") { NEED(kill(child, SIGSTOP) == 0); close(master); master = open("/dev/null", O_RDWR); }
	BREAK("packets") { int off = 0; ioctl(own, TIOCPKT, &off); }
	BREAK("lock") unlockpt(fresh);
	BREAK("shared") { dup2(a, b); }
	BREAK("hung up") { dup2(fresh, over); }
	BREAK("orphan") { dup2(a, orphan); }
	BREAK("exclusive") ioctl(a, TIOCNXCL);
	CHECK(answers(master, "HEARD TTY FRONT SESSION\n"), "who reads from the terminal has it, and the foreground");
	CHECK(number(master) == numbers[0] && number(own) == numbers[1] && number(fresh) == numbers[2] && number(over) == numbers[3],
	      "numbers %d %d %d %d", number(master), number(own), number(fresh), number(over));
	CHECK(!tcgetattr(master, &t2) && t2.c_lflag == t.c_lflag && t2.c_oflag == t.c_oflag && t2.c_iflag == t.c_iflag && t2.c_cflag == t.c_cflag
		      && !memcmp(t2.c_cc, t.c_cc, 19) && cfgetospeed(&t2) == B9600, "settings");
	CHECK(!ioctl(master, TIOCGWINSZ, &w) && !memcmp(&w, &size, sizeof w), "size %dx%d", w.ws_row, w.ws_col);
	char got[8];
	CHECK(read(own, got, sizeof got) < 0 && errno == EAGAIN, "nothing has happened on the terminal in packet mode");
	CHECK(write(b, "x", 1) == 1 && SOON(read(own, got, sizeof got) == 2) && got[0] == 0 && got[1] == 'x', "packet mode");
	CHECK(fcntl(b, F_GETFL) & O_NONBLOCK && !(fcntl(a, F_GETFL) & O_NONBLOCK) && !fcntl(c, F_SETFL, O_NONBLOCK) && fcntl(a, F_GETFL) & O_NONBLOCK, "open files");
	CHECK(!ioctl(a, TIOCGEXCL, &on) && on, "exclusive");
	CHECK(!fstat(a, &after) && after.st_uid == before.st_uid && after.st_gid == before.st_gid, "owner %d", after.st_uid);
	CHECK(!ioctl(fresh, TIOCGPTLCK, &on) && on, "locked");
	struct pollfd p[] = { { fresh, POLLIN, 0 }, { over, POLLIN, 0 } };
	CHECK(poll(p, 2, 0) >= 1 && !(p[0].revents & POLLHUP) && p[1].revents & POLLHUP, "the end of a slave, %#x %#x", p[0].revents, p[1].revents);
	CHECK(read(over, got, 1) < 0 && errno == EIO, "reading behind the end");
	CHECK(tcgetattr(orphan, &t2) < 0 && errno == EIO && read(orphan, got, 1) == 0, "a slave whose master is gone");
	pass();
}
