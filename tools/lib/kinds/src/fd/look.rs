//! What sockets hold and no call tells: read from the kernel's memory ([`ckpt_sys::kernel`]), which is begun when it
//! is first needed.

use std::cell::OnceCell;

use ckpt_sys::{SysError, kernel::Kernel};

/// The way into the kernel's memory, or why there is none.
#[derive(Debug, Default)]
pub struct Look {
    kernel: OnceCell<Result<Kernel, String>>,
}

/// An error in words, with its errno.
fn words(error: &SysError) -> String {
    format!("{error}: {}", error.errno.desc())
}

impl Look {
    /// Asks the kernel about a socket; the error is why there is no answer.
    pub(super) fn ask<T>(&self, ask: impl FnOnce(&Kernel) -> Result<T, SysError>) -> Result<T, String> {
        let kernel = self.kernel.get_or_init(|| {
            Kernel::open().map_err(|error| {
                format!(
                    "the kernel's memory can't be looked into, which takes CAP_BPF, CAP_PERFMON and BTF ({})",
                    words(&error)
                )
            })
        });
        ask(kernel.as_ref().map_err(Clone::clone)?).map_err(|error| words(&error))
    }
}
