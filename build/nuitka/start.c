/*
 * The start of the one file.
 *
 * Nuitka's own start code compares every byte of the unpacked files, stays as a second process, and turns SIGTERM into
 * SIGINT. This object is linked into the same executable and runs before it. If this build is unpacked already, it
 * executes the unpacked program with the same pid. Otherwise a child lets Nuitka's start code unpack the program into a
 * new directory, which is renamed when all of it is on the disk. So an incomplete program is never executed, and two
 * first starts at the same time do no harm.
 *
 * The directories are those of extension/directory.py, on a mount that allows exec. Code is executed only from a
 * directory of our own, which nobody else can enter or replace.
 *
 * The object is linked into the unpacked program, too. There it only has to exit at once while unpacking.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <limits.h>
#include <pwd.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#ifndef BUILD_ID
#error "BUILD_ID: the name of the directory that this build is unpacked into"
#endif
#define PROGRAM "netloom.bin"
#define UNPACKING "NETLOOM_UNPACKING"
#define UNPACKED_BYTES (80UL << 20) /* the required free space; build/nuitka/build checks it */
#define FOREIGN ".foreign-" /* the beginning of the names of other users' directories in ours; directory.py knows it */
#define TOUCH_AFTER_S 600           /* program.py keeps builds whose directory is younger than an hour */

extern int Py_IsInitialized(void) __attribute__((weak)); /* defined in the unpacked program only */

static char reasons[2048];

/* Note why a directory cannot be used, for the error message. Returns 0. */
static int no(const char *path, const char *format, ...) {
    size_t used = strlen(reasons);
    int wrote = snprintf(reasons + used, sizeof reasons - used, "%s%s: ", used ? "; " : "", path);
    if (wrote > 0 && used + wrote < sizeof reasons) {
        va_list values;
        va_start(values, format);
        vsnprintf(reasons + used + wrote, sizeof reasons - used - wrote, format, values);
        va_end(values);
    }
    return 0;
}

/* Whether nobody else can replace ``path``: checks the directories above it. Creates those that are missing. */
static int is_safe_above(const char *path) {
    char above[PATH_MAX];
    struct stat found;
    snprintf(above, sizeof above, "%s", path);
    for (char *end = strchr(above + 1, '/'); end; end = strchr(end + 1, '/')) {
        *end = 0;
        if (lstat(above, &found) && (errno != ENOENT || (mkdir(above, 0700) && errno != EEXIST) || lstat(above, &found)))
            return no(path, "%s", strerror(errno));
        if (found.st_uid && found.st_uid != geteuid())
            return no(path, "%s is owned by uid %u", above, (unsigned)found.st_uid);
        /* Homes that their own group may write to are common. A sticky directory protects our entries in it. */
        int others = S_IWOTH | (found.st_gid && found.st_gid != getegid() ? S_IWGRP : 0);
        if (!S_ISLNK(found.st_mode) && !(found.st_mode & S_ISVTX) && (found.st_mode & others))
            return no(path, "others may write to %s", above);
        *end = '/';
    }
    return 1;
}

static int remove_entry(const char *path, const struct stat *found, int kind, struct FTW *walk) {
    (void)found, (void)kind, (void)walk;
    return remove(path);
}

/* Make a directory of ours private again, and remove what other users may have put into it. Their directories may have
 * content that only they can remove: these get a name that netloom does not use. */
static int repair_mode(const char *path) {
    char entry[PATH_MAX], aside[PATH_MAX];
    struct stat found;
    if (chmod(path, 0700)) return no(path, "%s", strerror(errno));
    DIR *listed = opendir(path);
    if (!listed) return no(path, "%s", strerror(errno));
    for (struct dirent *each; (each = readdir(listed));) {
        if (!strcmp(each->d_name, ".") || !strcmp(each->d_name, "..")) continue;
        if (snprintf(entry, sizeof entry, "%s/%s", path, each->d_name) >= (int)sizeof entry) continue;
        if (lstat(entry, &found) || found.st_uid == geteuid()) continue;
        nftw(entry, remove_entry, 8, FTW_DEPTH | FTW_PHYS);
        if (!lstat(entry, &found) && strncmp(each->d_name, FOREIGN, strlen(FOREIGN)) &&
            snprintf(aside, sizeof aside, "%s/" FOREIGN "%ld-%ld", path, (long)time(NULL), (long)found.st_ino) < (int)sizeof aside)
            rename(entry, aside);
    }
    closedir(listed);
    return 1;
}

/* Whether ``path`` is a directory of our own with mode 0700, and no link. Creates it if it is missing. ``is_ours``: it
 * is netloom's alone, so another mode is repaired. */
static int is_private(const char *path, int is_ours) {
    struct stat found;
    if (lstat(path, &found) && (errno != ENOENT || (mkdir(path, 0700) && errno != EEXIST) || lstat(path, &found)))
        return no(path, "%s", strerror(errno));
    if (!S_ISDIR(found.st_mode)) return no(path, S_ISLNK(found.st_mode) ? "a link" : "not a directory");
    if (found.st_uid != geteuid()) return no(path, "owned by uid %u", (unsigned)found.st_uid);
    if ((found.st_mode & 0777) == 0700) return 1;
    return is_ours ? repair_mode(path) : no(path, "mode %04o, not 0700", (unsigned)(found.st_mode & 07777));
}

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

static const char *home(void) {
    const char *set = getenv("HOME");
    if (set && set[0] == '/') return set;
    struct passwd *user = getpwuid(geteuid());
    return user && user->pw_dir && user->pw_dir[0] == '/' ? user->pw_dir : NULL;
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
    const char *set = getenv("NETLOOM_DIR"), *at_home;
    if (Py_IsInitialized) {
        if (getenv(UNPACKING)) _exit(0);
        return;
    }
    if (argc < 1) _exit(1);
    unsetenv(UNPACKING);
    unsetenv("NETLOOM_TIDY");
    unsetenv("NUITKA_ONEFILE_PARENT");
    forget_settings_of_python();
    signal(SIGCHLD, SIG_DFL); /* if the caller ignores it, we inherit that, and waitpid fails */
    if (set && *set && start_from(set, 0, argv)) return;
    if ((at_home = home()) && snprintf(directory, sizeof directory, "%s/.cache/netloom", at_home) < (int)sizeof directory &&
        start_from(directory, 1, argv))
        return;
    snprintf(directory, sizeof directory, "/var/cache/netloom/%u", (unsigned)geteuid());
    if (start_from(directory, 1, argv)) return;
    snprintf(directory, sizeof directory, "/var/tmp/netloom-%u", (unsigned)geteuid());
    if (start_from(directory, 1, argv)) return;
    fprintf(stderr, "netloom: no directory to unpack this program into: %s (run: install -d -m 755 /var/cache/netloom && install -d -m 700 -o %u /var/cache/netloom/%u; or set NETLOOM_DIR to a directory of uid %u with mode 0700, where programs may run)\n",
            reasons, (unsigned)geteuid(), (unsigned)geteuid(), (unsigned)geteuid());
    _exit(1);
}
