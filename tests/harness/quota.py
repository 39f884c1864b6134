"""A quota of a user that is exceeded: writes below some paths fail with EDQUOT in processes that load a C library.

Quota file systems need kernel support that containers and many machines lack. The library replaces the C functions that
write, so that it also affects the interpreter, safetensors and the shell.
"""

import os
import shutil
import subprocess

SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

/* Whether `path` contains a line of the file QUOTA_EXCEEDED; appends the path to QUOTA_EXCEEDED.refused. */
static int refused(const char *path) {
    const char *name = getenv("QUOTA_EXCEEDED");
    char text[4096], log[4096];
    if (!name || !path) return 0;
    int file = syscall(SYS_openat, AT_FDCWD, name, O_RDONLY | O_CLOEXEC);
    if (file < 0) return 0;
    ssize_t size = syscall(SYS_read, file, text, sizeof text - 1);
    syscall(SYS_close, file);
    if (size <= 0) return 0;
    text[size] = 0;
    char *rest, *line = strtok_r(text, "\n", &rest);
    while (line && !strstr(path, line)) line = strtok_r(NULL, "\n", &rest);
    if (!line) return 0;
    snprintf(log, sizeof log, "%s.refused", name);
    file = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    if (file >= 0) {
        snprintf(log, sizeof log, "%.4000s\n", path);
        syscall(SYS_write, file, log, strlen(log));
        syscall(SYS_close, file);
    }
    errno = EDQUOT;
    return 1;
}

static int refused_file(int file) {
    int before = errno;
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t size = syscall(SYS_readlinkat, AT_FDCWD, link, path, sizeof path - 1);
    errno = before;
    if (size <= 0) return 0;
    path[size] = 0;
    return refused(path);
}

#define REAL(name) ((typeof(&name)) dlsym(RTLD_NEXT, #name))
#define OPEN(name) int name(const char *path, int flags, ...) { \
    va_list rest; va_start(rest, flags); mode_t mode = va_arg(rest, mode_t); va_end(rest); \
    if (flags & O_CREAT && refused(path)) return -1; return REAL(name)(path, flags, mode); }
#define OPENAT(name) int name(int folder, const char *path, int flags, ...) { \
    va_list rest; va_start(rest, flags); mode_t mode = va_arg(rest, mode_t); va_end(rest); \
    if (flags & O_CREAT && refused(path)) return -1; return REAL(name)(folder, path, flags, mode); }
OPEN(open) OPEN(open64) OPENAT(openat) OPENAT(openat64)

int mkdir(const char *path, mode_t mode) { return refused(path) ? -1 : REAL(mkdir)(path, mode); }
int link(const char *from, const char *path) { return refused(path) ? -1 : REAL(link)(from, path); }
ssize_t write(int file, const void *data, size_t size) {
    return refused_file(file) ? -1 : REAL(write)(file, data, size);
}
ssize_t writev(int file, const struct iovec *data, int count) {
    return refused_file(file) ? -1 : REAL(writev)(file, data, count);
}
ssize_t pwrite(int file, const void *data, size_t size, off_t at) {
    return refused_file(file) ? -1 : REAL(pwrite)(file, data, size, at);
}
ssize_t pwrite64(int file, const void *data, size_t size, off64_t at) {
    return refused_file(file) ? -1 : REAL(pwrite64)(file, data, size, at);
}
int fsync(int file) { return refused_file(file) ? -1 : REAL(fsync)(file); }
int fdatasync(int file) { return refused_file(file) ? -1 : REAL(fdatasync)(file); }
"""
VARIABLES = ("LD_PRELOAD", "QUOTA_EXCEEDED")
"""Environment variables that processes must inherit."""


def compiler():
    """The path of a C compiler; None if there is none."""
    return shutil.which("cc") or shutil.which("gcc")


class Quota:
    """A quota that applies to processes with the environment ``env``."""

    def __init__(self, folder):
        folder.mkdir()
        source = folder / "quota.c"
        library = folder / "quota.so"
        source.write_text(SOURCE)
        subprocess.run([compiler(), "-shared", "-fPIC", "-O1", "-w", "-o", library, source, "-ldl"], check=True)
        self.exceeded = folder / "exceeded"
        self.log = folder / "exceeded.refused"
        self.env = {"LD_PRELOAD": str(library), "QUOTA_EXCEEDED": str(self.exceeded)}

    def exceed(self, *parts):
        """From now on refuse writes to paths that contain one of ``parts``."""
        temporary = self.exceeded.with_suffix(".new")
        temporary.write_text("\n".join(parts) + "\n")
        os.replace(temporary, self.exceeded)

    def restore(self):
        """Refuse no write any more."""
        self.exceeded.unlink()

    def refused(self):
        """Paths of refused writes, in order."""
        if self.log.exists():
            return self.log.read_text().splitlines()
        return []
