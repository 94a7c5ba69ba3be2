// libstdc++ counts references without atomic instructions while this is not zero. Where the headers are those of glibc 2.32
// or newer it asks for it, and an older glibc does not have it.
extern "C" {
extern char __libc_single_threaded;
char __libc_single_threaded = 0;
}
