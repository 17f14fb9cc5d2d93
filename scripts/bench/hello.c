/*
 * The floor of make bench: an init that says hello. Nothing that ends in a running QEMU can be sooner.
 *
 * It connects console 0 (see PROTOCOL in README.md, "Limits") by the same request that stubinit sends: write console/state 4.
 */
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <time.h>
#include <unistd.h>
#include <xen/io/xs_wire.h>

int main(void)
{
	static const char path[] = "console/state";
	struct { struct xsd_sockmsg head; char payload[sizeof path + 1]; } request = {
		.head = { .type = XS_WRITE, .req_id = 1, .len = sizeof request.payload },
	};
	struct timespec now;
	char line[64];
	int fd, n;

	clock_gettime(CLOCK_MONOTONIC, &now);
	mount("devtmpfs", "/dev", "devtmpfs", 0, NULL);
	memcpy(request.payload, path, sizeof path);
	request.payload[sizeof path] = '4';
	fd = open("/dev/xen/xenbus", O_RDWR);
	if (fd < 0 || write(fd, &request, sizeof request.head + request.head.len) < 0)
		perror("/dev/xen/xenbus");
	n = snprintf(line, sizeof line, "hello %ld.%06ld info stubinit version=floor\n", (long)now.tv_sec, now.tv_nsec / 1000);
	fd = open("/dev/hvc0", O_WRONLY);
	if (write(fd, line, n) < 0)
		perror("/dev/hvc0");
	for (;;)
		pause();
}
