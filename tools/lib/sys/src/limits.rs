//! Limits and signals that would end a tool in the middle of its work, where an error is what it needs; and what the
//! standard library hides: descriptors 0 to 2 that are closed when a program starts are /dev/null by the time of `main`.

use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// The stack that the tools are written for, bytes: what Linux gives by default.
const STACK: u64 = 8 << 20;

/// Prepares a tool: soft limits on open files and on the stack go up as far as they may (a descriptor for
/// everything that is looked at adds up, and a stack that can't grow is SIGSEGV), and a file that may not get
/// larger (RLIMIT_FSIZE) is EFBIG rather than SIGXFSZ. Tasks that are restored get what their images tell.
pub fn prepare() {
    let _ = crate::file::raise_limit(0);
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_STACK)
        && soft < STACK.min(hard)
    {
        // The kernel asks for the limit when the stack grows, so it holds at once.
        let _ = setrlimit(Resource::RLIMIT_STACK, STACK.min(hard), hard);
    }
    // SAFETY: to ignore a signal installs no handler, and nothing here relies on SIGXFSZ.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
}

static STDOUT_WAS_CLOSED: AtomicBool = AtomicBool::new(false);

/// The C library calls what this section lists before the standard library's own start.
#[used]
// SAFETY: the section is an array of such functions (gABI, "Initialization and Termination Functions"), and this one makes a
// system call and sets a flag.
#[unsafe(link_section = ".init_array")]
static LOOK: extern "C" fn() = look;

extern "C" fn look() {
    // SAFETY: F_GETFD takes nothing, and touches no memory.
    let closed = unsafe { libc::fcntl(1, libc::F_GETFD) } < 0;
    STDOUT_WAS_CLOSED.store(closed, Ordering::Relaxed);
}

/// Whether this program was started with standard output closed.
#[must_use]
pub fn stdout_was_closed() -> bool {
    // Named, so that the linker keeps it.
    std::hint::black_box(&LOOK);
    STDOUT_WAS_CLOSED.load(Ordering::Relaxed)
}
