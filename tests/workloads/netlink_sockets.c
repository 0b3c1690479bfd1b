/* Netlink sockets: ports, groups, a peer, options; the kernel and another socket answer as before. */
#include "workload.h"
#include <linux/netlink.h>
#include <linux/rtnetlink.h>
#include <poll.h>
#include <sys/socket.h>

static struct sockaddr_nl name(int fd, int peer)
{
	struct sockaddr_nl a = { 0 };
	socklen_t len = sizeof a;
	NEED(!(peer ? getpeername : getsockname)(fd, (void *)&a, &len));
	return a;
}

static int member(int fd, int group)
{
	unsigned words[32] = { 0 };
	socklen_t len = sizeof words;
	return !getsockopt(fd, SOL_NETLINK, NETLINK_LIST_MEMBERSHIPS, words, &len) && words[(group - 1) / 32] >> (group - 1) % 32 & 1;
}

/* Asks for all links and reads up to the end of the answer. */
static int links(int fd)
{
	struct { struct nlmsghdr h; struct rtgenmsg g; } ask = { { NLMSG_LENGTH(sizeof(struct rtgenmsg)), RTM_GETLINK, NLM_F_REQUEST | NLM_F_DUMP, 7, 0 }, { AF_UNSPEC } };
	static char b[1 << 16];
	int found = 0;
	if (send(fd, &ask, sizeof ask, 0) != sizeof ask) return -1;
	for (;;) {
		struct pollfd p = { fd, POLLIN, 0 };
		int n = poll(&p, 1, 3000) == 1 ? recv(fd, b, sizeof b, 0) : -1;
		if (n <= 0) return -1;
		for (struct nlmsghdr *h = (void *)b; NLMSG_OK(h, (unsigned)n); h = NLMSG_NEXT(h, n)) {
			if (h->nlmsg_type == NLMSG_DONE) return found;
			found += h->nlmsg_type == RTM_NEWLINK;
		}
	}
}

static int hears(int fd, const char *text)
{
	char b[64];
	struct pollfd p = { fd, POLLIN, 0 };
	return poll(&p, 1, 3000) == 1 && recv(fd, b, sizeof b, MSG_DONTWAIT) == (ssize_t)strlen(text) && !memcmp(b, text, strlen(text));
}

int main(int argc, char **argv)
{
	begin(argc, argv);
	int route = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE), second = socket(AF_NETLINK, SOCK_DGRAM | SOCK_NONBLOCK, NETLINK_ROUTE);
	int plain = socket(AF_NETLINK, SOCK_RAW, NETLINK_GENERIC), hearer = socket(AF_NETLINK, SOCK_RAW, NETLINK_USERSOCK), speaker = socket(AF_NETLINK, SOCK_DGRAM, NETLINK_USERSOCK), second_speaker = socket(AF_NETLINK, SOCK_DGRAM, NETLINK_USERSOCK);
	struct sockaddr_nl a = { .nl_family = AF_NETLINK, .nl_groups = RTMGRP_LINK | RTMGRP_IPV4_ROUTE }, kernel = { .nl_family = AF_NETLINK }, any = kernel;
	NEED(route >= 0 && !bind(route, (void *)&a, sizeof a) && !setsockopt(route, SOL_NETLINK, NETLINK_EXT_ACK, &(int){ 1 }, 4));
	NEED(!setsockopt(route, SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, &(int){ 34 }, 4));
	NEED(second >= 0 && !bind(second, (void *)&kernel, sizeof kernel));
	NEED(plain >= 0);
	/* A group that many may be members of: the text tells whose it is. */
	NEED(hearer >= 0 && !bind(hearer, (void *)&any, sizeof any) && !setsockopt(hearer, SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, &(int){ 1 + getpid() % 32 }, 4));
	struct sockaddr_nl group = { .nl_family = AF_NETLINK, .nl_pid = name(hearer, 0).nl_pid, .nl_groups = 1u << getpid() % 32 };
	NEED(speaker >= 0 && !connect(speaker, (void *)&group, sizeof group));
	struct sockaddr_nl before[4] = { name(route, 0), name(second, 0), name(hearer, 0), name(speaker, 1) };
	NEED(before[0].nl_pid && before[1].nl_pid && before[0].nl_pid != before[1].nl_pid);
	int count = links(second);
	NEED(count >= 1);
	ready();
	wait_asked();
	BREAK("port") NEED(dup2(second, route) == route);
	BREAK("group") NEED(!setsockopt(route, SOL_NETLINK, NETLINK_DROP_MEMBERSHIP, &(int){ RTNLGRP_LINK }, 4));
	BREAK("high") NEED(!setsockopt(route, SOL_NETLINK, NETLINK_DROP_MEMBERSHIP, &(int){ 34 }, 4));
	BREAK("option") NEED(!setsockopt(route, SOL_NETLINK, NETLINK_EXT_ACK, &(int){ 0 }, 4));
	BREAK("peer") NEED(!connect(speaker, (void *)&(struct sockaddr_nl){ .nl_family = AF_NETLINK, .nl_pid = before[1].nl_pid }, sizeof any));
	BREAK("type") NEED(dup2(route, speaker) == speaker);
	struct sockaddr_nl now[4] = { name(route, 0), name(second, 0), name(hearer, 0), name(speaker, 1) };
	for (int i = 0; i < 4; i++) CHECK(now[i].nl_pid == before[i].nl_pid && now[i].nl_groups == before[i].nl_groups, "name %d: %u %x, was %u %x", i, now[i].nl_pid, now[i].nl_groups, before[i].nl_pid, before[i].nl_groups);
	CHECK(member(route, RTNLGRP_LINK) && member(route, 34) && !member(second, RTNLGRP_LINK), "groups");
	int v = 0;
	CHECK(!getsockopt(route, SOL_NETLINK, NETLINK_EXT_ACK, &v, &(socklen_t){ 4 }) && v == 1, "option");
	CHECK(!getsockopt(speaker, SOL_SOCKET, SO_TYPE, &v, &(socklen_t){ 4 }) && v == SOCK_DGRAM && fcntl(second, F_GETFL) & O_NONBLOCK, "type and flags");
	CHECK(!name(plain, 0).nl_pid, "not bound");
	CHECK(links(second) == count, "%d links", count);
	CHECK(send(speaker, "to one", 6, 0) == 6 && hears(hearer, "to one"), "a message to the peer");
	/* It goes to the group, and then to the kernel, which does not want it. */
	sendto(second_speaker, "to all", 6, 0, (void *)&(struct sockaddr_nl){ .nl_family = AF_NETLINK, .nl_groups = group.nl_groups }, sizeof group);
	CHECK(hears(hearer, "to all"), "a message to the group");
	pass();
}
