/* A file system that is broken, for LD_PRELOAD: flock() does what BROKEN says: a number is the errno that it fails with
   (37 ENOLCK: NFS without its lock daemon), "hangs" never returns, "crashes" ends the process. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
int flock(int fd, int operation) {
  const char *how = getenv("BROKEN");
  (void)fd, (void)operation;
  if (how && !strcmp(how, "hangs")) for (;;) pause();
  if (how && !strcmp(how, "crashes")) abort();
  errno = how ? atoi(how) : 37;
  return -1;
}
