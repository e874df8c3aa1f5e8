/* The clients of the benchmarks, in one thread: connect, send, check that each byte comes back, close, again.
 *
 *     load --port N [--host ADDRESS] [--clients N] [--connections N | --seconds S] [--rate R] [--trips N] [--size BYTES]
 *          [--reset] [--keep] [--hold] [--http] [--timeout S] [--sources N]
 *
 * `clients` connections at most are under way at a time. Without a rate each begins anew at once (closed loop); with one they
 * begin at a steady pace whoever is late (open loop), and a latency counts from the moment at which it was due. `keep` closes
 * nothing before all are served; `hold` keeps them, silent, until the standard input ends, has one more round trip with each, and
 * says {"held": N} on a line when it waits. `http` is a GET of 64 letters that the answer's body has to repeat.
 *
 * A line of JSON tells what was seen. The exit status is 0 also when connections failed: who asks has to look at the errors.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <getopt.h>
#include <netinet/in.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { SMALL = 64, CHUNK = 1 << 18, OFFSETS = 1 << 16, ANSWER = 4096, EVENTS = 512, SLICES = 4096 };
enum { SLICE_MS = 100 };
/* In a row, with nobody served between them: the server has gone. */
enum { HOPELESS = 2000 };
#define SECOND 1000000000LL
/* Without these the one who looks at us would wait for ever. */
#define LOOK (SECOND / 2)

enum failure { REFUSED, RESET, CUT, WRONG, MORE, LATE, OTHER, FAILURES };
static const char *const FAILURE[] = {"refused", "reset", "cut", "wrong bytes", "more than sent", "timeout", "other"};

struct client {
    int fd, trips, registered;
    uint32_t wanted; /* of epoll */
    size_t offset, sent, got;
    int64_t due, active; /* when it was to begin; when something has last happened */
    char *answer;        /* of HTTP */
    int held;
};

static struct {
    int port, clients, trips, reset, keep, hold, http, sources;
    long connections;
    size_t size;
    double seconds, rate, timeout;
    const char *host;
} given = {.clients = 1, .trips = 1, .size = SMALL, .timeout = 10, .host = "127.0.0.1", .sources = 16};

static struct client *clients, **spare, **held;
static int spares, helds, total;
static int poller;
static char *pattern, *buffer;
static struct sockaddr_in address;
static uint64_t seed = 88172645463325252ULL;

static long begun, served, failures[FAILURES], hopeless, trips_done;
static int other_errno;
static int64_t *latencies, *lateness, first, last;
static long kept_latencies, room, kept_lateness, late_room;
static long slices[SLICES];

static int64_t now(void)
{
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return at.tv_sec * SECOND + at.tv_nsec;
}

static double cpu(void)
{
    struct timespec at;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &at);
    return at.tv_sec + at.tv_nsec / 1e9;
}

static void die(const char *what)
{
    perror(what);
    exit(1);
}

static uint64_t chance(void)
{
    seed ^= seed << 13;
    seed ^= seed >> 7;
    return seed ^= seed << 17;
}

static void note(int64_t **values, long *count, long *size, int64_t value)
{
    if (*count == *size) {
        *size = *size ? *size * 2 : 1 << 16;
        if (!(*values = realloc(*values, *size * sizeof **values)))
            die("memory");
    }
    (*values)[(*count)++] = value;
}

/* -- one connection */

static void want(struct client *client, uint32_t events)
{
    struct epoll_event event = {.events = events, .data.ptr = client};
    if (client->registered && client->wanted == events)
        return;
    if (epoll_ctl(poller, client->registered ? EPOLL_CTL_MOD : EPOLL_CTL_ADD, client->fd, &event))
        die("epoll_ctl");
    client->registered = 1;
    client->wanted = events;
}

static void leave(struct client *client)
{
    if (client->fd >= 0) {
        if (given.reset) {
            struct linger linger = {.l_onoff = 1};
            setsockopt(client->fd, SOL_SOCKET, SO_LINGER, &linger, sizeof linger);
        }
        close(client->fd);
    }
    client->fd = -1;
    spare[spares++] = client;
}

static void failed(struct client *client, enum failure why)
{
    failures[why]++;
    hopeless++;
    if (client->held) { /* its place among the held ones stays, empty */
        close(client->fd);
        client->fd = -1;
        client->held = 0;
        return;
    }
    leave(client);
}

static void failed_by(struct client *client, int error)
{
    if (error == ECONNREFUSED)
        failed(client, REFUSED);
    else if (error == ECONNRESET || error == EPIPE)
        failed(client, RESET);
    else if (error == ETIMEDOUT)
        failed(client, LATE);
    else {
        other_errno = error;
        failed(client, OTHER);
    }
}

static void done(struct client *client, int64_t at)
{
    served++;
    hopeless = 0;
    last = at;
    note(&latencies, &kept_latencies, &room, at - client->due);
    int64_t slice = (at - first) / (SLICE_MS * 1000000LL);
    slices[slice < SLICES ? slice : SLICES - 1]++;
    if (given.keep) {
        client->held = 1;
        held[helds++] = client;
    } else
        leave(client);
}

static size_t request(struct client *client, char *text)
{
    return sprintf(text, "GET /%.64s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", pattern + client->offset);
}

/* 0 while there is more to be sent, -1 when it has failed. */
static int sends(struct client *client)
{
    char text[256];
    const char *data = pattern + client->offset;
    size_t size = given.size;
    if (given.http) {
        size = request(client, text);
        data = text;
    }
    while (client->sent < size) {
        ssize_t count = send(client->fd, data + client->sent, size - client->sent, MSG_NOSIGNAL);
        if (count < 0) {
            if (errno == EAGAIN || errno == ENOTCONN)
                return 0;
            failed_by(client, errno);
            return -1;
        }
        client->sent += count;
    }
    return 1;
}

static void starts_trip(struct client *client)
{
    client->offset = given.http ? (chance() % (OFFSETS / SMALL)) * SMALL : chance() % OFFSETS;
    client->sent = client->got = 0;
    int all = sends(client);
    if (all >= 0)
        want(client, all ? EPOLLIN : EPOLLIN | EPOLLOUT);
}

static void starts(int64_t due, int64_t at)
{
    struct client *client = spare[--spares];
    static unsigned turn;
    begun++;
    client->trips = 0;
    client->registered = 0;
    client->due = due;
    client->active = at;
    client->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (client->fd < 0)
        die("socket");
    if (given.sources > 1) { /* ports that wait for their time to pass are another address's */
        int yes = 1;
        struct sockaddr_in source = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK + 1 + turn++ % given.sources)};
        setsockopt(client->fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &yes, sizeof yes);
        if (bind(client->fd, (struct sockaddr *)&source, sizeof source))
            die("bind");
    }
    if (connect(client->fd, (struct sockaddr *)&address, sizeof address) && errno != EINPROGRESS)
        failed_by(client, errno);
    else
        starts_trip(client);
}

static void ends_trip(struct client *client)
{
    trips_done++;
    client->active = now();
    if (client->held)
        return; /* it has proved that it is still served */
    if (++client->trips == given.trips)
        done(client, client->active);
    else
        starts_trip(client);
}

static void reads_answer(struct client *client)
{
    if (!client->answer && !(client->answer = malloc(ANSWER + 1)))
        die("memory");
    ssize_t count = recv(client->fd, client->answer + client->got, ANSWER - client->got, 0);
    if (count < 0 && errno == EAGAIN)
        return;
    if (count < 0)
        failed_by(client, errno);
    else if (count > 0)
        client->got += count;
    else {
        client->answer[client->got] = 0;
        char *body = strstr(client->answer, "\r\n\r\n");
        int good = client->got > 12 && !strncmp(client->answer, "HTTP/1.", 7) && !strncmp(client->answer + 8, " 200", 4);
        if (!body)
            failed(client, CUT);
        else if (!good || strlen(body + 4) != SMALL || memcmp(body + 4, pattern + client->offset, SMALL))
            failed(client, WRONG);
        else
            ends_trip(client);
    }
}

static void reads(struct client *client)
{
    size_t left = given.size - client->got;
    /* One byte more than there should be. */
    ssize_t count = recv(client->fd, buffer, left + 1 < CHUNK ? left + 1 : CHUNK, 0);
    if (count < 0) {
        if (errno != EAGAIN)
            failed_by(client, errno);
    } else if (count == 0)
        failed(client, CUT);
    else if ((size_t)count > left)
        failed(client, MORE);
    else if (client->got + count > client->sent || memcmp(buffer, pattern + client->offset + client->got, count))
        failed(client, WRONG);
    else {
        client->active = 0; /* whoever looks for the silent ones takes the time */
        if ((client->got += count) == given.size)
            ends_trip(client);
    }
}

static void happened(struct client *client, uint32_t events)
{
    if (client->fd < 0)
        return;
    if (events & EPOLLOUT) {
        int all = sends(client);
        if (all < 0)
            return;
        if (all)
            want(client, EPOLLIN);
    }
    if (events & (EPOLLIN | EPOLLHUP | EPOLLERR)) {
        if (given.http)
            reads_answer(client);
        else if (client->held && client->got == given.size) { /* it was served, and is to be silent */
            char byte;
            ssize_t count = recv(client->fd, &byte, 1, 0);
            if (count < 0)
                failed_by(client, errno);
            else
                failed(client, count ? MORE : CUT);
        } else
            reads(client);
    }
}

/* -- all of them */

static void look_for_the_silent(int64_t at)
{
    for (int i = 0; i < total; i++) {
        struct client *client = &clients[i];
        if (client->fd < 0 || (client->held && client->got == given.size))
            continue;
        if (client->active == 0)
            client->active = at;
        else if (at - client->active > given.timeout * SECOND)
            failed(client, LATE);
    }
}

/* Until `until` (never: INT64_MAX) or the next event. */
static void waits(int64_t until)
{
    static struct epoll_event events[EVENTS];
    static int64_t looked;
    int64_t at = now(), timeout = until - at < LOOK ? until - at : LOOK;
    struct timespec span = {.tv_sec = timeout / SECOND, .tv_nsec = timeout % SECOND};
    if (timeout < 0)
        span.tv_sec = span.tv_nsec = 0;
    int count = epoll_pwait2(poller, events, EVENTS, &span, NULL);
    if (count < 0 && errno != EINTR)
        die("epoll_pwait2");
    for (int i = 0; i < count; i++)
        if (events[i].data.ptr)
            happened(events[i].data.ptr, events[i].events);
    if ((at = now()) - looked > LOOK) {
        looked = at;
        look_for_the_silent(at);
    }
}

static int under_way(void)
{
    return total - spares - helds;
}

static void run(void)
{
    int64_t end = given.seconds > 0 ? first + (int64_t)(given.seconds * SECOND) : INT64_MAX;
    int64_t interval = given.rate > 0 ? (int64_t)(SECOND / given.rate) : 0, due = first;
    for (;;) {
        int64_t at = now();
        int more = at < end && (!given.connections || begun < given.connections) && hopeless < HOPELESS;
        if (!more && !under_way())
            return;
        while (more && under_way() < given.clients && spares && (!interval || due <= at)) {
            if (interval)
                note(&lateness, &kept_lateness, &late_room, at - due);
            starts(interval ? due : at, at);
            due += interval;
            at = now();
            more = at < end && (!given.connections || begun < given.connections) && hopeless < HOPELESS;
        }
        waits(!more || under_way() >= given.clients || !interval ? INT64_MAX : due < end ? due : end);
    }
}

/* Silent until the standard input ends; then each proves once more that it is served. */
static void hold(void)
{
    printf("{\"held\": %d, \"seconds\": %.6f}\n", helds, (last - first) / 1e9);
    fflush(stdout);
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = NULL};
    if (epoll_ctl(poller, EPOLL_CTL_ADD, STDIN_FILENO, &event))
        die("standard input");
    static struct epoll_event events[EVENTS];
    for (int over = 0; !over;) {
        int count = epoll_wait(poller, events, EVENTS, -1);
        for (int i = 0; i < count; i++)
            if (!events[i].data.ptr) {
                char byte;
                over = read(STDIN_FILENO, &byte, 1) <= 0;
            } else
                happened(events[i].data.ptr, events[i].events);
    }
    epoll_ctl(poller, EPOLL_CTL_DEL, STDIN_FILENO, NULL);
    for (int i = 0, asked = 0; i < helds; i = asked) {
        for (; asked < helds && asked < i + given.clients; asked++)
            if (held[asked]->fd >= 0) {
                held[asked]->active = now();
                held[asked]->offset = chance() % OFFSETS;
                held[asked]->sent = held[asked]->got = 0;
                int all = sends(held[asked]);
                if (all >= 0)
                    want(held[asked], all ? EPOLLIN : EPOLLIN | EPOLLOUT);
            }
        for (int waiting = 1; waiting;) {
            waiting = 0;
            for (int k = i; k < asked; k++)
                waiting |= held[k]->fd >= 0 && held[k]->got < given.size;
            if (waiting)
                waits(INT64_MAX);
        }
    }
}

/* -- what was seen */

static int compare(const void *a, const void *b)
{
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x > y) - (x < y);
}

static void print_percentiles(const char *name, int64_t *values, long count)
{
    static const double SHARE[] = {0.5, 0.9, 0.99, 1};
    static const char *const LABEL[] = {"p50", "p90", "p99", "max"};
    qsort(values, count, sizeof *values, compare);
    printf("\"%s\": {", name);
    for (int i = 0; i < 4; i++) {
        long at = (long)(SHARE[i] * count + 0.999999) - 1;
        if (count)
            printf("%s\"%s\": %.1f", i ? ", " : "", LABEL[i], values[at < 0 ? 0 : at] / 1e3);
    }
    printf("}, ");
}

static void print(double used)
{
    const char *comma = "";
    printf("{\"connections\": %ld, \"trips\": %ld, \"seconds\": %.6f, \"cpu\": %.6f, ", served, trips_done, (last - first) / 1e9, used);
    print_percentiles("latency", latencies, kept_latencies);
    print_percentiles("late", lateness, kept_lateness);
    printf("\"slice\": %g, \"slices\": [", SLICE_MS / 1e3);
    int64_t used_slices = served ? (last - first) / (SLICE_MS * 1000000LL) + 1 : 0;
    for (int64_t i = 0; i < used_slices && i < SLICES; i++)
        printf("%s%ld", i ? ", " : "", slices[i]);
    printf("], \"errors\": {");
    for (int i = 0; i < FAILURES; i++)
        if (failures[i]) {
            printf("%s\"%s%s%s\": %ld", comma, FAILURE[i], i == OTHER ? ": " : "", i == OTHER ? strerror(other_errno) : "", failures[i]);
            comma = ", ";
        }
    printf("}}\n");
}

static const struct option OPTIONS[] = {
    {"host", 1, 0, 'h'}, {"port", 1, 0, 'p'}, {"clients", 1, 0, 'c'}, {"connections", 1, 0, 'n'}, {"seconds", 1, 0, 's'},
    {"rate", 1, 0, 'r'}, {"trips", 1, 0, 't'}, {"size", 1, 0, 'b'}, {"reset", 0, 0, 'x'}, {"keep", 0, 0, 'k'}, {"hold", 0, 0, 'o'},
    {"http", 0, 0, 'w'}, {"timeout", 1, 0, 'l'}, {"sources", 1, 0, 'a'}, {0, 0, 0, 0},
};

int main(int count, char **words)
{
    for (int option; (option = getopt_long(count, words, "", OPTIONS, NULL)) != -1;)
        switch (option) {
        case 'h': given.host = optarg; break;
        case 'p': given.port = atoi(optarg); break;
        case 'c': given.clients = atoi(optarg); break;
        case 'n': given.connections = atol(optarg); break;
        case 's': given.seconds = atof(optarg); break;
        case 'r': given.rate = atof(optarg); break;
        case 't': given.trips = atoi(optarg); break;
        case 'b': given.size = atol(optarg); break;
        case 'x': given.reset = 1; break;
        case 'k': given.keep = 1; break;
        case 'o': given.keep = given.hold = 1; break;
        case 'w': given.http = 1; break;
        case 'l': given.timeout = atof(optarg); break;
        case 'a': given.sources = atoi(optarg); break;
        default: return 2;
        }
    if (optind < count || given.port <= 0 || given.clients <= 0 || (!given.connections && given.seconds <= 0) || !given.size
        || (given.keep && (!given.connections || given.trips != 1 || given.http)) || (given.http && given.trips != 1)) {
        fprintf(stderr, "load: options that make no sense together\n");
        return 2;
    }
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    prctl(PR_SET_TIMERSLACK, 1); /* nanosecond: a pace is kept */

    total = given.keep ? given.connections : given.clients;
    clients = calloc(total, sizeof *clients);
    spare = calloc(total, sizeof *spare);
    held = calloc(total, sizeof *held);
    pattern = malloc(given.size + OFFSETS + SMALL);
    buffer = malloc(CHUNK);
    if (!clients || !spare || !held || !pattern || !buffer)
        die("memory");
    for (size_t i = 0; i < given.size + OFFSETS + SMALL; i++)
        pattern[i] = given.http ? "abcdefghijklmnopqrstuvwxyz012345"[chance() >> 59] : (char)(chance() >> 56);
    for (int i = total - 1; i >= 0; i--) {
        clients[i].fd = -1;
        spare[spares++] = &clients[i];
    }
    address.sin_family = AF_INET;
    address.sin_port = htons(given.port);
    if (inet_pton(AF_INET, given.host, &address.sin_addr) != 1 || (poller = epoll_create1(EPOLL_CLOEXEC)) < 0)
        die(given.host);

    double before = cpu();
    first = last = now();
    run();
    if (given.hold)
        hold();
    double used = cpu() - before;
    for (int i = 0; i < helds; i++)
        if (held[i]->fd >= 0) {
            held[i]->held = 0;
            leave(held[i]);
        }
    print(used);
    return 0;
}
