"""System calls by name and number, from asm/unistd_64.h (x86_64) and asm-generic/unistd.h (aarch64).

``HARMLESS``: those that change nothing outside the calling process. A filter allows them; every other system call is
an effect, also one that these tables do not know. ``NAMED``: the effects that have a name in ``effects.py``.
"""

from __future__ import annotations

from netloom.seccomp import numbers

HARMLESS = {
    "x86_64": numbers("""
    read 0  close 3  stat 4  fstat 5  lstat 6  poll 7  lseek 8  mmap 9  mprotect 10  munmap 11  brk 12
    rt_sigaction 13  rt_sigprocmask 14  rt_sigreturn 15  pread64 17  readv 19  access 21  pipe 22  select 23
    sched_yield 24  mremap 25  msync 26  mincore 27  madvise 28  dup 32  dup2 33  pause 34  nanosleep 35
    getitimer 36  alarm 37  setitimer 38  getpid 39  socket 41  connect 42  accept 43  recvfrom 45  recvmsg 47
    shutdown 48  listen 50  getsockname 51  getpeername 52  socketpair 53  setsockopt 54  getsockopt 55  exit 60
    wait4 61  uname 63  fcntl 72  flock 73  getdents 78  getcwd 79  chdir 80  fchdir 81  readlink 89  umask 95
    gettimeofday 96  getrlimit 97  getrusage 98  sysinfo 99  times 100  getuid 102  getgid 104  setuid 105
    setgid 106  geteuid 107  getegid 108  setpgid 109  getppid 110  getpgrp 111  setsid 112  setreuid 113
    setregid 114  getgroups 115  setgroups 116  setresuid 117  getresuid 118  setresgid 119  getresgid 120
    getpgid 121  setfsuid 122  setfsgid 123  getsid 124  capget 125  capset 126  rt_sigpending 127
    rt_sigtimedwait 128  rt_sigsuspend 130  sigaltstack 131  personality 135  statfs 137  fstatfs 138
    getpriority 140  setpriority 141  sched_setparam 142  sched_getparam 143  sched_setscheduler 144
    sched_getscheduler 145  sched_get_priority_max 146  sched_get_priority_min 147  mlock 149  munlock 150
    prctl 157  arch_prctl 158  setrlimit 160  gettid 186  getxattr 191  lgetxattr 192  fgetxattr 193  listxattr 194
    llistxattr 195  flistxattr 196  time 201  futex 202  sched_setaffinity 203  sched_getaffinity 204
    epoll_create 213  getdents64 217  set_tid_address 218  restart_syscall 219  fadvise64 221  timer_create 222
    timer_settime 223  timer_gettime 224  timer_delete 226  clock_gettime 228  clock_getres 229  clock_nanosleep 230
    exit_group 231  epoll_wait 232  epoll_ctl 233  waitid 247  ioprio_set 251  ioprio_get 252  inotify_init 253
    inotify_add_watch 254  inotify_rm_watch 255  newfstatat 262  readlinkat 267  faccessat 269  pselect6 270
    ppoll 271  set_robust_list 273  get_robust_list 274  epoll_pwait 281  signalfd 282  timerfd_create 283
    eventfd 284  timerfd_settime 286  timerfd_gettime 287  accept4 288  signalfd4 289  eventfd2 290
    epoll_create1 291  dup3 292  pipe2 293  inotify_init1 294  preadv 295  recvmmsg 299  prlimit64 302  setns 308
    getcpu 309  process_vm_readv 310  kcmp 312  seccomp 317  getrandom 318  memfd_create 319  membarrier 324
    mlock2 325  preadv2 327  statx 332  rseq 334  pidfd_open 434  close_range 436  pidfd_getfd 438  faccessat2 439
    epoll_pwait2 441
"""),
    "aarch64": numbers("""
    getxattr 8  lgetxattr 9  fgetxattr 10  listxattr 11  llistxattr 12  flistxattr 13  getcwd 17  eventfd2 19
    epoll_create1 20  epoll_ctl 21  epoll_pwait 22  dup 23  dup3 24  fcntl 25  inotify_init1 26
    inotify_add_watch 27  inotify_rm_watch 28  ioprio_set 30  ioprio_get 31  flock 32  statfs 43  fstatfs 44
    faccessat 48  chdir 49  fchdir 50  close 57  pipe2 59  getdents64 61  lseek 62  read 63  readv 65  pread64 67
    preadv 69  pselect6 72  ppoll 73  signalfd4 74  readlinkat 78  newfstatat 79  fstat 80  timerfd_create 85
    timerfd_settime 86  timerfd_gettime 87  capget 90  capset 91  personality 92  exit 93  exit_group 94  waitid 95
    set_tid_address 96  futex 98  set_robust_list 99  get_robust_list 100  nanosleep 101  getitimer 102
    setitimer 103  timer_create 107  timer_gettime 108  timer_settime 110  timer_delete 111  clock_gettime 113
    clock_getres 114  clock_nanosleep 115  sched_setparam 118  sched_setscheduler 119  sched_getscheduler 120
    sched_getparam 121  sched_setaffinity 122  sched_getaffinity 123  sched_yield 124  sched_get_priority_max 125
    sched_get_priority_min 126  restart_syscall 128  sigaltstack 132  rt_sigsuspend 133  rt_sigaction 134
    rt_sigprocmask 135  rt_sigpending 136  rt_sigtimedwait 137  rt_sigreturn 139  setpriority 140  getpriority 141
    setregid 143  setgid 144  setreuid 145  setuid 146  setresuid 147  getresuid 148  setresgid 149  getresgid 150
    setfsuid 151  setfsgid 152  times 153  setpgid 154  getpgid 155  getsid 156  setsid 157  getgroups 158
    setgroups 159  uname 160  getrlimit 163  setrlimit 164  getrusage 165  umask 166  prctl 167  getcpu 168
    gettimeofday 169  getpid 172  getppid 173  getuid 174  geteuid 175  getgid 176  getegid 177  gettid 178
    sysinfo 179  socket 198  socketpair 199  listen 201  accept 202  connect 203  getsockname 204  getpeername 205
    recvfrom 207  setsockopt 208  getsockopt 209  shutdown 210  recvmsg 212  brk 214  munmap 215  mremap 216
    mmap 222  fadvise64 223  mprotect 226  msync 227  mlock 228  munlock 229  mincore 232  madvise 233  accept4 242
    recvmmsg 243  wait4 260  prlimit64 261  setns 268  process_vm_readv 270  kcmp 272  seccomp 277  getrandom 278
    memfd_create 279  membarrier 283  mlock2 284  preadv2 286  statx 291  rseq 293  pidfd_open 434  close_range 436
    pidfd_getfd 438  faccessat2 439  epoll_pwait2 441
"""),
}
NAMED = {
    "x86_64": numbers("""
    write 1  open 2  ioctl 16  pwrite64 18  writev 20  sendfile 40  sendto 44  sendmsg 46  bind 49  clone 56
    fork 57  vfork 58  execve 59  kill 62  fsync 74  fdatasync 75  truncate 76  ftruncate 77  rename 82  mkdir 83
    rmdir 84  creat 85  link 86  unlink 87  symlink 88  chmod 90  fchmod 91  chown 92  fchown 93  lchown 94
    ptrace 101  rt_sigqueueinfo 129  utime 132  mknod 133  pivot_root 155  adjtimex 159  chroot 161  sync 162
    settimeofday 164  mount 165  umount2 166  reboot 169  sethostname 170  setdomainname 171  init_module 175
    delete_module 176  setxattr 188  lsetxattr 189  fsetxattr 190  removexattr 197  lremovexattr 198
    fremovexattr 199  tkill 200  clock_settime 227  tgkill 234  utimes 235  openat 257  mkdirat 258  mknodat 259
    fchownat 260  futimesat 261  unlinkat 263  renameat 264  linkat 265  symlinkat 266  fchmodat 268  unshare 272
    splice 275  tee 276  sync_file_range 277  utimensat 280  fallocate 285  pwritev 296  rt_tgsigqueueinfo 297
    clock_adjtime 305  syncfs 306  sendmmsg 307  process_vm_writev 311  finit_module 313  renameat2 316  bpf 321
    execveat 322  copy_file_range 326  pwritev2 328  pidfd_send_signal 424  io_uring_setup 425  io_uring_enter 426
    open_tree 428  move_mount 429  fsopen 430  fsconfig 431  fsmount 432  fspick 433  clone3 435  openat2 437
    mount_setattr 442
"""),
    "aarch64": numbers("""
    setxattr 5  lsetxattr 6  fsetxattr 7  removexattr 14  lremovexattr 15  fremovexattr 16  ioctl 29  mknodat 33
    mkdirat 34  unlinkat 35  symlinkat 36  linkat 37  renameat 38  umount2 39  mount 40  pivot_root 41  truncate 45
    ftruncate 46  fallocate 47  chroot 51  fchmod 52  fchmodat 53  fchownat 54  fchown 55  openat 56  write 64
    writev 66  pwrite64 68  pwritev 70  sendfile 71  splice 76  tee 77  sync 81  fsync 82  fdatasync 83
    sync_file_range 84  utimensat 88  unshare 97  init_module 105  delete_module 106  clock_settime 112  ptrace 117
    kill 129  tkill 130  tgkill 131  rt_sigqueueinfo 138  reboot 142  sethostname 161  setdomainname 162
    settimeofday 170  adjtimex 171  bind 200  sendto 206  sendmsg 211  clone 220  execve 221  rt_tgsigqueueinfo 240
    clock_adjtime 266  syncfs 267  sendmmsg 269  process_vm_writev 271  finit_module 273  renameat2 276  bpf 280
    execveat 281  copy_file_range 285  pwritev2 287  pidfd_send_signal 424  io_uring_setup 425  io_uring_enter 426
    open_tree 428  move_mount 429  fsopen 430  fsconfig 431  fsmount 432  fspick 433  clone3 435  openat2 437
    mount_setattr 442
"""),
}
