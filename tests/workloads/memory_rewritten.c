/* Private memory of a file that is dropped and written anew. SIGUSR1 asks for a round: all pages are given up, one byte is
 * written to each, and then all of each; after which it logs "round N". The test compares the memory with what the images
 * say, so there is nothing to BREAK. */
#include "workload.h"

#define PAGES 2048

int main(int argc, char **argv)
{
	begin(argc, argv);
	int file = open("zeros", O_RDWR | O_CREAT, 0600);
	NEED(file >= 0 && !ftruncate(file, PAGES * PAGE));
	char *p = mmap(0, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0);
	NEED(p != MAP_FAILED);
	memset(p, 'o', PAGES * PAGE);
	ready();
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	siginfo_t info;
	for (int round = 1;; round++) {
		while (sigwaitinfo(&set, &info) < 0) ;
		NEED(!madvise(p, PAGES * PAGE, MADV_DONTNEED));
		for (size_t i = 0; i < PAGES; i++) p[i * PAGE] = 'n';
		memset(p, 'o', PAGES * PAGE);
		say("round %d", round);
	}
}
