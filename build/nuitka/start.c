/*
 * The start of the one file.
 *
 * Nuitka's own start code compares every byte of the unpacked files, stays as a second process, and turns SIGTERM into
 * SIGINT. This object is linked into the same executable and runs before it. If this build is unpacked already, it
 * executes the unpacked program with the same pid. Otherwise a child lets Nuitka's start code unpack the program into a
 * new directory, which is renamed when all of it is on the disk. So an incomplete program is never executed, and two
 * first starts at the same time do no harm.
 *
 * Before it starts Python, it lets the door in C (call.c) try to answer a call by the resident helper.
 *
 * The directories are those of extension/directory.py (directories.c), on a mount that allows exec. Code is executed only
 * from a directory of our own, which nobody else can enter or replace.
 *
 * The object is linked into the unpacked program, too. There it only has to exit at once while unpacking.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "call.h"
#include "directories.h"

#ifndef BUILD_ID
#error "BUILD_ID: the name of the directory that this build is unpacked into"
#endif
#define PROGRAM "netloom.bin"
#define UNPACKING "NETLOOM_UNPACKING"
#define UNPACKED_BYTES (80UL << 20) /* the required free space; build/nuitka/build checks it */
#define TOUCH_AFTER_S 600           /* program.py keeps builds whose directory is younger than an hour */

extern int Py_IsInitialized(void) __attribute__((weak)); /* defined in the unpacked program only */

static int allows_exec(const char *path) {
    struct statvfs mount;
    if (statvfs(path, &mount)) return no(path, "%s", strerror(errno));
    return mount.f_flag & ST_NOEXEC ? no(path, "mounted noexec") : 1;
}

/* Whether this build is unpacked; it is complete, because it is renamed last. 2: it was not used for a while. */
static int is_unpacked(const char *build) {
    char program[PATH_MAX];
    struct stat directory, file;
    if (snprintf(program, sizeof program, "%s/" PROGRAM, build) >= (int)sizeof program) return 0;
    if (lstat(build, &directory) || lstat(program, &file)) return 0;
    if (!S_ISDIR(directory.st_mode) || directory.st_uid != geteuid()) return 0;
    if ((directory.st_mode & 0777) != 0700) return 0; /* changed by others, or closed: unpack it anew */
    if (!S_ISREG(file.st_mode) || file.st_uid != geteuid() || (file.st_mode & 022) || (file.st_mode & 0500) != 0500) return 0;
    if (time(NULL) - directory.st_mtime <= TOUCH_AFTER_S) return 1;
    utimensat(AT_FDCWD, build, NULL, 0); /* mark it as used */
    return 2;
}

/* In the child: let Nuitka's start code unpack into the new directory, without output. */
static void go_on_and_unpack(const char *fresh) {
    int null = open("/dev/null", O_RDWR);
    for (int fd = 0; fd < 3; fd++) dup2(null, fd);
    umask(077); /* the caller's umask may remove the permission to execute */
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    setenv("XDG_CACHE_HOME", fresh, 1);
    setenv(UNPACKING, "1", 1);
}

/* Remove what stands in the place of a build: a damaged one, a link or a file. */
static void make_room(const char *build) {
    struct stat found;
    if (!lstat(build, &found) && S_ISDIR(found.st_mode)) chmod(build, 0700);
    nftw(build, remove_entry, 8, FTW_DEPTH | FTW_PHYS);
}

/* 1: unpacked and renamed; 0: failed, with the reason noted; -1: this is the child, which has to unpack. */
static int unpack(const char *programs, const char *build) {
    char fresh[PATH_MAX], made[PATH_MAX];
    struct statvfs disk;
    if (statvfs(programs, &disk)) return no(programs, "%s", strerror(errno));
    if ((unsigned long)disk.f_bavail * disk.f_frsize < UNPACKED_BYTES)
        return no(programs, "%lu MB free, %lu needed", (unsigned long)disk.f_bavail * disk.f_frsize >> 20, UNPACKED_BYTES >> 20);
    if (snprintf(fresh, sizeof fresh, "%s/.new-XXXXXX", programs) >= (int)sizeof fresh || !mkdtemp(fresh))
        return no(programs, "%s", strerror(errno));
    int status = -1, done = 0;
    pid_t child = fork();
    if (!child) {
        go_on_and_unpack(fresh);
        return -1;
    }
    while (child > 0 && waitpid(child, &status, 0) < 0 && errno == EINTR) continue;
    snprintf(made, sizeof made, "%s/" BUILD_ID, fresh);
    if (child > 0 && WIFEXITED(status) && WEXITSTATUS(status) == 0 && !chmod(made, 0700)) {
        int fd = open(made, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        done = fd >= 0 && !syncfs(fd); /* before the rename: a power failure must not leave half a build */
        if (fd >= 0) close(fd);
        if (done && rename(made, build) && !is_unpacked(build)) {
            make_room(build);
            if (rename(made, build) && !is_unpacked(build)) done = no(build, "%s", strerror(errno));
        }
    } else {
        no(programs, statvfs(programs, &disk) || disk.f_bavail ? "unpacking failed" : "no space left");
    }
    nftw(fresh, remove_entry, 8, FTW_DEPTH | FTW_PHYS);
    return done;
}

/* Block the signals that end a program until it can report them (entry.py, call.py). */
static void hold_signals(int how) {
    sigset_t ending;
    sigemptyset(&ending);
    sigaddset(&ending, SIGTERM), sigaddset(&ending, SIGINT), sigaddset(&ending, SIGHUP);
    sigprocmask(how, &ending, NULL);
}

/* Execute the program from ``directory``; ``is_ours``: see is_private. Returns 0 if it cannot be used, and -1 in the child
 * that unpacks. */
static int start_from(const char *directory, int is_ours, char **argv) {
    char programs[PATH_MAX], build[PATH_MAX], program[PATH_MAX], self[PATH_MAX];
    if (directory[0] != '/' || strlen(directory) > PATH_MAX - 256) return no(directory, "not an absolute path");
    snprintf(programs, sizeof programs, "%s/programs", directory);
    snprintf(build, sizeof build, "%s/" BUILD_ID, programs);
    if (!is_safe_above(directory) || !is_private(directory, is_ours) || !is_private(programs, 1) || !allows_exec(programs)) return 0;
    int there = is_unpacked(build);
    if (!there) {
        int made = unpack(programs, build);
        if (made != 1) return made;
        there = 2;
    }
    ssize_t length = readlink("/proc/self/exe", self, sizeof self - 1);
    if (length < 0) return no("/proc/self/exe", "%s", strerror(errno));
    self[length] = 0;
    setenv("NETLOOM_EXE", self, 1);
    if (there == 2) setenv("NETLOOM_TIDY", "1", 1); /* program.py then removes unused builds */
    setenv("NETLOOM_PATH", getenv("PATH") ? getenv("PATH") : "", 1); /* Nuitka hides it from the interpreter */
    setenv("NUITKA_ORIGINAL_ARGV0", argv[0], 1);
    *strrchr(self, '/') = 0;
    setenv("NUITKA_ONEFILE_DIRECTORY", self, 1);
    snprintf(program, sizeof program, "%s/" PROGRAM, build);
    hold_signals(SIG_BLOCK);
    execv(program, argv);
    no(program, "%s", strerror(errno));
    hold_signals(SIG_UNBLOCK);
    return 0;
}

/* Remove the caller's PYTHON* variables: the interpreter would obey them, and some stop it or make it print. */
static void forget_settings_of_python(void) {
    for (char **entry = environ; *entry;) {
        char name[128];
        size_t length = strcspn(*entry, "=");
        if (strncmp(*entry, "PYTHON", 6) || length >= sizeof name || !(*entry)[length]) {
            entry++;
            continue;
        }
        memcpy(name, *entry, length);
        name[length] = 0;
        unsetenv(name); /* the following entries move up */
    }
}

__attribute__((constructor)) static void start(int argc, char **argv) {
    char directory[PATH_MAX];
    if (Py_IsInitialized) {
        if (getenv(UNPACKING)) _exit(0);
        return;
    }
    if (argc < 1) _exit(1);
    unsetenv(UNPACKING);
    unsetenv("NETLOOM_TIDY");
    unsetenv(BEGUN); /* only call_helper sets it */
    unsetenv("NUITKA_ONEFILE_PARENT");
    forget_settings_of_python();
    signal(SIGCHLD, SIG_DFL); /* if the caller ignores it, we inherit that, and waitpid fails */
    call_helper(argc, argv);
    for (enum candidate which = 0; which < CANDIDATES; which++)
        if (which != RUNTIME && candidate(which, directory) && start_from(directory, which != CHOSEN, argv)) return;
    fprintf(stderr, "netloom: no directory to unpack this program into: %s (run: install -d -m 755 /var/cache/netloom && install -d -m 700 -o %u /var/cache/netloom/%u; or set NETLOOM_DIR to a directory of uid %u with mode 0700, where programs may run)\n",
            reasons, (unsigned)geteuid(), (unsigned)geteuid(), (unsigned)geteuid());
    _exit(1);
}
