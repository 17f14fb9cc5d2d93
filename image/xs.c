/*
 * The part of libxenstore that QEMU uses, for a static QEMU in a stubdomain.
 *
 * Debian's libxenstore.a is built without threads: a request during which a watch fires takes the event for the answer, fails
 * with EINVAL, and closes the connection. This needs no thread: what comes before an answer and is a watch's event is kept,
 * and the descriptor that xs_fileno gives is readable while there is one.
 *
 * Interface: xenstore.h. Wire format: xen/io/xs_wire.h. Of /dev/xen/xenbus: drivers/xen/xenbus/xenbus_dev_frontend.c: a write
 * is one request of 4096 bytes at most, header included; a watch that xenstored refuses fails in write().
 *
 * -xen-domid-restrict does not reach this connection; libxl passes it to a QEMU in dom0 only. A stubdomain's may do no more
 * than the stubdomain.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <xenstore.h>
#include <xen/io/xs_wire.h>

#define MAX_REQUEST 4096

struct event {
	struct event *next;
	char *path, *token; /* into data */
	uint32_t len;
	char data[];
};

struct xs_handle {
	int fd;     /* /dev/xen/xenbus; -1 once its stream made no sense */
	int queued; /* eventfd: counts while the list below is not empty */
	int epoll;  /* of both */
	uint32_t last; /* req_id of the last request */
	struct event *first, **end;
	pthread_mutex_t mutex;
};

/* fail sets errno, which is never left 0. */
static void *fail(int error)
{
	errno = error ? error : EIO;
	return NULL;
}

/* open_store takes XENSTORED_PATH, a socket or a device, as Xen's own library does. */
static int open_store(void)
{
	const char *path = getenv("XENSTORED_PATH");
	struct sockaddr_un addr = { .sun_family = AF_UNIX };
	int fd;

	if (!path)
		path = "/dev/xen/xenbus";
	fd = open(path, O_RDWR | O_CLOEXEC);
	if (fd >= 0 || errno != ENXIO) /* what open(2) says of a socket */
		return fd;
	if (strlen(path) >= sizeof addr.sun_path) {
		errno = ENAMETOOLONG;
		return -1;
	}
	strcpy(addr.sun_path, path);
	fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (fd >= 0 && connect(fd, (struct sockaddr *)&addr, sizeof addr) < 0) {
		int error = errno;
		close(fd);
		errno = error;
		return -1;
	}
	return fd;
}

struct xs_handle *xs_open(unsigned long flags)
{
	struct xs_handle *h = calloc(1, sizeof *h);
	struct epoll_event in = { .events = EPOLLIN };
	int error;

	(void)flags;
	if (!h)
		return NULL;
	h->end = &h->first;
	pthread_mutex_init(&h->mutex, NULL);
	h->epoll = h->queued = -1;
	if ((h->fd = open_store()) >= 0 &&
	    (h->queued = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) >= 0 &&
	    (h->epoll = epoll_create1(EPOLL_CLOEXEC)) >= 0 &&
	    epoll_ctl(h->epoll, EPOLL_CTL_ADD, h->fd, &in) == 0 &&
	    epoll_ctl(h->epoll, EPOLL_CTL_ADD, h->queued, &in) == 0)
		return h;
	error = errno;
	xs_close(h);
	return fail(error);
}

void xs_close(struct xs_handle *h)
{
	if (!h)
		return;
	for (struct event *e = h->first; e; ) {
		struct event *next = e->next;
		free(e);
		e = next;
	}
	if (h->fd >= 0)
		close(h->fd);
	if (h->queued >= 0)
		close(h->queued);
	if (h->epoll >= 0)
		close(h->epoll);
	pthread_mutex_destroy(&h->mutex);
	free(h);
}

struct xs_handle *xs_daemon_open(void)
{
	return xs_open(0);
}

void xs_daemon_close(struct xs_handle *h)
{
	xs_close(h);
}

int xs_fileno(struct xs_handle *h)
{
	return h->epoll;
}

/* give_up closes a connection of which nobody knows any more where a message begins. */
static void *give_up(struct xs_handle *h, int error)
{
	if (h->fd >= 0)
		close(h->fd);
	h->fd = -1;
	return fail(error);
}

static bool read_all(int fd, void *data, size_t len)
{
	char *p = data;

	while (len) {
		ssize_t n = read(fd, p, len);
		if (n < 0 && errno == EINTR)
			continue;
		if (n == 0)
			errno = EPIPE;
		if (n <= 0)
			return false;
		p += n;
		len -= n;
	}
	return true;
}

static bool write_all(int fd, const void *data, size_t len)
{
	const char *p = data;

	while (len) {
		ssize_t n = write(fd, p, len);
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return false;
		p += n;
		len -= n;
	}
	return true;
}

/* receive reads one message into an event, whose data ends with an added zero byte. */
static struct event *receive(struct xs_handle *h, struct xsd_sockmsg *head)
{
	struct event *e;

	if (!read_all(h->fd, head, sizeof *head))
		return give_up(h, errno);
	if (head->len > XENSTORE_PAYLOAD_MAX)
		return give_up(h, EPROTO);
	e = calloc(1, sizeof *e + head->len + 1);
	if (!e)
		return give_up(h, ENOMEM);
	if (!read_all(h->fd, e->data, head->len)) {
		int error = errno;
		free(e);
		return give_up(h, error);
	}
	e->len = head->len;
	return e;
}

/* split finds an event's path and token. False: it has no two strings. */
static bool split(struct event *e)
{
	size_t path = strlen(e->data);

	if (path + 1 >= e->len)
		return false;
	e->path = e->data;
	e->token = e->data + path + 1;
	return true;
}

static void queue(struct xs_handle *h, struct event *e)
{
	if (!split(e)) {
		free(e);
		return;
	}
	if (!h->first)
		eventfd_write(h->queued, 1);
	*h->end = e;
	h->end = &e->next;
}

/* unqueued is to be called when an event was taken out. */
static void unqueued(struct xs_handle *h)
{
	eventfd_t n;

	if (h->first)
		return;
	h->end = &h->first;
	eventfd_read(h->queued, &n);
}

/*
 * talk sends a request made of strings, each with its zero byte, and then bytes, and returns the answer, for free(). The
 * answer's length goes to len, unless that is NULL.
 */
static char *talk(struct xs_handle *h, uint32_t type, xs_transaction_t t, const char *const strings[], const void *bytes,
		  size_t count, unsigned int *len)
{
	char request[MAX_REQUEST];
	struct xsd_sockmsg head = { .type = type, .tx_id = t }, answer;
	size_t at = sizeof head;
	struct event *e;
	char *result;

	for (; *strings; strings++) {
		size_t n = strlen(*strings) + 1;
		if (n > sizeof request - at)
			return fail(E2BIG);
		memcpy(request + at, *strings, n);
		at += n;
	}
	if (count > sizeof request - at)
		return fail(E2BIG);
	if (count)
		memcpy(request + at, bytes, count);
	at += count;

	pthread_mutex_lock(&h->mutex);
	result = NULL;
	if (h->fd < 0) {
		errno = EBADF;
		goto out;
	}
	head.req_id = ++h->last;
	head.len = at - sizeof head;
	memcpy(request, &head, sizeof head);
	if (!write_all(h->fd, request, at))
		goto out; /* refused whole */
	for (;;) {
		e = receive(h, &answer);
		if (!e)
			goto out;
		if (answer.type == XS_WATCH_EVENT) {
			queue(h, e);
			continue;
		}
		if (answer.req_id == head.req_id)
			break;
		free(e); /* of no request of ours */
	}
	if (answer.type == XS_ERROR) {
		int error = EIO;
		for (size_t i = 0; i < sizeof xsd_errors / sizeof *xsd_errors; i++)
			if (!strcmp(xsd_errors[i].errstring, e->data))
				error = xsd_errors[i].errnum;
		free(e);
		fail(error);
		goto out;
	}
	if (answer.type != type) {
		free(e);
		give_up(h, EPROTO);
		goto out;
	}
	if (len)
		*len = e->len;
	memmove(e, e->data, e->len + 1); /* so that it is the caller's to free */
	result = (char *)e;
out:
	pthread_mutex_unlock(&h->mutex);
	return result;
}

/* done is talk for a request whose answer says no more than that it came. */
static bool done(char *answer)
{
	free(answer);
	return answer != NULL;
}

#define STRINGS(...) (const char *const[]){ __VA_ARGS__, NULL }

void *xs_read(struct xs_handle *h, xs_transaction_t t, const char *path, unsigned int *len)
{
	return talk(h, XS_READ, t, STRINGS(path), NULL, 0, len);
}

bool xs_write(struct xs_handle *h, xs_transaction_t t, const char *path, const void *data, unsigned int len)
{
	return done(talk(h, XS_WRITE, t, STRINGS(path), data, len, NULL));
}

bool xs_mkdir(struct xs_handle *h, xs_transaction_t t, const char *path)
{
	return done(talk(h, XS_MKDIR, t, STRINGS(path), NULL, 0, NULL));
}

bool xs_rm(struct xs_handle *h, xs_transaction_t t, const char *path)
{
	return done(talk(h, XS_RM, t, STRINGS(path), NULL, 0, NULL));
}

/* xs_directory fails with E2BIG if the names do not fit into one message. */
char **xs_directory(struct xs_handle *h, xs_transaction_t t, const char *path, unsigned int *num)
{
	unsigned int len, n = 0;
	char *names = talk(h, XS_DIRECTORY, t, STRINGS(path), NULL, 0, &len), **list, *p;

	if (!names)
		return NULL;
	for (p = names; p < names + len; p += strlen(p) + 1)
		n++;
	list = malloc((n + 1) * sizeof *list + len + 1);
	if (list) {
		char *copy = memcpy(list + n + 1, names, len + 1);
		for (p = copy, *num = 0; *num < n; p += strlen(p) + 1)
			list[(*num)++] = p;
		list[n] = NULL;
	}
	free(names);
	return list;
}

bool xs_set_permissions(struct xs_handle *h, xs_transaction_t t, const char *path, struct xs_permissions *perms,
			unsigned int num_perms)
{
	char text[1024];
	size_t at = 0;

	for (unsigned int i = 0; i < num_perms; i++) {
		static const char letters[] = { 'n', 'r', 'w', 'b' }; /* none, READ = 1, WRITE = 2, both */
		if (sizeof text - at < 16)
			return fail(E2BIG);
		at += snprintf(text + at, sizeof text - at, "%c%u", letters[perms[i].perms & 3], perms[i].id) + 1;
	}
	return done(talk(h, XS_SET_PERMS, t, STRINGS(path), text, at, NULL));
}

char *xs_get_domain_path(struct xs_handle *h, unsigned int domid)
{
	char id[16];

	snprintf(id, sizeof id, "%u", domid);
	return talk(h, XS_GET_DOMAIN_PATH, XBT_NULL, STRINGS(id), NULL, 0, NULL);
}

xs_transaction_t xs_transaction_start(struct xs_handle *h)
{
	char *id = talk(h, XS_TRANSACTION_START, XBT_NULL, STRINGS(""), NULL, 0, NULL);
	xs_transaction_t t = id ? strtoul(id, NULL, 10) : XBT_NULL;

	free(id);
	return t;
}

bool xs_transaction_end(struct xs_handle *h, xs_transaction_t t, bool abort)
{
	return done(talk(h, XS_TRANSACTION_END, t, STRINGS(abort ? "F" : "T"), NULL, 0, NULL));
}

bool xs_watch(struct xs_handle *h, const char *path, const char *token)
{
	return done(talk(h, XS_WATCH, XBT_NULL, STRINGS(path, token), NULL, 0, NULL));
}

/* xs_unwatch also drops the watch's events that nobody has taken. */
bool xs_unwatch(struct xs_handle *h, const char *path, const char *token)
{
	struct event **p, *e;
	size_t n = strlen(path);

	if (!done(talk(h, XS_UNWATCH, XBT_NULL, STRINGS(path, token), NULL, 0, NULL)))
		return false;
	pthread_mutex_lock(&h->mutex);
	h->end = &h->first;
	for (p = &h->first; (e = *p); ) {
		if (!strcmp(e->token, token) && !strncmp(e->path, path, n) && (!e->path[n] || e->path[n] == '/')) {
			*p = e->next;
			free(e);
			if (!h->first)
				unqueued(h);
			continue;
		}
		p = &e->next;
		h->end = p;
	}
	pthread_mutex_unlock(&h->mutex);
	return true;
}

/* xs_check_watch takes an event, path and token, for free(). NULL and EAGAIN: there is none. */
char **xs_check_watch(struct xs_handle *h)
{
	char **pair = NULL;
	struct event *e;

	pthread_mutex_lock(&h->mutex);
	while (!h->first) {
		struct pollfd in = { .fd = h->fd, .events = POLLIN };
		struct xsd_sockmsg head;

		if (h->fd < 0) {
			errno = EBADF;
			goto out;
		}
		if (poll(&in, 1, 0) <= 0) {
			errno = EAGAIN;
			goto out;
		}
		e = receive(h, &head);
		if (!e)
			goto out;
		if (head.type == XS_WATCH_EVENT)
			queue(h, e);
		else
			free(e); /* an answer without a request */
	}
	e = h->first;
	pair = malloc(2 * sizeof *pair + e->len + 1);
	if (pair) {
		char *copy = memcpy(pair + 2, e->data, e->len + 1);
		pair[XS_WATCH_PATH] = copy;
		pair[XS_WATCH_TOKEN] = copy + (e->token - e->data);
		h->first = e->next;
		unqueued(h);
		free(e);
	}
out:
	pthread_mutex_unlock(&h->mutex);
	return pair;
}
