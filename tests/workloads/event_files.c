/* eventfd, timerfd, signalfd. */
#include "workload.h"
#include <sys/eventfd.h>
#include <sys/signalfd.h>
#include <sys/timerfd.h>

int main(int argc, char **argv)
{
	begin(argc, argv);
	uint64_t v;
	int ev = eventfd(7, EFD_NONBLOCK), sem = eventfd(3, EFD_SEMAPHORE | EFD_CLOEXEC | EFD_NONBLOCK), max = eventfd(0, EFD_NONBLOCK);
	NEED(write(max, &(uint64_t){ UINT64_MAX - 1 }, 8) == 8);
	int periodic = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK), once = timerfd_create(CLOCK_BOOTTIME, 0), absolute = timerfd_create(CLOCK_REALTIME, TFD_CLOEXEC),
		expired = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK), idle = timerfd_create(CLOCK_REALTIME, TFD_NONBLOCK);
	NEED(!timerfd_settime(periodic, 0, &(struct itimerspec){ { 0, 25000000 }, { 0, 25000000 } }, 0));
	NEED(!timerfd_settime(once, 0, &(struct itimerspec){ { 0, 0 }, { 4000, 0 } }, 0));
	struct timespec now;
	clock_gettime(CLOCK_REALTIME, &now);
	NEED(!timerfd_settime(absolute, TFD_TIMER_ABSTIME, &(struct itimerspec){ { 11, 0 }, { now.tv_sec + 7000, 0 } }, 0));
	NEED(!timerfd_settime(expired, 0, &(struct itimerspec){ { 0, 0 }, { 0, 1000 } }, 0));
	usleep(2000);
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, SIGRTMIN + 2);
	sigaddset(&set, SIGTERM);
	NEED(!sigprocmask(SIG_BLOCK, &set, 0));
	int sfd = signalfd(-1, &set, SFD_NONBLOCK | SFD_CLOEXEC);
	NEED(!sigqueue(getpid(), SIGRTMIN + 2, (union sigval){ .sival_int = 88 }));
	ready();
	wait_asked();
	BREAK("value") NEED(write(ev, &(uint64_t){ 1 }, 8) == 8);
	BREAK("semaphore") NEED(read(sem, &v, 8) == 8);
	BREAK("max") NEED(read(max, &v, 8) == 8);
	BREAK("periodic") timerfd_settime(periodic, 0, &(struct itimerspec){ { 0, 0 }, { 0, 25000000 } }, 0);
	BREAK("once") timerfd_settime(once, 0, &(struct itimerspec){ { 0, 0 }, { 10, 0 } }, 0);
	BREAK("absolute") timerfd_settime(absolute, 0, &(struct itimerspec){ { 12, 0 }, { 7000, 0 } }, 0);
	BREAK("expired") NEED(read(expired, &v, 8) == 8);
	BREAK("signalfd") { sigdelset(&set, SIGRTMIN + 2); signalfd(sfd, &set, 0); }
	struct itimerspec it;
	CHECK(read(ev, &v, 8) == 8 && v == 7 && read(ev, &v, 8) < 0, "eventfd value %lu", v);
	CHECK(fcntl(sem, F_GETFD) == FD_CLOEXEC, "close-on-exec");
	for (int i = 0; i < 3; i++) CHECK(read(sem, &v, 8) == 8 && v == 1, "semaphore, value %lu", v);
	CHECK(read(sem, &v, 8) < 0, "the semaphore had more than 3");
	CHECK(write(max, &(uint64_t){ 1 }, 8) < 0 && read(max, &v, 8) == 8 && v == UINT64_MAX - 1, "eventfd at its limit");
	CHECK(!timerfd_gettime(periodic, &it) && it.it_interval.tv_nsec == 25000000, "interval");
	CHECK(read(periodic, &v, 8) == 8 || errno == EAGAIN, "periodic timer");
	CHECK(SOON(read(periodic, &v, 8) == 8) && SOON(read(periodic, &v, 8) == 8), "the periodic timer ticks");
	CHECK(!timerfd_gettime(once, &it) && it.it_value.tv_sec > 3900 && it.it_value.tv_sec <= 4000 && !it.it_interval.tv_sec, "single timer: %ld s left", it.it_value.tv_sec);
	CHECK(!timerfd_gettime(absolute, &it) && it.it_value.tv_sec > 6900 && it.it_value.tv_sec <= 7001 && it.it_interval.tv_sec == 11, "absolute timer: %ld s left", it.it_value.tv_sec);
	CHECK(read(expired, &v, 8) == 8 && v == 1, "the expiry that nobody has read");
	CHECK(!timerfd_gettime(idle, &it) && !it.it_value.tv_sec && !it.it_value.tv_nsec, "a timer that was never set");
	struct signalfd_siginfo si;
	CHECK(read(sfd, &si, sizeof si) == sizeof si && si.ssi_signo == (uint32_t)SIGRTMIN + 2 && si.ssi_int == 88, "signalfd");
	CHECK(read(sfd, &si, sizeof si) < 0 && errno == EAGAIN, "signalfd is empty");
	CHECK(!kill(getpid(), SIGTERM) && read(sfd, &si, sizeof si) == sizeof si && si.ssi_signo == SIGTERM, "signalfd's other signal");
	CHECK(fcntl(sfd, F_GETFD) == FD_CLOEXEC, "close-on-exec");
	pass();
}
