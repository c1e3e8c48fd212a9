/* A disk that fails when it is told to, for test_faults.py.

   In LD_PRELOAD these functions come before the C library's of the same names. Once `failing_disk` was called
   they count the calls that concern files below a directory, note them in a file, and let one or some of them
   fail. Until then, and everywhere else, they do nothing but call the C library.

   stat and its like are not among them: other libraries take a file of which they hear nothing for absent. */

#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { READING = 1, WRITING };
enum { KILLED = -2, SHORT, NOTHING }; /* what happens instead of an errno */

static char under[PATH_MAX];
static int watched, first, last, outcome, trace = -1;
static atomic_int calls;

/* From now on watch the calls of `kind` below `directory`: those with the numbers from first to last, beginning
   at 1, fail with the errno `outcome`; or the process is KILLED before them, or of a write only a part is done
   (SHORT), or NOTHING happens. All calls are noted in the file `log`. */
void failing_disk(const char *directory, int kind, int from, int to, int how, const char *log) {
    trace = open(log, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    watched = kind, first = from, last = to, outcome = how;
    strcpy(under, directory);
}

/* Whether a file is below the directory; it is `path` as seen from the descriptor `at`, or `at` itself. */
static int is_below(int at, const char *path, char *whole) {
    char link[64];
    size_t length = 0;
    if (!path || path[0] != '/') {
        snprintf(link, sizeof link, at == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", at);
        ssize_t size = readlink(link, whole, PATH_MAX - 1);
        length = size < 0 ? 0 : size;
        whole[length] = 0;
    }
    if (path)
        snprintf(whole + length, PATH_MAX - length, "%s%s", length ? "/" : "", path);
    length = strlen(under);
    return !strncmp(whole, under, length) && (!whole[length] || whole[length] == '/');
}

/* Whether this call is to fail; errno says how. */
static int fails(int kind, const char *call, int at, const char *path) {
    char whole[PATH_MAX], line[PATH_MAX + 64];
    if (kind != watched || !is_below(at, path, whole))
        return 0;
    int number = atomic_fetch_add(&calls, 1) + 1;
    syscall(SYS_write, trace, line, snprintf(line, sizeof line, "%s %s\n", call, whole));
    if (number < first || number > last || outcome == SHORT || outcome == NOTHING)
        return 0;
    if (outcome == KILLED)
        kill(getpid(), SIGKILL);
    errno = outcome;
    return 1;
}

#define NEXT(type, name, parameters) \
    static type(*next) parameters; \
    if (!next) \
        next = (type(*) parameters)dlsym(RTLD_NEXT, #name);

/* A function that returns -1 when it fails. */
#define CALL(kind, type, name, parameters, arguments, at, path) \
    type name parameters { \
        NEXT(type, name, parameters) \
        return fails(kind, #name, at, path) ? -1 : next arguments; \
    }

CALL(WRITING, int, mkdir, (const char *path, mode_t mode), (path, mode), AT_FDCWD, path)
CALL(WRITING, int, mkdirat, (int at, const char *path, mode_t mode), (at, path, mode), at, path)
CALL(WRITING, int, unlink, (const char *path), (path), AT_FDCWD, path)
CALL(WRITING, int, unlinkat, (int at, const char *path, int flags), (at, path, flags), at, path)
CALL(WRITING, int, rmdir, (const char *path), (path), AT_FDCWD, path)
CALL(WRITING, int, rename, (const char *from, const char *to), (from, to), AT_FDCWD, to)
CALL(WRITING, int, renameat, (int at, const char *from, int other, const char *to), (at, from, other, to),
     other, to)
CALL(WRITING, int, renameat2, (int at, const char *from, int other, const char *to, unsigned flags),
     (at, from, other, to, flags), other, to)
CALL(WRITING, int, link, (const char *from, const char *to), (from, to), AT_FDCWD, to)
CALL(WRITING, int, symlink, (const char *from, const char *to), (from, to), AT_FDCWD, to)
CALL(WRITING, int, truncate64, (const char *path, off64_t size), (path, size), AT_FDCWD, path)
CALL(WRITING, int, ftruncate64, (int file, off64_t size), (file, size), file, NULL)
CALL(WRITING, int, fsync, (int file), (file), file, NULL)
CALL(WRITING, int, fdatasync, (int file), (file), file, NULL)
CALL(WRITING, ssize_t, pwrite64, (int file, const void *data, size_t size, off64_t at),
     (file, data, size, at), file, NULL)
CALL(WRITING, ssize_t, writev, (int file, const struct iovec *parts, int count), (file, parts, count), file, NULL)
CALL(WRITING, ssize_t, sendfile64, (int to, int from, off64_t *at, size_t size), (to, from, at, size), to, NULL)
CALL(WRITING, ssize_t, copy_file_range,
     (int from, off64_t *at, int to, off64_t *there, size_t size, unsigned flags),
     (from, at, to, there, size, flags), to, NULL)

CALL(READING, ssize_t, read, (int file, void *data, size_t size), (file, data, size), file, NULL)
CALL(READING, ssize_t, pread64, (int file, void *data, size_t size, off64_t at), (file, data, size, at), file,
     NULL)

ssize_t write(int file, const void *data, size_t size) {
    char whole[PATH_MAX];
    NEXT(ssize_t, write, (int, const void *, size_t))
    if (fails(WRITING, "write", file, NULL))
        return -1;
    return next(file, data, outcome == SHORT && is_below(file, NULL, whole) ? (size + 1) / 2 : size);
}

/* Its result is the errno. */
int posix_fallocate64(int file, off64_t start, off64_t size) {
    NEXT(int, posix_fallocate64, (int, off64_t, off64_t))
    return fails(WRITING, "posix_fallocate64", file, NULL) ? outcome : next(file, start, size);
}

/* What a file system has put off may fail now; the descriptor is gone all the same. */
int close(int file) {
    NEXT(int, close, (int))
    int writes = (fcntl(file, F_GETFL) & O_ACCMODE) != O_RDONLY;
    int failed = writes && fails(WRITING, "close", file, NULL);
    int result = next(file);
    if (failed)
        errno = outcome;
    return failed ? -1 : result;
}

DIR *opendir(const char *path) {
    NEXT(DIR *, opendir, (const char *))
    return fails(READING, "opendir", AT_FDCWD, path) ? NULL : next(path);
}

static int open_kind(int flags) {
    return flags & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC) ? WRITING : READING;
}

#define OPEN(name, parameters, arguments, at) \
    int name parameters { \
        NEXT(int, name, parameters) \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest); \
        return fails(open_kind(flags), #name, at, path) ? -1 : next arguments; \
    }

OPEN(open, (const char *path, int flags, ...), (path, flags, mode), AT_FDCWD)
OPEN(open64, (const char *path, int flags, ...), (path, flags, mode), AT_FDCWD)
OPEN(openat, (int at, const char *path, int flags, ...), (at, path, flags, mode), at)
OPEN(openat64, (int at, const char *path, int flags, ...), (at, path, flags, mode), at)
