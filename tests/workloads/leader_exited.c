/* The first thread has ended, the others live on: the process shows as a zombie that is none. */
#include "workload.h"

static void *other(void *main_thread)
{
	(void)main_thread;
	NEED(SOON(state_of(getpid()) == 'Z'));
	ready();
	wait_asked();
	BREAK("verdict") BROKEN("as asked");
	CHECK(state_of(getpid()) == 'Z', "state %c", state_of(getpid()));
	pass();
	return 0;
}

int main(int argc, char **argv)
{
	begin(argc, argv);
	pthread_t t;
	NEED(!pthread_create(&t, 0, other, 0));
	pthread_exit(0);
}
