/* The directories that the one file may use (directories.c). */
#ifndef NETLOOM_DIRECTORIES_H
#define NETLOOM_DIRECTORIES_H

#include <ftw.h>
#include <limits.h>
#include <sys/stat.h>

/* The candidates, best first: $NETLOOM_DIR, $XDG_RUNTIME_DIR/netloom (for sockets only), and those of the user. */
enum candidate { CHOSEN, RUNTIME, AT_HOME, VAR_CACHE, VAR_TMP, CANDIDATES };

/* Write the path of a candidate. 0: the environment names none, or its path is too long. */
int candidate(enum candidate which, char path[PATH_MAX]);

/* Why directories cannot be used, for the error message. */
extern char reasons[2048];

/* Note a reason. Returns 0. */
int no(const char *path, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* Whether nobody else can replace ``path``: checks the directories above it. Creates those that are missing. */
int is_safe_above(const char *path);

/* Whether ``path`` is a directory of our own with mode 0700, and no link. Creates it if it is missing. ``is_ours``: it
 * is netloom's alone, so another mode is repaired. */
int is_private(const char *path, int is_ours);

/* Remove a file or an empty directory, for nftw(3). */
int remove_entry(const char *path, const struct stat *found, int kind, struct FTW *walk);

#endif
