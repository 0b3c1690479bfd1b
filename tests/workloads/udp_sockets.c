/* UDP and UDP-Lite sockets of IPv4 and IPv6: names, connections, queues with their senders, memberships, filters. */
#include "workload.h"
#include <arpa/inet.h>
#include <linux/filter.h>
#include <net/if.h>
#include <netinet/in.h>
#include <netinet/ip.h>
#include <netinet/udp.h>
#include <poll.h>
#include <sys/socket.h>

typedef union { struct sockaddr any; struct sockaddr_in v4; struct sockaddr_in6 v6; } address;

static address addr(const char *ip, int port)
{
	address a = { 0 };
	if (inet_pton(AF_INET, ip, &a.v4.sin_addr) == 1) { a.v4.sin_family = AF_INET; a.v4.sin_port = htons(port); }
	else { NEED(inet_pton(AF_INET6, ip, &a.v6.sin6_addr) == 1); a.v6.sin6_family = AF_INET6; a.v6.sin6_port = htons(port); }
	return a;
}

static socklen_t size(address *a) { return a->any.sa_family == AF_INET ? sizeof a->v4 : sizeof a->v6; }

static address name(int fd)
{
	address a = { 0 };
	socklen_t len = sizeof a;
	NEED(!getsockname(fd, &a.any, &len));
	return a;
}

static address peer(int fd)
{
	address a = { 0 };
	socklen_t len = sizeof a;
	if (getpeername(fd, &a.any, &len)) memset(&a, 0, sizeof a);
	return a;
}

static int same(address a, address b) { return !memcmp(&a, &b, sizeof a); }

static int bound_by(int domain, int protocol, const char *ip)
{
	int fd = socket(domain, SOCK_DGRAM, protocol);
	address a = addr(ip, 0);
	NEED(fd >= 0 && !bind(fd, &a.any, size(&a)));
	return fd;
}

static int bound(const char *ip) { return bound_by(strchr(ip, ':') ? AF_INET6 : AF_INET, 0, ip); }

static int post(int fd, const char *text, address to) { return sendto(fd, text, strlen(text), 0, &to.any, size(&to)) == (ssize_t)strlen(text); }

/* The next datagram is this one, from there. */
static int gets(int fd, const char *text, address from)
{
	char b[256];
	address a = { 0 };
	socklen_t len = sizeof a;
	struct pollfd p = { fd, POLLIN, 0 };
	if (poll(&p, 1, 3000) != 1) return 0;
	ssize_t n = recvfrom(fd, b, sizeof b, MSG_DONTWAIT, &a.any, &len);
	return n == (ssize_t)strlen(text) && !memcmp(b, text, n) && same(a, from);
}

static int nothing(int fd) { char b; return recv(fd, &b, 1, MSG_DONTWAIT | MSG_PEEK) < 0 && errno == EAGAIN; }
static address at(address a, const char *ip) { return a.any.sa_family == AF_INET6 ? addr(ip, ntohs(a.v6.sin6_port)) : addr(ip, ntohs(a.v4.sin_port)); }

/* A datagram from an address that nobody here has. */
static void from_afar(int port)
{
	struct { struct iphdr ip; struct udphdr udp; char text[4]; } p = { .ip = { .version = 4, .ihl = 5, .ttl = 9, .protocol = IPPROTO_UDP, .saddr = inet_addr("198.51.100.7"), .daddr = htonl(INADDR_LOOPBACK) }, .udp = { .uh_sport = htons(5353), .uh_dport = htons(port), .uh_ulen = htons(12) }, .text = "afar" };
	int raw = socket(AF_INET, SOCK_RAW, IPPROTO_RAW);
	address to = addr("127.0.0.1", 0);
	NEED(raw >= 0 && sendto(raw, &p, sizeof p, 0, &to.any, size(&to)) == sizeof p && !close(raw));
}

/* A loopback interface has no route for IPv6 multicast, so it can only be asked. */
static int is_member(int fd, const char *group)
{
	struct group_filter f = { .gf_interface = if_nametoindex("lo") };
	address a = addr(group, 0);
	socklen_t len = sizeof f;
	memcpy(&f.gf_group, &a.v6, sizeof a.v6);
	return !getsockopt(fd, IPPROTO_IPV6, MCAST_MSFILTER, &f, &len);
}

int main(int argc, char **argv)
{
	begin(argc, argv);
	int one = 1;
	static char block[60000], back[60001];
	/* Named, with a queue from three senders, one of which has gone and one of which lives far away. */
	int a = bound("127.0.0.1"), sender = bound("127.0.0.1"), gone = bound("127.0.0.1");
	address to_a = name(a), from_gone = name(gone), from = name(sender);
	NEED(post(sender, "first", to_a) && post(gone, "last words", to_a) && post(sender, "third", to_a) && !close(gone));
	from_afar(ntohs(to_a.v4.sin_port));
	fill(block, sizeof block, 7);
	NEED(sendto(sender, block, sizeof block, 0, &to_a.any, size(&to_a)) == sizeof block);
	/* Connected to each other, queues both ways; what had come from others before that. */
	int c = bound("127.0.0.1"), d = bound("127.0.0.1");
	address nc = name(c), nd = name(d);
	NEED(post(sender, "stranger", nd));
	NEED(!connect(c, &nd.any, size(&nd)) && !connect(d, &nc.any, size(&nc)) && send(c, "to d", 4, 0) == 4 && send(d, "to c", 4, 0) == 4);
	/* Everywhere, with a look at where datagrams were sent to. */
	int any = bound("0.0.0.0");
	NEED(!setsockopt(any, IPPROTO_IP, IP_PKTINFO, &one, 4) && !setsockopt(any, IPPROTO_IP, IP_RECVTTL, &one, 4) && !setsockopt(any, IPPROTO_IP, IP_RECVTOS, &one, 4));
	NEED(!setsockopt(sender, IPPROTO_IP, IP_TTL, &(int){ 33 }, 4) && !setsockopt(sender, IPPROTO_IP, IP_TOS, &(int){ 8 }, 4));
	NEED(post(sender, "to nine", at(name(any), "127.0.0.9")));
	/* IPv6, v4-mapped, and both. */
	int six = bound("::1"), six_sender = bound("::1"), mapped = bound("::ffff:127.0.0.1"), both = bound("::");
	address n6 = name(six_sender), nboth = name(both), nmapped = name(mapped), nsix = name(six);
	NEED(post(six_sender, "six", nsix) && sendto(six_sender, "", 0, 0, &nsix.any, size(&nsix)) == 0 && post(six_sender, "more", nsix));
	NEED(post(sender, "mapped", at(nmapped, "127.0.0.1")) && post(sender, "v4 to both", at(nboth, "127.0.0.1")) && post(six_sender, "v6 to both", at(nboth, "::1")));
	/* One port for two, a queue for each. */
	int r[2] = { socket(AF_INET, SOCK_DGRAM, 0), socket(AF_INET, SOCK_DGRAM, 0) };
	NEED(!setsockopt(r[0], SOL_SOCKET, SO_REUSEPORT, &one, 4) && !setsockopt(r[1], SOL_SOCKET, SO_REUSEPORT, &one, 4));
	address nr = addr("127.0.0.1", 0);
	NEED(!bind(r[0], &nr.any, size(&nr)));
	nr = name(r[0]);
	NEED(!bind(r[1], &nr.any, size(&nr)));
	int speakers[16], count[2] = { 0, 0 };
	address names[2][16];
	for (int i = 0; i < 16; i++) {
		speakers[i] = bound("127.0.0.1");
		char text[8];
		sprintf(text, "%d", i);
		NEED(post(speakers[i], text, nr));
	}
	for (int i = 0; i < 2; i++) {
		char b[8];
		address from_whom = { 0 };
		socklen_t len = sizeof from_whom;
		int off = 0;
		NEED(!setsockopt(r[i], SOL_SOCKET, SO_PEEK_OFF, &off, 4));
		for (ssize_t n; (n = recvfrom(r[i], b, sizeof b - 1, MSG_PEEK | MSG_DONTWAIT, &from_whom.any, &len)) >= 0; memset(&from_whom, 0, sizeof from_whom)) names[i][count[i]++] = from_whom;
		NEED(!setsockopt(r[i], SOL_SOCKET, SO_PEEK_OFF, &(int){ -1 }, 4));
	}
	NEED(count[0] + count[1] == 16 && count[0] && count[1]);
	/* Bound to a device. */
	int device = socket(AF_INET, SOCK_DGRAM, 0);
	address ndevice = addr("127.0.0.1", 0);
	NEED(!setsockopt(device, SOL_SOCKET, SO_BINDTODEVICE, "lo", 2) && !bind(device, &ndevice.any, size(&ndevice)));
	ndevice = name(device);
	NEED(post(sender, "device", ndevice));
	/* Shut down one way. */
	int shut = bound("127.0.0.1");
	address nshut = name(shut);
	NEED(!connect(shut, &from.any, size(&from)) && !shutdown(shut, SHUT_WR));
	/* A filter that passes what begins with y, beyond the UDP header. */
	int filtered = bound("127.0.0.1");
	struct sock_filter code[] = { BPF_STMT(BPF_LD | BPF_B | BPF_ABS, 8), BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, 'y', 0, 1), BPF_STMT(BPF_RET | BPF_K, 0xffff), BPF_STMT(BPF_RET | BPF_K, 0) };
	address nfiltered = name(filtered);
	NEED(post(sender, "no, but before", nfiltered));
	NEED(!setsockopt(filtered, SOL_SOCKET, SO_ATTACH_FILTER, &(struct sock_fprog){ 4, code }, sizeof(struct sock_fprog)));
	/* Members of a group, through lo; one of them does not want to hear the sender. */
	int member = bound("0.0.0.0"), deaf = bound("0.0.0.0"), member6 = bound("::");
	struct ip_mreqn mreq = { .imr_multiaddr.s_addr = inet_addr("239.7.7.7"), .imr_ifindex = if_nametoindex("lo") };
	struct ip_mreq_source block_sender = { .imr_multiaddr = mreq.imr_multiaddr, .imr_interface.s_addr = htonl(INADDR_LOOPBACK), .imr_sourceaddr.s_addr = htonl(INADDR_LOOPBACK) };
	struct ipv6_mreq mreq6 = { .ipv6mr_interface = if_nametoindex("lo") };
	inet_pton(AF_INET6, "ff02::777", &mreq6.ipv6mr_multiaddr);
	NEED(!setsockopt(member, IPPROTO_IP, IP_ADD_MEMBERSHIP, &mreq, sizeof mreq) && !setsockopt(deaf, IPPROTO_IP, IP_ADD_MEMBERSHIP, &mreq, sizeof mreq) && !setsockopt(deaf, IPPROTO_IP, IP_BLOCK_SOURCE, &block_sender, sizeof block_sender));
	NEED(!setsockopt(member, IPPROTO_IP, IP_MULTICAST_ALL, &(int){ 0 }, 4) && !setsockopt(deaf, IPPROTO_IP, IP_MULTICAST_ALL, &(int){ 0 }, 4) && !setsockopt(member6, IPPROTO_IPV6, IPV6_ADD_MEMBERSHIP, &mreq6, sizeof mreq6));
	/* UDP-Lite, of which a kernel may know nothing. */
	int lite = socket(AF_INET, SOCK_DGRAM, 136), lite_sender = -1;
	address nlite = addr("127.0.0.1", 0), from_lite;
	if (lite >= 0) {
		lite_sender = bound_by(AF_INET, 136, "127.0.0.1");
		from_lite = name(lite_sender);
		NEED(!bind(lite, &nlite.any, size(&nlite)));
		nlite = name(lite);
		NEED(post(lite_sender, "lite", nlite));
	} else say("SKIP UDP-Lite: %s", strerror(errno));
	/* The end of an ESP tunnel, if the kernel knows such. */
	int esp = bound("127.0.0.1"), encap = 0;
	if (setsockopt(esp, IPPROTO_UDP, UDP_ENCAP, &(int){ UDP_ENCAP_ESPINUDP }, 4)) say("SKIP UDP_ENCAP: %s", strerror(errno)), esp = -1;
	/* Neither named nor connected. */
	int plain = socket(AF_INET6, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
	NEED(plain >= 0);
	ready();
	wait_asked();
	char b[256];
	BREAK("queue") NEED(recv(a, b, sizeof b, 0) == 5);
	BREAK("connection") NEED(!connect(c, &(struct sockaddr){ .sa_family = AF_UNSPEC }, sizeof(struct sockaddr)));
	BREAK("member") NEED(!setsockopt(member, IPPROTO_IP, IP_DROP_MEMBERSHIP, &mreq, sizeof mreq));
	BREAK("member6") NEED(!setsockopt(member6, IPPROTO_IPV6, IPV6_DROP_MEMBERSHIP, &mreq6, sizeof mreq6));
	BREAK("deaf") NEED(!setsockopt(deaf, IPPROTO_IP, IP_UNBLOCK_SOURCE, &block_sender, sizeof block_sender));
	BREAK("filter") NEED(!setsockopt(filtered, SOL_SOCKET, SO_DETACH_FILTER, &one, 4));
	BREAK("reuseport") NEED(recv(r[1], b, 8, 0) >= 0);
	BREAK("six") NEED(recv(six, b, 8, 0) == 3);
	BREAK("device") NEED(!setsockopt(device, SOL_SOCKET, SO_BINDTODEVICE, "", 0));
	BREAK("name") NEED(dup2(sender, any) == any);
	BREAK("shutdown") NEED(dup2(c, shut) == shut);
	CHECK(same(name(a), to_a) && same(name(sender), from) && same(name(six), nsix) && same(name(mapped), nmapped) && same(name(both), nboth), "names");
	CHECK(gets(a, "first", from) && gets(a, "last words", from_gone) && gets(a, "third", from), "the queue and its senders");
	CHECK(gets(a, "afar", addr("198.51.100.7", 5353)), "what came from afar");
	CHECK(recv(a, back, sizeof back, MSG_DONTWAIT) == sizeof block && !memcmp(back, block, sizeof block) && nothing(a), "the big datagram at the end");
	CHECK(same(peer(c), nd) && same(peer(d), nc) && same(name(c), nc) && same(name(d), nd), "connected");
	CHECK(gets(d, "stranger", from) && gets(d, "to d", nc) && gets(c, "to c", nd) && nothing(c) && nothing(d), "queues of connected sockets");
	CHECK(post(sender, "x", nd) && send(c, "again", 5, 0) == 5 && gets(d, "again", nc) && nothing(d), "only the peer is heard");
	struct msghdr m = { .msg_iov = &(struct iovec){ b, sizeof b }, .msg_iovlen = 1, .msg_control = (char[256]){ 0 }, .msg_controllen = 256 };
	CHECK(recvmsg(any, &m, MSG_DONTWAIT) == 7 && !memcmp(b, "to nine", 7), "what was sent to 127.0.0.9");
	int seen = 0;
	for (struct cmsghdr *h = CMSG_FIRSTHDR(&m); h; h = CMSG_NXTHDR(&m, h)) {
		struct in_pktinfo *info = (void *)CMSG_DATA(h);
		if (h->cmsg_type == IP_PKTINFO) seen += info->ipi_addr.s_addr == inet_addr("127.0.0.9") && info->ipi_ifindex == (int)if_nametoindex("lo");
		if (h->cmsg_type == IP_TTL) seen += *(int *)CMSG_DATA(h) == 33;
		if (h->cmsg_type == IP_TOS) seen += *CMSG_DATA(h) == 8;
	}
	CHECK(seen == 3, "%d of destination, TTL, TOS are right", seen);
	CHECK(gets(six, "six", n6) && gets(six, "", n6) && gets(six, "more", n6) && nothing(six), "IPv6 queue with an empty datagram");
	address from6 = at(from, "127.0.0.1"), mapped_from = addr("::ffff:127.0.0.1", ntohs(from6.v4.sin_port));
	CHECK(gets(mapped, "mapped", mapped_from) && nothing(mapped), "v4-mapped queue");
	CHECK(gets(both, "v4 to both", mapped_from) && gets(both, "v6 to both", n6) && nothing(both), "queue of both families");
	for (int i = 0; i < 2; i++) {
		CHECK(same(name(r[i]), nr), "the shared name");
		for (int j = 0; j < count[i]; j++) {
			address from_whom = { 0 };
			socklen_t len = sizeof from_whom;
			CHECK(recvfrom(r[i], b, 8, MSG_DONTWAIT, &from_whom.any, &len) > 0 && same(from_whom, names[i][j]), "datagram %d of socket %d at the shared port", j, i);
		}
		CHECK(nothing(r[i]), "nothing more at the shared port");
	}
	socklen_t len = 16;
	CHECK(gets(device, "device", from) && !getsockopt(device, SOL_SOCKET, SO_BINDTODEVICE, b, &len) && !strcmp(b, "lo"), "bound to a device");
	CHECK(same(name(shut), nshut) && send(shut, "x", 1, MSG_NOSIGNAL) < 0 && errno == EPIPE && post(sender, "y", nshut) && gets(shut, "y", from), "shut down one way");
	CHECK(gets(filtered, "no, but before", from) && post(sender, "xx", nfiltered) && post(sender, "yy", nfiltered) && gets(filtered, "yy", from) && nothing(filtered), "the filter");
	NEED(!setsockopt(sender, IPPROTO_IP, IP_MULTICAST_IF, &mreq, sizeof mreq));
	CHECK(post(sender, "all", at(name(member), "239.7.7.7")) && gets(member, "all", from) && nothing(member), "heard in the group");
	CHECK(post(sender, "all", at(name(deaf), "239.7.7.7")) && nothing(deaf), "not heard by who blocks the sender");
	CHECK(is_member(member6, "ff02::777") && !is_member(both, "ff02::777"), "member of the IPv6 group");
	if (lite >= 0) CHECK(gets(lite, "lite", from_lite) && post(lite_sender, "again", nlite) && gets(lite, "again", from_lite), "UDP-Lite");
	CHECK(esp < 0 || (!getsockopt(esp, IPPROTO_UDP, UDP_ENCAP, &encap, &(socklen_t){ 4 }) && encap == UDP_ENCAP_ESPINUDP), "UDP_ENCAP %d", encap);
	CHECK(fcntl(plain, F_GETFL) & O_NONBLOCK && fcntl(plain, F_GETFD) == FD_CLOEXEC && name(plain).v6.sin6_port == 0 && name(plain).any.sa_family == AF_INET6, "neither named nor connected");
	CHECK(post(sender, "done", to_a) && gets(a, "done", from) && nothing(a), "still works");
	pass();
}
