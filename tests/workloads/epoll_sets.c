/* epoll: what is watched with which events and data, edge triggers, a duplicate, a nested set, one shared with a child. */
#include "workload.h"
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>

static int has(int ep, uint64_t data, uint32_t events)
{
	struct epoll_event e[16];
	int n = epoll_wait(ep, e, 16, 0);
	for (int i = 0; i < n; i++) if (e[i].data.u64 == data) return e[i].events == events;
	return 0;
}

static void add(int ep, int fd, uint32_t events, uint64_t data)
{
	struct epoll_event e = { .events = events, .data.u64 = data };
	NEED(!epoll_ctl(ep, EPOLL_CTL_ADD, fd, &e));
}

int main(int argc, char **argv)
{
	begin(argc, argv);
	int p[2], sp[2], ev = eventfd(1, 0), quiet = eventfd(0, 0), ep = epoll_create1(EPOLL_CLOEXEC), outer = epoll_create1(0), shared = epoll_create1(0);
	uint64_t v;
	NEED(!pipe(p) && !socketpair(AF_UNIX, SOCK_STREAM, 0, sp));
	int twin = dup(ev);
	add(ep, ev, EPOLLIN, 0x1111111122222222);
	add(ep, quiet, EPOLLIN | EPOLLOUT | EPOLLET, 2);
	add(ep, p[0], EPOLLIN | EPOLLRDHUP | EPOLLPRI, 3);
	add(ep, sp[0], EPOLLIN | EPOLLONESHOT, 4);
	add(ep, twin, EPOLLIN, 5);
	add(outer, ep, EPOLLIN, 6);
	add(shared, p[0], EPOLLIN, 7);
	pid_t child = fork();
	if (!child) { char c; for (;;) if (read(sp[1], &c, 1) == 1) { int ok = has(shared, 7, EPOLLIN); NEED(write(sp[1], ok ? "y" : "n", 1) == 1); } }
	ready();
	wait_asked();
	BREAK("missing") epoll_ctl(ep, EPOLL_CTL_DEL, ev, 0);
	BREAK("data") { struct epoll_event e = { .events = EPOLLIN, .data.u64 = 1 }; epoll_ctl(ep, EPOLL_CTL_MOD, ev, &e); }
	BREAK("nested") epoll_ctl(outer, EPOLL_CTL_DEL, ep, 0);
	BREAK("twin") epoll_ctl(ep, EPOLL_CTL_DEL, twin, 0);
	BREAK("oneshot") { struct epoll_event e = { .events = EPOLLIN, .data.u64 = 4 }; epoll_ctl(ep, EPOLL_CTL_MOD, sp[0], &e); }
	BREAK("shared") { epoll_ctl(shared, EPOLL_CTL_DEL, p[0], 0); }
	CHECK(has(ep, 0x1111111122222222, EPOLLIN) && has(ep, 5, EPOLLIN), "a ready eventfd and its duplicate");
	CHECK(has(outer, 6, EPOLLIN), "the nested set is ready");
	CHECK(!has(ep, 3, EPOLLIN) && !has(ep, 4, EPOLLIN), "nothing else is ready");
	CHECK(write(quiet, &(uint64_t){ 1 }, 8) == 8 && has(ep, 2, EPOLLIN | EPOLLOUT) && !has(ep, 2, EPOLLIN | EPOLLOUT), "edge triggered: once");
	CHECK(write(p[1], "x", 1) == 1 && has(ep, 3, EPOLLIN) && has(ep, 3, EPOLLIN), "level triggered: again");
	char c = 0;
	CHECK(write(sp[0], "?", 1) == 1 && SOON(recv(sp[0], &c, 1, MSG_PEEK | MSG_DONTWAIT) == 1), "child answers");
	CHECK(has(ep, 4, EPOLLIN), "oneshot, first");
	CHECK(!has(ep, 4, EPOLLIN), "oneshot, not again");
	CHECK(read(sp[0], &c, 1) == 1 && c == 'y', "the set shared with the child");
	CHECK(read(ev, &v, 8) == 8 && !has(ep, 0x1111111122222222, EPOLLIN), "no longer ready");
	struct epoll_event e;
	CHECK(epoll_ctl(ep, EPOLL_CTL_ADD, ev, &e) < 0 && errno == EEXIST, "it is still watched");
	CHECK(fcntl(ep, F_GETFD) == FD_CLOEXEC, "close-on-exec");
	pass();
}
