/* Counts the system calls a process and its children make on files below a folder, and at one of
 * them kills the process, or lets the call fail. Loaded by LD_PRELOAD; told what to do by a page of
 * shared memory (struct control, laid out alike in control.py), so that a process that was started
 * beforehand can be given its fault at any time. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { WRITE = 1, PUBLISH = 2, SYNC = 4, MAKE = 8, READ = 16 };

struct control {
  _Atomic int64_t count; /* calls so far, of the kinds asked for */
  int64_t at;            /* the call that fails, from 1; 0: none */
  int32_t kinds;
  int32_t error;   /* errno of the call; 0: kill instead */
  int32_t sticky;  /* later calls fail, too, as on a disk that stays full */
  int32_t process; /* what is killed */
  _Atomic int32_t fired;
  char under[PATH_MAX]; /* with a slash at its end */
};

static struct control *control;

__attribute__((constructor)) static void attach(void) {
  const char *name = getenv("FAULT_CONTROL");
  int fd = name ? open(name, O_RDWR | O_CLOEXEC) : -1;
  if (fd < 0) return;
  void *page = mmap(NULL, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (page != MAP_FAILED) control = page;
  close(fd);
}

static int inside(const char *path) {
  return strncmp(path, control->under, strlen(control->under)) == 0;
}

/* Whether this call is to fail: sets errno. Does not return from a kill. */
static int fails(int kind, const char *path) {
  if (!control || !(control->kinds & kind) || !control->under[0] || !inside(path)) return 0;
  int64_t number = atomic_fetch_add(&control->count, 1) + 1;
  if (!control->at || number < control->at || (number > control->at && !control->sticky)) return 0;
  atomic_store(&control->fired, 1);
  if (!control->error) {
    kill(control->process, SIGKILL);
    for (;;) pause();
  }
  errno = control->error;
  return 1;
}

static int fails_at(int kind, int folder, const char *path) {
  char full[PATH_MAX + 32];
  if (!control || !(control->kinds & kind)) return 0;
  if (path[0] == '/') return fails(kind, path);
  char link[64];
  ssize_t size;
  if (folder == AT_FDCWD) {
    if (!getcwd(full, PATH_MAX)) return 0;
    size = strlen(full);
  } else {
    snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    size = readlink(link, full, PATH_MAX);
    if (size < 0) return 0;
  }
  snprintf(full + size, sizeof full - size, "/%s", path);
  return fails(kind, full);
}

static int fails_fd(int kind, int fd) {
  char link[64], path[PATH_MAX + 1];
  if (!control || !(control->kinds & kind)) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t size = readlink(link, path, PATH_MAX);
  if (size < 0) return 0;
  path[size] = 0;
  return fails(kind, path);
}

#define ON_FD(kind, type, name, fd, parameters, arguments)     \
  type name parameters {                                       \
    static type (*real) parameters;                            \
    if (!real) real = (type(*) parameters)dlsym(RTLD_NEXT, #name); \
    return fails_fd(kind, fd) ? -1 : real arguments;           \
  }

#define ON_PATH(kind, name, folder, path, parameters, arguments) \
  int name parameters {                                        \
    static int (*real) parameters;                             \
    if (!real) real = (int (*) parameters)dlsym(RTLD_NEXT, #name); \
    return fails_at(kind, folder, path) ? -1 : real arguments; \
  }

ON_FD(WRITE, ssize_t, write, fd, (int fd, const void *b, size_t n), (fd, b, n))
ON_FD(WRITE, ssize_t, pwrite, fd, (int fd, const void *b, size_t n, off_t o), (fd, b, n, o))
ON_FD(WRITE, ssize_t, pwrite64, fd, (int fd, const void *b, size_t n, off64_t o), (fd, b, n, o))
ON_FD(WRITE, ssize_t, writev, fd, (int fd, const struct iovec *v, int n), (fd, v, n))
ON_FD(WRITE, int, ftruncate, fd, (int fd, off_t n), (fd, n))
ON_FD(WRITE, int, ftruncate64, fd, (int fd, off64_t n), (fd, n))
ON_FD(WRITE, ssize_t, sendfile, out, (int out, int in, off_t *o, size_t n), (out, in, o, n))
ON_FD(WRITE, ssize_t, sendfile64, out, (int out, int in, off64_t *o, size_t n), (out, in, o, n))
ON_FD(WRITE, ssize_t, copy_file_range, out,
      (int in, off64_t *a, int out, off64_t *b, size_t n, unsigned f), (in, a, out, b, n, f))
ON_FD(SYNC, int, fsync, fd, (int fd), (fd))
ON_FD(SYNC, int, fdatasync, fd, (int fd), (fd))
ON_FD(READ, ssize_t, read, fd, (int fd, void *b, size_t n), (fd, b, n))
ON_FD(READ, ssize_t, pread, fd, (int fd, void *b, size_t n, off_t o), (fd, b, n, o))
ON_FD(READ, ssize_t, pread64, fd, (int fd, void *b, size_t n, off64_t o), (fd, b, n, o))

ON_PATH(PUBLISH, rename, AT_FDCWD, b, (const char *a, const char *b), (a, b))
ON_PATH(PUBLISH, renameat, n, b, (int m, const char *a, int n, const char *b), (m, a, n, b))
ON_PATH(PUBLISH, link, AT_FDCWD, b, (const char *a, const char *b), (a, b))
ON_PATH(PUBLISH, linkat, n, b, (int m, const char *a, int n, const char *b, int f), (m, a, n, b, f))
ON_PATH(PUBLISH, symlink, AT_FDCWD, b, (const char *a, const char *b), (a, b))
ON_PATH(MAKE, mkdir, AT_FDCWD, p, (const char *p, mode_t m), (p, m))
ON_PATH(MAKE, mkdirat, d, p, (int d, const char *p, mode_t m), (d, p, m))

#define ON_OPEN(name, folder, path, parameters, arguments)     \
  int name parameters {                                        \
    static int (*real)();                                      \
    if (!real) real = (int (*)())dlsym(RTLD_NEXT, #name);      \
    va_list more;                                              \
    va_start(more, flags);                                     \
    mode_t mode = flags & O_CREAT ? va_arg(more, mode_t) : 0;  \
    va_end(more);                                              \
    if ((flags & O_CREAT) && fails_at(MAKE, folder, path)) return -1; \
    return real arguments;                                     \
  }

ON_OPEN(open, AT_FDCWD, p, (const char *p, int flags, ...), (p, flags, mode))
ON_OPEN(open64, AT_FDCWD, p, (const char *p, int flags, ...), (p, flags, mode))
ON_OPEN(openat, d, p, (int d, const char *p, int flags, ...), (d, p, flags, mode))
ON_OPEN(openat64, d, p, (int d, const char *p, int flags, ...), (d, p, flags, mode))
