//! bpf(2): loading programs that are written out as instructions (Documentation/bpf/standardization/instruction-set.rst).

use std::os::fd::{FromRawFd, OwnedFd};

use nix::errno::Errno;

use crate::SysError;

/// Room for `union bpf_attr` as far as it is used.
pub(crate) type Attributes = [u64; 16];

/// Two fields of 32 bits.
pub(crate) fn both(low: u32, high: u32) -> u64 {
    u64::from(low) | u64::from(high) << 32
}

/// An instruction.
pub(crate) fn ins(code: u8, dst: u8, src: u8, offset: i16, imm: i32) -> u64 {
    u64::from(code)
        | u64::from(dst | src << 4) << 8
        | u64::from(offset.cast_unsigned()) << 16
        | u64::from(imm.cast_unsigned()) << 32
}

/// bpf(2). Addresses in `attributes` have to be those of buffers as the command wants them.
///
/// # Errors
/// EPERM: a privilege is missing, or the kernel is locked down.
pub(crate) fn call(command: i32, name: &'static str, attributes: &mut Attributes) -> Result<i32, SysError> {
    let size = size_of_val(attributes);
    // SAFETY: `attributes` is as large as the call is told, and the addresses in it are those of buffers that the callers hold.
    let ret = unsafe { libc::syscall(libc::SYS_bpf, command, attributes.as_mut_ptr(), size) };
    if ret < 0 {
        return Err(SysError::last(name, "a program that reads kernel memory"));
    }
    i32::try_from(ret).map_err(|_| SysError::new(name, "a descriptor", Errno::EOVERFLOW))
}

/// The same for a command that makes a descriptor, close-on-exec as all of them.
pub(crate) fn descriptor(
    command: i32,
    name: &'static str,
    attributes: &mut Attributes,
) -> Result<OwnedFd, SysError> {
    let number = call(command, name, attributes)?;
    // SAFETY: bpf(2) has just made it for us, and nobody else knows the number.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Loads a program of type `kind`, to be attached as `attach` to the function of BTF number `function`; 0 if it is not.
///
/// # Errors
/// Those of [`call`], EINVAL or EACCES if the kernel does not take the program.
pub(crate) fn load(code: &[u64], kind: u32, attach: u32, function: u32) -> Result<OwnedFd, SysError> {
    const PROG_LOAD: i32 = 5;
    let license = c"GPL";
    let mut attributes = [0; 16];
    attributes[0] = both(kind, u32::try_from(code.len()).unwrap_or(0));
    attributes[1] = code.as_ptr() as u64;
    attributes[2] = license.as_ptr() as u64;
    attributes[8] = both(0, attach);
    attributes[13] = both(0, function);
    descriptor(PROG_LOAD, "bpf(BPF_PROG_LOAD)", &mut attributes)
}
