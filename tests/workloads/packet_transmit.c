/* Transmit rings of packet sockets of all three versions, and one behind a receive ring, mapped: the program has been around
 * in each, has two frames marked that it has not had sent, and goes on where it was. It can be asked again and again. */
#include "workload.h"
#include <arpa/inet.h>
#include <linux/filter.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <net/if.h>
#include <poll.h>
#include <sys/socket.h>

enum { OURS = 0x88b6, BLOCK = 4096, BLOCKS = 4, FRAME = 2048, FRAMES = 8, RINGS = 4, MARK = 2040 };

struct frame { struct ethhdr eth; int pid, ring, number; char rest[40]; } __attribute__((packed));

static struct ring { int fd, version, at, put, heard; char *map; } rings[RINGS];
static int ear;

static char *slot(struct ring *r, int n) { return r->map + n / (BLOCK / FRAME) * BLOCK + n % (BLOCK / FRAME) * FRAME; }

static volatile uint32_t *status(struct ring *r, int n)
{
	char *at = slot(r, n);
	return r->version == TPACKET_V3 ? &((struct tpacket3_hdr *)at)->tp_status : (void *)at;
}

/* Marks the next frame. */
static void put(struct ring *r)
{
	struct frame f = { { .h_proto = htons(OURS) }, getpid(), r - rings, r->put++, "" };
	char *at = slot(r, r->at);
	CHECK(SOON(!*status(r, r->at)), "frame %d of ring %d is the kernel's: %#x", r->at, f.ring, *status(r, r->at));
	memcpy(at + (r->version == TPACKET_V3 ? TPACKET_ALIGN(sizeof(struct tpacket3_hdr)) : TPACKET_ALIGN(sizeof(struct tpacket2_hdr))), &f, sizeof f);
	switch (r->version) {
	case TPACKET_V1: ((struct tpacket_hdr *)at)->tp_len = sizeof f; break;
	case TPACKET_V2: ((struct tpacket2_hdr *)at)->tp_len = sizeof f; break;
	case TPACKET_V3: ((struct tpacket3_hdr *)at)->tp_len = sizeof f, ((struct tpacket3_hdr *)at)->tp_next_offset = 0; break;
	}
	*status(r, r->at) = TP_STATUS_SEND_REQUEST;
	r->at = (r->at + 1) % FRAMES;
}

/* Has the kernel send what is marked; whether the next `n` numbers come and nothing else. */
static int go(struct ring *r, int n)
{
	CHECK(send(r->fd, 0, 0, 0) >= 0, "send");
	for (;;) {
		struct frame f;
		struct pollfd p = { ear, POLLIN, 0 };
		if (poll(&p, 1, n ? 3000 : 0) != 1) return !n;
		int len = recv(ear, &f, sizeof f, MSG_DONTWAIT);
		if (len != sizeof f || f.pid != getpid()) continue;
		if (!n-- || f.ring != r - rings || f.number != r->heard++) return 0;
	}
}

static void pending(void)
{
	for (struct ring *r = rings; r < rings + RINGS; r++) put(r), put(r);
}

int main(int argc, char **argv)
{
	begin(argc, argv);
	int lo = if_nametoindex("lo");
	struct sockaddr_ll to = { .sll_family = AF_PACKET, .sll_ifindex = lo, .sll_protocol = htons(OURS) };
	ear = socket(AF_PACKET, SOCK_RAW, 0);
	/* Not what lo shows when it is sent, nor what others send. */
	struct sock_filter code[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, SKF_AD_OFF + SKF_AD_PKTTYPE), BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, PACKET_OUTGOING, 2, 0),
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, 14), BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, ntohl(getpid()), 1, 0),
		BPF_STMT(BPF_RET | BPF_K, 0), BPF_STMT(BPF_RET | BPF_K, 0xffff) };
	NEED(lo > 0 && ear >= 0 && !setsockopt(ear, SOL_SOCKET, SO_ATTACH_FILTER, &(struct sock_fprog){ 6, code }, sizeof(struct sock_fprog)) && !bind(ear, (void *)&to, sizeof to));
	to.sll_protocol = 0;
	for (int i = 0; i < RINGS; i++) {
		struct ring *r = &rings[i];
		r->version = i < 3 ? i : TPACKET_V2;
		r->fd = socket(AF_PACKET, SOCK_RAW, 0);
		struct tpacket_req3 req = { BLOCK, BLOCKS, FRAME, FRAMES, 0, 0, 0 };
		size_t size = r->version == TPACKET_V3 ? sizeof req : sizeof(struct tpacket_req);
		NEED(r->fd >= 0 && !setsockopt(r->fd, SOL_PACKET, PACKET_VERSION, &r->version, 4));
		NEED(i < 3 || !setsockopt(r->fd, SOL_PACKET, PACKET_RX_RING, &req, size));
		NEED(!setsockopt(r->fd, SOL_PACKET, PACKET_TX_RING, &req, size) && !bind(r->fd, (void *)&to, sizeof to));
		r->map = mmap(0, BLOCK * BLOCKS * (i < 3 ? 1 : 2), PROT_READ | PROT_WRITE, MAP_SHARED, r->fd, 0);
		NEED(r->map != MAP_FAILED);
		if (i == 3) r->map += BLOCK * BLOCKS;
		for (int n = 0; n < FRAMES; n++) slot(r, n)[MARK] = 'a' + n;
		for (int n = 0; n < 11 + i; n++) { put(r); NEED(go(r, 1)); }
	}
	pending();
	ready();
	for (;;) {
		wait_asked();
		BREAK("pending") *status(&rings[0], (rings[0].at + FRAMES - 1) % FRAMES) = 0;
		BREAK("place") { for (int n = 0; n < FRAMES; n++) *status(&rings[1], n) = 0; rings[1].at = (rings[1].at + 1) % FRAMES; }
		BREAK("bytes") slot(&rings[2], 5)[MARK] = 0;
		BREAK("sent") go(&rings[3], 2);
		for (struct ring *r = rings; r < rings + RINGS; r++) {
			for (int n = 0; n < FRAMES; n++) CHECK(slot(r, n)[MARK] == 'a' + n, "bytes of frame %d", n);
			CHECK(go(r, 2), "ring %d: the two frames from before", (int)(r - rings));
			for (int n = 0; n < 2 * FRAMES + 3; n++) { put(r); CHECK(go(r, 1), "ring %d: frame %d", (int)(r - rings), r->heard); }
		}
		pending();
		say("PASS");
	}
}
