/* Every option that getsockopt gives, on sockets of every kind: whatever can be changed is changed, then all of them are
 * read, and read again when asked. */
#include "workload.h"
#include <arpa/inet.h>
#include <linux/filter.h>
#include <linux/if_ether.h>
#include <linux/netlink.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>

enum { LEVELS = 10, NUMBERS = 128, MOST = 20 };
static const int levels[LEVELS] = { SOL_SOCKET, IPPROTO_IP, IPPROTO_IPV6, IPPROTO_TCP, IPPROTO_UDP, 136 /* UDP-Lite */, 58 /* ICMPv6 */, 255 /* raw */, 263 /* packet */, 270 /* netlink */ };
static const struct { const char *name; int domain, type, protocol, listen; } kinds[] = {
	{ "unix", AF_UNIX, SOCK_DGRAM, 0, 0 },
	{ "tcp", AF_INET, SOCK_STREAM, 0, 0 },
	{ "tcp6", AF_INET6, SOCK_STREAM, 0, 0 },
	{ "tcp listener", AF_INET, SOCK_STREAM, 0, 1 },
	{ "udp", AF_INET, SOCK_DGRAM, 0, 0 },
	{ "udp6", AF_INET6, SOCK_DGRAM, 0, 0 },
	{ "udplite", AF_INET, SOCK_DGRAM, 136, 0 },
	{ "udplite6", AF_INET6, SOCK_DGRAM, 136, 0 },
	{ "raw", AF_INET, SOCK_RAW, IPPROTO_ICMP, 0 },
	{ "raw6", AF_INET6, SOCK_RAW, IPPROTO_ICMPV6, 0 },
	{ "raw6 of 253", AF_INET6, SOCK_RAW, 253, 0 },
	{ "ping", AF_INET, SOCK_DGRAM, IPPROTO_ICMP, 0 },
	{ "ping6", AF_INET6, SOCK_DGRAM, IPPROTO_ICMPV6, 0 },
	{ "netlink", AF_NETLINK, SOCK_RAW, NETLINK_ROUTE, 0 },
	{ "packet", AF_PACKET, SOCK_RAW, 0, 0 },
};
enum { KINDS = sizeof kinds / sizeof *kinds };
struct value { int len; unsigned char bytes[64]; };
static struct value before[KINDS][LEVELS][NUMBERS];
static int fds[KINDS];

/* Not options but reports, what changes by itself, and what a change of would get in the way of the rest. */
static int passed_over(int level, int number)
{
	static const short names[] = { SO_ERROR, SO_MEMINFO, SO_COOKIE, SO_INCOMING_CPU, SO_INCOMING_NAPI_ID, 71 /* NETNS_COOKIE */, SO_PEERNAME, SO_PEERCRED, 59 /* PEERGROUPS */, SO_PEERSEC, 77 /* PEERPIDFD */, 62 /* BINDTOIFINDEX */, SO_BPF_EXTENSIONS };
	if (level == SOL_SOCKET)
		for (unsigned i = 0; i < sizeof names / sizeof *names; i++) if (names[i] == number) return 1;
	if (level == IPPROTO_TCP && (number == TCP_INFO || number == TCP_QUICKACK || number == TCP_REPAIR || number == TCP_CC_INFO || number == TCP_TIMESTAMP || number == TCP_QUEUE_SEQ || number == TCP_REPAIR_QUEUE || number == 29 || number == 35 || number == 28 || number == 38 || number == 40 || number == 41 || number == 42)) return 1;
	if (level == 263 && number == 6) return 1; /* PACKET_STATISTICS */
	return 0;
}

static struct value get(int fd, int level, int number)
{
	struct value v = { .bytes = { 0 } };
	socklen_t len = MOST;
	if (level == SOL_SOCKET && number == SO_ATTACH_FILTER) len = 8; /* in instructions */
	v.len = getsockopt(fd, level, number, v.bytes, &len) ? -1 : (int)len;
	return v;
}

static void change(int fd, int level, int number)
{
	static const short untouched[] = { SO_SNDBUF, SO_RCVBUF, SO_LOCK_FILTER, SO_REUSEADDR, 73 /* RESERVE_MEM */ };
	if (passed_over(level, number)) return;
	if (level == SOL_SOCKET)
		for (unsigned i = 0; i < sizeof untouched / sizeof *untouched; i++) if (untouched[i] == number) return;
	if (level == IPPROTO_UDP && (number == 1 || number == 100)) return;
	if (level == IPPROTO_IPV6 && number == 1) return; /* ADDRFORM makes another socket of it */
	int type = 0;
	NEED(!getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &(socklen_t){ 4 }));
	if (type == SOCK_STREAM && ((level == IPPROTO_IP && number == IP_MULTICAST_LOOP) || (level == IPPROTO_IPV6 && number == IPV6_MULTICAST_LOOP))) return; /* means nothing there */
	if (level == 263 && (number == 5 || number == 13 || number == 18)) return; /* rings, fanout: elsewhere */
	struct value v = get(fd, level, number);
	int now;
	if (v.len != 4) return;
	memcpy(&now, v.bytes, 4);
	setsockopt(fd, level, number, &(int){ now == 0 ? 1 : now == 1 ? 0 : now < 0 ? 3 : now - 1 }, 4);
}

int main(int argc, char **argv)
{
	begin(argc, argv);
	struct sock_filter ret = { BPF_RET | BPF_K, 0, 0, 4096 };
	int changed = 0, different = 0;
	for (int k = 0; k < KINDS; k++) {
		int fd = fds[k] = socket(kinds[k].domain, kinds[k].type, kinds[k].protocol);
		if (fd < 0) { say("SKIP %s: %s", kinds[k].name, strerror(errno)); continue; }
		struct value fresh[LEVELS][NUMBERS];
		for (int l = 0; l < LEVELS; l++) for (int n = 0; n < NUMBERS; n++) fresh[l][n] = get(fd, levels[l], n);
		NEED(!setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &(int){ 30000 + k }, 4) && !setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &(int){ 40000 + k }, 4));
		NEED(!setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &(struct timeval){ 9, 500000 }, sizeof(struct timeval)));
		if (kinds[k].domain == AF_INET || kinds[k].domain == AF_INET6) {
			NEED(!setsockopt(fd, SOL_SOCKET, SO_MAX_PACING_RATE, &(unsigned long){ 5000000000ul }, 8));
			NEED(!setsockopt(fd, SOL_SOCKET, SO_BINDTODEVICE, "lo", 2) && !setsockopt(fd, SOL_SOCKET, SO_MARK, &(int){ 77 }, 4));
		}
		if (kinds[k].domain == AF_INET) setsockopt(fd, IPPROTO_IP, 4 /* IP_OPTIONS */, "\x01\x01\x01\x00", 4);
		if (kinds[k].type == SOCK_DGRAM && kinds[k].domain != AF_UNIX && !kinds[k].protocol)
			NEED(!setsockopt(fd, SOL_SOCKET, 61 /* TXTIME */, (int[2]){ CLOCK_TAI, 1 }, 8) && !setsockopt(fd, SOL_SOCKET, SO_TIMESTAMPING, &(int){ 0x18 }, 4));
		if (kinds[k].type == SOCK_STREAM && kinds[k].domain == AF_INET6)
			NEED(!setsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, "reno", 4));
		for (int l = 0; l < LEVELS; l++) for (int n = 0; n < NUMBERS; n++) change(fd, levels[l], n);
		NEED(!setsockopt(fd, SOL_SOCKET, SO_ATTACH_FILTER, &(struct sock_fprog){ 1, &ret }, sizeof(struct sock_fprog)));
		NEED(!setsockopt(fd, SOL_SOCKET, SO_LOCK_FILTER, &(int){ 1 }, 4));
		if (kinds[k].listen) NEED(!bind(fd, (struct sockaddr *)&(struct sockaddr_in){ .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) }, sizeof(struct sockaddr_in)) && !listen(fd, 5));
		for (int l = 0; l < LEVELS; l++)
			for (int n = 0; n < NUMBERS; n++) {
				before[k][l][n] = get(fd, levels[l], n);
				changed += memcmp(&before[k][l][n], &fresh[l][n], sizeof(struct value)) != 0;
			}
	}
	NEED(changed > 200);
	say("%d options differ from their defaults", changed);
	ready();
	wait_asked();
	BREAK("mark") setsockopt(fds[4], SOL_SOCKET, SO_MARK, &(int){ 78 }, 4);
	BREAK("filter") fds[4] = fds[5];
	BREAK("tos") setsockopt(fds[1], IPPROTO_IP, IP_TOS, &(int){ 16 }, 4);
	BREAK("hops") setsockopt(fds[5], IPPROTO_IPV6, IPV6_UNICAST_HOPS, &(int){ 9 }, 4);
	for (int k = 0; k < KINDS; k++)
		for (int l = 0; fds[k] >= 0 && l < LEVELS; l++)
			for (int n = 0; n < NUMBERS; n++) {
				struct value *was = &before[k][l][n], is = get(fds[k], levels[l], n);
				if (passed_over(levels[l], n)) continue;
				if (was->len == is.len && !memcmp(was->bytes, is.bytes, sizeof is.bytes)) continue;
				different++;
				say("%s: option %d of level %d: %d bytes %016lx, now %d bytes %016lx", kinds[k].name, n, levels[l], was->len, *(long *)was->bytes, is.len, *(long *)is.bytes);
			}
	CHECK(!different, "%d options differ", different);
	pass();
}
