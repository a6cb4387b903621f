/* What reaches the disk, and what may fail on the way: a preloaded library for the crash tests.

   HISS_TEST_SHIM_ROOT   folder whose files are watched (no trailing slash)
   HISS_TEST_SHIM_LOG    every write, flush and change of names under it is appended here, in one order for all processes
   HISS_TEST_SHIM_FAULTS folder of tokens "<operation>@<errno>@<part of path>@<anything>" (with | for /): a matching
                         operation removes the token and fails; errno 0 is a short write. A token that starts with "+" stays.

   A write and a flush are two records, before and after the call: a flush covers what was done before it began.
   Records: see struct record; tests/crash/powercut.py reads them. */

#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { BEGIN_WRITE = 1, END_WRITE, BEGIN_FLUSH, END_FLUSH, CREATE, RENAME, UNLINK, MKDIR, RMDIR, TRUNCATE, FLUSH_FOLDER };

struct __attribute__((packed)) record {
    uint32_t magic;
    uint32_t operation;
    uint64_t call; /* joins the two records of one call */
    uint64_t inode;
    int64_t offset;
    uint64_t length;
    uint32_t path_bytes;
    uint32_t other_bytes;
    uint64_t data_bytes;
};

#define MAGIC 0x4d494853u

static const char *root, *log_path, *faults;
static size_t root_bytes;
static int log_fd = -1;
static uint64_t calls;


static void forked(void) {
    calls = (uint64_t)getpid() << 32;
}

__attribute__((constructor)) static void begin(void) {
    root = getenv("HISS_TEST_SHIM_ROOT");
    log_path = getenv("HISS_TEST_SHIM_LOG");
    faults = getenv("HISS_TEST_SHIM_FAULTS");
    if (root) root_bytes = strlen(root);
    if (root && log_path) {
        int fd = (int)syscall(SYS_openat, AT_FDCWD, log_path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
        /* High: programs close or reuse low descriptors. */
        log_fd = fcntl(fd, F_DUPFD_CLOEXEC, 900);
        syscall(SYS_close, fd);
    }
    forked();
    pthread_atfork(NULL, NULL, forked);
}

static int watched(const char *path) {
    return root && strncmp(path, root, root_bytes) == 0 && path[root_bytes] == '/';
}

static int path_of(int fd, char *path) {
    char name[64];
    snprintf(name, sizeof name, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(name, path, PATH_MAX - 1);
    if (length <= 0) return 0;
    path[length] = 0;
    return watched(path);
}

static int absolute(int folder, const char *path, char *full) {
    if (!root || !path) return 0;
    if (path[0] == '/') {
        snprintf(full, PATH_MAX, "%s", path);
        return watched(full);
    }
    char base[PATH_MAX];
    if (folder == AT_FDCWD) {
        if (!getcwd(base, sizeof base)) return 0;
    } else {
        char name[64];
        snprintf(name, sizeof name, "/proc/self/fd/%d", folder);
        ssize_t length = readlink(name, base, sizeof base - 1);
        if (length <= 0) return 0;
        base[length] = 0;
    }
    snprintf(full, PATH_MAX, "%.2000s/%.2000s", base, path);
    return watched(full);
}

static uint64_t inode_of(int fd) {
    struct stat status;
    return fstat(fd, &status) ? 0 : status.st_ino;
}

static uint64_t note(uint32_t operation, uint64_t call, uint64_t inode, int64_t offset, uint64_t length, const char *path,
                     const char *other, const struct iovec *data, int count) {
    if (log_fd < 0) return 0;
    int before = errno;
    if (!call) call = __atomic_add_fetch(&calls, 1, __ATOMIC_RELAXED);
    struct record record = {MAGIC, operation, call, inode, offset, length, 0, 0, 0};
    struct iovec parts[1027];
    int used = 0;
    record.path_bytes = path ? strlen(path) : 0;
    record.other_bytes = other ? strlen(other) : 0;
    parts[used++] = (struct iovec){&record, sizeof record};
    parts[used++] = (struct iovec){(void *)path, record.path_bytes};
    parts[used++] = (struct iovec){(void *)other, record.other_bytes};
    for (int i = 0; i < count && used < 1027; i++) {
        parts[used++] = data[i];
        record.data_bytes += data[i].iov_len;
    }
    syscall(SYS_writev, log_fd, parts, used);
    errno = before;
    return call;
}

/* 1 and errno where this operation is to fail, 2 where it is to be short, else 0. */
static int fault(const char *operation, const char *path) {
    if (!faults) return 0;
    DIR *folder = opendir(faults);
    if (!folder) return 0;
    int found = 0;
    struct dirent *entry;
    while (!found && (entry = readdir(folder))) {
        char name[256];
        snprintf(name, sizeof name, "%s", entry->d_name);
        int stays = name[0] == '+';
        char *rest = name + stays, *wanted = strsep(&rest, "@"), *code = strsep(&rest, "@"), *part = strsep(&rest, "@");
        for (char *slash = part; slash && (slash = strchr(slash, '|'));) *slash = '/';
        if (!wanted || !code || !part || strcmp(wanted, operation) || !strstr(path, part)) continue;
        if (stays || unlinkat(dirfd(folder), entry->d_name, 0) == 0) {
            errno = atoi(code);
            found = errno ? 1 : 2;
        }
    }
    int code = errno;
    closedir(folder);
    errno = code;
    return found;
}

/* -- writes */

static ssize_t do_write(int fd, const struct iovec *data, int count, int64_t offset, int flags, int positioned) {
    char path[PATH_MAX];
    int ours = root && path_of(fd, path);
    uint64_t call = 0;
    struct iovec shortened;
    if (ours) {
        int how = fault("write", path);
        if (how == 1) return -1;
        if (how == 2 && count && data[0].iov_len > 4096) {
            shortened = (struct iovec){data[0].iov_base, 4096};
            data = &shortened;
            count = 1;
        }
        int64_t at = offset;
        if (!positioned) {
            at = lseek(fd, 0, SEEK_CUR);
            if (fcntl(fd, F_GETFL) & O_APPEND) {
                struct stat status;
                at = fstat(fd, &status) ? 0 : status.st_size;
            }
        }
        uint64_t length = 0;
        for (int i = 0; i < count; i++) length += data[i].iov_len;
        call = note(BEGIN_WRITE, 0, inode_of(fd), at, length, path, NULL, data, count);
    }
    ssize_t done;
    if (!positioned)
        done = syscall(SYS_writev, fd, data, count);
    else if (flags)
        done = syscall(SYS_pwritev2, fd, data, count, offset, 0, flags);
    else
        done = syscall(SYS_pwritev, fd, data, count, offset, 0);
    if (call) note(END_WRITE, call, 0, 0, done > 0 ? done : 0, NULL, NULL, NULL, 0);
    return done;
}

ssize_t write(int fd, const void *data, size_t length) {
    if (!root || fd == log_fd) return syscall(SYS_write, fd, data, length);
    char path[PATH_MAX];
    if (!path_of(fd, path)) return syscall(SYS_write, fd, data, length);
    struct iovec one = {(void *)data, length};
    return do_write(fd, &one, 1, 0, 0, 0);
}
ssize_t pwrite(int fd, const void *data, size_t length, off_t offset) {
    struct iovec one = {(void *)data, length};
    return do_write(fd, &one, 1, offset, 0, 1);
}
ssize_t pwrite64(int fd, const void *data, size_t length, off64_t offset) { return pwrite(fd, data, length, offset); }
ssize_t pwritev(int fd, const struct iovec *data, int count, off_t offset) {
    return do_write(fd, data, count, offset, 0, 1);
}
ssize_t pwritev64(int fd, const struct iovec *data, int count, off64_t offset) {
    return do_write(fd, data, count, offset, 0, 1);
}
ssize_t pwritev2(int fd, const struct iovec *data, int count, off_t offset, int flags) {
    return do_write(fd, data, count, offset, flags, 1);
}
ssize_t pwritev64v2(int fd, const struct iovec *data, int count, off64_t offset, int flags) {
    return do_write(fd, data, count, offset, flags, 1);
}

/* -- flushes */

static int do_flush(int fd, const char *name, long number) {
    char path[PATH_MAX] = "";
    /* The root folder itself counts, too. */
    if (!root || (!path_of(fd, path) && strcmp(path, root))) return (int)syscall(number, fd);
    if (fault(name, path)) return -1;
    struct stat status;
    int folder = !fstat(fd, &status) && S_ISDIR(status.st_mode);
    uint64_t call = 0;
    if (!folder) call = note(BEGIN_FLUSH, 0, status.st_ino, 0, 0, path, NULL, NULL, 0);
    int result = (int)syscall(number, fd);
    if (result == 0) note(folder ? FLUSH_FOLDER : END_FLUSH, call, status.st_ino, 0, 0, path, NULL, NULL, 0);
    return result;
}
int fsync(int fd) { return do_flush(fd, "flush", SYS_fsync); }
int fdatasync(int fd) { return do_flush(fd, "flush", SYS_fdatasync); }

/* -- sizes and names */

int ftruncate(int fd, off_t length) {
    char path[PATH_MAX];
    int ours = root && path_of(fd, path);
    int result = (int)syscall(SYS_ftruncate, fd, length);
    if (ours && result == 0) note(TRUNCATE, 0, inode_of(fd), length, 1, path, NULL, NULL, 0);
    return result;
}
int ftruncate64(int fd, off64_t length) { return ftruncate(fd, length); }

static int do_allocate(int fd, int mode, off_t offset, off_t length) {
    char path[PATH_MAX];
    int ours = root && path_of(fd, path);
    if (ours && fault("allocate", path)) return -1;
    int result = (int)syscall(SYS_fallocate, fd, mode, offset, length);
    struct stat status;
    if (ours && result == 0 && !fstat(fd, &status)) note(TRUNCATE, 0, status.st_ino, status.st_size, 0, path, NULL, NULL, 0);
    return result;
}
int fallocate(int fd, int mode, off_t offset, off_t length) { return do_allocate(fd, mode, offset, length); }
int fallocate64(int fd, int mode, off64_t offset, off64_t length) { return do_allocate(fd, mode, offset, length); }
int posix_fallocate(int fd, off_t offset, off_t length) { return do_allocate(fd, 0, offset, length) ? errno : 0; }
int posix_fallocate64(int fd, off64_t offset, off64_t length) { return posix_fallocate(fd, offset, length); }

static int do_open(int folder, const char *path, int flags, mode_t mode) {
    char full[PATH_MAX];
    int ours = (flags & O_CREAT) && absolute(folder, path, full);
    struct stat status;
    int there = ours && fstatat(AT_FDCWD, full, &status, 0) == 0;
    if (ours && !there && fault("create", full)) return -1;
    int fd = (int)syscall(SYS_openat, folder, path, flags, mode);
    if (ours && fd >= 0 && !there) note(CREATE, 0, inode_of(fd), 0, 0, full, NULL, NULL, 0);
    if (fd >= 0 && there && (flags & O_TRUNC)) note(TRUNCATE, 0, inode_of(fd), 0, 1, full, NULL, NULL, 0);
    return fd;
}
#define MODE(flags, mode) \
    mode_t mode = 0; \
    if ((flags) & (O_CREAT | O_TMPFILE)) { \
        va_list rest; \
        va_start(rest, flags); \
        mode = va_arg(rest, mode_t); \
        va_end(rest); \
    }
int open(const char *path, int flags, ...) {
    MODE(flags, mode)
    return do_open(AT_FDCWD, path, flags, mode);
}
int open64(const char *path, int flags, ...) {
    MODE(flags, mode)
    return do_open(AT_FDCWD, path, flags | O_LARGEFILE, mode);
}
int openat(int folder, const char *path, int flags, ...) {
    MODE(flags, mode)
    return do_open(folder, path, flags, mode);
}
int openat64(int folder, const char *path, int flags, ...) {
    MODE(flags, mode)
    return do_open(folder, path, flags | O_LARGEFILE, mode);
}

static int do_rename(int from_folder, const char *from, int to_folder, const char *to, unsigned flags) {
    char source[PATH_MAX], target[PATH_MAX];
    int ours = absolute(from_folder, from, source) && absolute(to_folder, to, target);
    if (ours && fault("rename", target)) return -1;
    struct stat status = {0};
    if (ours) fstatat(AT_FDCWD, source, &status, AT_SYMLINK_NOFOLLOW);
    int result = (int)syscall(SYS_renameat2, from_folder, from, to_folder, to, flags);
    if (ours && result == 0) note(RENAME, 0, status.st_ino, 0, 0, source, target, NULL, 0);
    return result;
}
int rename(const char *from, const char *to) { return do_rename(AT_FDCWD, from, AT_FDCWD, to, 0); }
int renameat(int a, const char *from, int b, const char *to) { return do_rename(a, from, b, to, 0); }
int renameat2(int a, const char *from, int b, const char *to, unsigned flags) {
    return do_rename(a, from, b, to, flags);
}

static int do_unlink(int folder, const char *path, int flags) {
    char full[PATH_MAX];
    int ours = absolute(folder, path, full);
    int result = (int)syscall(SYS_unlinkat, folder, path, flags);
    if (ours && result == 0) note(flags & AT_REMOVEDIR ? RMDIR : UNLINK, 0, 0, 0, 0, full, NULL, NULL, 0);
    return result;
}
int unlink(const char *path) { return do_unlink(AT_FDCWD, path, 0); }
int unlinkat(int folder, const char *path, int flags) { return do_unlink(folder, path, flags); }
int rmdir(const char *path) { return do_unlink(AT_FDCWD, path, AT_REMOVEDIR); }
int remove(const char *path) { return unlink(path) == 0 ? 0 : (errno == EISDIR ? rmdir(path) : -1); }

static int do_mkdir(int folder, const char *path, mode_t mode) {
    char full[PATH_MAX];
    int ours = absolute(folder, path, full);
    int result = (int)syscall(SYS_mkdirat, folder, path, mode);
    if (ours && result == 0) note(MKDIR, 0, 0, 0, 0, full, NULL, NULL, 0);
    return result;
}
int mkdir(const char *path, mode_t mode) { return do_mkdir(AT_FDCWD, path, mode); }
int mkdirat(int folder, const char *path, mode_t mode) { return do_mkdir(folder, path, mode); }
