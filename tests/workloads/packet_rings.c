/* Rings of packet sockets of all three versions, mapped: the program has been around in each, has frames that it has not
 * read, and goes on where it was; in one the times do not tell where that is, as if the clock had been set back. It can be asked again and again, for a restored ring can be checkpointed too. */
#include "workload.h"
#include <arpa/inet.h>
#include <linux/filter.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <net/if.h>
#include <poll.h>
#include <sys/socket.h>

enum { OURS = 0x88b6, BLOCK = 4096, BLOCKS = 4, FRAME = 2048, FRAMES = 8, RINGS = 5 };

static struct ring { int fd, version, at, sent, taken; char *map; } rings[RINGS];
static int sender;

/* The next frame for a ring. */
static void post(struct ring *r)
{
	struct { struct ethhdr eth; int pid, ring, number; char rest[900]; } __attribute__((packed)) f = { { .h_proto = htons(OURS) }, getpid(), r - rings, r->sent++, "" };
	NEED(send(sender, &f, sizeof f, 0) == sizeof f);
}

static void *slot(struct ring *r)
{
	return r->version == TPACKET_V3 ? r->map + r->at * BLOCK : r->map + r->at / (BLOCK / FRAME) * BLOCK + r->at % (BLOCK / FRAME) * FRAME;
}

static volatile uint32_t *status(struct ring *r)
{
	return r->version == TPACKET_V3 ? &((struct tpacket_block_desc *)slot(r))->hdr.bh1.block_status : slot(r);
}

static int number_in(char *mac) { int n; memcpy(&n, mac + 14 + 8, 4); return n; }

/* Takes the next frame, or the next block with all frames in it: these are the next numbers. How many, or -1. */
static int take(struct ring *r)
{
	struct pollfd p = { r->fd, POLLIN, 0 };
	for (int i = 0; i < 3000 && !(*status(r) & TP_STATUS_USER); i++) poll(&p, 1, 1);
	if (!(*status(r) & TP_STATUS_USER)) return -1;
	int n = 1, good = 1;
	char *at = slot(r);
	if (r->version == TPACKET_V3) {
		struct tpacket_hdr_v1 *b = &((struct tpacket_block_desc *)at)->hdr.bh1;
		at += b->offset_to_first_pkt;
		n = b->num_pkts;
		for (int i = 0; i < n; i++) {
			struct tpacket3_hdr *h = (void *)at;
			good &= number_in(at + h->tp_mac) == r->taken++ && (i == n - 1) == !h->tp_next_offset;
			at += h->tp_next_offset;
		}
	} else {
		good = number_in(at + (r->version ? ((struct tpacket2_hdr *)at)->tp_mac : ((struct tpacket_hdr *)at)->tp_mac)) == r->taken++;
	}
	*status(r) = TP_STATUS_KERNEL;
	r->at = (r->at + 1) % (r->version == TPACKET_V3 ? BLOCKS : FRAMES);
	return good ? n : -1;
}

/* Times of a clock that goes back and forth. */
static void scramble(struct ring *r)
{
	for (int n = 0; n < FRAMES; n++) {
		struct tpacket2_hdr *h = (void *)(r->map + n / (BLOCK / FRAME) * BLOCK + n % (BLOCK / FRAME) * FRAME);
		h->tp_sec = 1000 - n % 2;
	}
}

int main(int argc, char **argv)
{
	begin(argc, argv);
	int lo = if_nametoindex("lo");
	NEED(lo > 0);
	struct sockaddr_ll to = { .sll_family = AF_PACKET, .sll_ifindex = lo };
	sender = socket(AF_PACKET, SOCK_RAW, 0);
	NEED(sender >= 0 && !bind(sender, (void *)&to, sizeof to));
	for (int i = 0; i < RINGS; i++) {
		struct ring *r = &rings[i];
		r->version = i < 3 ? i : i == 3 ? TPACKET_V3 : TPACKET_V2;
		r->fd = socket(AF_PACKET, SOCK_RAW, 0);
		/* Ours, for this ring, and not what lo shows when it is sent. */
		struct sock_filter code[] = {
			BPF_STMT(BPF_LD | BPF_W | BPF_ABS, SKF_AD_OFF + SKF_AD_PKTTYPE), BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, PACKET_OUTGOING, 4, 0),
			BPF_STMT(BPF_LD | BPF_W | BPF_ABS, 14), BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, ntohl(getpid()), 0, 2),
			BPF_STMT(BPF_LD | BPF_W | BPF_ABS, 18), BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, ntohl(i), 1, 0),
			BPF_STMT(BPF_RET | BPF_K, 0), BPF_STMT(BPF_RET | BPF_K, 0xffff) };
		/* One whose blocks are closed only when they are full. */
		struct tpacket_req3 req = { BLOCK, BLOCKS, FRAME, FRAMES, i == 2 ? 60000 : 10, 0, 0 };
		NEED(r->fd >= 0 && !setsockopt(r->fd, SOL_SOCKET, SO_ATTACH_FILTER, &(struct sock_fprog){ 8, code }, sizeof(struct sock_fprog)));
		NEED(!setsockopt(r->fd, SOL_PACKET, PACKET_VERSION, &r->version, 4) && !setsockopt(r->fd, SOL_PACKET, PACKET_RX_RING, &req, r->version == TPACKET_V3 ? sizeof req : sizeof(struct tpacket_req)));
		r->map = mmap(0, BLOCK * BLOCKS, PROT_READ | PROT_WRITE, MAP_SHARED, r->fd, 0);
		to.sll_protocol = htons(OURS);
		NEED(r->map != MAP_FAILED && !bind(r->fd, (void *)&to, sizeof to));
	}
	/* More than once around, then some that nobody reads. */
	for (struct ring *r = rings; r < rings + 2; r++) {
		for (int n = 0; n < 11 + r->version; n++) { post(r); NEED(take(r) == 1); }
		post(r), post(r);
	}
	/* One block to be read, and one that the kernel has begun. */
	struct ring *blocks = &rings[2], *full = &rings[3];
	for (int n = 0; n < 21; n++) { post(blocks); while (blocks->sent - blocks->taken > 8) NEED(take(blocks) > 0); }
	/* No block is the kernel's, and so the last frames are lost. */
	for (int n = 0; n < 6; n++) { post(full); NEED(take(full) == 1); }
	for (int n = 0; n < 8 * BLOCKS; n++) post(full);
	NEED(SOON(*status(full) & TP_STATUS_USER));
	struct ring *clocks = &rings[4];
	for (int n = 0; n < 11; n++) { post(clocks); NEED(take(clocks) == 1); }
	scramble(clocks);
	ready();
	for (;;) {
		wait_asked();
		BREAK("behind") *status(&rings[0]) = TP_STATUS_KERNEL;
		BREAK("ahead") for (int n = 0; n < 2 * FRAMES; n++) post(&rings[1]);
		BREAK("block") *status(blocks) = TP_STATUS_KERNEL;
		BREAK("clock") clocks->at = (clocks->at + 1) % FRAMES;
		BREAK("full") *status(full) = TP_STATUS_KERNEL;
		for (struct ring *r = rings; r < rings + 2; r++) {
			CHECK(take(r) == 1 && take(r) == 1, "version %d: two frames from before", r->version);
			for (int n = 0; n < 2 * FRAMES + 3; n++) { post(r); CHECK(take(r) == 1, "version %d: frame %d", r->version, r->taken); }
			post(r), post(r);
		}
		for (int n = 0; n < 21; n++) { post(blocks); while (blocks->sent - blocks->taken > 8) CHECK(take(blocks) > 0, "frame %d in blocks", blocks->taken); }
		for (int n = 0; n < BLOCKS; n++) CHECK(take(full) > 0, "block %d of a full ring", n);
		full->taken = full->sent;
		for (int n = 0; n < 2 * FRAMES + 3; n++) { post(clocks); CHECK(take(clocks) == 1, "frame %d by a clock that was set back", clocks->taken); }
		scramble(clocks);
		for (int n = 0; n < 6; n++) { post(full); CHECK(take(full) == 1, "frame %d of a ring that was full", full->taken); }
		for (int n = 0; n < 8 * BLOCKS; n++) post(full);
		CHECK(SOON(*status(full) & TP_STATUS_USER), "a full ring");
		say("PASS");
	}
}
