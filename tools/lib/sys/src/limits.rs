//! Limits and signals that would end a tool in the middle of its work, where an error is what it needs.

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
