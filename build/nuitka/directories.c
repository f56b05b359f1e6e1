/*
 * The directories that the one file may use, as in extension/directory.py.
 */
#define _GNU_SOURCE
#include "directories.h"

#include <dirent.h>
#include <errno.h>
#include <ftw.h>
#include <limits.h>
#include <pwd.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define FOREIGN ".foreign-" /* the beginning of the names of other users' directories in ours; directory.py knows it */

char reasons[2048];

int no(const char *path, const char *format, ...) {
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

int is_safe_above(const char *path) {
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

int remove_entry(const char *path, const struct stat *found, int kind, struct FTW *walk) {
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

int is_private(const char *path, int is_ours) {
    struct stat found;
    if (lstat(path, &found) && (errno != ENOENT || (mkdir(path, 0700) && errno != EEXIST) || lstat(path, &found)))
        return no(path, "%s", strerror(errno));
    if (!S_ISDIR(found.st_mode)) return no(path, S_ISLNK(found.st_mode) ? "a link" : "not a directory");
    if (found.st_uid != geteuid()) return no(path, "owned by uid %u", (unsigned)found.st_uid);
    if ((found.st_mode & 0777) == 0700) return 1;
    return is_ours ? repair_mode(path) : no(path, "mode %04o, not 0700", (unsigned)(found.st_mode & 07777));
}

static const char *home(void) {
    const char *set = getenv("HOME");
    if (set && set[0] == '/') return set;
    struct passwd *user = getpwuid(geteuid());
    return user && user->pw_dir && user->pw_dir[0] == '/' ? user->pw_dir : NULL;
}

int candidate(enum candidate which, char path[PATH_MAX]) {
    const char *set = getenv("NETLOOM_DIR"), *runtime = getenv("XDG_RUNTIME_DIR"), *at_home;
    int length = 0;
    switch (which) {
    case CHOSEN: length = set ? snprintf(path, PATH_MAX, "%s", set) : 0; break;
    case RUNTIME:
        length = runtime && runtime[0] == '/' ? snprintf(path, PATH_MAX, "%s/netloom", runtime) : 0;
        break;
    case AT_HOME: length = (at_home = home()) ? snprintf(path, PATH_MAX, "%s/.cache/netloom", at_home) : 0; break;
    case VAR_CACHE: length = snprintf(path, PATH_MAX, "/var/cache/netloom/%u", (unsigned)geteuid()); break;
    case VAR_TMP: length = snprintf(path, PATH_MAX, "/var/tmp/netloom-%u", (unsigned)geteuid()); break;
    case CANDIDATES: break;
    }
    return length > 0 && length < PATH_MAX;
}
