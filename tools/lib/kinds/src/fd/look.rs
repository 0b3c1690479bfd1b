//! What sockets hold and no call tells: read from the kernel's memory ([`ckpt_sys::kernel`]), which is begun when it
//! is first needed.

use std::cell::OnceCell;

use ckpt_sys::{SysError, kernel::Kernel};

/// The ways into the kernel's memory, or why there is none.
#[derive(Debug, Default)]
pub struct Look {
    sockets: OnceCell<Result<Kernel, String>>,
    packets: OnceCell<Result<Kernel, String>>,
}

/// An error in words, with its errno.
fn words(error: &SysError) -> String {
    format!("{error}: {}", error.errno.desc())
}

fn open<'a>(cell: &'a OnceCell<Result<Kernel, String>>, module: &str) -> Result<&'a Kernel, String> {
    let kernel = cell.get_or_init(|| {
        Kernel::open(module).map_err(|error| {
            format!(
                "the kernel's memory can't be looked into, which takes CAP_BPF, CAP_PERFMON and BTF ({})",
                words(&error)
            )
        })
    });
    kernel.as_ref().map_err(Clone::clone)
}

impl Look {
    /// Asks about unix and TCP sockets; the error is why there is no answer.
    pub(super) fn at_sockets<T>(
        &self,
        ask: impl FnOnce(&Kernel) -> Result<T, SysError>,
    ) -> Result<T, String> {
        ask(open(&self.sockets, "unix")?).map_err(|error| words(&error))
    }

    /// Asks about packet sockets.
    pub(super) fn at_packets<T>(
        &self,
        ask: impl FnOnce(&Kernel) -> Result<T, SysError>,
    ) -> Result<T, String> {
        ask(open(&self.packets, "af_packet")?).map_err(|error| words(&error))
    }
}
