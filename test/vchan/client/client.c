/*
 * A client of vchan servers on Debian's libxenvchan, for conformance tests and measurements. Runs in dom0.
 *
 *   client MODE -d DOMID -p XENSTORE-PATH [-n COUNT] [-b BYTES] [-D MICROSECONDS] [-t MILLISECONDS] [-s SEED] [-c COMMAND]
 *
 * Against a server that sends back what it gets:
 *   echo       BYTES in messages of random sizes to 1 MiB, both directions at once
 *   wrap       COUNT messages of BYTES, each sent and received as a whole before the next: with an odd size and 2^n of
 *              them, messages start at, and so wrap after, every offset of a ring of 2^n bytes
 *
 * Against a QMP server:
 *   sessions   COUNT times: wait 0 to D, connect, greeting, qmp_capabilities, query-status, close
 *   kill       COUNT times: a child uses the server and gets SIGKILL after 0 to D; then a session as above
 *   marker     COUNT sessions, each begun by the byte 0x01: every third by a new connection, the rest inside of one
 *   roundtrip  COUNT times query-status in one session
 *   answer     COUNT times COMMAND in one session, whose answer is large
 *   command    COMMAND once
 *
 * The result is one JSON object on stdout. In sessions, kill and marker a session that went wrong is counted; elsewhere
 * any failure ends the program with exit code 1 and a line on stderr.
 */
#define _DEFAULT_SOURCE
#include <errno.h>
#include <inttypes.h>
#include <libxenvchan.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define MIB (1u << 20)
#define LINE_MAX_BYTES (2 * MIB)

static struct {
	int domain;
	const char *path, *command;
	long count, bytes, delay_us, timeout_ms;
	uint64_t seed;
} opt = { .path = "", .command = "", .count = 1, .bytes = MIB, .timeout_ms = 10000, .seed = 1 };

/* What is wrong, and whose fault it is: LOST is what a user sees as a hang. */
enum outcome { OK, LOST, CLOSED, WRONG, OUTCOMES };

static char why[300];

__attribute__((format(printf, 2, 3))) static enum outcome fault(enum outcome o, const char *format, ...)
{
	va_list args;

	va_start(args, format);
	vsnprintf(why, sizeof(why), format, args);
	va_end(args);
	return o;
}

__attribute__((noreturn, format(printf, 1, 2))) static void die(const char *format, ...)
{
	va_list args;

	fprintf(stderr, "vchan client: %s: ", opt.path);
	va_start(args, format);
	vfprintf(stderr, format, args);
	va_end(args);
	fputc('\n', stderr);
	exit(1);
}

static int64_t now_us(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * INT64_C(1000000) + t.tv_nsec / 1000;
}

static int64_t deadline(void) { return now_us() + opt.timeout_ms * 1000; }

static void pause_us(long us)
{
	struct timespec t = { us / 1000000, us % 1000000 * 1000 };

	while (nanosleep(&t, &t) && errno == EINTR)
		;
}

static uint64_t next_random(uint64_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	*state ^= *state << 17;
	return *state;
}

static long random_below(long n) { return n > 0 ? (long)(next_random(&opt.seed) % (uint64_t)n) : 0; }

struct conn {
	struct libxenvchan *ctrl;
	char *buf;	/* what was received and not taken */
	size_t start, end;
	long retries;
};

static char *line_buffer;

/* connect attaches, as often as it takes: vchan-socket-proxy in dom0 does so too. */
static enum outcome attach(struct conn *c, int64_t until)
{
	memset(c, 0, sizeof(*c));
	c->buf = line_buffer;
	while (!(c->ctrl = libxenvchan_client_init(NULL, opt.domain, opt.path))) {
		c->retries++;
		if (now_us() >= until)
			return fault(LOST, "cannot attach (%s)", strerror(errno));
		pause_us(1000);
	}
	/* The library may be newer than the header: look whether they agree on the structure. */
	if (c->ctrl->is_server || c->ctrl->write.order != c->ctrl->ring->left_order ||
	    c->ctrl->read.order != c->ctrl->ring->right_order)
		die("struct libxenvchan of this library is not that of the header it was compiled with");
	c->ctrl->blocking = 0;
	return OK;
}

static void detach(struct conn *c)
{
	if (c->ctrl)
		libxenvchan_close(c->ctrl);
	c->ctrl = NULL;
}

static enum outcome wait_event(struct conn *c, int64_t until, const char *what)
{
	struct pollfd p = { .fd = libxenvchan_fd_for_select(c->ctrl), .events = POLLIN };
	int64_t left = until - now_us();
	int n;

	if (left <= 0)
		return fault(LOST, "no %s", what);
	n = poll(&p, 1, (int)(left / 1000 + 1));
	if (n < 0 && errno == EINTR)
		return OK;
	if (n < 0 || (n > 0 && libxenvchan_wait(c->ctrl) < 0))
		die("waiting for an event: %s", strerror(errno));
	return OK;
}

static enum outcome put(struct conn *c, const char *data, size_t size, int64_t until)
{
	while (size > 0) {
		int n = libxenvchan_write(c->ctrl, data, size);

		if (n < 0)
			return fault(CLOSED, "the server hung up before it took the request");
		data += n;
		size -= (size_t)n;
		if (n == 0) {
			enum outcome o = wait_event(c, until, "room for the request");

			if (o != OK)
				return o;
		}
	}
	return OK;
}

/* get_line gives the next line, ended by a NUL, valid until the next call. */
static enum outcome get_line(struct conn *c, char **line, int64_t until, const char *what)
{
	size_t seen = c->start;

	for (;;) {
		char *end = memchr(c->buf + seen, '\n', c->end - seen);
		int n;

		if (end) {
			*end = 0;
			*line = c->buf + c->start;
			c->start = (size_t)(end + 1 - c->buf);
			return OK;
		}
		if (c->start > 0) {
			memmove(c->buf, c->buf + c->start, c->end - c->start);
			c->end -= c->start;
			c->start = 0;
		}
		seen = c->end;
		if (c->end == LINE_MAX_BYTES)
			return fault(WRONG, "a line of %u bytes in place of %s", LINE_MAX_BYTES, what);
		n = libxenvchan_read(c->ctrl, c->buf + c->end, LINE_MAX_BYTES - c->end);
		if (n < 0)
			return fault(CLOSED, "the server hung up: no %s", what);
		c->end += (size_t)n;
		if (n == 0) {
			enum outcome o = wait_event(c, until, what);

			if (o != OK)
				return o;
		}
	}
}

static enum outcome greeting(struct conn *c, int64_t until)
{
	char *line;
	enum outcome o = get_line(c, &line, until, "greeting");

	if (o == OK && strncmp(line, "{\"QMP\"", 6))
		return fault(WRONG, "in place of a greeting: %.80s", line);
	return o;
}

/* execute runs a command, and skips events as libxl does. The ids tell answers of this session from others. */
static enum outcome execute(struct conn *c, const char *command, int64_t until, size_t *size)
{
	static unsigned long last;
	char request[200], id[40], *line;
	size_t length;
	enum outcome o;

	snprintf(id, sizeof(id), "\"id\": \"%ld.%lu\"", (long)getpid(), ++last);
	snprintf(request, sizeof(request), "{\"execute\": \"%s\", %s}\r\n", command, id);
	o = put(c, request, strlen(request), until);
	while (o == OK) {
		o = get_line(c, &line, until, command);
		if (o != OK || !strncmp(line, "{\"timestamp\"", 12))
			continue;
		/* Of a large answer only its ends are looked at: what is to be measured is not this. */
		length = strlen(line);
		if (strncmp(line, "{\"return\": ", 11) || !strstr(line + (length > 100 ? length - 100 : 0), id))
			return fault(WRONG, "in place of the answer to %s: %.80s", request, line);
		if (line[length - 1] != '\r')
			return fault(WRONG, "the answer's line does not end with CRLF");
		if (size)
			*size = length + 1;
		return OK;
	}
	return o;
}

static enum outcome talk(struct conn *c, int64_t until)
{
	enum outcome o = greeting(c, until);

	if (o == OK)
		o = execute(c, "qmp_capabilities", until, NULL);
	if (o == OK)
		o = execute(c, "query-status", until, NULL);
	return o;
}

static enum outcome session(long *retries)
{
	struct conn c;
	int64_t until = deadline();
	enum outcome o = attach(&c, until);

	*retries += c.retries;
	if (o == OK)
		o = talk(&c, until);
	detach(&c);
	return o;
}

/* begin is a session that must work. */
static void begin(struct conn *c)
{
	int64_t until = deadline();

	if (attach(c, until) != OK || greeting(c, until) != OK || execute(c, "qmp_capabilities", until, NULL) != OK)
		die("%s", why);
}

static int by_time(const void *a, const void *b)
{
	int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;

	return (x > y) - (x < y);
}

static int64_t *new_times(void)
{
	int64_t *t = calloc((size_t)opt.count + 1, sizeof(*t));

	if (!t)
		die("no memory");
	return t;
}

/* print_times prints members of an object, without the first comma. */
static void print_times(int64_t *t, long n)
{
	qsort(t, (size_t)n, sizeof(*t), by_time);
	printf("\"median_us\": %" PRId64 ", \"p99_us\": %" PRId64 ", \"max_us\": %" PRId64, n ? t[n / 2] : 0,
	       n ? t[(n * 99 - 1) / 100] : 0, n ? t[n - 1] : 0);
}

struct tally {
	long outcome[OUTCOMES], retries;
	char first[300]; /* what went wrong first */
	int64_t *times;	 /* of sessions that went well */
	int64_t good;	 /* their sum */
	int64_t start;
};

static void count(struct tally *t, long round, enum outcome o, int64_t took)
{
	if (o == OK) {
		t->times[t->outcome[OK]] = took;
		t->good += took;
	} else if (!t->first[0])
		snprintf(t->first, sizeof(t->first), "round %ld: %.250s", round, why);
	t->outcome[o]++;
}

static void print_string(const char *s)
{
	putchar('"');
	for (; *s; s++)
		if (*s == '"' || *s == '\\')
			printf("\\%c", *s);
		else if ((unsigned char)*s < ' ' || (unsigned char)*s > '~')
			printf("\\u%04x", (unsigned char)*s);
		else
			putchar(*s);
	putchar('"');
}

static void print_tally(struct tally *t)
{
	printf("{\"rounds\": %ld, \"ok\": %ld, \"lost\": %ld, \"closed\": %ld, \"wrong\": %ld, \"retries\": %ld, \"seconds\": %.3f, \"ok_seconds\": %.6f, ",
	       opt.count, t->outcome[OK], t->outcome[LOST], t->outcome[CLOSED], t->outcome[WRONG], t->retries,
	       (double)(now_us() - t->start) / 1e6, (double)t->good / 1e6);
	print_times(t->times, t->outcome[OK]);
	printf(", \"first\": ");
	print_string(t->first);
	printf("}\n");
}

static void run_sessions(void)
{
	struct tally t = { .times = new_times(), .start = now_us() };

	for (long i = 0; i < opt.count; i++) {
		int64_t start;
		enum outcome o;

		if (opt.delay_us)
			pause_us(random_below(opt.delay_us));
		start = now_us();
		o = session(&t.retries);
		count(&t, i, o, now_us() - start);
	}
	print_tally(&t);
}

/* victim uses the server in some way until it is killed. */
__attribute__((noreturn)) static void victim(unsigned kind)
{
	static const char part[] = "{\"execute\": \"query-status\", \"id\": \"of a client that was killed";
	struct conn c;
	char some[100];
	long retries = 0;

	for (;;) {
		if (kind == 0) { /* whole sessions */
			session(&retries);
			continue;
		}
		if (attach(&c, deadline()) != OK)
			continue;
		if (kind == 1) /* nothing: not even the greeting is read */
			break;
		if (kind == 2) { /* part of a request */
			put(&c, part, sizeof(part) - 1, deadline());
			break;
		}
		if (greeting(&c, deadline()) != OK || execute(&c, "qmp_capabilities", deadline(), NULL) != OK)
			break;
		snprintf(some, sizeof(some), "{\"execute\": \"%s\"}\r\n", opt.command);
		put(&c, some, strlen(some), deadline());
		/* A large answer: read slowly, or (kind 4) not at all. */
		while (kind == 3 && libxenvchan_read(c.ctrl, some, sizeof(some)) >= 0)
			pause_us(500);
		break;
	}
	for (;;)
		pause();
}

static void run_kill(void)
{
	struct tally t = { .times = new_times(), .start = now_us() };

	for (long i = 0; i < opt.count; i++) {
		unsigned kind = (unsigned)(i % 5);
		long delay = random_below(opt.delay_us);
		int64_t start;
		enum outcome o;
		pid_t pid = fork();

		if (pid < 0)
			die("fork: %s", strerror(errno));
		if (pid == 0)
			victim(kind);
		pause_us(delay);
		if (kill(pid, SIGKILL) || waitpid(pid, NULL, 0) != pid)
			die("killing the child: %s", strerror(errno));
		start = now_us();
		o = session(&t.retries);
		count(&t, i, o, now_us() - start);
	}
	print_tally(&t);
}

static void run_marker(void)
{
	struct tally t = { .times = new_times(), .start = now_us() };
	struct conn c = { .ctrl = NULL };

	for (long i = 0; i < opt.count; i++) {
		int64_t start = now_us(), until = deadline();
		enum outcome o = OK;

		if (i % 3 == 0 || !c.ctrl) {
			detach(&c);
			o = attach(&c, until);
			t.retries += c.retries;
		}
		if (o == OK)
			o = put(&c, "\1", 1, until);
		if (o == OK)
			o = talk(&c, until);
		count(&t, i, o, now_us() - start);
		if (o != OK)
			detach(&c);
	}
	detach(&c);
	print_tally(&t);
}

static void run_roundtrip(void)
{
	int64_t *t = new_times();
	struct conn c;

	begin(&c);
	for (long i = 0; i < opt.count; i++) {
		int64_t start = now_us();

		if (execute(&c, "query-status", deadline(), NULL) != OK)
			die("round trip %ld: %s", i, why);
		t[i] = now_us() - start;
	}
	detach(&c);
	printf("{\"rounds\": %ld, ", opt.count);
	print_times(t, opt.count);
	printf("}\n");
}

static void run_answer(void)
{
	struct conn c;
	size_t size = 0, total = 0;
	int64_t start;

	begin(&c);
	start = now_us();
	for (long i = 0; i < opt.count; i++) {
		if (execute(&c, opt.command, deadline(), &size) != OK)
			die("answer %ld: %s", i, why);
		total += size;
	}
	printf("{\"bytes\": %zu, \"seconds\": %.6f}\n", total, (double)(now_us() - start) / 1e6);
	detach(&c);
}

static void run_command(void)
{
	struct conn c;

	begin(&c);
	if (execute(&c, opt.command, deadline(), NULL) != OK)
		die("%s", why);
	detach(&c);
	printf("{}\n");
}

/* fill writes the next bytes of a stream that both directions know. */
static void fill(uint64_t *stream, char *data, size_t size)
{
	for (size_t i = 0; i < size; i++)
		data[i] = (char)(next_random(stream) >> 32);
}

static void check(uint64_t *stream, const char *data, size_t size, size_t offset)
{
	for (size_t i = 0; i < size; i++) {
		char want = (char)(next_random(stream) >> 32);

		if (data[i] != want)
			die("byte %zu came back as 0x%02x: want 0x%02x", offset + i, data[i] & 0xff, want & 0xff);
	}
}

static void run_echo(void)
{
	static char out[MIB], in[MIB];
	uint64_t sending = opt.seed, receiving = opt.seed, sizes = opt.seed * 3 + 1;
	size_t total = (size_t)opt.bytes, made = 0, received = 0, at = 0, message = 0;
	long messages = 0;
	int64_t start, until = deadline();
	struct conn c;

	if (attach(&c, until) != OK)
		die("%s", why);
	/* vchan-socket-proxy hangs (seen) when the client writes before it was noticed. */
	pause_us(100000);
	start = now_us();
	while (received < total) {
		int w = 0, r;

		if (at == message && made < total) {
			message = next_random(&sizes) % MIB + 1;
			if (message > total - made)
				message = total - made;
			fill(&sending, out, message);
			made += message;
			at = 0;
			messages++;
		}
		if (at < message) {
			w = libxenvchan_write(c.ctrl, out + at, message - at);
			if (w < 0)
				die("the server hung up after %zu bytes", received);
			at += (size_t)w;
		}
		r = libxenvchan_read(c.ctrl, in, sizeof(in));
		if (r < 0)
			die("the server hung up after %zu bytes", received);
		check(&receiving, in, (size_t)r, received);
		received += (size_t)r;
		if (w > 0 || r > 0)
			until = deadline();
		else if (wait_event(&c, until, "bytes") != OK)
			die("stuck after %zu bytes sent and %zu received", made - message + at, received);
	}
	printf("{\"bytes\": %zu, \"messages\": %ld, \"seconds\": %.6f}\n", total, messages, (double)(now_us() - start) / 1e6);
	detach(&c);
}

static void run_wrap(void)
{
	static char out[MIB], in[MIB];
	uint64_t sending = opt.seed, receiving = opt.seed;
	size_t size = (size_t)opt.bytes;
	struct conn c;

	if (attach(&c, deadline()) != OK)
		die("%s", why);
	if (size > 1u << c.ctrl->write.order || size > 1u << c.ctrl->read.order || size > MIB)
		die("messages of %zu bytes do not fit into the rings", size);
	for (long i = 0; i < opt.count; i++) {
		int64_t until = deadline();
		int n;

		fill(&sending, out, size);
		/* As a whole, or not at all yet. */
		while (!(n = libxenvchan_send(c.ctrl, out, size)))
			if (wait_event(&c, until, "room") != OK)
				die("message %ld: %s", i, why);
		if (n != (int)size)
			die("message %ld: the server hung up", i);
		while (!(n = libxenvchan_recv(c.ctrl, in, size)))
			if (wait_event(&c, until, "echo") != OK)
				die("message %ld: %s", i, why);
		if (n != (int)size)
			die("message %ld: the server hung up", i);
		check(&receiving, in, size, (size_t)i * size);
	}
	printf("{\"bytes\": %zu, \"messages\": %ld, \"left_order\": %d, \"right_order\": %d}\n", size * (size_t)opt.count, opt.count,
	       c.ctrl->write.order, c.ctrl->read.order);
	detach(&c);
}

static const struct {
	const char *name;
	void (*run)(void);
} modes[] = {
	{ "echo", run_echo },	  { "wrap", run_wrap },		  { "sessions", run_sessions }, { "kill", run_kill },
	{ "marker", run_marker }, { "roundtrip", run_roundtrip }, { "answer", run_answer },	{ "command", run_command },
};

static long number(const char *text, long least, long most)
{
	char *end;
	long n;

	errno = 0;
	n = strtol(text, &end, 10);
	if (errno || *end || end == text || n < least || n > most)
		die("%s is not a number from %ld to %ld", text, least, most);
	return n;
}

int main(int argc, char **argv)
{
	int o;

	if (argc < 2)
		die("a mode is missing");
	while ((o = getopt(argc - 1, argv + 1, "d:p:n:b:D:t:s:c:")) != -1)
		switch (o) {
		case 'd': opt.domain = (int)number(optarg, 0, 0x7fef); break;
		case 'p': opt.path = optarg; break;
		case 'n': opt.count = number(optarg, 1, 10000000); break;
		case 'b': opt.bytes = number(optarg, 1, 1 << 30); break;
		case 'D': opt.delay_us = number(optarg, 0, 1000000000); break;
		case 't': opt.timeout_ms = number(optarg, 1, 1000000); break;
		case 's': opt.seed = (uint64_t)number(optarg, 1, 1L << 40); break;
		case 'c': opt.command = optarg; break;
		default: return 1;
		}
	line_buffer = malloc(LINE_MAX_BYTES);
	if (!line_buffer)
		die("no memory");
	memset(line_buffer, 0, LINE_MAX_BYTES); /* no page faults later */
	for (size_t i = 0; i < sizeof(modes) / sizeof(modes[0]); i++)
		if (!strcmp(argv[1], modes[i].name)) {
			modes[i].run();
			return 0;
		}
	die("there is no mode %s", argv[1]);
}
