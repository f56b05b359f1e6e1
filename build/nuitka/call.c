/*
 * The door in C: a call that the resident helper answers is answered without Python, in a fraction of the time.
 *
 * It does what extension/call.py and extension/helper_client.py do: it sends the call, the caller's environment and the
 * payload to the helper's socket, and prints the answer. Its checks, messages, texts, log lines and exit statuses are
 * theirs; tests/binary/test_doors.py compares the two doors. Whatever is unusual is left to Python: then call_helper
 * returns, and start.c starts the interpreter. Here nobody starts a helper, repairs a directory or refuses a call.
 *
 * The signals that end a call are blocked, except while a system call waits. So their handler never interrupts anything
 * half done. It may call any function, and it ends the process.
 */
#define _GNU_SOURCE
#include "call.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "directories.h"

#ifndef BUILD_ID
#error "BUILD_ID: it is part of the name of the helper's socket"
#endif
#define SOCKET "helper-" BUILD_ID ".sock" /* helper_client.socket_name */
#define PATIENCE_S 5.0                    /* as in helper_client.py */
#define PATIENCE_S_MIN 2.0
#define TIMEOUT_S_MAX 86400 /* as in deadline.py */
#define AGE_S_MAX 5.0
#define LINE_BYTES_MAX 2000          /* errors.one_line cuts longer lines */
#define LOG_BYTES_MAX (4 << 20)      /* as in logfile.py */
#define PAYLOAD_BYTES_MAX (64 << 20) /* a larger payload is left to Python, which takes a gigabyte */
#define MESSAGE_BYTES_MAX (64 << 20) /* of the helper */
#define COMMAND_BYTES_MAX 200
#define VARIABLE_BYTES_MAX (100 << 10) /* execve(2) takes 128 KB in one variable */

/* The variables that are sent with each call: helper_client.CALL_ENVIRONMENT. */
static const char *const sent_variables[] = {"NETLOOM_AGENT", "NETLOOM_DIR", "HOME", "SSH_AUTH_SOCK"};

static const struct {
    int number;
    const char *name;
} ending[] = {{SIGTERM, "SIGTERM"}, {SIGINT, "SIGINT"}, {SIGHUP, "SIGHUP"}, {SIGALRM, ""}};
#define ENDING (int)(sizeof ending / sizeof *ending)
/* A signal that ends the process while Python ignores it: writing fails instead. */
static const int ignored[] = {SIGPIPE, SIGXFSZ};
static struct sigaction before[ENDING + 2];
static sigset_t mask_before;

/* The call, as in record.py and deadline.py. Times are in seconds on the monotonic clock. */
static const char *command;
static char call_id[33];
static int timeout_s;
static double started, ends, margin_s;
static char doing[2 * LINE_BYTES_MAX] = "starting"; /* one_line cuts the line that has it */
static int has_written;

/* Bytes that grow. */
struct bytes {
    unsigned char *at;
    size_t length, room;
};

struct field {
    char *at;
    size_t length;
};

static double now_s(clockid_t clock) {
    struct timespec now;
    clock_gettime(clock, &now);
    return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

/* Block or unblock the signals that end the call. */
static void set_signals(int how) {
    sigset_t set;
    sigemptyset(&set);
    for (int i = 0; i < ENDING; i++) sigaddset(&set, ending[i].number);
    sigprocmask(how, &set, NULL);
}

/* The result of a system call that may wait, and in which a signal may end the call. A stopped process gets EINTR when
 * it continues. */
#define WAITING(system_call)                                   \
    ({                                                         \
        set_signals(SIG_UNBLOCK);                              \
        __typeof__(system_call) result_;                       \
        do result_ = (system_call);                            \
        while (result_ < 0 && errno == EINTR);                 \
        int errno_ = errno;                                    \
        set_signals(SIG_BLOCK);                                \
        errno = errno_;                                        \
        result_;                                               \
    })

/* Whether errors.one_line would leave the text as it is. */
static int is_plain(const char *text, size_t length) {
    if (!length || length > LINE_BYTES_MAX || text[0] == ' ' || text[length - 1] == ' ') return 0;
    for (size_t i = 0; i < length; i++)
        if (text[i] < ' ' || text[i] > '~' || (text[i] == ' ' && text[i + 1] == ' ')) return 0;
    return 1;
}

/* Cut a line as errors.one_line does. */
static void cut(char *line) {
    if (strlen(line) > LINE_BYTES_MAX) strcpy(line + LINE_BYTES_MAX - 3, "...");
}

static int write_all(int fd, const char *text, size_t length) {
    while (length) {
        ssize_t wrote = WAITING(write(fd, text, length));
        if (wrote < 0) return 0;
        text += wrote;
        length -= (size_t)wrote;
    }
    return 1;
}

static int open_log(const char *path) {
    return open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC | O_NOFOLLOW, 0600);
}

/* Append a line to a log of bounded size, as in logfile.py. */
static void append(const char *path, const char *line) {
    char full[PATH_MAX + 32];
    struct stat written, named;
    int fd = open_log(path);
    if (fd < 0) return;
    if (!fstat(fd, &written) && written.st_size > LOG_BYTES_MAX && !flock(fd, LOCK_EX | LOCK_NB)) {
        snprintf(full, sizeof full, "%s.1", path);
        if (!stat(path, &named) && named.st_ino == written.st_ino) rename(path, full);
        int fresh = open_log(path); /* the full file stays open, and with it the lock, until the process exits */
        if (fresh >= 0) fd = fresh;
    }
    if (write(fd, line, strlen(line)) < 0) return; /* a log that cannot be written fails no call */
}

/* Write the log line of the call, as log.write_down does. Of a call that the helper answers, the helper writes it. */
static void write_log(int status, const char *error) {
    char stamp[32], line[2 * LINE_BYTES_MAX + 512], directory[PATH_MAX], path[PATH_MAX + 16];
    time_t now = time(NULL);
    struct tm utc;
    gmtime_r(&now, &utc);
    strftime(stamp, sizeof stamp, "%Y-%m-%dT%H:%M:%SZ", &utc);
    snprintf(line, sizeof line - 1, "%s %s %s - - status=%d %.0fms%s%s", stamp, call_id, command, status,
             (now_s(CLOCK_MONOTONIC) - started) * 1000, *error ? " " : "", error);
    cut(line);
    strcat(line, "\n");
    for (enum candidate which = 0; which < CANDIDATES; which++) {
        if (which == RUNTIME || !candidate(which, directory) || directory[0] != '/') continue;
        if (!is_safe_above(directory) || !is_private(directory, which != CHOSEN)) continue;
        if (access(directory, W_OK | X_OK)) continue;
        snprintf(path, sizeof path, "%s/netloom.log", directory);
        append(path, line);
        return;
    }
}

/* Write a line that the caller gets on stderr, and exit. */
static void __attribute__((noreturn)) end_with_error(int status, char *line, int is_logged) {
    char text[LINE_BYTES_MAX + 2];
    if (!has_written) { /* a signal may arrive while it is written */
        has_written = 1;
        write_all(2, text, (size_t)snprintf(text, sizeof text, "%s\n", line));
        close(1), close(2); /* the caller has its answer */
        if (!is_logged) write_log(status, line);
    }
    _exit(status);
}

/* Write the output, which ends with a newline, and exit. */
static void __attribute__((noreturn)) end_with_output(int status, const char *output, size_t length) {
    has_written = 1;
    int wrote = write_all(1, output, length);
    close(1), close(2);
    if (!wrote) write_log(status = 3, "the output could not be written: the caller had closed it");
    _exit(status);
}

/* The handler of the signals, and of the timer. */
static void stop(int number) {
    char line[2 * LINE_BYTES_MAX + 256];
    int status = number == SIGALRM ? 2 : 128 + number;
    if (number == SIGALRM)
        snprintf(line, sizeof line, "not done within %d s: still %s (is this server overloaded?)", timeout_s, doing);
    for (int i = 0; i < ENDING && number != SIGALRM; i++)
        if (ending[i].number == number) snprintf(line, sizeof line, "ended by %s while %s", ending[i].name, doing);
    cut(line);
    end_with_error(status, line, 0);
}

static void take_signals(void) {
    struct sigaction action = {.sa_handler = stop};
    sigprocmask(SIG_BLOCK, NULL, &mask_before);
    set_signals(SIG_BLOCK);
    for (int i = 0; i < ENDING; i++) sigaction(ending[i].number, &action, &before[i]);
    action.sa_handler = SIG_IGN;
    for (int i = 0; i < 2; i++) sigaction(ignored[i], &action, &before[ENDING + i]);
}

/* Leave the call to Python, with signals and timer as the caller set them. Signals that end a call stay blocked until
 * call.py can report them. */
static void leave(void) {
    struct itimerval never = {0};
    sigset_t blocked = mask_before;
    setitimer(ITIMER_REAL, &never, NULL);
    signal(SIGALRM, SIG_IGN); /* forget an alarm that has arrived already: call.py sets its own timer */
    for (int i = 0; i < ENDING; i++) sigaction(ending[i].number, &before[i], NULL);
    for (int i = 0; i < 2; i++) sigaction(ignored[i], &before[ENDING + i], NULL);
    for (int i = 0; i < ENDING; i++)
        if (ending[i].number != SIGALRM) sigaddset(&blocked, ending[i].number);
    sigprocmask(SIG_SETMASK, &blocked, NULL);
    reasons[0] = 0; /* start.c notes them again */
}

/* Leave a begun call to Python, and say what happened. */
static void hand_over(const char *what, size_t length) {
    char *told = malloc(length + 128);
    int head = told ? snprintf(told, 128, "%s %.9f ", call_id, started) : 0;
    if (told) {
        memcpy(told + head, what, length);
        told[head + (int)length] = 0;
        setenv(BEGUN, told, 1);
    }
    leave();
}

/* deadline.process_started: field 22 of /proc/self/stat has the clock ticks since boot. */
static double process_started(void) {
    char text[1024], *at;
    double now = now_s(CLOCK_MONOTONIC);
    int fd = open("/proc/self/stat", O_RDONLY | O_CLOEXEC);
    ssize_t length = fd < 0 ? -1 : read(fd, text, sizeof text - 1);
    if (fd >= 0) close(fd);
    if (length <= 0) return now;
    text[length] = 0;
    at = strrchr(text, ')'); /* the end of field 2, which may contain spaces */
    for (int field = 2; at && field < 22; field++) at = strchr(at + 1, ' ');
    if (!at) return now;
    double age = now_s(CLOCK_BOOTTIME) - (double)strtoull(at + 1, NULL, 10) / (double)sysconf(_SC_CLK_TCK);
    return age >= 0 && age <= AGE_S_MAX ? now - age : now;
}

/* deadline.parse_timeout; 0: Python has to refuse it. */
static int parse_timeout(const char *text) {
    size_t length = strlen(text);
    if (!length || length > 9 || strspn(text, "0123456789") != length) return 0;
    long value = strtol(text, NULL, 10);
    return value <= TIMEOUT_S_MAX ? (int)value : 0;
}

/* entry.door says "call" of three arguments if the first one has a hyphen, but not in front. It knows more calls, of
 * commands that do not exist: these are left to Python, which refuses them. */
static int is_call(int argc, char **argv) {
    return argc == 4 && argv[1][0] != '-' && strchr(argv[1], '-') && strlen(argv[1]) <= COMMAND_BYTES_MAX &&
           is_plain(argv[1], strlen(argv[1])) && !strchr(argv[1], ' ');
}

static int make_call_id(void) {
    unsigned char random[16];
    if (getrandom(random, sizeof random, 0) != (ssize_t)sizeof random) return 0;
    for (int i = 0; i < 16; i++) sprintf(call_id + 2 * i, "%02x", random[i]);
    return 1;
}

/* Set the timer that ends the call half a margin after its deadline. */
static void set_timer(void) {
    double left = ends + margin_s / 2 - now_s(CLOCK_MONOTONIC);
    if (left < 0.001) left = 0.001;
    struct itimerval timer = {.it_value = {(time_t)left, (suseconds_t)((left - (double)(time_t)left) * 1e6)}};
    if (!timer.it_value.tv_sec && timer.it_value.tv_usec < 1000) timer.it_value.tv_usec = 1000; /* 0 would disarm it */
    setitimer(ITIMER_REAL, &timer, NULL);
}

/* Add bytes. Returns 0 without memory. */
static int add(struct bytes *to, const void *from, size_t length) {
    if (to->length + length > to->room) {
        size_t room = to->length + length + (to->length + length) / 2 + 4096;
        unsigned char *grown = realloc(to->at, room);
        if (!grown) return 0;
        to->at = grown, to->room = room;
    }
    memcpy(to->at + to->length, from, length);
    to->length += length;
    return 1;
}

static void put_length(unsigned char *at, size_t length) {
    for (int i = 0; i < 4; i++) at[i] = (unsigned char)(length >> (24 - 8 * i));
}

static size_t get_length(const unsigned char *at) {
    return (size_t)at[0] << 24 | (size_t)at[1] << 16 | (size_t)at[2] << 8 | at[3];
}

static int add_field(struct bytes *to, const void *from, size_t length) {
    unsigned char head[4];
    put_length(head, length);
    return add(to, head, 4) && add(to, from, length);
}

static int add_text(struct bytes *to, const char *text) {
    return add_field(to, text, strlen(text));
}

/* Add the payload file as a field. Returns 0 for a file that Python has to refuse, or that is very large. */
static int add_payload(struct bytes *to, const char *path) {
    struct stat found;
    int fd = WAITING(open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY)); /* as call.read_payload */
    if (fd < 0) return 0;
    if (fstat(fd, &found) || !S_ISREG(found.st_mode) || found.st_size > PAYLOAD_BYTES_MAX) return close(fd), 0;
    size_t head = to->length, blanks = 0;
    char chunk[1 << 16];
    ssize_t got;
    if (!add(to, "\0\0\0\0", 4)) return close(fd), 0;
    while ((got = WAITING(read(fd, chunk, sizeof chunk))) > 0)
        if (!add(to, chunk, (size_t)got) || to->length - head > PAYLOAD_BYTES_MAX) return close(fd), 0;
    close(fd);
    size_t length = to->length - head - 4;
    while (blanks < length && memchr(" \t\n\r\v\f", to->at[head + 4 + blanks], 6)) blanks++;
    put_length(to->at + head, length);
    return !got && blanks < length;
}

/* Make the whole request, as helper_client.ask_helper does. Returns 0 when Python has to begin the call. */
static int make_request(struct bytes *to, char **argv) {
    char absolute[2 * PATH_MAX], times[64];
    const char *executable = argv[0];
    if (executable[0] != '/') { /* the helper's working directory is another one */
        char here[PATH_MAX];
        if (!getcwd(here, sizeof here) || here[0] != '/') return 0;
        if (snprintf(absolute, sizeof absolute, "%s/%s", here, executable) >= (int)sizeof absolute) return 0;
        executable = absolute;
    }
    snprintf(times, sizeof times, "%d %.9f", timeout_s, started);
    if (!add(to, "\0\0\0\0", 4) || !add_text(to, command) || !add_text(to, executable)) return 0;
    if (!add_text(to, call_id) || !add_text(to, times)) return 0;
    for (size_t i = 0; i < sizeof sent_variables / sizeof *sent_variables; i++) {
        const char *value = getenv(sent_variables[i]);
        if (!value) continue;
        unsigned char head[4];
        put_length(head, strlen(sent_variables[i]) + 1 + strlen(value));
        if (!add(to, head, 4) || !add(to, sent_variables[i], strlen(sent_variables[i]))) return 0;
        if (!add(to, "=", 1) || !add(to, value, strlen(value))) return 0;
    }
    strcpy(doing, "reading the payload");
    if (!add_text(to, "") || !add_payload(to, argv[2])) return 0;
    put_length(to->at, to->length - 4);
    return 1;
}

/* The descriptor of the directory of the helper's socket, which is the first usable candidate, as in
 * directory.for_sockets; -1 when Python has to choose it, because it would repair one. */
static int open_directory(void) {
    char path[PATH_MAX];
    struct stat found;
    for (enum candidate which = 0; which < CANDIDATES; which++) {
        if (!candidate(which, path) || path[0] != '/' || !is_safe_above(path)) continue;
        if (is_private(path, 0)) {
            if (access(path, W_OK | X_OK)) continue;
            return open(path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
        }
        if (which != CHOSEN && !lstat(path, &found) && S_ISDIR(found.st_mode) && found.st_uid == geteuid()) return -1;
    }
    return -1;
}

static void set_patience(int helper, double patience_s) {
    struct timeval limit = {(time_t)patience_s, (suseconds_t)((patience_s - (double)(time_t)patience_s) * 1e6)};
    setsockopt(helper, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
    setsockopt(helper, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
}

/* A connection to the helper; -1, with errno: there is none, or it is not our own, or it hangs (EAGAIN). */
static int connect_helper(int directory) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct ucred peer;
    socklen_t size = sizeof peer;
    int helper = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (helper < 0) return -1;
    /* By way of the descriptor: the path of the directory may be longer than an address. */
    int length = snprintf(address.sun_path, sizeof address.sun_path, "/proc/self/fd/%d/" SOCKET, directory);
    set_patience(helper, PATIENCE_S_MIN); /* in case the helper hangs and its backlog is full */
    if (length < (int)sizeof address.sun_path &&
        !WAITING(connect(helper, (struct sockaddr *)&address, sizeof address)) &&
        !getsockopt(helper, SOL_SOCKET, SO_PEERCRED, &peer, &size)) {
        if (peer.uid == geteuid()) return helper;
        errno = ECONNREFUSED;
    }
    close(helper);
    return -1;
}

enum heard { HEARD, BROKEN, HUNG };

static enum heard transmit(int helper, struct bytes *request) {
    for (size_t sent = 0; sent < request->length;) {
        ssize_t took = WAITING(send(helper, request->at + sent, request->length - sent, MSG_NOSIGNAL));
        if (took < 0) return errno == EAGAIN ? HUNG : BROKEN;
        sent += (size_t)took;
    }
    return HEARD;
}

static enum heard receive(int helper, void *into, size_t length) {
    for (size_t have = 0; have < length;) {
        ssize_t got = WAITING(recv(helper, (char *)into + have, length - have, 0));
        if (got < 0 && errno == EAGAIN) return HUNG;
        if (got <= 0) return BROKEN;
        have += (size_t)got;
    }
    return HEARD;
}

/* The fields of a message, at most four; their number, or 0 if it is damaged. */
static int unpack(char *body, size_t length, struct field fields[4]) {
    int count = 0;
    for (size_t at = 0; at < length;) {
        if (count == 4 || length - at < 4) return 0;
        size_t size = get_length((unsigned char *)body + at);
        at += 4;
        if (size > length - at) return 0;
        fields[count++] = (struct field){body + at, size};
        at += size;
    }
    return count;
}

static int is(struct field field, const char *word) {
    return field.length == strlen(word) && !memcmp(field.at, word, field.length);
}

/* The exit status in a field; -1 if it is none. */
static int parse_status(struct field field) {
    int status = 0;
    if (!field.length || field.length > 3) return -1;
    for (size_t i = 0; i < field.length; i++) {
        if (field.at[i] < '0' || field.at[i] > '9') return -1;
        status = 10 * status + field.at[i] - '0';
    }
    return status <= 255 ? status : -1;
}

/* Print the helper's answer and exit, or hand it over to Python. Returns BROKEN if it is none. The byte after a field
 * may be changed. */
static enum heard answer(struct field fields[4]) {
    struct field output = fields[2], error = fields[3], told = error.length ? error : output;
    int status = parse_status(fields[1]);
    if (status < 0) return BROKEN;
    int is_ascii = 1;
    for (size_t i = 0; i < output.length; i++) is_ascii &= output.at[i] >= 0;
    if (error.length ? is_plain(error.at, error.length) : is_ascii) {
        if (!told.length) end_with_output(status, "", 0);
        if (error.length) {
            error.at[error.length] = 0;
            end_with_error(status, error.at, 1);
        }
        while (output.length && output.at[output.length - 1] == '\n') output.length--;
        output.at[output.length] = '\n';
        end_with_output(status, output.at, output.length + 1);
    }
    if (told.length > VARIABLE_BYTES_MAX || memchr(told.at, 0, told.length)) return BROKEN;
    struct bytes what = {0};
    char head[32];
    int length = snprintf(head, sizeof head, "%s %d ", error.length ? "error" : "output", status);
    if (!add(&what, head, (size_t)length) || !add(&what, told.at, told.length)) return BROKEN;
    hand_over((char *)what.at, what.length);
    return HEARD;
}

/* Exchange messages with the helper until its answer. HEARD: the answer was handed over. */
static enum heard converse(int helper, struct bytes *request) {
    enum heard heard = transmit(helper, request);
    char *body = NULL;
    size_t room = 0;
    struct field fields[4];
    while (heard == HEARD) {
        unsigned char head[4];
        if ((heard = receive(helper, head, 4)) != HEARD) break;
        size_t length = get_length(head);
        if (length > MESSAGE_BYTES_MAX) return BROKEN;
        if (length >= room) {
            free(body);
            if (!(body = malloc(room = length + 1))) return BROKEN;
        }
        if ((heard = receive(helper, body, length)) != HEARD) break;
        int count = unpack(body, length, fields);
        if (!count) return BROKEN;
        if (is(fields[0], "answer")) return count == 4 ? answer(fields) : BROKEN;
        if (!is(fields[0], "doing")) continue;
        if (count != 2 || !fields[1].length) return BROKEN;
        size_t kept = fields[1].length < sizeof doing ? fields[1].length : sizeof doing - 1;
        if (!is_plain(fields[1].at, kept > LINE_BYTES_MAX ? LINE_BYTES_MAX : kept)) return BROKEN;
        memcpy(doing, fields[1].at, kept);
        doing[kept] = 0;
    }
    return heard;
}

/* Give the call to the helper. Returns whether it was begun. */
static int ask(char **argv) {
    struct bytes request = {0};
    struct stat found;
    char what[64];
    if (!make_request(&request, argv)) return 0;
    strcpy(doing, "asking the helper");
    int directory = open_directory();
    if (directory < 0) return 0;
    int helper = connect_helper(directory);
    if (helper < 0) {
        if (errno != EAGAIN) return 0;
        hand_over("broken", strlen("broken")); /* so that the seconds of waiting count for the deadline */
        return 1;
    }
    unsigned long long inode = fstatat(directory, SOCKET, &found, AT_SYMLINK_NOFOLLOW) ? 0 : found.st_ino;
    double patience_s = (ends - now_s(CLOCK_MONOTONIC)) / 3;
    if (patience_s > PATIENCE_S) patience_s = PATIENCE_S;
    set_patience(helper, patience_s < PATIENCE_S_MIN ? PATIENCE_S_MIN : patience_s);
    switch (converse(helper, &request)) {
    case HEARD: break;
    case BROKEN: hand_over("broken", strlen("broken")); break;
    case HUNG: hand_over(what, (size_t)sprintf(what, "hung %llu", inode)); break;
    }
    close(helper), close(directory);
    return 1;
}

void call_helper(int argc, char **argv) {
    const char *setting = getenv("NETLOOM_HELPER");
    if (!is_call(argc, argv) || (setting && !strcmp(setting, "0")) || !(timeout_s = parse_timeout(argv[3]))) return;
    for (int fd = 0; fd < 3; fd++)
        if (fcntl(fd, F_GETFD) < 0) return; /* a file of ours would get the number of the caller's */
    if (!make_call_id()) return;
    command = argv[1];
    started = process_started();
    margin_s = timeout_s * 0.05 > 1 ? timeout_s * 0.05 : 1;
    if (margin_s > timeout_s / 2.0) margin_s = timeout_s / 2.0;
    ends = started + timeout_s - margin_s;
    take_signals();
    set_timer();
    if (!ask(argv)) leave();
}
