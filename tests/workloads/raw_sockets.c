/* Raw sockets of IPv4 and IPv6: protocols, addresses, filters of ICMP, headers made by the program; ping sockets if this
 * user may have them. */
#include "workload.h"
#include <arpa/inet.h>
#include <netinet/icmp6.h>
#include <netinet/in.h>
#include <netinet/ip.h>
#include <netinet/ip_icmp.h>
#include <poll.h>
#include <sys/socket.h>

static struct sockaddr_in v4(const char *ip) { struct sockaddr_in a = { .sin_family = AF_INET, .sin_addr.s_addr = inet_addr(ip) }; return a; }

static ssize_t next(int fd, char *b, size_t size)
{
	struct pollfd p = { fd, POLLIN, 0 };
	return poll(&p, 1, 3000) == 1 ? recv(fd, b, size, MSG_DONTWAIT) : -1;
}

static int nothing(int fd) { char b; return recv(fd, &b, 1, MSG_DONTWAIT | MSG_PEEK) < 0 && errno == EAGAIN; }

int main(int argc, char **argv)
{
	begin(argc, argv);
	char b[256];
	/* Addresses that no other run of this program has. */
	struct sockaddr_in nine = v4("127.9.0.0"), one = v4("127.8.0.0"), name;
	nine.sin_addr.s_addr |= htonl(getpid() & 0xffff);
	one.sin_addr.s_addr |= htonl(getpid() & 0xffff);
	struct sockaddr_in6 loop6 = { .sin6_family = AF_INET6, .sin6_addr = IN6ADDR_LOOPBACK_INIT }, name6;
	socklen_t len = sizeof name;
	/* A protocol of our own (253 and 254 are for experiments): bound, connected; a stranger to both. */
	int bound = socket(AF_INET, SOCK_RAW, 253), connected = socket(AF_INET, SOCK_RAW, 253), sender = socket(AF_INET, SOCK_RAW, 254);
	NEED(bound >= 0 && !bind(bound, (void *)&nine, sizeof nine));
	NEED(connected >= 0 && !bind(connected, (void *)&one, sizeof one) && !connect(connected, (void *)&nine, sizeof nine));
	NEED(sender >= 0);
	/* ICMP, of which echo requests are not wanted. */
	int icmp = socket(AF_INET, SOCK_RAW, IPPROTO_ICMP);
	NEED(icmp >= 0 && !setsockopt(icmp, 255, 1 /* ICMP_FILTER */, &(int){ ~(1 << ICMP_ECHOREPLY) }, 4) && !connect(icmp, (void *)&nine, sizeof nine));
	/* ICMPv6, of which nothing is wanted. */
	struct icmp6_filter none;
	ICMP6_FILTER_SETBLOCKALL(&none);
	int icmp6 = socket(AF_INET6, SOCK_RAW, IPPROTO_ICMPV6), six = socket(AF_INET6, SOCK_RAW, 253);
	NEED(icmp6 >= 0 && !setsockopt(icmp6, IPPROTO_ICMPV6, ICMP6_FILTER, &none, sizeof none));
	NEED(six >= 0 && !bind(six, (void *)&loop6, sizeof loop6) && !setsockopt(six, IPPROTO_IPV6, IPV6_CHECKSUM, &(int){ 2 }, 4));
	/* Sends whole packets. */
	int whole = socket(AF_INET, SOCK_RAW, IPPROTO_RAW);
	NEED(whole >= 0);
	/* Ping sockets have a port: the number of their requests. */
	int ping = socket(AF_INET, SOCK_DGRAM, IPPROTO_ICMP), port = 0;
	if (ping >= 0) {
		struct sockaddr_in p = v4("127.0.0.1");
		NEED(!bind(ping, (void *)&p, sizeof p) && !getsockname(ping, (void *)&p, &len));
		port = p.sin_port;
	} else say("SKIP ping: %s", strerror(errno));
	ready();
	wait_asked();
	BREAK("filter") NEED(!setsockopt(icmp, 255, 1, &(int){ ~0 }, 4));
	BREAK("bound") NEED(!bind(bound, (void *)&one, sizeof one));
	BREAK("connected") NEED(!connect(connected, &(struct sockaddr){ .sa_family = AF_UNSPEC }, sizeof(struct sockaddr)));
	BREAK("checksum") NEED(!setsockopt(six, IPPROTO_IPV6, IPV6_CHECKSUM, &(int){ -1 }, 4));
	BREAK("protocol") NEED(dup2(sender, six) == six);
	int v = 0;
	CHECK(!getsockopt(bound, SOL_SOCKET, SO_PROTOCOL, &v, &(socklen_t){ 4 }) && v == 253, "protocol %d", v);
	CHECK(!getsockname(bound, (void *)&name, &len) && name.sin_addr.s_addr == nine.sin_addr.s_addr, "bound");
	CHECK(send(connected, "to nine", 7, 0) == 7 && next(bound, b, sizeof b) == 27 && !memcmp(b + 20, "to nine", 7), "from the connected to the bound");
	CHECK(sendto(bound, "to one", 6, 0, (void *)&one, sizeof one) == 6 && next(connected, b, sizeof b) == 26 && !memcmp(b + 20, "to one", 6), "and back");
	struct { struct iphdr ip; char text[6]; } p = { .ip = { .version = 4, .ihl = 5, .ttl = 3, .protocol = 253, .saddr = inet_addr("192.0.2.9"), .daddr = nine.sin_addr.s_addr }, .text = "forged" };
	CHECK(sendto(whole, &p, 26, 0, (void *)&nine, sizeof nine) == 26 && next(bound, b, sizeof b) == 26 && ((struct iphdr *)b)->saddr == p.ip.saddr && ((struct iphdr *)b)->ttl == 3, "a packet with a header of our own");
	CHECK(nothing(connected), "only the peer is heard");
	struct icmphdr echo = { .type = ICMP_ECHO, .un.echo = { 77, 1 }, .checksum = 0 };
	uint32_t sum = 0;
	for (int i = 0; i < 4; i++) sum += ((uint16_t *)&echo)[i];
	echo.checksum = ~((sum & 0xffff) + (sum >> 16));
	CHECK(send(icmp, &echo, sizeof echo, 0) == sizeof echo && next(icmp, b, sizeof b) == 28 && b[20] == ICMP_ECHOREPLY && nothing(icmp), "an echo, and not the request");
	struct icmp6_filter now;
	len = sizeof now;
	CHECK(!getsockopt(icmp6, IPPROTO_ICMPV6, ICMP6_FILTER, &now, &len) && !memcmp(&now, &none, sizeof now), "the ICMPv6 filter");
	len = sizeof name6;
	CHECK(!getsockname(six, (void *)&name6, &len) && !memcmp(&name6.sin6_addr, &in6addr_loopback, 16), "bound to ::1");
	/* Other runs of this program are heard as well. */
	int mine[2] = { 0, getpid() }, *got = (int *)b;
	CHECK(sendto(six, mine, sizeof mine, 0, (void *)&loop6, sizeof loop6) == sizeof mine, "send to ::1");
	do CHECK(next(six, b, sizeof b) > 0, "receive from ::1"); while (got[1] != mine[1]);
	CHECK(got[0], "a checksum made by the kernel");
	if (ping >= 0) {
		len = sizeof name;
		CHECK(!getsockname(ping, (void *)&name, &len) && name.sin_port == port, "the ping socket's port");
		CHECK(sendto(ping, &echo, sizeof echo, 0, (void *)&one, sizeof one) == sizeof echo && next(ping, b, sizeof b) == sizeof echo && b[0] == ICMP_ECHOREPLY, "an answered ping");
	}
	pass();
}
