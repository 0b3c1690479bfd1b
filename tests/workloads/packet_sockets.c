/* Packet sockets on the loopback interface: bound, filtered, members, in a fanout group, with a ring. */
#include "workload.h"
#include <arpa/inet.h>
#include <linux/filter.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <net/if.h>
#include <poll.h>
#include <sys/socket.h>

enum { OURS = 0x9abc }; /* nobody's; 0x88b5 is that of restores of rings, which other tests may be about */

static int lo;

static int packet(int type, int protocol, int index)
{
	int fd = socket(AF_PACKET, type, 0);
	struct sockaddr_ll a = { .sll_family = AF_PACKET, .sll_protocol = htons(protocol), .sll_ifindex = index };
	NEED(fd >= 0 && !bind(fd, (void *)&a, sizeof a));
	return fd;
}

static struct sockaddr_ll name(int fd)
{
	struct sockaddr_ll a = { 0 };
	socklen_t len = sizeof a;
	NEED(!getsockname(fd, (void *)&a, &len));
	return a;
}

static int option(int fd, int number)
{
	int v = -1;
	getsockopt(fd, SOL_PACKET, number, &v, &(socklen_t){ 4 });
	return v;
}

/* Whether the interface listens to the address that is made of our pid. */
static int listening(void)
{
	char text[1 << 14], address[16];
	snprintf(address, sizeof address, "01005e%06x", getpid() & 0x7fffff);
	return slurp("/proc/net/dev_mcast", text, sizeof text) > 0 && strstr(text, address);
}

/* A frame of ours to nobody; `mark` says whose and which. */
static int post(int fd, int mark)
{
	struct { struct ethhdr eth; int pid, mark; } __attribute__((packed)) frame = { { .h_proto = htons(OURS) }, getpid(), mark };
	return send(fd, &frame, sizeof frame, 0) == sizeof frame;
}

/* Whether that frame is the next of our own. */
static int hears(int fd, int mark, int header)
{
	char b[256];
	struct pollfd p = { fd, POLLIN, 0 };
	while (poll(&p, 1, 3000) == 1) {
		int pid, m, n = recv(fd, b, sizeof b, MSG_DONTWAIT);
		if (n < header + 8) continue;
		memcpy(&pid, b + header, 4);
		memcpy(&m, b + header + 4, 4);
		if (pid == getpid()) return m == mark;
	}
	return 0;
}

int main(int argc, char **argv)
{
	begin(argc, argv);
	lo = if_nametoindex("lo");
	NEED(lo > 0);
	/* Only our own frames that are not odd, and once each (lo shows what is sent and what comes). */
	struct sock_filter code[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, SKF_AD_OFF + SKF_AD_PKTTYPE), BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, PACKET_OUTGOING, 4, 0),
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, 14), BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, ntohl(getpid()), 0, 2),
		BPF_STMT(BPF_LD | BPF_B | BPF_ABS, 18), BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, 1, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, 0), BPF_STMT(BPF_RET | BPF_K, 0xffff) };
	int sender = packet(SOCK_RAW, 0, lo), filtered = socket(AF_PACKET, SOCK_RAW, 0), cooked = packet(SOCK_DGRAM, 0x88b6, lo), deaf = socket(AF_PACKET, SOCK_DGRAM, 0);
	NEED(filtered >= 0 && deaf >= 0 && !setsockopt(filtered, SOL_SOCKET, SO_ATTACH_FILTER, &(struct sock_fprog){ 8, code }, sizeof(struct sock_fprog)));
	struct sockaddr_ll ours = { .sll_family = AF_PACKET, .sll_protocol = htons(OURS), .sll_ifindex = lo };
	NEED(!bind(filtered, (void *)&ours, sizeof ours) && !setsockopt(filtered, SOL_PACKET, PACKET_AUXDATA, &(int){ 1 }, 4));
	struct packet_mreq many = { .mr_ifindex = lo, .mr_type = PACKET_MR_MULTICAST, .mr_alen = 6, .mr_address = { 1, 0, 0x5e, getpid() >> 16 & 0x7f, getpid() >> 8, getpid() } };
	NEED(!setsockopt(cooked, SOL_PACKET, PACKET_ADD_MEMBERSHIP, &many, sizeof many) && !setsockopt(cooked, SOL_PACKET, PACKET_ADD_MEMBERSHIP, &many, sizeof many));
	NEED(!setsockopt(cooked, SOL_PACKET, PACKET_ORIGDEV, &(int){ 1 }, 4) && !setsockopt(cooked, SOL_PACKET, PACKET_COPY_THRESH, &(int){ 77 }, 4));
	/* Two that share what comes. */
	int fan[2] = { packet(SOCK_RAW, 0x88b7, lo), packet(SOCK_RAW, 0x88b7, lo) }, group = (getpid() & 0xffff) | (PACKET_FANOUT_LB | PACKET_FANOUT_FLAG_DEFRAG) << 16;
	NEED(!setsockopt(fan[0], SOL_PACKET, PACKET_FANOUT, &group, 4) && !setsockopt(fan[1], SOL_PACKET, PACKET_FANOUT, &group, 4));
	group = option(fan[0], PACKET_FANOUT);
	/* Rings of three versions, which nobody has mapped. */
	int rings[3];
	struct tpacket_req3 req = { 4096, 4, 2048, 8, 60, 0, 0 };
	for (int v = 0; v < 3; v++) {
		rings[v] = packet(SOCK_RAW, 0x88b8, lo);
		NEED(!setsockopt(rings[v], SOL_PACKET, PACKET_VERSION, &v, 4) && !setsockopt(rings[v], SOL_PACKET, PACKET_RESERVE, &(int){ 16 * v }, 4));
		NEED(!setsockopt(rings[v], SOL_PACKET, PACKET_RX_RING, &req, v == 2 ? sizeof req : sizeof(struct tpacket_req)));
	}
	struct tpacket_req tx = { 8192, 2, 2048, 8 };
	NEED(!setsockopt(rings[1], SOL_PACKET, PACKET_TX_RING, &tx, sizeof tx));
	ready();
	wait_asked();
	BREAK("filter") NEED(!setsockopt(filtered, SOL_SOCKET, SO_DETACH_FILTER, &(int){ 1 }, 4));
	BREAK("bound") NEED(!bind(filtered, (void *)&(struct sockaddr_ll){ .sll_family = AF_PACKET, .sll_protocol = htons(0x88b9), .sll_ifindex = lo }, sizeof ours));
	BREAK("member") NEED(!setsockopt(cooked, SOL_PACKET, PACKET_DROP_MEMBERSHIP, &many, sizeof many));
	BREAK("fanout") NEED(dup2(filtered, fan[1]) == fan[1]);
	BREAK("ring") NEED(dup2(fan[0], rings[2]) == rings[2]);
	BREAK("option") NEED(!setsockopt(cooked, SOL_PACKET, PACKET_ORIGDEV, &(int){ 0 }, 4));
	CHECK(name(filtered).sll_ifindex == lo && name(filtered).sll_protocol == htons(OURS) && name(cooked).sll_protocol == htons(0x88b6) && !name(deaf).sll_protocol && !name(deaf).sll_ifindex, "names");
	CHECK(post(sender, 1) && post(sender, 2) && hears(filtered, 2, 14) && post(sender, 4) && hears(filtered, 4, 14), "a filter that passes even frames");
	CHECK(option(filtered, PACKET_AUXDATA) == 1 && option(cooked, PACKET_ORIGDEV) == 1 && option(cooked, PACKET_COPY_THRESH) == 77, "options");
	CHECK(listening() && !setsockopt(cooked, SOL_PACKET, PACKET_DROP_MEMBERSHIP, &many, sizeof many) && listening() && !setsockopt(cooked, SOL_PACKET, PACKET_DROP_MEMBERSHIP, &many, sizeof many) && !listening(), "a member, twice");
	CHECK(option(fan[0], PACKET_FANOUT) == group && option(fan[1], PACKET_FANOUT) == group, "fanout %x %x", option(fan[0], PACKET_FANOUT), option(fan[1], PACKET_FANOUT));
	for (int v = 0; v < 3; v++) {
		CHECK(option(rings[v], PACKET_VERSION) == v && option(rings[v], PACKET_RESERVE) == 16 * v, "version and reserve of ring %d", v);
		/* No more than there is can be mapped, and no less. */
		size_t size = 4 * 4096 + (v == 1 ? 2 * 8192 : 0);
		CHECK(mmap(0, size + 4096, PROT_READ, MAP_SHARED, rings[v], 0) == MAP_FAILED, "ring %d is longer", v);
		void *p = mmap(0, size, PROT_READ | PROT_WRITE, MAP_SHARED, rings[v], 0);
		CHECK(p != MAP_FAILED && !munmap(p, size), "ring %d is shorter", v);
	}
	pass();
}
