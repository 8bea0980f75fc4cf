// Faults at file system calls, for LD_PRELOAD: counts the calls that a process makes below one folder, and lets call
// number N fail, be lost or be the last one. A process that never calls shim_arm() is not affected.
//
// build: cc -shared -fPIC -O2 -o shim.so shim.c -ldl     armed from Python: shim.py
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum fault { NONE, KILL_BEFORE, KILL_AFTER, REFUSED, LOST, REPLAYED, SHORT };

static struct {
    char root[PATH_MAX];
    size_t length;
    long first, last;  // numbers of the calls that are struck
    int fault, error;
    int reads;      // count calls that change nothing, too
    char call[16];  // strike and count this call alone; "": all
    int trace;      // file descriptor of the record, or -1
} plan = {.trace = -1};

static char denied[256];  // " name name ": calls that this file system does not have
static int denied_error;

static atomic_int armed;
static atomic_long calls;
static char* names[4096];  // by file descriptor: what was opened below the root

// root: absolute path. trace: where every counted call is noted, or -1.
void shim_arm(const char* root, const char* call, long first, long last, int fault, int error, int reads, int trace) {
    snprintf(plan.root, sizeof plan.root, "%s", root);
    snprintf(plan.call, sizeof plan.call, "%s", call);
    plan.length = strlen(root);
    plan.first = first, plan.last = last, plan.fault = fault, plan.error = error;
    plan.reads = reads, plan.trace = trace;
    atomic_store(&calls, 0);
    atomic_store(&armed, 1);
}

void shim_deny(const char* names, int error) {
    snprintf(denied, sizeof denied, " %s ", names);
    denied_error = error;
}

static int is_denied(const char* call) {
    char name[32];
    snprintf(name, sizeof name, " %s ", call);
    return strstr(denied, name) != NULL;
}

long shim_calls(void) {
    return atomic_load(&calls);
}

#define REAL(type, name, ...)         \
    static type (*real)(__VA_ARGS__); \
    if (!real) real = (type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

static ssize_t note(int fd, const void* data, size_t size) {
    REAL(ssize_t, "write", int, const void*, size_t);
    return real(fd, data, size);
}

static int below(const char* path) {
    return path && atomic_load(&armed) && !strncmp(path, plan.root, plan.length) &&
           (path[plan.length] == 0 || path[plan.length] == '/');
}

static const char* opened(int fd) {
    return atomic_load(&armed) && fd >= 0 && fd < 4096 ? names[fd] : NULL;
}

static void remember(int fd, const char* path) {
    if (fd >= 0 && fd < 4096) names[fd] = path ? strdup(path) : NULL;
}

// What happens to this call: its fault, or NONE. Notes it in the record.
static int strike(const char* call, const char* path, const char* other, int is_read) {
    if (is_read && !plan.reads) return NONE;
    if (plan.call[0] && strcmp(plan.call, call)) return NONE;
    long number = atomic_fetch_add(&calls, 1) + 1;
    if (plan.trace >= 0) {
        char line[3 * PATH_MAX];
        int size = snprintf(line, sizeof line, "%ld\t%s\t%s\t%s\n", number, call, path, other ? other : "");
        note(plan.trace, line, size);
    }
    if (number < plan.first || number > plan.last) return NONE;
    if (plan.fault == KILL_BEFORE) kill(getpid(), SIGKILL), pause();
    return plan.fault;
}

static void after(int fault) {
    if (fault == KILL_AFTER) kill(getpid(), SIGKILL), pause();
}

// What a server says that carried a request out, lost the answer, and is asked again.
static int replay_error(const char* call) {
    if (!strcmp(call, "link") || !strcmp(call, "mkdir") || !strcmp(call, "open") || !strcmp(call, "symlink"))
        return EEXIST;
    if (!strcmp(call, "unlink") || !strcmp(call, "rename")) return ENOENT;
    return EIO;
}

static int fail(int fault, const char* call) {
    errno = fault == REPLAYED ? replay_error(call) : plan.error;
    return -1;
}

// A call whose whole effect is in the file system.
#define WITH_PATH(call_name, path, other, is_read, real_call)  \
    if (!below(path) && !below(other)) return real_call;       \
    if (is_denied(call_name)) return errno = denied_error, -1; \
    int fault = strike(call_name, path, other, is_read);       \
    if (fault == REFUSED) return fail(fault, call_name);       \
    int result = real_call;                                    \
    after(fault);                                              \
    return fault == LOST || fault == REPLAYED ? fail(fault, call_name) : result

static int open_as(const char* path, int flags, mode_t mode, int (*real)(const char*, int, ...)) {
    if (!below(path)) return real(path, flags, mode);
    int fault = strike("open", path, NULL, !(flags & O_CREAT));
    if (fault == REFUSED) return fail(fault, "open");
    int fd = real(path, flags, mode);
    after(fault);
    if ((fault == LOST || fault == REPLAYED) && fd >= 0) {
        REAL(int, "close", int);
        real(fd);
        return fail(flags & O_CREAT ? fault : LOST, "open");
    }
    remember(fd, fd >= 0 ? path : NULL);
    return fd;
}

#define OPEN(name)                                                                 \
    int name(const char* path, int flags, ...) {                                   \
        va_list rest;                                                              \
        va_start(rest, flags);                                                     \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;    \
        va_end(rest);                                                              \
        static int (*real)(const char*, int, ...);                                 \
        if (!real) real = (int (*)(const char*, int, ...))dlsym(RTLD_NEXT, #name); \
        return open_as(path, flags, mode, real);                                   \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name, plain)                                                              \
    int name(int folder, const char* path, int flags, ...) {                             \
        va_list rest;                                                                    \
        va_start(rest, flags);                                                           \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;          \
        va_end(rest);                                                                    \
        static int (*real)(int, const char*, int, ...);                                  \
        if (!real) real = (int (*)(int, const char*, int, ...))dlsym(RTLD_NEXT, #name);  \
        return below(path) ? plain(path, flags, mode) : real(folder, path, flags, mode); \
    }
OPENAT(openat, open)
OPENAT(openat64, open64)

int close(int fd) {
    REAL(int, "close", int);
    const char* path = opened(fd);
    if (!path) return real(fd);
    int fault = strike("close", path, NULL, 0);
    remember(fd, NULL);
    int result = real(fd);  // Linux gives the descriptor back whatever it says
    after(fault);
    return fault >= REFUSED && fault != SHORT ? fail(fault, "close") : result;
}

ssize_t write(int fd, const void* data, size_t size) {
    REAL(ssize_t, "write", int, const void*, size_t);
    const char* path = opened(fd);
    if (!path) return real(fd, data, size);
    int fault = strike("write", path, NULL, 0);
    if (fault == REFUSED) return fail(fault, "write");
    ssize_t result = real(fd, data, fault != NONE && size > 1 ? size / 2 : size);  // what a failed write leaves is half
    after(fault);
    return fault == LOST || fault == REPLAYED ? fail(fault, "write") : result;
}

ssize_t read(int fd, void* data, size_t size) {
    REAL(ssize_t, "read", int, void*, size_t);
    const char* path = opened(fd);
    if (!path) return real(fd, data, size);
    int fault = strike("read", path, NULL, 1);
    if (fault >= REFUSED && fault != SHORT) return fail(fault, "read");
    return real(fd, data, fault == SHORT && size > 1 ? size / 2 : size);
}

#define PREAD(name)                                                                  \
    ssize_t name(int fd, void* data, size_t size, off_t offset) {                    \
        REAL(ssize_t, #name, int, void*, size_t, off_t);                             \
        const char* path = opened(fd);                                               \
        if (!path) return real(fd, data, size, offset);                              \
        int fault = strike("read", path, NULL, 1);                                   \
        if (fault >= REFUSED && fault != SHORT) return fail(fault, "read");          \
        return real(fd, data, fault == SHORT && size > 1 ? size / 2 : size, offset); \
    }
PREAD(pread)
PREAD(pread64)

static int sync_as(int fd, const char* name, int (*real)(int)) {
    const char* path = opened(fd);
    if (!path) return real(fd);
    int fault = strike(name, path, NULL, 0);
    if (fault == REFUSED) return fail(fault, name);
    int result = real(fd);
    after(fault);
    return fault == LOST || fault == REPLAYED ? fail(fault, name) : result;
}

int fsync(int fd) {
    REAL(int, "fsync", int);
    return sync_as(fd, "fsync", real);
}

int fdatasync(int fd) {
    REAL(int, "fdatasync", int);
    return sync_as(fd, "fsync", real);
}

int link(const char* from, const char* to) {
    REAL(int, "link", const char*, const char*);
    WITH_PATH("link", from, to, 0, real(from, to));
}

int linkat(int a, const char* from, int b, const char* to, int flags) {
    REAL(int, "linkat", int, const char*, int, const char*, int);
    WITH_PATH("link", from, to, 0, real(a, from, b, to, flags));
}

int symlink(const char* text, const char* path) {
    REAL(int, "symlink", const char*, const char*);
    WITH_PATH("symlink", path, NULL, 0, real(text, path));
}

int rename(const char* from, const char* to) {
    REAL(int, "rename", const char*, const char*);
    WITH_PATH("rename", from, to, 0, real(from, to));
}

int renameat(int a, const char* from, int b, const char* to) {
    REAL(int, "renameat", int, const char*, int, const char*);
    WITH_PATH("rename", from, to, 0, real(a, from, b, to));
}

int renameat2(int a, const char* from, int b, const char* to, unsigned flags) {
    REAL(int, "renameat2", int, const char*, int, const char*, unsigned);
    WITH_PATH("renameat2", from, to, 0, real(a, from, b, to, flags));
}

int unlink(const char* path) {
    REAL(int, "unlink", const char*);
    WITH_PATH("unlink", path, NULL, 0, real(path));
}

int unlinkat(int folder, const char* path, int flags) {
    REAL(int, "unlinkat", int, const char*, int);
    WITH_PATH("unlink", path, NULL, 0, real(folder, path, flags));
}

int mkdir(const char* path, mode_t mode) {
    REAL(int, "mkdir", const char*, mode_t);
    WITH_PATH("mkdir", path, NULL, 0, real(path, mode));
}

int mkdirat(int folder, const char* path, mode_t mode) {
    REAL(int, "mkdirat", int, const char*, mode_t);
    WITH_PATH("mkdir", path, NULL, 0, real(folder, path, mode));
}

#define STAT(name, ...)                                    \
    int name(const char* path, struct stat* out) {         \
        REAL(int, #name, const char*, struct stat*);       \
        WITH_PATH("stat", path, NULL, 1, real(path, out)); \
    }
STAT(stat)
STAT(lstat)
#undef STAT

int stat64(const char* path, struct stat64* out) {
    REAL(int, "stat64", const char*, struct stat64*);
    WITH_PATH("stat", path, NULL, 1, real(path, out));
}

int lstat64(const char* path, struct stat64* out) {
    REAL(int, "lstat64", const char*, struct stat64*);
    WITH_PATH("stat", path, NULL, 1, real(path, out));
}

int fstatat(int folder, const char* path, struct stat* out, int flags) {
    REAL(int, "fstatat", int, const char*, struct stat*, int);
    WITH_PATH("stat", path, NULL, 1, real(folder, path, out, flags));
}

int fstatat64(int folder, const char* path, struct stat64* out, int flags) {
    REAL(int, "fstatat64", int, const char*, struct stat64*, int);
    WITH_PATH("stat", path, NULL, 1, real(folder, path, out, flags));
}

DIR* opendir(const char* path) {
    REAL(DIR*, "opendir", const char*);
    if (!below(path)) return real(path);
    int fault = strike("opendir", path, NULL, 1);
    if (fault < REFUSED || fault == SHORT) return real(path);
    fail(LOST, "opendir");
    return NULL;
}
