/* Calls image/xs.c as standard input says, a command a line, and prints what came of it, a line each. */
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <xenstore.h>

static void outcome(bool ok)
{
	puts(ok ? "ok" : strerrorname_np(errno));
}

int main(void)
{
	static char line[8192];
	struct xs_handle *h = xs_open(0);
	xs_transaction_t t = XBT_NULL;

	signal(SIGPIPE, SIG_IGN);
	setvbuf(stdout, NULL, _IOLBF, 0);
	outcome(h != NULL);
	while (h && fgets(line, sizeof line, stdin)) {
		char *command = strtok(line, " \n"), *a = strtok(NULL, " \n"), *b = strtok(NULL, " \n");
		if (!strcmp(command, "read")) {
			unsigned int len;
			char *value = xs_read(h, t, a, &len);
			if (value)
				printf("%u %s\n", len, value);
			else
				outcome(false);
			free(value);
		} else if (!strcmp(command, "write")) {
			outcome(xs_write(h, t, a, b, strlen(b)));
		} else if (!strcmp(command, "mkdir")) {
			outcome(xs_mkdir(h, t, a));
		} else if (!strcmp(command, "rm")) {
			outcome(xs_rm(h, t, a));
		} else if (!strcmp(command, "perms")) { /* owner without others, and one reader */
			struct xs_permissions p[2] = { { .id = atoi(b), .perms = XS_PERM_NONE }, { .id = 7, .perms = XS_PERM_READ } };
			outcome(xs_set_permissions(h, t, a, p, 2));
		} else if (!strcmp(command, "list")) {
			unsigned int n;
			char **names = xs_directory(h, t, a, &n);
			if (!names) {
				outcome(false);
				continue;
			}
			printf("%u", n);
			for (unsigned int i = 0; i < n; i++)
				printf(" %s", names[i]);
			putchar('\n');
			free(names);
		} else if (!strcmp(command, "begin")) {
			outcome((t = xs_transaction_start(h)) != XBT_NULL);
		} else if (!strcmp(command, "end")) {
			outcome(xs_transaction_end(h, t, !strcmp(a, "abort")));
			t = XBT_NULL;
		} else if (!strcmp(command, "watch")) {
			outcome(xs_watch(h, a, b));
		} else if (!strcmp(command, "unwatch")) {
			outcome(xs_unwatch(h, a, b));
		} else if (!strcmp(command, "poll")) { /* for so many milliseconds */
			struct pollfd in = { .fd = xs_fileno(h), .events = POLLIN };
			puts(poll(&in, 1, atoi(a)) == 1 ? "readable" : "nothing");
		} else if (!strcmp(command, "check")) {
			char **event = xs_check_watch(h);
			if (event)
				printf("%s %s\n", event[XS_WATCH_PATH], event[XS_WATCH_TOKEN]);
			else
				outcome(false);
			free(event);
		}
	}
	xs_close(h);
	return 0;
}
