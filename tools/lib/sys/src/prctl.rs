//! Settings of the calling task that a restore compares with (prctl(2)).

/// `PR_TIMER_CREATE_RESTORE_IDS` (linux/prctl.h, Linux 6.15): timer_create(2) takes the id it is to use.
pub const PR_TIMER_CREATE_RESTORE_IDS: i32 = 77;

/// Whether the kernel knows [`PR_TIMER_CREATE_RESTORE_IDS`].
#[must_use]
pub fn timer_restore_ids() -> bool {
    const GET: libc::c_ulong = 2;
    let zero: libc::c_ulong = 0;
    // SAFETY: GET takes integers, touches no memory and changes nothing.
    unsafe { libc::prctl(PR_TIMER_CREATE_RESTORE_IDS, GET, zero, zero, zero) >= 0 }
}

/// Securebits of the calling thread (capabilities(7)).
#[must_use]
pub fn securebits() -> u32 {
    // SAFETY: PR_GET_SECUREBITS takes nothing and touches no memory.
    let ret = unsafe { libc::prctl(libc::PR_GET_SECUREBITS) };
    u32::try_from(ret).unwrap_or(0)
}

/// Lets `pid` and its descendants look into this process where Yama would forbid it (Documentation/admin-guide/LSM/Yama.rst).
/// Without Yama there is nothing to allow.
pub fn allow_tracer(pid: crate::Pid) {
    const PR_SET_PTRACER: libc::c_int = 0x5961_6d61;
    let zero: libc::c_ulong = 0;
    // SAFETY: PR_SET_PTRACER takes integers and touches no memory.
    unsafe { libc::prctl(PR_SET_PTRACER, libc::c_ulong::from(pid.0.unsigned_abs()), zero, zero, zero) };
}
